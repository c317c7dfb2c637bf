"""The kill sweep: run a workload, kill it by SIGKILL at every point there is, resume it, and count what was repeated.

Counted is what reached the outside: lines that the model and the tools left in files, never a counter of ours.
"""

from __future__ import annotations

import asyncio
import queue
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, cast

from harness.checkpoint.base import CheckpointStore
from harness.checkpoint.file import FileCheckpointStore
from harness.checkpoint.sqlite import SQLiteCheckpointStore
from harness.llm.base import LLM, LLMRequest
from harness.messages import JSON
from harness.records import Effect, Entry, LLMFinished, RunFinished, ToolFinished, ToolStarted
from harness.result import RunResult
from harness.run_stream import RunStream
from harness.runtime import AgentRuntime
from harness.testing.crashing import CrashingStore, KillPoints, MeteredLLM, read_lines
from harness.testing.forkserver import Child, ForkServer, Say, address_of, at_address
from harness.testing.scripted import RecordingTool, Reply, ScriptedLLM
from harness.tools.base import idempotency_key

StoreFactory: TypeAlias = Callable[[Path], CheckpointStore]
"""Opens a store in a folder: an importable function, since each process opens its own."""

RUN_ID = "sweep"


def sqlite_store(folder: Path) -> CheckpointStore:
    """Open a SQLite store in a folder."""
    return SQLiteCheckpointStore(folder / "runs.db")


def file_store(folder: Path) -> CheckpointStore:
    """Open a file store in a folder."""
    return FileCheckpointStore(folder)


class Lab:
    """What a workload is made of, so that it can be killed anywhere and counted from outside.

    Args:
        folder: what outlives the process: the store, and what models and tools leave behind.
        open_store: opens the store.
        points: where the process may die.

    Attributes:
        folder: the same.
        points: the same; give your own code ``lab.points.reach("name")`` to be killed there too.
        run_id: the run's id.
        store: the store, with a point before and after every append.

    >>> lab = Lab(Path("."), file_store, KillPoints())
    >>> lab.tool("book", effect="once").spec.name, lab.llm(["Booked."]).name
    ('book', 'scripted')
    """

    run_id = RUN_ID

    def __init__(self, folder: Path, open_store: StoreFactory, points: KillPoints) -> None:
        self.folder = folder
        self.points = points
        self.store = CrashingStore(open_store(folder / "store"), on_append=points.append, on_blob=points.blob)

    def llm(
        self, model: LLM | Iterable[Reply] | Callable[[LLMRequest], Reply], *, name: str = "scripted"
    ) -> MeteredLLM:
        """Put a model behind the meter, with three points inside every call.

        Args:
            model: a model, or what ScriptedLLM takes. It must answer the same request the same way in any process.
            name: the name of a scripted model.
        """
        llm = model if isinstance(model, LLM) else ScriptedLLM(model, name=name)
        return MeteredLLM(llm, self.folder / "llm.log", on_point=self.points.reach)

    def tool(
        self,
        name: str,
        *,
        effect: Effect = "once",
        result: str | Callable[[Mapping[str, object]], str] = "ok",
        error: BaseException | None = None,
        delay_s: float = 0.0,
        reconciles: bool = False,
    ) -> RecordingTool:
        """Make a tool that leaves a line outside, with a point before and after its effect; see RecordingTool."""
        return RecordingTool(
            name,
            self.folder / "effects.log",
            effect=effect,
            result=result,
            error=cast("Exception | None", error),
            delay_s=delay_s,
            reconciles=reconciles,
            on_point=lambda when: self.points.reach(f"tool {name}, {when} its effect"),
        )

    async def run(self, runtime: AgentRuntime, agent_id: str, goal: str, *, stream: bool = False) -> RunResult:
        """Run one agent, or resume it where its journal exists.

        Args:
            runtime: with ``lab.store``, ``lab.llm()`` and ``lab.tool()`` in it.
            agent_id: the agent.
            goal: the goal.
            stream: drive it through the streaming entry points, with a consumer that takes tokens.
        """
        if not stream:
            return await self.drive(runtime, lambda: runtime.run_agent(agent_id, goal, run_id=self.run_id))
        return await self.drive_stream(
            runtime, lambda: runtime.run_agent_stream(agent_id, goal, run_id=self.run_id, tokens=True)
        )

    async def drive(self, runtime: AgentRuntime, start: Callable[[], Awaitable[RunResult]]) -> RunResult:
        """Start a run of any kind, or resume it where its journal exists.

        Args:
            runtime: with ``lab.store``, ``lab.llm()`` and ``lab.tool()`` in it.
            start: makes the entry call, with ``run_id=lab.run_id``; not called for a resume.
        """
        return await (runtime.resume(self.run_id) if await self._is_begun() else start())

    async def drive_stream(self, runtime: AgentRuntime, start: Callable[[], RunStream]) -> RunResult:
        """Do what ``drive`` does through the streaming entry points, with a consumer that takes every event."""
        stream = runtime.resume_stream(self.run_id, tokens=True) if await self._is_begun() else start()
        async with stream as events:
            async for _ in events:
                pass
        assert events.result is not None  # the stream was taken to its end
        return events.result

    async def _is_begun(self) -> bool:
        async for _ in self.store.read(self.run_id):
            return True
        return False


Workload: TypeAlias = Callable[[Lab], Awaitable[RunResult]]
"""A program to be killed: an importable coroutine function. It is called anew in every process."""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep counted.

    Attributes:
        workload: the workload's name.
        store: the store's name.
        points: the kill points of the uninterrupted run.
        kills: the processes that died by SIGKILL at a point.
        recoveries: the runs that were resumed to their end after one or more kills.
        answers_equal: how many of those ended with the answer of the uninterrupted run.
        paid_again: LLM calls that were sent again although their reply was recorded.
        in_flight_again: LLM calls that were sent again because they were in flight when the process died.
        finished_again: tools that had an effect again although their result was recorded.
        once_twice: calls of ``once`` tools that had their effect twice.
        violations: everything that is wrong, in words, with the point it happened at.

    >>> report = SweepReport("trip", "sqlite", 3, 3, 3, 3, 0, 1, 0, 0, ())
    >>> report.check().kills
    3
    """

    workload: str
    store: str
    points: int
    kills: int
    recoveries: int
    answers_equal: int
    paid_again: int
    in_flight_again: int
    finished_again: int
    once_twice: int
    violations: tuple[str, ...] = field(repr=False)

    def __str__(self) -> str:
        return (
            f"{self.workload:<24} {self.store:<7} {self.points:>3} points {self.kills:>5} kills   answers equal "
            f"{self.answers_equal}/{self.recoveries}   LLM calls paid again {self.paid_again} "
            f"(in flight at the kill: {self.in_flight_again})   finished tools again {self.finished_again}   "
            f"once tools twice {self.once_twice}"
        )

    def check(self) -> SweepReport:
        """Make sure that every point was reached and nothing is wrong.

        Raises:
            AssertionError: something is; the text says what, and where the process was killed.
        """
        shown = "\n  ".join(self.violations[:10])
        assert not self.violations, f"{self}\n  {shown}\n  ({len(self.violations)} in all)"
        assert self.kills >= self.points > 0, f"{self}\n  not every point was killed at"
        assert self.answers_equal == self.recoveries > 0, f"{self}\n  an answer differs"
        return self


def kill_sweep(
    workload: Workload,
    *,
    store: StoreFactory = sqlite_store,
    folder: Path | None = None,
    servers: Sequence[ForkServer] = (),
    kill_every: int = 1,
    kill_again_every: int = 0,
    at_risk: int = 1,
    varies: bool = False,
) -> SweepReport:
    """Kill a workload at every point of its life, resume it in a new process, and compare with the uninterrupted run.

    Args:
        workload: the program to kill: an importable ``async def workload(lab)`` that returns the run's result.
        store: opens the store it runs on.
        folder: where to keep files; those of a run that went wrong are left there. None takes a temporary folder.
        servers: fork servers to share, one for each process at work at a time; none starts two.
        kill_every: kill at every n-th point only.
        kill_again_every: also kill each resumed run at every n-th of its own points, and resume it again; 0 does not.
        at_risk: the most LLM calls one kill may cost: one, the agent's ``checkpoint_every``, or as many as there are
            agents that wait for a model at once.
        varies: agents at work at the same time come to their turns in another order in each run, so that runs differ
            in how many points they have; the last ones may not be there.

    Returns:
        What was counted; ``report.check()`` asserts that all is well.
    """
    with ExitStack() as stack:
        if not servers:
            servers = [stack.enter_context(ForkServer()) for _ in range(2)]
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return _Sweep(workload, store, folder, servers, kill_again_every, at_risk, varies=varies).sweep(kill_every)


@dataclass(frozen=True, slots=True)
class _Death:
    """How things stood when a process was killed."""

    where: str
    llm_lines: int
    effect_lines: int
    answered: frozenset[str]
    finished: frozenset[str]


@dataclass(slots=True)
class _Outcome:
    """What one run, killed once or more, came to."""

    kills: int
    equal: bool = False
    recovered: bool = False
    paid_again: int = 0
    in_flight_again: int = 0
    finished_again: int = 0
    once_twice: int = 0
    violations: list[str] = field(default_factory=list[str])


class _Sweep:
    """One workload on one store."""

    def __init__(
        self,
        workload: Workload,
        store: StoreFactory,
        folder: Path,
        servers: Sequence[ForkServer],
        again: int,
        at_risk: int,
        *,
        varies: bool,
    ) -> None:
        self._names = [address_of(workload), address_of(store)]
        self._label = (workload.__name__, store.__name__.removesuffix("_store"))
        self._open = store
        self._folder = folder
        self._servers: queue.SimpleQueue[ForkServer] = queue.SimpleQueue()
        for server in servers:
            self._servers.put(server)
        self._jobs = len(servers)
        self._again = again
        self._at_risk = at_risk
        self._varies = varies
        self._answer: JSON = None
        self._points = 0
        self._calls: Counter[str] = Counter()
        self._keys: frozenset[str] = frozenset()

    def sweep(self, every: int) -> SweepReport:
        violations = self._baseline()
        outcomes: list[_Outcome] = []
        absent = 0
        with ThreadPoolExecutor(self._jobs) as threads:
            for found in threads.map(self._at, range(1, self._points + 1, every)):
                outcomes += found
                absent += not found
        point = self._points + 1
        while found := self._at(point, required=False):  # a run may have a point more than the one before
            outcomes += found
            point += 1
        return SweepReport(
            *self._label,
            points=self._points - absent,
            kills=sum(outcome.kills for outcome in outcomes),
            recoveries=sum(outcome.recovered for outcome in outcomes),
            answers_equal=sum(outcome.equal for outcome in outcomes),
            paid_again=sum(outcome.paid_again for outcome in outcomes),
            in_flight_again=sum(outcome.in_flight_again for outcome in outcomes),
            finished_again=sum(outcome.finished_again for outcome in outcomes),
            once_twice=sum(outcome.once_twice for outcome in outcomes),
            violations=(*violations, *(text for outcome in outcomes for text in outcome.violations)),
        )

    def _baseline(self) -> list[str]:
        folder = self._new_folder("uninterrupted")
        child = self._live(folder, 0)
        result = cast("dict[str, JSON]", child.result)
        self._answer = result["answer"]
        self._points = cast("int", result["points"])
        self._calls = Counter(read_lines(folder / "llm.log"))
        self._keys = frozenset(_effects(folder))
        return [] if result["success"] else [f"the uninterrupted run failed: {result['error']}"]

    def _at(self, point: int, *, required: bool = True) -> list[_Outcome]:
        """Kill at one point, and go on from there in every way that is asked for."""
        for attempt in range(3 if required else 1):
            folder = self._new_folder(f"{point}-{attempt}")
            child = self._live(folder, point)
            if child.killed:
                return list(self._onwards(folder, self._death(folder, point, child), point))
            shutil.rmtree(folder)
        if not required or self._varies:
            return []
        return [_Outcome(0, violations=[f"point {point} of {self._points} was not reached"])]

    def _onwards(self, folder: Path, death: _Death, point: int) -> Iterator[_Outcome]:
        outcome = _Outcome(1)
        again = 1 + point % self._again if self._again else 0
        while again:  # each pass kills the resumed run at another of its points, until it has no more
            copy = folder.with_name(f"{folder.name}-{again}")
            shutil.copytree(folder, copy)
            child = self._live(copy, again)
            if not child.killed:
                shutil.rmtree(copy)
                break
            second = self._death(copy, again, child)
            yield self._finish(copy, [death, second], _Outcome(1))
            again += self._again
        yield self._finish(folder, [death], outcome)

    def _finish(self, folder: Path, deaths: list[_Death], outcome: _Outcome) -> _Outcome:
        """Resume to the end and compare."""
        where = " and again at ".join(death.where for death in deaths)
        child = self._live(folder, 0)
        result = cast("dict[str, JSON]", child.result)
        outcome.recovered = True
        outcome.equal = result["success"] is True and result["answer"] == self._answer
        wrong: list[str] = []
        if not outcome.equal:
            wrong.append(f"the answer is {result['answer']!r} ({result['error']}), not {self._answer!r}")
        self._compare_calls(folder, deaths, outcome, wrong)
        self._compare_effects(folder, deaths, outcome, wrong)
        outcome.violations = [f"killed at {where}: {text} [{folder}]" for text in wrong]
        if not wrong:
            shutil.rmtree(folder)
        return outcome

    def _compare_calls(self, folder: Path, deaths: list[_Death], outcome: _Outcome, wrong: list[str]) -> None:
        calls = read_lines(folder / "llm.log")
        for death in deaths:
            repeated = [digest for digest in calls[death.llm_lines :] if digest in death.answered]
            outcome.paid_again += len(repeated)
            wrong += [f"the recorded LLM call {digest} was paid again" for digest in repeated]
        again = sum(max(0, times - max(1, self._calls[digest])) for digest, times in Counter(calls).items())
        outcome.in_flight_again = again - outcome.paid_again
        if outcome.in_flight_again > len(deaths) * self._at_risk:
            wrong.append(f"{outcome.in_flight_again} LLM calls in flight were sent again after {len(deaths)} kills")

    def _compare_effects(self, folder: Path, deaths: list[_Death], outcome: _Outcome, wrong: list[str]) -> None:
        keys = _effects(folder)
        for death in deaths:
            repeated = [key for key in keys[death.effect_lines :] if key in death.finished]
            outcome.finished_again += len(repeated)
            wrong += [f"the finished tool call {key} ran again" for key in repeated]
        entries = _journal(folder, self._open)
        effects: dict[str, Effect] = {}
        unknown: set[str] = set()
        for entry in entries:
            if isinstance(entry.record, ToolStarted):
                effects[_key(entry.record)] = entry.record.effect
            elif isinstance(entry.record, ToolFinished) and entry.record.status == "unknown":
                unknown.add(_key(entry.record))
        twice = [key for key, times in Counter(keys).items() if times > 1 and effects.get(key, "once") == "once"]
        outcome.once_twice = len(twice)
        wrong += [f"the once tool call {key} had its effect twice" for key in twice]
        wrong += [f"an effect has the key {key}, which the uninterrupted run has not" for key in {*keys} - self._keys]
        wrong += [f"the effect with the key {key} is missing" for key in self._keys - {*keys} - unknown]
        ends = [entry.seq for entry in entries if isinstance(entry.record, RunFinished)]
        if ends != [len(entries)]:
            wrong.append(f"the journal of {len(entries)} records has its ends at {ends}")

    def _live(self, folder: Path, kill_at: int) -> Child:
        server = self._servers.get()
        try:
            return server.start(live, *self._names, str(folder), kill_at).wait()
        finally:
            self._servers.put(server)

    def _death(self, folder: Path, point: int, child: Child) -> _Death:
        entries = _journal(folder, self._open)
        return _Death(
            f"point {point} ({child.said[-1] if child.said else '?'})",
            len(read_lines(folder / "llm.log")),
            len(_effects(folder)),
            frozenset(e.record.response_id for e in entries if isinstance(e.record, LLMFinished)),
            frozenset(_key(e.record) for e in entries if isinstance(e.record, ToolFinished)),
        )

    def _new_folder(self, name: str) -> Path:
        folder = self._folder / "-".join((*self._label, name))
        folder.mkdir(parents=True)
        return folder


def live(say: Say, workload: str, store: str, folder: str, kill_at: int) -> JSON:
    """Run a workload in this process, up to its end or to the point it is killed at."""
    points = KillPoints(kill_at, on_kill=say)
    lab = Lab(Path(folder), cast("StoreFactory", at_address(store)), points)

    async def main() -> RunResult:
        return await cast("Workload", at_address(workload))(lab)

    result = asyncio.run(main())
    return {"answer": result.answer, "success": result.success, "error": result.error, "points": len(points.reached)}


def _journal(folder: Path, open_store: StoreFactory) -> list[Entry]:
    """Read what is stored from a copy: opening a store may tidy it, which the next process shall find as it was."""

    async def read(store: CheckpointStore) -> list[Entry]:
        try:
            return [entry async for entry in store.read(RUN_ID)]
        finally:
            await store.close()

    with tempfile.TemporaryDirectory() as copy:
        if (folder / "store").exists():
            shutil.copytree(folder / "store", copy, dirs_exist_ok=True)
        return asyncio.run(read(open_store(Path(copy))))


def _effects(folder: Path) -> list[str]:
    return [line.split("\t")[1] for line in read_lines(folder / "effects.log")]


def _key(record: ToolStarted | ToolFinished) -> str:
    return idempotency_key(RUN_ID, f"{record.scope}/{record.step}/{record.index}")
