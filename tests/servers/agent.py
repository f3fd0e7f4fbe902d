"""A `claude` of our own: speaks stream-json like Claude Code, does what the prompt tells it to.

The prompt is a scenario as JSON, or any text for `DEFAULT`. It runs by itself, with the standard
library alone; `install` makes it a program. Beside it, it keeps `runs.jsonl`, a line a process, and
`sessions/`, what has been done in each session.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

TEXT = "Hello from an agent, with a snowman ☃ and two lines.\nThis is the second."
DEFAULT: dict[str, Any] = {"steps": [{"say": TEXT}]}
USAGE = {"input_tokens": 7, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 100}
"""Of each message, which says ten tokens."""


def install(folder: Path) -> Path:
    """Make the program in ``folder`` and return its path."""
    program = folder / "claude"
    source = Path(__file__).read_text("utf-8")
    program.write_text(f"#!{sys.executable} -IS\n{source}", "utf-8")
    program.chmod(0o755)
    return program


def runs(folder: Path) -> list[dict[str, Any]]:
    """Return what is known of the processes so far."""
    path = folder / "runs.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


class Agent:
    """One process."""

    def __init__(self) -> None:
        """Read the arguments."""
        self.home = Path(sys.argv[0]).resolve().parent
        self.control: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.prompts: queue.Queue[str | None] = queue.Queue()
        self.interrupted = threading.Event()
        self.closed = threading.Event()
        self.lines = 0
        self.cut: int | None = None
        self.exit_code = 0
        self.messages = 0
        self.spoken = False
        self.writing = threading.Lock()
        named = [a for a in sys.argv if a.startswith(("--resume=", "--session-id="))]
        self.resumed = bool(named) and named[0].startswith("--resume=")
        self.session = named[0].partition("=")[2] if named else "no-session"
        self.store = self.home / "sessions" / f"{self.session}.json"

    # -- the wire

    def listen(self) -> None:
        """Read what the other side says, in a thread of its own."""
        for line in sys.stdin:
            said = json.loads(line)
            if said["type"] == "control_request":
                request = said["request"]["subtype"]
                if request == "interrupt":
                    self.interrupted.set()
                answer = {"subtype": "success", "request_id": said["request_id"], "response": {}}
                self.write({"type": "control_response", "response": answer})
            elif said["type"] == "user":
                self.prompts.put(said["message"]["content"])
        self.closed.set()
        self.prompts.put(None)

    def write(self, message: dict[str, Any]) -> None:
        """Write a line."""
        with self.writing:
            sys.stdout.write(json.dumps(message) + "\n")
            sys.stdout.flush()

    def tell(self, message: dict[str, Any]) -> None:
        """Write a message, unless the run is cut here."""
        if self.lines == self.cut:
            os._exit(self.exit_code)
        self.lines += 1
        self.write({"session_id": self.session, "uuid": f"u{self.lines}", **message})

    def stream(self, event: dict[str, Any]) -> None:
        """Write a piece of a message."""
        self.tell({"type": "stream_event", "event": event, "parent_tool_use_id": None})

    # -- the work

    def run(self) -> None:
        """Do what the first prompt says, then wait for the end of the input."""
        threading.Thread(target=self.listen, daemon=True).start()
        prompt = self.prompts.get()
        with (self.home / "runs.jsonl").open("a", encoding="utf-8") as log:
            run = {"pid": os.getpid(), "argv": sys.argv[1:], "cwd": str(Path.cwd())}
            names = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL")
            environment = {n: os.environ[n] for n in names if n in os.environ}
            run |= {"prompt": prompt, "session": self.session, "env": environment}
            log.write(json.dumps(run) + "\n")
        if prompt is None:
            return
        state = self.begin(prompt)
        if state is None:
            return
        self.work(state)
        self.closed.wait()

    def begin(self, prompt: str) -> dict[str, Any] | None:
        """Return what the session holds; None where there is none."""
        if self.resumed and not self.store.exists():
            sys.stderr.write(f"No conversation found with session ID: {self.session}\n")
            os._exit(1)
        if self.resumed:
            state = json.loads(self.store.read_text("utf-8"))
            state["runs"] += 1
            said = prompt.partition("<said>")[2].partition("</said>")[0]
            state["from"] = state["text"].find(said) + len(said) if said else 0
        else:
            try:
                scenario = json.loads(prompt)
            except ValueError:
                scenario = DEFAULT
            says = [step["say"] for step in scenario["steps"] if "say" in step]
            state = {"scenario": scenario, "text": "\n\n".join(says), "done": [], "runs": 0}
            state["from"] = 0
        self.keep(state)
        return state

    def keep(self, state: dict[str, Any]) -> None:
        """Write the session down."""
        self.store.parent.mkdir(exist_ok=True)
        draft = self.store.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(state), "utf-8")
        draft.rename(self.store)

    def work(self, state: dict[str, Any]) -> None:
        """Take the steps that are left, and give the result."""
        scenario = state["scenario"]
        cuts = scenario.get("cuts", [])
        self.cut = cuts[state["runs"]] if state["runs"] < len(cuts) else None
        self.exit_code = scenario.get("exit_code", 0)
        if scenario.get("deaf"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        init = {"model": "claude-sonnet-5-5", "claude_code_version": "2.1.331"}
        self.tell({"type": "system", "subtype": "init", **init})
        place = 0
        for number, step in enumerate(scenario["steps"]):
            if self.interrupted.is_set() and not scenario.get("deaf"):
                return
            if "say" in step:
                text = step["say"] if place == 0 else "\n\n" + step["say"]
                left = text[max(0, state["from"] - place) :]
                place += len(text)
                if left:
                    # Where it goes on at the end of a paragraph, the gap is said, too.
                    first, self.spoken = not self.spoken, True
                    self.say(left if first else left.removeprefix("\n\n"), scenario)
            elif number not in state["done"]:
                self.do(step, number, state)
        result = scenario.get("result", {})
        if result is None:
            os._exit(self.exit_code)
        whole = {"subtype": "success", "is_error": False, "duration_ms": 5, "duration_api_ms": 3}
        whole |= {"num_turns": self.messages, "total_cost_usd": 0.125, "result": state["text"]}
        usage = {n: count * self.messages for n, count in USAGE.items()}
        whole |= {"usage": usage | {"output_tokens": 10 * self.messages}, "stop_reason": "end_turn"}
        self.tell({"type": "result", **whole, **result})

    def say(self, text: str, scenario: dict[str, Any]) -> None:
        """Say a text word by word."""
        words = text.split(" ")
        pieces = [word + " " for word in words[:-1]] + words[-1:]
        self.message([("text", "text_delta", "text", pieces)], scenario)

    def message(
        self,
        blocks: list[tuple[str, str, str, list[str]]],
        scenario: dict[str, Any],
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Give a message of these blocks, in pieces and as a whole."""
        self.messages += 1
        id_ = f"msg_{self.messages}"
        about = {"id": id_, "model": "claude-sonnet-5-5", "usage": {**USAGE, "output_tokens": 1}}
        partial = "--include-partial-messages" in sys.argv and not scenario.get("whole_messages")
        if partial:
            self.stream({"type": "message_start", "message": about})
        content: list[dict[str, Any]] = []
        for index, (kind, delta, field, pieces) in enumerate(blocks):
            begun = {"type": kind, **(extra or {})}
            if partial:
                self.stream({"type": "content_block_start", "index": index, "content_block": begun})
                for piece in pieces:
                    moved = {"type": delta, field: piece}
                    self.stream({"type": "content_block_delta", "index": index, "delta": moved})
                    time.sleep(scenario.get("delay", 0))
                self.stream({"type": "content_block_stop", "index": index})
            joined = "".join(pieces)
            if kind == "tool_use":
                content.append({**begun, "input": json.loads(joined)})
            else:
                signed = {"signature": "s"} if kind == "thinking" else {}
                content.append({**begun, kind: joined, **signed})
        if partial:
            end = {"stop_reason": "end_turn"}
            self.stream({"type": "message_delta", "delta": end, "usage": {"output_tokens": 10}})
            self.stream({"type": "message_stop"})
        self.tell({"type": "assistant", "message": {**about, "content": content}})

    def do(self, step: dict[str, Any], number: int, state: dict[str, Any]) -> None:
        """Take a step that isn't said."""
        scenario = state["scenario"]
        if "think" in step:
            self.message([("thinking", "thinking_delta", "thinking", [step["think"]])], scenario)
        elif "write" in step:
            name, content = step["write"]
            given = json.dumps({"file_path": name, "content": content})
            called = {"id": f"toolu_{number}", "name": "Write"}
            pieces = ["", given[:9], given[9:]]
            block = ("tool_use", "input_json_delta", "partial_json", pieces)
            self.message([block], scenario, called)
            path = Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, "utf-8")
            state["done"].append(number)
            self.keep(state)
            back = {"type": "tool_result", "tool_use_id": f"toolu_{number}", "content": "written"}
            self.tell({"type": "user", "message": {"role": "user", "content": [back]}})
        elif "delete" in step:
            Path(step["delete"]).unlink()
        elif "tell" in step:
            self.tell(step["tell"])
        elif "raw" in step:
            with self.writing:
                sys.stdout.write(step["raw"] + "\n")
                sys.stdout.flush()
        elif "complain" in step:
            sys.stderr.write(step["complain"] + "\n")
            sys.stderr.flush()
        elif "die" in step:
            os._exit(step["die"])
        elif "hang" in step and state["runs"] < step["hang"]:
            while scenario.get("deaf") or not self.interrupted.is_set():
                time.sleep(0.01)


if __name__ == "__main__":
    Agent().run()
