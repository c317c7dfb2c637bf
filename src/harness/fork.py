"""Fork: which records of a run another one begins with. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from harness.errors import ConfigError
from harness.records import (
    VERSION,
    ApprovalRequested,
    ApprovalResolved,
    ApprovalVoided,
    Audited,
    CommandRefused,
    DriverStarted,
    Entry,
    ForkPoint,
    Guided,
    LLMAccepted,
    LLMDetached,
    LLMFailed,
    LLMFinished,
    LLMStarted,
    Origin,
    Record,
    Reopened,
    RunCancelled,
    RunFailed,
    RunFinished,
    RunParked,
    RunStarted,
)

_LEFT_OUT = (
    DriverStarted, RunFailed, RunFinished, RunCancelled, RunParked, Reopened,
    ApprovalRequested, ApprovalVoided, Audited, CommandRefused, LLMAccepted, LLMDetached,
)  # fmt: skip
"""What was said of the run it is a copy of, and holds for that one only: a yes is to one exact call of one run, and a
response at the provider is that run's."""


def fork_records(source: str, entries: Sequence[Entry], at: int | None, origin: Origin | None = None) -> list[Record]:
    """Return the records of a fork: RunStarted anew, and the answered past before step ``at``.

    Args:
        source: the run's id.
        entries: its journal.
        at: the first step that is left out; None for the last.
        origin: how the fork is gone on with; None for as its source is.

    Raises:
        ConfigError: the run has no such step.
    """
    first = entries[0].record
    assert isinstance(first, RunStarted)  # every journal begins with it
    places = _steps(entries)
    last = max(places, default=1)
    at = last if at is None else at
    if not 1 <= at <= last + 1:
        raise ConfigError(f"run {source!r} has steps 1 to {last}; cannot fork it at {at}")
    until = places.get(at, len(entries))
    not_told = {
        entry.record.approval_id
        for entry in entries
        if isinstance(entry.record, ApprovalRequested) and entry.record.kind in ("in_doubt", "budget")
    }
    copied = [
        record
        for entry in _answered(entries[1:until])
        if not isinstance(entry.record, _LEFT_OUT) and (record := _copy(entry.record, not_told)) is not None
    ]
    fork = ForkPoint(source, at, len(copied))
    # Whatever the past had used up of its steps and attempts, the fork begins anew.
    # What the copied records say is what the release that wrote them knew.
    version = first.version if copied else VERSION
    origin = origin or first.origin
    started = msgspec.structs.replace(first, version=version, forked_from=fork, origin=origin)
    return [started, *copied, Reopened("forked")]


def _copy(record: Record, not_told: Collection[str]) -> Record | None:
    """Return what a fork keeps of a record: of an answer, what the model was told.

    What came of a call in doubt it was told as the call's result, and of limits it is told nothing.
    """
    if isinstance(record, LLMStarted) and record.response_id:
        return msgspec.structs.replace(record, response_id="")
    if not isinstance(record, ApprovalResolved):
        return record
    if record.decision != "steer" or record.approval_id in not_told:
        return None
    return Guided(record.text, record.by, (record.scope,), record.tokens)


def _steps(entries: Sequence[Entry]) -> dict[int, int]:
    """Return where each step begins: the place of its first model call, compactions before it included.

    The steps of a run with several agents are numbered in the order in which they began.
    """
    places: dict[int, int] = {}
    seen: set[tuple[str, int, bool]] = set()
    for place, entry in enumerate(entries):
        record = entry.record
        if isinstance(record, LLMStarted):
            # A word on the run and an agent's step may bear the same number, where the scope changes hands.
            step = record.scope, record.step, record.purpose in ("step", "compaction")
            if step not in seen:
                seen.add(step)
                places[len(places) + 1] = place
    return places


def _answered(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Leave out model calls that were not answered before the end. A tool call that was not is in doubt."""
    open_calls: dict[str, int] = {}
    cut: set[int] = set()
    for place, entry in enumerate(entries):
        record = entry.record
        if isinstance(record, LLMStarted):
            if record.scope in open_calls:  # its process died, and the next one asked again
                cut.add(open_calls[record.scope])
            open_calls[record.scope] = place
        elif isinstance(record, (LLMFinished, LLMFailed)):
            open_calls.pop(record.scope, None)
    cut.update(open_calls.values())
    return [entry for place, entry in enumerate(entries) if place not in cut]
