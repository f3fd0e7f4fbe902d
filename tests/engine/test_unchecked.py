"""Models that were made without validation are as validation makes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from harness import FAST
from pydantic import BaseModel

from perdure import Engine, Task, Usage
from perdure.events import Chunk, Completed, encode
from perdure.store.content import restore, separate
from perdure.testing import ScriptedAdapter
from perdure.unchecked import unchecked


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (Chunk, {"text": "Hé", "kind": "reasoning", "offset": 3, "cursor": None, "length": None}),
        (Usage, {**dict.fromkeys(Usage.model_fields), "input_tokens": 5}),
    ],
)
def test_as_validated(model: type[BaseModel], values: dict[str, Any]) -> None:
    """It is equal, shows and dumps the same, can be copied and hashes the same."""
    made, validated = unchecked(model, dict(values)), model(**values)
    assert made == validated
    assert repr(made) == repr(validated)
    assert made.model_dump_json() == validated.model_dump_json()
    assert made.model_fields_set == validated.model_fields_set
    assert made.model_copy(update={"cursor": None}) == validated.model_copy(update={"cursor": None})
    with pytest.raises(ValueError, match="frozen"):
        setattr(made, next(iter(values)), None)


def test_an_event_of_another() -> None:
    """What an adapter's event says, and what it didn't, is in the one that is made of it."""
    said = Completed(finish_reason="length", platform_finish_reason="MAX")
    made = unchecked(Completed, {**vars(said), "output_length": 7})
    assert encode(made) == encode(said.model_copy(update={"output_length": 7}))


def test_a_restored_task_says_what_was_given() -> None:
    """Which fields were set is known of a task that comes back, and its objects are its own."""
    plain, places, content = separate(Task(prompt="Hello?", labels={"a": "b"}))
    one = restore(plain, places, content, "task_1")
    other = restore(plain, places, content, "task_1")
    assert one == Task(prompt="Hello?", labels={"a": "b"}, task_id="task_1")
    assert one.model_fields_set == {"prompt", "labels", "task_id"}
    one.metadata["changed"] = "here"
    assert other.metadata == {}


async def test_all_that_is_made_so_is_whole(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the engine leaves validation out, it would have come to the same."""
    made: set[str] = set()

    def looking(
        model: type[BaseModel], values: dict[str, Any], given: set[str] | None = None
    ) -> BaseModel:
        made.add(model.__name__)
        assert list(values) == list(model.model_fields)  # which is the order of their JSON
        assert unchecked(model, dict(values), given) == model.model_validate(dict(values))
        return unchecked(model, values, given)

    for name, module in list(sys.modules.items()):
        if name.startswith("perdure.") and getattr(module, "unchecked", None) is unchecked:
            monkeypatch.setattr(module, "unchecked", looking)
    script = ScriptedAdapter(
        Chunk(text="Hello, "),
        Chunk(text="you"),
        Completed(usage=Usage(input_tokens=1, output_tokens=2, raw={"a": 1})),
    )
    async with Engine.open(db, adapters=[script], settings=FAST) as engine:
        asked = Task(prompt="Hello?", labels={"a": "b"}, metadata={"c": [1]})
        result = await engine.get_result(await engine.submit_task(asked))
    assert result.output == "Hello, you"
    assert made == {"Task", "Submitted", "Running", "Chunk", "Completed", "Result"}
