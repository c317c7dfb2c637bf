"""A budget is a ceiling: the worst case of a call is reserved before it is sent, over every agent of a run.

What was spent is counted at the model, not in the journal.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import defaultdict
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import (
    AgentConfig,
    AgentRuntime,
    Failed,
    Finished,
    GuardrailConfig,
    Limits,
    LLMError,
    LLMSettings,
    MemoryCheckpointStore,
    Plan,
    Task,
    Usage,
    delegate,
)
from harness.llm.base import LLMDelta, LLMRequest, LLMResponse, ResponseDone, TextDelta
from harness.messages import Text, ToolCall
from harness.testing import ScriptedLLM
from harness.working_memory import part_tokens


class Counted:
    """What was sent and charged, for the run, an agent or a task."""

    def __init__(self) -> None:
        self.sent = self.cost = self.tokens_in = self.tokens_out = 0

    def add(self, tokens_in: int, tokens_out: int, cost: int) -> None:
        self.sent += 1
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out
        self.cost += cost

    def assert_within(self, limits: Limits) -> None:
        if limits.max_total_cost_usd is not None:
            assert self.cost <= limits.max_total_cost_usd * 1_000_000
        if limits.max_input_tokens is not None:
            assert self.tokens_in <= limits.max_input_tokens
        if limits.max_output_tokens is not None:
            assert self.tokens_out <= limits.max_output_tokens
        if limits.max_llm_calls is not None:
            assert self.sent <= limits.max_llm_calls


class Meter:
    """A model that charges for what it is sent and answers, up to the limit it is given, and counts by itself.

    Whose call it is it reads off the request: the agent off the prompt ("You are a."), the task off the goal ("[t1]").

    Args:
        seed: chooses the replies.
        rates: micro-dollars for a token in and a token out.
        calls: what it may ask for instead of answering.
        fails: how often it breaks off in the middle of a reply.
    """

    name = "meter"
    provider = "test"

    def __init__(self, seed: int, rates: tuple[int, int], *, calls: bool = False, fails: float = 0.0) -> None:
        self._chance = random.Random(seed)
        self._rates = rates
        self._calls = calls
        self._fails = fails
        self.all = Counted()
        self.by_agent: defaultdict[str, Counted] = defaultdict(Counted)
        self.by_task: defaultdict[str, Counted] = defaultdict(Counted)

    def price(self, input_tokens: int, output_tokens: int, /) -> int:
        return input_tokens * self._rates[0] + output_tokens * self._rates[1]

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        # The worst that can come: the whole output limit, or what is assumed where there is none.
        tokens_in = sum(part_tokens(message.parts) for message in request.messages) + (len(request.system) + 3) // 4
        most = request.settings.max_output_tokens or 4096
        tokens_out = self._chance.choice([most, self._chance.randint(0, most)])
        agent = re.match(r"You are (\w)\.", request.system)
        task = re.match(r"\[(t\d+)\]", request.messages[0].text) if agent else None
        cost = self.price(tokens_in, tokens_out)
        self.all.add(tokens_in, tokens_out, cost)
        self.by_agent[agent[1] if agent else ""].add(tokens_in, tokens_out, cost)
        self.by_task[task[1] if task else ""].add(tokens_in, tokens_out, cost)
        await asyncio.sleep(0)
        if self._chance.random() < self._fails:
            yield TextDelta("half")
            raise LLMError("the connection broke")
        usage = Usage(tokens_in, tokens_out, cost_microusd=cost)
        yield ResponseDone(LLMResponse(self._reply(request, task[0] if task else ""), "stop", usage, self.name))

    def _reply(self, request: LLMRequest, task: str) -> tuple[Text | ToolCall, ...]:
        if request.response_schema is not None:
            return (Text(json.dumps({"answer": "all", "confidence": 0.9, "tasks": [], "rationale": ""})),)
        if self._calls and request.tools and len(request.messages) < 6 and self._chance.random() < 0.5:
            return tuple(
                ToolCall("c", spec.name, json.dumps({"task": f"{task} part {self._chance.random()}"}))
                for spec in self._chance.choices(request.tools, k=self._chance.randint(1, 2))
            )
        return (Text("done"),)


def some_limits(chance: random.Random) -> Limits | None:
    """Draw what an agent or a task may use, or that nothing limits it."""
    if chance.random() < 0.4:
        return None
    return Limits(
        max_total_cost_usd=chance.choice([None, chance.uniform(0, 1)]),
        max_input_tokens=chance.choice([None, chance.randint(0, 2_000)]),
        max_output_tokens=chance.choice([None, chance.randint(0, 12_000)]),
        max_llm_calls=chance.choice([None, chance.randint(0, 8)]),
    )


def plan_of(count: int, chance: random.Random) -> Plan:
    tasks = [
        Task(
            f"t{n}",
            chance.choice(["a", "b"]),
            f"[t{n}] Do this part.",
            depends_on=tuple(f"t{k}" for k in range(n) if chance.random() < 0.2),
            on_failure=chance.choice(["retry", "skip", "replan", "abort"]),
            limits=some_limits(chance),
        )
        for n in range(count)
    ]
    return Plan(tasks)


@settings(max_examples=1_000, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 12),
    rates=st.tuples(st.integers(1, 30), st.integers(1, 90)),
    dollars=st.one_of(st.none(), st.floats(0.0, 2.0)),
    most_in=st.one_of(st.none(), st.integers(0, 5_000)),
    most_out=st.one_of(st.none(), st.integers(0, 20_000)),
    most_calls=st.one_of(st.none(), st.integers(0, 30)),
    fails=st.sampled_from([0.0, 0.2]),
)
def test_no_tree_of_agents_ever_spends_more_than_it_may(
    seed: int,
    count: int,
    rates: tuple[int, int],
    dollars: float | None,
    most_in: int | None,
    most_out: int | None,
    most_calls: int | None,
    fails: float,
) -> None:
    chance = random.Random(seed)
    model = Meter(seed, rates, calls=True, fails=fails)
    limits = GuardrailConfig(
        max_total_cost_usd=dollars,
        max_input_tokens=most_in,
        max_output_tokens=most_out,
        max_llm_calls=most_calls,
        max_parallel_tasks=chance.randint(1, 12),
    )
    asked = LLMSettings(max_output_tokens=chance.choice([None, 100, 300, 2_000]))
    a, b, c, d = (
        AgentConfig(name, "", f"You are {name}.", llm_settings=asked, max_steps=6, limits=some_limits(chance))
        for name in "abcd"
    )
    runtime = AgentRuntime(
        llm=model,
        agents=[a, b],
        tools=[delegate(c), delegate(d)],
        guardrail_config=limits,
        checkpoint_store=MemoryCheckpointStore(),
        auto_resume=False,
    )
    plan = plan_of(count, chance)
    result = asyncio.run(runtime.run_plan(plan, run_id="r"))
    model.all.assert_within(limits)
    for agent in (a, b, c, d):
        model.by_agent[agent.agent_id].assert_within(agent.limits or Limits())
    for task in plan.tasks:
        model.by_task[task.id].assert_within(task.limits or Limits())
    # The ledger never says less than the model charged.
    assert result.spent.usage.cost_microusd >= model.all.cost
    assert result.spent.usage.output_tokens >= model.all.tokens_out


def wired(model: object, dollars: float, **limits: object) -> AgentRuntime:
    return AgentRuntime(
        llm=model,
        agents=[AgentConfig("a", llm_settings=LLMSettings(max_output_tokens=1_000))],
        guardrail_config=GuardrailConfig(max_total_cost_usd=dollars, max_parallel_tasks=20, **limits),  # type: ignore[arg-type]
        checkpoint_store=MemoryCheckpointStore(),
    )


def twenty() -> Plan:
    return Plan([Task(f"t{n}", "a", "Do it.", on_failure="skip") for n in range(20)])


async def test_twenty_parallel_calls_against_a_budget_for_two_send_two() -> None:
    usage = Usage(100, 1_000, cost_microusd=100_000)
    model = ScriptedLLM(lambda _: "done", usage=usage, price=lambda _in, out: out * 100, delay_s=0.01)
    result = await wired(model, 0.205).run_plan(twenty())
    assert isinstance(result, Failed)
    assert result.reason == "budget"
    assert len(model.requests) == 2
    assert result.spent.usage.cost_usd == pytest.approx(0.2)
    assert result.answer == "done\n\ndone"


async def test_calls_that_use_less_than_they_hold_leave_room_for_others() -> None:
    usage = Usage(100, 10, cost_microusd=1_000)
    model = ScriptedLLM(lambda _: "done", usage=usage, price=lambda _in, out: out * 100, delay_s=0.001)
    result = await wired(model, 0.205).run_plan(twenty())
    assert isinstance(result, Finished), result
    assert len(model.requests) == 22  # one of them was no synthesis, and was asked for again
    assert all(request.settings.max_output_tokens == 1_000 for request in model.requests[:2])


async def test_the_output_limit_is_lowered_where_that_makes_a_call_fit() -> None:
    model = ScriptedLLM(["done"], price=lambda _in, out: out * 100)
    result = await wired(model, 0.05).run_agent("a", "Do it.")
    assert isinstance(result, Finished)
    assert model.requests[0].settings.max_output_tokens == 500


async def test_a_cut_call_is_charged_by_estimate_and_a_refused_one_is_not() -> None:
    model = Meter(1, (1, 1), fails=1.0)
    runtime = wired(model, 2.0)
    result = await runtime.run_agent("a", "Do it.")
    assert isinstance(result, Failed)
    assert result.spent.estimated == 1
    assert result.spent.usage.output_tokens == 1_000
    refused = await wired(ScriptedLLM([LLMError("no key")]), 2.0).run_agent("a", "Do it.")
    assert (refused.spent.estimated, refused.spent.usage.output_tokens) == (0, 0)


async def test_an_unknown_price_can_be_refused() -> None:
    model = ScriptedLLM(["done"])
    result = await wired(model, 2.0, on_unpriced="refuse").run_agent("a", "Do it.")
    assert isinstance(result, Failed)
    assert (result.reason, len(model.requests)) == ("budget", 0)


@pytest.mark.parametrize("dollars", [float("inf"), 1e305, 1e30])
async def test_more_money_than_there_is_is_no_limit(dollars: float) -> None:
    model = ScriptedLLM(["done"], price=lambda _in, out: out)
    assert isinstance(await wired(model, dollars).run_agent("a", "Do it."), Finished)


async def test_two_runs_of_one_model_see_their_own_spending_only() -> None:
    model = ScriptedLLM(["done"], usage=Usage(10, 5, cost_microusd=70), price=lambda _in, out: out, delay_s=0.005)
    runtime = wired(model, 1.0)
    results = await asyncio.gather(*(runtime.run_agent("a", f"Do {n}.") for n in range(5)))
    assert [result.spent.usage.cost_microusd for result in results] == [70] * 5
