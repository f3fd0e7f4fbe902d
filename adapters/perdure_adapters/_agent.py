"""What Claude Code says, message by message, into events. Pure: it knows the SDK by names only."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, cast

from perdure.errors import (
    InvalidRequest,
    OutputInvalid,
    Overloaded,
    PlatformError,
    QuotaExhausted,
    StreamTruncated,
)
from perdure.events import Accepted, Chunk, Completed, Event, UsageReported
from perdure.task import Usage
from perdure.text import check_json
from perdure_adapters._agent_process import Bookmark
from perdure_adapters._messages import messages_usage
from perdure_adapters._sdk import typed_error
from perdure_adapters._tools import ToolCallText

__all__ = ["AgentReader"]

_FINISH_REASONS: Final[Mapping[str, str]] = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}
# What Claude Code calls a failure of the API -> what the API calls it.
_FAULTS: Final[Mapping[str, str]] = {
    "authentication_failed": "authentication_error",
    "oauth_org_not_allowed": "authentication_error",
    "billing_error": "billing_error",
    "rate_limit": "rate_limit_error",
    "overloaded": "overloaded_error",
    "invalid_request": "invalid_request_error",
    "model_not_found": "not_found_error",
    "server_error": "api_error",
}
_NO_SESSION: Final = "no conversation found"


class AgentReader:
    """Turns the messages of one process into events; `finish` decides whether it came to an end.

    Args:
        session: The session's id.
        bookmark: Where it stands.
        structured: Whether a schema was given: then the output is the value Claude Code gives at
            the end, and what it says on the way counts as reasoning.
        before: The output of the processes before this one; None where there were none.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        session: str,
        bookmark: Bookmark,
        *,
        structured: bool = False,
        before: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._session = session
        self._bookmark = bookmark
        self._cursor_due = False
        self._structured = structured
        self._said_before = bool(before)
        # The call that a lost process was writing stays as it is, on a line of its own.
        self._new_line = before is not None
        self._clock = clock
        self._ended: dict[str, Any] = {}
        self._current: dict[str, Any] = {}
        self._settled = True  # whether the platform has counted what it says in the current message
        self._streamed: set[str] = set()
        self._tools = ToolCallText()
        self._calling: int | None = None
        self._said = False
        self._gap = False
        self._fault: str | None = None
        self._resets_at: float | None = None
        self._model: str | None = None
        self._result: object = None

    @property
    def ended(self) -> bool:
        """Whether the result has come."""
        return self._result is not None

    def feed(self, message: object) -> Iterator[Event]:
        """Yield what ``message``, one of the SDK's, says."""
        match type(message).__name__:
            case "SystemMessage":
                yield from self._begin(message)
            case "StreamEvent":
                yield from self._streaming(message)
            case "AssistantMessage":
                yield from self._assistant(message)
            case "RateLimitEvent":
                info = getattr(message, "rate_limit_info", None)
                at = getattr(info, "resets_at", None)
                if getattr(info, "status", None) == "rejected" and isinstance(at, int | float):
                    self._resets_at = float(at)
            case "ResultMessage":
                self._result = message
            case _:  # what tools gave back, news of hooks, what is yet to be invented
                return

    def finish(self) -> Iterator[Event]:
        """Yield what is left, `Completed` as the last.

        Raises:
            PlatformError: It ended badly, or not at all.
        """
        if self._result is None:
            raise StreamTruncated("Claude Code ended without a result")
        rest = self._tools.close()
        if rest:
            yield self._chunk(rest, "tool_call")
        error = self._error()
        if error is not None:
            usage = self._final_usage()
            if usage is not None:
                yield UsageReported(usage=usage)
            raise error
        yield from self._answer()
        reason = _text(self._result, "stop_reason") or None
        yield Completed(
            finish_reason=_FINISH_REASONS.get(reason or "", "stop"),
            platform_finish_reason=reason,
            usage=self._final_usage(),
        )

    # -- on the way ------------------------------------------------------------------------------

    def _begin(self, message: object) -> Iterator[Event]:
        if getattr(message, "subtype", None) != "init":
            return
        data = _mapping(getattr(message, "data", None))
        self._session = str(data.get("session_id") or self._session)
        model = data.get("model")
        self._model = model if isinstance(model, str) else None
        yield Accepted(
            response_id=self._session,
            model=self._model,
            reattachable=True,
            cursor=replace(self._bookmark, spent=self._usage()).written(),
        )

    def _streaming(self, message: object) -> Iterator[Event]:
        if getattr(message, "parent_tool_use_id", None) is not None:
            return  # an agent of the agent's: its result comes back as that of a tool
        event = _mapping(getattr(message, "event", None))
        index = event.get("index")
        match event.get("type"):
            case "message_start":
                started = _mapping(event.get("message"))
                self._streamed.add(str(started.get("id")))
                self._close_message()
                self._settled = False
                yield from self._count(started.get("usage"))
            case "content_block_start":
                block = _mapping(event.get("content_block"))
                yield from self._close_call(index)
                self._gap = self._gap or (block.get("type") == "text" and self._said)
                if block.get("type") == "tool_use":
                    yield from self._call(block, index)
            case "content_block_delta":
                yield from self._delta(_mapping(event.get("delta")), index)
            case "content_block_stop":
                yield from self._close_call(index)
            case "message_delta":
                self._settled = True
                yield from self._count(event.get("usage"))
            case "error":
                fault = _mapping(event.get("error"))
                self._fault = str(fault.get("type"))
            case _:
                return

    def _call(self, block: Mapping[str, Any], index: object) -> Iterator[Event]:
        self._calling = index if isinstance(index, int) else 0
        begun = self._tools.begin(str(block.get("id") or ""), str(block.get("name") or ""))
        yield self._chunk(begun, "tool_call")

    def _close_call(self, index: object) -> Iterator[Event]:
        if self._calling is not None and (index == self._calling or not isinstance(index, int)):
            self._calling = None
            yield self._chunk(self._tools.close(), "tool_call")

    def _delta(self, delta: Mapping[str, Any], index: object) -> Iterator[Event]:
        match delta.get("type"):
            case "text_delta":
                yield from self._say(delta.get("text"))
            case "thinking_delta":
                yield from self._think(delta.get("thinking"))
            case "input_json_delta" if index == self._calling:
                text = self._tools.arguments(str(delta.get("partial_json") or ""))
                if text:
                    yield self._chunk(text, "tool_call")
            case _:
                return

    def _assistant(self, message: object) -> Iterator[Event]:
        """Read a whole message: what it says was streamed before, but by versions that don't."""
        fault = getattr(message, "error", None)
        if isinstance(fault, str):
            self._fault = fault
            return  # its text is the error's, and comes with the result
        if getattr(message, "parent_tool_use_id", None) is not None:
            return
        if str(getattr(message, "message_id", None)) in self._streamed:
            return
        for block in cast("list[object]", getattr(message, "content", None) or []):
            match type(block).__name__:
                case "TextBlock":
                    self._gap = self._said
                    yield from self._say(getattr(block, "text", None))
                case "ThinkingBlock":
                    yield from self._think(getattr(block, "thinking", None))
                case "ToolUseBlock":
                    begun = self._tools.begin(_text(block, "id"), _text(block, "name"))
                    given = json.dumps(getattr(block, "input", None), ensure_ascii=False)
                    text = begun + self._tools.arguments(given) + self._tools.close()
                    yield self._chunk(text, "tool_call")
                case _:
                    continue

    def _say(self, text: object) -> Iterator[Event]:
        if not isinstance(text, str) or not text:
            return
        # What it says before and after using a tool are paragraphs of one output.
        said, self._gap = ("\n\n" if self._gap else "") + text, False
        self._said = True
        yield self._chunk(said, "reasoning" if self._structured else "text")

    def _think(self, text: object) -> Iterator[Event]:
        if isinstance(text, str) and text:
            yield self._chunk(text, "reasoning")

    def _chunk(self, text: str, kind: Any) -> Chunk:  # noqa: ANN401 - one of Chunk.kind
        if kind == "tool_call" and self._new_line:
            text, self._new_line = "\n" + text, False
        if not self._cursor_due:
            return Chunk(text=text, kind=kind)
        self._cursor_due = False
        spent = replace(self._bookmark, spent=self._usage())
        return Chunk(text=text, kind=kind, cursor=spent.written())

    # -- tokens ----------------------------------------------------------------------------------

    def _count(self, usage: object) -> Iterator[Event]:
        """Take in what is said of tokens; counts are for the message so far."""
        said = {name: value for name, value in _mapping(usage).items() if value is not None}
        if not said:
            return
        self._current |= said
        total = self._usage()
        if total is not None:
            self._cursor_due = True
            yield UsageReported(usage=total)

    def _close_message(self) -> None:
        for name, value in self._current.items():
            before = self._ended.get(name)
            if isinstance(value, int):
                self._ended[name] = value + (before if isinstance(before, int) else 0)
        self._current = {}

    def _usage(self) -> Usage | None:
        """The tokens counted so far, of the processes before this one and of this one."""
        known = [self._bookmark.spent]
        if self._ended:
            known.append(messages_usage(self._ended))
        if self._current:
            known.append(messages_usage(self._current, settled=self._settled))
        return _sum(known)

    def _final_usage(self) -> Usage | None:
        said = _mapping(getattr(self._result, "usage", None))
        if not said:
            return self._usage()
        total = _sum([self._bookmark.spent, messages_usage(said)])
        assert total is not None  # noqa: S101 - one of them is none
        names = ("usage", "model_usage", "total_cost_usd", "num_turns", "duration_api_ms")
        raw = {name: getattr(self._result, name, None) for name in names}
        known = {name: value for name, value in raw.items() if value is not None}
        try:
            return total.model_copy(update={"raw": check_json(known)})
        except ValueError:  # a number no database takes: the counts are what matters
            return total

    # -- the end ---------------------------------------------------------------------------------

    def _answer(self) -> Iterator[Event]:
        """Yield what only the result says."""
        value = getattr(self._result, "structured_output", None)
        text = _text(self._result, "result")
        if self._structured:
            answer = text if value is None else json.dumps(value, ensure_ascii=False)
            if answer:
                yield Chunk(text=answer)
        elif text and not (self._said or self._said_before):
            yield from self._say(text)

    def _error(self) -> PlatformError | None:
        subtype = _text(self._result, "subtype")
        if subtype == "success" and getattr(self._result, "is_error", None) is not True:
            return None
        errors = getattr(self._result, "errors", None)
        texts = [str(e) for e in cast("list[object]", errors)] if isinstance(errors, list) else []
        said = "; ".join(texts) or _text(self._result, "result") or subtype or "unknown error"
        match subtype:
            case "error_max_turns":
                turns = getattr(self._result, "num_turns", None)
                return InvalidRequest(
                    f"Claude Code stopped after {turns} turns, the most it may take: raise "
                    "options.max_turns"
                )
            case "error_max_budget_usd":
                return QuotaExhausted(
                    f"Claude Code stopped at its budget ({said}): raise options.max_budget_usd"
                )
            case "error_max_structured_output_retries":
                return OutputInvalid(
                    f"Claude Code gave no value that satisfies the schema ({said})"
                )
            case _:
                return self._failure(said)

    def _failure(self, said: str) -> PlatformError:
        if _NO_SESSION in said.lower():
            return lost_session(self._session)
        status = getattr(self._result, "api_error_status", None)
        known = isinstance(status, int) and status >= 300
        if not known and self._fault is None:
            return Overloaded(f"Claude Code reported: {said[:500]}")
        error = typed_error(
            f"Claude Code reported: {said}",
            status=status if known else None,
            names=(_FAULTS.get(self._fault or "", self._fault),),
        )
        if error.retryable and self._resets_at is not None:
            error.retry_after = min(max(self._resets_at - self._clock(), 0.0), 600.0)
        return error


def lost_session(session: str) -> StreamTruncated:
    """Return the error for a session that Claude Code doesn't know any more."""
    return StreamTruncated(
        f"Claude Code knows no session {session} in this directory any more; it begins anew",
        response_over=True,
    )


def says_no_session(text: str) -> bool:
    """Return whether these are Claude Code's words for a session it doesn't know."""
    return _NO_SESSION in text.lower()


def _sum(usages: list[Usage | None]) -> Usage | None:
    total: Usage | None = None
    for usage in usages:
        if usage is not None:
            total = usage if total is None else total + usage
    return total


def _mapping(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _text(holder: object, name: str) -> str:
    value = getattr(holder, name, None)
    return value if isinstance(value, str) else ""
