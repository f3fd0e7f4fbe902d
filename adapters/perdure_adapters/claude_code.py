"""Claude Code, the agent that works on files, by claude-agent-sdk.

Each call is a process of Claude Code's in the directory that the task names. Its session outlives
it: after a crash, or where the process died, the next attempt takes the session up, and the output
goes on after what is there. The files are found by a look at the directory before and after.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from perdure.adapter import Call, Capabilities
from perdure.errors import (
    InvalidRequest,
    NotConfigured,
    PlatformError,
)
from perdure.events import Accepted, Event
from perdure_adapters._agent import AgentReader
from perdure_adapters._agent_client import AgentClient
from perdure_adapters._agent_process import Bookmark, end_leftover, end_session
from perdure_adapters._agent_request import AgentRequest, agent_request
from perdure_adapters._sdk import find_sdk, load_sdk, redact
from perdure_adapters._settings import Settings
from perdure_adapters._workspace import Workspace, look
from perdure_adapters.base import AsyncBasePlatformAdapter

if TYPE_CHECKING:
    from claude_agent_sdk import ClaudeAgentOptions

__all__ = ["ClaudeCodeAdapter"]

_EXTRA: Final = "claude_code"
_SETTINGS: Final = (
    "api_key",
    "auth_token",
    "base_url",
    "default_model",
    "directory",
)
_RETRIES: Final = "CLAUDE_CODE_MAX_RETRIES"
# What the environment has for where Claude Code usually goes.
_SECRET: Final = (
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "ANTHROPIC_CUSTOM_HEADERS",
    "CLAUDE_CODE_OAUTH_TOKEN",
)
_MOST_BUFFERED: Final = 64 * 1024 * 1024
"""Bytes of one message: what a tool gave back may hold a picture."""


class ClaudeCodeAdapter(AsyncBasePlatformAdapter):
    """Claude Code.

    Nothing is started, imported or checked before the first call. `task.options.directory` says
    where it works; besides it `task.options` may hold what `ClaudeAgentOptions` takes and JSON can
    say: `permission_mode` (`acceptEdits` where nobody says), `allowed_tools`, `disallowed_tools`,
    `max_turns`, `max_budget_usd`, `add_dirs`, `mcp_servers` and so on. A task's `system` is added
    to Claude Code's own system prompt; `options.system_prompt` replaces it.

    Args:
        api_key: The key. None takes `ANTHROPIC_API_KEY`; without one Claude Code uses what it is
            logged in with.
        auth_token: An OAuth token in its place. None takes `ANTHROPIC_AUTH_TOKEN`.
        base_url: Where the API begins. None takes `ANTHROPIC_BASE_URL`, else Anthropic's own.
        default_model: For tasks that name none. None takes `PERDURE_CLAUDE_CODE_MODEL`, else Claude
            Code's default.
        directory: For tasks that name none.
        cli_path: The program. None takes `PERDURE_CLAUDE_CODE_CLI`, else the one that comes with
            the SDK, else `claude` on the PATH.
        platform: The platform's name, for those who use several accounts side by side.
        settings: What `perdure.toml` says: the arguments above by their names, but for the program.
            An address from there gets no key of the environment.
    """

    platform = "claude_code"
    prices = "anthropic"
    capabilities = Capabilities(
        reattach=True,
        files=frozenset({"text"}),
        usage_on_the_way=True,
        reasoning=True,
        schema=True,
    )

    def __init__(
        self,
        *,
        api_key: str | None = None,
        auth_token: str | None = None,
        base_url: str | None = None,
        default_model: str | None = None,
        directory: str | os.PathLike[str] | None = None,
        cli_path: str | os.PathLike[str] | None = None,
        platform: str = "claude_code",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.platform = platform
        given = Settings(platform, settings, _SETTINGS)
        self.default_model = given.text("default_model", default_model, "PERDURE_CLAUDE_CODE_MODEL")
        self._directory = given.text("directory", None if directory is None else str(directory))
        # Not out of `perdure.toml`: that may have come with somebody else's project.
        program = os.environ.get("PERDURE_CLAUDE_CODE_CLI", "").strip() or None
        self._cli_path = program if cli_path is None else str(cli_path)
        # What the environment says goes to Claude Code with it.
        self._environment = {
            "ANTHROPIC_BASE_URL": given.text("base_url", base_url),
            "ANTHROPIC_API_KEY": given.text("api_key", api_key),
            "ANTHROPIC_AUTH_TOKEN": given.text("auth_token", auth_token),
        }
        self._of_file = given.file_names_address(base_url, "ANTHROPIC_BASE_URL")
        if os.environ.get("ANTHROPIC_BASE_URL", "").strip() and base_url is None:
            self._environment["ANTHROPIC_BASE_URL"] = None  # it beats the file
        self._leaving: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        """Return how it was made, the key left out."""
        return (
            f"{type(self).__name__}(directory={self._directory!r}, "
            f"default_model={self.default_model!r})"
        )

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Stream what Claude Code does, from a new session or one that is taken up."""
        request = agent_request(call, call.model or self.default_model, self._directory)
        self._check_settings()
        await load_sdk("claude_agent_sdk", extra=_EXTRA)
        _hush()
        directory = await asyncio.to_thread(_checked_directory, request.directory)
        begun = Bookmark.read(call.resume.cursor) if call.resume and request.resume else None
        workspace, bookmark = await asyncio.to_thread(_prepared, directory, request, begun)
        session = request.resume or str(uuid.uuid4())
        agent = AgentClient(self._options(request, directory, session), self._secrets(), session)
        try:
            await agent.start()
            bookmark = bookmark.of_process(agent.pid)
            # Before anything is asked, and paid for, the log knows what there is to go on with.
            yield Accepted(response_id=session, reattachable=True, cursor=bookmark.written())
            reader = AgentReader(
                session,
                bookmark,
                structured=call.task.output_schema is not None,
                before=call.resume.output if call.resume and request.resume else None,
            )
            working = _working(agent, request.prompt, reader, workspace)
            failure: PlatformError | None = None
            try:
                async with contextlib.aclosing(working) as events:
                    async for event in events:
                        yield event
            except PlatformError as error:
                failure = error
            await self._leave(agent, interrupt=not reader.ended)
            for file in await asyncio.to_thread(workspace.news):
                yield file
            if workspace.note:
                yield Accepted(response_id=session, reattachable=True, note=workspace.note)
            if failure is not None:
                raise failure
            for found in self._finished(reader, agent):
                yield found
        finally:
            await self._leave(agent, interrupt=True)

    def _finished(self, reader: AgentReader, agent: AgentClient) -> Iterator[Event]:
        if not reader.ended:
            raise agent.unfinished()
        try:
            yield from reader.finish()
        except PlatformError as error:
            error.message = redact(error.message, self._secrets())
            error.args = (error.message,)
            raise

    def check(self) -> None:
        """Raise `NotConfigured` where the SDK or the program is missing."""
        self._check_settings()
        find_sdk("claude_agent_sdk", extra=_EXTRA)
        if self._cli_path is not None and shutil.which(self._cli_path) is None:
            raise NotConfigured(
                f"the platform {self.platform!r}: cli_path: there is no program {self._cli_path!r}"
            )

    async def stop(self, response_id: str) -> None:
        """End what works on a session on this machine: a process that was lost may have left it."""
        await asyncio.to_thread(end_session, response_id)

    async def close(self) -> None:
        """Wait until no process is left, and close the adapter's own engine."""
        await super().close()
        loop = asyncio.get_running_loop()
        mine = [task for task in self._leaving if task.get_loop() is loop]
        if mine:
            await asyncio.wait(mine)

    def _check_settings(self) -> None:
        keys = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
        if self._of_file and not any(self._environment[name] for name in keys):
            raise NotConfigured(
                f"the platform {self.platform!r}: perdure.toml names a base_url; give an api_key "
                "for it there, too: what Claude Code is logged in with must not go to that address"
            )

    def _secrets(self) -> tuple[str | None, ...]:
        names = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
        return tuple(os.environ.get(n) for n in names) + tuple(self._environment[n] for n in names)

    def _options(self, request: AgentRequest, directory: Path, session: str) -> ClaudeAgentOptions:
        from claude_agent_sdk import AgentDefinition, ClaudeAgentOptions

        given = dict(request.options)
        environment = {name: text for name, text in self._environment.items() if text}
        # Each attempt belongs in the log; the next one goes on in the same session.
        environment.setdefault(_RETRIES, os.environ.get(_RETRIES, "0"))
        if self._of_file:  # what the environment has is not meant for that address
            for name in _SECRET:
                environment.setdefault(name, "")
        try:
            if "agents" in given:
                given["agents"] = {n: AgentDefinition(**of) for n, of in given["agents"].items()}
            return ClaudeAgentOptions(
                **given,
                cwd=directory,
                cli_path=self._cli_path,
                env=environment,
                include_partial_messages=True,
                max_buffer_size=_MOST_BUFFERED,
                resume=request.resume,
                session_id=None if request.resume else session,
            )
        except TypeError as error:
            raise InvalidRequest(f"options: Claude Code's SDK refuses them ({error})") from error

    async def _leave(self, agent: AgentClient, *, interrupt: bool) -> None:
        """End the process, whatever else happens; where it has ended this takes no time."""
        if agent.left:
            return
        agent.left = True
        ending = asyncio.ensure_future(agent.end(interrupt=interrupt))
        self._leaving.add(ending)
        ending.add_done_callback(self._leaving.discard)
        cancelled: asyncio.CancelledError | None = None
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled


async def _working(
    agent: AgentClient, prompt: str, reader: AgentReader, workspace: Workspace
) -> AsyncGenerator[Event, None]:
    """Yield what happens until the result has come, or the process has ended."""
    async with contextlib.aclosing(agent.messages(prompt)) as messages:
        async for message in messages:
            for found in reader.feed(message):
                yield found
            if _used_a_tool(message) and workspace.due:
                for file in await asyncio.to_thread(workspace.news):
                    yield file
            if reader.ended:
                return


def _prepared(
    directory: Path, request: AgentRequest, begun: Bookmark | None
) -> tuple[Workspace, Bookmark]:
    """Return the directory as it is before the work, and where the session stands; blocks.

    Args:
        directory: Where the work is done.
        request: What is asked.
        begun: Where the session stood in a process before, which is ended if it is still there.
    """
    if begun is not None:
        end_leftover(begun)
        # What that one wrote isn't known: the times of the files decide.
        return Workspace(directory, request.directory, since=begun.since, before=None), begun
    since = time.time_ns()
    before = look(directory)
    return Workspace(directory, request.directory, since=since, before=before), Bookmark(since)


def _hush() -> None:
    """Keep the SDK's log of errors, which are raised as well, off a program's stderr."""
    log = logging.getLogger("claude_agent_sdk")
    if not log.handlers:
        log.addHandler(logging.NullHandler())


def _used_a_tool(message: object) -> bool:
    return type(message).__name__ == "UserMessage"


def _checked_directory(named: str) -> Path:
    try:
        path = Path(named).expanduser().absolute()
        found, there = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, nobody's home, not to be seen
        shown = f"{named[:100]}…" if len(named) > 100 else named
        what = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequest(f"options.directory: {shown!r} can't be used: {what}") from error
    if not found:
        what = "is no directory" if there else "doesn't exist"
        raise InvalidRequest(f"options.directory: {named!r} {what}; make it first")
    if not os.access(path, os.R_OK | os.X_OK):
        raise InvalidRequest(f"options.directory: {named!r} can't be read by this user")
    return path
