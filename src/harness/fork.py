"""Fork: which records of a run another one begins with. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from harness.errors import ConfigError
from harness.records import (
    VERSION,
    DriverStarted,
    Entry,
    ForkPoint,
    LLMStarted,
    Record,
    Reopened,
    RunCancelled,
    RunFailed,
    RunFinished,
    RunStarted,
)


def fork_records(source: str, entries: Sequence[Entry], at: int | None) -> list[Record]:
    """Return the records of a fork: RunStarted anew, and the answered past before step ``at``.

    Raises:
        ConfigError: the run has no such step.
    """
    first = entries[0].record
    assert isinstance(first, RunStarted)  # every journal begins with it
    steps = [e.record.step for e in entries if isinstance(e.record, LLMStarted) and e.record.purpose == "step"]
    last = max(steps, default=1)
    at = last if at is None else at
    if not 1 <= at <= last + 1:
        raise ConfigError(f"run {source!r} has steps 1 to {last}; cannot fork it at {at}")
    copied: list[Record] = []
    for entry in entries[1:]:
        record = entry.record
        if isinstance(record, LLMStarted) and record.step >= at:
            break
        if not isinstance(record, (DriverStarted, RunFailed, RunFinished, RunCancelled, Reopened)):
            copied.append(record)
    fork = ForkPoint(source, at, len(copied))
    # Whatever the past had used up of its steps and attempts, the fork begins anew.
    return [msgspec.structs.replace(first, version=VERSION, forked_from=fork), *copied, Reopened("forked")]
