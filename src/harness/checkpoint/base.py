"""Ports to what keeps runs: journals, ownership and blobs. Every backend implements all three.

A journal is append-only. An append is compare-and-append: it names the sequence number it expects and carries its
owner's fencing token, and the store checks both in the transaction that writes.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import msgspec

from harness.mailbox import Command, Mail
from harness.records import (
    DriverStarted,
    Entry,
    Origin,
    ProcessId,
    Record,
    Reopened,
    RunCancelled,
    RunFailed,
    RunFinished,
    RunParked,
    RunStarted,
)

RunStatus: TypeAlias = Literal["running", "interrupted", "waiting", "finished", "failed", "cancelled"]
"""``running``: a live process drives it. ``interrupted``: nobody does, and it can be resumed. ``waiting``: nobody does,
and it can go on when a person has answered."""

LEASE_S = 30.0
"""Seconds a live owner may be silent before another may take the run."""


class Owner(msgspec.Struct, frozen=True):
    """The right to append to one run.

    Attributes:
        run_id: the run.
        token: the fencing token; it grows with every take-over.
        process: who holds it.
    """

    run_id: str
    token: int
    process: ProcessId


class RunQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which runs to list, newest first.

    Attributes:
        status: only runs of this status; None for all.
        limit: the most runs to return; None for all.

    >>> RunQuery(status="interrupted", limit=5).limit
    5
    """

    status: RunStatus | None = None
    limit: int | None = None


class RunSummary(msgspec.Struct, frozen=True):
    """One line about a run.

    Attributes:
        run_id: its id.
        goal: what it was asked.
        agent_id: the agent it was started with.
        status: how it stands now.
        started_at: seconds since the epoch.
        updated_at: when its last record was appended, seconds since the epoch.
        origin: how it was started.

    >>> RunSummary("r1", "tidy up", "a", "finished", 0.0, 1.5).status
    'finished'
    """

    run_id: str
    goal: str
    agent_id: str
    status: RunStatus
    started_at: float
    updated_at: float
    origin: Origin | None = None


@runtime_checkable
class CheckpointStore(Protocol):
    """Append-only journals under run ids, who owns them, the large values they point to, and a mailbox for each run.

    Every method that touches a disk or a network may raise CheckpointError; a refused append has written nothing.
    A store whose runs do not outlive the process says so with an attribute ``durable = False``.
    """

    async def append(self, run_id: str, expected_seq: int, records: Sequence[Record], /, *, owner: Owner) -> float:
        """Append records after ``expected_seq``, all or none, durable on return.

        Returns:
            The time stored with the entries, seconds since the epoch.

        Raises:
            CheckpointConflict: the journal does not end at ``expected_seq``.
            OwnershipLost: ``owner`` is not the run's owner any more.
        """
        ...

    def read(self, run_id: str, /, *, after: int = 0) -> AsyncIterator[Entry]:
        """Yield the entries with ``seq > after`` in order; none for a run that does not exist."""
        ...

    async def delete(self, run_id: str, /) -> bool:
        """Forget a run with its blobs and its ownership. Returns whether it existed."""
        ...

    def runs(self, query: RunQuery, /) -> AsyncIterator[RunSummary]:
        """Yield summaries of the stored runs, the last started first."""
        ...

    async def claim(self, run_id: str, process: ProcessId, /, *, lease_s: float = LEASE_S) -> Owner:
        """Become the owner of a run, which need not exist yet.

        A dead owner is replaced at once, a live one only when its lease is over.

        Raises:
            OwnershipLost: a live process owns the run; the message names it.
        """
        ...

    async def renew(self, owner: Owner, /, *, lease_s: float = LEASE_S) -> None:
        """Extend the lease.

        Raises:
            OwnershipLost: somebody else owns the run now.
        """
        ...

    async def release(self, owner: Owner, /) -> None:
        """Give the run up. Does nothing where it was lost already."""
        ...

    async def put_blob(self, run_id: str, data: bytes, /) -> str:
        """Keep a large value of a run, durable on return. Returns its digest (SHA-256, hexadecimal)."""
        ...

    async def get_blob(self, run_id: str, digest: str, /) -> bytes:
        """Return a kept value.

        Raises:
            CheckpointError: there is none under this digest.
        """
        ...

    async def post(self, run_id: str, command: Command, /) -> Mail:
        """Put a command into a run's mailbox, durable on return; anybody may, whoever owns the run.

        Returns:
            The command with the id it got and when the store received it.

        Raises:
            RunNotFound: there is no such run.
        """
        ...

    async def inbox(self, run_id: str, /) -> list[Mail]:
        """Return what is in a run's mailbox, in the order it was received."""
        ...

    async def discard_mail(self, run_id: str, ids: Sequence[str], /) -> None:
        """Remove commands that were taken; unknown ids are passed over."""
        ...

    async def close(self) -> None:
        """Close files and connections. Using the store again opens them anew."""
        ...


# Looked up, not asked with isinstance: that would cost a good part of an append.
_STATUS: dict[type[Record], RunStatus] = {
    RunStarted: "interrupted",
    DriverStarted: "interrupted",
    Reopened: "interrupted",
    RunFinished: "finished",
    RunFailed: "failed",
    RunParked: "waiting",
    RunCancelled: "cancelled",
}


def final_status(record: Record) -> RunStatus | None:
    """Say what a record makes of its run's status, or None where it leaves it as it is.

    A run that is driven or waits to be resumed is reported as ``interrupted`` here: whether somebody drives it is a
    matter of ownership, not of records.
    """
    return _STATUS.get(type(record))


@functools.cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        # Without procfs the boot is identified by its time, which a clock adjustment may move by seconds only.
        return f"{platform.node()}-{round((time.time() - time.monotonic()) / 60)}"


@functools.cache
def _pid_namespace() -> str:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """Return when a process started in the kernel's unit, or None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return _start_time_without_procfs(pid)
    # The command in parentheses may hold spaces; the fields that follow it do not.
    fields = stat.rsplit(")", 1)[1].split()
    return None if fields[0] in "ZX" else fields[19]


def _start_time_without_procfs(pid: int) -> str | None:
    import subprocess

    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def this_process() -> ProcessId:
    """Identify the calling process (anew after a fork)."""
    return _identify(os.getpid())


@functools.lru_cache(1)
def _identify(pid: int) -> ProcessId:
    return ProcessId(platform.node(), _boot_id(), pid, _start_time(pid) or "", _pid_namespace())


def is_alive(process: ProcessId) -> bool:
    """Say whether a process of this machine may still run. One of another boot does not.

    One in another container cannot be seen from here, so it counts as alive: only its lease tells.
    """
    if process.boot_id != _boot_id():
        return False
    return process.namespace != _pid_namespace() or _start_time(process.pid) == process.start_time


def lease_clock() -> float:
    """Return seconds since boot: the same for every process of the machine, never set back."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def describe(process: ProcessId) -> str:
    """Name a process for a person."""
    return f"process {process.pid} on {process.host!r}"
