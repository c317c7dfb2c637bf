"""What the edges of a run meet: models and tools that talk nonsense, processes that fork, loops that close."""

from __future__ import annotations

import asyncio
import logging
import math
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from pathlib import Path

import pytest

from harness import (
    AgentConfig,
    AgentRuntime,
    CheckpointError,
    CheckpointStore,
    ConfigError,
    Event,
    Failed,
    Finished,
    GovernedLLM,
    GuardrailConfig,
    HarnessError,
    LLMError,
    LLMSettings,
    MemoryCheckpointStore,
    NotDone,
    RateLimit,
    SQLiteCheckpointStore,
    StoreBusy,
    ToolContext,
    ToolOutput,
    Unknown,
    Usage,
    tool,
)
from harness.checkpoint.base import Owner
from harness.llm.base import LLMDelta, LLMRequest, LLMResponse, ReasoningDelta, ResponseDone, TextDelta
from harness.messages import Reasoning, Text, ToolCall
from harness.records import DriverStarted, Entry, LLMFailed, LLMFinished, ToolFinished, ToolStarted
from harness.result import RunResult
from harness.testing import CrashingStore, RecordingTool, ScriptedLLM, call, fail_appends
from harness.tools.base import ToolSpec


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[CheckpointStore]:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    yield store
    await store.close()


def wire(store: CheckpointStore, llm: object, *tools: object, **agent: object) -> AgentRuntime:
    config = AgentConfig("a", **agent)  # type: ignore[arg-type]
    return AgentRuntime(llm=llm, agents=[config], tools=tools, checkpoint_store=store)


class Stream:
    """A model whose stream yields what it is given, raises the exceptions in it and awaits the functions."""

    name = "stream"
    provider = "test"

    def __init__(self, *items: LLMDelta | BaseException | Callable[[], Awaitable[object]]) -> None:
        self.items = items
        self.calls = 0

    async def stream(self, _request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        self.calls += 1
        for item in self.items:
            if isinstance(item, BaseException):
                raise item
            if callable(item):
                await item()
            else:
                yield item


DONE = ResponseDone(LLMResponse((Text("The answer."),), "stop"))


async def journal(store: CheckpointStore, run_id: str = "r") -> list[Entry]:
    return [entry async for entry in store.read(run_id)]


def results(entries: Iterable[Entry]) -> list[ToolFinished]:
    return [entry.record for entry in entries if isinstance(entry.record, ToolFinished)]


def statuses(result: RunResult) -> dict[str, str]:
    return {record.tool: record.status for record in results(result.trace)}


async def until(done: Callable[[], object]) -> None:
    end = time.monotonic() + 5
    while not done():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


async def stopped(running: Coroutine[None, None, RunResult], when: Callable[[], object]) -> None:
    """Begin a run and cancel it, as ``asyncio.wait_for`` does, once something has come about."""
    task = asyncio.create_task(running)
    await until(when)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 2)


def run_program(text: str, *args: str | bytes) -> str:
    """Run a program in a process of its own and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *args], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def napping(seconds: float, *, begun: list[str] | None = None) -> object:
    @tool(name="slow", effect="read")
    async def nap(context: ToolContext[None]) -> str:
        """Take a moment."""
        if begun is not None:
            begun.append(context.run_id)
        await asyncio.sleep(seconds)
        return "slept"

    return nap


slow = napping(0.05)


def sleepy() -> ScriptedLLM:
    return ScriptedLLM([call("slow"), "Awake."])


# -- what a user's own objects return -----------------------------------------------------------


def quarter(text: str) -> float:
    return len(text) / 3


def negative(_text: str) -> int:
    return -5


def raising(text: str) -> int:
    raise ValueError(text)


def not_finite(_text: str) -> float:
    return math.nan


def no_number(_text: str) -> object:
    return None


@pytest.mark.parametrize("counter", [quarter, negative, raising, not_finite, no_number])
async def test_a_token_counter_that_counts_oddly_spoils_no_journal(store: CheckpointStore, counter: object) -> None:
    llm = ScriptedLLM([call("slow"), LLMError("down"), "The answer."])
    runtime = wire(store, llm, slow, token_counter=counter)
    failed = await runtime.run_agent("a", "Count this.", run_id="r")
    assert isinstance(failed, Failed)
    counts = [e.record.tokens for e in await journal(store) if hasattr(e.record, "tokens")]
    assert counts
    assert all(type(count) is int and count >= 0 for count in counts)
    assert isinstance(await runtime.resume("r"), Finished)
    assert (await runtime.resume("r")).answer == "The answer."


@pytest.mark.parametrize(("counter", "tokens"), [(quarter, 4), (negative, 0), (raising, 3)])
async def test_counts_are_rounded_up_and_a_counter_that_raises_is_replaced(
    store: CheckpointStore, counter: object, tokens: int
) -> None:
    await wire(store, ScriptedLLM(["Yes."]), token_counter=counter).run_agent("a", "Count this", run_id="r")
    assert (await journal(store))[0].record.tokens == tokens  # type: ignore[union-attr]  # RunStarted has it


NONSENSE: dict[str, dict[str, object]] = {
    "unknown finish": {"finish": "tool_use"},
    "no finish": {"finish": None},
    "no model": {"model": None},
    "surrogate model": {"model": "\ud800"},
    "surrogate response id": {"response_id": "\udfff"},
    "NaN tokens": {"usage": Usage(input_tokens=math.nan)},  # type: ignore[arg-type]
    "infinite tokens": {"usage": Usage(output_tokens=math.inf)},  # type: ignore[arg-type]
    "fractions of tokens": {"usage": Usage(10.5, 2.5, cost_microusd=12.5)},  # type: ignore[arg-type]
    "negative usage": {"usage": Usage(-1, -2, cost_microusd=-5)},
    "no usage": {"usage": None},
    "confidence in words": {"confidence": "0.9"},
    "NaN confidence": {"confidence": math.nan},
    "too confident": {"confidence": 7},
    "provider data that is no data": {"parts": (Reasoning("hm", {"a": object()}), Text("The answer."))},  # type: ignore[dict-item]
    "surrogates in provider data": {"parts": (Reasoning("hm", {"a": "\ud800"}), Text("The answer."))},
    "a part that is none": {"parts": ("The answer.",)},
    "text that is none": {"parts": (Text(None),)},  # type: ignore[arg-type]
    "a call whose arguments are no text": {"parts": (ToolCall("1", "slow", {"a": 1}),), "finish": "tool_calls"},  # type: ignore[arg-type]
    "malformed that is no text": {"malformed": None},
}


@pytest.mark.parametrize("fields", NONSENSE.values(), ids=NONSENSE)
async def test_a_reply_that_is_nonsense_is_an_answer_or_a_failed_model(
    store: CheckpointStore, fields: dict[str, object]
) -> None:
    reply = LLMResponse(**{"parts": (Text("The answer."),), "finish": "stop"} | fields)  # type: ignore[arg-type]
    result = await wire(store, Stream(ResponseDone(reply))).run_agent("a", "x", run_id="r")
    assert await journal(store) == list(result.trace), "what is stored can be read"
    if isinstance(result, Failed):
        assert result.reason == "llm"
        assert " " in result.error
    else:
        assert result.answer == "The answer."
        assert 0 <= result.confidence <= 1
    assert result.spent.usage.cost_microusd >= 0
    assert result.spent.usage.input_tokens >= 0
    assert isinstance(await wire(store, ScriptedLLM(["The answer."])).resume("r"), Finished)


@pytest.mark.parametrize(
    ("said", "confidence"), [(math.nan, 1.0), (math.inf, 1.0), (7, 1.0), (-3.0, 0.0), (0.25, 0.25), (None, 1.0)]
)
async def test_confidence_is_between_none_and_one(store: CheckpointStore, said: float, confidence: float) -> None:
    reply = LLMResponse((Text("The answer."),), "stop", confidence=said)
    result = await wire(store, ScriptedLLM([reply])).run_agent("a", "x", run_id="r")
    assert isinstance(result, Finished)
    assert result.confidence == confidence
    assert (await wire(store, ScriptedLLM([])).resume("r")).confidence == confidence


async def test_no_reply_earns_money(store: CheckpointStore) -> None:
    reply = LLMResponse((Text("The answer."),), "stop", Usage(-100, 7, cost_microusd=-5_000_000))
    result = await wire(store, ScriptedLLM([reply])).run_agent("a", "x")
    assert isinstance(result, Finished)
    assert (result.spent.usage.input_tokens, result.spent.usage.output_tokens) == (0, 7)
    assert result.budget["cost_usd"] == 0


class Wordless(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class RaisesAtOnce(Stream):
    def stream(self, _request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        raise LLMError("no such model")


class StreamsNothing(Stream):
    def stream(self, _request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        return None  # type: ignore[return-value]


class ClosesBadly(Stream):
    """A stream of its own class, whose ``aclose`` fails."""

    def stream(self, _request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        self.calls += 1
        rest = iter(self.items)

        class Reply:
            def __aiter__(self) -> AsyncIterator[LLMDelta]:
                return self

            async def __anext__(self) -> LLMDelta:
                for item in rest:
                    if isinstance(item, BaseException):
                        raise item
                    return item  # type: ignore[return-value]
                raise StopAsyncIteration

            async def aclose(self) -> None:
                raise RuntimeError("the socket is gone")

        return Reply()


@pytest.mark.parametrize(
    "llm",
    [
        RaisesAtOnce(),
        ClosesBadly(LLMError("no such model")),
        ClosesBadly(),
        Stream(asyncio.CancelledError()),
        Stream(Wordless()),
        Stream(ResponseDone(None)),  # type: ignore[arg-type]
        StreamsNothing(),
    ],
    ids=[
        "raises at once",
        "closes badly",
        "ends and closes badly",
        "cancels itself",
        "raises without words",
        "replies nothing",
        "is no stream",
    ],
)
async def test_a_model_that_breaks_is_a_failed_model(store: CheckpointStore, llm: object) -> None:
    result = await wire(store, llm, max_llm_attempts=1).run_agent("a", "x", run_id="r")
    assert isinstance(result, Failed)
    assert result.reason == "llm"
    assert result.error
    assert not (task := asyncio.current_task()) or task.cancelling() == 0
    assert (await wire(store, ScriptedLLM(["The answer."])).resume("r")).answer == "The answer."


@pytest.mark.parametrize(
    "llm",
    [
        Stream(DONE, ConnectionError("while closing")),
        Stream(DONE, LLMError("while closing", transient=True)),
        Stream(DONE, lambda: asyncio.sleep(30)),
        ClosesBadly(DONE),
    ],
    ids=["raises", "raises an LLMError", "hangs", "closes badly"],
)
async def test_a_reply_that_is_whole_counts_whatever_its_stream_does_then(store: CheckpointStore, llm: Stream) -> None:
    settings = LLMSettings(silence_timeout_s=0.05)
    runtime = wire(store, llm, llm_settings=settings, max_llm_attempts=2)
    result = await asyncio.wait_for(runtime.run_agent("a", "x"), 2)
    assert (result.answer, llm.calls) == ("The answer.", 1)
    assert not [entry for entry in result.trace if isinstance(entry.record, LLMFailed)]
    assert sum(isinstance(entry.record, LLMFinished) for entry in result.trace) == 1


class OwnTool:
    """A tool of somebody's own, as bare as the port allows."""

    spec = ToolSpec("own", "Do something.", {"type": "object"})

    def __init__(self, output: object = "plain text", *, refuses: Exception | None = None) -> None:
        self.output = output
        self.refuses = refuses
        self.runs = 0

    def validate(self, _arguments: str, /) -> Mapping[str, object]:
        if self.refuses is not None:
            raise self.refuses
        return {}

    async def __call__(self, _args: Mapping[str, object], _context: ToolContext[object], /) -> object:
        self.runs += 1
        if isinstance(self.output, Exception):
            raise self.output
        return self.output


OUTPUTS: dict[str, object] = {
    "a plain text": "plain text",
    "nothing": None,
    "a number as text": ToolOutput(7),  # type: ignore[arg-type]
    "an image that is none": ToolOutput("x", ("y",)),  # type: ignore[arg-type]
    "an exception without words": Wordless(),
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
async def test_whatever_a_tool_of_ones_own_returns_the_run_goes_on(store: CheckpointStore, output: object) -> None:
    own = OwnTool(output)
    llm = ScriptedLLM([call("own"), "So be it."])
    result = await wire(store, llm, own).run_agent("a", "x", run_id="r")
    assert (result.answer, own.runs, len(llm.requests)) == ("So be it.", 1, 2)
    assert statuses(result)["own"] in ("ok", "error", "unrepresentable")
    assert (await wire(store, ScriptedLLM([])).resume("r")).answer == "So be it."


@pytest.mark.parametrize("error", [ValueError("not like this"), Wordless()])
async def test_whatever_validate_raises_the_model_sees_it(store: CheckpointStore, error: Exception) -> None:
    own = OwnTool(refuses=error)
    result = await wire(store, ScriptedLLM([call("own"), "So be it."]), own).run_agent("a", "x", run_id="r")
    assert (result.answer, own.runs) == ("So be it.", 0)
    [refused] = results(result.trace)
    assert refused.status in ("invalid", "error")
    assert type(error).__name__ in refused.text or str(error) in refused.text


async def test_an_exception_without_words_is_a_tool_error(store: CheckpointStore) -> None:
    @tool
    async def fails() -> str:
        """Fail."""
        raise Wordless

    result = await wire(store, ScriptedLLM([call("fails"), "So be it."]), fails).run_agent("a", "x")
    assert result.answer == "So be it."
    [failed] = results(result.trace)
    assert failed.status == "error"
    assert "Wordless" in failed.text


# -- stopping, limits and stores that fail ------------------------------------------------------


async def test_no_tool_starts_after_the_wall_time_is_over(store: CheckpointStore) -> None:
    sent: list[int] = []

    @tool(effect="once")
    async def send(n: int) -> str:
        """Send."""
        sent.append(n)
        await asyncio.sleep(0.06)
        return f"sent {n}"

    llm = ScriptedLLM([[call("send", n=n) for n in range(4)], "Sent."])

    def runtime(seconds: float) -> AgentRuntime:
        return AgentRuntime(
            llm=llm,
            agents=[AgentConfig("a", max_parallel_tools=1)],
            tools=[send],
            checkpoint_store=store,
            guardrail_config=GuardrailConfig(max_wall_time_seconds=seconds),
        )

    failed = await runtime(0.1).run_agent("a", "x", run_id="r")
    assert isinstance(failed, Failed)
    assert failed.reason == "budget"
    assert len(sent) <= 2
    started = {entry.record.index for entry in await journal(store) if isinstance(entry.record, ToolStarted)}
    assert started >= set(sent)
    result = await runtime(60).resume("r")
    assert result.answer == "Sent."
    assert sorted(sent) == [0, 1, 2, 3]
    assert sorted(record.index for record in results(result.trace)) == [0, 1, 2, 3]


async def test_a_stopped_run_starts_nothing_more_when_a_tool_swallows_its_cancellation(
    store: CheckpointStore, tmp_path: Path
) -> None:
    begun: list[None] = []

    @tool
    async def stubborn() -> str:
        """Wait, and think nothing of being cancelled."""
        begun.append(None)
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            return "I go on."
        return ""

    pay = RecordingTool("pay", tmp_path / "fx")
    llm = ScriptedLLM([call("stubborn"), call("pay"), "Paid."])
    runtime = wire(store, llm, stubborn, pay)
    await stopped(runtime.run_agent("a", "x", run_id="r"), lambda: begun)
    await asyncio.sleep(0.02)
    assert (len(llm.requests), pay.effects()) == (1, [])
    assert (await runtime.resume("r")).answer == "Paid."
    assert len(pay.effects()) == 1


async def test_a_tool_that_turns_its_cancellation_into_another_error_does_not_go_on_either(
    store: CheckpointStore, tmp_path: Path
) -> None:
    begun: list[None] = []

    @tool
    async def stubborn() -> str:
        """Wait, and fail when cancelled."""
        begun.append(None)
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            raise BaseExceptionGroup("stopped", [ValueError("1")]) from None
        return ""

    pay = RecordingTool("pay", tmp_path / "fx")
    llm = ScriptedLLM([call("stubborn"), call("pay"), "Paid."])
    runtime = wire(store, llm, stubborn, pay)
    await stopped(runtime.run_agent("a", "x", run_id="r"), lambda: begun)
    assert (len(llm.requests), pay.effects()) == (1, [])
    assert (await runtime.resume("r")).answer == "Paid."


@pytest.mark.parametrize("order", [["big", "pay"], ["pay", "big"]], ids=" then ".join)
async def test_a_call_whose_result_cannot_be_kept_takes_no_finished_one_with_it(
    store: CheckpointStore, tmp_path: Path, order: list[str]
) -> None:
    def full(_when: str, _data: bytes) -> None:
        raise CheckpointError("the disk is full")

    pay = RecordingTool("pay", tmp_path / "fx", result="paid")
    big = RecordingTool("big", tmp_path / "fx", effect="read", result="y" * 50_000)
    llm = ScriptedLLM([[call(name) for name in order], "Paid."])
    with pytest.raises(CheckpointError, match="the disk is full"):
        await wire(CrashingStore(store, on_blob=full), llm, pay, big).run_agent("a", "x", run_id="r")
    assert [(record.tool, record.text) for record in results(await journal(store))] == [("pay", "paid")]
    result = await wire(store, llm, pay, big).resume("r")
    assert (statuses(result)["pay"], len(pay.effects())) == ("ok", 1)


class Clings(CrashingStore):
    """A store that does not give a run up."""

    async def release(self, owner: Owner, /) -> None:
        raise StoreBusy("the database is locked")


async def test_a_finished_run_is_finished_although_its_store_does_not_let_go() -> None:
    runtime = wire(Clings(MemoryCheckpointStore()), ScriptedLLM(["Done."]))
    assert isinstance(await runtime.run_agent("a", "x", run_id="r"), Finished)
    assert (await runtime.resume("r")).answer == "Done."


async def test_a_run_kept_in_memory_only_can_be_resumed_while_its_runtime_lives(store: CheckpointStore) -> None:
    runtime = wire(store, ScriptedLLM([LLMError("down"), "Up."]), checkpoint_every=0)
    failed = await runtime.run_agent("a", "x")
    assert isinstance(failed, Failed)
    assert (await runtime.resume(failed.run_id)).answer == "Up."
    assert (await runtime.resume(f"{failed.run_id}:a")).answer == "Up."
    assert await journal(store, failed.run_id) == []


async def test_one_run_that_cannot_be_recovered_does_not_hide_the_others(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    for run_id, prompt in [("first", "New."), ("other", "Old."), ("last", "New.")]:
        dying = CrashingStore(store, on_append=fail_appends(CheckpointError("the disk is full"), first=2, times=None))
        with pytest.raises(CheckpointError):
            await wire(dying, ScriptedLLM([run_id]), system_prompt=prompt).run_agent("a", "x", run_id=run_id)
    runtime = AgentRuntime(
        llm=ScriptedLLM(["Done."]),
        agents=[AgentConfig("a", system_prompt="New.")],
        checkpoint_store=store,
        strict=True,
    )
    with caplog.at_level(logging.WARNING, "harness"):
        recovered = await runtime.recover()
    assert {(result.run_id, result.answer) for result in recovered} == {("first", "Done."), ("last", "Done.")}
    assert any("'other'" in record.getMessage() for record in caplog.records)


# -- forks of runs ------------------------------------------------------------------------------


class Asked(RecordingTool):
    """Counts how often it was asked what became of a call."""

    asked = 0

    async def reconcile(
        self, args: Mapping[str, object], context: ToolContext[object], /
    ) -> ToolOutput | NotDone | Unknown:
        self.asked += 1
        return await super().reconcile(args, context)


async def test_a_fork_leaves_a_call_in_doubt_to_the_run_it_came_from(store: CheckpointStore, tmp_path: Path) -> None:
    pay = Asked("pay", tmp_path / "fx", delay_s=30, reconciles=True)
    llm = ScriptedLLM([call("pay"), "Paid."])
    runtime = wire(store, llm, pay)
    await stopped(runtime.run_agent("a", "x", run_id="r"), pay.effects)
    assert results(await journal(store)) == []

    fork = await runtime.fork("r", at=2)
    result = await asyncio.wait_for(runtime.resume(fork), 2)
    assert (result.answer, statuses(result)) == ("Paid.", {"pay": "unknown"})
    assert (pay.asked, len(pay.effects())) == (0, 1)
    assert statuses(await runtime.resume("r")) == {"pay": "reconciled"}


async def test_the_deadline_of_a_call_that_was_settled_hits_nothing_that_comes_after_it(
    store: CheckpointStore, tmp_path: Path
) -> None:
    pay = RecordingTool("pay", tmp_path / "fx", delay_s=30, timeout_s=0.2, reconciles=True)
    limit, let_go = RateLimit(max_concurrent=1), asyncio.Event()
    runtime = wire(store, GovernedLLM(ScriptedLLM([call("pay"), "Paid."]), limit), pay)
    await stopped(runtime.run_agent("a", "x", run_id="r"), pay.effects)

    other = GovernedLLM(Stream(let_go.wait, ResponseDone(LLMResponse((Text("Done."),), "stop"))), limit)
    holds = asyncio.create_task(wire(MemoryCheckpointStore(), other).run_agent("a", "Take the only turn."))
    asyncio.get_running_loop().call_later(0.5, let_go.set)
    result = await asyncio.wait_for(runtime.resume("r"), 10)
    assert (result.answer, statuses(result)) == ("Paid.", {"pay": "reconciled"})
    assert (await holds).answer == "Done."


def counting(upto: int) -> ScriptedLLM:
    return ScriptedLLM([*(call("count", n=n) for n in range(upto)), "Counted."])


@pytest.mark.parametrize("at", [None, 3, 4])
async def test_a_fork_of_a_run_at_its_last_step_gets_as_many_again(
    store: CheckpointStore, tmp_path: Path, at: int | None
) -> None:
    count = RecordingTool("count", tmp_path / "fx", effect="read")
    runtime = wire(store, counting(4), count, max_steps=3)
    failed = await runtime.run_agent("a", "x", run_id="r")
    assert isinstance(failed, Failed)
    assert failed.reason == "max_steps"
    assert (await runtime.resume(await runtime.fork("r", at=at))).answer == "Counted."


async def test_a_fork_of_a_run_that_was_resumed_past_its_limit_goes_on(store: CheckpointStore, tmp_path: Path) -> None:
    count = RecordingTool("count", tmp_path / "fx", effect="read")
    llm = counting(5)
    runtime = wire(store, llm, count, max_steps=3)
    assert isinstance(await runtime.run_agent("a", "x", run_id="r"), Failed)
    assert isinstance(await runtime.resume("r"), Finished)
    paid = len(llm.requests)
    assert (await runtime.resume(await runtime.fork("r", at=6))).answer == "Counted."
    assert len(llm.requests) == paid + 1


async def test_a_fork_of_a_run_whose_model_failed_asks_it_again(store: CheckpointStore) -> None:
    llm = ScriptedLLM([LLMError("down"), "Up."])
    runtime = wire(store, llm)
    assert isinstance(await runtime.run_agent("a", "x", run_id="r"), Failed)
    assert (await runtime.resume(await runtime.fork("r", at=2))).answer == "Up."
    assert len(llm.requests) == 2


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_id", ["nightly:7", "100%41", "a%3Ab:c", "a:b:c"])
async def test_a_run_can_be_resumed_by_the_id_in_its_result(store: CheckpointStore, run_id: str) -> None:
    runtime = wire(store, ScriptedLLM([call("slow"), LLMError("down"), "Up."]), slow)
    failed = await runtime.run_agent("a", "x", run_id=run_id)
    assert isinstance(failed, Failed)
    assert (await runtime.resume(failed.run_id)).answer == "Up."
    async with runtime.resume_stream(failed.run_id) as events:
        assert [event.type.value async for event in events][-1] == "TASK_DONE"
    assert events.run_id == run_id


@pytest.mark.parametrize("run_id", ["nightly:7", "100%41"])
async def test_a_run_can_be_forked_by_the_id_in_its_result(store: CheckpointStore, run_id: str) -> None:
    runtime = wire(store, ScriptedLLM([call("slow"), "Up."]), slow)
    done = await runtime.run_agent("a", "x", run_id=run_id)
    fork = await runtime.fork(done.run_id, run_id=f"{run_id}:again")
    assert fork == f"{run_id}:again"
    assert (await runtime.resume(fork)).answer == "Up."


async def test_a_run_id_with_half_a_character_is_refused(store: CheckpointStore) -> None:
    runtime = wire(store, ScriptedLLM(["Yes."]))
    with pytest.raises(
        ConfigError, match=r"run_id cannot be written as UTF-8: it has half a character, '\\udcfc', at 1"
    ):
        await runtime.run_agent("a", "x", run_id="f\udcfcr")
    assert [run async for run in runtime.runs()] == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"checkpoint_store": "runs.db"}, r"takes a store: SQLiteCheckpointStore\('runs.db'\)"),
        ({"checkpoint_store": Path("runs.db")}, r"takes a store: SQLiteCheckpointStore\('runs.db'\)"),
        ({"guardrail_config": {"max_llm_calls": 2}}, "takes a GuardrailConfig, not dict"),
    ],
)
def test_a_path_is_no_store_and_a_dict_holds_no_limits(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AgentRuntime(llm=ScriptedLLM([]), agents=[AgentConfig("a")], **given)  # type: ignore[arg-type]


async def test_an_empty_run_id_is_refused(store: CheckpointStore) -> None:
    runtime = wire(store, ScriptedLLM(["Yes."]))
    with pytest.raises(ConfigError, match="run_id"):
        await runtime.run_agent("a", "x", run_id="")
    with pytest.raises(ConfigError, match="run_id"):
        async with runtime.run_agent_stream("a", "x", run_id=""):
            pass
    assert [run async for run in runtime.runs()] == []


async def test_a_goal_no_encoding_likes_names_the_same_run_twice(store: CheckpointStore) -> None:
    llm = ScriptedLLM(["Yes."])
    first = await wire(store, llm).run_agent("a", "Say \ud800.", run_id="r")
    again = await wire(store, llm).run_agent("a", "Say \ud800.", run_id="r")
    assert (first.answer, again.answer, len(llm.requests)) == ("Yes.", "Yes.", 1)


# -- viewers and waiters ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_a_run_whose_stream_was_abandoned_can_be_resumed_at_once(store: CheckpointStore) -> None:
    runtime = wire(store, sleepy(), slow)
    async for _ in runtime.run_agent_stream("a", "x", run_id="r"):
        break
    assert (await runtime.resume("r")).answer == "Awake."


async def test_a_run_whose_stream_was_left_can_be_resumed_at_once(store: CheckpointStore) -> None:
    runtime = wire(store, sleepy(), slow)
    async with runtime.run_agent_stream("a", "x", run_id="r") as events:
        async for _ in events:
            break
    assert (await runtime.resume("r")).answer == "Awake."


async def test_a_run_whose_stream_is_being_left_can_be_resumed(store: CheckpointStore) -> None:
    runtime = wire(store, sleepy(), slow)
    events = runtime.run_agent_stream("a", "x", run_id="r")
    await anext(events)
    leaving = asyncio.create_task(events.aclose())
    await asyncio.sleep(0)
    assert (await runtime.resume("r")).answer == "Awake."
    await leaving


async def test_closing_the_runtime_tells_those_who_wait(store: CheckpointStore) -> None:
    begun: list[str] = []
    runtime = wire(store, sleepy(), napping(30, begun=begun))
    waiting = asyncio.create_task(runtime.run_agent("a", "x", run_id="r"))
    viewing = asyncio.create_task(_all(runtime.run_agent_stream("a", "y", run_id="s")))
    await until(lambda: len(begun) == 2)
    await runtime.aclose()
    for task in (waiting, viewing):
        with pytest.raises(HarnessError) as raised:
            await task
        assert str(raised.value)
    assert (await wire(store, sleepy(), slow).resume("r")).answer == "Awake."


@pytest.mark.parametrize("turns", range(1, 8))
async def test_closing_the_runtime_tells_those_who_have_just_begun(turns: int) -> None:
    store = MemoryCheckpointStore()
    runtime = wire(store, sleepy(), slow)
    waiting = asyncio.create_task(runtime.run_agent("a", "x", run_id="r"))
    for _ in range(turns):
        await asyncio.sleep(0)
    await runtime.aclose()
    await asyncio.wait({waiting}, timeout=2)
    assert waiting.done()
    assert not waiting.cancelled()
    error = waiting.exception()
    assert isinstance(error, HarnessError) if error else waiting.result().answer == "Awake."


async def _all(events: AsyncIterator[Event]) -> list[str]:
    return [event.type.value async for event in events]


async def test_waiting_for_an_event_in_vain_does_not_end_the_stream(store: CheckpointStore) -> None:
    runtime = wire(store, sleepy(), slow)
    seen: list[str] = []
    in_vain = 0
    async with runtime.run_agent_stream("a", "x") as events:
        while True:
            try:
                seen.append((await asyncio.wait_for(anext(events), 0.01)).type.value)
            except TimeoutError:
                in_vain += 1
            except StopAsyncIteration:
                break
    assert in_vain
    assert seen == ["STARTED", "THOUGHT", "ACTION", "OBSERVATION", "THOUGHT", "TASK_DONE"]
    assert isinstance(events.result, Finished)


async def test_a_stream_has_one_reader_at_a_time(store: CheckpointStore) -> None:
    runtime = wire(store, sleepy(), slow)
    async with runtime.run_agent_stream("a", "x") as events:
        while (await anext(events)).type != "ACTION":
            pass
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        with pytest.raises(ConfigError):
            await asyncio.wait_for(anext(events), 1)
        assert (await asyncio.wait_for(first, 1)).type == "OBSERVATION"
        assert (await asyncio.wait_for(_all(events), 1))[-1] == "TASK_DONE"


async def test_two_readers_that_open_one_stream_start_one_run(store: CheckpointStore) -> None:
    llm = sleepy()
    runtime = wire(store, llm, slow)
    events = runtime.run_agent_stream("a", "x")
    readers = asyncio.gather(_all(events), _all(events), return_exceptions=True)
    got = await asyncio.wait_for(readers, 2)
    assert [type(one) for one in got].count(list) == 1
    assert sum(isinstance(one, ConfigError) for one in got) == 1
    assert len(llm.requests) == 2
    assert len([run async for run in runtime.runs()]) == 1


async def test_progress_of_a_tool_in_a_thread_is_shown_while_it_runs(store: CheckpointStore) -> None:
    seen = threading.Event()

    @tool(effect="read")
    def look(context: ToolContext[None]) -> str:
        """Look."""
        context.progress("looking")
        return "seen" if seen.wait(2) else "not seen"

    async with wire(store, ScriptedLLM([call("look"), "Done."]), look).run_agent_stream("a", "x") as events:
        async for event in events:
            if event.type == "PROGRESS":
                seen.set()
    assert events.result is not None
    assert [record.text for record in results(events.result.trace)] == ["seen"]


async def test_no_progress_is_shown_of_a_run_that_is_over(store: CheckpointStore) -> None:
    contexts: list[ToolContext[None]] = []

    @tool(effect="read")
    async def look(context: ToolContext[None]) -> str:
        """Look."""
        contexts.append(context)
        context.progress("looking")
        return "seen"

    runtime = wire(store, ScriptedLLM([call("look"), "Done."]), look)
    async with runtime.run_agent_stream("a", "x", run_id="r") as events:
        await runtime.run_agent("a", "x", run_id="r")
        contexts[0].progress("too late")
        await asyncio.to_thread(contexts[0].progress, "too late")
        await asyncio.sleep(0)
        seen = await _all(events)
    assert seen.count("PROGRESS") == 1
    assert seen[-1] == "TASK_DONE"


class CutOnce(Stream):
    """Cut at its first call; at the second it changes between text and reasoning hundreds of times."""

    async def stream(self, _request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        self.calls += 1
        if self.calls == 1:
            yield TextDelta("cut")
            await asyncio.sleep(0.01)
            raise LLMError("the line is cut", transient=True, retry_after_s=0)
        for n in range(400):
            yield (TextDelta if n % 2 else ReasoningDelta)(f"{n} ")
        yield DONE


async def test_a_slow_viewer_is_always_told_to_take_tokens_back(store: CheckpointStore) -> None:
    runtime = wire(store, CutOnce())
    async with runtime.run_agent_stream("a", "x", run_id="r", tokens=True) as events:
        async for event in events:
            if event.token == "cut":
                break
        await runtime.run_agent("a", "x", run_id="r")  # the viewer sees nothing until the run is over
        seen = await _all(events)
    assert "DISCARDED" in seen
    assert seen[-1] == "TASK_DONE"


# -- processes and event loops ------------------------------------------------------------------


def test_a_run_whose_event_loop_was_closed_can_be_resumed_in_another(tmp_path: Path) -> None:
    # A process of its own: what a closed loop leaves behind is told to whoever collects it.
    program = """
        import asyncio, os, sys
        from harness import AgentConfig, AgentRuntime, SQLiteCheckpointStore, tool
        from harness.testing import ScriptedLLM, call

        seconds = 30

        @tool(effect="read")
        async def wait() -> str:
            await asyncio.sleep(seconds)
            return "waited"

        llm = ScriptedLLM([call("wait"), "Awake."])
        store = SQLiteCheckpointStore(sys.argv[1])
        runtime = AgentRuntime(llm=llm, agents=[AgentConfig("a")], tools=[wait], checkpoint_store=store)

        async def begin():
            running = asyncio.create_task(runtime.run_agent("a", "x", run_id="r"))
            while not llm.requests:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.02)
            return running

        loop = asyncio.new_event_loop()
        running = loop.run_until_complete(begin())
        loop.close()
        seconds = 0
        print(asyncio.run(asyncio.wait_for(runtime.resume("r"), 5)).answer, len(llm.requests), flush=True)
        os._exit(0)
    """
    assert run_program(program, str(tmp_path / "runs.db")) == "Awake. 2\n"


def test_a_runtime_made_before_a_fork_claims_as_the_process_that_drives(tmp_path: Path) -> None:
    program = """
        import asyncio, os, sys
        from harness import AgentConfig, AgentRuntime, SQLiteCheckpointStore
        from harness.testing import ScriptedLLM

        store = SQLiteCheckpointStore(sys.argv[1])
        runtime = AgentRuntime(llm=ScriptedLLM(["Done."]), agents=[AgentConfig("a")], checkpoint_store=store)
        child = os.fork()
        if child == 0:
            asyncio.run(runtime.run_agent("a", "x", run_id="r"))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(child)
    """
    child = int(run_program(program, str(tmp_path / "runs.db")))

    async def read() -> list[Entry]:
        store = SQLiteCheckpointStore(tmp_path / "runs.db")
        try:
            return await journal(store)
        finally:
            await store.close()

    drivers = [entry.record for entry in asyncio.run(read()) if isinstance(entry.record, DriverStarted)]
    assert [driver.process.pid for driver in drivers] == [child]


def test_an_argument_that_is_no_text_keeps_no_run_from_starting(tmp_path: Path) -> None:
    program = """
        import asyncio, sys
        from harness import AgentConfig, AgentRuntime, SQLiteCheckpointStore
        from harness.testing import ScriptedLLM

        async def main():
            store = SQLiteCheckpointStore(sys.argv[1])
            runtime = AgentRuntime(llm=ScriptedLLM(["Done."]), agents=[AgentConfig("a")], checkpoint_store=store)
            await runtime.run_agent("a", "x", run_id="r")
            [first, *_] = [entry async for entry in store.read("r")]
            await store.close()
            print(len(first.record.origin.command), (await runtime.resume("r")).answer)

        asyncio.run(main())
    """
    assert run_program(program, str(tmp_path / "runs.db"), b"caf\xe9").split()[-1] == "Done."
