"""What ChatGPT is sent: the whole request, and what is refused before sending."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from responding import a_call, failure, run
from yielded import end_of, text_of

from perdure.adapter import LoadedFile, Resume
from perdure.errors import InvalidRequest
from perdure.task import Attachment, Message, TaskConstraints, Tool
from perdure_adapters import _response_request
from perdure_adapters._prompt import GO_ON
from perdure_adapters._strict import is_strict
from servers.chat import ChatServer
from servers.responses import TEXT, ResponsesServer


async def sent(server: ResponsesServer, call: Any, **how: Any) -> dict[str, Any]:
    """Return the body that a call sends."""
    await run(server, call, **how)
    return server.posts[-1].body


def a_file(name: str, media_type: str, data: bytes) -> LoadedFile:
    """Return a file as an adapter gets it."""
    attachment = Attachment(name=name, media_type=media_type, size=len(data), digest="0" * 64)
    return LoadedFile(attachment, data)


class City(BaseModel):
    """A schema that keeps OpenAI's rules."""

    model_config = ConfigDict(extra="forbid")
    name: str
    people: int | None


class Loose(BaseModel):
    """One that does not: a field has a default, and more are allowed."""

    name: str = "nowhere"


class TestBody:
    """Fields of the task, and where they go."""

    async def test_a_plain_prompt(self, responses: ResponsesServer) -> None:
        """Nothing is sent that nobody asked for."""
        assert await sent(responses, a_call()) == {
            "model": "m",
            "input": [{"role": "user", "content": "Say hello."}],
            "stream": True,
            "background": True,
            "store": True,
        }

    async def test_everything(self, responses: ResponsesServer) -> None:
        """Limits, system prompt, turns and facts."""
        call = a_call(
            system="Be brief.",
            messages=(
                Message(role="user", content="Hello"),
                Message(role="assistant", content="Yes?"),
                Message(role="user", content="Go on"),
            ),
            context={"place": "a ship"},
            constraints=TaskConstraints(max_tokens=9, temperature=0.5, reasoning_effort="low"),
        )
        body = await sent(responses, call)
        assert body["instructions"] == "Be brief."
        assert (body["max_output_tokens"], body["temperature"]) == (9, 0.5)
        assert body["reasoning"] == {"effort": "low"}
        assert [item["role"] for item in body["input"]] == ["user", "assistant", "user"]
        assert body["input"][2]["content"].endswith("a ship\n</context>\n\nGo on")

    async def test_the_default_model(self, responses: ResponsesServer) -> None:
        """It is asked where neither task nor setting names one."""
        assert (await sent(responses, a_call(model=None)))["model"] == "gpt-6.2-sol"
        assert (await sent(responses, a_call(model=None), default_model="x"))["model"] == "x"

    async def test_files(self, responses: ResponsesServer) -> None:
        """Images and PDF are parts of their own, text goes before the question."""
        call = a_call(
            loaded=(
                a_file("a.png", "image/png", b"png"),
                a_file("b.pdf", "application/pdf", b"pdf"),
                a_file("c.txt", "text/plain", b"some text"),
            )
        )
        image, document, question = (await sent(responses, call))["input"][0]["content"]
        assert image == {
            "type": "input_image",
            "image_url": f"data:image/png;base64,{base64.b64encode(b'png').decode()}",
        }
        assert (document["type"], document["filename"]) == ("input_file", "b.pdf")
        assert document["file_data"].startswith("data:application/pdf;base64,")
        assert question["text"].startswith('<file name="c.txt">\nsome text')
        assert question["text"].endswith("Say hello.")

    async def test_schemas(self, responses: ResponsesServer) -> None:
        """One that keeps OpenAI's rules binds the model strictly, any other is a hint."""
        body = await sent(responses, a_call(output_schema=City))
        wanted = body["text"]["format"]
        assert (wanted["type"], wanted["name"], wanted["strict"]) == ("json_schema", "City", True)
        assert wanted["schema"] == City.model_json_schema()
        body = await sent(responses, a_call(output_schema=Loose))
        assert body["text"]["format"]["strict"] is False
        body = await sent(
            responses, a_call(output_schema=City, options={"text": {"verbosity": "low"}})
        )
        assert set(body["text"]) == {"format", "verbosity"}

    async def test_tools(self, responses: ResponsesServer) -> None:
        """The task's functions, and the platform's own from the options beside them."""
        look = Tool(name="look", description="Looks.", parameters=City)
        wait = Tool(name="wait", parameters=Loose)
        call = a_call(tools=(look, wait), options={"tools": [{"type": "web_search"}]})
        tools = (await sent(responses, call))["tools"]
        assert [tool["type"] for tool in tools] == ["function", "function", "web_search"]
        assert tools[0] == {
            "type": "function",
            "name": "look",
            "description": "Looks.",
            "parameters": City.model_json_schema(),
            "strict": True,
        }
        assert tools[1]["strict"] is False

    async def test_options_go_along(self, responses: ResponsesServer) -> None:
        """What perdure doesn't know is passed on, and joined with what it does."""
        call = a_call(
            options={"top_p": 0.5, "reasoning": {"summary": "auto"}},
            constraints=TaskConstraints(reasoning_effort="high"),
        )
        body = await sent(responses, call)
        assert body["top_p"] == 0.5
        assert body["reasoning"] == {"effort": "high", "summary": "auto"}

    @pytest.mark.parametrize(
        ("resume", "last"),
        [
            (Resume("continue", output="Hel"), GO_ON),
            (Resume("repair", output="Hel", problem="it is no JSON"), "it is no JSON"),
        ],
    )
    async def test_going_on(self, responses: ResponsesServer, resume: Resume, last: str) -> None:
        """The answer there is, and what to do about it, are two more turns."""
        items = (await sent(responses, a_call(resume=resume)))["input"]
        assert items[1] == {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hel"}],
        }
        assert last in items[2]["content"]


class TestRefused:
    """What is refused before anything is sent."""

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"constraints": TaskConstraints(stop_sequences=("END",))}, "stop_sequences"),
            ({"options": {"input": "x"}}, "options.input"),
            ({"options": {"model": "x"}}, "options.model"),
            ({"options": {"stream": False}}, "options.stream"),
            ({"options": {"background": "yes"}}, "options.background"),
            ({"options": {"background": True, "store": False}}, "stored"),
            (
                {"options": {"tools": {}}, "tools": (Tool(name="look"),)},
                "options.tools",
            ),
            ({"loaded": (a_file("a.zip", "application/zip", b"x"),)}, "a.zip"),
            ({"loaded": (a_file("a.txt", "text/plain", b"\xff"),)}, "UTF-8"),
        ],
    )
    async def test_what_can_not_be_sent(
        self, responses: ResponsesServer, fields: dict[str, Any], words: str
    ) -> None:
        """One clear line, and no request."""
        error = await failure(responses, a_call(**fields))
        assert type(error) is InvalidRequest
        assert words in str(error)
        assert not responses.seen

    async def test_files_that_are_too_large(
        self, responses: ResponsesServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All images and documents together; it says which is the largest."""
        monkeypatch.setattr(_response_request, "_MOST_BYTES", 10)
        files = tuple(a_file(f"{n}.png", "image/png", b"x" * n) for n in (3, 5))
        await run(responses, a_call(loaded=files))
        more = (*files, a_file("c.pdf", "application/pdf", b"x" * 4))
        assert "'5.png'" in str(await failure(responses, a_call(loaded=more)))
        assert len(responses.posts) == 1


class TestChat:
    """Chat completions, by choice."""

    async def test_it_is_the_other_api(self, responses: ResponsesServer) -> None:
        """Stop sequences are known there, and the limit has its new name."""
        limits = TaskConstraints(max_tokens=9, stop_sequences=("END",))
        call = a_call(constraints=limits, output_schema=City, loaded=())
        events = await run(responses, call, api="chat")
        body = responses.chats[0].body
        assert (body["max_completion_tokens"], body["stop"]) == (9, ["END"])
        assert "max_tokens" not in body
        assert body["response_format"]["json_schema"]["strict"] is True
        assert not {"background", "store", "input"} & body.keys()
        assert text_of(events) == TEXT
        assert end_of(events).finish_reason == "stop"

    async def test_by_setting(self, chat_server: ChatServer) -> None:
        """`perdure.toml` can choose it."""
        from perdure_adapters import ChatGPTAdapter

        how = {"api": "chat"}
        async with ChatGPTAdapter(base_url=chat_server.url, settings=how) as adapter:
            assert text_of([event async for event in adapter.run(a_call())]) == TEXT


def strictly(**fields: Any) -> dict[str, Any]:
    """Return an object's schema that keeps the rules but for ``fields``."""
    return {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "required": ["a"],
        "additionalProperties": False,
        **fields,
    }


class TestStrict:
    """OpenAI's rules for strict schemas."""

    @pytest.mark.parametrize(
        "schema",
        [
            strictly(),
            City.model_json_schema(),
            strictly(properties={"a": {"anyOf": [{"type": "null"}, strictly()]}}),
            strictly(properties={"a": {"type": "array", "items": strictly()}}),
            strictly(properties={"a": {"$ref": "#/$defs/x"}}, **{"$defs": {"x": strictly()}}),
            strictly(properties={"a": {"enum": ["x", "y"]}}),
            strictly(properties={"a": {"type": "string", "format": "date-time"}}),
        ],
    )
    def test_kept(self, schema: dict[str, Any]) -> None:
        """Every object requires all it has and allows nothing else."""
        assert is_strict(schema)

    @pytest.mark.parametrize(
        "schema",
        [
            {},
            {"type": "array", "items": strictly()},
            {"anyOf": [strictly()]},
            strictly(additionalProperties=True),
            strictly(required=[]),
            strictly(required="a"),
            strictly(properties=[]),
            strictly(oneOf=[]),
            strictly(properties={"a": {}}),
            strictly(properties={"a": True}),
            strictly(properties={"a": {"type": "array"}}),
            strictly(properties={"a": {"type": "string", "default": "x"}}),
            strictly(properties={"a": {"type": "string", "minLength": 1}}),
            strictly(properties={"a": {"type": "string", "format": "uri"}}),
            strictly(properties={"a": {"$ref": "#/$defs/x", "description": "y"}}),
            strictly(properties={"a": {"anyOf": [{"type": "null"}, {"type": "object"}]}}),
            strictly(**{"$defs": {"x": Loose.model_json_schema()}}),
            strictly(properties={"a": {"enum": [str(n) for n in range(1001)]}}),
            Loose.model_json_schema(),
        ],
    )
    def test_broken(self, schema: dict[str, Any]) -> None:
        """Whatever the platform would answer with a 400 is sent as a hint only."""
        assert not is_strict(schema)

    def test_too_deep(self) -> None:
        """Ten levels are as many as there may be."""
        schema = strictly()
        for _ in range(11):
            schema = strictly(properties={"a": schema})
        assert not is_strict(schema)
