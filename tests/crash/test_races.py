"""Two and eight processes want one run: one drives it, the others say who does, and no effect happens twice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest

from harness.agent import AgentConfig
from harness.errors import OwnershipLost, StoreBusy
from harness.messages import JSON
from harness.records import DriverStarted, Entry, RunFinished, ToolFinished
from harness.runtime import AgentRuntime
from harness.testing import (
    Child,
    ForkServer,
    KillPoints,
    Lab,
    RecordingTool,
    StoreFactory,
    call,
    file_store,
    sqlite_store,
)
from harness.testing.forkserver import Say, address_of, at_address

pytestmark = pytest.mark.timeout(300)

ROUNDS = 50
LEASE_S = 0.15
STORES = [sqlite_store, file_store]
SCRIPT = [
    [call("read", path="a.txt"), call("put", key="a")],
    call("send", to="ann"),
    [call("mail", to="bob"), call("put", key="b"), call("send", to="cid")],
    "Read, put, sent and mailed.",
]
POINTS = 44
"""More than a run has: a process that is given the last ones is never killed."""


def drive(say: Say, store: str, folder: str, kill_at: int, number: int, gate: str, lease_s: float) -> JSON:
    """Drive the run, once the gate is open, as far as this process gets; say how that ended."""
    open_store = cast("StoreFactory", at_address(store))
    lab = Lab(Path(folder), open_store, KillPoints(kill_at, on_kill=say, number=signal.Signals(number)))
    tools = [
        lab.tool("read", effect="read"),
        lab.tool("put", effect="idempotent", delay_s=0.001),
        lab.tool("send", reconciles=True, result="sent"),
        lab.tool("mail"),
    ]
    runtime = AgentRuntime(
        llm=lab.llm(SCRIPT), agents=[AgentConfig("clerk")], tools=tools, checkpoint_store=lab.store, lease_s=lease_s
    )
    if gate:
        say("ready")
        Path(gate).open("rb").close()  # opens when somebody opens the other end

    async def main() -> JSON:
        try:
            return {"answer": (await lab.run(runtime, "clerk", "Do the round.")).answer}
        except OwnershipLost as error:
            return {"refused": str(error)}
        except StoreBusy as error:
            return {"busy": str(error)}

    return asyncio.run(main())


def start(
    server: ForkServer,
    store: StoreFactory,
    folder: Path,
    *,
    at: int = 0,
    number: signal.Signals = signal.SIGKILL,
    gate: Path | None = None,
    lease_s: float = 30.0,
) -> Child:
    return server.start(drive, address_of(store), str(folder), at, int(number), str(gate or ""), lease_s)


@contextlib.contextmanager
def barrier(gate: Path, children: list[Child]) -> Iterator[None]:
    """Let all children go at once: they wait for a pipe to be opened."""
    for child in children:
        child.wait_for("ready")
    with gate.open("wb"):
        yield


def journal(store: StoreFactory, folder: Path) -> list[Entry]:
    async def read() -> list[Entry]:
        opened = store(folder / "store")
        try:
            return [entry async for entry in opened.read(Lab.run_id)]
        finally:
            await opened.close()

    return asyncio.run(read())


def effects(folder: Path) -> list[tuple[str, str, str]]:
    log = folder / "effects.log"
    return [row for name in ("read", "put", "send", "mail") for row in RecordingTool(name, log).effects()]


def check_effects(folder: Path, entries: list[Entry]) -> None:
    """No once tool ran twice; a call has one key; the run has one end; whatever is not in doubt has happened."""
    rows = effects(folder)
    once = Counter(key for name, key, _ in rows if name in ("send", "mail"))
    assert not [key for key, times in once.items() if times > 1], rows
    keys: dict[tuple[str, str], set[str]] = {}
    for name, key, args in rows:
        keys.setdefault((name, args), set()).add(key)
    assert all(len(found) == 1 for found in keys.values()), keys
    unknown = sum(isinstance(e.record, ToolFinished) and e.record.status == "unknown" for e in entries)
    assert len(keys) >= 6 - unknown, (keys, unknown)
    assert [e.seq for e in entries if isinstance(e.record, RunFinished)] == [len(entries)]


def check_refusals(children: list[Child], entries: list[Entry]) -> int:
    """One process drove the run to its end; the others name their owner, or came late and have its answer."""
    results = [cast("dict[str, str]", child.result) for child in children]
    drivers = {child.pid for child in children}
    drove = {e.record.process.pid for e in entries if isinstance(e.record, DriverStarted)}
    assert len(drove & drivers) == 1, (drove, results)
    for child, result in zip(children, results, strict=True):
        if "refused" in result:
            assert any(f"process {pid}" in result["refused"] for pid in drivers), result
            assert child.pid not in drove
        else:
            assert result["answer"] == SCRIPT[-1]
    return sum("refused" in result for result in results)


def rounds(servers: list[ForkServer], folder: Path, play: Callable[[ForkServer, Path, int], int]) -> int:
    """Play the rounds, each in a folder of its own and as many at a time as there are servers; add up their counts."""
    free: queue.SimpleQueue[ForkServer] = queue.SimpleQueue()
    for server in servers:
        free.put(server)

    def one(n: int) -> int:
        place = folder / str(n)
        place.mkdir()
        server = free.get()
        try:
            return play(server, place, n)
        finally:
            free.put(server)

    with ThreadPoolExecutor(len(servers)) as threads:
        return sum(threads.map(one, range(ROUNDS)))


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.__name__)
@pytest.mark.parametrize("count", [2, 8])
def test_processes_resume_one_run_at_the_same_time(
    fork_servers: list[ForkServer], tmp_path: Path, say_at_end: Callable[[str], None], store: StoreFactory, count: int
) -> None:
    def play(server: ForkServer, folder: Path, n: int) -> int:
        start(server, store, folder, at=1 + n % POINTS).wait()
        over = bool((entries := journal(store, folder)) and isinstance(entries[-1].record, RunFinished))
        gate = folder / "gate"
        os.mkfifo(gate)
        children = [start(server, store, folder, gate=gate) for _ in range(count)]
        with barrier(gate, children):
            for child in children:
                child.wait()
        entries = journal(store, folder)
        check_effects(folder, entries)
        return 0 if over else check_refusals(children, entries)

    refused = rounds(fork_servers, tmp_path, play)
    say_at_end(
        f"{store.__name__.removesuffix('_store')}: {count} processes resumed one run, {ROUNDS} rounds: one drove it, "
        f"{refused} were refused by its name, the others had its answer; once tools twice 0"
    )
    assert refused > 0


def wait_until_stopped(child: Child) -> bool:
    """Wait until it stands still; False where the run was over before it came to its point."""
    if not child.hear():
        child.wait()
        return False
    end = time.monotonic() + 10
    while Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < end, f"process {child.pid} did not stop"
        time.sleep(0.001)
    return True


def is_busy(child: Child) -> bool:
    """Say whether the holder was stopped right while it wrote to the database: nobody else can, then, and says so."""
    return "busy" in cast("dict[str, str]", child.result)


def test_a_holder_stopped_past_its_lease_has_the_result_of_who_took_the_run(
    fork_servers: list[ForkServer], tmp_path: Path, say_at_end: Callable[[str], None]
) -> None:
    """On SQLite another process takes the run when the lease is over and finishes it; then the holder wakes up."""

    def play(server: ForkServer, folder: Path, n: int) -> int:
        holder = start(server, sqlite_store, folder, at=1 + n % POINTS, number=signal.SIGSTOP, lease_s=LEASE_S)
        if not wait_until_stopped(holder):
            return 0
        time.sleep(LEASE_S)
        taker = start(server, sqlite_store, folder).wait()
        holder.signal(signal.SIGCONT)
        if is_busy(taker):
            holder.wait()
            return 0
        assert holder.wait().result == taker.result == {"answer": SCRIPT[-1]}, holder.said
        check_effects(folder, journal(sqlite_store, folder))
        return 1

    stopped = rounds(fork_servers, tmp_path, play)
    say_at_end(f"sqlite: {stopped} holders stopped past their lease had the taker's answer; once tools twice 0")
    assert stopped > ROUNDS // 2


def test_a_holder_stopped_past_its_lease_is_refused_while_another_drives(
    fork_servers: list[ForkServer], tmp_path: Path, say_at_end: Callable[[str], None]
) -> None:
    """The holder wakes up while the process that took the run is at work: it has to stop, and says whose the run is."""

    def play(server: ForkServer, folder: Path, n: int) -> int:
        holder = start(server, sqlite_store, folder, at=1 + n % POINTS, number=signal.SIGSTOP, lease_s=LEASE_S)
        if not wait_until_stopped(holder):
            return 0
        time.sleep(LEASE_S)
        taker = start(server, sqlite_store, folder, at=3 + n % 5, number=signal.SIGSTOP)
        refused = 0
        if wait_until_stopped(taker):
            over = isinstance(journal(sqlite_store, folder)[-1].record, RunFinished)
            holder.signal(signal.SIGCONT)
            result = cast("dict[str, str]", holder.wait().result)
            taker.signal(signal.SIGCONT)
            if not over:
                refused = 1
                assert f"owned by process {taker.pid}" in result["refused"], (holder.said, taker.said, result)
        else:
            holder.signal(signal.SIGCONT)
            holder.wait()
        if is_busy(taker.wait()):
            return 0
        assert taker.wait().result == {"answer": SCRIPT[-1]}
        check_effects(folder, journal(sqlite_store, folder))
        return refused

    refused = rounds(fork_servers, tmp_path, play)
    say_at_end(f"sqlite: {refused} holders stopped past their lease were refused by the taker's name")
    assert refused > ROUNDS // 3


def test_a_stopped_holder_of_a_file_keeps_its_run(
    fork_servers: list[ForkServer], tmp_path: Path, say_at_end: Callable[[str], None]
) -> None:
    """The kernel's lock stays with a process that is stopped: others are refused by name, and it goes on."""

    def play(server: ForkServer, folder: Path, n: int) -> int:
        holder = start(server, file_store, folder, at=1 + n % POINTS, number=signal.SIGSTOP, lease_s=LEASE_S)
        if not wait_until_stopped(holder):
            return 0
        time.sleep(LEASE_S)
        other = cast("dict[str, str]", start(server, file_store, folder).wait().result)
        holder.signal(signal.SIGCONT)
        assert holder.wait().result == {"answer": SCRIPT[-1]}
        check_effects(folder, journal(file_store, folder))
        if "refused" in other:
            assert f"process {holder.pid}" in other["refused"]
            return 1
        assert other["answer"] == SCRIPT[-1]  # the last append was written before it was stopped
        return 0

    refused = rounds(fork_servers, tmp_path, play)
    say_at_end(f"file: {refused} processes were refused by the name of a stopped holder, which finished its run")
    assert refused > ROUNDS // 2
