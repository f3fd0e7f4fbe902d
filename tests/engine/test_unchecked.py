"""Models that were made without validation are as validation makes them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from perdure import Task, Usage
from perdure.events import Chunk, Completed, encode
from perdure.store.content import restore, separate
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
