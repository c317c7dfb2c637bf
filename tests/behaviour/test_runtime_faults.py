"""Faults a run survives: stores that refuse, tools that misbehave, providers that are down, viewers that leave."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from harness import (
    AgentConfig,
    AgentRuntime,
    CheckpointError,
    CheckpointStore,
    Failed,
    FileCheckpointStore,
    Finished,
    LLMError,
    MemoryCheckpointStore,
    NotDone,
    OwnershipLost,
    SQLiteCheckpointStore,
    StoreBusy,
    ToolContext,
    tool,
)
from harness.errors import CheckpointConflict
from harness.llm.base import LLMRequest
from harness.messages import ToolResult
from harness.records import RunFinished, ToolFinished, ToolNotDone
from harness.result import RunResult
from harness.testing import CrashingStore, MeteredLLM, RecordingTool, Reply, ScriptedLLM, call, fail_appends

GOAL = "Do the round."
SCRIPT = [call("put", key="a"), [call("mail", to="bob"), call("put", key="b")], "Put and mailed."]


@pytest.fixture(params=["sqlite", "file"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[CheckpointStore]:
    store = SQLiteCheckpointStore(tmp_path / "runs.db") if request.param == "sqlite" else FileCheckpointStore(tmp_path)
    yield store
    await store.close()


def wire(store: CheckpointStore, llm: object, *tools: object, **settings: object) -> AgentRuntime:
    config = AgentConfig("a", **settings)  # type: ignore[arg-type]
    return AgentRuntime(llm=llm, agents=[config], tools=tools, checkpoint_store=store)


def calling(name: str, *, answer: str = "Done.") -> ScriptedLLM:
    return ScriptedLLM([call(name), answer])


def results(result: RunResult) -> list[ToolFinished]:
    return [entry.record for entry in result.trace if isinstance(entry.record, ToolFinished)]


def shown(llm: ScriptedLLM) -> list[str]:
    return [p.text for message in llm.requests[-1].messages for p in message.parts if isinstance(p, ToolResult)]


# -- the store ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [CheckpointError("the disk is full"), StoreBusy("locked")], ids=["full", "busy"])
@pytest.mark.parametrize("place", range(1, 7))
async def test_a_store_that_refuses_an_append_loses_nothing(
    store: CheckpointStore, tmp_path: Path, place: int, error: CheckpointError
) -> None:
    llm = MeteredLLM(ScriptedLLM(SCRIPT), tmp_path / "llm.log")
    put = RecordingTool("put", tmp_path / "fx.log", effect="idempotent")
    mail = RecordingTool("mail", tmp_path / "fx.log")
    failing = CrashingStore(store, on_append=fail_appends(error, first=place))

    with pytest.raises(type(error), match=str(error)):
        await wire(failing, llm, put, mail).run_agent("a", GOAL, run_id="r")
    kept = [entry async for entry in store.read("r")]
    result = await wire(store, llm, put, mail).run_agent("a", GOAL, run_id="r")

    assert isinstance(result, Finished)
    assert result.trace[: len(kept)] == kept
    # The call whose outcome the store refused may be paid again; no other is.
    assert sum(llm.calls().values()) <= 3 + 1
    assert Counter(key for _, key, _ in mail.effects()).most_common(1)[0][1] == 1
    assert len({key for _, key, _ in put.effects()}) == 2


async def test_a_store_that_is_down_for_a_while(store: CheckpointStore, tmp_path: Path) -> None:
    put, mail = (
        RecordingTool("put", tmp_path / "fx.log", effect="idempotent"),
        RecordingTool("mail", tmp_path / "fx.log"),
    )
    down = CrashingStore(store, on_append=fail_appends(StoreBusy("locked"), first=3, times=4))
    runtime = wire(down, ScriptedLLM(SCRIPT), put, mail)
    failures = 0
    while True:
        try:
            result = await runtime.run_agent("a", GOAL, run_id="r")
        except StoreBusy:
            failures += 1
            continue
        break
    # Each run tries its append once more while it stops.
    assert (failures, result.answer) == (2, "Put and mailed.")
    assert len(mail.effects()) == 1


async def test_an_append_whose_acknowledgement_is_lost(store: CheckpointStore, tmp_path: Path) -> None:
    """The records are written although the store raised: the next driver reads them, and repeats nothing."""

    def lose_once(when: str, records: object) -> None:
        nonlocal count
        count += when == "after"
        if when == "after" and count == 3:
            raise CheckpointError("the acknowledgement was lost")

    count = 0
    llm = MeteredLLM(ScriptedLLM(SCRIPT), tmp_path / "llm.log")
    put, mail = (
        RecordingTool("put", tmp_path / "fx.log", effect="idempotent"),
        RecordingTool("mail", tmp_path / "fx.log"),
    )
    runtime = wire(CrashingStore(store, on_append=lose_once), llm, put, mail)
    with pytest.raises(CheckpointError, match="acknowledgement"):
        await runtime.run_agent("a", GOAL, run_id="r")
    assert (await runtime.resume("r")).answer == "Put and mailed."
    assert len(put.effects()) == 2
    assert len(mail.effects()) == 1


async def test_a_store_that_cannot_keep_a_large_result_is_not_the_tools_error(
    store: CheckpointStore, tmp_path: Path
) -> None:
    def refuse(when: str, _data: bytes) -> None:
        raise CheckpointError("the disk is full")

    mail = RecordingTool("mail", tmp_path / "fx.log", result="x" * 50_000)
    with pytest.raises(CheckpointError, match="the disk is full"):
        await wire(CrashingStore(store, on_blob=refuse), calling("mail"), mail).run_agent("a", GOAL, run_id="r")
    result = await wire(store, calling("mail"), mail).resume("r")
    assert (result.answer, results(result)[0].status) == ("Done.", "unknown")
    assert len(mail.effects()) == 1


async def test_another_writer_stops_a_run(tmp_path: Path) -> None:
    """A store whose journal grew by somebody else's hand: the run stops, and says so."""

    class Grown(CrashingStore):
        async def append(self, run_id: str, expected_seq: int, records, /, *, owner) -> float:  # type: ignore[no-untyped-def]
            if expected_seq:
                raise CheckpointConflict(f"run {run_id!r} ends at record 9, not at {expected_seq}: read it again")
            return await super().append(run_id, expected_seq, records, owner=owner)

    with pytest.raises(CheckpointConflict, match="record 9"):
        await wire(Grown(MemoryCheckpointStore()), calling("put"), RecordingTool("put", tmp_path / "fx")).run_agent(
            "a", "x"
        )


# -- tools --------------------------------------------------------------------------------------


class Hangs:
    """A tool that ignores its cancellation until it is let go."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()

    async def __call__(self) -> str:
        while not self.let_go.is_set():
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                continue
        return "late"


@pytest.mark.parametrize(("effect", "status"), [("read", "timeout"), ("once", "unknown")])
async def test_a_tool_that_ignores_its_cancellation_is_abandoned(
    store: CheckpointStore, tmp_path: Path, effect: str, status: str
) -> None:
    hangs = Hangs()

    @tool(effect=effect, timeout_s=0.05)  # type: ignore[call-overload]
    async def hang() -> str:
        """Hang."""
        return await hangs()

    other = RecordingTool("other", tmp_path / "fx.log")
    llm = ScriptedLLM([[call("other"), call("hang")], "On I go."])
    try:
        result = await wire(store, llm, hang, other).run_agent("a", GOAL)
    finally:
        hangs.let_go.set()
    assert result.answer == "On I go."
    assert [(r.tool, r.status) for r in results(result)] == [("other", "ok"), ("hang", status)]
    assert len(other.effects()) == 1
    await asyncio.sleep(0.01)
    # What the abandoned call comes to is not written any more.
    assert isinstance([e async for e in store.read(result.run_id)][-1].record, RunFinished)


@pytest.mark.parametrize(
    "error", [SystemExit(3), asyncio.CancelledError(), BaseExceptionGroup("g", [SystemExit()]), StopAsyncIteration()]
)
async def test_whatever_a_tool_raises_is_a_tool_error(store: CheckpointStore, error: BaseException) -> None:
    @tool
    async def fails() -> str:
        """Fail."""
        raise error

    llm = calling("fails", answer="It failed.")
    result = await wire(store, llm, fails).run_agent("a", GOAL)
    assert result.answer == "It failed."
    assert results(result)[0].status == "error"
    assert type(error).__name__ in results(result)[0].text


async def test_a_thread_that_exits_is_a_tool_error(store: CheckpointStore) -> None:
    @tool
    def leaves() -> str:
        """Leave."""
        raise SystemExit(7)

    result = await wire(store, calling("leaves"), leaves).run_agent("a", GOAL)
    assert (results(result)[0].status, "SystemExit" in results(result)[0].text) == ("error", True)


async def test_a_result_that_cannot_be_written_is_a_success(store: CheckpointStore) -> None:
    @tool
    async def odd() -> object:
        """Return something odd."""
        return threading.Lock()

    result = await wire(store, calling("odd"), odd).run_agent("a", GOAL)
    assert result.success
    assert results(result)[0].status == "unrepresentable"


@pytest.mark.parametrize("text", ["\ud800 alone", "a\0b", "\N{GRINNING FACE}"])
async def test_text_no_encoding_likes(store: CheckpointStore, text: str) -> None:
    @tool
    async def odd() -> str:
        """Return an odd text."""
        return text

    result = await wire(store, ScriptedLLM([call("odd"), f"It says {text}"]), odd).run_agent("a", f"Say {text}")
    assert result.success
    assert (await wire(store, ScriptedLLM([]), odd).resume(result.run_id)).answer == result.answer


async def test_a_large_result_is_kept_whole_and_shown_in_part(store: CheckpointStore) -> None:
    @tool(effect="read")
    async def dump() -> str:
        """Return five megabytes."""
        return "0123456789" * 500_000

    llm = calling("dump")
    result = await wire(store, llm, dump, max_result_chars=1000).run_agent("a", GOAL)
    cut = results(result)[0].cut
    assert cut is not None
    assert cut.chars == 5_000_000
    assert len(await store.get_blob(result.run_id, cut.blob)) == 5_000_000
    assert len(shown(llm)[0]) < 1200
    assert "of 5000000 characters cut here" in shown(llm)[0]


async def test_reconcile_that_fails_in_every_way_leaves_the_outcome_unknown(store: CheckpointStore) -> None:
    errors: list[BaseException] = [SystemExit(1), RuntimeError("no"), asyncio.CancelledError()]

    def reconcile(key: str) -> object:
        raise errors[len(asked) % 3]

    asked: list[str] = []

    @tool(timeout_s=0.03, reconcile=reconcile)
    async def slow() -> str:
        """Take too long."""
        asked.append("")
        await asyncio.sleep(10)
        return ""

    result = await wire(store, ScriptedLLM([[call("slow")] * 3, "So be it."]), slow).run_agent("a", GOAL)
    assert [r.status for r in results(result)] == ["unknown"] * 3


async def test_a_once_tool_left_to_a_thread_is_not_run_again_while_the_thread_lives(
    store: CheckpointStore, tmp_path: Path
) -> None:
    """Its reconcile finds nothing yet, but the thread will have its effect: running it again would make two."""
    log = tmp_path / "fx"
    gate = threading.Event()

    def reconcile(key: str) -> object:
        return "sent" if log.exists() and key in log.read_text() else NotDone()

    @tool(timeout_s=0.05, reconcile=reconcile)
    def send(context: ToolContext[None]) -> str:
        """Send, slowly."""
        gate.wait(10)
        with log.open("a") as file:
            file.write(f"{context.idempotency_key}\n")
        return "sent"

    result = await wire(store, calling("send"), send).run_agent("a", GOAL)
    gate.set()
    await settled(log.exists)
    await asyncio.sleep(0.02)
    assert results(result)[0].status == "unknown"
    assert not [entry for entry in result.trace if isinstance(entry.record, ToolNotDone)]
    assert len(log.read_text().split()) == 1


# -- the model and the limits -------------------------------------------------------------------


async def test_a_provider_that_was_down_is_asked_again_by_a_resume(store: CheckpointStore, tmp_path: Path) -> None:
    up = False

    def reply(request: LLMRequest) -> Reply:
        asked = sum(message.role == "assistant" for message in request.messages)
        return SCRIPT[asked] if up or asked == 0 else LLMError("down", transient=True, retry_after_s=0)

    put, mail = RecordingTool("put", tmp_path / "fx", effect="idempotent"), RecordingTool("mail", tmp_path / "fx")
    runtime = wire(store, ScriptedLLM(reply), put, mail, max_llm_attempts=2)
    failed = await runtime.run_agent("a", GOAL, run_id="r")
    assert isinstance(failed, Failed)
    assert (failed.reason, "down" in failed.error) == ("llm", True)
    assert isinstance(await runtime.resume("r"), Failed)
    up = True
    assert (await runtime.resume("r")).answer == "Put and mailed."
    assert len(put.effects()) == 2


async def test_a_run_that_came_to_its_last_step_gets_as_many_again(store: CheckpointStore, tmp_path: Path) -> None:
    count = RecordingTool("count", tmp_path / "fx")
    script = [call("count", n=n) for n in range(5)]
    runtime = wire(store, ScriptedLLM([*script, "Five."]), count, max_steps=2)
    reasons: list[str] = []
    result = await runtime.run_agent("a", GOAL, run_id="r")
    while isinstance(result, Failed):
        reasons.append(result.reason)
        result = await runtime.resume("r")
    assert (reasons, result.answer, len(count.effects())) == (["max_steps", "max_steps"], "Five.", 5)


# -- viewers ------------------------------------------------------------------------------------


async def settled(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not done():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


async def test_leaving_a_stream_leaves_no_task_alive(store: CheckpointStore, tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    slow = RecordingTool("slow", tmp_path / "fx", delay_s=30)
    runtime = wire(store, ScriptedLLM([[call("slow", n=1), call("slow", n=2)], "Done."]), slow)
    async with runtime.run_agent_stream("a", GOAL, run_id="r") as events:
        async for _ in events:
            break
        await settled(lambda: len(slow.effects()) == 2)
    assert asyncio.all_tasks() == before
    assert not [entry async for entry in store.read("r") if isinstance(entry.record, ToolFinished)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_an_abandoned_stream_warns_and_stops(store: CheckpointStore) -> None:
    before = asyncio.all_tasks()
    runtime = wire(store, ScriptedLLM(["Hello."], delay_s=30))

    async def look() -> None:
        async for _ in runtime.run_agent_stream("a", GOAL, run_id="r"):
            break
        gc.collect()

    with pytest.warns(ResourceWarning, match="'r' was left without being closed"):
        await look()
    await settled(lambda: asyncio.all_tasks() == before)
    assert (await wire(store, ScriptedLLM(["Hello."])).resume("r")).answer == "Hello."


async def test_a_run_has_one_driver_and_names_it(store: CheckpointStore, tmp_path: Path) -> None:
    """Two runtimes of one process on one store: the second is told who drives the run."""
    slow = RecordingTool("slow", tmp_path / "fx", delay_s=0.2)
    first, second = (wire(store, calling("slow"), slow) for _ in range(2))
    driving = asyncio.create_task(first.run_agent("a", GOAL, run_id="r"))
    await settled(lambda: bool(slow.effects()))
    with pytest.raises(OwnershipLost, match=r"run 'r' is owned by process \d+"):
        await second.resume("r")
    assert (await driving).answer == (await second.resume("r")).answer == "Done."
    assert len(slow.effects()) == 1


@pytest.mark.parametrize("kind", ["sqlite", "file"])
async def test_a_start_that_is_cancelled_at_any_moment_leaves_the_run_free(tmp_path: Path, kind: str) -> None:
    for n in range(24):
        folder = tmp_path / str(n)  # a store that is opened by this very call takes longest
        store = SQLiteCheckpointStore(folder / "runs.db") if kind == "sqlite" else FileCheckpointStore(folder)
        runtime = AgentRuntime(llm=ScriptedLLM(["done"]), agents=[AgentConfig("a")], checkpoint_store=store)
        start = asyncio.create_task(runtime.run_agent("a", "x", run_id="r"))
        for _ in range(1 + n // 2):
            await asyncio.sleep(0.0003 * (n % 2))
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        assert (await runtime.run_agent("a", "x", run_id="r")).answer == "done"
        await store.close()
