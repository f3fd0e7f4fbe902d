"""A call as what Claude Code is asked: its options, the prompt, the directory. Pure: no SDK."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from perdure.adapter import Call
from perdure.errors import InvalidRequest
from perdure_adapters._prompt import file_kind, file_text, follow_up, opening

__all__ = ["AgentRequest", "agent_request"]

# What `task.options` may say, and of what kind it is. All else is the adapter's business.
_OPTIONS: Final[Mapping[str, tuple[type, ...]]] = {
    "add_dirs": (list,),
    "agents": (dict,),
    "allowed_tools": (list,),
    "betas": (list,),
    "disallowed_tools": (list,),
    "effort": (str,),
    "enable_file_checkpointing": (bool,),
    "fallback_model": (str,),
    "forward_subagent_text": (bool,),
    "max_budget_usd": (int, float),
    "max_thinking_tokens": (int,),
    "max_turns": (int,),
    "mcp_servers": (dict,),
    "permission_mode": (str,),
    "permission_prompt_tool_name": (str,),
    "plugins": (list,),
    "sandbox": (dict,),
    "setting_sources": (list,),
    "settings": (str,),
    "skills": (list, str),
    "strict_mcp_config": (bool,),
    "system_prompt": (str, dict),
    "task_budget": (dict,),
    "thinking": (dict,),
    "tools": (list, dict),
    "user": (str,),
    "verbatim_prompts": (bool,),
}
_TEXT_LISTS: Final = frozenset(
    {"add_dirs", "allowed_tools", "betas", "disallowed_tools", "setting_sources", "skills"}
)
# Options of the SDK that have a place of their own in a task.
_ELSEWHERE: Final[Mapping[str, str]] = {
    "cli_path": "set it where the adapter is made, or as PERDURE_CLAUDE_CODE_CLI",
    "cwd": "name the directory in options.directory",
    "env": "set it in the environment that perdure runs in",
    "model": "set constraints.model",
    "output_format": "set the task's output_schema",
    "resume": "perdure takes up sessions itself; remove it",
    "session_id": "perdure names the session itself; remove it",
}
_KINDS: Final[Mapping[type, str]] = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "text",
}
_EFFORTS: Final = {"minimal": "low", "low": "low", "medium": "medium", "high": "high"}
_LAST_WORDS: Final = 2_000
"""Characters of the output that a resumed agent is shown: where it has to go on."""

_TAKE_UP: Final = (
    "You were interrupted on the way, maybe in the middle of something. See what is done already, "
    "do nothing twice, and finish what you were asked."
)
_SAID: Final = (
    "\n\nWhat you were heard to say ends with this:\n\n<said>{said}</said>\n\nGo on exactly where "
    "it stops. Repeat nothing of it, and add no remark about the interruption."
)


@dataclass(frozen=True, slots=True)
class AgentRequest:
    """What Claude Code is asked.

    Attributes:
        directory: Where it works, as the task names it.
        prompt: What it is told.
        options: Fields of `ClaudeAgentOptions`.
        resume: The session that goes on; None for a new one.
    """

    directory: str
    prompt: str
    options: Mapping[str, Any]
    resume: str | None = None


def agent_request(call: Call, model: str | None, directory: str | None) -> AgentRequest:
    """Return what is asked for a call.

    Args:
        call: The call.
        model: The model; None leaves it to Claude Code.
        directory: Where it works if the task doesn't say.

    Raises:
        InvalidRequest: The task asks for what Claude Code can't do, or has an option that there
            isn't.
    """
    task = call.task
    _check_limits(call)
    given = dict(task.options)
    named = given.pop("directory", directory)
    if not isinstance(named, str) or not named.strip():
        raise InvalidRequest("options.directory: name the directory that Claude Code works in")
    for name, value in given.items():
        _check_option(name, value)
    options: dict[str, Any] = {
        "permission_mode": "acceptEdits",
        # Prompts may come out of a table: an `@path` in one is text, and reads no file.
        "verbatim_prompts": True,
        "system_prompt": _system(task.system, given),
        **_reasoning(call),
        **given,
    }
    if model is not None:
        options["model"] = model
    if task.output_schema is not None:
        options["output_format"] = {"type": "json_schema", "schema": task.output_schema}
    resume = call.resume
    if resume is not None and resume.mode == "reattach" and resume.response_id:
        return AgentRequest(named, _taking_up(resume.output), options, resume.response_id)
    return AgentRequest(named, _prompt(call), options)


def _check_limits(call: Call) -> None:
    limits = call.task.limits
    refused = {
        "max_tokens": (limits.max_tokens, "set options.max_turns or options.max_budget_usd"),
        "stop_sequences": (limits.stop_sequences or None, "leave them out"),
        "temperature": (limits.temperature, "leave it out"),
    }
    for name, (value, hint) in refused.items():
        if value is not None:
            raise InvalidRequest(f"{name}: Claude Code has no such setting; {hint}")
    if call.task.tools:
        raise InvalidRequest(
            "tools: Claude Code calls its tools itself; give it servers of tools in "
            "options.mcp_servers"
        )


def _check_option(name: str, value: object) -> None:
    if name in _ELSEWHERE:
        raise InvalidRequest(f"options.{name}: {_ELSEWHERE[name]}")
    kinds = _OPTIONS.get(name)
    if kinds is None:
        near = difflib.get_close_matches(name, [*_OPTIONS, "directory"], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(_OPTIONS))}"
        raise InvalidRequest(f"options.{name}: there is no such option of Claude Code; {hint}")
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise InvalidRequest(
            f"options.{name}: must be {' or '.join(_KINDS[kind] for kind in kinds)}"
        )
    items = cast("list[object]", value) if isinstance(value, list) else []
    if name in _TEXT_LISTS and not all(isinstance(item, str) for item in items):
        raise InvalidRequest(f"options.{name}: must be a list of texts")


def _system(system: str | None, given: Mapping[str, Any]) -> object:
    """Return the system prompt: Claude Code's own, the task's added to it.

    `options.system_prompt` puts another one in its place.
    """
    if system and "system_prompt" in given:
        raise InvalidRequest(
            "options.system_prompt: it replaces Claude Code's own and the task's `system`; give "
            "one of the two"
        )
    own = {"type": "preset", "preset": "claude_code"}
    return {**own, "append": system} if system else own


def _reasoning(call: Call) -> dict[str, Any]:
    effort = call.task.limits.reasoning_effort
    if effort is None:
        return {}
    if effort == "none":
        return {"thinking": {"type": "disabled"}}
    thinking = {"type": "adaptive", "display": "summarized"}
    return {"thinking": thinking, "effort": _EFFORTS[effort]}


def _prompt(call: Call) -> str:
    """Return the conversation as one text: the turns before, facts and files, the question."""
    task = call.task
    turns: list[tuple[str, str]] = [(turn.role, turn.content) for turn in task.messages[:-1]]
    texts: list[tuple[str, str]] = []
    for file in call.files:
        if file_kind(file.attachment) != "text":
            raise InvalidRequest(
                f"the file {file.attachment.name!r} is {file.attachment.media_type}; Claude Code "
                "takes text files along, others it reads itself: put it into the directory"
            )
        texts.append((file.attachment.name, file_text(file)))
    question = opening(task, texts) + task.question
    more = follow_up(call)
    if more is None:
        return _with_turns(turns, question)
    said, wanted = more
    return _with_turns([*turns, ("user", question), ("assistant", said)], wanted)


def _with_turns(turns: list[tuple[str, str]], last: str) -> str:
    if not turns:
        return last
    told = "\n".join(f'<turn role="{role}">\n{text}\n</turn>' for role, text in turns)
    return f"The conversation so far:\n\n<conversation>\n{told}\n</conversation>\n\n{last}"


def _taking_up(output: str) -> str:
    said = output[-_LAST_WORDS:]
    return _TAKE_UP + (_SAID.format(said=said) if said.strip() else "")
