"""A replay shows what was shown, event for event: from the journal alone, and without a trace of its own."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import pytest

from harness import (
    LLM,
    AgentConfig,
    AgentRuntime,
    BusEvent,
    ConfigError,
    Event,
    EventType,
    LLMError,
    MemoryCheckpointStore,
    Parked,
    Plan,
    Replay,
    RunNotFound,
    RunResult,
    RunStream,
    SQLiteCheckpointStore,
    Task,
    tool,
)
from harness.approval import Approve
from harness.checkpoint.base import LEASE_S, CheckpointStore, Owner, this_process
from harness.llm.base import LLMRequest
from harness.mailbox import Command, Mail
from harness.records import LLMFinished, ProcessId, Record
from harness.testing import (
    CrashingStore,
    KillPoints,
    Lab,
    MeteredLLM,
    Reply,
    ScriptedLLM,
    Workload,
    call,
    sqlite_store,
)

CRASH = Path(__file__).parents[1] / "crash"
EXAMPLES = Path(__file__).parents[2] / "examples"
EPHEMERAL = (EventType.TOKEN, EventType.PROGRESS, EventType.DISCARDED)


def workloads_of(file: str) -> list[Workload]:
    """Return the workloads that are killed elsewhere: they are runs of every kind."""
    spec = importlib.util.spec_from_file_location(f"workloads_{file}", CRASH / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return list(getattr(module, "WORKLOADS", None) or module.AT_ONCE)


WORKLOADS = [*workloads_of("test_kill_sweep"), *workloads_of("test_kill_sweep_orchestration")]


class _GatedLLM(MeteredLLM):
    """A model that answers once somebody watches."""

    watched: asyncio.Event

    async def stream(self, request: LLMRequest, /):
        await self.watched.wait()
        async for delta in super().stream(request):
            yield delta


class WatchedLab(Lab):
    """A lab whose runs are watched from their first record on, as they are driven."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sqlite_store, KillPoints())
        self.begun = asyncio.Event()
        self.store = CrashingStore(sqlite_store(folder / "store"), on_append=self._seen)
        self.watched = asyncio.Event()
        self.live: list[Event] = []
        self.runtime: AgentRuntime | None = None

    def _seen(self, when: str, records: Sequence[Record]) -> None:
        if when == "after":
            self.begun.set()

    def llm(
        self, model: LLM | Iterable[Reply] | Callable[[LLMRequest], Reply], *, name: str = "scripted"
    ) -> MeteredLLM:
        llm = model if isinstance(model, LLM) else ScriptedLLM(model, name=name)
        gated = _GatedLLM(llm, self.folder / "llm.log")
        gated.watched = self.watched
        return gated

    async def drive(self, runtime: AgentRuntime, start: Callable[[], Awaitable[RunResult]]) -> RunResult:
        return await self._watch(runtime, asyncio.ensure_future(start()))

    async def drive_stream(self, runtime: AgentRuntime, start: Callable[[], RunStream]) -> RunResult:
        async def consume() -> RunResult:
            async with start() as events:
                async for _ in events:
                    pass
            assert events.result is not None
            return events.result

        return await self._watch(runtime, asyncio.ensure_future(consume()))

    async def _watch(self, runtime: AgentRuntime, driven: asyncio.Future[RunResult]) -> RunResult:
        self.runtime = runtime
        await self.begun.wait()
        async with runtime.resume_stream(self.run_id, replay=True) as events:
            self.watched.set()
            self.live = [event async for event in events]
        return await driven


def lasting(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.type not in EPHEMERAL]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.__name__)
async def test_a_replay_shows_the_same_events_as_the_live_stream(workload: Workload, tmp_path: Path) -> None:
    lab = WatchedLab(tmp_path)
    result = await workload(lab)
    assert lab.runtime is not None
    async with lab.runtime.replay_stream(lab.run_id) as replay:
        again = [event async for event in replay]
    assert again == lasting(lab.live)
    assert [event.payload for event in again] == [event.payload for event in lasting(lab.live)]
    assert len(again) > 3
    assert replay.result == result
    assert replay.run_id == lab.run_id
    await lab.store.close()


TEED = """
import json, runpy, sys
import harness

class Teed(harness.AgentRuntime):
    def run_agent_stream(self, *args, **kwargs):
        return Tee(super().run_agent_stream(*args, **kwargs))
    def run_plan_stream(self, *args, **kwargs):
        return Tee(super().run_plan_stream(*args, **kwargs))
    def dispatch_stream(self, *args, **kwargs):
        return Tee(super().dispatch_stream(*args, **kwargs))

class Tee:
    def __init__(self, stream):
        self.stream = stream
    async def __aenter__(self):
        await self.stream.__aenter__()
        return self
    async def __aexit__(self, *error):
        return await self.stream.__aexit__(*error)
    def __aiter__(self):
        return self
    async def __anext__(self):
        event = await anext(self.stream)
        if event.type not in ("TOKEN", "PROGRESS", "DISCARDED"):
            seen.write(json.dumps([event.type, event.run_id, event.agent_id, event.scope, event.seq, event.timestamp,
                                   dict(event.payload)]) + "\\n")
        return event

with open(sys.argv[1], "w") as seen:
    harness.AgentRuntime = Teed
    runpy.run_path(sys.argv[2], run_name="__main__")
"""


def as_plain(event: BusEvent) -> list[object]:
    about = [event.type, event.run_id, event.agent_id, event.scope, event.seq, event.timestamp, dict(event.payload)]
    return json.loads(json.dumps(about))


@pytest.mark.parametrize("name", ["quickstart", "three_agents", "prebuilt_plan", "delegation"])
async def test_an_example_is_replayed_from_the_default_store(name: str, tmp_path: Path) -> None:
    seen = tmp_path / "seen.jsonl"
    words = [sys.executable, "-c", TEED, str(seen), str(EXAMPLES / f"{name}.py")]
    done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    live = [json.loads(line) for line in seen.read_text().splitlines()]
    assert live[-1][0] in ("TASK_DONE", "DONE")
    database = Path(os.environ["HARNESS_HOME"], "runs.db")
    before = await asyncio.to_thread(database.read_bytes)
    async with AgentRuntime(llm=NeverLLM(), auto_resume=False) as runtime:
        assert [as_plain(event) async for event in runtime.replay_stream(live[0][1])] == live
    assert await asyncio.to_thread(database.read_bytes) == before


# -- runs of every end -------------------------------------------------------------------------------------------------


class NeverLLM:
    """A model that nobody may ask."""

    name, provider = "never", "test"

    def stream(self, request: LLMRequest, /):
        raise AssertionError("a replay has asked a model")


class Sealed(CrashingStore):
    """A store that nobody may write to."""

    async def append(self, run_id: str, expected_seq: int, records: Sequence[Record], /, *, owner: Owner) -> float:
        raise AssertionError("a replay has written")

    async def claim(self, run_id: str, process: ProcessId, /, *, lease_s: float = LEASE_S) -> Owner:
        raise AssertionError("a replay has taken the run")

    async def put_blob(self, run_id: str, data: bytes, /) -> str:
        raise AssertionError("a replay has written")

    async def post(self, run_id: str, command: Command, /) -> Mail:
        raise AssertionError("a replay has written")


@tool
def send(to: str) -> str:
    """Send a mail."""
    return f"sent to {to}"


def wire(store: CheckpointStore, *script: Reply, **agent: object) -> AgentRuntime:
    return AgentRuntime(
        llm=ScriptedLLM(script),
        agents=[AgentConfig("a", **agent)],  # type: ignore[arg-type]
        tools=[send],
        checkpoint_store=store,
    )


def sealed(store: CheckpointStore) -> AgentRuntime:
    """Return a runtime that has nothing of what the run was made of: no agent, no tool, no model."""
    return AgentRuntime(llm=NeverLLM(), checkpoint_store=Sealed(store))


async def taken(stream: RunStream | Replay) -> list[Event]:
    async with stream as events:
        return [event async for event in events]


async def test_a_failed_run_is_replayed_and_stays_failed() -> None:
    store = MemoryCheckpointStore()
    runtime = wire(store, call("send", to="ann"), LLMError("gone"), LLMError("gone"), "Done.")
    live = await taken(runtime.run_agent_stream("a", "Send it.", run_id="r"))
    replay = sealed(store).replay_stream("r")
    assert await taken(replay) == live
    assert live[-1].type == EventType.ERROR
    assert replay.result is not None
    assert not replay.result.success
    live += await taken(runtime.resume_stream("r"))
    live += await taken(runtime.resume_stream("r"))
    assert live[-1].type == EventType.TASK_DONE
    assert await taken(sealed(store).replay_stream("r:a")) == live


async def test_a_stream_of_a_run_that_has_just_failed_is_a_resume_of_it() -> None:
    """A model and a store that never wait leave the event loop no turn between the end and the resume."""
    runtime = wire(MemoryCheckpointStore(), LLMError("gone"), LLMError("gone"), "Done.")
    assert (await taken(runtime.run_agent_stream("a", "Do it.", run_id="r")))[-1].type == EventType.ERROR
    types = [[event.type for event in await taken(runtime.resume_stream("r"))] for _ in range(3)]
    assert types[0][0] == types[1][0] == EventType.RESUMED
    assert [seen[-1] for seen in types] == [EventType.ERROR, EventType.TASK_DONE, EventType.TASK_DONE]
    assert len(types[2]) == 1


async def test_a_waiting_run_is_replayed_and_goes_on_waiting() -> None:
    store = MemoryCheckpointStore()
    runtime = wire(store, call("send", to="ann"), "Sent.", hitl_tools=("send",))
    live = await taken(runtime.run_agent_stream("a", "Send it.", run_id="r"))
    replay = sealed(store).replay_stream("r")
    assert await taken(replay) == live
    assert [event.type for event in live[-2:]] == [EventType.APPROVAL_REQUESTED, EventType.PARKED]
    (question,) = await runtime.pending("r")
    assert isinstance(replay.result, Parked)
    assert replay.result.waiting == [question]
    await runtime.answer("r", Approve(), by="eve")
    live += await taken(runtime.resume_stream("r"))
    assert await taken(sealed(store).replay_stream("r")) == live


@pytest.mark.parametrize("shown", [1, 2, 4, 6])
async def test_an_interrupted_run_is_replayed_as_far_as_it_came(shown: int) -> None:
    store = MemoryCheckpointStore()
    runtime = wire(store, call("send", to="ann"), call("send", to="bob"), "Sent.")
    live: list[Event] = []
    async with runtime.run_agent_stream("a", "Send them.", run_id="r") as events:
        async for event in events:
            live.append(event)
            if len(live) == shown:
                break
    replay = sealed(store).replay_stream("r")
    again = await taken(replay)
    assert again[:shown] == live
    assert replay.result is None
    assert await taken(sealed(store).replay_stream("r")) == again
    rest = await taken(runtime.resume_stream("r"))
    assert await taken(sealed(store).replay_stream("r")) == again + rest


async def test_a_cancelled_run_is_replayed() -> None:
    store = MemoryCheckpointStore()
    runtime = wire(store, call("send", to="ann"), "Sent.", hitl_tools=("send",))
    await runtime.run_agent("a", "Send it.", run_id="r")
    await runtime.cancel("r", "not needed")
    replay = sealed(store).replay_stream("r")
    assert (await taken(replay))[-1].type == EventType.CANCELLED
    assert replay.result is not None
    assert replay.result.error == "not needed"


async def test_a_fork_is_replayed_with_what_it_was_copied_from() -> None:
    store = MemoryCheckpointStore()
    runtime = wire(store, call("send", to="ann"), call("send", to="bob"), "Sent.")
    whole = await taken(runtime.run_agent_stream("a", "Send them.", run_id="r"))
    fork = await runtime.fork("r", at=2, run_id="f")
    rest = await taken(runtime.resume_stream(fork))
    again = await taken(sealed(store).replay_stream(fork))
    assert again[-len(rest) :] == rest
    copied = [event.payload for event in again[: -len(rest)]]
    assert copied == [event.payload for event in whole][: len(copied)]


async def test_one_task_of_a_plan_is_replayed_alone() -> None:
    store = MemoryCheckpointStore()
    plan = Plan([Task("x", "a", "Do x."), Task("y", "a", "Do y.")])
    runtime = AgentRuntime(
        llm=ScriptedLLM(lambda request: f"Done: {request.messages[0].text}"),
        llm_by_site={"synthesiser": ScriptedLLM(['{"answer": "Both."}'])},
        agents=[AgentConfig("a")],
        checkpoint_store=store,
    )
    live = await taken(runtime.run_plan_stream(plan, run_id="r"))
    replay = sealed(store).replay_stream("r:y:a")
    assert await taken(replay) == [event for event in live if event.scope.startswith("y/")]
    assert replay.result is not None
    assert replay.result.answer == "Done: Do y."
    with pytest.raises(RunNotFound, match="no task 'z'"):
        await taken(sealed(store).replay_stream("r:z:a"))


# -- speed -------------------------------------------------------------------------------------------------------------


async def of_an_hour(store: CheckpointStore) -> None:
    """Store a run whose model took an hour, and before that one that took 0.2 seconds."""
    runtime = AgentRuntime(llm=ScriptedLLM(["Hello."], delay_s=0.2), agents=[AgentConfig("a")], checkpoint_store=store)
    await runtime.run_agent("a", "Greet me.", run_id="short")
    records: list[Record] = []
    async for entry in store.read("short"):
        late = isinstance(entry.record, LLMFinished)
        records.append(msgspec.structs.replace(entry.record, clock_s=3600.0) if late else entry.record)
    owner = await store.claim("long", this_process())
    await store.append("long", 0, records, owner=owner)
    await store.release(owner)


async def test_in_the_runs_own_time_a_replay_takes_as_long_as_the_run_was_driven() -> None:
    store = MemoryCheckpointStore()
    await of_an_hour(store)
    loop = asyncio.get_running_loop()
    began = loop.time()
    shown = await taken(sealed(store).replay_stream("short", speed=1))
    assert loop.time() - began >= 0.2
    began = loop.time()
    assert len(await taken(sealed(store).replay_stream("long", speed=36_000))) == len(shown)
    assert loop.time() - began >= 0.1
    assert len(await taken(sealed(store).replay_stream("long"))) == len(shown)
    assert loop.time() - began < 60  # of an hour


@pytest.mark.parametrize("speed", [-1, float("nan"), float("inf")])
def test_a_wrong_speed_is_refused_at_once(speed: float) -> None:
    with pytest.raises(ConfigError, match="speed must be 0"):
        sealed(MemoryCheckpointStore()).replay_stream("r", speed=speed)


async def test_an_unknown_key_is_refused_when_the_replay_is_entered() -> None:
    replay = sealed(MemoryCheckpointStore()).replay_stream("nope")
    assert replay.run_id == ""
    with pytest.raises(RunNotFound, match="nope"):
        await anext(replay)


async def test_a_replay_that_is_left_leaves_nothing_behind(tmp_path: Path) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    await wire(store, "Hello.").run_agent("a", "Greet me.", run_id="r")
    async for event in sealed(store).replay_stream("r", speed=1):
        assert event.type == EventType.STARTED
        break
    async with sealed(store).replay_stream("r") as events:
        assert events.run_id == "r"
    assert [event async for event in events] == []
    await store.close()
    assert await asyncio.to_thread(os.listdir, tmp_path) == ["runs.db"]
