"""Models made of several and models that share a limit, through runs: what was asked is counted at the servers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from harness import (
    AgentConfig,
    AgentRuntime,
    Cancelled,
    CircuitBreaker,
    Failed,
    FallbackLLM,
    FileCheckpointStore,
    Finished,
    GovernedLLM,
    GuardrailConfig,
    LLMError,
    LLMSettings,
    MemoryCheckpointStore,
    OpenAILLM,
    Plan,
    RateLimit,
    RoutingLLM,
    RunStopped,
    Task,
    tool,
)
from harness.fold import fold
from harness.llm.base import LLMDelta, LLMRequest
from harness.records import ConfigDiffers, LLMFailed, LLMFinished, LLMStarted, Record
from harness.result import RunResult
from harness.testing import ScriptedLLM, call

# -- servers ------------------------------------------------------------------------------------

Answer = Callable[[asyncio.StreamWriter, dict], Awaitable[None]]
R = TypeVar("R", bound=Record)


class Server:
    """A provider that counts.

    Attributes:
        answer: what the next requests get.
        model: the name of its model.
        times: when each request came.
        most: the most requests it had at a time.
    """

    def __init__(self, answer: Answer, model: str) -> None:
        self.answer = answer
        self.model = model
        self.times: list[float] = []
        self.now = self.most = 0
        self.url = ""
        self.given: list[OpenAILLM] = []

    @property
    def asked(self) -> int:
        return len(self.times)

    def llm(self) -> OpenAILLM:
        self.given.append(OpenAILLM(self.model, base_url=self.url))
        return self.given[-1]

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length: ")[1].split("\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            self.times.append(time.monotonic())
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                await self.answer(writer, body)
                await writer.drain()
            finally:
                self.now -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(*answers: Answer) -> AsyncIterator[list[Server]]:
    servers = [Server(answer, f"m{number}") for number, answer in enumerate(answers)]
    listeners = [await asyncio.start_server(server.handle, "127.0.0.1", 0) for server in servers]
    for server, listener in zip(servers, listeners, strict=True):
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    try:
        yield servers
    finally:
        for llm in [llm for server in servers for llm in server.given]:
            await llm.aclose()
        for listener in listeners:
            listener.close()


def head(status: int, kind: str = "text/event-stream", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def chunk(delta: dict, finish: str | None = None) -> bytes:
    body = {"id": "r", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return f"data: {json.dumps(body)}\n\n".encode()


USED = b'data: {"id":"r","model":"m","choices":[],"usage":{"prompt_tokens":10,"completion_tokens":4}}\n\n'


def says(text: str = "4", *, after_s: float = 0.0) -> Answer:
    async def answer(writer: asyncio.StreamWriter, _: dict) -> None:
        await asyncio.sleep(after_s)
        writer.write(head(200) + chunk({"content": text}) + chunk({}, "stop") + USED + b"data: [DONE]\n\n")

    return answer


def fails(status: int, **headers: str) -> Answer:
    async def answer(writer: asyncio.StreamWriter, _: dict) -> None:
        writer.write(head(status, "application/json", **headers) + b'{"error": {"message": "no"}}')

    return answer


def looks_first(then: Answer) -> Answer:
    """Call the tool `look` before the answer."""

    async def answer(writer: asyncio.StreamWriter, body: dict) -> None:
        if any(message["role"] == "tool" for message in body["messages"]):
            await then(writer, body)
            return
        asked = {"index": 0, "id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        writer.write(head(200) + chunk({"tool_calls": [asked]}, "tool_calls") + USED + b"data: [DONE]\n\n")

    return answer


async def breaks_off(writer: asyncio.StreamWriter, _: dict) -> None:
    writer.write(head(200) + chunk({"content": "The answer is "}))


async def says_nothing(writer: asyncio.StreamWriter, _: dict) -> None:
    await asyncio.sleep(30)


@tool(effect="read")
def look() -> str:
    """Look."""
    return "seen"


# -- runs ---------------------------------------------------------------------------------------


class Run:
    """One runtime with one agent, whose journal can be read."""

    def __init__(self, llm: object, *, limits: GuardrailConfig | None = None, **agent: object) -> None:
        agent.setdefault("confidence_from_llm", False)
        self.store = MemoryCheckpointStore()
        self.runtime = AgentRuntime(
            llm=llm,
            agents=[AgentConfig("a", **agent)],  # type: ignore[arg-type]
            tools=[look],
            checkpoint_store=self.store,
            guardrail_config=limits or GuardrailConfig(),
            auto_resume=False,
        )

    async def __call__(self, run_id: str = "r") -> RunResult:
        return await self.runtime.run_agent("a", "2 + 2?", run_id=run_id)

    async def records(self, kind: type[R], run_id: str = "r") -> list[R]:
        return [entry.record async for entry in self.store.read(run_id) if isinstance(entry.record, kind)]

    async def attempts(self, run_id: str = "r") -> list[tuple[int, str]]:
        return [(record.attempt, record.model) for record in await self.records(LLMStarted, run_id)]


def label(server: Server) -> str:
    return f"127.0.0.1:{server.model}"


# -- fallback -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [fails(503), fails(429, retry_after="40"), fails(500), breaks_off], ids=["503", "429", "500", "cut"]
)
async def test_only_a_fault_before_the_first_token_asks_the_next_model(fault: Answer) -> None:
    async with serving(fault, says("4")) as (first, second):
        run = Run(FallbackLLM(first.llm(), second.llm()), max_llm_attempts=2)
        result = await asyncio.wait_for(run(), 20)
        failures = await run.records(LLMFailed)
        if fault is breaks_off:
            assert isinstance(result, Failed)
            assert (first.asked, second.asked) == (2, 0)
            assert all(failure.heard and failure.estimated for failure in failures)
            return
        assert (first.asked, second.asked) == (1, 1)
    assert isinstance(result, Finished)
    assert result.answer == "4"
    assert await run.attempts() == [(1, label(first)), (2, label(second))]
    assert [(failure.model, failure.retry_in_s, failure.heard) for failure in failures] == [(label(first), 0.0, False)]
    assert failures[0].usage.input_tokens == 0  # providers refuse before they bill
    assert result.spent.llm_calls == 2


@pytest.mark.parametrize("status", [400, 401, 404, 422])
async def test_a_request_that_is_refused_is_not_asked_of_another_model(status: int) -> None:
    async with serving(fails(status), says()) as (first, second):
        result = await Run(FallbackLLM(first.llm(), second.llm()))()
        assert isinstance(result, Failed)
        assert (first.asked, second.asked) == (1, 0)


async def test_no_first_byte_in_time_asks_the_next_model_and_is_charged() -> None:
    async with serving(says_nothing, says("4")) as (first, second):
        patience = LLMSettings(first_byte_timeout_s=0.3)
        run = Run(FallbackLLM(first.llm(), second.llm()), llm_settings=patience)
        result = await asyncio.wait_for(run(), 20)
        assert isinstance(result, Finished)
        assert (first.asked, second.asked) == (1, 1)
    (failure,) = await run.records(LLMFailed)
    assert failure.usage.input_tokens > 0
    assert failure.estimated
    assert failure.retry_in_s == 0.0
    assert result.spent.estimated == 1


async def test_a_server_that_cannot_be_reached_asks_the_next_model() -> None:
    async with serving(says()) as (gone,):
        pass
    async with serving(says("4")) as (second,):
        result = await Run(FallbackLLM(gone.llm(), second.llm()))()
        assert isinstance(result, Finished)
        assert second.asked == 1


async def test_attempts_are_bounded_over_all_models_and_pause_when_all_were_asked() -> None:
    async with serving(fails(500, retry_after_ms="10"), fails(500, retry_after_ms="10")) as (first, second):
        run = Run(FallbackLLM(first.llm(), second.llm()), max_llm_attempts=5)
        result = await run()
        assert isinstance(result, Failed)
        assert (first.asked, second.asked) == (3, 2)
    failures = await run.records(LLMFailed)
    assert [failure.retry_in_s > 0 for failure in failures] == [False, True, False, True, False]
    assert [failure.attempt for failure in failures] == [1, 2, 3, 4, 5]


async def test_a_model_that_is_down_is_passed_over_until_it_is_back() -> None:
    now = 0.0
    breaker = CircuitBreaker(failures=2, open_s=30, clock=lambda: now)
    async with serving(fails(500), says("from the second")) as (first, second):
        run = Run(FallbackLLM(GovernedLLM(first.llm(), breaker=breaker), second.llm()))
        for number in range(4):
            assert isinstance(await run(f"r{number}"), Finished)
        assert (first.asked, second.asked) == (2, 4)  # the third run and the fourth went to the second at once
        assert await run.attempts("r3") == [(1, label(second))]
        first.answer = says("from the first")
        now = 31.0
        result = await run("r4")
        assert result.answer == "from the first"
        assert (first.asked, second.asked, breaker.is_open) == (3, 4, False)


async def test_a_resumed_run_goes_on_with_the_attempt_and_the_model_it_had_come_to() -> None:
    def models() -> tuple[ScriptedLLM, ScriptedLLM, FallbackLLM]:
        def down(_: LLMRequest) -> Exception:
            return LLMError("down", transient=True, retry_after_s=0)

        class Hangs(ScriptedLLM):
            async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
                self.requests.append(request)
                reached.set()
                await asyncio.sleep(60)
                yield  # type: ignore[misc]

        first = ScriptedLLM(down, name="first")
        second = Hangs([], name="second") if not reached.is_set() else ScriptedLLM(["4"], name="second")
        return first, second, FallbackLLM(first, second)

    reached = asyncio.Event()
    _, _, both = models()
    run = Run(both)
    task = asyncio.create_task(run())
    await asyncio.wait_for(reached.wait(), 10)
    task.cancel()
    with pytest.raises((asyncio.CancelledError, RunStopped)):
        await task
    first, second, again = models()
    runtime = AgentRuntime(
        llm=again,
        agents=[AgentConfig("a", confidence_from_llm=False)],
        tools=[look],
        checkpoint_store=run.store,
        auto_resume=False,
    )
    result = await runtime.resume("r")
    assert isinstance(result, Finished)
    assert (len(first.requests), len(second.requests)) == (0, 1)
    assert [attempt for attempt, _ in await run.attempts()] == [1, 2, 2]
    assert not await run.records(ConfigDiffers)


async def test_a_resume_says_that_a_fallback_was_added() -> None:
    run = Run(ScriptedLLM([LLMError("no")], name="a"))
    assert isinstance(await run(), Failed)
    both = FallbackLLM(ScriptedLLM(["4"], name="a"), ScriptedLLM(["4"], name="b"))
    runtime = AgentRuntime(
        llm=both, agents=[AgentConfig("a", confidence_from_llm=False)], tools=[look],
        checkpoint_store=run.store, auto_resume=False,
    )  # fmt: skip
    assert isinstance(await runtime.resume("r"), Finished)
    (differs,) = await run.records(ConfigDiffers)
    assert "the llm (harness:a -> fallback:harness:a > harness:b)" in str(differs.changes)


async def test_budget_is_held_for_the_dearest_model() -> None:
    cheap = ScriptedLLM(["4"], name="cheap", price=lambda _in, _out: 10)
    dear = ScriptedLLM(["4"], name="dear", price=lambda _in, _out: 5_000_000)
    result = await Run(FallbackLLM(cheap, dear), limits=GuardrailConfig(max_total_cost_usd=1))()
    assert isinstance(result, Failed)
    assert result.reason == "budget"
    assert not cheap.requests


# -- routing ------------------------------------------------------------------------------------


async def test_a_selector_chooses_the_model_of_each_call() -> None:
    small = ScriptedLLM(lambda _: call("look"), name="small")
    large = ScriptedLLM(lambda _: "seen it", name="large")

    def select(request: LLMRequest) -> str:
        return "large" if len(request.messages) > 1 else "small"

    run = Run(RoutingLLM(select, {"small": small, "large": large}))
    result = await run()
    assert result.answer == "seen it"
    assert (len(small.requests), len(large.requests)) == (1, 1)
    assert await run.attempts() == [(1, "small"), (1, "large")]


async def test_a_name_that_is_no_models_fails_the_run_and_says_so() -> None:
    only = ScriptedLLM(["4"])
    run = Run(RoutingLLM(lambda _: "lrage", {"large": only}))
    result = await run()
    assert isinstance(result, Failed)
    assert "select returned 'lrage'; did you mean 'large'" in result.error
    assert len(await run.records(LLMFailed)) == 1
    assert not only.requests


async def test_a_selector_that_fails_behind_a_limit_holds_no_place_in_it() -> None:
    limit = RateLimit(max_concurrent=1)
    result = await asyncio.wait_for(Run(GovernedLLM(RoutingLLM(lambda _: "b", {"a": ScriptedLLM(["4"])}), limit))(), 10)
    assert isinstance(result, Failed)
    assert "select returned 'b'" in result.error
    assert (limit.waiting, limit.running) == (0, 0)


async def test_a_route_that_falls_back() -> None:
    async with serving(fails(502), says("4")) as (first, second):
        llm = RoutingLLM(lambda _: "main", {"main": FallbackLLM(first.llm(), second.llm())})
        run = Run(llm)
        assert isinstance(await run(), Finished)
        assert (first.asked, second.asked) == (1, 1)
    assert [model for _, model in await run.attempts()] == [f"main/{label(first)}", f"main/{label(second)}"]


# -- the breaker --------------------------------------------------------------------------------


async def test_an_open_breaker_fails_at_once_without_a_request_or_a_charge_and_recovers() -> None:
    breaker = CircuitBreaker(failures=2, open_s=0.3)
    async with serving(fails(500)) as (server,):
        run = Run(GovernedLLM(server.llm(), breaker=breaker), max_llm_attempts=1)
        results = [await run(f"r{number}") for number in range(5)]
        result = results[-1]
        assert isinstance(result, Failed)
        assert server.asked == 2
        assert "is left alone; it is tried again in" in result.error
        assert result.spent.usage.input_tokens == 0
        (failure,) = await run.records(LLMFailed, "r4")
        assert failure.transient
        assert 0 < failure.retry_in_s <= 0.4  # when it tries again
        server.answer = says("4")
        patient = Run(GovernedLLM(server.llm(), breaker=breaker), max_llm_attempts=3)
        assert isinstance(await asyncio.wait_for(patient(), 20), Finished)
        assert not breaker.is_open
        assert server.asked == 3


# -- the limit ----------------------------------------------------------------------------------


async def test_twenty_agents_and_two_runs_never_exceed_one_limit() -> None:
    limit = RateLimit(requests_per_minute=960, max_concurrent=6, window_s=0.5)  # 8 in any half second
    async with serving(looks_first(says("done", after_s=0.01))) as (server,):
        plan = Plan([Task(f"t{n}", f"a{n}", f"Do part {n}.") for n in range(20)])
        agents = [
            AgentConfig(f"a{n}", confidence_from_llm=False, llm=GovernedLLM(server.llm(), limit)) for n in range(20)
        ]

        def runtime() -> AgentRuntime:
            return AgentRuntime(
                llm=GovernedLLM(server.llm(), limit), agents=agents, tools=[look],
                guardrail_config=GuardrailConfig(max_parallel_tasks=20),
                checkpoint_store=MemoryCheckpointStore(), auto_resume=False,
            )  # fmt: skip

        first, second = runtime(), runtime()
        results = await asyncio.wait_for(
            asyncio.gather(
                first.run_plan(plan, run_id="p"), second.run_agent("a0", "x", run_id="q"),
                second.run_agent("a1", "y", run_id="s"),
            ),
            40,
        )  # fmt: skip
    assert all(isinstance(result, Finished) for result in results)
    assert server.asked >= 2 * 22  # every task and run looks and answers
    assert server.most <= 6
    times = sorted(server.times)
    most = max(sum(begin <= other < begin + 0.49 for other in times) for begin in times)
    assert most <= 8
    assert (limit.waiting, limit.running) == (0, 0)


def test_runs_in_threads_share_a_limit() -> None:
    limit = RateLimit(max_concurrent=1)
    lock, now, most = threading.Lock(), [0], [0]

    class Counts(ScriptedLLM):
        async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            try:
                await asyncio.sleep(0.01)
                async for delta in super().stream(request):
                    yield delta
            finally:
                with lock:
                    now[0] -= 1

    results: list[RunResult] = []

    def one() -> None:
        run = Run(GovernedLLM(Counts([call("look"), "4"]), limit))
        results.append(run.runtime.run_sync(run()))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [type(result) for result in results] == [Finished] * 4
    assert most == [1]


async def test_one_agents_429_holds_the_others_back() -> None:
    limit = RateLimit(requests_per_minute=6000)
    async with serving(fails(429, retry_after="1")) as (server,):
        hasty, other = (Run(GovernedLLM(server.llm(), limit)) for _ in range(2))
        task = asyncio.create_task(hasty())
        async with asyncio.timeout(10):
            while not limit.paused_s:  # noqa: ASYNC110 - the server's answer is waited for
                await asyncio.sleep(0.005)
        refused_at = server.times[0]
        server.answer = says("4")
        assert isinstance(await other(), Finished)
        assert isinstance(await task, Finished)
    assert server.asked == 3
    assert min(server.times[1:]) - refused_at >= 1.0


async def test_waiting_counts_against_no_deadline_of_the_call() -> None:
    limit = RateLimit(max_concurrent=1)
    ticket = limit.join(1, lease_s=60)
    hasty = LLMSettings(silence_timeout_s=0.2, call_timeout_s=0.2)
    run = Run(GovernedLLM(ScriptedLLM(["4"]), limit), llm_settings=hasty)
    task = asyncio.create_task(run())
    await asyncio.sleep(0.5)
    assert not await run.records(LLMStarted)
    limit.leave(ticket)
    assert isinstance(await task, Finished)
    assert not await run.records(LLMFailed)


@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside a task at work"])
async def test_waiting_ends_at_the_wall_clock_limit(others: bool) -> None:
    limit = RateLimit(max_concurrent=1)
    limit.join(1, lease_s=60)
    model = ScriptedLLM(["4"])
    agents = [AgentConfig("a", confidence_from_llm=False), AgentConfig("b", confidence_from_llm=False)]
    runtime = AgentRuntime(
        llm=GovernedLLM(model, limit), agents=agents, checkpoint_store=MemoryCheckpointStore(), auto_resume=False,
        guardrail_config=GuardrailConfig(max_wall_time_seconds=0.4),
    )  # fmt: skip
    plan = Plan([Task("t1", "a", "x"), Task("t2", "b", "y")])
    running = runtime.run_plan(plan, run_id="r") if others else runtime.run_agent("a", "x", run_id="r")
    result = await asyncio.wait_for(running, 10)
    assert isinstance(result, Failed)
    assert result.reason == "budget"
    assert "max_wall_time_seconds" in result.error
    assert not model.requests
    assert result.spent.usage.input_tokens == 0
    assert (limit.waiting, limit.running) == (0, 1)


async def test_a_cancelled_run_leaves_the_queue_at_once() -> None:
    limit = RateLimit(max_concurrent=1)
    limit.join(1, lease_s=60)
    run = Run(GovernedLLM(ScriptedLLM(["4"]), limit))
    task = asyncio.create_task(run())
    async with asyncio.timeout(10):
        while not limit.waiting:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.005)
    await run.runtime.cancel("r", reason="enough")
    result = await asyncio.wait_for(task, 10)
    assert isinstance(result, Cancelled)
    assert (limit.waiting, limit.running) == (0, 1)
    assert not await run.records(LLMStarted)


async def test_guidance_that_comes_while_a_call_waits_is_in_it() -> None:
    limit = RateLimit(max_concurrent=1)
    ticket = limit.join(1, lease_s=60)
    model = ScriptedLLM(["4"])
    run = Run(GovernedLLM(model, limit))
    task = asyncio.create_task(run())
    async with asyncio.timeout(10):
        while not limit.waiting:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.005)
    await run.runtime.steer("r", "Be brief.")
    limit.leave(ticket)
    assert isinstance(await asyncio.wait_for(task, 10), Finished)
    assert "Be brief." in str(model.requests[0].messages)
    assert len(model.requests) == 1
    assert (limit.waiting, limit.running) == (0, 0)


async def test_a_model_outside_of_a_run_waits_in_its_stream() -> None:
    limit = RateLimit(max_concurrent=1)
    ticket = limit.join(1, lease_s=60)
    governed = GovernedLLM(ScriptedLLM(["4"]), limit)

    async def ask() -> int:
        return len([delta async for delta in governed.stream(LLMRequest("", []))])

    task = asyncio.create_task(ask())
    await asyncio.sleep(0.01)
    assert not task.done()
    limit.leave(ticket)
    assert await asyncio.wait_for(task, 10) == 2
    assert limit.running == 0


PROGRAM = """
import asyncio, sys
from harness import AgentConfig, AgentRuntime, FileCheckpointStore, GovernedLLM, OpenAILLM, RateLimit, tool

limit = RateLimit(requests_per_minute=1)

@tool(effect="read")
def look() -> str:
    "Look."
    return "seen"

async def main() -> None:
    runtime = AgentRuntime(
        llm=GovernedLLM(OpenAILLM("m0", base_url=sys.argv[1]), limit),
        agents=[AgentConfig("a", confidence_from_llm=False)], tools=[look],
        checkpoint_store=FileCheckpointStore(sys.argv[2]), auto_resume=False,
    )
    run = asyncio.create_task(runtime.run_agent("a", "2 + 2?", run_id="r"))
    while limit.running or not limit.waiting:
        await asyncio.sleep(0.005)
    print("waiting", flush=True)
    await run

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_a_run_that_is_killed_while_it_waits_is_not_charged_for_that(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with serving(looks_first(says("4"))) as (server,):
        words = [sys.executable, "-c", PROGRAM, server.url, str(tmp_path)]
        child = await asyncio.create_subprocess_exec(
            *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)
        )
        assert child.stdout is not None
        assert await asyncio.wait_for(child.stdout.readline(), 30) == b"waiting\n"
        child.send_signal(number)
        await asyncio.wait_for(child.communicate(), 10)
        assert server.asked == 1
        runtime = AgentRuntime(
            llm=server.llm(), agents=[AgentConfig("a", confidence_from_llm=False)], tools=[look],
            checkpoint_store=FileCheckpointStore(tmp_path), auto_resume=False,
        )  # fmt: skip
        result = await runtime.resume("r")
        assert isinstance(result, Finished)
        assert result.answer == "4"
        assert server.asked == 2
    assert (result.spent.llm_calls, result.spent.estimated) == (2, 0)
    assert result.spent.usage.input_tokens == 20
    store = FileCheckpointStore(tmp_path)
    entries = [entry async for entry in store.read("r")]
    started = [entry.record for entry in entries if isinstance(entry.record, LLMStarted)]
    answered = [entry.record for entry in entries if isinstance(entry.record, LLMFinished)]
    assert (len(started), len(answered)) == (2, 2)
    assert not [entry for entry in entries if isinstance(entry.record, ConfigDiffers)]
    assert fold("r", entries).spent == result.spent
