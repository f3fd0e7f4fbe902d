"""The adapter to OpenAI-compatible servers: what is sent, and where to."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys

import pytest
from chatting import KEY, a_call, failure, run
from yielded import drain, text_of

from perdure.adapter import Call, LoadedFile, Resume
from perdure.errors import (
    InvalidRequest,
    NotConfigured,
)
from perdure.events import Accepted, Event
from perdure.task import Attachment, Message, Task, TaskConstraints
from perdure_adapters import CompatibleAdapter
from servers.chat import TEXT, ChatServer


class TestRequest:
    """What is sent."""

    async def test_the_conversation(self, chat_server: ChatServer) -> None:
        """System prompt, earlier turns, facts and the question, in that order."""
        turns = (
            Message(role="user", content="Hi"),
            Message(role="assistant", content="Hello"),
            Message(role="user", content="And now?"),
        )
        context = {"place": "a ship", "crew": ["Ann", "Bob"]}
        await run(chat_server, a_call(messages=turns, system="Be brief.", context=context))
        (sent,) = chat_server.chats
        assert sent.body["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {
                "role": "user",
                "content": '<context name="place">\na ship\n</context>\n\n'
                '<context name="crew">\n[\n  "Ann",\n  "Bob"\n]\n</context>\n\nAnd now?',
            },
        ]

    async def test_parameters(self, chat_server: ChatServer) -> None:
        """Constraints and options are fields of the body; what isn't set isn't sent."""
        constraints = TaskConstraints(max_tokens=50, temperature=0.5)
        call = a_call(constraints=constraints, options={"seed": 7, "top_k": 40})
        await run(chat_server, call)
        await run(chat_server, a_call())
        first, second = (seen.body for seen in chat_server.chats)
        del first["messages"]
        assert first == {
            "model": "m",
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 50,
            "temperature": 0.5,
            "seed": 7,
            "top_k": 40,
        }
        assert second.keys() == {"model", "stream", "stream_options", "messages"}

    async def test_an_option_replaces_a_constraint(self, chat_server: ChatServer) -> None:
        """Servers that want `max_completion_tokens` get it, and not both."""
        call = a_call(
            constraints=TaskConstraints(max_tokens=50), options={"max_completion_tokens": 60}
        )
        await run(chat_server, call)
        assert "max_tokens" not in chat_server.chats[0].body

    @pytest.mark.parametrize("name", ["messages", "model", "n", "stream", "stream_options"])
    async def test_options_that_would_break_the_reading(
        self, chat_server: ChatServer, name: str
    ) -> None:
        """What the adapter sets itself can't be overridden."""
        error = await failure(chat_server, a_call(options={name: 2}))
        assert type(error) is InvalidRequest
        assert f"options.{name}" in str(error)
        assert not chat_server.seen

    async def test_files(self, chat_server: ChatServer) -> None:
        """Texts go before the question, images as data URLs."""
        call = a_call(prompt="What is this?")
        files = (
            _file("notes.txt", "text/plain", "Grüße".encode()),
            _file("data.json", "application/json", b"\xef\xbb\xbf{}"),
            _file("dot.png", "image/png", b"\x89PNG"),
        )
        await run(chat_server, Call(task=call.task, task_id="t", model="m", files=files))
        (message,) = chat_server.chats[0].body["messages"]
        image, text = message["content"]
        assert image["image_url"]["url"] == "data:image/png;base64,iVBORw=="
        assert text["text"] == (
            '<file name="notes.txt">\nGrüße\n</file>\n\n'
            '<file name="data.json">\n{}\n</file>\n\nWhat is this?'
        )

    @pytest.mark.parametrize(
        ("name", "media_type", "data"),
        [
            ("a.pdf", "application/pdf", b"%PDF"),
            ("a.zip", "application/zip", b"PK"),
            ("a.tiff", "image/tiff", b"II"),
            ("a.txt", "text/plain", b"\xff\xfe"),
        ],
    )
    async def test_files_it_cant_take(
        self, chat_server: ChatServer, name: str, media_type: str, data: bytes
    ) -> None:
        """Another kind of file, or text that is no UTF-8, is refused by name before any request."""
        call = Call(task=Task(prompt="x"), task_id="t", files=(_file(name, media_type, data),))
        error = await failure(chat_server, call)
        assert type(error) is InvalidRequest
        assert name in str(error)
        assert not chat_server.seen

    async def test_continuing(self, chat_server: ChatServer) -> None:
        """The partial answer is handed back as the assistant's, and the rest is asked for."""
        await run(chat_server, a_call(resume=Resume("continue", "Hello fr")))
        question, partial, on = chat_server.chats[0].body["messages"]
        assert question["role"] == "user"
        assert partial == {"role": "assistant", "content": "Hello fr"}
        assert on["role"] == "user"
        assert "cut off" in on["content"]

    async def test_continuing_from_nothing(self, chat_server: ChatServer) -> None:
        """Where nothing was said yet the question is asked as it is."""
        await run(chat_server, a_call(resume=Resume("continue", "")))
        assert len(chat_server.chats[0].body["messages"]) == 1


class TestSettings:
    """Where it goes, with what key, to which model."""

    async def test_without_a_server(self) -> None:
        """Nobody said where the server is: the message says what to set."""
        error = await failure("", a_call())
        assert type(error) is NotConfigured
        assert "PERDURE_COMPATIBLE_BASE_URL" in str(error)

    @pytest.mark.parametrize("url", ["localhost:8080/v1", "ftp://x/v1", "http://", "http://x:y/v1"])
    async def test_an_address_that_is_none(self, url: str) -> None:
        """An address without a scheme or host is refused with an example."""
        error = await failure(url, a_call())
        assert type(error) is NotConfigured
        assert "http://127.0.0.1:8080/v1" in str(error)

    async def test_the_environment(
        self, chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Address, key and model can come from the environment."""
        monkeypatch.setenv("PERDURE_COMPATIBLE_BASE_URL", chat_server.url)
        monkeypatch.setenv("PERDURE_COMPATIBLE_API_KEY", f"{KEY}\n")
        monkeypatch.setenv("PERDURE_COMPATIBLE_MODEL", "from-environment")
        monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere.invalid/v1")
        async with CompatibleAdapter() as adapter:
            await drain(adapter, a_call(model=None))
        (sent,) = chat_server.chats
        assert sent.headers["authorization"] == f"Bearer {KEY}"
        assert sent.body["model"] == "from-environment"

    async def test_openais_settings_go_to_openais_address_only(
        self, chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Keys, organization and headers made for one server are sent to no other."""
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_ADMIN_KEY", f"{KEY}-admin")
        monkeypatch.setenv("OPENAI_ORG_ID", f"org-{KEY}")
        monkeypatch.setenv("OPENAI_PROJECT_ID", f"project-{KEY}")
        monkeypatch.setenv(
            "OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}\nX-Gateway: {KEY}\nodd"
        )
        await run(chat_server, a_call(model=None))
        assert len(chat_server.seen) == 2
        assert KEY not in json.dumps([seen.headers for seen in chat_server.seen])
        monkeypatch.setenv("OPENAI_BASE_URL", chat_server.url)
        monkeypatch.delenv("OPENAI_CUSTOM_HEADERS")
        async with CompatibleAdapter() as adapter:
            await drain(adapter, a_call())
        sent = chat_server.seen[-1].headers
        assert sent["authorization"] == f"Bearer {KEY}"
        assert sent["openai-organization"] == f"org-{KEY}"

    async def test_a_proxy_is_not_for_this_machine(
        self, chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What runs on loopback is reached directly, whatever proxy is set."""
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        assert text_of(await run(chat_server, a_call())) == TEXT

    async def test_the_first_listed_model_is_used(self, chat_server: ChatServer) -> None:
        """Where nobody names a model the server is asked, once."""
        async with CompatibleAdapter(chat_server.url) as adapter:
            for _ in range(3):
                seen = await drain(adapter, a_call(model=None))
        assert isinstance(seen[0], Accepted)
        assert seen[0].model == "first-model"
        assert [s.path for s in chat_server.seen].count("/v1/models") == 1

    async def test_the_tasks_model_comes_first(self, chat_server: ChatServer) -> None:
        """The call's model, then the adapter's, then the server's."""
        await run(chat_server, a_call(model="of-the-task"), default_model="of-the-adapter")
        await run(chat_server, a_call(model=None), default_model="of-the-adapter")
        models = [seen.body["model"] for seen in chat_server.chats]
        assert models == ["of-the-task", "of-the-adapter"]

    async def test_no_model_at_all(self, chat_server: ChatServer) -> None:
        """A server that lists none: the message says how to name one."""
        chat_server.models = []
        error = await failure(chat_server, a_call(model=None))
        assert type(error) is InvalidRequest
        assert "PERDURE_COMPATIBLE_MODEL" in str(error)

    @pytest.mark.parametrize("key", ["two words", "ümlaut", "line\nbreak"])
    async def test_a_key_that_is_none(self, chat_server: ChatServer, key: str) -> None:
        """A key that can't be one is refused before it is sent, and isn't shown."""
        error = await failure(chat_server, a_call(), api_key=key)
        assert type(error) is NotConfigured
        assert key not in str(error)
        assert not chat_server.seen

    def test_nothing_shows_the_key(self) -> None:
        """Neither the key nor a password in the address is in `repr`."""
        adapter = CompatibleAdapter(
            f"http://user:{KEY}@127.0.0.1:1/v1?token={KEY}", api_key=KEY, default_model="m"
        )
        assert repr(adapter) == (
            "CompatibleAdapter('http://127.0.0.1:1/v1', default_model='m', platform='compatible')"
        )
        assert KEY not in repr(vars(adapter))

    async def test_without_the_sdk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the SDK is missing the message is the command that installs it."""
        monkeypatch.setitem(sys.modules, "openai", None)  # importing it now fails
        error = await failure("http://127.0.0.1:1/v1", a_call())
        assert type(error) is NotConfigured
        assert "pip install 'perdure[compatible]'" in str(error)

    async def test_one_adapter_in_several_threads(self, chat_server: ChatServer) -> None:
        """Each event loop has connections of its own."""
        adapter = CompatibleAdapter(chat_server.url)

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


def _file(name: str, media_type: str, data: bytes) -> LoadedFile:
    digest = hashlib.sha256(data).hexdigest()
    return LoadedFile(
        Attachment(name=name, media_type=media_type, size=len(data), digest=digest), data
    )
