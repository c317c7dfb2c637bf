"""What a user writes, as a type checker sees it. Never run: pyright in strict mode is the test.

A line that must be an error carries `# pyright: ignore[rule]`; an ignore that is not needed is itself an error.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import assert_never, assert_type

from harness import (
    LLM,
    AgentConfig,
    AgentRegistry,
    AgentRuntime,
    AnthropicLLM,
    Cancelled,
    CheckpointStore,
    Entry,
    Event,
    Failed,
    FileCheckpointStore,
    Finished,
    GuardrailConfig,
    Limits,
    LLMSettings,
    MemoryCheckpointStore,
    NotDone,
    OpenAILLM,
    OpenAIResponsesLLM,
    Parked,
    Plan,
    Replay,
    RunQuery,
    RunResult,
    RunStream,
    RunSummary,
    SQLiteCheckpointStore,
    Task,
    Tool,
    ToolContext,
    ToolRegistry,
    Usage,
    file_tools,
    maybe_resume_key,
    tool,
)
from harness.testing import CassetteLLM, RecordingTool, ScriptedLLM, call


class Deps:
    """A user's own object."""

    index: dict[str, str]


# --- tools: with and without options, plain and async, with a typed context ---------------------
@tool
def plain(city: str, days: int = 1) -> str:
    """Tell the weather."""
    return f"{city} {days}"


@tool(effect="idempotent", timeout_s=5, name="look_up")
async def look_up(word: str, context: ToolContext[Deps]) -> dict[str, str]:
    """Look a word up."""
    assert_type(context.deps, Deps)
    assert_type(context.idempotency_key, str)
    return {word: context.deps.index[word]}


def became(key: str) -> str | NotDone:
    return key or NotDone()


@tool(effect="once", reconcile=became)
def pay(cents: int) -> str:
    """Pay."""
    return str(cents)


@tool(effect="twice")  # pyright: ignore[reportArgumentType]
def wrong(x: int) -> int:
    return x


# --- agents and wiring --------------------------------------------------------------------------
agent = AgentConfig(
    "reader", "reads", "Answer.", allowed_tools=("plain",), max_steps=5, llm_settings=LLMSettings(temperature=0)
)
AgentConfig("reader", limits=Limits(max_llm_calls=3), output=dict[str, int])
AgentConfig("reader", limits=3)  # pyright: ignore[reportArgumentType]
Plan([Task("t", "reader", "Read.", limits=Limits(max_total_cost_usd=0.1))])
Limits(3)  # pyright: ignore[reportCallIssue]
AgentConfig("reader", max_steps="5")  # pyright: ignore[reportArgumentType]
GuardrailConfig(2.0)  # pyright: ignore[reportCallIssue]

stores: list[CheckpointStore] = [
    SQLiteCheckpointStore("runs.db"),
    FileCheckpointStore("checkpoints"),
    MemoryCheckpointStore(),
]
models: list[LLM] = [
    OpenAILLM(model="m"),
    AnthropicLLM("m", prompt_caching=False),
    ScriptedLLM([call("plain", city="Rome"), "sunny"]),
]
tools: list[Tool] = [plain, look_up, pay, RecordingTool("send", "log.txt"), *file_tools(".")]

runtime = AgentRuntime(
    llm=models[0],
    agents=[agent],
    tools=[plain, len, *tools],
    guardrail_config=GuardrailConfig(max_total_cost_usd=0.5),
    checkpoint_store=stores[0],
    deps=Deps(),
)
AgentRuntime(
    llm=models[0],
    agent_registry=AgentRegistry().register(agent).register(agent),
    tool_registry=ToolRegistry().register(plain).register(look_up),
)
AgentRuntime(models[0])  # pyright: ignore[reportCallIssue]


# --- entry points -------------------------------------------------------------------------------
def describe(result: RunResult) -> str:
    """A result is a closed union."""
    match result:
        case Finished(answer=answer, confidence=confidence):
            assert_type(confidence, float)
            return answer
        case Failed(reason=reason, error=error):
            return f"{reason}: {error}"
        case Cancelled():
            return "cancelled"
        case Parked():
            return "parked"
    assert_never(result)


async def blocking() -> None:
    async with runtime:
        result = await runtime.run_agent("reader", "Why?", run_id="my-run")
        assert_type(result, RunResult)
        assert_type(result["answer"], object)
        assert_type(result.output, object)
        assert_type(result.output_as(Deps), Deps)
        assert_type(result.output_as(dict[str, int], task_id="t"), dict[str, int])
        assert_type(result.trace[0], Entry)
        assert_type(await runtime.resume("my-run"), RunResult)
        assert_type(await runtime.fork("my-run", at=2), str)
        assert_type(await runtime.recover(), list[RunResult])
        assert_type(runtime.runs(RunQuery(status="failed")), AsyncIterator[RunSummary])


async def streaming() -> None:
    stream = runtime.run_agent_stream("reader", "Why?", tokens=True)
    assert_type(stream, RunStream)
    async with stream as events:
        async for event in events:
            assert_type(event, Event)
            print(event.type, event.payload, event.token, event.timestamp)
    assert_type(stream.result, RunResult | None)
    replay = runtime.replay_stream("my-run", speed=2)
    assert_type(replay, Replay)
    async with replay as shown:
        async for event in shown:
            assert_type(event, Event)
    assert_type(replay.result, RunResult | None)


async def closing() -> None:
    """A model closes its connections at the end of a block."""
    async with OpenAILLM("m") as chat, OpenAIResponsesLLM("m") as responses, AnthropicLLM("m") as claude:
        assert_type(chat, OpenAILLM)
        assert_type(responses, OpenAIResponsesLLM)
        assert_type(claude, AnthropicLLM)
        assert_type(claude.price(1, 1), int | None)


async def recordings() -> None:
    """A cassette is a model, made of a file or of a run."""
    models: list[LLM] = [CassetteLLM("tapes/a.json", lambda: OpenAILLM("m"), record="missing", scrub=str.strip)]
    cassette = await CassetteLLM.from_run(runtime.store, "my-run")
    assert_type(cassette, CassetteLLM)
    assert_type(cassette.unused, int)
    CassetteLLM("tapes/a.json", record="sometimes")  # pyright: ignore[reportArgumentType]
    AgentRuntime(llm=models[0])


assert_type(runtime.run_sync(runtime.run_agent("reader", "Why?")), RunResult)
assert_type(maybe_resume_key(), str | None)
assert_type(Usage(1, 2) + Usage(3, 4), Usage)
