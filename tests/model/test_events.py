"""How events are stored: the same bytes for ever, and back again."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.histories import EVENTS, any_event, json_values
from perdure import events
from perdure.errors import DatabaseCorrupt, DatabaseIncompatible
from perdure.events import (
    ENDINGS,
    EVENT_TYPES,
    Accepted,
    Archived,
    ArchivedRow,
    AttemptFailed,
    Cancelled,
    CancelRequested,
    Chunk,
    Completed,
    Event,
    Failed,
    FileCreated,
    Interrupted,
    Redacted,
    Running,
    Submitted,
    UsageReported,
    canonical,
    chain_digest,
    decode,
    decode_text,
    encode,
)
from perdure.task import Usage

GOLDEN = Path(__file__).parent / "golden"
RETRY_AT = datetime(2026, 11, 22, 13, 5, 0, 123456, tzinfo=UTC)
USAGE = Usage(
    input_tokens=1200,
    output_tokens=345,
    cache_read_tokens=1000,
    cache_write_tokens=0,
    reasoning_tokens=128,
    raw={"prompt_tokens": 1200, "details": {"cached": 1000, "audio": None}},
)
DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

# What was written at these schema versions must be readable for ever: add to this, never change it.
# name of the file in golden/ -> (schema version, the event today)
WRITTEN: dict[str, tuple[int, Event]] = {
    "submitted.v1.full": (
        1,
        Submitted(
            task={
                "prompt": 'Wörter, 言葉, 👍\n\t"\\',
                "type": "research",
                "platform": "claude",
                "constraints": {"max_tokens": 100, "model": "m-1", "timeout_seconds": 12.5},
                "context": {"manual": "", "number": 0.125, "nothing": None},
                "labels": {"b": "2", "a": "1"},
                "metadata": {"deep": [{"x": [True, False, None, -1, 9007199254740993]}]},
                "key": "row-1",
                "batch": "batch",
            },
            platforms=("claude", "chatgpt"),
            blobs={"context.manual": DIGEST},
        ),
    ),
    "submitted.v1.least": (1, Submitted(task={"prompt": "Hello"}, platforms=("demo",))),
    "running.v1.full": (
        1,
        Running(attempt=2, worker="worker_a1", platform="claude", model="m-1", mode="continue"),
    ),
    "running.v1.least": (1, Running(attempt=1, worker="worker_a1", platform="demo")),
    "accepted.v1.full": (
        1,
        Accepted(
            response_id="resp_1",
            request_id="req_1",
            model="m-1-2026",
            reattachable=True,
            cursor="0",
            note="temperature is not supported",
        ),
    ),
    "accepted.v1.least": (1, Accepted()),
    "chunk.v1.full": (1, Chunk(text="Hél\u2028lo\x7f", kind="reasoning", offset=17, cursor="c17")),
    "chunk.v1.least": (1, Chunk(text="")),
    "usage.v1.full": (1, UsageReported(usage=USAGE)),
    "usage.v1.least": (1, UsageReported(usage=Usage())),
    "file_created.v1.full": (1, FileCreated(path="out/a b.txt", size=0, digest=DIGEST)),
    "file_created.v1.least": (1, FileCreated(path="a")),
    "attempt_failed.v1.full": (
        1,
        AttemptFailed(
            attempt=3,
            error_class="RateLimited",
            message="slow down",
            status=429,
            request_id="req_1",
            retryable=True,
            retry_after=2.5,
            next="retry",
            retry_at=RETRY_AT,
            usage=USAGE,
            cost_usd=0.1,
        ),
    ),
    "attempt_failed.v1.least": (
        1,
        AttemptFailed(
            attempt=1,
            error_class="Overloaded",
            message="",
            retryable=True,
            next="fallback",
            retry_at=RETRY_AT.replace(microsecond=0),
        ),
    ),
    "interrupted.v1.full": (
        1,
        Interrupted(
            worker="worker_a1",
            attempt=1,
            reason="worker_lost",
            outcome="unknown",
            next="restart",
            usage=USAGE,
            cost_usd=0.5,
        ),
    ),
    "interrupted.v1.least": (
        1,
        Interrupted(
            worker="w", attempt=1, reason="handed_back", outcome="reattachable", next="reattach"
        ),
    ),
    "cancel_requested.v1.full": (1, CancelRequested(by="me@here", reason="wrong prompt")),
    "cancel_requested.v1.least": (1, CancelRequested(by="me@here")),
    "completed.v1.full": (
        1,
        Completed(
            finish_reason="length",
            platform_finish_reason="max_tokens",
            usage=USAGE,
            cost_usd=0.0123,
            price_version="genai-prices 0.1",
            output_length=4,
            output_digest=DIGEST,
        ),
    ),
    "completed.v1.least": (1, Completed()),
    "failed.v1.full": (
        1,
        Failed(
            error_class="InvalidRequest",
            message="no",
            status=400,
            request_id="req_1",
            attempts=2,
            output_length=10,
            usage=USAGE,
            cost_usd=0.0,
            price_version="genai-prices 0.1",
        ),
    ),
    "failed.v1.least": (1, Failed(error_class="X", message="", attempts=0)),
    "cancelled.v1.full": (
        1,
        Cancelled(
            by="me@here",
            reason="wrong prompt",
            output_length=10,
            usage=USAGE,
            cost_usd=12.0,
            price_version="genai-prices 0.1",
        ),
    ),
    "cancelled.v1.least": (1, Cancelled()),
    "redacted.v1.full": (
        1,
        Redacted(by="me@here", reason="asked for", tombstones={"1": DIGEST, "3": DIGEST}),
    ),
    "redacted.v1.least": (1, Redacted(by="me@here", tombstones={})),
    "archived.v1.full": (
        1,
        Archived(
            by="me@here",
            archive="2026-10.db",
            events=9,
            position=17,
            digest=DIGEST,
            row=ArchivedRow(
                status="failed",
                platform="claude",
                model="m-1",
                type="research",
                priority=1,
                attempts=3,
                available_at=RETRY_AT,
                cancel_requested=True,
                finish_reason="stop",
                error_class="RateLimited",
                input_tokens=1200,
                output_tokens=345,
                cache_read_tokens=1000,
                cache_write_tokens=0,
                reasoning_tokens=128,
                cost_usd=0.0123,
                submitted_at=RETRY_AT,
                started_at=RETRY_AT,
                ended_at=RETRY_AT.replace(microsecond=0),
                batch="batch",
                key="row-1",
                fingerprint="f",
                parent="claude_20261001_00000001",
                retry_of="claude_20261001_00000002",
                labels={"b": "2", "a": "1"},
            ),
        ),
    ),
    "archived.v1.least": (
        1,
        Archived(
            by="me@here",
            archive="a.db",
            events=2,
            position=1,
            digest=DIGEST,
            row=ArchivedRow(
                status="cancelled",
                platform="demo",
                available_at=RETRY_AT,
                submitted_at=RETRY_AT,
                ended_at=RETRY_AT,
            ),
        ),
    ),
}


class TestGolden:
    """What was ever written can be read, and what is written doesn't change by accident."""

    @pytest.mark.parametrize("name", WRITTEN)
    def test_written_as_ever(self, name: str) -> None:
        """Today's encoder gives exactly the stored bytes, if the schema version is still theirs."""
        version, event = WRITTEN[name]
        stored = (GOLDEN / f"{name}.json").read_bytes()

        if version == event.schema_version:
            assert encode(event) == (event.type, version, stored)

    @pytest.mark.parametrize("name", WRITTEN)
    def test_read_as_ever(self, name: str) -> None:
        """The stored bytes give back an equal event."""
        version, event = WRITTEN[name]
        stored = (GOLDEN / f"{name}.json").read_bytes()

        assert decode(event.type, version, stored) == event
        assert decode(event.type, version, stored.decode()) == event

    def test_nothing_is_missing(self) -> None:
        """Every type and every schema version up to today's has its files, and no file is idle."""
        files = {path.stem for path in GOLDEN.glob("*.json")}
        wanted = {
            (model.type, version)
            for model in EVENT_TYPES.values()
            for version in range(1, model.schema_version + 1)
        }
        assert files == set(WRITTEN)
        assert {(event.type, version) for version, event in WRITTEN.values()} == wanted

    def test_every_field_is_covered(self) -> None:
        """The full examples have all fields: none changes without a thought for what is stored."""
        for name, (version, event) in WRITTEN.items():
            if name.endswith(".full") and version == event.schema_version:
                assert {
                    field for field in type(event).model_fields if getattr(event, field) is None
                } == ({"length"} if isinstance(event, Chunk) else set()), name


class TestCodec:
    """Events to bytes and back."""

    @given(any_event)
    def test_round_trip(self, event: Event) -> None:
        """Every event comes back equal, and is encoded to the same bytes again."""
        stored = encode(event)
        back = decode(*stored)

        assert back == event
        assert type(back) is type(event)
        assert encode(back) == stored

    @given(any_event)
    def test_canonical(self, event: Event) -> None:
        """The form is canonical: sorted keys, no spaces, no None of a field, UTF-8 as it is."""
        data = encode(event).data
        plain = json.loads(data)

        assert (
            data
            == json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
            or "e" in data.decode().lower()  # exponents may be written in two ways
        )
        assert None not in [plain.get(name, 0) for name in type(event).model_fields]

    @given(st.dictionaries(st.text("abc\u00e9\U0001f44d", max_size=3), json_values, max_size=5))
    def test_the_order_of_keys_does_not_matter(self, plain: dict[str, Any]) -> None:
        """Equal data has equal bytes, however it was put together."""
        assert canonical(dict(reversed(list(plain.items())))) == canonical(plain)

    def test_a_chunk_is_encoded_like_all_others(self) -> None:
        """The short way for chunks gives the very bytes that the long way would give."""
        for event in (
            Chunk(text="x"),
            Chunk(text="x", kind="tool_call", offset=3, cursor="c"),
            Chunk(text="", length=5),
        ):
            assert encode(event).data == canonical(event.model_dump(mode="json", exclude_none=True))

    @pytest.mark.parametrize("offset", [UTC, timezone(timedelta(hours=5, minutes=30))])
    def test_moments_keep_their_meaning(self, offset: timezone) -> None:
        """A moment comes back as the same moment, to the microsecond, whatever its zone."""
        event = WRITTEN["attempt_failed.v1.full"][1].model_copy(
            update={"retry_at": RETRY_AT.astimezone(offset)}
        )
        back = decode(*encode(event))
        assert isinstance(back, AttemptFailed)
        assert back.retry_at == RETRY_AT

    @pytest.mark.parametrize(
        ("type_", "version"), [("chunk", 2), ("chunk", 99), ("invented", 1), ("", 1)]
    )
    def test_what_a_newer_perdure_wrote(self, type_: str, version: int) -> None:
        """An unknown type or a newer schema is refused in one line that says what to do."""
        with pytest.raises(DatabaseIncompatible, match="upgrade perdure") as refused:
            decode(type_, version, b"{}")
        assert len(str(refused.value).splitlines()) == 1

    @pytest.mark.parametrize(
        "data",
        [
            b"", b"{", b"null", b"5", b"[]", b'"text"', b"[1]", b"{}", b'{"text":5}', b"\xff",
            b'{"text":"x","kind":"song"}', b'{"text":"x","surplus":1}', b'{"text":"\\ud800"}',
            b'{"redacted":5}', b'{"redacted":null,"text":[]}', b'{"text":"x","offset":"a\\nb"}',
        ],
    )  # fmt: skip
    def test_what_nobody_wrote(self, data: bytes) -> None:
        """Data that can't be what was written is `DatabaseCorrupt`, in one line, not a crash."""
        for given_as in (data, data.decode(errors="surrogateescape")):
            try:
                event = decode("chunk", 1, given_as)
            except DatabaseCorrupt as corrupt:
                assert len(str(corrupt).splitlines()) == 1  # noqa: PT017
            else:
                assert data.startswith(b'{"redacted"')
                assert isinstance(event, Chunk)

    @given(
        st.sampled_from(sorted(EVENT_TYPES)), st.binary(max_size=60) | json_values.map(canonical)
    )
    def test_any_bytes(self, type_: str, data: bytes) -> None:
        """Whatever stands in the column, it is an event or `DatabaseCorrupt`."""
        try:
            event = decode(type_, 1, data)
        except DatabaseCorrupt:
            return
        assert isinstance(event, EVENT_TYPES[type_])

    @pytest.mark.parametrize("schema_version", ["x", None, b"1", 1.5])
    def test_schema_versions_that_nobody_wrote(self, schema_version: Any) -> None:
        """SQLite takes anything in a column of numbers; only that row is unreadable."""
        with pytest.raises(DatabaseCorrupt, match="schema version"):
            decode("chunk", schema_version, "{}")

    def test_upcasters_are_applied_in_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An old event goes through every upcaster up to today's schema before it is validated."""
        monkeypatch.setattr(Running, "schema_version", 3)
        monkeypatch.setitem(
            events.UPCASTERS, ("running", 1), lambda old: {**old, "owner": old["worker"] + "!"}
        )
        monkeypatch.setitem(
            events.UPCASTERS,
            ("running", 2),
            lambda old: {
                **{k: v for k, v in old.items() if k != "owner"}, "worker": old["owner"] + "?"
            },
        )  # fmt: skip
        stored = (GOLDEN / "running.v1.least.json").read_bytes()

        back = decode("running", 1, stored)
        assert isinstance(back, Running)
        assert back.worker == "worker_a1!?"
        with pytest.raises(DatabaseIncompatible):
            decode("running", 4, stored)


class TestCatalogue:
    """The models themselves."""

    def test_types_are_as_documented(self) -> None:
        """The catalogue is what `docs/events.md` says it is: types, fields, and who ends a task."""
        documented: dict[str, tuple[list[str], bool]] = {}
        text = (Path(__file__).parents[2] / "docs" / "events.md").read_text()
        for line in text.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) == 4 and cells[0].startswith("`"):
                fields = [name.strip("` ") for name in cells[2].split(",")]
                documented[cells[0].strip("`")] = (fields, cells[3] == "yes")

        assert documented == {
            name: (list(model.model_fields), model.ends_task) for name, model in EVENT_TYPES.items()
        }

    def test_endings(self) -> None:
        """Three types end a task."""
        assert set(ENDINGS) == {"completed", "failed", "cancelled"}

    @pytest.mark.parametrize("model", EVENTS, ids=lambda model: model.__name__)
    def test_events_are_values(self, model: type[Event]) -> None:
        """Events can't be changed, and refuse fields they don't have."""
        assert model.model_config.get("frozen") is True
        assert model.model_config.get("extra") == "forbid"

    def test_all_is_true(self) -> None:
        """`__all__` is true, and has every model of the catalogue."""
        assert {model.__name__ for model in EVENT_TYPES.values()} <= set(events.__all__)
        for name in events.__all__:
            assert hasattr(events, name)


class TestChain:
    """The digest that ties an event to all before it."""

    AT = datetime(2026, 11, 22, 13, 5, 0, 123456, tzinfo=UTC)
    PARTS: tuple[Any, ...] = (b"", 1, "demo_1", 1, "submitted", 1, AT, b"\x00" * 32)

    def test_is_what_it_was(self) -> None:
        """The digest is a contract: logs that were written must verify for ever."""
        digest = chain_digest(*self.PARTS)
        by_hand = hashlib.sha256(b"1\ndemo_1\n1\nsubmitted\n1\n1795352700123456\n" + b"\x00" * 32)
        assert digest == by_hand.digest()
        following = chain_digest(digest, 2, "demo_1", 2, "running", 1, self.AT, b"\x01" * 32)
        assert following.hex() == CHAINED

    @pytest.mark.parametrize("part", range(8))
    def test_every_part_counts(self, part: int) -> None:
        """Any part that differs makes another digest."""
        other: tuple[Any, ...] = (
            b"\x01", 2, "demo_2", 2, "running", 2, self.AT + timedelta(microseconds=1),
            b"\x01" * 32,
        )  # fmt: skip
        changed = (*self.PARTS[:part], other[part], *self.PARTS[part + 1 :])
        assert chain_digest(*changed) != chain_digest(*self.PARTS)

    def test_zones_do_not_count(self) -> None:
        """The same moment in another zone is the same."""
        moved = list(self.PARTS)
        moved[6] = self.AT.astimezone(timezone(timedelta(hours=-8)))
        assert chain_digest(*moved) == chain_digest(*self.PARTS)


CHAINED = "bf64af85ee1b2dfe6bd51796b39e1b1f6fdaaa1cf6d1075c3a2f7454f7ca6da5"


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ('{"kind":"text","offset":3,"text":"so"}', (3, "so")),
        ('{"kind":"reasoning","offset":3,"text":"so"}', None),
        ('{"kind":"text","offset":3,"text":"so","cursor":"c"}', None),
        ('{"kind":"text","length":2,"offset":3,"redacted":"ab"}', None),
        ('{"kind":"text","offset":true,"text":"so"}', None),
        ('{"kind":"text","offset":3.0,"text":"so"}', None),
        ('{"kind":"text","offset":3,"text":null}', None),
        ('{"kind":"text","offset":3}', None),
        ('["kind","offset","text"]', None),
        ("no json", None),
        ("", None),
    ],
)
def test_only_plain_text_is_read_by_the_short_way(data: str, found: tuple[int, str] | None) -> None:
    """Whatever is not exactly a chunk of text is left to `decode`, which knows what is wrong."""
    assert decode_text(1, data) == found
    assert decode_text(2, data) is None


def test_chunks_are_written_so_that_the_short_way_reads_them() -> None:
    """What the log writes for plain text is what is read so; most events are."""
    assert decode_text(1, encode(Chunk(text="so", offset=3)).data) == (3, "so")
