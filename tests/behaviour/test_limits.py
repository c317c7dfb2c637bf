"""Limits of one agent and of one task: what counts towards them, what ends at them, and what a higher one goes on with.

What was sent is counted at the model.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from harness import (
    AgentConfig,
    AgentRuntime,
    CheckpointStore,
    ConfigError,
    Failed,
    Finished,
    GuardrailConfig,
    Limits,
    LLMError,
    LLMSettings,
    MemoryCheckpointStore,
    Parked,
    Plan,
    PlanError,
    RunResult,
    SQLiteCheckpointStore,
    Task,
    Usage,
    delegate,
    tool,
)
from harness.approval import Approve
from harness.checkpoint.base import this_process
from harness.cli.config import parse
from harness.cli.planfile import parse as parse_plan
from harness.events import Done
from harness.keys import place_of
from harness.llm.base import LLMRequest, LLMResponse
from harness.messages import Text, ToolCall
from harness.records import ConfigDiffers, LLMStarted, ScopeClosed, ToolStarted
from harness.testing import Reply, ScriptedLLM, call


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[CheckpointStore]:
    store = MemoryCheckpointStore() if request.param == "memory" else SQLiteCheckpointStore(tmp_path / "runs.db")
    yield store
    await store.close()


@tool(effect="read")
def look(n: int = 0) -> str:
    """Look."""
    return f"seen {n}"


def saying(text: str, *calls: ToolCall, usage: Usage | None = None) -> LLMResponse:
    usage = usage or Usage(10, 5, cost_microusd=100)
    return LLMResponse((Text(text), *calls), "tool_calls" if calls else "stop", usage)


def ladder(request: LLMRequest) -> Reply:
    """Look three times, then answer."""
    steps = sum(message.role == "assistant" for message in request.messages)
    return saying(f"step {steps + 1}", call("look", n=steps)) if steps < 3 else saying("done")


def wire(
    store: CheckpointStore, llm: object, *agents: AgentConfig, tools: object = (look,), **limits: object
) -> AgentRuntime:
    return AgentRuntime(
        llm=llm,
        llm_by_site={"synthesiser": ScriptedLLM(lambda _: '{"answer": "All of it.", "confidence": 0.9}')},
        agents=agents,
        tools=tools,  # type: ignore[arg-type]
        checkpoint_store=store,
        guardrail_config=GuardrailConfig(**limits),  # type: ignore[arg-type]
        auto_resume=False,
    )


def closed(result: RunResult) -> dict[str, ScopeClosed]:
    return {e.record.child: e.record for e in result.trace if isinstance(e.record, ScopeClosed)}


# -- an agent's ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "most", "word"),
    [
        (Limits(max_llm_calls=2), 2, "max_llm_calls=2 is reached"),
        (Limits(max_llm_calls=0), 0, "max_llm_calls=0 is reached"),
        (Limits(max_tool_calls=2), 3, "max_tool_calls=2 is reached"),
        (Limits(max_input_tokens=60), 1, "max_input_tokens=60 leaves no room"),
        (Limits(max_output_tokens=11), 1, "max_output_tokens=11 leaves no room"),
        (Limits(max_total_cost_usd=0.0003), 3, "max_total_cost_usd=0.0003 is spent"),
    ],
)
async def test_an_agent_at_its_limit_ends_its_run_and_a_higher_one_goes_on(
    store: CheckpointStore, limits: Limits, most: int, word: str
) -> None:
    llm = ScriptedLLM(ladder)
    result = await wire(store, llm, AgentConfig("a", limits=limits), tools=[look]).run_agent("a", "Go.", run_id="r")
    assert isinstance(result, Failed)
    assert result.reason == "budget"
    assert result.error.startswith(f"the limit of agent 'a': {word}")
    assert result.error.endswith("raise the limit and resume to go on")
    assert result.answer == (f"step {most}" if most else "")
    assert len(llm.requests) == most
    still = await wire(store, llm, AgentConfig("a", limits=limits), tools=[look]).resume("r")
    assert isinstance(still, Failed), "what was spent stays spent"
    assert len(llm.requests) == most
    higher = wire(store, llm, AgentConfig("a", limits=Limits(max_llm_calls=4)), tools=[look])
    again = await higher.resume("r", strict=True)
    assert isinstance(again, Finished), again.error
    assert len(llm.requests) == 4
    assert again.spent.llm_calls == 4


async def test_a_limit_that_comes_with_a_resume_counts_what_was_used_before(store: CheckpointStore) -> None:
    llm = ScriptedLLM(ladder)
    agent = AgentConfig("a", max_steps=2)
    failed = await wire(store, llm, agent).run_agent("a", "Go.", run_id="r")
    assert isinstance(failed, Failed)
    assert failed.reason == "max_steps"
    limited = AgentConfig("a", max_steps=2, limits=Limits(max_llm_calls=3))
    again = await wire(store, llm, limited).resume("r")
    assert isinstance(again, Failed)
    assert (again.reason, len(llm.requests)) == ("budget", 3)


def twenty(agent_id: str = "a") -> Plan:
    return Plan([*(Task(f"t{n}", agent_id, "Do it.", on_failure="skip") for n in range(20)), Task("other", "b", "Do.")])


async def test_parallel_tasks_of_an_agent_share_its_limit_and_the_run_goes_on(store: CheckpointStore) -> None:
    usage = Usage(100, 1_000, cost_microusd=100_000)
    asked = LLMSettings(max_output_tokens=1_000)
    llm = ScriptedLLM(lambda _: "done", usage=usage, price=lambda _in, out: out * 100, delay_s=0.005)
    limits = Limits(max_total_cost_usd=0.205)
    a = AgentConfig("a", "", "I am a.", llm_settings=asked, max_parallel_tasks=30, limits=limits)
    b = AgentConfig("b", "", "I am b.", llm_settings=asked)
    runtime = wire(store, llm, a, b, tools=(), max_total_cost_usd=100, max_parallel_tasks=30)
    result = await runtime.run_plan(twenty())
    assert isinstance(result, Finished), result.error
    assert sum(request.system == "I am a." for request in llm.requests) == 2
    statuses = [task.status for task in result.task_results.values()]
    assert (statuses.count("done"), statuses.count("failed")) == (3, 18)
    assert result.task_results["other"].status == "done"
    failed = [record for record in closed(result).values() if not record.success]
    assert {record.reason for record in failed} == {"budget"}
    assert all(record.error.startswith("the limit of agent 'a': max_total_cost_usd=0.205") for record in failed)


async def test_calls_that_use_less_than_they_hold_leave_room_for_others_of_the_agent(store: CheckpointStore) -> None:
    usage = Usage(100, 10, cost_microusd=1_000)
    llm = ScriptedLLM(lambda _: "done", usage=usage, price=lambda _in, out: out * 100, delay_s=0.001)
    asked, limits = LLMSettings(max_output_tokens=1_000), Limits(max_total_cost_usd=0.205)
    a = AgentConfig("a", llm_settings=asked, max_parallel_tasks=30, limits=limits)
    runtime = wire(store, llm, a, AgentConfig("b"), max_total_cost_usd=100, max_parallel_tasks=30)
    result = await runtime.run_plan(twenty())
    assert isinstance(result, Finished)
    assert {task.status for task in result.task_results.values()} == {"done"}
    assert all(request.settings.max_output_tokens == 1_000 for request in llm.requests[:2])


async def test_the_output_limit_of_a_call_is_lowered_to_what_its_agent_has_left(store: CheckpointStore) -> None:
    llm = ScriptedLLM(["done"], price=lambda _in, out: out * 100)
    agent = AgentConfig("a", limits=Limits(max_total_cost_usd=0.05, max_output_tokens=400))
    assert isinstance(await wire(store, llm, agent).run_agent("a", "Go."), Finished)
    assert llm.requests[0].settings.max_output_tokens == 400


async def test_an_unknown_price_can_be_refused_to_one_agent(store: CheckpointStore) -> None:
    agent = AgentConfig("a", limits=Limits(max_total_cost_usd=1, on_unpriced="refuse"))
    result = await wire(store, ScriptedLLM(["done"]), agent).run_agent("a", "Go.")
    assert result.error.startswith("the limit of agent 'a': the price of the model is unknown")


async def test_a_call_that_was_cut_by_a_stop_counts_at_its_worst(store: CheckpointStore) -> None:
    asked = asyncio.Event()

    class Slow(ScriptedLLM):
        async def stream(self, request: LLMRequest, /) -> AsyncIterator[object]:  # type: ignore[override]
            asked.set()
            await asyncio.sleep(60)
            yield None

    agent = AgentConfig("a", limits=Limits(max_output_tokens=5_000))
    async with wire(store, Slow([]), agent).run_agent_stream("a", "Go.", run_id="r"):
        await asked.wait()
    llm = ScriptedLLM(["done"])
    assert isinstance(await wire(store, llm, agent).resume("r"), Finished)
    assert llm.requests[0].settings.max_output_tokens == 5_000 - 4_096


async def test_no_tool_starts_beyond_the_limit_and_nobody_is_asked_in_vain(store: CheckpointStore) -> None:
    seen: list[int] = []

    @tool(effect="read")
    async def count(n: int) -> str:
        """Count."""
        seen.append(n)
        return "counted"

    llm = ScriptedLLM([saying("I count.", *(call("count", call_id=f"c{n}", n=n) for n in range(5))), "done"])
    agent = AgentConfig("a", limits=Limits(max_tool_calls=3))
    result = await wire(store, llm, agent, tools=[count]).run_agent("a", "Go.")
    assert isinstance(result, Failed)
    assert (seen, result.answer) == ([0, 1, 2], "I count.")


async def test_a_question_that_is_open_is_answered_before_a_limit_ends_the_scope(store: CheckpointStore) -> None:
    @tool(effect="once")
    def send() -> str:
        """Send."""
        return "sent"

    llm = ScriptedLLM([saying("Both.", call("look"), call("send")), "done"])
    agent = AgentConfig("a", hitl_tools=("send",), limits=Limits(max_tool_calls=1))
    runtime = wire(store, llm, agent, tools=[look, send])
    parked = await runtime.run_agent("a", "Go.", run_id="r")
    assert isinstance(parked, Parked)
    await runtime.answer("r", Approve())
    result = await runtime.resume("r")
    assert isinstance(result, Failed)
    assert result.error.startswith("the limit of agent 'a': max_tool_calls=1 is reached")
    assert [e.record.tool for e in result.trace if isinstance(e.record, ToolStarted)] == ["look"]


# -- a task's --------------------------------------------------------------------------------------------------------


async def test_a_task_s_limit_covers_all_that_is_delegated_for_it(store: CheckpointStore) -> None:
    def choose(request: LLMRequest) -> Reply:
        steps = sum(message.role == "assistant" for message in request.messages)
        if request.system == "I am c.":
            return saying(f"c {steps}", call("look", n=steps))
        return saying("I give it away.", call("delegate_to_c", task="Part.")) if steps == 0 else saying("done")

    llm = ScriptedLLM(choose)
    a = AgentConfig("a", "", "I am a.", allowed_tools=("delegate_to_c",))
    c = AgentConfig("c", "", "I am c.", allowed_tools=("look",))
    task = Task("t", "a", "Go.", on_failure="skip", limits=Limits(max_llm_calls=3))
    plan = Plan([task, Task("u", "a", "Go.", on_failure="skip")])
    result = await wire(store, llm, a, c, tools=[look, delegate("c")]).run_plan(plan)
    ends = closed(result)
    assert ends["t/1/a/delegate/1.0/c"].error == "the limit of task 't': max_llm_calls=3 is reached"
    assert ends["t/1/a"].error == "the limit of task 't': max_llm_calls=3 is reached"
    assert ends["t/1/a"].answer == "I give it away."
    assert ends["u/1/a/delegate/1.0/c"].reason in ("max_steps", "no_progress"), "the other task is not limited"
    assert result.task_results["t"].error == "the limit of task 't': max_llm_calls=3 is reached"


async def test_both_limits_hold_and_the_smaller_one_ends_it(store: CheckpointStore) -> None:
    for of_agent, of_task, whose in [(2, 5, "agent 'a'"), (5, 2, "task 't'"), (2, 2, "agent 'a'")]:
        llm = ScriptedLLM(ladder)
        agent = AgentConfig("a", limits=Limits(max_llm_calls=of_agent))
        plan = Plan([Task("t", "a", "Go.", on_failure="skip", limits=Limits(max_llm_calls=of_task))])
        result = await wire(MemoryCheckpointStore(), llm, agent).run_plan(plan)
        assert closed(result)["t/1/a"].error == f"the limit of {whose}: max_llm_calls=2 is reached"
        assert len(llm.requests) == 2


@pytest.mark.parametrize("on_failure", ["retry", "skip", "replan", "abort"])
async def test_what_follows_from_a_task_at_its_limit_is_for_on_failure_to_say(
    store: CheckpointStore, on_failure: str
) -> None:
    planner = ScriptedLLM(
        ['{"rationale": "", "tasks": [{"id": "n", "agent_id": "b", "instruction": "Instead.", "depends_on": []}]}']
    )
    llm = ScriptedLLM(ladder)
    task = Task("t", "a", "Go.", on_failure=on_failure, max_retries=3, limits=Limits(max_llm_calls=2))  # type: ignore[arg-type]
    runtime = AgentRuntime(
        llm=llm,
        llm_by_site={"synthesiser": ScriptedLLM(lambda _: '{"answer": "All of it."}'), "planner": planner},
        agents=[AgentConfig("a"), AgentConfig("b")],
        tools=[look],
        checkpoint_store=store,
    )
    result = await runtime.run_plan(Plan([task, Task("u", "b", "Go.")]), run_id="r")
    attempts = [child for child in closed(result) if child.startswith("t/")]
    assert attempts == ["t/1/a"], "it is not tried again"
    if on_failure == "abort":
        assert isinstance(result, Failed)
        assert (result.reason, "the limit of task 't'" in result.error) == ("task", True)
    else:
        assert isinstance(result, Finished)
        assert ("n" in result.task_results) == (on_failure == "replan")
        if on_failure != "replan":
            assert result.task_results["t"].status == "failed"


async def test_a_plan_given_again_with_a_higher_limit_goes_on(store: CheckpointStore) -> None:
    llm = ScriptedLLM(ladder)

    def plan(limits: Limits | None) -> Plan:
        return Plan([Task("t", "a", "Go.", on_failure="abort", limits=limits)])

    runtime = wire(store, llm, AgentConfig("a"))
    failed = await runtime.run_plan(plan(Limits(max_llm_calls=2)), run_id="r")
    assert isinstance(failed, Failed)
    still = await runtime.resume("r")
    assert isinstance(still, Failed)
    assert len(llm.requests) == 2
    again = await runtime.run_plan(plan(Limits(max_llm_calls=6)), run_id="r")
    assert isinstance(again, Finished), again.error
    assert len(llm.requests) == 2 + 4, "the attempt is a new one, what was spent before counts"
    changes = [e.record.changes for e in again.trace if isinstance(e.record, ConfigDiffers)]
    assert changes == [("the limits of task 't'",)]


async def test_a_planner_s_task_of_the_same_id_does_not_get_the_limits_of_the_one_it_replaces(
    store: CheckpointStore,
) -> None:
    again = '{"id": "t", "agent_id": "b", "instruction": "Instead.", "depends_on": [], "on_failure": "abort"}'
    runtime = AgentRuntime(
        llm=ScriptedLLM(ladder),
        llm_by_site={"planner": ScriptedLLM([f'{{"rationale": "", "tasks": [{again}]}}'])},
        agents=[AgentConfig("a"), AgentConfig("b", max_steps=1)],
        tools=[look],
        checkpoint_store=store,
    )
    plan = Plan([Task("t", "a", "Go.", limits=Limits(max_llm_calls=2))])
    first = await runtime.run_plan(plan, run_id="r")
    result = await runtime.run_plan(plan, run_id="r")
    assert isinstance(result, Failed)
    assert "max_steps=1" in first.error
    assert "max_steps=1" in result.error
    assert not any(isinstance(entry.record, ConfigDiffers) for entry in result.trace)


async def test_a_limit_given_to_a_task_of_an_old_run_counts_what_it_used(store: CheckpointStore) -> None:
    llm = ScriptedLLM(ladder)

    def plan(limits: Limits | None) -> Plan:
        return Plan([Task("t", "a", "Go.", on_failure="abort", limits=limits)])

    failed = await wire(store, llm, AgentConfig("a", max_steps=2)).run_plan(plan(None), run_id="r")
    assert isinstance(failed, Failed)
    again = await wire(store, llm, AgentConfig("a")).run_plan(plan(Limits(max_llm_calls=3)), run_id="r")
    assert isinstance(again, Failed)
    assert len(llm.requests) == 3


async def test_an_agent_s_higher_limit_goes_on_with_a_plan_that_was_aborted(store: CheckpointStore) -> None:
    llm = ScriptedLLM(ladder)
    plan = Plan([Task("t", "a", "Go.", on_failure="abort"), Task("u", "b", "Go.", depends_on=("t",))])

    def runtime(most: int) -> AgentRuntime:
        return wire(store, llm, AgentConfig("a", limits=Limits(max_llm_calls=most)), AgentConfig("b"))

    assert isinstance(await runtime(3).run_plan(plan, run_id="r"), Failed)
    again = await runtime(7).resume("r")
    assert isinstance(again, Finished), again.error
    assert len(llm.requests) == 3 + 4 + 4


async def test_a_fork_does_not_pay_for_what_it_has_copied(store: CheckpointStore) -> None:
    llm = ScriptedLLM(ladder)
    runtime = wire(store, llm, AgentConfig("a", limits=Limits(max_llm_calls=4)))
    assert isinstance(await runtime.run_agent("a", "Go.", run_id="r"), Finished)
    fork = await runtime.fork("r", at=3)
    assert isinstance(await runtime.resume(fork), Finished)
    assert len(llm.requests) == 6


async def test_a_run_cut_at_any_record_stays_within_its_limits() -> None:
    def choose(request: LLMRequest) -> Reply:
        if request.response_schema is not None:
            return '{"answer": "All of it.", "confidence": 0.9}'
        steps = sum(message.role == "assistant" for message in request.messages)
        if request.system == "I am a." and steps == 0:
            return saying("I give it away.", call("delegate_to_c", task="Part."))
        return saying("done") if steps else saying("I look.", call("look"))

    a = AgentConfig("a", "", "I am a.", limits=Limits(max_llm_calls=4))
    c = AgentConfig("c", "", "I am c.", ("look",), limits=Limits(max_llm_calls=3))
    plan = Plan([Task(f"t{n}", "a", "Go.", on_failure="skip", limits=Limits(max_llm_calls=5 - n)) for n in range(3)])

    def runtime(store: CheckpointStore, llm: ScriptedLLM) -> AgentRuntime:
        return wire(store, llm, a, c, tools=[look, delegate("c")], max_parallel_tasks=1)

    whole = await runtime(MemoryCheckpointStore(), ScriptedLLM(choose)).run_plan(plan)
    ends = [record.error for record in closed(whole).values() if not record.success]
    assert any("agent 'c'" in error for error in ends)
    for length in range(1, len(whole.trace)):
        store = MemoryCheckpointStore()
        owner = await store.claim("r", this_process())
        await store.append("r", 0, [entry.record for entry in whole.trace[:length]], owner=owner)
        await store.release(owner)
        result = await runtime(store, ScriptedLLM(choose)).resume("r")
        started = [entry.record for entry in result.trace if isinstance(entry.record, LLMStarted)]
        places = [place_of(record.scope) for record in started]
        for agent in (a, c):
            assert agent.limits is not None
            assert sum(place.agent_id == agent.agent_id for place in places) <= (agent.limits.max_llm_calls or 0)
        for task in plan.tasks:
            assert task.limits is not None
            assert sum(place.task_id == task.id for place in places) <= (task.limits.max_llm_calls or 0)
        for entry in result.trace:
            if isinstance(entry.record, ScopeClosed) and not entry.record.success:
                assert entry.record.reason == "budget", entry.record


# -- wrong words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Limits(max_llm_calls=-1), "Limits.max_llm_calls must be zero or more, not -1"),
        (lambda: Limits(max_llm_calls="3"), "Limits.max_llm_calls must be a number, not '3'"),  # type: ignore[arg-type]
        (lambda: Limits(max_total_cost_usd=float("nan")), "max_total_cost_usd must be zero or more, not nan"),
        (lambda: Limits(on_unpriced="ask"), "Limits.on_unpriced must be 'allow' or 'refuse'"),  # type: ignore[arg-type]
        (lambda: GuardrailConfig(max_tool_calls=-1), "GuardrailConfig.max_tool_calls must be zero or more"),
        (
            lambda: AgentConfig("a", limits=GuardrailConfig()),
            r"AgentConfig.limits must be Limits\(...\), not Guardrail",
        ),
        (lambda: AgentConfig("a", limits=3), r"AgentConfig.limits must be Limits\(...\), not int"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_limit_is_said_when_it_is_made(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_a_task_s_wrong_limits_are_said_with_the_plan() -> None:
    with pytest.raises(PlanError, match=r"limits of task 't' must be Limits\(...\), not GuardrailConfig"):
        Plan([Task("t", "a", "Go.", limits=GuardrailConfig())])


def test_limits_of_agents_and_tasks_in_files() -> None:
    file = parse("[agents.a]\n[agents.a.limits]\nmax_total_cost_usd = 0.25\nmax_llm_calls = 3\n", Path("harness.toml"))
    table = file.data.agents["a"].limits
    assert table is not None
    assert table.limits() == Limits(max_total_cost_usd=0.25, max_llm_calls=3)
    text = '[[tasks]]\nid = "t"\nagent = "a"\ninstruction = "Go."\nlimits = { max_tool_calls = 2 }\n'
    assert parse_plan(text, Path("plan.toml")).plan.tasks[0].limits == Limits(max_tool_calls=2)
    with pytest.raises(ConfigError, match=r"harness.toml:3: unknown word 'max_calls' in \[agents.a.limits\]; did"):
        parse("[agents.a]\n[agents.a.limits]\nmax_calls = 3\n", Path("harness.toml"))
    with pytest.raises(ConfigError, match=r"plan.toml:\d+: unknown word 'max_llm_call'.*did you mean 'max_llm_calls'"):
        parse_plan(text.replace("max_tool_calls", "max_llm_call"), Path("plan.toml"))
    with pytest.raises(ConfigError, match="greater than or equal to 0"):
        parse("[agents.a.limits]\nmax_llm_calls = -3\n", Path("harness.toml"))


# -- what a run says it spent, and how it ends -------------------------------------------------------------------------


async def test_done_says_cost_tokens_and_time_by_site_agent_and_task(store: CheckpointStore) -> None:
    def choose(request: LLMRequest) -> Reply:
        steps = sum(message.role == "assistant" for message in request.messages)
        if request.system == "I am a." and steps == 0:
            return saying("I give it away.", call("delegate_to_c", task="Part."))
        return saying("done")

    llm = ScriptedLLM(choose, delay_s=0.02)
    a, b, c = (AgentConfig(name, "", f"I am {name}.") for name in "abc")
    plan = Plan([Task("t", "a", "Go."), Task("u", "b", "Go.", depends_on=("t",))])
    runtime = AgentRuntime(
        llm=llm,
        llm_by_site={"synthesiser": ScriptedLLM(['{"answer": "All of it."}'], delay_s=0.02)},
        agents=[a, b, c],
        tools=[delegate("c")],
        checkpoint_store=store,
    )
    async with runtime.run_plan_stream(plan) as events:
        *_, done = [event async for event in events]
    assert isinstance(done, Done)
    budget = json.loads(json.dumps(done.budget))
    by_site, by_agent, by_task = (budget[f"by_{name}"] for name in ("site", "agent", "task"))
    assert (set(by_site), set(by_agent), set(by_task)) == ({"agent", "synthesiser"}, set("abc"), set("tu"))
    for shares in (by_site, by_agent, by_task):
        for share in shares.values():
            assert share.keys() == {"cost_usd", "tokens", "unpriced_calls", "elapsed_seconds"}
            assert share["elapsed_seconds"] >= 0.015
            assert share["tokens"] > 0

    def seconds(shares: dict[str, dict[str, float]], *names: str) -> float:
        return sum(shares[name]["elapsed_seconds"] for name in names)

    # Whoever waits for a helper is not at work: nothing is counted twice.
    assert seconds(by_task, "t") == pytest.approx(seconds(by_agent, "a", "c"), abs=0.001)
    assert seconds(by_task, "u") == pytest.approx(seconds(by_agent, "b"), abs=0.001)
    assert seconds(by_site, "agent") == pytest.approx(seconds(by_agent, "a", "b", "c"), abs=0.001)
    assert seconds(by_site, "agent", "synthesiser") <= budget["elapsed_seconds"] + 0.001


async def test_time_by_agent_is_told_of_a_run_with_one_agent_too(store: CheckpointStore) -> None:
    result = await wire(store, ScriptedLLM(ladder, delay_s=0.005), AgentConfig("a")).run_agent("a", "Go.")
    share = result.budget["by_agent"]["a"]  # type: ignore[index]
    assert share["elapsed_seconds"] == pytest.approx(result.spent.active_s, abs=0.001)


async def test_a_run_at_its_budget_has_the_best_partial_answer(store: CheckpointStore) -> None:
    failed = await wire(store, ScriptedLLM(ladder), AgentConfig("a"), max_llm_calls=2).run_agent("a", "Go.")
    assert failed.answer == "step 2"
    plan = Plan([Task("t", "a", "Go."), Task("u", "a", "Go.", depends_on=("t",))])
    done_one = await wire(store, ScriptedLLM(ladder), AgentConfig("a"), max_llm_calls=5).run_plan(plan)
    assert (done_one.answer, done_one.task_results["t"].answer) == ("done", "done")
    done_none = await wire(store, ScriptedLLM(ladder), AgentConfig("a"), max_llm_calls=2).run_plan(plan)
    assert done_none.answer == "step 2", "the last that was said is more than nothing"
    assert done_none.budget["by_task"]["t"]["elapsed_seconds"] >= 0  # type: ignore[index]


# -- the rest of GuardrailConfig ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "status"), [(0.0, "done"), (0.4, "done"), (0.6, "doubtful"), (1.0, "doubtful")])
async def test_the_confidence_threshold_decides_what_is_doubtful(
    store: CheckpointStore, threshold: float, status: str
) -> None:
    llm = ScriptedLLM(lambda _: LLMResponse((Text("perhaps"),), "stop", confidence=0.5))
    runtime = wire(store, llm, AgentConfig("a"), confidence_threshold=threshold)
    result = await runtime.run_plan(Plan([Task("t", "a", "Go.", on_failure="skip")]))
    assert result.task_results["t"].status == status


@pytest.mark.parametrize("most", [0, 1, 2])
async def test_a_plan_is_replaced_as_often_as_it_may(store: CheckpointStore, most: int) -> None:
    ids = itertools.count()
    planner = ScriptedLLM(
        lambda _: f'{{"tasks": [{{"id": "n{next(ids)}", "agent_id": "a", "instruction": "Fail.", "depends_on": []}}]}}'
    )
    runtime = AgentRuntime(
        llm=ScriptedLLM(lambda request: LLMResponse((Text("no"),), "content_filter")),
        llm_by_site={"planner": planner},
        agents=[AgentConfig("a")],
        checkpoint_store=store,
        guardrail_config=GuardrailConfig(max_replan_count=most),
    )
    result = await runtime.run_plan(Plan([Task("t", "a", "Fail.")]))
    assert isinstance(result, Failed)
    assert len(planner.requests) == most


async def test_wall_time_is_on_a_clock_that_does_not_jump(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time

    @tool(effect="read")
    def jump(hours: float) -> str:
        """Set the clock of the machine."""
        monkeypatch.setattr(time, "time", lambda: real() + hours * 3600)
        return "set"

    llm = ScriptedLLM([call("jump", hours=5), call("jump", hours=-5), "done"])
    result = await wire(store, llm, AgentConfig("a"), tools=[jump], max_wall_time_seconds=60).run_agent("a", "Go.")
    assert isinstance(result, Finished), result.error
    assert result.spent.active_s < 60


async def test_wall_time_ends_the_calls_of_every_agent_of_a_tree(store: CheckpointStore) -> None:
    llm = ScriptedLLM(lambda _: "late", delay_s=30)
    runtime = wire(store, llm, AgentConfig("a"), max_wall_time_seconds=0.1)
    result = await asyncio.wait_for(runtime.run_plan(Plan([Task(f"t{n}", "a", "Go.") for n in range(5)])), 10)
    assert isinstance(result, Failed)
    assert result.reason == "budget"
    assert re.match(r"max_wall_time_seconds=0.1 is over", result.error)


async def test_a_pause_that_wall_time_cuts_sends_nothing_more_and_its_time_counts(store: CheckpointStore) -> None:
    def busy(_: LLMRequest) -> str:
        raise LLMError("busy", transient=True, retry_after_s=30)

    llm = ScriptedLLM(busy)
    runtime = wire(store, llm, AgentConfig("a"), max_wall_time_seconds=0.1)
    result = await asyncio.wait_for(runtime.run_agent("a", "Go.", run_id="r"), 10)
    assert isinstance(result, Failed)
    assert result.error.startswith("max_wall_time_seconds=0.1 is over")
    assert (len(llm.requests), result.spent.usage, result.spent.estimated) == (1, Usage(), 0)
    assert result.spent.active_s >= 0.1
    again = await asyncio.wait_for(runtime.resume("r"), 10)
    assert (again.reason, len(llm.requests)) == ("budget", 1)  # type: ignore[union-attr]
