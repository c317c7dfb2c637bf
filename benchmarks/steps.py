"""What a step costs: our figures, beside a hand-written loop that makes the same calls in the same process.

The model answers at once and the tools are trivial, so that what is left is the harness. Every answer is checked;
no time is ever asserted. The machine decides the microseconds: read the ratios, and the counters, which do not
depend on it. What the rows mean stands in README.md beside this file.

    python benchmarks/steps.py                 all of it
    python benchmarks/steps.py memory resume   some of it
    python benchmarks/steps.py --profile       the functions a run in memory spends its time in
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import json
import os
import pstats
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import apsw
from report import Cost, Folder, alternate, columns, heading, measure, row

from harness import AgentConfig, AgentRuntime, GuardrailConfig
from harness.budget import Usage
from harness.checkpoint.base import CheckpointStore
from harness.checkpoint.memory import MemoryCheckpointStore
from harness.checkpoint.sqlite import SQLiteCheckpointStore
from harness.llm.base import LLMDelta, LLMRequest, LLMResponse, ResponseDone, TextDelta
from harness.messages import Text, ToolCall
from harness.result import RunResult
from harness.tools import tool

LENGTHS = (10, 50, 200, 800)
GOAL = "Look all of it up, one after the other, and say when you are done."
ANSWER = "All of it was looked up."


# -- the same model and the same tools for both ---------------------------------------------------------------------


def reply(place: int, steps: int, width: int = 1) -> LLMResponse:
    """Build the model's reply: ``width`` calls that were never made before, or the answer after ``steps`` of them."""
    usage = Usage(100, 10, cost_microusd=1)
    if place >= steps:
        return LLMResponse((Text(ANSWER),), "stop", usage, "zero")
    if width == 1:
        return LLMResponse((ToolCall("c", "look_up", f'{{"key": {place}}}'),), "tool_calls", usage, "zero")
    calls = tuple(ToolCall(f"c{i}", "wait", f'{{"key": {place * width + i}}}') for i in range(width))
    return LLMResponse(calls, "tool_calls", usage, "zero")


class ZeroLLM:
    """A model that answers at once.

    Args:
        steps: how many steps it asks for before it answers.
        width: tool calls in a step.
        on_step: awaited before each reply.
        words: pieces of text it streams with each reply.
    """

    name = "zero"
    provider = "benchmark"

    def __init__(
        self,
        steps: int,
        *,
        width: int = 1,
        on_step: Callable[[int], Awaitable[None]] | None = None,
        words: int = 0,
    ) -> None:
        self._steps = steps
        self._width = width
        self._on_step = on_step
        self._words = words

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Yield the reply that follows the messages."""
        place = len(request.messages) // 2
        if self._on_step is not None:
            await self._on_step(place)
        for _ in range(self._words):
            yield TextDelta("word ")
        yield ResponseDone(reply(place, self._steps, self._width))


async def bare_model(
    messages: list[dict[str, object]], steps: int, width: int, on_step: Callable[[int], Awaitable[None]] | None
) -> AsyncIterator[LLMDelta]:
    place = len(messages) // 2
    if on_step is not None:
        await on_step(place)
    yield ResponseDone(reply(place, steps, width))


async def look_up_bare(key: int) -> str:
    return f"the value of {key} is {key * 7}"


async def wait_bare(key: int) -> str:
    await asyncio.sleep(0.005)
    return str(key)


@tool(effect="read")
async def look_up(key: int) -> str:
    """Look a value up.

    Args:
        key: which one.
    """
    return f"the value of {key} is {key * 7}"


@tool(effect="read")
async def wait(key: int) -> str:
    """Take five milliseconds.

    Args:
        key: any number.
    """
    await asyncio.sleep(0.005)
    return str(key)


async def bare(
    steps: int,
    *,
    width: int = 1,
    on_step: Callable[[int], Awaitable[None]] | None = None,
    commit: Callable[[int, bytes], None] | None = None,
) -> None:
    """Make the calls as a person would write them down by hand."""
    messages: list[dict[str, object]] = [{"role": "user", "content": GOAL}]
    functions = {"look_up": look_up_bare, "wait": wait_bare}
    while True:
        response: LLMResponse | None = None
        async for delta in bare_model(messages, steps, width, on_step):
            if isinstance(delta, ResponseDone):
                response = delta.response
        assert response is not None
        calls = [part for part in response.parts if isinstance(part, ToolCall)]
        messages.append({"role": "assistant", "content": response.parts})
        if not calls:
            assert response.parts == (Text(ANSWER),)
            assert len(messages) == 2 * steps + 2
            return
        todo = [functions[call.name](**json.loads(call.arguments)) for call in calls]
        results = [await todo[0]] if len(todo) == 1 else await asyncio.gather(*todo)
        messages.append({"role": "tool", "content": results})
        if commit is not None:
            facts = [(call.name, call.arguments, result) for call, result in zip(calls, results, strict=True)]
            commit(len(messages), json.dumps({"step": len(messages) // 2, "calls": facts, "pad": "x" * 330}).encode())


def runtime(llm: ZeroLLM, store: CheckpointStore, steps: int) -> AgentRuntime:
    """Wire a runtime with every check on and no limit in the way."""
    agent = AgentConfig("worker", max_steps=steps + 1, working_memory_max_tokens=10_000_000, max_parallel_tools=32)
    limits = GuardrailConfig(
        max_total_cost_usd=1_000,
        max_wall_time_seconds=100_000,
        max_input_tokens=10**9,
        max_output_tokens=10**9,
        max_llm_calls=10**6,
        max_tool_calls=10**6,
    )
    return AgentRuntime(
        llm=llm, agents=[agent], tools=[look_up, wait], guardrail_config=limits, checkpoint_store=store,
        auto_resume=False,
    )  # fmt: skip


async def ours(steps: int, wired: AgentRuntime) -> None:
    """Run with a viewer that takes every event."""
    events = 0
    async with wired.run_agent_stream("worker", GOAL) as stream:
        async for _ in stream:
            events += 1
    check(stream.result)
    assert events == 3 * steps + 3  # THOUGHT, ACTION and OBSERVATION; STARTED, the last THOUGHT and TASK_DONE


async def ours_quiet(wired: AgentRuntime) -> None:
    """Run without a viewer."""
    check(await wired.run_agent("worker", GOAL))


def check(result: RunResult | None) -> None:
    """Make sure that the work was done: only then its time means something."""
    assert result is not None
    assert result.success, result
    assert result.answer == ANSWER, result


# -- measuring ------------------------------------------------------------------------------------------------------


def measure_ours(
    steps: int, store: CheckpointStore, *, before: Callable[[], Coroutine[None, None, None]] | None = None
) -> Cost:
    """Measure one run with a viewer. A runtime is wired once and runs anything, so wiring it is not counted."""
    wired = runtime(ZeroLLM(steps), store, steps)
    return measure(lambda: ours(steps, wired), before=before)


class Counters:
    """What reached the disk, counted by SQLite's own calls to the operating system."""

    def __init__(self) -> None:
        self.bytes = 0
        self.fsyncs = 0


class CountingVFS(apsw.VFS):
    """The file system of SQLite, with counters. It costs CPU, so nothing is timed while it is there."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        super().__init__("counting", "unix", makedefault=True)

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802 - apsw names it
        """Open a file that counts."""
        counters = self._counters

        class CountingFile(apsw.VFSFile):
            def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802 - apsw names it
                counters.bytes += len(data)
                super().xWrite(data, offset)

            def xSync(self, flags: int) -> None:  # noqa: N802 - apsw names it
                counters.fsyncs += 1
                super().xSync(flags)

        return CountingFile("unix", name, flags)  # type: ignore[arg-type]  # apsw's stub lacks the URI's type


@contextmanager
def counting() -> Iterator[Counters]:
    """Count what every database opened meanwhile writes and syncs."""
    counters = Counters()
    vfs = CountingVFS(counters)
    try:
        yield counters
    finally:
        vfs.unregister()


class BareDatabase:
    """One table, one commit for each step, as durable as ours."""

    def __init__(self, path: Path) -> None:
        self._db = apsw.Connection(str(path))
        self._db.pragma("journal_mode", "WAL")
        self._db.pragma("synchronous", "FULL")
        self._db.execute("CREATE TABLE step (number INTEGER PRIMARY KEY, data BLOB NOT NULL)")

    def commit(self, _number: int, data: bytes) -> None:
        """Write a row, durably."""
        self._db.execute("INSERT INTO step (data) VALUES (?)", (data,))

    def close(self) -> None:
        """Close the file."""
        self._db.close()


# -- the workloads --------------------------------------------------------------------------------------------------


def memory(_folder: Folder) -> None:
    heading("W1  one step in memory: budgets, argument checks and events on, a viewer attached")
    columns()
    per_step: dict[int, tuple[float, float]] = {}
    for steps in LENGTHS:
        rounds = 7 if steps > 50 else 25
        mine, other = alternate(
            rounds,
            partial(memory_ours, steps),
            partial(measure, partial(bare, steps)),
        )
        per_step[steps] = us(mine.cpu, steps), us(other.cpu, steps)
        ratio = per_step[steps][0] / per_step[steps][1]
        judged = {"target": "<= 6x bare", "reached": ratio <= 6} if steps == 50 else {}
        row(f"CPU per step, {steps} steps", *per_step[steps], "us", **judged)
        row(f"wall per step, {steps} steps", us(mine.wall, steps), us(other.wall, steps), "us")
    growth = per_step[800][0] / per_step[50][0]
    bare_growth = per_step[800][1] / per_step[50][1]
    row("growth, 800 steps over 50", growth, bare_growth, "", target="<= 1.1", reached=growth <= 1.1)


def memory_ours(steps: int) -> Cost:
    return measure_ours(steps, MemoryCheckpointStore())


def durable(folder: Folder) -> None:
    heading("W2  one durable step: a commit with fsync before and after each call (bare: one commit a step)")
    columns()
    per_step: dict[int, tuple[float, float]] = {}
    for steps in LENGTHS:
        mine, other, commits = alternate(
            3 if steps > 50 else 9,
            partial(durable_ours, folder, steps),
            partial(durable_bare, folder, steps),
            partial(bare_commits, folder, steps),
        )
        per_step[steps] = us(mine.cpu, steps), us(other.cpu, steps)
        ratio = per_step[steps][0] / per_step[steps][1]
        judged = {"target": "<= 3x bare", "reached": ratio <= 3} if steps == 50 else {}
        row(f"CPU per step, {steps} steps", *per_step[steps], "us", **judged)
        row(f"wall per step, {steps} steps", us(mine.wall, steps), us(other.wall, steps), "us")
        row(f"CPU per step over a bare commit's, {steps}", us(mine.cpu, steps), us(commits.cpu, steps), "us")
    growth = per_step[800][0] / per_step[50][0]
    bare_growth = per_step[800][1] / per_step[50][1]
    row("growth, 800 steps over 50", growth, bare_growth, "", target="<= 1.2", reached=growth <= 1.2)
    wrote = {steps: (disk(durable_ours, folder, steps), disk(durable_bare, folder, steps)) for steps in (50, 800)}
    for steps, (mine, other) in wrote.items():
        written = mine.bytes / steps / 1000
        row(
            f"written per step, {steps} steps", written, other.bytes / steps / 1000, "kB",
            target="<= 10 kB", reached=written <= 10,
        )  # fmt: skip
    # Beginning and ending a run take a few more, which are no step's.
    (mine_50, other_50), (mine_800, other_800) = wrote[50], wrote[800]
    fsyncs = (mine_800.fsyncs - mine_50.fsyncs) / 750
    row(
        "fsyncs per step more", fsyncs, (other_800.fsyncs - other_50.fsyncs) / 750, "",
        target="<= 2", reached=fsyncs <= 2.01,
    )  # fmt: skip
    row("fsyncs of a run besides", mine_50.fsyncs - 50 * fsyncs, None, "")


def disk(work: Callable[[Folder, int], Cost], folder: Folder, steps: int) -> Counters:
    """Count what a run of some steps writes and syncs."""
    with counting() as counters:
        work(folder, steps)
    return counters


def durable_ours(folder: Folder, steps: int) -> Cost:
    """Measure a durable run. As for the bare loop, the file is made and opened before."""
    store = SQLiteCheckpointStore(folder.new())

    async def opened() -> None:
        await store.settings()

    cost = measure_ours(steps, store, before=opened)
    asyncio.run(store.close())
    return cost


def durable_bare(folder: Folder, steps: int) -> Cost:
    database = BareDatabase(folder.new())
    cost = measure(lambda: bare(steps, commit=database.commit))
    database.close()
    return cost


def bare_commits(folder: Folder, steps: int) -> Cost:
    database = BareDatabase(folder.new())
    data = b"x" * 460

    async def commits() -> None:
        for number in range(steps):
            database.commit(number, data)

    cost = measure(commits)
    database.close()
    return cost


def parallel(_folder: Folder) -> None:
    heading("W3  a step of 20 parallel tools of 5 ms: wall clock over 5 ms")
    columns()

    def over(run: Callable[[Callable[[int], Awaitable[None]]], Coroutine[None, None, None]]) -> float:
        times: list[float] = []

        async def note(_place: int) -> None:
            times.append(time.perf_counter())

        measure(lambda: run(note))
        return statistics.median(1e3 * (b - a) - 5 for a, b in pairwise(times))

    def mine_once(note: Callable[[int], Awaitable[None]]) -> Coroutine[None, None, None]:
        return ours_quiet(runtime(ZeroLLM(100, width=20, on_step=note), MemoryCheckpointStore(), 100))

    mine = over(mine_once)
    other = over(lambda note: bare(100, width=20, on_step=note))
    row("time over 5 ms", mine, other, "ms", target="<= 0.8 ms", reached=mine <= 0.8)


RUNS, STEPS_OF_A_RUN = 1_000, 20


async def yield_once(_place: int) -> None:
    """Let every other run go on, as a model that has to be waited for does."""
    await asyncio.sleep(0)


async def together(runs: int, one: Callable[[], Coroutine[None, None, None]]) -> None:
    await asyncio.gather(*(one() for _ in range(runs)))


def many(_folder: Folder) -> None:
    heading("W4  1,000 runs at once, in memory")
    columns()
    steps, llm = STEPS_OF_A_RUN, ZeroLLM(STEPS_OF_A_RUN, on_step=yield_once)

    def mine_once() -> Cost:
        wired = runtime(llm, MemoryCheckpointStore(), steps)
        return measure(lambda: together(RUNS, lambda: ours_quiet(wired)))

    def other_once() -> Cost:
        return measure(lambda: together(RUNS, lambda: bare(steps, on_step=yield_once)))

    mine, other = alternate(3, mine_once, other_once)
    total = RUNS * steps / 1000
    ratio = other.cpu / mine.cpu
    row(
        "steps per second of CPU", total / mine.cpu, total / other.cpu, "thousand",
        target=">= 60 k, or 0.39x bare", reached=ratio >= 0.39 or total / mine.cpu >= 60,
    )  # fmt: skip
    row("CPU per step", us(mine.cpu, RUNS * steps), us(other.cpu, RUNS * steps), "us")
    held, bare_held = (float(child("memory-of-runs", kind)) for kind in ("ours", "bare"))
    row("memory per live run, after its first step", held, bare_held, "kB", target="<= 12 kB", reached=held <= 12)


def memory_of_runs(kind: str) -> None:
    """Print the kilobytes of one of many runs that wait for their second reply (in a process of its own)."""

    async def main() -> float:
        waiting, gate, arrived = asyncio.Event(), asyncio.Event(), 0

        async def stay(place: int) -> None:
            nonlocal arrived
            if place == 1:
                arrived += 1
                if arrived == RUNS:
                    waiting.set()
                await gate.wait()

        store, llm = MemoryCheckpointStore(), ZeroLLM(2, on_step=stay)
        shared = runtime(llm, store, 2)

        await ours_quiet(runtime(ZeroLLM(2), store, 2))  # what is made once for all runs
        gc.collect()
        tracemalloc.start()
        runs = asyncio.gather(*(ours_quiet(shared) if kind == "ours" else bare(2, on_step=stay) for _ in range(RUNS)))
        await waiting.wait()
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        gate.set()
        await runs
        return held / RUNS / 1000

    print(asyncio.run(main()))


def importing(_folder: Folder) -> None:
    heading("W6  start and import")
    columns()

    def start(code: str) -> float:
        def once() -> float:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

        return statistics.median(once() for _ in range(9))

    mine, other = start("import harness"), start("import asyncio, json, sqlite3")
    row("CPU of `import harness`", mine, other, "ms", target="<= 100 ms", reached=mine <= 100)
    row("CPU of `from harness import AgentRuntime`", start("from harness import AgentRuntime"), other, "ms")


def resuming(folder: Folder) -> None:
    heading("W8  resume a killed run of 800 steps in a new process, up to its first model call")
    columns()
    mine: list[float] = []
    other: list[float] = []
    bare_path = folder.new()
    child("write-bare", str(bare_path))
    for _ in range(5):
        path = folder.new()
        child("write-journal", str(path))
        mine.append(float(child("resume", str(path))))
        other.append(float(child("resume-bare", str(bare_path))))
    median = statistics.median(mine)
    row("to the first model call", median, statistics.median(other), "ms", target="<= 8 ms", reached=median <= 8)


KILLED = 77
RESUMED_AT = 800


def write_journal(path: str) -> None:
    """Die in the model call after 800 steps."""

    async def die(place: int) -> None:
        if place == RESUMED_AT:
            os._exit(KILLED)

    async def main() -> None:
        store = SQLiteCheckpointStore(path)
        llm = ZeroLLM(RESUMED_AT + 1, on_step=die)
        await runtime(llm, store, RESUMED_AT + 1).run_agent("worker", GOAL, run_id="killed")

    asyncio.run(main())


def resume(path: str) -> None:
    """Print the milliseconds to the first model call, then finish the run and check that nothing was run again."""
    from harness.checkpoint import sqlite  # noqa: F401  # modules are loaded before the clock starts

    calls: list[tuple[int, float]] = []

    async def note(place: int) -> None:
        calls.append((place, time.perf_counter()))

    async def main() -> float:
        began = time.perf_counter()
        store = SQLiteCheckpointStore(path)
        resumed = runtime(ZeroLLM(RESUMED_AT + 1, on_step=note), store, RESUMED_AT + 1)
        check(await resumed.resume("killed"))
        assert [place for place, _ in calls] == [RESUMED_AT, RESUMED_AT + 1], calls
        await store.close()
        return 1e3 * (calls[0][1] - began)

    print(asyncio.run(main()))


def write_bare(path: str) -> None:
    """Write 800 steps as plain rows."""
    database = BareDatabase(Path(path))
    asyncio.run(bare(RESUMED_AT, commit=database.commit))
    database.close()


def resume_bare(path: str) -> None:
    """Print the milliseconds it takes to read plain rows back into messages and call the model."""

    async def main() -> float:
        began = time.perf_counter()
        database = apsw.Connection(path)
        messages: list[dict[str, object]] = [{"role": "user", "content": GOAL}]
        for (data,) in database.execute("SELECT data FROM step ORDER BY number"):
            step = json.loads(data)
            messages.append({"role": "assistant", "content": [call[:2] for call in step["calls"]]})
            messages.append({"role": "tool", "content": [call[2] for call in step["calls"]]})
        async for _ in bare_model(messages, RESUMED_AT, 1, None):
            pass
        assert len(messages) == 2 * RESUMED_AT + 1
        return 1e3 * (time.perf_counter() - began)

    print(asyncio.run(main()))


DURABLE_RUNS, STEPS_OF_A_DURABLE_RUN = 100, 50


def many_durable(folder: Folder) -> None:
    heading("W9  100 durable runs at once, fsync on")
    columns()
    total = DURABLE_RUNS * STEPS_OF_A_DURABLE_RUN

    def mine_once() -> Cost:
        store = SQLiteCheckpointStore(folder.new())
        wired = runtime(ZeroLLM(STEPS_OF_A_DURABLE_RUN), store, STEPS_OF_A_DURABLE_RUN)
        cost = measure(lambda: together(DURABLE_RUNS, lambda: ours_quiet(wired)))
        asyncio.run(store.close())
        return cost

    def other_once() -> Cost:
        database = BareDatabase(folder.new())
        cost = measure(lambda: together(DURABLE_RUNS, lambda: bare(STEPS_OF_A_DURABLE_RUN, commit=database.commit)))
        database.close()
        return cost

    mine, other = alternate(3, mine_once, other_once)
    rate = total / mine.wall
    row("steps per second", rate, total / other.wall, "", target=">= 8,000", reached=rate >= 8_000)
    cpu = us(mine.cpu, total)
    row("CPU per step", cpu, us(other.cpu, total), "us", target="<= 80 us", reached=cpu <= 80)
    with counting() as counters:
        mine_once()
    fsyncs = counters.fsyncs / total
    row("fsyncs per step", fsyncs, 1.0, "", target="<= 0.05", reached=fsyncs <= 0.05)
    row("written per step", counters.bytes / total / 1000, None, "kB")


def us(seconds: float, steps: int) -> float:
    """Convert to microseconds per step."""
    return 1e6 * seconds / steps


# -- the command ----------------------------------------------------------------------------------------------------

WORKLOADS = {
    "memory": memory,
    "durable": durable,
    "parallel": parallel,
    "many": many,
    "importing": importing,
    "resuming": resuming,
    "many-durable": many_durable,
}

CHILDREN = {
    "memory-of-runs": memory_of_runs,
    "write-journal": write_journal,
    "resume": resume,
    "write-bare": write_bare,
    "resume-bare": resume_bare,
}


def child(name: str, argument: str) -> str:
    """Run one of ``CHILDREN`` in a new process and return what it printed."""
    command = [sys.executable, __file__, "--child", name, argument]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, KILLED):
        raise SystemExit(f"{name} {argument} failed with code {done.returncode}")
    return done.stdout.strip()


def profile(steps: int) -> None:
    """Print the functions a run in memory spends its time in."""
    profiler = cProfile.Profile()

    async def main() -> None:
        profiler.enable()
        await ours(steps, runtime(ZeroLLM(steps), MemoryCheckpointStore(), steps))
        profiler.disable()

    asyncio.run(main())
    pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


def main() -> None:
    """Run the workloads that are named, or all."""
    parser = argparse.ArgumentParser(description="Measure what a step costs, beside a bare loop.")
    parser.add_argument("workload", nargs="*", help=f"one of: {', '.join(WORKLOADS)}; all by default")
    parser.add_argument("--dir", type=Path, help="where databases are written; a temporary folder by default")
    parser.add_argument("--profile", action="store_true", help="profile 2,000 steps in memory instead")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        CHILDREN[options.child[0]](options.child[1])
        return
    if options.profile:
        profile(2_000)
        return
    for name in options.workload:
        if name not in WORKLOADS:
            parser.error(f"unknown workload {name!r}; the workloads are: {', '.join(WORKLOADS)}")
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        databases = Folder(Path(folder))
        for name in options.workload or WORKLOADS:
            WORKLOADS[name](databases)


if __name__ == "__main__":
    main()
