"""Runs with many agents through AgentRuntime with scripted models: what a library user relies on."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec
import pytest

from harness import (
    AgentConfig,
    AgentRuntime,
    CheckpointStore,
    ConfigError,
    Event,
    Failed,
    Finished,
    GuardrailConfig,
    LLMError,
    MemoryCheckpointStore,
    Plan,
    RunIdTaken,
    RunNotFound,
    RunResult,
    RunStream,
    SQLiteCheckpointStore,
    Task,
    Usage,
    delegate,
    tool,
)
from harness.checkpoint.base import Owner
from harness.events import (
    Dispatched,
    Done,
    Observation,
    Planned,
    Replanned,
    Resumed,
    Routed,
    Synthesised,
    TaskDone,
    TaskStarted,
)
from harness.llm.base import LLMRequest, LLMResponse
from harness.messages import Part, Text, ToolCall, ToolResult
from harness.records import LLMFinished, LLMStarted, Record, RunFailed, ScopeOpened, ToolFinished, ToolStarted
from harness.testing import CrashingStore, RecordingTool, Reply, ScriptedLLM, call

Script: TypeAlias = Mapping[str, Sequence[Reply]]


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[CheckpointStore]:
    store = MemoryCheckpointStore() if request.param == "memory" else SQLiteCheckpointStore(tmp_path / "runs.db")
    yield store
    await store.close()


def as_json(**fields: object) -> str:
    return msgspec.json.encode(fields).decode()


def saying(text: str, *calls: ToolCall, confidence: float | None = None, cost: int = 0) -> LLMResponse:
    parts: tuple[Part, ...] = (Text(text), *calls)
    usage = Usage(input_tokens=10, output_tokens=5, cost_microusd=cost)
    return LLMResponse(parts, "tool_calls" if calls else "stop", usage, confidence=confidence)


REFUSED = LLMResponse((Text("I will not."),), "content_filter")
BROUGHT = as_json(answer="All of it.", confidence=0.8, conflicts=["a or b"], unknowns=["c"])


def steps(request: LLMRequest) -> int:
    return sum(1 for message in request.messages if message.role == "assistant")


def asked(request: LLMRequest) -> str:
    return request.messages[0].text


def by_task(script: Script) -> Callable[[LLMRequest], Reply]:
    """Answer by the words a task begins with, and by how often was answered before."""

    def choose(request: LLMRequest) -> Reply:
        replies = next(script[w] for w in sorted(script, key=len, reverse=True) if asked(request).startswith(w))
        return replies[min(steps(request), len(replies) - 1)]

    return choose


def wire(
    store: CheckpointStore,
    script: Script | Callable[[LLMRequest], Reply] | ScriptedLLM,
    *,
    agents: Iterable[AgentConfig | str] = ("a", "b"),
    tools: Sequence[object] = (),
    sites: Mapping[str, object] | None = None,
    **limits: object,
) -> AgentRuntime:
    """Wire agents with one model for their work, and others for words on the run."""
    model = script if isinstance(script, ScriptedLLM) else ScriptedLLM(script if callable(script) else by_task(script))
    by_site = {"synthesiser": ScriptedLLM([BROUGHT]), **(sites or {})}
    return AgentRuntime(
        llm=model,
        llm_by_site=by_site,  # type: ignore[arg-type]
        agents=[AgentConfig(agent, f"works as {agent}") if isinstance(agent, str) else agent for agent in agents],
        tools=tools,
        checkpoint_store=store,
        guardrail_config=GuardrailConfig(**limits),  # type: ignore[arg-type]
    )


def says(*replies: Reply) -> ScriptedLLM:
    return ScriptedLLM(list(replies))


def plan_of(*tasks: Mapping[str, object]) -> str:
    return as_json(tasks=tasks, rationale="so")


async def events_of(stream: RunStream) -> list[Event]:
    async with stream as events:
        return [event async for event in events]


def started(result: RunResult) -> list[str]:
    return [entry.record.child for entry in result.trace if isinstance(entry.record, ScopeOpened)]


def calls_of(*models: ScriptedLLM) -> int:
    return sum(len(model.requests) for model in models)


# -- agents and their tasks --------------------------------------------------------------------------------------------


async def test_two_tasks_of_one_agent_at_work_at_once_answer_for_themselves(store: CheckpointStore) -> None:
    meet = asyncio.Barrier(2)

    @tool(effect="read")
    async def look(what: str) -> str:
        """Look."""
        await meet.wait()
        return f"seen: {what}"

    def choose(request: LLMRequest) -> Reply:
        name = asked(request).split()[1]
        if steps(request) == 0:
            return call("look", what=name)
        [result] = [part.text for part in request.messages[-1].parts if isinstance(part, ToolResult)]
        return f"{name} {result}"

    plan = Plan([Task("one", "a", "See one"), Task("two", "a", "See two")])
    model = ScriptedLLM(choose)
    result = await wire(store, model, tools=[look]).run_plan(plan)
    assert {id_: task.answer for id_, task in result.task_results.items()} == {
        "one": "one seen: one",
        "two": "two seen: two",
    }
    for request in model.requests:
        text = "".join(message.text for message in request.messages)
        assert ("one" in text) != ("two" in text)


async def test_two_runs_in_one_process_never_see_each_other(store: CheckpointStore) -> None:
    def choose(request: LLMRequest) -> Reply:
        word = "red" if "red" in asked(request) else "blue"
        return (
            saying(word, call("paint", word=word))
            if steps(request) == 0
            else saying(word, cost=7 if word == "red" else 11)
        )

    @tool(effect="read")
    async def paint(word: str) -> str:
        """Paint."""
        await asyncio.sleep(0.001)
        return word

    model = ScriptedLLM(choose)
    shared = wire(
        store,
        model,
        tools=[paint],
        sites={"synthesiser": ScriptedLLM(lambda request: as_json(answer="red" * ("red" in asked(request)) or "blue"))},
    )

    def plan(word: str) -> Plan:
        return Plan([Task("t1", "a", f"{word} one"), Task("t2", "a", f"{word} two"), Task("t3", "b", f"{word} three")])

    red, blue = shared.run_plan_stream(plan("red"), goal="red"), shared.run_plan_stream(plan("blue"), goal="blue")
    of_red, of_blue = await asyncio.gather(events_of(red), events_of(blue))
    for mine, word, other in ((of_red, "red", "blue"), (of_blue, "blue", "red")):
        assert len({event.run_id for event in mine}) == 1
        assert other not in str([event.payload for event in mine])
        assert word in str([event.payload for event in mine])
    assert red.result is not None
    assert blue.result is not None
    assert red.result.spent.usage.cost_microusd == 3 * 7
    assert blue.result.spent.usage.cost_microusd == 3 * 11
    for request in model.requests:
        text = "".join(message.text for message in request.messages)
        assert ("red" in text) != ("blue" in text)


async def test_leaving_the_stream_after_the_plan_leaves_no_task_alive(store: CheckpointStore) -> None:
    plan = plan_of(
        {"id": "t1", "agent_id": "a", "instruction": "One"}, {"id": "t2", "agent_id": "b", "instruction": "Two"}
    )
    planner = says(plan)
    model = ScriptedLLM(by_task({"One": ["1"], "Two": ["2"]}), delay_s=0.02)
    runtime = wire(store, model, sites={"planner": planner})
    before = asyncio.all_tasks()
    async with runtime.run_stream("Count.", run_id="r") as events:
        async for event in events:
            if isinstance(event, Planned):
                break
    assert asyncio.all_tasks() == before
    result = await runtime.resume("r")
    assert isinstance(result, Finished)
    assert {task.answer for task in result.task_results.values()} == {"1", "2"}
    assert calls_of(planner) == 1


async def test_a_slow_task_does_not_hold_back_one_whose_own_dependency_is_done(store: CheckpointStore) -> None:
    after = asyncio.Event()

    @tool(effect="read")
    async def wait() -> str:
        """Wait until the one after the quick one has begun."""
        await asyncio.wait_for(after.wait(), 5)
        return "waited"

    def choose(request: LLMRequest) -> Reply:
        if asked(request).startswith("After"):
            after.set()
        return call("wait") if asked(request).startswith("Slow") and steps(request) == 0 else "done"

    plan = Plan([Task("slow", "a", "Slow"), Task("quick", "a", "Quick"), Task("after", "b", "After", ("quick",))])
    result = await wire(store, choose, tools=[wait]).run_plan(plan)
    assert [task.status for task in result.task_results.values()] == ["done"] * 3


async def test_a_task_is_told_the_results_it_builds_on_and_no_others(store: CheckpointStore) -> None:
    plan = Plan([Task("x", "a", "Find x"), Task("y", "a", "Find y"), Task("z", "b", "Use x", ("x",))])
    model = ScriptedLLM(by_task({"Find x": ["x is 1"], "Find y": ["y is 2"], "Use x": ["used"]}))
    await wire(store, model).run_plan(plan)
    [request] = [request for request in model.requests if asked(request).startswith("Use x")]
    assert "x is 1" in asked(request)
    assert "y is 2" not in asked(request)


async def test_parallel_limits_of_the_run_and_of_an_agent_hold(store: CheckpointStore) -> None:
    now: dict[str, int] = {}
    most: dict[str, int] = {}

    @tool(effect="read")
    async def work(who: str) -> str:
        """Work."""
        for key in (who, "all"):
            now[key] = now.get(key, 0) + 1
            most[key] = max(most.get(key, 0), now[key])
        await asyncio.sleep(0.002)
        for key in (who, "all"):
            now[key] -= 1
        return "worked"

    def choose(request: LLMRequest) -> Reply:
        return call("work", who=asked(request).split()[0]) if steps(request) == 0 else "done"

    tasks = [Task(f"{agent}{n}", agent, f"{agent} {n}") for agent in "ab" for n in range(5)]
    agents = [AgentConfig("a", max_parallel_tasks=2), AgentConfig("b")]
    result = await wire(store, choose, agents=agents, tools=[work], max_parallel_tasks=4).run_plan(Plan(tasks))
    assert isinstance(result, Finished)
    assert most["a"] == 2
    assert most["all"] <= 4


# -- tasks that fail ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [REFUSED, saying("maybe", confidence=0.1)], ids=["failed", "doubtful"])
async def test_retry_tries_again_and_says_why(store: CheckpointStore, bad: Reply) -> None:
    def choose(request: LLMRequest) -> Reply:
        return "better" if "An earlier attempt did not succeed" in asked(request) else bad

    plan = Plan([Task("t", "a", "Try", on_failure="retry"), Task("u", "b", "then", ("t",), on_failure="skip")])
    model = ScriptedLLM(choose)
    seen = await events_of(wire(store, model).run_plan_stream(plan))
    assert [event.scope for event in seen if isinstance(event, TaskDone)][:2] == ["t/1/a", "t/2/a"]
    [done] = [event for event in seen if isinstance(event, Done)]
    assert done.task_results[0].status == "done"
    assert done.task_results[0].attempts == 2
    assert done.task_results[0].answer == "better"


async def test_retry_ends_and_what_depends_on_it_is_skipped(store: CheckpointStore) -> None:
    script = {"Try": [REFUSED], "Other": ["fine"], "then": ["never"]}
    plan = Plan(
        [
            Task("t", "a", "Try", on_failure="retry", max_retries=2),
            Task("u", "b", "then", ("t",)),
            Task("v", "b", "then", ("u",)),
            Task("o", "b", "Other"),
        ]
    )
    result = await wire(store, script).run_plan(plan)
    assert {id_: task.status for id_, task in result.task_results.items()} == {
        "t": "failed", "u": "skipped", "v": "skipped", "o": "done"
    }  # fmt: skip
    assert started(result) == ["t/1/a", "o/1/b", "t/2/a", "t/3/a"]


async def test_a_doubtful_answer_after_the_last_retry_is_used_and_marked(store: CheckpointStore) -> None:
    plan = Plan([Task("t", "a", "Try", on_failure="retry"), Task("u", "b", "then", ("t",))])
    model = ScriptedLLM(by_task({"Try": [saying("maybe", confidence=0.2)], "then": ["done"]}))
    result = await wire(store, model).run_plan(plan)
    assert [(task.status, task.attempts) for task in result.task_results.values()] == [("doubtful", 2), ("done", 1)]
    [then] = [request for request in model.requests if asked(request).startswith("then")]
    assert "doubtful" in asked(then)


async def test_skip_goes_on_without_it_and_says_so(store: CheckpointStore) -> None:
    plan = Plan([Task("t", "a", "Try", on_failure="skip"), Task("u", "b", "then", ("t",))])
    model = ScriptedLLM(by_task({"Try": [REFUSED], "then": ["without"]}))
    result = await wire(store, model).run_plan(plan)
    assert [task.status for task in result.task_results.values()] == ["failed", "done"]
    [then] = [request for request in model.requests if asked(request).startswith("then")]
    assert "[t] was not done" in asked(then)


@pytest.mark.parametrize("bad", [REFUSED, saying("maybe", confidence=0.1)], ids=["failed", "doubtful"])
async def test_replan_replaces_what_remains_and_keeps_what_is_done(store: CheckpointStore, bad: Reply) -> None:
    def choose(request: LLMRequest) -> Reply:
        return plan_of({"id": "t", "agent_id": "b", "instruction": "Anew", "depends_on": ["ok"]})

    planner = ScriptedLLM(choose)
    script = {"Fine": ["fine"], "Try": [bad], "then": ["never"], "Anew": ["new"]}
    plan = Plan([Task("ok", "a", "Fine"), Task("t", "a", "Try", ("ok",)), Task("u", "b", "then", ("t",))])
    model = ScriptedLLM(by_task(script))
    seen = await events_of(wire(store, model, sites={"planner": planner}).run_plan_stream(plan))
    [replan] = [event for event in seen if isinstance(event, Replanned)]
    assert replan.payload["trigger_task"] == "t"
    assert replan.payload["replan_count"] == 1
    assert replan.payload["new_task_count"] == 1
    assert (replan.kept, replan.removed, replan.added) == (("ok",), ("t", "u"), ("t",))
    assert [task.id for task in replan.plan.tasks] == ["ok", "t"]
    [done] = [event for event in seen if isinstance(event, Done)]
    assert done.replan_count == 1
    assert {task.task_id: task.answer for task in done.task_results} == {"ok": "fine", "t": "new"}
    assert [event.scope for event in seen if isinstance(event, TaskStarted)] == ["ok/1/a", "t/1/a", "t/2/b"]
    told = asked(planner.requests[0])
    assert "fine" in told
    assert "'t'" in told


async def test_replans_are_bounded_and_then_the_failure_stands(store: CheckpointStore) -> None:
    count = itertools.count()
    planner = ScriptedLLM(lambda _: plan_of({"id": f"n{next(count)}", "agent_id": "a", "instruction": "Try"}))
    plan = Plan([Task("ok", "a", "Fine"), Task("t", "a", "Try"), Task("u", "b", "then", ("t",))])
    script = {"Fine": ["fine"], "Try": [REFUSED], "then": ["never"]}
    result = await wire(store, script, sites={"planner": planner}, max_replan_count=3).run_plan(plan)
    assert calls_of(planner) == 3
    assert result.replan_count == 3
    assert {id_: task.status for id_, task in result.task_results.items()} == {"ok": "done", "n2": "failed"}


async def test_where_nothing_was_done_the_run_fails_and_says_why(store: CheckpointStore) -> None:
    plan = Plan([Task("t", "a", "Try", on_failure="skip"), Task("u", "b", "Try", on_failure="skip")])
    result = await wire(store, {"Try": [REFUSED]}).run_plan(plan)
    assert isinstance(result, Failed)
    assert result.reason == "task"
    assert "'t'" in result.error or "t:" in result.error


@pytest.mark.parametrize("bad", [REFUSED, saying("maybe", confidence=0.1)], ids=["failed", "doubtful"])
async def test_abort_waits_for_a_once_tool_of_another_task(store: CheckpointStore, tmp_path: Path, bad: Reply) -> None:
    inside, release = asyncio.Event(), asyncio.Event()

    @tool(effect="once")
    async def pay() -> str:
        """Pay."""
        inside.set()
        await release.wait()
        return "paid"

    class Late(ScriptedLLM):
        async def stream(self, request: LLMRequest, /):  # type: ignore[no-untyped-def]
            if asked(request).startswith("Stop"):
                await inside.wait()
                asyncio.get_running_loop().call_later(0.01, release.set)
            async for delta in super().stream(request):
                yield delta

    model = Late(by_task({"Pay": [call("pay"), "paid"], "Stop": [bad], "never": ["never"]}))
    plan = Plan([Task("p", "a", "Pay"), Task("s", "b", "Stop", on_failure="abort"), Task("n", "b", "never", ("p",))])
    result = await wire(store, model, tools=[pay]).run_plan(plan, run_id="r")
    assert isinstance(result, Failed)
    assert result.reason == "task"
    assert "'s'" in result.error
    kinds = [
        type(entry.record) for entry in result.trace if isinstance(entry.record, (ToolStarted, ToolFinished, RunFailed))
    ]
    assert kinds == [ToolStarted, ToolFinished, RunFailed]
    assert not any(asked(request).startswith("never") for request in model.requests)
    again = await wire(store, by_task({"Pay": ["no", "paid"], "Stop": ["fine"], "never": ["now"]}), tools=[pay]).resume(
        "r"
    )
    assert isinstance(again, Finished)
    assert sum(isinstance(entry.record, ToolStarted) for entry in again.trace) == 1


@pytest.mark.parametrize("end", ["abort", "budget"])
async def test_the_end_of_a_run_does_not_wait_for_a_pause_before_another_attempt(
    store: CheckpointStore, end: str
) -> None:
    inside, release = asyncio.Event(), asyncio.Event()

    @tool(effect="once")
    async def pay() -> str:
        """Pay."""
        inside.set()
        await release.wait()
        return "paid"

    def choose(request: LLMRequest) -> Reply:
        match asked(request)[:4]:
            case "Busy":
                return LLMError("overloaded", transient=True, retry_after_s=60)
            case "Pay.":
                return call("pay")
        asyncio.get_running_loop().call_later(0.01, release.set)
        return REFUSED if end == "abort" else saying("done", cost=2_000_000)

    model = Gated(choose, {"Stop": inside})
    tasks = (Task("b", "a", "Busy"), Task("p", "a", "Pay."), Task("s", "b", "Stop", on_failure="abort"))
    begun = asyncio.get_running_loop().time()
    result = await wire(store, model, tools=[pay]).run_plan(Plan(tasks))
    assert asyncio.get_running_loop().time() - begun < 5
    assert isinstance(result, Failed)
    assert result.reason == ("task" if end == "abort" else "budget")


# -- words on the run --------------------------------------------------------------------------------------------------


async def test_dispatch_simple_runs_one_agent(store: CheckpointStore) -> None:
    sites = {
        "classifier": says(as_json(complexity="simple", rationale="small")),
        "router": says(as_json(agent_id="b", rationale="best")),
    }
    seen = await events_of(wire(store, {"Add": ["4"]}, sites=sites).dispatch_stream("Add 2 and 2."))
    assert [event.type.value for event in seen] == ["STARTED", "DISPATCH", "ROUTE", "THOUGHT", "TASK_DONE"]
    assert dict(seen[1].payload) == {"complexity": "simple", "path": "routed", "rationale": "small"}
    assert dict(seen[2].payload) == {"agent_id": "b", "rationale": "best"}
    assert seen[4].agent_id == "b"
    assert seen[4].payload["answer"] == "4"
    assert "cost_usd" in seen[4].payload


async def test_dispatch_complex_plans_and_brings_together(store: CheckpointStore) -> None:
    plan = plan_of(
        {"id": "t1", "agent_id": "a", "instruction": "One"},
        {"id": "t2", "agent_id": "b", "instruction": "Two", "depends_on": ["t1"], "on_failure": "skip"},
    )
    sites = {"classifier": says("complex"), "planner": says(plan)}
    stream = wire(store, {"One": ["1"], "Two": ["2"]}, sites=sites).dispatch_stream("Count.", run_id="r")
    seen = await events_of(stream)
    kinds = [event.type.value for event in seen if event.type.value != "THOUGHT"]
    assert kinds == [
        "STARTED",
        "DISPATCH",
        "PLAN",
        "TASK_STARTED",
        "TASK_DONE",
        "TASK_STARTED",
        "TASK_DONE",
        "SYNTHESIS",
        "DONE",
    ]
    shown = next(event for event in seen if isinstance(event, Planned)).payload["plan"]
    assert [task["agent_id"] for task in shown["tasks"]] == ["a", "b"]  # type: ignore[index,call-overload]
    done = seen[-1].payload
    assert {
        "run_id",
        "goal",
        "answer",
        "confidence",
        "conflicts",
        "unknowns",
        "replan_count",
        "cost_usd",
        "elapsed_seconds",
        "budget",
        "task_results",
    } <= set(done)
    assert done["answer"] == "All of it."
    assert done["conflicts"] == ["a or b"]
    assert set(done["task_results"]) == {"t1", "t2"}  # type: ignore[arg-type]
    assert isinstance(stream.result, Finished)
    assert stream.result.unknowns == ("c",)


@pytest.mark.parametrize("reply", ["what?", as_json(complexity="hard"), as_json(), "[" * 5000])
async def test_an_unusable_classification_means_the_simple_way(store: CheckpointStore, reply: str) -> None:
    sites = {"classifier": says(reply), "router": says("a")}
    seen = await events_of(wire(store, {"Add": ["4"]}, sites=sites).dispatch_stream("Add."))
    [dispatched] = [event for event in seen if isinstance(event, Dispatched)]
    assert dispatched.path == "routed"


@pytest.mark.parametrize("reply", [as_json(agent_id="nobody", rationale="why"), "no idea", as_json(agent_id=5), ""])
async def test_an_unknown_agent_means_the_first_one_with_a_warning(store: CheckpointStore, reply: str) -> None:
    seen = await events_of(wire(store, {"Add": ["4"]}, sites={"router": says(reply)}).run_routed_stream("Add."))
    [routed] = [event for event in seen if isinstance(event, Routed)]
    assert routed.agent_id == "a"
    assert "no such agent" in str(routed.payload["warning"])
    assert seen[-1].payload["answer"] == "4"


async def test_with_one_agent_nobody_is_asked_who_works(store: CheckpointStore) -> None:
    model = ScriptedLLM(["4"])
    nobody = says()
    sites = {"classifier": nobody, "router": nobody}
    runtime = wire(store, model, agents=["a"], sites=sites)
    assert (await runtime.dispatch("Add.")).answer == "4"
    assert (await runtime.run_routed("Add.")).answer == "4"
    assert await runtime.route("Add.") == ("a", "there is one agent")
    assert calls_of(nobody) == 0


async def test_route_names_the_agent_and_runs_nothing(store: CheckpointStore) -> None:
    model = says()
    runtime = wire(store, model, sites={"router": says(as_json(agent_id="b", rationale="best"))})
    assert await runtime.route("Add.") == ("b", "best")
    assert calls_of(model) == 0
    assert [run async for run in runtime.runs()] == []
    with pytest.raises(LLMError, match="down"):
        await wire(store, {}, sites={"router": says(LLMError("down"))}).route("Add.")


@pytest.mark.parametrize("bad", [LLMError("down"), "no JSON at all", as_json(confidence=1)])
async def test_where_the_synthesis_fails_the_results_are_joined_and_marked(store: CheckpointStore, bad: Reply) -> None:
    plan = Plan([Task("x", "a", "Find x"), Task("y", "b", "Find y", on_failure="skip")])
    synthesiser = ScriptedLLM(lambda _: bad)
    runtime = wire(
        store, {"Find x": [saying("x is 1", confidence=0.7)], "Find y": [REFUSED]}, sites={"synthesiser": synthesiser}
    )
    seen = await events_of(runtime.run_plan_stream(plan))
    [synthesis] = [event for event in seen if isinstance(event, Synthesised)]
    assert synthesis.joined
    assert "x is 1" in synthesis.answer
    assert synthesis.confidence == pytest.approx(0.35)  # the least sure, and one of the two is lost
    assert any("y" in unknown for unknown in synthesis.unknowns)
    assert isinstance(seen[-1], Done)
    assert calls_of(synthesiser) <= 2


async def test_a_model_for_each_call_site(store: CheckpointStore) -> None:
    plan = plan_of({"id": "t", "agent_id": "a", "instruction": "Do"})
    sites = {"classifier": says("complex"), "planner": says(plan), "synthesiser": says(BROUGHT)}
    own = says("done by its own")
    runtime = wire(store, says(), agents=[AgentConfig("a", llm=own), "b"], sites=sites)
    result = await runtime.dispatch("Do.")
    assert result.task_results["t"].answer == "done by its own"
    assert [calls_of(model) for model in sites.values()] == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"plannr.*planner"):
        wire(store, {}, sites={"plannr": says()})


# -- budgets -----------------------------------------------------------------------------------------------------------

LADDER = Plan(
    [
        Task("t1", "a", "One"),
        Task("t2", "b", "Two", ("t1",)),
        Task("t3", "a", "Three"),
        Task("t4", "b", "Four", ("t2", "t3")),
    ]
)


def ladder_tools(tmp_path: Path) -> list[RecordingTool]:
    return [RecordingTool("put", tmp_path / "effects.log", effect="once")]


LADDER_SCRIPT: Script = {
    word: [saying("I put it.", call("put", what=word), cost=1000), saying(f"{word} done", cost=1000)]
    for word in ("One", "Two", "Three", "Four")
}


@pytest.mark.parametrize(
    ("limit", "most"),
    [("max_llm_calls", most) for most in range(9)]
    + [("max_tool_calls", most) for most in range(4)]
    + [("max_total_cost_usd", most / 1000) for most in (0, 1, 2.5, 4, 7)],
)
async def test_a_spent_budget_ends_a_run_and_a_higher_one_goes_on_where_it_was(
    store: CheckpointStore, tmp_path: Path, limit: str, most: float
) -> None:
    model, synthesiser = ScriptedLLM(by_task(LADDER_SCRIPT)), says(BROUGHT)

    def runtime(**limits: object) -> AgentRuntime:
        return wire(store, model, tools=ladder_tools(tmp_path), sites={"synthesiser": synthesiser}, **limits)

    result = await runtime(**{limit: most}).run_plan(LADDER, run_id="r")
    assert isinstance(result, Failed)
    assert result.reason == "budget"
    assert limit in result.error
    if limit == "max_llm_calls":
        assert calls_of(model, synthesiser) == most
    if limit == "max_tool_calls":
        assert len(ladder_tools(tmp_path)[0].effects()) == most
    again = await runtime().resume("r")
    assert isinstance(again, Finished), again.error
    assert again.answer == "All of it."
    assert calls_of(model, synthesiser) == 9, "nothing was paid again"
    effects = ladder_tools(tmp_path)[0].effects()
    assert len(effects) == len({key for _, key, _ in effects}) == 4


async def test_a_resume_with_a_limit_a_little_higher_each_time_reaches_the_end(
    store: CheckpointStore, tmp_path: Path
) -> None:
    model, synthesiser = ScriptedLLM(by_task(LADDER_SCRIPT)), says(BROUGHT)
    for most in range(1, 10):
        runtime = wire(
            store, model, tools=ladder_tools(tmp_path), sites={"synthesiser": synthesiser}, max_llm_calls=most
        )
        result = await runtime.run_plan(LADDER, run_id="r")
        assert calls_of(model, synthesiser) == most
    assert isinstance(result, Finished)


async def test_shares_sum_to_what_was_spent(store: CheckpointStore, tmp_path: Path) -> None:
    def priced(text: str) -> LLMResponse:
        return LLMResponse((Text(text),), "stop", Usage(input_tokens=3, output_tokens=2, cost_microusd=13))

    plan = plan_of(
        *({"id": task.id, "agent_id": task.agent_id, "instruction": task.instruction} for task in LADDER.tasks)
    )
    sites = {
        "classifier": says(priced("complex")),
        "planner": says(priced("?"), priced(plan)),
        "synthesiser": says(priced(BROUGHT)),
    }
    runtime = wire(store, LADDER_SCRIPT, tools=ladder_tools(tmp_path), sites=sites)
    result = await runtime.dispatch("Count.")
    budget: dict[str, dict[str, dict[str, float]]] = result.budget  # type: ignore[assignment]
    total = result.spent.usage.cost_usd
    assert total == pytest.approx(8 * 0.001 + 4 * 0.000013)
    assert sum(site["cost_usd"] for site in budget["by_site"].values()) == pytest.approx(total)
    words = sum(site["cost_usd"] for name, site in budget["by_site"].items() if name != "agent")
    assert sum(agent["cost_usd"] for agent in budget["by_agent"].values()) == pytest.approx(total - words)
    assert sum(task["cost_usd"] for task in budget["by_task"].values()) == pytest.approx(total - words)
    assert set(budget["by_site"]) == {"agent", "classifier", "planner", "synthesiser"}
    assert set(budget["by_task"]) == {"t1", "t2", "t3", "t4"}
    assert set(budget["by_agent"]) == {"a", "b"}


# -- keys --------------------------------------------------------------------------------------------------------------


async def stopped_at(stream: RunStream, kind: type[Event], *, times: int = 1) -> None:
    """Leave a stream when it has shown an event."""
    async with stream as events:
        async for event in events:
            times -= isinstance(event, kind)
            if times == 0:
                return


async def test_a_routed_run_is_resumed_by_its_agent(store: CheckpointStore) -> None:
    router = says(as_json(agent_id="b", rationale=""))
    model = ScriptedLLM(["4"], delay_s=0.01)
    runtime = wire(store, model, sites={"router": router})
    await stopped_at(runtime.run_routed_stream("Add.", run_id="r"), Routed)
    for key in ("r:a", "r:c", "r:t:b", "r:b:b", "q:b"):
        with pytest.raises(RunNotFound, match=key):
            await runtime.resume(key)
    assert (await runtime.resume("r:b")).answer == "4"
    assert (await runtime.resume("r:b")).answer == "4"
    assert calls_of(router) == 1


async def test_a_task_is_driven_alone_and_the_run_takes_its_result(store: CheckpointStore) -> None:
    model = ScriptedLLM(by_task({"One": ["1"], "Two": ["2"], "Three": ["3"]}), delay_s=0.01)
    plan = Plan([Task("one", "a", "One"), Task("two:2", "b", "Two"), Task("three", "b", "Three", ("one",))])
    runtime = wire(store, model)
    await stopped_at(runtime.run_plan_stream(plan, run_id="r"), TaskStarted, times=2)
    begun = calls_of(model)
    for key in ("r:one:b", "r:four:a", "r:a", "r:one:a:a", "r:two:b"):
        with pytest.raises(RunNotFound):
            await runtime.resume(key)
    with pytest.raises(ConfigError, match=r"'three'.*has not begun"):
        await runtime.resume("r:three:b")
    result = await runtime.resume("r:two%3A2:b")
    assert isinstance(result, Finished)
    assert (result.answer, result.agent_id) == ("2", "b")
    assert calls_of(model) == begun + 1
    assert (await runtime.resume("r:two%3A2:b")).answer == "2"
    seen = await events_of(runtime.resume_stream("r"))
    assert isinstance(seen[0], Resumed)
    assert isinstance(seen[1], Planned)
    assert seen[1].payload["resumed"] is True
    assert isinstance(seen[-1], Done)
    assert calls_of(model) == begun + 3
    assert {result.task_id: result.answer for result in seen[-1].task_results} == {
        "one": "1",
        "two:2": "2",
        "three": "3",
    }
    assert (await runtime.resume("r:one:a")).answer == "1"


async def test_a_task_of_a_run_that_is_to_be_aborted_ends_the_run(store: CheckpointStore) -> None:
    """One task was the run's end and another is stopped within a tool: driving that one alone must not hang."""
    inside = asyncio.Event()

    @tool(effect="read")
    async def wait() -> str:
        """Wait."""
        inside.set()
        await asyncio.sleep(5)
        return "waited"

    class Late(ScriptedLLM):
        async def stream(self, request: LLMRequest, /):  # type: ignore[no-untyped-def]
            if asked(request).startswith("Stop"):
                await inside.wait()
            async for delta in super().stream(request):
                yield delta

    plan = Plan([Task("w", "a", "Wait"), Task("s", "b", "Stop", on_failure="abort")])
    runtime = wire(store, Late(by_task({"Wait": [call("wait"), "waited"], "Stop": [REFUSED]})), tools=[wait])
    await stopped_at(runtime.run_plan_stream(plan, run_id="r"), TaskDone)
    result = await runtime.resume("r:w:a")
    assert isinstance(result, Failed)
    assert result.reason == "task"
    assert "'s'" in result.error


async def test_a_task_that_waits_for_another_chance_is_named_by_its_key(store: CheckpointStore) -> None:
    model = ScriptedLLM(by_task({"One": ["1"], "Two": [REFUSED], "Three": ["3"]}), delay_s=0.005)
    plan = Plan(
        [
            Task("one", "a", "One", ("two",)),
            Task("two", "b", "Two", on_failure="abort"),
            Task("three", "b", "Three", on_failure="skip"),
        ]
    )
    runtime = wire(store, model, max_parallel_tasks=1)
    assert isinstance(await runtime.run_plan(plan, run_id="r"), Failed)
    busy = ScriptedLLM(by_task({"One": ["1"], "Two": ["2"], "Three": ["3"]}), delay_s=0.02)
    again = wire(store, busy, max_parallel_tasks=1, max_llm_calls=1)
    assert isinstance(await again.resume("r"), Failed)
    with pytest.raises((ConfigError, RunNotFound)):
        await again.resume("r:two:b")
    assert isinstance(await wire(store, busy).resume("r"), Finished)


# -- resuming in the middle of a word on the run -----------------------------------------------------------------------


@pytest.mark.parametrize("site", ["classifier", "router", "planner", "synthesiser"])
async def test_a_run_stopped_within_a_word_on_it_asks_for_that_one_again(store: CheckpointStore, site: str) -> None:
    asking = asyncio.Event()

    class Hangs(ScriptedLLM):
        async def stream(self, request: LLMRequest, /):  # type: ignore[no-untyped-def]
            asking.set()
            await asyncio.sleep(5)
            async for delta in super().stream(request):
                yield delta

    plan = plan_of({"id": "t", "agent_id": "a", "instruction": "Do"})
    way = "simple" if site == "router" else "complex"
    words = {"classifier": way, "router": "b", "planner": plan, "synthesiser": BROUGHT}
    model = ScriptedLLM(by_task({"Do": ["done"]}))
    first = {name: Hangs([word]) if name == site else says(word) for name, word in words.items()}
    task = asyncio.create_task(wire(store, model, sites=first).dispatch("Do.", run_id="r"))
    await asyncio.wait_for(asking.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    second = {name: says(word) for name, word in words.items()}
    result = await wire(store, model, sites=second).resume("r")
    assert result.answer == ("done" if site == "router" else "All of it.")
    needed = ["classifier", "router"] if site == "router" else ["classifier", "planner", "synthesiser"]
    assert calls_of(model) == 1
    for name in needed:
        assert calls_of(second[name]) == (needed.index(name) >= needed.index(site))


async def test_starting_an_id_that_exists_attaches_to_it(store: CheckpointStore) -> None:
    plan = plan_of({"id": "t", "agent_id": "a", "instruction": "Do"})
    sites = {"classifier": says("complex"), "planner": says(plan)}
    model = ScriptedLLM(by_task({"Do": ["done"]}), delay_s=0.005)
    runtime = wire(store, model, sites=sites)
    both = await asyncio.gather(*(runtime.dispatch("Do.", run_id="r") for _ in range(3)))
    assert {result.answer for result in both} == {"All of it."}
    assert (await runtime.dispatch("Do.", run_id="r")).answer == "All of it."
    assert calls_of(model) == 1
    for other in (
        runtime.dispatch("Else.", run_id="r"),
        runtime.run("Do.", run_id="r"),
        runtime.run_agent("a", "Do.", run_id="r"),
    ):
        with pytest.raises(RunIdTaken):
            await other
    hand = Plan([Task("t", "a", "Do")])
    await runtime.run_plan(hand, goal="Do.", run_id="p")
    with pytest.raises(RunIdTaken):
        await runtime.run_plan(Plan([Task("t", "b", "Do")]), goal="Do.", run_id="p")


async def test_recover_goes_on_with_every_kind_of_run(store: CheckpointStore, tmp_path: Path) -> None:
    plan = plan_of({"id": "t", "agent_id": "a", "instruction": "Do"})
    words = {"classifier": as_json(complexity="complex"), "router": as_json(agent_id="b"), "planner": plan}
    asking = asyncio.Event()

    class Hangs(ScriptedLLM):
        async def stream(self, request: LLMRequest, /):  # type: ignore[no-untyped-def]
            asking.set()
            await asyncio.sleep(5)
            async for delta in super().stream(request):
                yield delta

    runtime = wire(store, {"Do": ["done"]}, sites={name: Hangs([word]) for name, word in words.items()})
    for run_id, start in (("d", runtime.dispatch), ("r", runtime.run_routed), ("p", runtime.run)):
        task = asyncio.create_task(start("Do.", run_id=run_id))
        await asyncio.wait_for(asking.wait(), 5)
        asking.clear()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    quick = {name: says(word) for name, word in words.items()}
    results = await wire(
        store, {"Do": ["done"]}, sites=quick | {"synthesiser": ScriptedLLM(lambda _: BROUGHT)}
    ).recover()
    assert {result.run_id: result.answer for result in results} == {"d": "All of it.", "r": "done", "p": "All of it."}


# -- forks -------------------------------------------------------------------------------------------------------------


async def test_a_fork_of_an_orchestration_at_every_step_reaches_the_answer(
    store: CheckpointStore, tmp_path: Path
) -> None:
    plan = plan_of(
        *(
            {"id": t.id, "agent_id": t.agent_id, "instruction": t.instruction, "depends_on": t.depends_on}
            for t in LADDER.tasks
        )
    )
    sites = {
        "classifier": ScriptedLLM(lambda _: "complex"),
        "planner": ScriptedLLM(lambda _: plan),
        "synthesiser": ScriptedLLM(lambda _: BROUGHT),
    }
    model = ScriptedLLM(by_task(LADDER_SCRIPT))
    runtime = wire(store, model, tools=ladder_tools(tmp_path), sites=sites)
    await runtime.dispatch("Count.", run_id="r")
    models = [model, *sites.values()]
    assert calls_of(*models) == 11
    for at in range(1, 12):
        before = calls_of(*models)
        fork = await runtime.fork("r", at=at)
        result = await runtime.resume(fork)
        assert isinstance(result, Finished), result.error
        assert result.answer == "All of it."
        assert calls_of(*models) - before >= 12 - at
        assert calls_of(*models) - before <= 12 - at + 2, "what was answered before the step is not asked again"
    last = await runtime.fork("r")
    before = calls_of(*models)
    assert (await runtime.resume(last)).answer == "All of it."
    assert calls_of(*models) == before + 1
    with pytest.raises(ConfigError, match="steps 1 to 11"):
        await runtime.fork("r", at=13)


# -- delegation --------------------------------------------------------------------------------------------------------


def delegating(store: CheckpointStore, script: Script, **limits: object) -> tuple[AgentRuntime, ScriptedLLM]:
    agents = [
        AgentConfig("lead", allowed_tools=("delegate_to_writer", "delegate_to_lead")),
        AgentConfig("writer", "writes", allowed_tools=("delegate_to_lead",)),
    ]
    model = ScriptedLLM(by_task(script))
    tools = [delegate("writer"), delegate("lead")]
    return wire(store, model, agents=agents, tools=tools, **limits), model


async def test_delegated_work_has_a_scope_of_its_own(store: CheckpointStore) -> None:
    script = {
        "Publish": [call("delegate_to_writer", task="Write it."), "published"],
        "Write": [saying("written", cost=5)],
    }
    runtime, model = delegating(store, script)
    stream = runtime.run_agent_stream("lead", "Publish it.")
    seen = await events_of(stream)
    [begun] = [event for event in seen if isinstance(event, TaskStarted)]
    [inner, outer] = [event for event in seen if isinstance(event, TaskDone)]
    assert (begun.agent_id, begun.scope, begun.parent) == ("writer", "delegate/1.0/writer", "")
    assert inner.scope == begun.scope
    assert outer.scope == ""
    assert outer.answer == "published"
    [shown] = [event for event in seen if isinstance(event, Observation)]
    assert shown.observation == "written"
    [writing] = [request for request in model.requests if asked(request).startswith("Write")]
    assert "Publish" not in str([message.text for message in writing.messages])
    assert stream.result is not None
    by_agent: dict[str, dict[str, float]] = stream.result.budget["by_agent"]  # type: ignore[assignment]
    assert by_agent["writer"]["cost_usd"] == pytest.approx(0.000005)


async def test_events_of_deeper_work_name_the_scope_that_gave_it(store: CheckpointStore) -> None:
    script = {
        "Publish": [call("delegate_to_writer", task="Write it."), "published"],
        "Write": [call("delegate_to_lead", task="Look."), "written"],
        "Look": ["looked"],
    }
    plan = Plan([Task("t", "lead", "Publish it.")])
    runtime, _ = delegating(store, script)
    seen = await events_of(runtime.run_plan_stream(plan))
    scopes = {event.scope: event.parent for event in seen if isinstance(event, TaskStarted)}
    assert scopes == {
        "t/1/lead": None,
        "t/1/lead/delegate/1.0/writer": "t/1/lead",
        "t/1/lead/delegate/1.0/writer/delegate/1.0/lead": "t/1/lead/delegate/1.0/writer",
    }
    done = next(event for event in seen if isinstance(event, Done))
    by_task: dict[str, dict[str, float]] = done.budget["by_task"]  # type: ignore[assignment]
    total: int = done.budget["tokens"]  # type: ignore[assignment]
    synthesis: dict[str, dict[str, int]] = done.budget["by_site"]  # type: ignore[assignment]
    assert by_task["t"]["tokens"] == total - synthesis["synthesiser"]["tokens"]


@pytest.mark.parametrize("depth", [0, 1, 3])
async def test_work_is_delegated_so_many_times_over_at_most(store: CheckpointStore, depth: int) -> None:
    def choose(request: LLMRequest) -> Reply:
        name = next(spec.name for spec in request.tools)
        return call(name, task="Do it.") if steps(request) == 0 else "done"

    agents = [AgentConfig("x", allowed_tools=("to_y",)), AgentConfig("y", allowed_tools=("to_x",))]
    tools = [delegate("x", name="to_x"), delegate("y", name="to_y")]
    runtime = wire(store, choose, agents=agents, tools=tools, max_delegate_depth=depth)
    result = await runtime.run_agent("x", "Do it.")
    assert result.answer == "done"
    assert len(started(result)) == depth
    assert "max_delegate_depth" in str(result.trace)


def test_a_delegate_to_an_unknown_agent_is_found_when_the_runtime_is_made() -> None:
    with pytest.raises(ConfigError, match=r"unknown agent 'writr'.*'writer'"):
        AgentRuntime(
            llm=says(), agents=[AgentConfig("lead"), AgentConfig("writer")], tools=[delegate("writr")],
            checkpoint_store=MemoryCheckpointStore(),
        )  # fmt: skip


async def test_a_delegate_that_fails_is_an_error_the_model_sees(store: CheckpointStore) -> None:
    script = {"Publish": [call("delegate_to_writer", task="Write it."), "published anyway"], "Write": [REFUSED]}
    runtime, model = delegating(store, script)
    seen = await events_of(runtime.run_agent_stream("lead", "Publish it."))
    [shown] = [event for event in seen if isinstance(event, Observation)]
    assert shown.status == "error"
    assert "not done" in shown.observation
    [result] = [part for part in model.requests[-1].messages[-1].parts if isinstance(part, ToolResult)]
    assert result.is_error
    assert seen[-1].payload["answer"] == "published anyway"


async def test_delegates_work_at_the_same_time(store: CheckpointStore) -> None:
    meet = asyncio.Barrier(3)

    class Meets(ScriptedLLM):
        async def stream(self, request: LLMRequest, /):  # type: ignore[no-untyped-def]
            if asked(request).startswith("Write"):
                await asyncio.wait_for(meet.wait(), 5)
            async for delta in super().stream(request):
                yield delta

    calls = [call("delegate_to_writer", task=f"Write {n}.") for n in range(3)]
    model = Meets(by_task({"Publish": [calls, "published"], **{f"Write {n}": [f"text {n}"] for n in range(3)}}))
    agents = [AgentConfig("lead"), AgentConfig("writer", allowed_tools=())]
    result = await wire(store, model, agents=agents, tools=[delegate("writer")]).run_agent("lead", "Publish.")
    assert result.answer == "published"
    last = [part.text for part in model.requests[-1].messages[-1].parts if isinstance(part, ToolResult)]
    assert last == ["text 0", "text 1", "text 2"]


async def test_delegated_work_counts_against_the_one_budget(store: CheckpointStore) -> None:
    calls = [call("delegate_to_writer", task=f"Write {n}.") for n in range(6)]
    model = ScriptedLLM(by_task({"Publish": [calls, "published"], "Write": ["text"]}), delay_s=0.002)
    agents = [AgentConfig("lead"), AgentConfig("writer", allowed_tools=())]
    result = await wire(store, model, agents=agents, tools=[delegate("writer")], max_llm_calls=4).run_agent(
        "lead", "Publish.", run_id="r"
    )
    assert isinstance(result, Failed)
    assert result.reason == "budget"
    assert calls_of(model) == 4
    again = await wire(store, model, agents=agents, tools=[delegate("writer")]).resume("r")
    assert again.answer == "published"
    assert calls_of(model) == 8


# -- chats -------------------------------------------------------------------------------------------------------------


async def test_a_chain_of_runs_is_one_conversation(store: CheckpointStore) -> None:
    class Chat(ScriptedLLM):
        def __init__(self) -> None:
            super().__init__(lambda request: f"answer to: {request.messages[-1].text[:40]}")

    model = Chat()
    agent = AgentConfig("a", working_memory_max_tokens=120)
    runtime = wire(
        store,
        model,
        agents=[agent, "b"],
        sites={
            "router": ScriptedLLM(lambda _: "a"),
            "planner": ScriptedLLM(lambda _: plan_of({"id": "t", "agent_id": "b", "instruction": "Do"})),
        },
    )
    previous: str | None = None
    compacted = 0
    for turn in range(12):
        goal = f"question {turn} " + "and so on " * 6
        if turn == 5:
            result = await runtime.run(goal, continue_from=previous)
        elif turn % 3 == 1:
            result = await runtime.run_routed(goal, continue_from=previous)
        else:
            result = await runtime.run_agent("a", goal, continue_from=previous)
        assert isinstance(result, Finished), result.error
        compacted += result.summarizations
        previous = result.run_id
    assert compacted > 0
    for request in model.requests:
        roles = [message.role for message in request.messages]
        assert roles[0] == "user"
        assert all(one != two for one, two in itertools.pairwise(roles)), roles
    with pytest.raises(RunNotFound):
        await runtime.run_agent("a", "x", continue_from="nothing")


# -- replans while others are at work ----------------------------------------------------------------------------------


class Gated(ScriptedLLM):
    """A model that answers some requests only when a gate is opened.

    Args:
        script: what it answers.
        gates: the gates, by the words the first message begins with.
    """

    def __init__(self, script: Script | Callable[[LLMRequest], Reply], gates: Mapping[str, asyncio.Event]) -> None:
        super().__init__(script if callable(script) else by_task(script))
        self._gates = gates
        self.asking = {words: asyncio.Event() for words in gates}

    async def stream(self, request: LLMRequest, /):  # type: ignore[no-untyped-def]
        for words, gate in self._gates.items():
            if asked(request).startswith(words):
                self.asking[words].set()
                await asyncio.wait_for(gate.wait(), 5)
        async for delta in super().stream(request):
            yield delta


@pytest.mark.parametrize("new", ["new", "lost"], ids=["under-another-id", "under-the-same-id"])
@pytest.mark.parametrize("on_failure", ["retry", "skip"])
async def test_a_task_that_did_without_another_is_tried_again_when_that_one_is_gone(
    store: CheckpointStore, on_failure: str, new: str
) -> None:
    """``lost`` is dropped by a replan while ``again``, which does without it, is at work; then ``again`` fails."""
    gate = asyncio.Event()

    def anew(_request: LLMRequest) -> Reply:
        asyncio.get_running_loop().call_later(0.005, gate.set)
        return plan_of({"id": new, "agent_id": "b", "instruction": "Anew", "depends_on": ["again"]})

    def work(request: LLMRequest) -> Reply:
        if asked(request).startswith("Again"):
            return "done at last" if "An earlier attempt" in asked(request) else REFUSED
        return "new" if asked(request).startswith("Anew") else REFUSED

    plan = Plan(
        [
            Task("lost", "a", "Lose", on_failure="skip"),
            Task("again", "a", "Again", ("lost",), on_failure=on_failure),  # type: ignore[arg-type]
            Task("trigger", "b", "Trigger", ("lost",)),
        ]
    )
    runtime = wire(store, Gated(work, {"Again": gate}), sites={"planner": ScriptedLLM(anew)})
    stream = runtime.run_plan_stream(plan)
    seen = await events_of(stream)
    assert [event.kept for event in seen if isinstance(event, Replanned)] == [("again",)]
    assert isinstance(stream.result, Finished), stream.result
    found = {id_: task.status for id_, task in stream.result.task_results.items()}
    assert found == {"again": "done" if on_failure == "retry" else "failed", new: "done"}


async def test_a_failed_run_goes_on_where_a_task_did_without_one_that_is_gone(store: CheckpointStore) -> None:
    gate = asyncio.Event()

    def anew(_request: LLMRequest) -> Reply:
        asyncio.get_running_loop().call_later(0.005, gate.set)
        return plan_of({"id": "lost", "agent_id": "b", "instruction": "Anew", "depends_on": ["again"]})

    plan = Plan(
        [
            Task("lost", "a", "Lose", on_failure="skip"),
            Task("again", "a", "Again", ("lost",), on_failure="abort"),
            Task("trigger", "b", "Trigger", ("lost",)),
        ]
    )
    model = Gated({"Again": [REFUSED], "Lose": [REFUSED], "Trigger": [REFUSED]}, {"Again": gate})
    assert isinstance(await wire(store, model, sites={"planner": ScriptedLLM(anew)}).run_plan(plan, run_id="r"), Failed)
    result = await wire(store, {"Again": ["done"], "Anew": ["new"]}).resume("r")
    assert isinstance(result, Finished)
    assert {id_: task.answer for id_, task in result.task_results.items()} == {"again": "done", "lost": "new"}


async def test_a_task_that_fails_while_the_planner_writes_is_not_dropped_unseen(store: CheckpointStore) -> None:
    """The planner was told that it is at work and stays; so it stays, and the planner is asked what to do about it."""
    writing = asyncio.Event()

    def anew(request: LLMRequest) -> Reply:
        failed = ["first", "other"] if "'other'" in asked(request) else ["first"]
        return plan_of(*({"id": task_id, "agent_id": "b", "instruction": "Better"} for task_id in failed))

    class Writes(Gated):
        async def stream(self, request: LLMRequest, /):  # type: ignore[no-untyped-def]
            writing.set()
            async for delta in super().stream(request):
                yield delta

    ended = asyncio.Event()
    planner = Writes(anew, {"Goal": ended})
    model = Gated({"First": [REFUSED], "Other": [REFUSED], "Better": ["better"]}, {"Other": writing})
    plan = Plan([Task("first", "a", "First"), Task("other", "a", "Other")])
    runtime = wire(store, model, sites={"planner": planner})
    async with runtime.run_plan_stream(plan) as events:
        async for event in events:
            if isinstance(event, TaskDone) and event.task_id == "other":
                ended.set()
    assert isinstance(events.result, Finished)
    assert {id_: task.answer for id_, task in events.result.task_results.items()} == {
        "first": "better",
        "other": "better",
    }


async def test_a_planner_is_told_what_was_known_when_it_was_asked(tmp_path: Path) -> None:
    """A task fails while the start of the planner's call is being written down."""
    writing = asyncio.Event()

    class Slow(CrashingStore):
        async def append(self, run_id: str, expected_seq: int, records: Sequence[Record], /, *, owner: Owner) -> float:
            at = await super().append(run_id, expected_seq, records, owner=owner)
            if any(isinstance(record, LLMStarted) and record.purpose == "plan" for record in records):
                writing.set()
                await asyncio.sleep(0.01)
            return at

    def anew(request: LLMRequest) -> Reply:
        failed = ["first", "other"] if "because of 'other'" in asked(request) else ["first"]
        return plan_of(*({"id": task_id, "agent_id": "b", "instruction": "Better"} for task_id in failed))

    planner = ScriptedLLM(anew)
    model = Gated({"First": [REFUSED], "Other": [REFUSED], "Better": ["better"]}, {"Other": writing})
    plan = Plan((Task("first", "a", "First"), Task("other", "a", "Other")))
    result = await wire(Slow(MemoryCheckpointStore()), model, sites={"planner": planner}).run_plan(plan)
    assert isinstance(result, Finished)
    assert "other (a), running" in asked(planner.requests[0])
    assert "other (a), replan" in asked(planner.requests[1])
    assert {id_: task.answer for id_, task in result.task_results.items()} == {"first": "better", "other": "better"}


@pytest.mark.parametrize("later", range(5))
async def test_a_plan_that_comes_when_the_budget_is_spent_is_not_paid_again(store: CheckpointStore, later: int) -> None:
    together = asyncio.Event()

    @tool(effect="read")
    async def wait() -> str:
        """Wait for the planner's reply."""
        await asyncio.wait_for(together.wait(), 5)
        return "waited"

    def anew(_request: LLMRequest) -> Reply:
        return plan_of({"id": "t", "agent_id": "b", "instruction": "Anew"})

    class Meets(ScriptedLLM):
        async def stream(self, request: LLMRequest, /):  # type: ignore[no-untyped-def]
            asyncio.get_running_loop().call_later(0.005, together.set)
            await together.wait()
            for _ in range(later):
                await asyncio.sleep(0)
            async for delta in super().stream(request):
                yield delta

    planner = Meets(anew)
    model = ScriptedLLM(by_task({"Wait": [call("wait"), "waited"], "Fail": [REFUSED], "Anew": ["new"]}))
    plan = Plan([Task("w", "a", "Wait"), Task("t", "b", "Fail")])
    result = await wire(store, model, tools=[wait], sites={"planner": planner}, max_llm_calls=3).run_plan(
        plan, run_id="r"
    )
    assert isinstance(result, Failed)
    assert result.reason == "budget"
    again = await wire(store, model, tools=[wait], sites={"planner": planner}).resume("r")
    assert isinstance(again, Finished)
    assert calls_of(planner) == 1, "its reply was recorded"


async def test_a_large_plan_may_be_replanned_up_to_the_most_tasks_there_may_be(store: CheckpointStore) -> None:
    def tasks(prefix: str) -> str:
        return plan_of(*({"id": f"{prefix}{n}", "agent_id": "a", "instruction": f"Do {prefix}{n}"} for n in range(300)))

    replies = iter([tasks("x"), tasks("y"), tasks("y"), tasks("y"), tasks("y")])
    model = ScriptedLLM(lambda request: REFUSED if asked(request).startswith("Do x299") else "done")
    runtime = wire(store, model, sites={"planner": ScriptedLLM(lambda _: next(replies))}, max_plan_tasks=400)
    seen = await events_of(runtime.run_stream("Much."))
    assert isinstance(seen[-1], Done)


# -- stopped again and again -------------------------------------------------------------------------------------------


def any_work(seed: int) -> tuple[Callable[[LLMRequest], Reply], Callable[[LLMRequest], Reply]]:
    """Make the agents' model and the planner's of a seed: tasks fail, doubt and delegate."""

    def chance(request: LLMRequest) -> random.Random:
        return random.Random(f"{seed} {asked(request)}")

    def work(request: LLMRequest) -> Reply:
        luck = chance(request)
        fate, helps = luck.random(), luck.random()
        if steps(request) == 0:
            return [call("once", what=fate), call("again", what=fate)]
        if steps(request) == 1 and helps < 0.3 and any(spec.delegate_to for spec in request.tools):
            return call("delegate_to_b", task=f"Help with {fate}")
        if fate < 0.2:
            return REFUSED
        return saying(f"found {fate}", confidence=0.2 if fate < 0.3 else 0.9)

    def plan(request: LLMRequest) -> Reply:
        luck = random.Random(f"{seed} {len(asked(request))}")
        ids = [f"t{n}" for n in range(luck.randint(2, 6))]
        tasks = [
            {
                "id": task_id,
                "agent_id": luck.choice("ab"),
                "instruction": f"Do {luck.random()}",
                "depends_on": [need for need in ids[:place] if luck.random() < 0.3],
                "on_failure": luck.choice(["retry", "skip", "replan", "replan"]),
            }
            for place, task_id in enumerate(ids)
        ]
        return plan_of(*tasks)

    return work, plan


@pytest.mark.parametrize("seed", range(12))
async def test_a_run_that_is_stopped_again_and_again_reaches_its_end(
    store: CheckpointStore, tmp_path: Path, seed: int
) -> None:
    work, plan = any_work(seed)
    luck = random.Random(seed)
    log = tmp_path / "effects.log"
    tools = [
        RecordingTool("once", log, effect="once", delay_s=0.001),
        RecordingTool("again", log, effect="idempotent", delay_s=0.001),
        delegate("b"),
    ]
    agents = [AgentConfig("a", max_parallel_tasks=2), AgentConfig("b", allowed_tools=("once", "again"))]
    alive = asyncio.all_tasks()
    result: RunResult | None = None
    for life in range(30):
        sites = {"planner": ScriptedLLM(plan, delay_s=0.001), "synthesiser": ScriptedLLM([BROUGHT], delay_s=0.001)}
        runtime = wire(store, ScriptedLLM(work, delay_s=0.001), agents=agents, tools=tools, sites=sites)
        run = asyncio.create_task(runtime.run("Do it.", run_id="r"))
        done, _ = await asyncio.wait({run}, timeout=20 if life == 29 else luck.uniform(0, 0.03))
        if done:
            result = run.result()
            break
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        assert asyncio.all_tasks() == alive
    assert isinstance(result, Finished), result
    keys = [key for _, key, _ in tools[0].effects()]  # type: ignore[union-attr]
    assert len(keys) == len({*keys}), "no once tool ran twice"
    answered = [
        (entry.record.scope, entry.record.step, entry.record.purpose)
        for entry in result.trace
        if isinstance(entry.record, LLMFinished)
    ]
    assert len(answered) == len({*answered}), "no recorded call was paid again"


async def test_an_outage_in_the_middle_of_a_plan_is_no_end(store: CheckpointStore) -> None:
    down = True

    def reply(request: LLMRequest) -> Reply:
        if down and not request.messages[0].text.startswith("Find x"):
            return LLMError("cannot reach the model")
        if request.response_schema is not None:
            return '{"answer": "both", "confidence": 0.9, "conflicts": [], "unknowns": []}'
        return "found"

    runtime = AgentRuntime(llm=ScriptedLLM(reply), agents=[AgentConfig("a")], checkpoint_store=store)
    plan = Plan([Task("x", "a", "Find x."), Task("y", "a", "Find y.")])
    failed = await runtime.run_plan(plan, goal="Find both.", run_id="outage")
    assert isinstance(failed, Failed)
    assert failed.reason == "llm"
    down = False
    finished = await runtime.resume("outage")
    assert isinstance(finished, Finished)
    assert {task_id: task.status for task_id, task in finished.task_results.items()} == {"x": "done", "y": "done"}
