"""What a plan costs: 50 tasks that depend on each other, beside the longest chain of what they wait for.

Each task is one agent that calls one tool, which sleeps, and then answers. The model answers at once, so that no
scheduler can be quicker than the longest chain of sleeps. Every answer, and the order of the sleeps, is checked; no
time is ever asserted. What the rows mean stands in README.md beside this file.

    python benchmarks/dag.py                   five random plans
    python benchmarks/dag.py --profile         the functions a plan in memory spends its time in
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from report import Cost, Folder, alternate, columns, heading, measure, row

from harness import AgentConfig, AgentRuntime, GuardrailConfig, Plan, Task
from harness.budget import Usage
from harness.checkpoint.base import CheckpointStore
from harness.checkpoint.memory import MemoryCheckpointStore
from harness.checkpoint.sqlite import SQLiteCheckpointStore
from harness.llm.base import LLMDelta, LLMRequest, LLMResponse, ResponseDone
from harness.messages import Text, ToolCall
from harness.tools import tool

SEEDS = (1, 2, 3, 4, 5)
TASKS = 50
ROUNDS = 5
TARGET = 1.10
FIRST = -1
"""The number of a task that is run before anything is measured."""

ANSWER = "All of it was waited for."


# -- random plans -------------------------------------------------------------------------------------------------


@dataclass
class Graph:
    """Tasks by number, each with what it sleeps and the earlier ones it depends on."""

    sleeps_ms: list[int]
    needs: list[list[int]]

    @property
    def critical_s(self) -> float:
        """Seconds of the longest chain of sleeps: no scheduler can be quicker."""
        ends: list[int] = []
        for sleep_ms, needs in zip(self.sleeps_ms, self.needs, strict=True):
            ends.append(sleep_ms + max((ends[need] for need in needs), default=0))
        return max(ends) / 1000

    @property
    def batches_s(self) -> float:
        """Seconds a scheduler needs that costs nothing, but starts a level of the graph when the last one is done."""
        levels: list[int] = []
        slowest: dict[int, int] = {}
        for sleep_ms, needs in zip(self.sleeps_ms, self.needs, strict=True):
            level = 1 + max((levels[need] for need in needs), default=-1)
            levels.append(level)
            slowest[level] = max(slowest.get(level, 0), sleep_ms)
        return sum(slowest.values()) / 1000

    def plan(self) -> Plan:
        """Return it as a plan."""
        tasks = [
            Task(f"t{number}", "worker", f"{number} {sleep_ms}", tuple(f"t{need}" for need in needs))
            for number, (sleep_ms, needs) in enumerate(zip(self.sleeps_ms, self.needs, strict=True))
        ]
        return Plan(tuple(tasks))


def graph(seed: int) -> Graph:
    """Draw a graph: each task sleeps 1 to 20 ms and depends on up to three of the ten before it."""
    draw = random.Random(seed)
    sleeps_ms = [draw.randint(1, 20) for _ in range(TASKS)]
    needs = [draw.sample(range(max(0, n - 10), n), min(n, draw.randint(0, 3))) for n in range(TASKS)]
    return Graph(sleeps_ms, needs)


# -- ours, and by hand ----------------------------------------------------------------------------------------------


class Clock:
    """When each task's sleep began and ended."""

    def __init__(self) -> None:
        self.began: dict[int, float] = {}
        self.ended: dict[int, float] = {}

    async def sleep(self, number: int, sleep_ms: int) -> None:
        """Sleep, and note when."""
        assert number not in self.began
        self.began[number] = time.perf_counter()
        await asyncio.sleep(sleep_ms / 1000)
        self.ended[number] = time.perf_counter()

    def check(self, drawn: Graph) -> None:
        """Make sure that every task slept once, after all it depends on."""
        assert self.ended.keys() - {FIRST} == set(range(TASKS))
        for number, needs in enumerate(drawn.needs):
            assert all(self.ended[need] <= self.began[number] for need in needs)


class ZeroLLM:
    """A model that answers at once: a task's number and milliseconds with a call, and the call's result as it is."""

    name = "zero"
    provider = "benchmark"

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Yield the reply that follows the messages."""
        usage = Usage(100, 10, cost_microusd=1)
        if request.response_schema is not None:
            text = f'{{"answer": "{ANSWER}", "confidence": 1.0, "conflicts": [], "unknowns": []}}'
            yield ResponseDone(LLMResponse((Text(text),), "stop", usage, "zero"))
            return
        number, sleep_ms = request.messages[0].text.split(maxsplit=2)[:2]
        if len(request.messages) == 1:
            arguments = f'{{"number": {number}, "sleep_ms": {sleep_ms}}}'
            yield ResponseDone(LLMResponse((ToolCall("c", "wait", arguments),), "tool_calls", usage, "zero"))
        else:
            yield ResponseDone(LLMResponse((Text(f"{number} is done"),), "stop", usage, "zero"))


def runtime(store: CheckpointStore, clock: Clock) -> AgentRuntime:
    """Wire a runtime with every check on and no limit in the way."""

    @tool(effect="read")
    async def wait(number: int, sleep_ms: int) -> str:
        """Wait.

        Args:
            number: of the task.
            sleep_ms: for how long.
        """
        await clock.sleep(number, sleep_ms)
        return "waited"

    agent = AgentConfig("worker", max_parallel_tasks=TASKS)
    limits = GuardrailConfig(max_total_cost_usd=1_000, max_wall_time_seconds=100_000, max_parallel_tasks=TASKS)
    return AgentRuntime(
        llm=ZeroLLM(), agents=[agent], tools=[wait], guardrail_config=limits, checkpoint_store=store, auto_resume=False
    )


async def ours(wired: AgentRuntime, plan: Plan) -> None:
    """Carry the plan out and check what came of it."""
    result = await wired.run_plan(plan, goal="Wait for all of it.")
    assert result.success, result
    assert result.answer == ANSWER, result
    answers = [(done.status, done.answer, done.attempts) for done in result.task_results.values()]
    assert answers == [("done", f"{number} is done", 1) for number in range(TASKS)]


def measure_ours(drawn: Graph, store: CheckpointStore) -> Cost:
    """Measure one plan. A runtime is wired and a database opened once for any number of runs: that is not counted."""
    clock = Clock()
    wired, plan = runtime(store, clock), drawn.plan()

    async def before() -> None:
        assert (await wired.run_plan(Plan([Task("first", "worker", f"{FIRST} 0")]))).success

    cost = measure(lambda: ours(wired, plan), before=before)
    clock.check(drawn)
    return cost


def in_memory(drawn: Graph) -> Cost:
    return measure_ours(drawn, MemoryCheckpointStore())


def in_sqlite(drawn: Graph, folder: Folder) -> Cost:
    store = SQLiteCheckpointStore(folder.new())
    cost = measure_ours(drawn, store)
    asyncio.run(store.close())
    return cost


def by_hand(drawn: Graph) -> Cost:
    """Measure what a person would write: each task awaits those it depends on, then sleeps."""
    clock = Clock()

    async def main() -> None:
        tasks: list[asyncio.Task[None]] = []

        async def one(number: int) -> None:
            for need in drawn.needs[number]:
                await tasks[need]
            await clock.sleep(number, drawn.sleeps_ms[number])

        tasks += [asyncio.create_task(one(number)) for number in range(TASKS)]
        for task in tasks:
            await task

    cost = measure(main)
    clock.check(drawn)
    return cost


# -- the command ----------------------------------------------------------------------------------------------------


def dag(folder: Folder) -> None:
    heading(f"W7  a plan of {TASKS} tasks: wall time over the longest chain of sleeps (bare: awaiting them by hand)")
    columns()
    found: dict[str, list[tuple[float, float]]] = {"in memory": [], "SQLite, fsync on": [], "ideal batches": []}
    for seed in SEEDS:
        drawn = graph(seed)
        critical = drawn.critical_s
        costs = alternate(ROUNDS, partial(in_memory, drawn), partial(in_sqlite, drawn, folder), partial(by_hand, drawn))
        memory, sqlite, bare = (cost.wall / critical for cost in costs)
        figures = (memory, sqlite, drawn.batches_s / critical)
        for (name, figure), ratios in zip(zip(found, figures, strict=True), found.values(), strict=True):
            ratios.append((figure, bare))
            row(f"seed {seed}, {critical * 1e3:.0f} ms, {name}", figure, bare, "x chain")
    for name, ratios in found.items():
        figure, bare = (statistics.median(each) for each in zip(*ratios, strict=True))
        judged = name == "in memory"
        target = {"target": f"<= {TARGET:.2f}x chain", "reached": figure <= TARGET} if judged else {}
        row(f"median, {name}", figure, bare, "x chain", **target)


def profile() -> None:
    """Print the functions a plan in memory spends its time in."""
    profiler = cProfile.Profile()
    drawn = graph(SEEDS[0])
    wired = runtime(MemoryCheckpointStore(), Clock())

    async def main() -> None:
        profiler.enable()
        await ours(wired, drawn.plan())
        profiler.disable()

    asyncio.run(main())
    pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


def main() -> None:
    """Measure, or profile."""
    parser = argparse.ArgumentParser(description="Measure what a plan costs, beside the longest chain of its tasks.")
    parser.add_argument("--dir", type=Path, help="where databases are written; a temporary folder by default")
    parser.add_argument("--profile", action="store_true", help="profile one plan in memory instead")
    options = parser.parse_args()
    if options.profile:
        profile()
        return
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        dag(Folder(Path(folder)))


if __name__ == "__main__":
    main()
