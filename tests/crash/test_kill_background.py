"""A process dies while the provider writes its answer: the next one takes the answer up, and no other is bought."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from harness import Usage
from harness.fold import fold
from harness.records import LLMFinished
from harness.state import RunState
from harness.testing import ChildFailed, ForkServer
from harness.testing.forkserver import Child
from support.background_script import drive, store_of
from support.responses_server import Reply, ResponsesServer, function_call, says, serving

pytestmark = pytest.mark.timeout(120)

USED = Usage(20, 7, cache_read_tokens=5, reasoning_tokens=3, unpriced=1)
LOOKS = Reply([function_call("look", place="here")])
ANSWER = "It is all in order."


class Script:
    """The script, in real processes, each of which finds what the one before has left.

    Args:
        processes: starts them.
        server: the provider.
        folder: where runs are kept.
        store: how.
        first: a provider that is asked before it.
    """

    def __init__(
        self,
        processes: ForkServer,
        server: ResponsesServer,
        folder: Path,
        store: str = "sqlite",
        first: ResponsesServer | None = None,
    ) -> None:
        self._processes = processes
        self._server = server
        self._folder = folder
        self._store = store
        self._first = "" if first is None else first.url

    def start(self, death: str = "") -> Child:
        return self._processes.start(drive, self._server.url, self._store, str(self._folder), death, self._first)

    async def dies(self, number: signal.Signals = signal.SIGKILL, *, after: str = "TOKEN") -> None:
        """Start it, send it a signal after something it says, and wait for its end."""
        child = self.start()
        await asyncio.to_thread(child.wait_for, after)
        child.signal(number)
        await ended(child)

    async def answer(self) -> object:
        """Start it and return the run's answer."""
        return (await ended(self.start())).result

    async def meaning(self) -> RunState:
        """Fold the run's journal."""
        store = store_of(self._store, self._folder)
        entries = [entry async for entry in store.read("r")]
        await store.close()
        assert sum(isinstance(entry.record, LLMFinished) for entry in entries) == 2
        return fold("r", entries)


async def ended(child: Child) -> Child:
    return await asyncio.to_thread(child.wait)


@pytest.mark.parametrize("store", ["sqlite", "file"])
async def test_a_kill_in_the_middle_of_a_response_costs_nothing(
    store: str, tmp_path: Path, fork_servers: list[ForkServer]
) -> None:
    async with serving(LOOKS, says(ANSWER, hold_after=5)) as server:
        script = Script(fork_servers[0], server, tmp_path, store)
        await script.dies()
        assert server.log == ["create resp_1", "create resp_2"]
        server.go_on("resp_2")  # while nobody listens
        assert await script.answer() == ANSWER
    assert server.log == ["create resp_1", "create resp_2", "listen resp_2"]
    state = await script.meaning()
    assert (state.spent.usage, state.spent.llm_calls, state.spent.estimated) == (USED + USED, 2, 0)
    assert (state.epoch, state.reserved.input_tokens) == (2, 0)


async def test_a_kill_of_whoever_took_it_up(tmp_path: Path, fork_servers: list[ForkServer]) -> None:
    async with serving(LOOKS, says(ANSWER, hold_after=5)) as server:
        script = Script(fork_servers[0], server, tmp_path)
        await script.dies()
        await script.dies()
        server.go_on("resp_2")
        assert await script.answer() == ANSWER
    assert server.log == ["create resp_1", "create resp_2", "listen resp_2", "listen resp_2"]
    state = await script.meaning()
    assert (state.spent.usage, state.spent.llm_calls, state.spent.estimated) == (USED + USED, 2, 0)
    assert state.epoch == 3


async def test_a_kill_under_a_fallback_costs_nothing_and_the_first_model_is_not_asked_for_it(
    tmp_path: Path, fork_servers: list[ForkServer]
) -> None:
    async with serving(LOOKS) as first, serving(says(ANSWER, hold_after=5)) as second:
        script = Script(fork_servers[0], second, tmp_path, first=first)
        # The first call is the first model's; then it is down until the process is dead.
        first.on_create = lambda body: (503, {"error": {"message": "down"}}) if len(body["input"]) > 1 else None
        await script.dies()
        first.on_create = lambda _body: None
        second.go_on("resp_1")
        assert await script.answer() == ANSWER
    assert (first.log, second.log) == (["create resp_1"], ["create resp_1", "listen resp_1"])
    state = await script.meaning()
    assert (state.spent.usage, state.spent.llm_calls, state.spent.estimated) == (USED + USED, 3, 0)
    assert (state.epoch, state.reserved.input_tokens) == (2, 0)


async def test_a_kill_before_the_id_is_known_is_charged_by_estimate(
    tmp_path: Path, fork_servers: list[ForkServer]
) -> None:
    async with serving(LOOKS, says("Never heard.", unheard=True), says(ANSWER)) as server:
        script = Script(fork_servers[0], server, tmp_path)
        child = script.start()
        await server.until("create resp_2")
        child.signal(signal.SIGKILL)
        await ended(child)
        assert await script.answer() == ANSWER
    assert server.log == ["create resp_1", "create resp_2", "create resp_3"]
    state = await script.meaning()
    assert (state.spent.llm_calls, state.spent.estimated) == (3, 1)
    assert state.spent.usage.output_tokens == 2 * USED.output_tokens + 4096, "the most it could have come to"


@pytest.mark.parametrize(
    ("death", "log"),
    [
        ("before:LLMAccepted", ["create resp_1", "create resp_2", "create resp_3"]),
        ("after:LLMAccepted", ["create resp_1", "listen resp_1", "create resp_2"]),
        ("before:LLMFinished", ["create resp_1", "listen resp_1", "create resp_2"]),
        ("after:LLMFinished", ["create resp_1", "create resp_2"]),
    ],
)
async def test_a_kill_at_every_append_of_a_call(
    death: str, log: list[str], tmp_path: Path, fork_servers: list[ForkServer]
) -> None:
    replies = [LOOKS] * (len([line for line in log if line.startswith("create")]) - 1)
    async with serving(*replies, says(ANSWER)) as server:
        script = Script(fork_servers[0], server, tmp_path)
        assert (await ended(script.start(death))).killed
        assert await script.answer() == ANSWER
    assert server.log == log
    state = await script.meaning()
    lost = len(log) - 2 if death == "before:LLMAccepted" else 0
    assert (state.spent.estimated, state.spent.llm_calls) == (lost, 2 + lost)


async def test_ctrl_c_leaves_the_response_alone_and_a_resume_takes_it_up(
    tmp_path: Path, fork_servers: list[ForkServer]
) -> None:
    async with serving(LOOKS, says(ANSWER, hold_after=5)) as server:
        script = Script(fork_servers[0], server, tmp_path)
        with pytest.raises(ChildFailed, match="KeyboardInterrupt"):
            await script.dies(signal.SIGINT)
        assert server.log == ["create resp_1", "create resp_2"]
        server.go_on("resp_2")
        assert await script.answer() == ANSWER
    assert server.log == ["create resp_1", "create resp_2", "listen resp_2"]
    state = await script.meaning()
    assert (state.spent.usage, state.spent.estimated) == (USED + USED, 0)
