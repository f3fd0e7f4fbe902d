"""eventsourcing: an aggregate for each producer, each event saved by itself, in SQLite."""

from __future__ import annotations

import os
import time
from uuid import UUID

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from work import answer, arguments

WORK = arguments()


class Story(Aggregate):
    """Something that grows."""

    @event("Begun")
    def __init__(self) -> None:
        self.length = 0

    @event("Written")
    def write(self, text: str) -> None:
        """Append a piece."""
        self.length += len(text)


def main() -> None:
    """Warm up, then measure, in one thread: SQLite has one writer, and more threads are slower."""
    os.environ["PERSISTENCE_MODULE"] = "eventsourcing.sqlite"
    os.environ["SQLITE_DBNAME"] = str(WORK.folder / "events.db")
    application: Application[UUID] = Application()
    stories = [Story() for _ in range(WORK.at_once)]
    for story in stories:
        application.save(story)
    began = time.perf_counter()
    for number in range(WORK.count):
        story = stories[number % len(stories)]
        story.write("and so the third quarter was better than the ")
        application.save(story)
    answer(WORK.count / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
