"""Two and eight processes want one run: one drives it, the others say who does, and no effect happens twice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from harness.agent import AgentConfig
from harness.errors import OwnershipLost
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


def check_refusals(children: list[Child], entries: list[Entry], drivers: set[int]) -> int:
    """One process drove the run to its end; the others name their owner, or came late and have its answer."""
    results = [cast("dict[str, str]", child.result) for child in children]
    drove = {e.record.process.pid for e in entries if isinstance(e.record, DriverStarted)}
    assert len(drove & {child.pid for child in children}) == 1, (drove, results)
    for child, result in zip(children, results, strict=True):
        if "refused" in result:
            assert any(f"process {pid}" in result["refused"] for pid in drivers), result
            assert child.pid not in drove
        else:
            assert result["answer"] == SCRIPT[-1]
    return sum("refused" in result for result in results)


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.__name__)
@pytest.mark.parametrize("count", [2, 8])
def test_processes_resume_one_run_at_the_same_time(
    fork_servers: list[ForkServer], tmp_path: Path, store: StoreFactory, count: int
) -> None:
    refused = 0
    for n in range(ROUNDS):
        folder = tmp_path / str(n)
        folder.mkdir()
        start(fork_servers[0], store, folder, at=1 + n % POINTS).wait()
        over = bool((entries := journal(store, folder)) and isinstance(entries[-1].record, RunFinished))
        gate = folder / "gate"
        os.mkfifo(gate)
        children = [start(fork_servers[i % 2], store, folder, gate=gate) for i in range(count)]
        with barrier(gate, children):
            for child in children:
                child.wait()
        entries = journal(store, folder)
        check_effects(folder, entries)
        if not over:
            refused += check_refusals(children, entries, {child.pid for child in children})
    print(f"{store.__name__}: {count} processes, {ROUNDS} rounds, {refused} refused by name")
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


def test_a_holder_stopped_past_its_lease_has_the_result_of_who_took_the_run(
    fork_servers: list[ForkServer], tmp_path: Path
) -> None:
    """On SQLite another process takes the run when the lease is over and finishes it; then the holder wakes up."""
    stopped = 0
    for n in range(ROUNDS):
        folder = tmp_path / str(n)
        folder.mkdir()
        holder = start(fork_servers[0], sqlite_store, folder, at=1 + n % POINTS, number=signal.SIGSTOP, lease_s=LEASE_S)
        if not wait_until_stopped(holder):
            continue
        stopped += 1
        time.sleep(LEASE_S)
        taker = start(fork_servers[1], sqlite_store, folder, lease_s=LEASE_S).wait()
        holder.signal(signal.SIGCONT)
        assert holder.wait().result == taker.result == {"answer": SCRIPT[-1]}, holder.said
        check_effects(folder, journal(sqlite_store, folder))
    print(f"sqlite_store: {stopped} holders stopped past their lease; each came late and had the taker's answer")
    assert stopped > ROUNDS // 2


def test_a_holder_stopped_past_its_lease_is_refused_while_another_drives(
    fork_servers: list[ForkServer], tmp_path: Path
) -> None:
    """The holder wakes up while the process that took the run is at work: it has to stop, and says whose the run is."""
    refused = 0
    for n in range(ROUNDS):
        folder = tmp_path / str(n)
        folder.mkdir()
        holder = start(fork_servers[0], sqlite_store, folder, at=1 + n % POINTS, number=signal.SIGSTOP, lease_s=LEASE_S)
        if not wait_until_stopped(holder):
            continue
        time.sleep(LEASE_S)
        taker = start(fork_servers[1], sqlite_store, folder, at=3 + n % 5, number=signal.SIGSTOP)
        if wait_until_stopped(taker):
            holder.signal(signal.SIGCONT)
            result = cast("dict[str, str]", holder.wait().result)
            taker.signal(signal.SIGCONT)
            if any(entry.seq for entry in journal(sqlite_store, folder) if isinstance(entry.record, RunFinished)):
                assert result in ({"answer": SCRIPT[-1]}, {"refused": result.get("refused")})
            else:
                refused += 1
                assert f"owned by process {taker.pid}" in result["refused"], (holder.said, taker.said, result)
        else:
            holder.signal(signal.SIGCONT)
            holder.wait()
        assert taker.wait().result == {"answer": SCRIPT[-1]}
        check_effects(folder, journal(sqlite_store, folder))
    print(f"sqlite_store: {refused} stopped holders refused by the taker's name")
    assert refused > ROUNDS // 2


def test_a_stopped_holder_of_a_file_keeps_its_run(fork_servers: list[ForkServer], tmp_path: Path) -> None:
    """The kernel's lock stays with a process that is stopped: others are refused by name, and it goes on."""
    refused = 0
    for n in range(ROUNDS):
        folder = tmp_path / str(n)
        folder.mkdir()
        holder = start(fork_servers[0], file_store, folder, at=1 + n % POINTS, number=signal.SIGSTOP, lease_s=LEASE_S)
        if not wait_until_stopped(holder):
            continue
        time.sleep(LEASE_S)
        other = cast("dict[str, str]", start(fork_servers[1], file_store, folder, lease_s=LEASE_S).wait().result)
        holder.signal(signal.SIGCONT)
        assert holder.wait().result == {"answer": SCRIPT[-1]}
        check_effects(folder, journal(file_store, folder))
        if "refused" in other:
            refused += 1
            assert f"process {holder.pid}" in other["refused"]
        else:
            assert other["answer"] == SCRIPT[-1]  # the last append was written before it was stopped
    print(f"file_store: {ROUNDS} rounds, {refused} refused by the stopped holder's name")
    assert refused > ROUNDS // 2
