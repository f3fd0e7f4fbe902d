"""What Gemini is asked: the whole request, both ways."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest
from interacting import WAYS, a_call, adapter, failure, run
from yielded import end_of, text_of

from perdure.adapter import Call, LoadedFile, Resume
from perdure.errors import InvalidRequest
from perdure.task import Attachment, Message, TaskConstraints, Tool
from perdure_adapters._gemini_call import MAX_REQUEST
from perdure_adapters._prompt import GO_ON
from servers.gemini import TEXT, GeminiServer

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
PNG = b"\x89PNG\r\n\x1a\n\xff\xfe"
WEATHER = Tool(name="weather", description="The weather.", parameters=SCHEMA)


def loaded(name: str, media_type: str, data: bytes) -> LoadedFile:
    """Return a file as the engine hands it over."""
    about = Attachment(name=name, media_type=media_type, size=len(data), digest="0" * 64)
    return LoadedFile(about, data)


async def asked(server: GeminiServer, call: Call, way: str = "background") -> dict[str, Any]:
    """Return the body with which a call asks."""
    await run(server, call, way)
    return server.asked[-1].body


def camel(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields by the API's names: the SDK writes inner ones either way, and both count."""
    return {re.sub("_(.)", lambda found: found[1].upper(), k): v for k, v in fields.items()}


class TestInteractions:
    """The body of an interaction."""

    async def test_the_least(self, gemini_server: GeminiServer) -> None:
        """A prompt, in the background, and thoughts are asked for."""
        assert await asked(gemini_server, a_call()) == {
            "model": "gemini-3.8-flash",
            "stream": True,
            "background": True,
            "store": True,
            "input": [{"type": "user_input", "content": [{"type": "text", "text": "Say hello."}]}],
            "generation_config": {"thinking_summaries": "auto"},
        }

    async def test_all_there_is(self, gemini_server: GeminiServer) -> None:
        """System, turns, limits, schema, tools and options all have their place."""
        call = a_call(
            model="gemini-pro-latest",
            system="Be brief.",
            messages=(
                Message(role="user", content="One?"),
                Message(role="assistant", content="One."),
                Message(role="user", content="Two?"),
            ),
            context={"fact": "two"},
            constraints=TaskConstraints(
                max_tokens=50, temperature=0.5, stop_sequences=("END",), reasoning_effort="low"
            ),
            output_schema=SCHEMA,
            tools=(WEATHER,),
            options={"generation_config": {"seed": 7, "thinking_summaries": "none"}, "labels": {}},
        )
        body = await asked(gemini_server, call)
        assert body["model"] == "gemini-pro-latest"
        assert body["system_instruction"] == "Be brief."
        assert [step["type"] for step in body["input"]] == [
            "user_input",
            "model_output",
            "user_input",
        ]
        last = body["input"][-1]["content"][-1]["text"]
        assert last == '<context name="fact">\ntwo\n</context>\n\nTwo?'
        assert body["generation_config"] == {
            "max_output_tokens": 50,
            "temperature": 0.5,
            "stop_sequences": ["END"],
            "thinking_level": "low",
            "thinking_summaries": "none",
            "seed": 7,
        }
        assert body["response_format"] == {
            "type": "text",
            "mime_type": "application/json",
            "schema": SCHEMA,
        }
        assert body["tools"] == [
            {
                "type": "function",
                "name": "weather",
                "description": "The weather.",
                "parameters": SCHEMA,
            }
        ]
        assert body["labels"] == {}

    async def test_files(self, gemini_server: GeminiServer) -> None:
        """Text goes into the prompt, images and PDFs go before it."""
        files = [
            loaded("a.txt", "text/plain", b"alpha"),
            loaded("b.png", "image/png", PNG),
            loaded("c.pdf", "application/pdf", b"%PDF"),
        ]
        body = await asked(gemini_server, a_call(files=files))
        image, document, text = body["input"][0]["content"]
        assert (image["type"], image["mime_type"]) == ("image", "image/png")
        assert base64.b64decode(image["data"]) == PNG
        assert (document["type"], document["mime_type"]) == ("document", "application/pdf")
        assert base64.b64decode(document["data"]) == b"%PDF"
        assert text["text"] == '<file name="a.txt">\nalpha\n</file>\n\nSay hello.'

    async def test_thinking_cannot_be_switched_off(self, gemini_server: GeminiServer) -> None:
        """That is said before anything is sent."""
        call = a_call(constraints=TaskConstraints(reasoning_effort="none"))
        error = await failure(gemini_server, call)
        assert type(error) is InvalidRequest
        assert "minimal" in error.message
        assert not gemini_server.seen

    async def test_without_thoughts(self, gemini_server: GeminiServer) -> None:
        """A model that doesn't think need not be asked for its thoughts."""
        await run(gemini_server, a_call(), thoughts=False)
        assert "generation_config" not in gemini_server.asked[0].body


class TestGenerate:
    """The body of generateContent."""

    async def test_all_there_is(self, gemini_server: GeminiServer) -> None:
        """System, turns, limits, schema, tools and options all have their place."""
        call = a_call(
            system="Be brief.",
            messages=(
                Message(role="user", content="One?"),
                Message(role="assistant", content="One."),
                Message(role="user", content="Two?"),
            ),
            constraints=TaskConstraints(
                max_tokens=50, temperature=0.5, stop_sequences=("END",), reasoning_effort="high"
            ),
            output_schema=SCHEMA,
            tools=(WEATHER,),
            options={"generationConfig": {"seed": 7}, "labels": {"a": "b"}},
        )
        body = await asked(gemini_server, call, "generate")
        path = gemini_server.asked[0].path
        assert path == "/v1/models/gemini-3.8-flash:streamGenerateContent?alt=sse"
        assert [(turn["role"], turn["parts"][0]["text"]) for turn in body["contents"]] == [
            ("user", "One?"),
            ("model", "One."),
            ("user", "Two?"),
        ]
        assert body["systemInstruction"]["parts"] == [{"text": "Be brief."}]
        config = body["generationConfig"]
        assert camel(config.pop("thinkingConfig")) == {
            "includeThoughts": True,
            "thinkingLevel": "HIGH",
        }
        assert config == {
            "maxOutputTokens": 50,
            "temperature": 0.5,
            "stopSequences": ["END"],
            "responseMimeType": "application/json",
            "responseJsonSchema": SCHEMA,
            "seed": 7,
        }
        declared = camel(body["tools"][0]["functionDeclarations"][0])
        assert (declared["name"], declared["description"]) == ("weather", "The weather.")
        assert declared["parametersJsonSchema"] == SCHEMA
        assert body["labels"] == {"a": "b"}

    async def test_files(self, gemini_server: GeminiServer) -> None:
        """Images and PDFs are parts of their own."""
        files = [
            loaded("b.png", "image/png", PNG),
            loaded("c.pdf", "application/pdf", b"%PDF"),
        ]
        body = await asked(gemini_server, a_call(files=files), "generate")
        image, document, text = body["contents"][0]["parts"]
        assert camel(image["inlineData"])["mimeType"] == "image/png"
        assert base64.urlsafe_b64decode(image["inlineData"]["data"]) == PNG
        assert camel(document["inlineData"])["mimeType"] == "application/pdf"
        assert text == {"text": "Say hello."}

    async def test_thinking_can_be_switched_off(self, gemini_server: GeminiServer) -> None:
        """Here it is a budget of nothing."""
        call = a_call(constraints=TaskConstraints(reasoning_effort="none"))
        body = await asked(gemini_server, call, "generate")
        assert list(body["generationConfig"]["thinkingConfig"].values()) == [0]


@pytest.mark.parametrize("way", WAYS)
class TestBoth:
    """What holds however it is asked."""

    @pytest.mark.parametrize("mode", ["continue", "repair"])
    async def test_going_on(self, gemini_server: GeminiServer, way: str, mode: Any) -> None:
        """The answer there is, and what to do with it, are two more turns."""
        resume = Resume(mode, "Hel", problem="no JSON")
        body = await asked(gemini_server, a_call(resume=resume), way)
        turns = body.get("input") or body["contents"]
        assert len(turns) == 3
        texts = [(turn.get("content") or turn["parts"])[0]["text"] for turn in turns]
        assert texts[:2] == ["Say hello.", "Hel"]
        assert (GO_ON in texts[2]) == (mode == "continue")
        assert ("no JSON" in texts[2]) == (mode == "repair")

    @pytest.mark.parametrize("name", ["model", "stream", "input", "contents"])
    async def test_what_is_the_adapters(
        self, gemini_server: GeminiServer, way: str, name: str
    ) -> None:
        """An option that would break the reading is refused, unless it is another API's word."""
        other = "contents" if way != "generate" else "input"
        if name == other:
            return
        error = await failure(gemini_server, a_call(options={name: "x"}), way)
        assert type(error) is InvalidRequest
        assert f"options.{name}" in error.message
        assert not gemini_server.seen

    async def test_background_is_yes_or_no(self, gemini_server: GeminiServer, way: str) -> None:
        """Anything else is a mistake."""
        error = await failure(gemini_server, a_call(options={"background": "no"}), way)
        assert "true or false" in error.message

    async def test_files_it_does_not_take(self, gemini_server: GeminiServer, way: str) -> None:
        """They are named, and so is what to do."""
        files = [loaded("x.zip", "application/zip", b"PK")]
        error = await failure(gemini_server, a_call(files=files), way)
        assert "'x.zip'" in error.message
        assert "convert it" in error.message

    async def test_files_that_are_too_large(self, gemini_server: GeminiServer, way: str) -> None:
        """Their size in the request counts, and nothing is sent."""
        files = [loaded("b.png", "image/png", bytes(MAX_REQUEST * 3 // 4 + 3))]
        error = await failure(gemini_server, a_call(files=files), way)
        assert "20 MB" in error.message
        assert not gemini_server.seen

    async def test_a_second_event_loop(self, gemini_server: GeminiServer, way: str) -> None:
        """One adapter serves several; its connections belong to one each."""
        import asyncio
        import threading

        made = adapter(gemini_server, way)

        def elsewhere() -> None:
            async def ask() -> None:
                async with made:
                    seen = [event async for event in made.run(a_call())]
                assert text_of(seen) == TEXT

            asyncio.run(ask())

        async with made:
            first = [event async for event in made.run(a_call())]
            thread = threading.Thread(target=elsewhere)
            thread.start()
            await asyncio.to_thread(thread.join)
            second = [event async for event in made.run(a_call())]
        assert text_of(first) == text_of(second) == TEXT
        assert end_of(second).finish_reason == "stop"
        assert gemini_server.generations == 3
