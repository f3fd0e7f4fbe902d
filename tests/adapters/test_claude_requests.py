"""Claude: what is sent, to which model, and where to."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sys
from typing import Any

import pytest
from messaging import KEY, a_call, an_adapter, failure, run
from pydantic import BaseModel, Field
from yielded import drain, text_of

from perdure.adapter import Call, LoadedFile, Resume
from perdure.errors import InvalidRequest, NotConfigured
from perdure.events import Event
from perdure.task import Attachment, Message, Task, TaskConstraints, Tool
from perdure_adapters import ClaudeAdapter
from perdure_adapters._claude_models import claude_model
from perdure_adapters._claude_request import message_body
from servers.messages import TEXT, MessagesServer

NEW = "claude-sonnet-5-5"
OLD = "claude-haiku-4-5"


def body_of(model: str, resume: Resume | None = None, **fields: Any) -> dict[str, Any]:
    """Return the body of a request."""
    fields.setdefault("prompt", "x")
    limits = {k: fields.pop(k) for k in list(fields) if k in TaskConstraints.model_fields}
    task = Task(constraints=TaskConstraints(**limits), **fields)
    return message_body(Call(task=task, task_id="t", resume=resume), model, task.output_schema)


class TestRequest:
    """What is sent."""

    async def test_the_conversation(self, messages_server: MessagesServer) -> None:
        """The system prompt apart; earlier turns, facts and the question, in that order."""
        turns = (
            Message(role="user", content="Hi"),
            Message(role="assistant", content="Hello"),
            Message(role="user", content="And now?"),
        )
        context = {"place": "a ship", "crew": ["Ann", "Bob"]}
        await run(messages_server, a_call(messages=turns, system="Be brief.", context=context))
        (sent,) = messages_server.messages
        assert sent.body["system"] == "Be brief."
        assert sent.body["messages"] == [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {
                "role": "user",
                "content": '<context name="place">\na ship\n</context>\n\n'
                '<context name="crew">\n[\n  "Ann",\n  "Bob"\n]\n</context>\n\nAnd now?',
            },
        ]

    async def test_parameters(self, messages_server: MessagesServer) -> None:
        """Constraints and options are fields of the body; what isn't set isn't sent."""
        constraints = TaskConstraints(max_tokens=50, temperature=0.5, stop_sequences=("END", "."))
        call = a_call(OLD, constraints=constraints, options={"top_k": 40, "betas": ["a-1", "b-2"]})
        await run(messages_server, call)
        await run(messages_server, a_call(NEW))
        first, second = messages_server.messages
        del first.body["messages"]
        assert first.body == {
            "model": OLD,
            "stream": True,
            "max_tokens": 50,
            "temperature": 0.5,
            "stop_sequences": ["END", "."],
            "top_k": 40,
        }
        assert first.headers["anthropic-beta"] == "a-1,b-2"
        assert second.body.keys() == {"model", "stream", "max_tokens", "messages"}
        assert "anthropic-beta" not in second.headers

    @pytest.mark.parametrize("name", ["messages", "model", "stream"])
    async def test_options_that_would_break_the_reading(
        self, messages_server: MessagesServer, name: str
    ) -> None:
        """What the adapter sets itself can't be overridden."""
        error = await failure(messages_server, a_call(options={name: 2}))
        assert type(error) is InvalidRequest
        assert f"options.{name}" in str(error)
        assert not messages_server.seen

    async def test_betas_are_a_list(self, messages_server: MessagesServer) -> None:
        """One name alone would be sent letter by letter."""
        error = await failure(messages_server, a_call(options={"betas": "a-1"}))
        assert type(error) is InvalidRequest
        assert "options.betas" in str(error)

    def test_options_join_and_replace(self) -> None:
        """Tools of the platform's own join the task's; other fields are replaced."""
        search = {"type": "web_search_20250305", "name": "web_search"}
        body = body_of(
            NEW,
            tools=(Tool(name="weather"),),
            reasoning_effort="low",
            output_schema={"type": "object"},
            options={
                "tools": [search],
                "max_tokens": 7,
                "output_config": {"effort": "max"},
                "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
            },
        )
        assert body["tools"][0]["name"] == "weather"
        assert body["tools"][1] == search
        assert body["max_tokens"] == 7
        assert body["output_config"]["effort"] == "max"
        assert body["output_config"]["format"]["type"] == "json_schema"
        assert body["system"][0]["text"] == "s"

    def test_tools(self) -> None:
        """They have a name, what they are for, and the schema of their arguments."""

        class Place(BaseModel):
            city: str

        body = body_of(
            NEW,
            tools=(
                Tool(name="weather", description="Tells it.", parameters=Place),  # type: ignore[arg-type]
                Tool(name="now"),
                Tool(name="bare", parameters={"properties": {}}),
            ),
        )
        weather, now, bare = body["tools"]
        assert (weather["name"], weather["description"]) == ("weather", "Tells it.")
        assert weather["input_schema"]["properties"]["city"]["type"] == "string"
        assert now == {"name": "now", "input_schema": {"type": "object", "properties": {}}}
        assert bare["input_schema"] == {"type": "object", "properties": {}}

    async def test_a_schema(self, messages_server: MessagesServer) -> None:
        """It is sent in the form Claude takes: objects closed, bounds as words."""

        class City(BaseModel):
            name: str
            people: int = Field(ge=0)

        await run(messages_server, a_call(output_schema=City))
        form = messages_server.messages[0].body["output_config"]["format"]
        assert form["type"] == "json_schema"
        assert form["schema"]["additionalProperties"] is False
        assert form["schema"]["required"] == ["name", "people"]
        people = form["schema"]["properties"]["people"]
        assert people["type"] == "integer"
        assert "minimum" not in people
        assert "minimum: 0" in people["description"]

    @pytest.mark.parametrize("schema", [{}, {"type": ["string", "null"]}, {"items": 5}])
    async def test_a_schema_that_cant_be_turned(
        self, messages_server: MessagesServer, schema: dict[str, Any]
    ) -> None:
        """It is sent as it is: what is wrong with it is the platform's to say."""
        await run(messages_server, a_call(output_schema=schema))
        (sent,) = messages_server.messages
        assert sent.body["output_config"]["format"]["schema"] == schema

    async def test_files(self, messages_server: MessagesServer) -> None:
        """Texts go before the question, images and PDFs before both, as base64."""
        files = (
            _file("notes.txt", "text/plain", "Grüße".encode()),
            _file("dot.png", "image/png", b"\x89PNG"),
            _file("paper.pdf", "application/pdf", b"%PDF"),
        )
        await run(messages_server, a_call(prompt="What is this?", files=files))
        (message,) = messages_server.messages[0].body["messages"]
        image, paper, text = message["content"]
        assert image == {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw=="},
        }
        assert paper["type"] == "document"
        assert paper["title"] == "paper.pdf"
        assert base64.b64decode(paper["source"]["data"]) == b"%PDF"
        assert paper["source"]["media_type"] == "application/pdf"
        assert text == {
            "type": "text",
            "text": '<file name="notes.txt">\nGrüße\n</file>\n\nWhat is this?',
        }

    @pytest.mark.parametrize(
        ("files", "says"),
        [
            ([("a.zip", "application/zip", 4)], ["'a.zip'", "text, images"]),
            ([("big.png", "image/png", 8 << 20)], ["'big.png'", "8.0 MB", "scale it down"]),
            (
                [
                    ("small.pdf", "application/pdf", 9 << 20),
                    ("big.pdf", "application/pdf", 16 << 20),
                ],
                ["33.3 MB", "32 MB", "'big.pdf'", "16.0 MB"],
            ),
        ],
    )
    async def test_files_it_cant_take(
        self, messages_server: MessagesServer, files: list[tuple[str, str, int]], says: list[str]
    ) -> None:
        """Another kind of file, or too large a one, is refused by name before any request."""
        loaded = tuple(_file(name, media_type, b"x" * size) for name, media_type, size in files)
        error = await failure(messages_server, a_call(files=loaded))
        assert type(error) is InvalidRequest
        for words in says:
            assert words in str(error)
        assert not messages_server.seen

    def test_text_that_is_none(self) -> None:
        """A text file in another encoding is refused by name."""
        call = a_call(files=(_file("a.txt", "text/plain", b"\xff\xfe"),))
        with pytest.raises(InvalidRequest, match=r"a\.txt"):
            message_body(call, NEW)


class TestModels:
    """What depends on the model."""

    @pytest.mark.parametrize(
        ("name", "since"),
        [
            ("claude-sonnet-5-5", "4.7"),
            ("claude-opus-5", "4.7"),
            ("claude-opus-4-7", "4.7"),
            ("claude-mythos-preview", "4.7"),
            ("anthropic/claude-4.8-opus", "4.7"),
            ("claude-opus-10-1", "4.7"),
            ("claude-opus-4-6", "4.6"),
            ("claude-opus-4-5-20251101", "4"),
            ("anthropic.claude-opus-4-1-20250805-v1:0", "4"),
            ("claude-opus-4-20250514", "4"),
            ("claude-opus-4@20250514", "4"),
            ("claude-3-7-sonnet-latest", "4"),
            ("claude-3-5-haiku-20241022", "3.5"),
            ("claude-3-opus-20240229", "3"),
            ("claude-2.1", "3"),
            ("Smollm2", "other"),
        ],
    )
    def test_generations(self, name: str, since: str) -> None:
        """What a model takes follows from its name, wherever the number stands in it."""
        known = claude_model(name)
        expected = {
            "4.7": (64_000, False, False, "adaptive"),
            "4.6": (64_000, True, False, "adaptive"),
            "4": (32_000, True, True, "budget"),
            "3.5": (8_192, True, True, "none"),
            "3": (4_096, True, True, "none"),
            "other": (8_192, True, False, "budget"),
        }
        assert (known.max_tokens, known.temperature, known.prefill, known.thinking) == expected[
            since
        ]
        assert body_of(name)["max_tokens"] == known.max_tokens

    async def test_a_temperature_that_isnt_taken(self, messages_server: MessagesServer) -> None:
        """Models that take none get no request; the message says what to do."""
        call = a_call(NEW, constraints=TaskConstraints(temperature=0.5))
        error = await failure(messages_server, call)
        assert type(error) is InvalidRequest
        assert "temperature" in str(error)
        assert NEW in str(error)
        assert not messages_server.seen

    def test_a_temperature_above_one(self) -> None:
        """Claude's end at 1."""
        assert body_of(OLD, temperature=1)["temperature"] == 1
        with pytest.raises(InvalidRequest, match=r"1\.5 is above 1"):
            body_of(OLD, temperature=1.5)

    @pytest.mark.parametrize(
        ("model", "effort", "thinking", "config"),
        [
            (NEW, "none", {"type": "disabled"}, None),
            (NEW, "minimal", {"type": "adaptive", "display": "summarized"}, {"effort": "low"}),
            (NEW, "low", {"type": "adaptive", "display": "summarized"}, {"effort": "low"}),
            (NEW, "high", {"type": "adaptive", "display": "summarized"}, {"effort": "high"}),
            (OLD, "none", {"type": "disabled"}, None),
            (OLD, "minimal", {"type": "enabled", "budget_tokens": 1024}, None),
            (OLD, "medium", {"type": "enabled", "budget_tokens": 8192}, None),
            (OLD, "high", {"type": "enabled", "budget_tokens": 16000}, None),
            ("claude-3-5-haiku-latest", "none", None, None),
            (NEW, None, None, None),
        ],
    )
    def test_reasoning(
        self, model: str, effort: str | None, thinking: object, config: object
    ) -> None:
        """By effort on newer models, by a number of tokens on older ones."""
        body = body_of(model, reasoning_effort=effort)
        assert (body.get("thinking"), body.get("output_config")) == (thinking, config)

    def test_reasoning_fits_into_the_limit(self) -> None:
        """Thoughts count as output: they leave room for the answer, or it is said why not."""
        body = body_of(OLD, reasoning_effort="high", max_tokens=4000)
        assert body["thinking"]["budget_tokens"] == 2000
        with pytest.raises(InvalidRequest, match="raise max_tokens, which is 1000"):
            body_of(OLD, reasoning_effort="low", max_tokens=1000)

    def test_a_model_that_cant_reason(self) -> None:
        """Asking for it is refused."""
        with pytest.raises(InvalidRequest, match="claude-3-5-haiku-latest can't reason"):
            body_of("claude-3-5-haiku-latest", reasoning_effort="low")


class TestGoingOn:
    """A conversation that goes on from what there is."""

    def test_older_models_go_on_by_themselves(self) -> None:
        """The partial answer is the last word, for the model to go on with."""
        messages = body_of(OLD, resume=Resume("continue", "Hello fr"))["messages"]
        assert messages[1:] == [{"role": "assistant", "content": "Hello fr"}]

    @pytest.mark.parametrize(
        ("model", "fields"),
        [
            (NEW, {}),
            ("claude-sonnet-4-6", {}),
            ("smollm2", {}),
            (OLD, {"reasoning_effort": "low"}),
            (OLD, {"output_schema": {"type": "object"}}),
        ],
    )
    def test_others_are_asked_to(self, model: str, fields: dict[str, Any]) -> None:
        """Where a beginning can't be handed back, or not along with this, a user's turn asks."""
        messages = body_of(model, resume=Resume("continue", "Hello fr"), **fields)["messages"]
        assert messages[1] == {"role": "assistant", "content": "Hello fr"}
        assert messages[2]["role"] == "user"
        assert "cut off" in messages[2]["content"]
        assert len(messages) == 3

    def test_white_space_at_the_end(self) -> None:
        """It is refused as a beginning; cutting it off could double it."""
        messages = body_of(OLD, resume=Resume("continue", "Hello "))["messages"]
        assert messages[1]["content"] == "Hello "
        assert len(messages) == 3

    def test_nothing_to_go_on_from(self) -> None:
        """The question is asked as it is."""
        assert len(body_of(OLD, resume=Resume("continue", ""))["messages"]) == 1
        assert len(body_of(OLD, resume=Resume("continue", " \n"))["messages"]) == 1

    @pytest.mark.parametrize("model", [OLD, NEW])
    def test_a_repair(self, model: str) -> None:
        """The answer that can't be used, and what is wrong with it."""
        resume = Resume("repair", '{"a"', problem="it is no JSON")
        messages = body_of(model, resume=resume, output_schema={"type": "object"})["messages"]
        assert messages[1] == {"role": "assistant", "content": '{"a"'}
        assert "it is no JSON" in messages[2]["content"]


class TestSettings:
    """Where it goes, with what key, to which model."""

    async def test_without_a_key(self) -> None:
        """Nobody gave one, and it is Anthropic's own address: the message says what to set."""
        with pytest.raises(NotConfigured, match="ANTHROPIC_API_KEY"):
            ClaudeAdapter().check()
        with pytest.raises(NotConfigured, match="ANTHROPIC_API_KEY"):
            await drain(ClaudeAdapter(), a_call())
        ClaudeAdapter(api_key=KEY).check()
        ClaudeAdapter(base_url="http://127.0.0.1:1").check()

    @pytest.mark.parametrize("url", ["localhost:8080", "ftp://x", "http://", "http://x:y"])
    async def test_an_address_that_is_none(self, url: str) -> None:
        """An address without a scheme or host is refused."""
        assert type(await failure(url, a_call())) is NotConfigured

    async def test_the_environment(
        self, messages_server: MessagesServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Address, key and model can come from the environment."""
        monkeypatch.setenv("ANTHROPIC_BASE_URL", messages_server.url)
        monkeypatch.setenv("ANTHROPIC_API_KEY", f"{KEY}\n")
        monkeypatch.setenv("PERDURE_CLAUDE_MODEL", "from-environment")
        async with ClaudeAdapter() as adapter:
            await drain(adapter, a_call(model=None))
        (sent,) = messages_server.messages
        assert KEY in (sent.headers.get("x-api-key"), sent.headers["authorization"][7:])
        assert sent.body["model"] == "from-environment"

    async def test_a_token_in_place_of_a_key(
        self, messages_server: MessagesServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A key beats it, unless the caller gave the token."""
        monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "from-environment")
        await run(messages_server, a_call(), api_key=None)
        await run(messages_server, a_call())
        monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
        await run(messages_server, a_call(), api_key=None, auth_token="given")  # noqa: S106
        sent = [seen.headers["authorization"] for seen in messages_server.messages]
        assert sent == ["Bearer from-environment", f"Bearer {KEY}", "Bearer given"]

    async def test_the_file(self, messages_server: MessagesServer) -> None:
        """`perdure.toml` can hold all of it; a name it doesn't know is refused."""
        settings = {"base_url": messages_server.url, "api_key": KEY, "default_model": "of-the-file"}
        async with ClaudeAdapter(settings=settings) as adapter:
            await drain(adapter, a_call(model=None))
        assert messages_server.messages[0].body["model"] == "of-the-file"
        with pytest.raises(NotConfigured, match="api_key"):
            ClaudeAdapter(settings={"api_kee": KEY})

    @pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
    async def test_an_address_with_its_version(
        self, messages_server: MessagesServer, end: str
    ) -> None:
        """Whether `/v1` is there or not, it is there once in what is asked."""
        await run(f"{messages_server.url}{end}", a_call())
        assert messages_server.seen[0].path == "/v1/messages"

    async def test_a_server_of_ones_own_needs_no_key(
        self, messages_server: MessagesServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing is looked for elsewhere, a profile in the home folder for one."""
        monkeypatch.setenv("ANTHROPIC_PROFILE", "nobody")
        assert text_of(await run(messages_server, a_call(), api_key=None)) == TEXT

    async def test_a_proxy_is_not_for_this_machine(
        self, messages_server: MessagesServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What runs on loopback is reached directly, whatever proxy is set."""
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        assert text_of(await run(messages_server, a_call())) == TEXT

    async def test_the_tasks_model_comes_first(self, messages_server: MessagesServer) -> None:
        """The call's model, then the adapter's, then the platform's default."""
        await run(messages_server, a_call("of-the-task"), default_model="of-the-adapter")
        await run(messages_server, a_call(None), default_model="of-the-adapter")
        await run(messages_server, a_call(None))
        models = [seen.body["model"] for seen in messages_server.messages]
        assert models == ["of-the-task", "of-the-adapter", "claude-sonnet-5-5"]

    @pytest.mark.parametrize("key", ["two words", "ümlaut", "line\nbreak"])
    async def test_a_key_that_is_none(self, messages_server: MessagesServer, key: str) -> None:
        """A key that can't be one is refused before it is sent, and isn't shown."""
        error = await failure(messages_server, a_call(), api_key=key)
        assert type(error) is NotConfigured
        assert key not in str(error)
        assert not messages_server.seen

    def test_nothing_shows_the_key(self) -> None:
        """Neither the key nor a password in the address is in `repr`."""
        adapter = ClaudeAdapter(base_url=f"http://user:{KEY}@127.0.0.1:1?token={KEY}", api_key=KEY)
        assert repr(adapter) == (
            "ClaudeAdapter(base_url='http://127.0.0.1:1', default_model='claude-sonnet-5-5')"
        )
        assert KEY not in repr(vars(adapter))
        assert "api.anthropic.com" in repr(ClaudeAdapter())

    async def test_without_the_sdk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the SDK is missing the message is the command that installs it."""
        monkeypatch.setitem(sys.modules, "anthropic", None)  # importing it now fails
        error = await failure("http://127.0.0.1:1", a_call())
        assert type(error) is NotConfigured
        assert "pip install 'perdure[claude]'" in str(error)

    async def test_one_adapter_in_several_threads(self, messages_server: MessagesServer) -> None:
        """Each event loop has connections of its own."""
        adapter = an_adapter(messages_server)

        def elsewhere() -> list[Event]:
            async def use() -> list[Event]:
                async with adapter:
                    return await drain(adapter, a_call())

            return asyncio.run(use())

        async with adapter:
            here = await drain(adapter, a_call())
            there = await asyncio.gather(*(asyncio.to_thread(elsewhere) for _ in range(3)))
            again = await drain(adapter, a_call())
        assert {text_of(seen) for seen in (here, *there, again)} == {TEXT}

    async def test_headers_of_a_gateway(
        self, messages_server: MessagesServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the SDK's users set for their gateway is sent along."""
        monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "X-Gateway: one")
        await run(messages_server, a_call())
        assert messages_server.messages[0].headers["x-gateway"] == "one"

    @pytest.mark.parametrize("key", ["api_key", "auth_token"])
    async def test_headers_of_a_gateway_go_nowhere_else(
        self, messages_server: MessagesServer, monkeypatch: pytest.MonkeyPatch, key: str
    ) -> None:
        """An address that a project's file names gets none of them, and the file's own key."""
        names = ("Authorization", "X-Gateway", "anthropic-version", "Content-Type")
        headers = "\n".join(f"{name}: mine" for name in names)
        monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", f"{headers}\nodd")
        settings = {"base_url": messages_server.url, key: "of-the-file"}
        async with ClaudeAdapter(settings=settings) as adapter:
            await drain(adapter, a_call())
        sent = messages_server.messages[0].headers
        assert "mine" not in json.dumps(sent)
        assert "of-the-file" in (sent.get("authorization", "") + sent.get("x-api-key", ""))
        assert sent["anthropic-version"]


def _file(name: str, media_type: str, data: bytes) -> LoadedFile:
    digest = hashlib.sha256(data).hexdigest()
    return LoadedFile(
        Attachment(name=name, media_type=media_type, size=len(data), digest=digest), data
    )
