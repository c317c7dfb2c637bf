"""Orchestration without effects: random plans, replies, failures, replans, crashes and limits, driven by the pure core.

The simulated driver asks every scope's strategy, notes what it says, and lets chance decide what becomes of each call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from harness import AgentConfig, GuardrailConfig, Task, Usage
from harness.events import Projection
from harness.fold import apply, fold
from harness.keys import place_of, task_scope
from harness.messages import Text, ToolCall
from harness.plan import MAX_ID_CHARS, OnFailure, problems
from harness.records import (
    VERSION,
    DriverStarted,
    Entry,
    Fingerprints,
    LLMFailed,
    LLMFinished,
    LLMStarted,
    Planned,
    ProcessId,
    Record,
    Reopened,
    Replanned,
    RunFinished,
    RunStarted,
    ScopeClosed,
    ScopeOpened,
    TaskSkipped,
    ToolFinished,
    ToolStarted,
    decode,
    encode,
)
from harness.result import result_of
from harness.state import RunState
from harness.strategies.base import Member, Pause, RunConfig, Strategy, Wait
from harness.strategies.dispatch import dispatch, route
from harness.strategies.orchestrate import orchestrate
from harness.strategies.react import react
from harness.strategies.tasks import is_ready, verdicts
from harness.tools.base import ToolSpec

PROCESS = ProcessId("host", "boot", 1, "0")
STRATEGIES: dict[str, Strategy] = {"react": react, "dispatch": dispatch, "route": route, "orchestrate": orchestrate}
TOOLS = {
    "look": ToolSpec("look", "", {}, "read"),
    "send": ToolSpec("send", "", {}, "once"),
    "pay": ToolSpec("pay", "", {}, "once", reconciles=True),
}
ON_FAILURE: tuple[OnFailure, ...] = ("retry", "skip", "replan", "abort")
MAX_LIVES = 6


@st.composite
def dags(
    draw: st.DrawFn, agents: Sequence[str], ways: Sequence[OnFailure], *, most: int = 12, prefix: str = "t"
) -> tuple[Task, ...]:
    """Draw a plan: each task may depend on any before it."""
    tasks: list[Task] = []
    for n in range(draw(st.integers(1, most))):
        needs = draw(st.lists(st.sampled_from(tasks), max_size=3, unique_by=lambda task: task.id)) if tasks else []
        tasks.append(
            Task(
                f"{prefix}{n}",
                draw(st.sampled_from(agents)),
                f"do {prefix}{n}",
                tuple(need.id for need in needs),
                draw(st.sampled_from(ways)),
                draw(st.integers(0, 2)),
            )
        )
    return tuple(draw(st.permutations(tasks)))


class World:
    """A driver without effects; it keeps its promises' books by itself."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw
        self.agents = [f"a{n}" for n in range(self.draw(st.integers(1, 4)))]
        self.limits = GuardrailConfig(
            max_llm_calls=self.draw(st.sampled_from([None, None, None, 3, 12])),
            max_tool_calls=self.draw(st.sampled_from([None, None, 2])),
            max_replan_count=self.draw(st.integers(0, 3)),
            max_parallel_tasks=self.draw(st.integers(1, 5)),
            max_plan_tasks=self.draw(st.sampled_from([6, 50])),
            max_delegate_depth=self.draw(st.integers(0, 2)),
        )
        self.members = {
            agent_id: AgentConfig(
                agent_id,
                max_steps=self.draw(st.integers(1, 3)),
                max_llm_attempts=self.draw(st.integers(1, 2)),
                max_parallel_tasks=self.draw(st.integers(1, 3)),
                max_reply_errors=1,
            )
            for agent_id in self.agents
        }
        helpers = {
            f"to_{agent_id}": ToolSpec(f"to_{agent_id}", "", {}, delegate_to=agent_id) for agent_id in self.agents
        }
        self.tools: Mapping[str, ToolSpec] = TOOLS | helpers
        self.team = {agent_id: Member(agent) for agent_id, agent in self.members.items()}
        self.journal: list[Record] = []
        self.state = RunState("r")
        self.open: list[Record] = []
        self.effects: Counter[tuple[str, int, int]] = Counter()
        self.told: set[str] = set()
        self.ways = self.draw(st.sampled_from([ON_FAILURE, ("skip", "retry", "replan")]))
        others = self.draw(st.sampled_from([("refuse", "doubt"), ("answer", "tools", "tools", "doubt", "empty")]))
        self.kinds = ["answer", "answer", "refuse", *others]
        how = self.draw(st.sampled_from(["orchestrate", "planned", "planned", "dispatch"]))
        strategy = "dispatch" if how == "dispatch" else "orchestrate"
        self.note(RunStarted(VERSION, "goal", "", Fingerprints("", "", ""), tokens=5, strategy=strategy))
        if how == "planned":
            self.note(Planned(self.draw(dags(self.agents, self.ways))))
        self.take()

    def config(self, agent_id: str) -> RunConfig:
        if not agent_id:
            return RunConfig(AgentConfig("coordinator"), {}, self.limits, 0, team=self.team)
        return RunConfig(self.members[agent_id], self.tools, self.limits, 10, team=self.team)

    def note(self, record: Record) -> None:
        self.check(record)
        self.journal.append(record)
        apply(self.state, record, float(len(self.journal)))
        self.check_limits()

    def take(self) -> None:
        """A new driver: whatever was open is in doubt."""
        self.open = []
        self.note(DriverStarted(VERSION, self.state.epoch + 1, PROCESS))

    def is_over(self) -> bool:
        return self.state.over is not None or self.state.failed is not None

    # -- promises ------------------------------------------------------------------------------------------------------

    def check(self, record: Record) -> None:
        plan = self.state.plan
        if isinstance(record, LLMStarted) and record.purpose == "plan" and plan is not None:
            self.told = {task_id for task_id, task in plan.tasks.items() if task.status == "ended"}
        elif isinstance(record, ScopeOpened) and record.task_id:
            assert plan is not None
            for need in plan.tasks[record.task_id].task.depends_on:
                other = plan.tasks[need]
                done = other.closed is not None and other.closed.success
                lost = other.status == "skipped" or (other.closed is not None and not other.closed.success)
                assert done or (lost and other.task.on_failure == "skip"), f"{record.task_id} began before {need} ended"
        elif isinstance(record, TaskSkipped):
            assert plan is not None
            assert plan.tasks[record.task_id].status == "waiting"
            lost = [plan.tasks[need] for need in plan.tasks[record.task_id].task.depends_on]
            assert any(t.status == "skipped" or (t.closed and not t.closed.success) for t in lost)
        elif isinstance(record, Replanned):
            assert plan is not None
            at_work = [task_id for task_id, task in plan.tasks.items() if task.status == "running"]
            done = [task_id for task_id, task in plan.tasks.items() if task.closed and task.closed.success]
            assert {*at_work} <= {*record.kept}, "what is at work stays"
            sure = [task_id for task_id in done if not (closed := plan.tasks[task_id].closed) or not closed.doubtful]
            assert {*sure} <= {*record.kept}, "what is done stays"
            lost = [task_id for task_id in record.removed if plan.tasks[task_id].task.on_failure == "replan"]
            unseen = [task_id for task_id in lost if plan.tasks[task_id].status == "ended" and task_id not in self.told]
            assert not unseen, "a failure is planned around by who was told of it"
            assert not {task.id for task in record.tasks} & {*record.kept}
            assert {*record.kept} | {*record.removed} == {*plan.tasks}
            assert problems(record.tasks, known=record.kept) == () or not record.tasks
            assert plan.replans - plan.replans_base < self.limits.max_replan_count

    def check_limits(self) -> None:
        plan = self.state.plan
        if plan is None:
            return
        running = [task for task in plan.tasks.values() if task.status == "running"]
        assert len(running) <= self.limits.max_parallel_tasks
        by_agent = Counter(task.task.agent_id for task in running)
        assert all(count <= self.members[agent_id].max_parallel_tasks for agent_id, count in by_agent.items())
        assert all(task.child in self.state.scopes for task in running)
        found = verdicts(plan, self.limits)
        assert plan.good == Counter(found.values())["done"]
        if not plan.troubled:
            waiting = [task_id for task_id, status in found.items() if status == "waiting"]
            ready = {task_id for task_id in waiting if is_ready(plan.tasks[task_id].task, plan, found)}
            assert {*plan.ready} == ready, "what the fold calls ready is what a look at the whole plan finds"
            assert {*found.values()} <= {"waiting", "running", "done"}

    # -- driving -------------------------------------------------------------------------------------------------------

    def decide(self) -> None:
        touched = [*self.state.scopes]
        while touched and not self.is_over():
            path = touched.pop(0)
            scope = self.state.scopes.get(path)
            if scope is None:
                continue
            for step in STRATEGIES[scope.strategy](scope, self.state, self.config(scope.agent_id)):
                assert not self.is_over()
                if isinstance(step, Pause):
                    scope.waited = True
                    touched.append(path)
                    continue
                if isinstance(step, Wait):
                    continue  # every scope is asked again at the next outcome
                self.note(step)
                if isinstance(step, (LLMStarted, ToolStarted)):
                    self.open.append(step)
                    continue
                touched.append(path)
                if isinstance(step, ScopeOpened):
                    touched.append(step.child)
                elif isinstance(step, ScopeClosed):
                    touched.append(step.scope)

    def run(self) -> None:
        lives = 1
        for _ in range(3000):
            self.decide()
            if self.state.over is not None:
                return
            if self.state.failed is not None:
                if lives >= MAX_LIVES or not self.draw(st.booleans()):
                    return
                lives += 1
                self.raise_limits()
                self.note(Reopened("again"))
                self.take()
            elif lives < MAX_LIVES and self.draw(st.integers(0, 11)) == 0:
                lives += 1
                self.take()
            else:
                assert self.open, "the run waits for nothing"
                self.outcome(self.open.pop(self.draw(st.integers(0, len(self.open) - 1))))
        raise AssertionError("the run does not end")

    def raise_limits(self) -> None:
        more = self.draw(st.sampled_from([None, 5]))
        calls = None if more is None or self.limits.max_llm_calls is None else self.limits.max_llm_calls + more
        self.limits = msgspec.structs.replace(self.limits, max_llm_calls=calls, max_tool_calls=None)

    def outcome(self, start: Record) -> None:
        clock = len(self.journal) / 1000
        if isinstance(start, LLMStarted):
            self.note(self.reply(start, clock))
            return
        assert isinstance(start, ToolStarted)
        status = "reconciled"
        if not start.reconcile:
            self.effects[start.scope, start.step, start.index] += 1
            status = self.draw(st.sampled_from(["ok", "ok", "error"]))
        text = self.draw(st.sampled_from(["same", "other"]))
        self.note(ToolFinished(start.step, start.index, start.tool, status, text, clock, start.scope, tokens=1))

    def reply(self, start: LLMStarted, clock: float) -> Record:
        if self.draw(st.integers(0, 9)) == 0:
            transient = self.draw(st.booleans())
            return LLMFailed(start.step, clock, "down", transient, start.scope, start.attempt, start.purpose)
        parts, finish, confidence = self.said(start)
        return LLMFinished(
            start.step, clock, parts, finish, Usage(5, 3, cost_microusd=1),
            start.scope, start.attempt, start.purpose, confidence=confidence, tokens=2,
        )  # fmt: skip

    def said(self, start: LLMStarted):  # type: ignore[no-untyped-def]  # parts, finish, confidence
        match start.purpose:
            case "classify":
                return (Text(self.draw(st.sampled_from(["simple", "complex", "complex", "?"]))),), "stop", None
            case "route":
                return (Text(self.draw(st.sampled_from([*self.agents, "nobody"]))),), "stop", None
            case "plan":
                return (Text(self.plan()),), "stop", None
            case "synthesis":
                answer = self.draw(st.sampled_from(['{"answer":"all"}', '{"answer":"all"}', "?"]))
                return (Text(answer),), "stop", None
            case _:
                pass
        kind = self.draw(st.sampled_from(self.kinds))
        if kind == "answer":
            return (Text("42"),), "stop", 0.9
        if kind == "doubt":
            return (Text("42?"),), "stop", 0.1
        if kind == "refuse":
            return (Text("no"),), "content_filter", None
        if kind == "empty":
            return (), "stop", None
        names = self.draw(st.lists(st.sampled_from([*self.tools]), min_size=1, max_size=2))
        return tuple(ToolCall("", name, '{"task":"help"}') for name in names), "tool_calls", None

    def plan(self) -> str:
        """Draw a planner's reply: a good one, a bad one, one that uses ids of tasks there are or were."""
        kind = self.draw(st.sampled_from(["good", "good", "reuse", "reuse", "empty", "bad", "circle", "stranger"]))
        event(f"planner: {kind}")
        if kind == "bad":
            return self.draw(st.sampled_from(["", "?", "[]", "{}", '{"tasks":null}', '{"tasks":[{}]}', "{" * 200]))
        if kind == "empty":
            return '{"tasks":[]}'
        tasks = [*self.draw(dags(self.agents, self.ways, most=5, prefix=self.draw(st.sampled_from(["t", "n"]))))]
        known = [*self.state.plan.tasks] if self.state.plan is not None else []
        if kind == "reuse" and known:
            place = self.draw(st.integers(0, len(tasks) - 1))
            task_id = self.draw(st.sampled_from(known))
            needs = tuple(self.draw(st.lists(st.sampled_from(known), max_size=2, unique=True)))
            tasks[place] = msgspec.structs.replace(tasks[place], id=task_id, depends_on=needs)
        if kind == "circle":
            tasks[0] = msgspec.structs.replace(tasks[0], depends_on=(tasks[-1].id,))
            tasks[-1] = msgspec.structs.replace(tasks[-1], depends_on=(tasks[0].id,))
        if kind == "stranger":
            tasks[0] = msgspec.structs.replace(tasks[0], agent_id="nobody")
        return msgspec.json.encode({"tasks": tasks}).decode()


def entries(journal: Sequence[Record]) -> list[Entry]:
    return [Entry("r", seq, float(seq), record) for seq, record in enumerate(journal, 1)]


def shape(state: RunState) -> object:
    """Return what decisions depend on, as plain data."""
    plan = state.plan
    return (
        state.seq, state.epoch, state.steps, state.aborted, state.in_flight, msgspec.to_builtins(state.spent),
        sorted(
            (
                path, scope.strategy, scope.agent_id, scope.phase, scope.step, scope.step_base, scope.failures,
                scope.reply_errors, scope.stale, scope.llm, scope.total_tokens, len(scope.exchange),
                [(c.attempt, c.effect, c.child, c.result, c.closed) for c in scope.calls],
            )
            for path, scope in state.scopes.items()
        ).__repr__(),
        plan and (
            {key: (t.task, t.status, t.attempts, t.child, t.closed, t.reason) for key, t in plan.tasks.items()},
            plan.begun, plan.running, plan.replans, plan.replans_base, plan.no_replan, plan.told, plan.synthesis,
        ),
    )  # fmt: skip


LIVES = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow]
)


@LIVES
@given(st.data())
def test_any_life_of_an_orchestration_ends_and_keeps_its_promises(data: st.DataObject) -> None:
    world = World(data)
    world.run()
    journal = world.journal
    opened = Counter(record.child for record in journal if isinstance(record, ScopeOpened))
    assert all(count == 1 for count in opened.values()), "an attempt's path is its own"
    closed = Counter(record.child for record in journal if isinstance(record, ScopeClosed))
    assert all(count == 1 for count in closed.values())
    once = {
        (record.scope, record.step, record.index)
        for record in journal
        if isinstance(record, ToolStarted) and record.effect == "once"
    }
    assert all(world.effects[key] <= 1 for key in once)
    answered = Counter(
        (record.scope, record.step, record.purpose in ("step", "compaction"))
        for record in journal
        if isinstance(record, LLMFinished)
    )
    assert all(count == 1 for count in answered.values()), "no recorded call is made again"
    calls = sum(isinstance(record, LLMStarted) for record in journal)
    if world.limits.max_llm_calls is not None:
        assert calls <= world.limits.max_llm_calls
    result = result_of(world.state, entries(journal))
    assert result is not None
    event(f"ends as {type(journal[-1]).__name__} {getattr(result, 'reason', '')}")
    if isinstance(journal[-1], RunFinished) and world.state.plan is not None:
        assert {*result.task_results} == {*world.state.plan.tasks}
        for task in result.task_results.values():
            assert task.attempts == world.state.plan.begun.get(task.task_id, 0)
            assert bool(task.error) == (task.status in ("failed", "skipped"))
    spent = sum(share.usage.cost_microusd for share in result.shares)
    assert spent == world.state.spent.usage.cost_microusd


@LIVES
@given(st.data())
def test_every_prefix_folds_to_what_was_applied_and_can_be_gone_on_with(data: st.DataObject) -> None:
    world = World(data)
    world.run()
    journal = entries(world.journal)
    assert decode(encode(world.journal)) == world.journal
    state, shown = RunState("r"), Projection()
    for length, entry in enumerate(journal, 1):
        apply(state, entry.record, entry.at)
        for seen in shown.events(entry):
            assert msgspec.json.encode(dict(seen.payload))
        if length % 3 and length != len(journal):
            continue
        folded = fold("r", journal[:length])
        assert shape(folded) == shape(state)
        if folded.over is not None:
            continue
        if folded.failed is not None:
            apply(folded, Reopened("again"), 0.0)
        apply(folded, DriverStarted(VERSION, folded.epoch + 1, PROCESS), 0.0)
        steps = [
            step
            for scope in [*folded.scopes.values()]
            for step in STRATEGIES[scope.strategy](scope, folded, world.config(scope.agent_id))
        ]
        assert steps, "a run that is not over has something to do"
    assert shape(state) == shape(world.state)


@given(st.text(min_size=1, max_size=MAX_ID_CHARS), st.integers(1, 99))
def test_the_ids_of_tasks_never_run_into_each_other(task_id: str, attempt: int) -> None:
    if not task_id.isprintable():
        return
    scope = task_scope(task_id, attempt, "agent")
    assert place_of(scope).task_id == task_id
    assert place_of(f"{scope}/delegate/1.0/other")[1:] == (task_id, scope, 1)
