"""A task as JSON and back: plain ones are spared pydantic, and come to the same."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from perdure import Task
from perdure.events import canonical
from perdure.store.content import restore, separate

NAMES = st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=5)
OBJECTS = st.dictionaries(
    NAMES, st.none() | st.integers(-9, 9) | NAMES | st.lists(NAMES), max_size=3
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "system": st.none() | st.text(st.characters(codec="ascii", categories=["L"])),
    "platform": st.none() | NAMES,
    "priority": st.integers(0, 10),
    "task_id": st.none() | NAMES,
    "batch": st.none() | NAMES,
    "key": st.none() | NAMES,
    "fingerprint": st.none() | NAMES,
    "retry_of": st.none() | NAMES,
    "context": OBJECTS,
    "metadata": OBJECTS,
    "options": OBJECTS,
    "labels": st.dictionaries(NAMES, NAMES, max_size=3),
    "type": st.none() | st.just("research"),
    "constraints": st.none() | st.just({"max_tokens": 3}),
    "fallbacks": st.lists(NAMES, max_size=2),
}
TASKS = st.builds(Task, prompt=NAMES) | st.fixed_dictionaries(
    {"prompt": NAMES}, optional=FIELDS
).map(lambda given: Task(**given))


@given(TASKS)
def test_to_json_and_back(task: Task) -> None:
    """The JSON is what pydantic makes of it, and the task that comes back is the same."""
    plain, places, texts = separate(task)
    assert (places, texts) == ({}, {})
    assert plain == task.model_dump(mode="json", exclude_defaults=True, exclude={"task_id"})
    stored = orjson.loads(canonical(plain))
    for given_back in (restore(plain, {}, {}), restore(stored, {}, {})):
        expected = Task.model_validate(stored)
        assert given_back == expected
        assert given_back.model_dump_json() == expected.model_dump_json()
        assert given_back.model_fields_set == expected.model_fields_set


def test_objects_that_were_changed_in_place() -> None:
    """A task is frozen, its dicts are not: what is in them when it is handed in is stored."""
    task = Task(prompt="x")
    task.metadata["customer"] = 7
    task.labels["team"] = "a"
    task.options["top_k"] = 3
    plain, _places, _texts = separate(task)
    assert plain == {
        "prompt": "x",
        "metadata": {"customer": 7},
        "labels": {"team": "a"},
        "options": {"top_k": 3},
    }


def test_what_comes_back_is_nobody_elses() -> None:
    """Changing it changes neither what is stored nor what comes back the next time."""
    plain = {"prompt": "x", "metadata": {"a": [1]}, "labels": {}}
    for _ in range(2):
        task = restore(plain, {}, {})
        assert (task.metadata, task.context) == ({"a": [1]}, {})
        task.metadata["a"].append(2)
        task.context["b"] = 1
