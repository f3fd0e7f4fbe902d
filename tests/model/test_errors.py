"""The errors: one tree, drawn as it is, and messages of one line."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

import perdure
from perdure import errors
from perdure.errors import PerdureError, PlatformError

CLASSES = {
    name: found
    for name, found in vars(errors).items()
    if inspect.isclass(found)
    and issubclass(found, Exception)
    and found.__module__ == "perdure.errors"
}


def drawn_tree() -> dict[str, str | None]:
    """Return name -> parent's name, as the module's docstring draws it."""
    found: dict[str, str | None] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ((?:[│ ]   )*)(?:[├└]── )?([A-Z]\w+)", line)
        if match is None:
            continue
        depth = 0 if "── " not in line else len(match[1]) // 4 + 1
        del above[depth:]
        found[match[2]] = above[-1] if above else None
        above.append(match[2])
    return found


def test_all_is_what_there_is() -> None:
    """`__all__` is sorted and names every error, and nothing else."""
    assert errors.__all__ == sorted(CLASSES)


def test_the_tree_is_drawn_as_it_is() -> None:
    """The docstring's tree is the real one: every class, with its real parent."""
    real = {name: found.__bases__[0].__name__ for name, found in CLASSES.items()}
    real["PerdureError"] = None  # type: ignore[assignment]

    assert drawn_tree() == real


def test_the_package_exports_every_error() -> None:
    """All errors can be imported from `perdure`."""
    for name, found in CLASSES.items():
        assert getattr(perdure, name) is found
        assert name in perdure.__all__


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_one_root(name: str) -> None:
    """`except PerdureError` catches all of them, and each says in a docstring what it is."""
    assert issubclass(CLASSES[name], PerdureError)
    assert CLASSES[name].__doc__


def platform_errors() -> list[type[PlatformError]]:
    """Return the errors that adapters raise."""
    return [found for found in CLASSES.values() if issubclass(found, PlatformError)]


@pytest.mark.parametrize("kind", platform_errors(), ids=lambda kind: kind.__name__)
def test_platform_errors_carry_what_they_are_about(kind: type[PlatformError]) -> None:
    """Status, request id and waiting time are there; the message is one storable line."""
    error = kind("no\n way,\x00 \ud800", status=418, request_id="r1", retry_after=2.5)

    assert error.message == str(error) == "no way,\ufffd \ufffd"
    assert (error.status, error.request_id, error.retry_after) == (418, "r1", 2.5)
    assert error.retryable is issubclass(kind, errors.RetryableError)


def test_messages_name_the_thing() -> None:
    """The errors that make their own message name the task, the versions, the key."""
    lost = errors.ConcurrencyError("demo_1", 3, 5)
    assert str(lost) == "demo_1 is at version 5, not at 3: it was changed"
    assert (lost.task_id, lost.expected, lost.actual) == ("demo_1", 3, 5)

    taken = errors.DuplicateKey("row 7", "demo_1")
    advice = "go on with that one, or choose another key"
    assert str(taken) == f"the key 'row 7' belongs to task demo_1: {advice}"
    assert (taken.key, taken.task_id) == ("row 7", "demo_1")

    missing = errors.TaskNotFound("demo_\n1")
    assert "'demo_\\n1'" in str(missing)
    assert missing.task_id == "demo_\n1"


@pytest.mark.parametrize(
    "error",
    [
        errors.TaskNotFound("demo_1"),
        errors.ConcurrencyError("demo_1", 1, 2),
        errors.DuplicateKey("k", "demo_1"),
        errors.RateLimited("slow down", status=429, request_id="r", retry_after=1.0),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_processes(error: PerdureError) -> None:
    """An error that was pickled, by a process pool for one, comes back whole."""
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own

    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)
