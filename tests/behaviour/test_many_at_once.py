"""Plans together with everything else: keys of tasks, resumes with another team, stuck calls, background planners."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec
import pytest

from harness import (
    AgentConfig,
    AgentRuntime,
    Cancelled,
    CheckpointStore,
    ConfigError,
    GuardrailConfig,
    MemoryCheckpointStore,
    Plan,
    Task,
    tool,
)
from harness.llm.base import LLMRequest
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
