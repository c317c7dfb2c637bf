"""Plans together with everything else: keys of tasks, resumes with another team, stuck calls, background planners."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec
import pytest

from harness import (
    AgentConfig,
    AgentRuntime,
    Cancelled,
    CheckpointStore,
    ConfigError,
    Failed,
    GuardrailConfig,
    LLMError,
    MemoryCheckpointStore,
    Plan,
    RunStopped,
    Task,
    tool,
)
from harness.llm.base import LLMDelta, LLMRequest
from harness.testing import Reply, ScriptedLLM, call


def as_json(**fields: object) -> str:
    return msgspec.json.encode(fields).decode()


BROUGHT = as_json(answer="All of it.", confidence=0.8, conflicts=[], unknowns=[])


def asked(request: LLMRequest) -> str:
    """Return the first line of what an agent was asked."""
    return request.messages[0].text.partition("\n")[0]


def wire(
    store: CheckpointStore,
    agents: Sequence[AgentConfig],
    *,
    planner: object | None = None,
    synthesiser: object | None = None,
    tools: Sequence[object] = (),
    **limits: object,
) -> AgentRuntime:
    return AgentRuntime(
        llm=ScriptedLLM([]),
        llm_by_site={"planner": planner or ScriptedLLM([]), "synthesiser": synthesiser or ScriptedLLM([BROUGHT])},
        agents=agents,
        tools=tools,
        checkpoint_store=store,
        guardrail_config=GuardrailConfig(**limits),  # type: ignore[arg-type]
    )


def agent(name: str, script: Sequence[Reply] | Callable[[LLMRequest], Reply]) -> AgentConfig:
    return AgentConfig(name, llm=ScriptedLLM(script))


# -- keys of tasks -----------------------------------------------------------------------------------------------------


async def test_the_key_of_a_task_that_was_at_work_when_its_run_was_cancelled_names_that_end() -> None:
    inside = asyncio.Event()

    @tool(effect="read")
    async def wait() -> str:
        """Wait."""
        inside.set()
        await asyncio.sleep(60)
        return "waited"

    plan = Plan([Task("one", "a", "One"), Task("two", "a", "Two", ("one",))])
    runtime = wire(MemoryCheckpointStore(), [agent("a", [call("wait"), "done"])], tools=[wait])
    driven = asyncio.create_task(runtime.run_plan(plan, run_id="r"))
    await inside.wait()
    await runtime.cancel("r", "not needed")
    assert isinstance(await driven, Cancelled)
    result = await runtime.resume("r:one:a")
    assert isinstance(result, Cancelled)
    assert result.error == "not needed"
    async with runtime.resume_stream("r:one:a") as events:
        assert [event.type async for event in events] == ["CANCELLED"]
    with pytest.raises(ConfigError, match=r"'two'.*has not begun its turn, and the run is over"):
        await runtime.resume("r:two:a")


# -- another team ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_failure", ["abort", "skip", "replan", "retry"])
async def test_a_failed_run_is_not_resumed_without_the_agent_of_a_task_that_gets_another_chance(on_failure: str) -> None:
    store = MemoryCheckpointStore()
    plan = Plan([Task("one", "a", "One", on_failure=on_failure, max_retries=0)])  # type: ignore[arg-type]
    team = [agent("b", ["2"]), agent("a", lambda request: LLMError("down"))]
    failed = await wire(store, team, max_replan_count=0).run_plan(plan, run_id="r")
    assert isinstance(failed, Failed)
    before = [entry async for entry in store.read("r")]
    with pytest.raises(ConfigError, match="unknown agent 'a'"):
        await wire(store, team[:1]).resume("r")
    assert [entry async for entry in store.read("r")] == before  # it can be tried again by whoever has that agent
    assert (await wire(store, [*team[:1], agent("a", ["1"])]).resume("r")).answer == "All of it."


async def test_a_run_is_not_resumed_without_the_agent_of_a_task_that_waits_to_be_retried() -> None:
    """The place it had was taken by a task that comes before it in the plan."""
    store = MemoryCheckpointStore()
    inside, both = asyncio.Event(), asyncio.Event()

    @tool(effect="read")
    async def wait() -> str:
        """Wait."""
        (both if inside.is_set() else inside).set()
        await asyncio.sleep(60)
        return "waited"

    class Down(ScriptedLLM):
        async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
            await inside.wait()
            async for delta in super().stream(request):
                yield delta

    def reply(request: LLMRequest) -> Reply:
        return "1" if asked(request) == "First" else call("wait")

    plan = Plan(
        [
            Task("x", "b", "X", ("first",)),
            Task("y", "b", "Y", ("first",)),
            Task("one", "a", "One", on_failure="retry"),
            Task("first", "b", "First"),
        ]
    )
    down = AgentConfig("a", llm=Down(lambda request: LLMError("down")))
    runtime = wire(store, [down, agent("b", reply)], tools=[wait], max_parallel_tasks=2)
    driven = asyncio.create_task(runtime.run_plan(plan, run_id="r"))
    await both.wait()
    await runtime.aclose()
    with pytest.raises(RunStopped):
        await driven
    with pytest.raises(ConfigError, match="unknown agent 'a'"):
        await wire(store, [agent("b", reply)], tools=[wait]).resume("r")
