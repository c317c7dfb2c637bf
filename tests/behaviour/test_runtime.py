"""Runs through AgentRuntime with a scripted model: what a library user relies on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import (
    AgentConfig,
    AgentRegistry,
    AgentRuntime,
    CheckpointStore,
    ConfigChanged,
    ConfigError,
    Failed,
    Finished,
    GuardrailConfig,
    LLMError,
    MemoryCheckpointStore,
    OwnershipLost,
    RunIdTaken,
    RunNotFound,
    SQLiteCheckpointStore,
    ToolContext,
    ToolError,
    ToolRegistry,
    Usage,
    tool,
)
from harness.events import Action, Observation, TaskDone
from harness.llm.base import LLMRequest, LLMResponse
from harness.messages import Text, ToolResult
from harness.records import ConfigDiffers, LLMFinished, Noted, RunStarted, ToolFinished
from harness.testing import RecordingTool, ScriptedLLM, call


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[CheckpointStore]:
    store = MemoryCheckpointStore() if request.param == "memory" else SQLiteCheckpointStore(tmp_path / "runs.db")
    yield store
    await store.close()


@tool(effect="read")
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def wire(store: CheckpointStore, llm: object, *tools: object, **agent: object) -> AgentRuntime:
    config = AgentConfig("a", "adds", "You add.", **agent)
    return AgentRuntime(llm=llm, agents=[config], tools=tools or [add], checkpoint_store=store)


async def test_a_run_answers_and_streams_what_it_does(store: CheckpointStore) -> None:
    runtime = wire(store, ScriptedLLM([call("add", a=1, b=2), "It is 3."]))
    async with runtime.run_agent_stream("a", "1 + 2?") as events:
        seen = [(e.type.value, dict(e.payload)) async for e in events]
    assert [kind for kind, _ in seen] == ["STARTED", "THOUGHT", "ACTION", "OBSERVATION", "THOUGHT", "TASK_DONE"]
    assert seen[2][1] == {"step": 1, "tool": "add", "args": {"a": 1, "b": 2}}
    assert seen[3][1] == {"step": 1, "tool": "add", "observation": "3", "status": "ok"}
    assert seen[5][1]["answer"] == "It is 3."
    assert isinstance(events.result, Finished)
    assert events.result["answer"] == "It is 3."
    assert events.result["steps"] == 2
    assert set(events.result.budget) >= {"cost_usd", "elapsed_seconds", "tokens", "breakdown"}
    assert isinstance(events.result.trace[0].record, RunStarted)


async def test_stream_and_result_agree_and_tokens_come_only_when_asked_for(store: CheckpointStore) -> None:
    runtime = wire(store, ScriptedLLM(["one two three"]))
    quiet = [e.type.value async for e in runtime.run_agent_stream("a", "x")]
    assert "TOKEN" not in quiet
    async with runtime.run_agent_stream("a", "x", tokens=True) as events:
        loud = [e async for e in events]
    assert "".join(e.token for e in loud).split() == ["one", "two", "three"]


async def test_parallel_calls_run_in_parallel_and_are_shown_in_call_order(store: CheckpointStore) -> None:
    gate = asyncio.Barrier(3)
    order: list[int] = []

    @tool(effect="read")
    async def meet(n: int) -> int:
        await gate.wait()
        await asyncio.sleep(0.01 * (3 - n))
        order.append(n)
        return n

    llm = ScriptedLLM([[call("meet", n=n) for n in range(3)], "met"])
    result = await wire(store, llm, meet).run_agent("a", "meet")
    assert result.answer == "met"
    assert order == [2, 1, 0]
    shown = [part.text for part in llm.requests[1].messages[-1].parts if isinstance(part, ToolResult)]
    assert shown == ["0", "1", "2"]


async def test_at_most_max_parallel_tools_run_at_once(store: CheckpointStore) -> None:
    running = most = 0

    @tool(effect="read")
    async def busy(n: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002)
        running -= 1
        return n

    llm = ScriptedLLM([[call("busy", n=n) for n in range(9)], "ok"])
    await wire(store, llm, busy, max_parallel_tools=3).run_agent("a", "x")
    assert most == 3


async def test_a_finished_run_returns_its_result_and_costs_nothing_again(store: CheckpointStore) -> None:
    llm = ScriptedLLM(["done"])
    runtime = wire(store, llm)
    first = await runtime.run_agent("a", "x", run_id="mine")
    again = await runtime.run_agent("a", "x", run_id="mine")
    resumed = await runtime.resume("mine:a")
    assert first.answer == again.answer == resumed.answer == "done"
    assert len(llm.requests) == 1
    with pytest.raises(RunIdTaken, match="another goal"):
        await runtime.run_agent("a", "something else", run_id="mine")


async def test_starting_an_id_twice_at_once_runs_it_once(store: CheckpointStore) -> None:
    llm = ScriptedLLM(["done"], delay_s=0.01)
    runtime = wire(store, llm)
    results = await asyncio.gather(*(runtime.run_agent("a", "x", run_id="same") for _ in range(5)))
    assert {result.answer for result in results} == {"done"}
    assert len(llm.requests) == 1


async def test_two_runtimes_cannot_drive_one_run(store: CheckpointStore) -> None:
    slow = wire(store, ScriptedLLM(["done"], delay_s=0.2))
    first = asyncio.create_task(slow.run_agent("a", "x", run_id="same"))
    await asyncio.sleep(0.05)
    with pytest.raises(OwnershipLost, match="process"):
        await wire(store, ScriptedLLM(["done"])).run_agent("a", "x", run_id="same")
    assert (await first).answer == "done"


async def test_wrong_arguments_and_unknown_tools_go_back_to_the_model_all_at_once(store: CheckpointStore) -> None:
    llm = ScriptedLLM([[call("add", a="x", c=1), call("ad", a=1)], "sorry"])
    async with wire(store, llm).run_agent_stream("a", "x") as events:
        seen = [e async for e in events]
    invalid = [e for e in seen if isinstance(e, Observation)]
    assert [e.status for e in invalid] == ["invalid", "invalid"]
    assert "a" in invalid[0].observation
    assert "b" in invalid[0].observation
    assert "unknown tool 'ad'" in invalid[1].observation


async def test_whatever_a_tool_raises_the_model_sees_it(store: CheckpointStore) -> None:
    @tool(effect="read")
    async def fail(how: str) -> object:
        if how == "exit":
            raise SystemExit(3)
        if how == "cancel":
            raise asyncio.CancelledError
        if how == "tool":
            raise ToolError("no such thing")
        if how == "strange":
            return object()
        return 1 / 0

    calls = [call("fail", how=how) for how in ("exit", "cancel", "tool", "strange", "zero")]
    async with wire(store, ScriptedLLM([calls, "ok"]), fail).run_agent_stream("a", "x") as events:
        seen = [e.observation async for e in events if isinstance(e, Observation)]
    text = "\n".join(seen)
    assert isinstance(events.result, Finished)
    for word in ("SystemExit", "CancelledError", "no such thing", "ZeroDivisionError"):
        assert word in text
    statuses = [e.record.status for e in events.result.trace if isinstance(e.record, ToolFinished)]
    assert sorted(statuses) == ["error", "error", "error", "error", "unrepresentable"]


async def test_a_long_result_is_cut_for_the_model_and_whole_in_the_store(store: CheckpointStore) -> None:
    whole = "line\n" * 100_000

    @tool(effect="read")
    async def big() -> str:
        return whole

    llm = ScriptedLLM([call("big"), "ok"])
    result = await wire(store, llm, big, max_result_chars=1000).run_agent("a", "x")
    [finished] = [e.record for e in result.trace if isinstance(e.record, ToolFinished)]
    assert len(finished.text) < 1200
    assert f"of {len(whole)} characters cut here" in finished.text
    assert finished.cut is not None
    assert (await store.get_blob(result.run_id, finished.cut.blob)).decode() == whole


async def test_unusable_replies_are_shown_to_the_model_a_bounded_number_of_times(store: CheckpointStore) -> None:
    bad = LLMResponse((Text("{"),), "stop", malformed="not JSON")
    llm = ScriptedLLM([bad, bad, "fine"])
    result = await wire(store, llm).run_agent("a", "x")
    assert result.answer == "fine"
    assert "not JSON" in llm.requests[1].messages[-1].text
    result = await wire(store, ScriptedLLM([bad] * 9), max_reply_errors=2).run_agent("a", "x")
    assert isinstance(result, Failed)
    assert result.reason == "malformed"


async def test_a_cut_reply_is_never_acted_on(store: CheckpointStore, tmp_path: Path) -> None:
    send = RecordingTool("send", tmp_path / "log")
    cut = LLMResponse((call("send", x=1),), "length")
    result = await wire(store, ScriptedLLM([cut, "short"]), send).run_agent("a", "x")
    assert result.answer == "short"
    assert send.effects() == []
    assert any(isinstance(e.record, Noted) and e.record.reason == "length" for e in result.trace)


async def test_transient_faults_are_tried_again_and_others_are_not(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, _high: low)
    down = LLMError("down", transient=True)
    llm = ScriptedLLM([down, down, "up"])
    assert (await wire(store, llm).run_agent("a", "x")).answer == "up"
    assert len(llm.requests) == 3
    llm = ScriptedLLM([LLMError("no such model"), "never"])
    failed = await wire(store, llm).run_agent("a", "x")
    assert isinstance(failed, Failed)
    assert failed.reason == "llm"
    assert "no such model" in failed.error
    assert len(llm.requests) == 1


async def test_a_failed_run_goes_on_when_it_is_resumed(store: CheckpointStore) -> None:
    llm = ScriptedLLM([call("add", a=1, b=1), LLMError("down"), call("add", a=2, b=2), "done"])
    runtime = wire(store, llm)
    failed = await runtime.run_agent("a", "x")
    assert isinstance(failed, Failed)
    async with runtime.resume_stream(failed.run_id) as events:
        kinds = [e.type.value async for e in events]
    assert kinds[0] == "RESUMED"
    assert events.result is not None
    assert events.result.answer == "done"
    assert len(llm.requests) == 4


async def test_max_steps_fails_and_a_resume_gets_as_many_again(store: CheckpointStore) -> None:
    llm = ScriptedLLM([*(call("add", a=n, b=n) for n in range(5)), "done"])
    runtime = wire(store, llm, max_steps=3)
    failed = await runtime.run_agent("a", "x")
    assert isinstance(failed, Failed)
    assert failed.reason == "max_steps"
    assert (await runtime.resume(failed.run_id)).answer == "done"


async def test_repeating_without_progress_is_said_and_then_stopped(store: CheckpointStore) -> None:
    llm = ScriptedLLM([call("add", a=1, b=1)] * 20)
    failed = await wire(store, llm, max_steps=20).run_agent("a", "x")
    assert isinstance(failed, Failed)
    assert failed.reason == "no_progress"
    assert any(isinstance(e.record, Noted) and e.record.reason == "no_progress" for e in failed.trace)
    assert len(llm.requests) == 5


async def test_limits_are_folded_from_the_journal(store: CheckpointStore) -> None:
    script = [*(call("add", a=n, b=n) for n in range(9)), "done"]
    usage = Usage(input_tokens=10, output_tokens=5, cost_microusd=100_000)

    def runtime(**limits: float) -> AgentRuntime:
        return AgentRuntime(
            llm=ScriptedLLM(script, usage=usage),
            agents=[AgentConfig("a", max_steps=30)],
            tools=[add],
            checkpoint_store=store,
            guardrail_config=GuardrailConfig(**limits),
        )

    for limits, word in [
        ({"max_total_cost_usd": 0.3}, "max_total_cost_usd"),
        ({"max_llm_calls": 3}, "max_llm_calls"),
        ({"max_input_tokens": 30}, "max_input_tokens"),
        ({"max_output_tokens": 15}, "max_output_tokens"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"max_wall_time_seconds": 0}, "max_wall_time_seconds"),
    ]:
        failed = await runtime(**limits).run_agent("a", "x")
        assert isinstance(failed, Failed)
        assert failed.reason == "budget"
        assert word in failed.error
        still = await runtime(**limits).resume(failed.run_id)
        assert isinstance(still, Failed), "a resumed run keeps what it spent"
        more = await runtime(max_total_cost_usd=5).resume(failed.run_id)
        assert more.answer == "done"
        assert more.spent.llm_calls == 10


async def test_wall_time_ends_a_call_in_flight(store: CheckpointStore) -> None:
    llm = ScriptedLLM(["late"], delay_s=5)
    runtime = AgentRuntime(
        llm=llm,
        agents=[AgentConfig("a")],
        checkpoint_store=store,
        guardrail_config=GuardrailConfig(max_wall_time_seconds=0.05),
    )
    failed = await asyncio.wait_for(runtime.run_agent("a", "x"), 2)
    assert isinstance(failed, Failed)
    assert failed.reason == "budget"


async def test_a_tool_that_does_not_end_is_stopped_and_told_by_its_effect(store: CheckpointStore) -> None:
    @tool(effect="read", timeout_s=0.02)
    async def look() -> None:
        await asyncio.sleep(9)

    @tool(effect="once", timeout_s=0.02)
    async def send() -> None:
        await asyncio.sleep(9)

    llm = ScriptedLLM([[call("look"), call("send")], "ok"])
    result = await wire(store, llm, look, send).run_agent("a", "x")
    statuses = {e.record.tool: e.record.status for e in result.trace if isinstance(e.record, ToolFinished)}
    assert statuses == {"look": "timeout", "send": "unknown"}


@dataclass
class Deps:
    name: str


async def test_tools_get_the_users_own_object_and_keys_that_stay(store: CheckpointStore) -> None:
    seen: list[tuple[str, str, str]] = []

    @tool(effect="read")
    async def who(context: ToolContext[Deps]) -> str:
        seen.append((context.run_id, context.call_id, context.idempotency_key))
        context.progress("looking")
        return context.deps.name

    runtime = AgentRuntime(
        llm=ScriptedLLM([call("who"), "ok"]),
        agents=[AgentConfig("a")],
        tools=[who],
        checkpoint_store=store,
        deps=Deps("Ada"),
    )
    async with runtime.run_agent_stream("a", "x") as events:
        kinds = [e.type.value async for e in events]
    assert "PROGRESS" in kinds
    assert events.result is not None
    [finished] = [e.record for e in events.result.trace if isinstance(e.record, ToolFinished)]
    assert finished.text == "Ada"
    assert seen[0][0] == events.result.run_id
    assert len(seen[0][2]) == 32


async def test_the_model_always_sees_the_tools_schemas_and_its_own_settings(store: CheckpointStore) -> None:
    special = ScriptedLLM(["mine"], name="special")
    agents = AgentRegistry().register(AgentConfig("a", allowed_tools=["add"])).register(AgentConfig("b", llm=special))
    tools = ToolRegistry().register(add)
    llm = ScriptedLLM(["ok"])
    runtime = AgentRuntime(llm=llm, agent_registry=agents, tool_registry=tools, checkpoint_store=store)
    await runtime.run_agent("a", "x")
    assert (await runtime.run_agent("b", "x")).answer == "mine"
    [spec] = llm.requests[0].tools
    assert set(spec.schema["properties"]) == {"a", "b"}
    assert llm.requests[0].confidence is True


async def test_confidence_comes_from_the_model_or_is_one(store: CheckpointStore) -> None:
    sure = LLMResponse((Text("maybe"),), "stop", confidence=0.3)
    assert (await wire(store, ScriptedLLM([sure])).run_agent("a", "x")).confidence == 0.3
    plain = wire(store, ScriptedLLM(["yes"]), confidence_from_llm=False)
    assert (await plain.run_agent("a", "x")).confidence == 1.0


async def test_wrong_wiring_is_refused_when_it_is_built() -> None:
    with pytest.raises(ConfigError, match=r"'ad'.*did you mean 'add'"):
        AgentRuntime(llm=ScriptedLLM([]), agents=[AgentConfig("a", allowed_tools=["ad"])], tools=[add])
    with pytest.raises(ConfigError, match="registered twice"):
        AgentRuntime(llm=ScriptedLLM([]), agents=[AgentConfig("a"), AgentConfig("a")])
    with pytest.raises(ConfigError, match="complete"):
        AgentRuntime(llm=object(), agents=[AgentConfig("a")])
    with pytest.raises(ConfigError, match="agent_id"):
        AgentConfig("a:b")
    runtime = wire(MemoryCheckpointStore(), ScriptedLLM([]))
    with pytest.raises(ConfigError, match="unknown agent 'b'"):
        await runtime.run_agent("b", "x")
    with pytest.raises(RunNotFound, match="No checkpoint found for key='nope'"):
        await runtime.resume("nope")


async def test_a_changed_configuration_is_named_and_strict_refuses_it(store: CheckpointStore) -> None:
    first = wire(store, ScriptedLLM([call("add", a=1, b=1), LLMError("down")]))
    failed = await first.run_agent("a", "x")

    @tool(name="add", effect="read")
    async def other(a: int, b: int, c: int = 0) -> int:
        """Add differently."""
        return a + b + c

    second = AgentRuntime(
        llm=ScriptedLLM([call("add", a=1, b=1), "done"], name="newer"),
        agents=[AgentConfig("a", "adds", "You add up.")],
        tools=[other],
        checkpoint_store=store,
    )
    with pytest.raises(ConfigChanged, match="system prompt"):
        await second.resume(failed.run_id, strict=True)
    async with second.resume_stream(failed.run_id) as events:
        warnings = [str(e.payload["text"]) async for e in events if e.type == "WARNING"]
    for word in ("the system prompt", "'add' is defined differently", "newer"):
        assert word in warnings[0]
    assert events.result is not None
    assert events.result.answer == "done"
    assert sum(isinstance(e.record, ConfigDiffers) for e in events.result.trace) == 1


async def test_fork_copies_the_past_and_counts_its_own_spend(store: CheckpointStore) -> None:
    llm = ScriptedLLM([call("add", a=1, b=1), call("add", a=2, b=2), "done"])
    runtime = wire(store, llm)
    result = await runtime.run_agent("a", "x")
    copy = await runtime.fork(result.run_id, at=2)
    assert copy != result.run_id
    forked = await runtime.resume(copy)
    assert forked.answer == "done"
    assert forked.spent.llm_calls == 2
    assert len(llm.requests) == 5
    assert (await runtime.resume(result.run_id)).spent.llm_calls == 3
    with pytest.raises(ConfigError, match="steps 1 to 3"):
        await runtime.fork(result.run_id, at=9)


async def test_runs_lists_and_recover_goes_on_with_what_was_left(store: CheckpointStore) -> None:
    runtime = wire(store, ScriptedLLM([call("add", a=1, b=1), "done"], delay_s=0.05))
    task = asyncio.create_task(runtime.run_agent("a", "x", run_id="left"))
    await asyncio.sleep(0.07)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [(run.run_id, run.status) async for run in runtime.runs()] == [("left", "interrupted")]
    [result] = await runtime.recover()
    assert result.answer == "done"
    assert [run.status async for run in runtime.runs()] == ["finished"]


async def test_leaving_the_stream_leaves_no_task_behind(store: CheckpointStore) -> None:
    runtime = wire(store, ScriptedLLM([call("add", a=1, b=1), "done"], delay_s=0.02))
    before = asyncio.all_tasks()
    async with runtime.run_agent_stream("a", "x") as events:
        async for event in events:
            assert event.type == "STARTED"
            break
    assert asyncio.all_tasks() == before
    [run] = [run async for run in runtime.runs()]
    assert run.status == "interrupted"
    assert (await runtime.resume(run.run_id)).answer == "done"


async def test_late_viewers_see_the_run_from_its_start(store: CheckpointStore) -> None:
    runtime = wire(store, ScriptedLLM([call("add", a=1, b=1), "done"], delay_s=0.02))
    async with runtime.run_agent_stream("a", "x", run_id="seen") as first:
        head = [await anext(first) for _ in range(3)]
        async with runtime.resume_stream("seen", replay=True) as second:
            theirs = [e async for e in second]
        mine = head + [e async for e in first]
    assert [e.seq for e in mine] == [e.seq for e in theirs]
    async with runtime.resume_stream("seen", replay=True) as again:
        assert [e.type async for e in again] == [e.type for e in mine]
    async with runtime.resume_stream("seen") as last:
        [done] = [e async for e in last]
    assert isinstance(done, TaskDone)


async def test_a_slow_viewer_does_not_stop_the_run_and_gets_joined_tokens(store: CheckpointStore) -> None:
    long = " ".join(str(n) for n in range(5000))
    runtime = wire(store, ScriptedLLM([call("add", a=1, b=1), long]))
    async with runtime.run_agent_stream("a", "x", tokens=True) as events:
        await asyncio.sleep(0.05)
        seen = [e async for e in events]
    tokens = [e for e in seen if e.type == "TOKEN"]
    assert 1 <= len(tokens) < 10
    assert "".join(e.token for e in tokens).split() == long.split()


async def test_compaction_keeps_the_goal_and_is_recorded(store: CheckpointStore) -> None:
    @tool(effect="read")
    async def page(n: int) -> str:
        return f"{n} " + "word " * 100

    def script(request: LLMRequest) -> object:
        return "done" if len(llm.requests) > 9 else call("page", n=len(llm.requests))

    llm = ScriptedLLM(script, summary="pages were read")
    result = await wire(store, llm, page, working_memory_max_tokens=600, max_steps=20).run_agent("a", "the goal")
    assert result.answer == "done"
    assert result.metadata["summarizations"] == sum(
        isinstance(e.record, LLMFinished) and e.record.purpose == "compaction" for e in result.trace
    )
    assert result.summarizations >= 1
    last = llm.requests[-1].messages
    assert last[0].text.startswith("the goal")
    assert "pages were read" in last[0].text


@pytest.mark.parametrize("every", [0, 3])
async def test_checkpoint_every(tmp_path: Path, every: int) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    llm = ScriptedLLM([*(call("add", a=n, b=n) for n in range(5)), "done"])
    runtime = wire(store, llm, checkpoint_every=every)
    assert (await runtime.run_agent("a", "x", run_id="r")).answer == "done"
    stored = [entry async for entry in store.read("r")]
    assert bool(stored) is bool(every)
    await store.close()


SCRIPT = """
    import asyncio, sys
    from harness import AgentConfig, AgentRuntime, tool
    from harness.testing import ScriptedLLM, call

    @tool(effect="read")
    async def add(a: int, b: int) -> int:
        return a + b

    runtime = AgentRuntime(
        llm=ScriptedLLM([call("add", a=1, b=1), "done"], delay_s=float(sys.argv[1])),
        agents=[AgentConfig("a")], tools=[add],
    )

    async def main():
        print((await runtime.run_agent("a", "x", run_id="first")).answer)
        print((await runtime.run_agent("a", "y", run_id="second")).answer)

    asyncio.run(main())
"""


def test_a_script_resumes_without_any_code_for_it(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(SCRIPT))
    run = [sys.executable, str(script), "0"]
    first = subprocess.run(run, capture_output=True, text=True, check=True)
    assert first.stdout == "done\ndone\n"
    again = subprocess.run([*run, "--resume", "first:a"], capture_output=True, text=True, check=True)
    assert again.stdout == "done\ndone\n"
    assert again.stderr == ""
    usage = subprocess.run([*run, "--resume"], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert usage.stderr == "Usage: --resume <key>\n"


def test_args_of_an_action_are_plain_data() -> None:
    event = Action("r", "a", 1, 0.0, step=1, tool="t", args={"x": [1, {"y": None}]})
    assert event.payload["args"] == {"x": [1, {"y": None}]}
    assert event.token == event.error == ""
