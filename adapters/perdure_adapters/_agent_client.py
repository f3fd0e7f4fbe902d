"""One process of Claude Code's: started, spoken with, and ended whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Final, cast

from perdure.errors import (
    ConnectionLost,
    InvalidRequest,
    NotConfigured,
    PlatformError,
    PlatformTimeout,
    StreamTruncated,
)
from perdure_adapters._agent import lost_session, says_no_session
from perdure_adapters._sdk import redact

if TYPE_CHECKING:
    from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient

__all__ = ["AgentClient"]

_INTERRUPTED: Final = 0.5
"""Seconds Claude Code has for ending its turn by itself."""
_TERMINATED: Final = 2.0
"""Seconds it then has for ending itself, before it is killed."""


class AgentClient:
    """One process of Claude Code's, and the SDK's client for it.

    Args:
        options: How it is called.
        secrets: What must not be in errors.
        session: The session's id, for errors.
    """

    def __init__(
        self, options: ClaudeAgentOptions, secrets: tuple[str | None, ...], session: str
    ) -> None:
        from claude_agent_sdk import ClaudeSDKClient

        self._words: deque[str] = deque(maxlen=20)
        options.stderr = self._words.append
        self._client = ClaudeSDKClient(options)
        self._secrets = secrets
        self._session = session
        self._connecting: asyncio.Task[None] | None = None
        self._process: Any = None
        self.left = False
        """Whether its end has begun."""

    @property
    def pid(self) -> int | None:
        """The process's id, where the SDK lets it be seen."""
        pid = getattr(self._process, "pid", None)
        return pid if isinstance(pid, int) else None

    async def start(self) -> None:
        """Start the process, and wait until it listens.

        Raises:
            PlatformError: It can't be started, or doesn't answer.
        """
        # In a task of its own: cancelled inside, the SDK would leave the process behind.
        self._connecting = asyncio.create_task(self._client.connect())
        try:
            await asyncio.shield(self._connecting)
        except Exception as error:
            raise self._typed(error) from error
        self._process = _process_of(self._client)

    async def messages(self, prompt: str) -> AsyncGenerator[object, None]:
        """Say ``prompt`` and yield what comes.

        Raises:
            PlatformError: The process died, or says what nobody can read.
        """
        try:
            await self._client.query(prompt)
            stream = cast("AsyncGenerator[object, None]", self._client.receive_messages())
            async with contextlib.aclosing(stream) as received:
                async for message in received:
                    yield message
        except PlatformError:
            raise
        except Exception as error:
            raise self._typed(error) from error

    def unfinished(self) -> PlatformError:
        """Return the error for a process that ended, as if all were well, without a result."""
        words = self._last_words()
        if says_no_session(words):
            return lost_session(self._session)
        return StreamTruncated(f"Claude Code ended without a result{words}")

    async def end(self, *, interrupt: bool) -> None:
        """End the process and wait until it is gone.

        Args:
            interrupt: Whether it may be in the middle of something.
        """
        while interrupt:
            self._process = self._process or _process_of(self._client)
            if self._process is not None:
                await self._stop(self._process)
                break
            if self._connecting is None or self._connecting.done():
                break
            await asyncio.wait({self._connecting}, timeout=0.02)  # it is being started just now
        if self._connecting is not None:
            await asyncio.wait({self._connecting})
            if not self._connecting.cancelled():
                self._connecting.exception()
        with contextlib.suppress(Exception):
            await self._client.disconnect()

    async def _stop(self, process: Any) -> None:  # noqa: ANN401 - anyio's, which comes with the SDK
        if process.returncode is not None:
            return
        if self._connecting is not None and self._connecting.done():
            # So that it writes down what it was saying, and stops what its tools have started.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_INTERRUPTED):
                    await self._client.interrupt()
        for end in (process.terminate, process.kill):
            with contextlib.suppress(ProcessLookupError):
                end()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TERMINATED):
                    await process.wait()
                    return

    def _last_words(self) -> str:
        words = redact(" ".join(self._words), self._secrets).strip()
        return f": {words[-500:]}" if words else ""

    def _typed(self, error: Exception) -> PlatformError:
        """Return the typed form of what the SDK raises."""
        import claude_agent_sdk as sdk

        words = self._last_words()
        said = redact(str(error), self._secrets)
        if says_no_session(f"{said} {words}"):
            return lost_session(self._session)
        match error:
            case sdk.CLINotFoundError():
                return NotConfigured(
                    "the program of Claude Code is missing: reinstall 'perdure[claude_code]', or "
                    f"set cli_path ({said.splitlines()[0]})"
                )
            case sdk.ProcessError() if self._process is not None:
                code = error.exit_code
                return StreamTruncated(
                    f"Claude Code ended with exit code {code}, without a result{words}"
                )
            case sdk.ProcessError() if words:  # it doesn't like how it was called
                return InvalidRequest(f"Claude Code didn't start{words}")
            case sdk.CLIConnectionError() if "Argument list too long" in said:
                return InvalidRequest(
                    "the system prompt, the schema or an option is too long for Claude Code, which "
                    "takes 128 KB each: put it into the prompt or a file of the directory"
                )
            case sdk.CLIConnectionError() if "write" not in said:
                return NotConfigured(f"Claude Code can't be started: {said[:300]}")
            case sdk.ProcessError() | sdk.CLIConnectionError():
                return StreamTruncated(f"Claude Code ended at once ({said[:200]}){words}")
            case sdk.ClaudeSDKError():
                return StreamTruncated(f"Claude Code sent something unreadable ({said[:200]})")
            case TypeError() | ValueError() | AttributeError() | LookupError():
                return InvalidRequest(f"options: Claude Code's SDK refuses them ({said[:300]})")
            case _ if "timeout" in said.lower():
                return PlatformTimeout(f"Claude Code doesn't answer ({said[:200]}){words}")
            case _:
                return ConnectionLost(f"the connection to Claude Code broke ({said[:200]}){words}")


def _process_of(client: ClaudeSDKClient) -> Any:  # noqa: ANN401 - anyio's, which comes with the SDK
    """Return the client's process; None where there is none, or a newer SDK keeps it elsewhere."""
    return getattr(getattr(client, "_transport", None), "_process", None)
