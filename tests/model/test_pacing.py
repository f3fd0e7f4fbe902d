"""When a worker looks for work."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from perdure.pacing import FIRST_TURN_SECONDS, IN_VAIN_SECONDS, MOST_SPREAD_SECONDS, Pace

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POLL = 0.5
LEASE = 30.0


@pytest.fixture
def pace() -> Pace:
    """The pace of a worker that has just begun."""
    return Pace(POLL, LEASE)


def due(seconds: float) -> datetime:
    """Return a moment so many seconds from now."""
    return NOW + timedelta(seconds=seconds)


def claim(pace: Pace, claimed: int, *, free: int = 8, looked_first: bool = True) -> None:
    """Make a claim that found so many tasks."""
    pace.begin_claim()
    pace.end_claim(looked_first=looked_first, claimed=claimed, free=free, seconds=0.004)


class TestLookingBeforeClaiming:
    """Looking takes a question, claiming the write lock."""

    def test_the_first_claim_needs_no_look(self, pace: Pace) -> None:
        """Who begins knows nothing, so it claims."""
        assert pace.maybe_due

    def test_after_a_claim_that_took_all_there_was(self, pace: Pace) -> None:
        """It took fewer than it could have, so nothing else was due."""
        claim(pace, 3)
        assert not pace.maybe_due

    def test_after_a_claim_that_took_as_many_as_it_could(self, pace: Pace) -> None:
        """There may be more."""
        claim(pace, 8)
        assert pace.maybe_due

    def test_news_while_a_claim_is_made_are_kept(self, pace: Pace) -> None:
        """They may be of what came after the claim's transaction."""
        pace.begin_claim()
        pace.expect_work()
        pace.end_claim(looked_first=False, claimed=0, free=8, seconds=0.004)
        assert pace.maybe_due

    @pytest.mark.parametrize(
        ("found", "worth_it"), [(None, False), (due(-1), True), (due(0), True), (due(0.1), False)]
    )
    def test_what_a_look_decides(
        self, pace: Pace, found: datetime | None, *, worth_it: bool
    ) -> None:
        """Something has to wait, and to be due by now."""
        pace.note_look(found, NOW)
        assert pace.has_looked
        assert pace.is_due(NOW) is worth_it

    def test_a_claim_makes_a_look_old(self, pace: Pace) -> None:
        """What the look has found is taken."""
        pace.note_look(due(5), NOW)
        pace.begin_claim()
        assert not pace.has_looked


class TestPatience:
    """How long a worker goes without looking."""

    @pytest.mark.parametrize(
        ("hears", "running", "wait"),
        [(False, False, POLL), (False, True, POLL), (True, True, LEASE), (True, False, None)],
    )
    def test_without_anything_that_waits(
        self, pace: Pace, *, hears: bool, running: bool, wait: float | None
    ) -> None:
        """Who hears of all looks when a notification may have got lost, if at all."""
        pace.note_look(None, NOW)
        assert pace.patience(NOW, room=True, running=running, hears=hears) == wait

    @pytest.mark.parametrize(("left", "wait"), [(-3, 0.0), (0.2, 0.2), (7, POLL)])
    def test_until_the_next_task_is_due(self, pace: Pace, left: float, wait: float) -> None:
        """It looks when that is due, or earlier where nobody tells of work."""
        pace.note_look(due(left), NOW)
        assert pace.patience(NOW, room=True, running=False, hears=False) == wait

    def test_who_is_told_of_all_waits_for_what_is_due_later(self, pace: Pace) -> None:
        """Nobody tells that a moment has come."""
        pace.note_look(due(7), NOW)
        assert pace.patience(NOW, room=True, running=False, hears=True) == 7

    def test_what_is_due_does_not_matter_without_room(self, pace: Pace) -> None:
        """It could not begin it."""
        pace.note_look(due(-3), NOW)
        assert pace.patience(NOW, room=False, running=True, hears=True) == LEASE

    def test_what_has_been_taken_is_left_some_time_to_be_committed(self, pace: Pace) -> None:
        """Else it asked for the write lock as fast as it can."""
        pace.note_look(due(-3), NOW)
        claim(pace, 0)
        pace.note_look(due(-3), NOW)
        wait = pace.patience(NOW, room=True, running=False, hears=False)
        assert wait == IN_VAIN_SECONDS

    def test_a_claim_without_a_look_was_not_in_vain(self, pace: Pace) -> None:
        """Nothing has promised that there is something."""
        claim(pace, 0, looked_first=False)
        pace.note_look(due(-3), NOW)
        assert pace.patience(NOW, room=True, running=False, hears=False) == 0

    def test_a_look_that_finds_nothing_due_ends_that(self, pace: Pace) -> None:
        """What was being taken has been taken."""
        claim(pace, 0)
        pace.note_look(due(0.01), NOW)
        wait = pace.patience(NOW, room=True, running=False, hears=False)
        assert wait == pytest.approx(0.01)


class TestTurns:
    """All idle workers are told of the same work at the same moment."""

    def test_who_is_alone_need_not_wait(self, pace: Pace) -> None:
        """Nobody else can take it."""
        pace.hear_with_all()
        assert pace.turn_after_news() == 0

    def test_news_of_ones_own_are_nobodys_turn(self, pace: Pace) -> None:
        """The others weren't told, so nothing is left to them."""
        pace.workers = 10
        pace.expect_work()
        assert pace.turn_after_news() == 0

    def test_a_turn_is_taken_once(self, pace: Pace) -> None:
        """What comes later is other work."""
        pace.workers = 10
        pace.hear_with_all()
        assert pace.turn_after_news() > 0
        assert pace.turn_after_news() == 0

    def test_turns_are_spread_over_as_many_as_there_are_others(self, pace: Pace) -> None:
        """Ten others, ten turns."""
        pace.workers = 11
        turns = [pace.any_turn() for _ in range(1000)]
        assert max(turns) <= 10 * FIRST_TURN_SECONDS
        # One in 2 ** 1000 draws of so many has none in one half.
        assert min(turns) < 5 * FIRST_TURN_SECONDS < max(turns)

    def test_a_slow_database_makes_longer_turns_up_to_a_limit(self, pace: Pace) -> None:
        """A turn is longer than a claim takes, so that the next one sees what it took."""
        pace.workers = 3
        for _ in range(20):
            pace.end_claim(looked_first=True, claimed=1, free=8, seconds=10.0)
        turns = [pace.any_turn() for _ in range(1000)]
        assert 2 * FIRST_TURN_SECONDS < max(turns) <= MOST_SPREAD_SECONDS

    def test_claims_without_a_look_teach_nothing_of_turns(self, pace: Pace) -> None:
        """They don't take what a look and a claim take."""
        pace.workers = 3
        for _ in range(20):
            pace.end_claim(looked_first=False, claimed=1, free=8, seconds=10.0)
        assert max(pace.any_turn() for _ in range(1000)) <= 2 * FIRST_TURN_SECONDS
