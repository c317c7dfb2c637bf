"""Every fault of a provider, over real HTTP and through each adapter on an SDK.

Whatever it does: the run ends, with its answer after another attempt or with a clear failure; the provider's own log
shows the attempts that the journal holds and no more; nothing runs from a reply that is cut, malformed or ended at its
limit; what is charged is what the provider says it billed, or the reservation where it did not come to say it.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from fake_provider import Answer, AnthropicWire, Call, OpenAIWire, Provider, Scripts, Usage, Wire, providing
from harness import (
    AgentConfig,
    AgentRuntime,
    AnthropicLLM,
    Failed,
    Finished,
    GuardrailConfig,
    LLMSettings,
    MemoryCheckpointStore,
    OpenAILLM,
    Plan,
    Task,
    ToolContext,
    tool,
)
from harness.records import LLMFailed, LLMFinished, LLMStarted
from harness.result import RunResult

R = TypeVar("R")

WIRES: list[Wire] = [OpenAIWire(), AnthropicWire()]


@pytest.fixture(params=WIRES, ids=lambda wire: wire.name)
def wire(request: pytest.FixtureRequest) -> Wire:
    return request.param


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: min(high, low + 0.01))


def price(usage: Any) -> float:
    """Three micro-dollars for a token in, seven for one out."""
    return (3 * usage["tokens_in"] + 7 * usage["tokens_out"]) / 1_000_000


@dataclass
class Played:
    """What came of a run, and what was seen of it outside."""

    result: RunResult
    requests: list[dict[str, Any]]
    billed: list[Usage]
    noted: list[str]
    seconds: float

    def records(self, kind: type[R]) -> list[R]:
        return [entry.record for entry in self.result.trace if isinstance(entry.record, kind)]

    @property
    def failures(self) -> list[LLMFailed]:
        return self.records(LLMFailed)

    def check(self) -> Played:
        """Hold the journal against the provider's log, to the token."""
        starts, spent = self.records(LLMStarted), self.result.spent
        unsent = [f for f in self.failures if f.error == "the wall-clock limit is over"]
        assert len(starts) - len(unsent) == len(self.requests)
        assert len(starts) == spent.llm_calls
        reserved = {(s.step, s.attempt): s.reserved for s in starts}
        assert len(reserved) == len(starts)
        estimates = [reserved[f.step, f.attempt].as_usage() for f in self.failures if f.estimated]
        estimates += [reply.usage for reply in self.records(LLMFinished) if reply.estimated]
        tokens_in = sum(u[0] for u in self.billed) + sum(u.input_tokens for u in estimates)
        tokens_out = sum(u[1] for u in self.billed) + sum(u.output_tokens for u in estimates)
        assert (spent.usage.input_tokens, spent.usage.output_tokens) == (tokens_in, tokens_out)
        assert (spent.usage.cost_microusd, spent.usage.unpriced) == (3 * tokens_in + 7 * tokens_out, 0)
        budget = self.result.budget
        assert (budget["tokens"], budget["cost_usd"]) == (tokens_in + tokens_out, spent.usage.cost_usd)
        assert budget["breakdown"]["estimated_calls"] == len(estimates)  # type: ignore[index]  # plain data
        assert "Traceback" not in self.result.error
        return self


class Stage:
    """An agent with one tool that has an effect, on a provider.

    Args:
        provider: the provider, with a script for each goal.
        folder: where the tool writes.
        timeout_s: the adapter's own patience.
        agent: more of the agent's configuration.
        settings: more of its model settings.
        limits: of the runs.
    """

    def __init__(
        self,
        provider: Provider,
        folder: Path,
        *,
        timeout_s: float = 5,
        agent: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        **limits: Any,
    ) -> None:
        @tool(effect="once")
        def note(line: str, context: ToolContext[None]) -> str:
            """Write a line down."""
            with (folder / context.run_id).open("a") as out:
                out.write(f"{line}\n")
            return f"noted {line}"

        self.provider = provider
        self.folder = folder
        self.llm = provider.wire.llm(provider.url, request_timeout_seconds=timeout_s, cost_fn=price)
        asked = LLMSettings(max_output_tokens=300, **(settings or {}))
        config = AgentConfig("a", confidence_from_llm=False, llm_settings=asked, **(agent or {}))
        self.runtime = AgentRuntime(
            llm=self.llm,
            agents=[config],
            tools=[note],
            guardrail_config=GuardrailConfig(**limits),
            checkpoint_store=MemoryCheckpointStore(),
        )

    async def run(self, goal: str) -> Played:
        began = time.monotonic()
        result = await self.runtime.run_agent("a", goal)
        seconds = time.monotonic() - began
        file = self.folder / result.run_id
        noted = file.read_text().splitlines() if file.exists() else []
        return Played(result, self.provider.requests[goal], self.provider.billed[goal], noted, seconds)


@asynccontextmanager
async def staged(wire: Wire, scripts: Scripts, folder: Path, **settings: Any) -> AsyncIterator[Stage]:
    """Put an agent on a provider."""
    async with providing(wire, scripts) as provider:
        stage = Stage(provider, folder, **settings)
        try:
            yield stage
        finally:
            await stage.llm.aclose()  # type: ignore[attr-defined]  # both adapters have it


GOAL = "Note one line."


async def play(wire: Wire, answers: Sequence[Answer], folder: Path, **settings: Any) -> Played:
    """Run one agent once against a provider, and hold its journal against the provider's log."""
    async with staged(wire, {GOAL: answers}, folder, **settings) as stage:
        return (await stage.run(GOAL)).check()


def noting(wire: Wire, line: str = "one", **more: Any) -> Answer:
    """A whole reply that calls the tool."""
    return wire.reply("I note it.", Call("note", json.dumps({"line": line})), **more)


def then(wire: Wire, *first: Answer) -> list[Answer]:
    """The fault, then a good run: one call of the tool, and the answer."""
    return [*first, noting(wire, usage=(110, 21)), wire.reply("Noted.", usage=(130, 5))]


# -- faults after which the same call succeeds ------------------------------------------------------------------------

DATE = "a date"

RETRY_AFTER: dict[str, dict[str, str]] = {
    "none": {},
    "zero": {"retry_after": "0"},
    "fraction": {"retry_after": "0.02"},
    "milliseconds": {"retry_after_ms": "15"},
    "date": {"retry_after": DATE},
    "past date": {"retry_after": "Sun, 06 Nov 1994 08:49:37 GMT"},
    "negative": {"retry_after": "-5"},
    "nan": {"retry_after": "nan"},
    "words": {"retry_after": "soon"},
    "empty": {"retry_after": ""},
}


@pytest.mark.parametrize("kind", RETRY_AFTER)
async def test_a_429_is_tried_again_when_it_says(wire: Wire, tmp_path: Path, kind: str) -> None:
    headers = {k: email.utils.formatdate(time.time() + 0.5, usegmt=True) if v == DATE else v
               for k, v in RETRY_AFTER[kind].items()}  # fmt: skip
    played = await play(wire, then(wire, wire.error(429, "slow down", **headers)), tmp_path)
    assert isinstance(played.result, Finished)
    assert played.noted == ["one"]
    assert [f.transient for f in played.failures] == [True]
    assert "slow down" in played.failures[0].error
    assert played.result.spent.estimated == 0


@pytest.mark.parametrize("status", [408, 409, 500, 502, 503, 504, 529])
async def test_a_server_in_trouble_is_tried_again_and_costs_nothing(wire: Wire, tmp_path: Path, status: int) -> None:
    page = Answer(b"<html>" + b"x" * 100_000, status, "text/html")
    played = await play(wire, then(wire, wire.error(status), page), tmp_path)
    assert isinstance(played.result, Finished)
    assert (played.noted, len(played.requests)) == (["one"], 4)
    assert played.result.spent.estimated == 0


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422])
async def test_a_request_that_is_wrong_is_not_tried_again(wire: Wire, tmp_path: Path, status: int) -> None:
    played = await play(wire, [wire.error(status, "that is wrong")], tmp_path)
    assert isinstance(played.result, Failed)
    assert played.result.reason == "llm"
    assert f"HTTP {status}" in played.result.error
    assert "that is wrong" in played.result.error
    assert (len(played.requests), played.noted) == (1, [])


def broken(wire: Wire) -> dict[str, Answer]:
    """Ways in which a reply that calls the tool never arrives whole."""
    whole = noting(wire)
    body = whole.body
    middle = len(body) // 2
    within = body.index(b"data: {", middle) + 20
    return {
        "reset before the head": Answer(status=0, end="reset"),
        "closed before the head": Answer(status=0, end="close", framed=False),
        "reset after the head": whole.cut(0, "reset"),
        "reset in the middle": whole.cut(middle, "reset", framed=True),
        "closed in the middle": whole.cut(middle),
        "closed in the middle of a known length": whole.cut(middle, framed=True),
        "silent in the middle": whole.cut(middle, "stall"),
        "silent from the start": Answer(status=0, end="stall"),
        "nothing": Answer(),
        "garbage": Answer(b"\xff\xfe garbage \x00\n\n" * 100),
        "no JSON": Answer(b"data: {not json}\n\n"),
        "JSON of another kind": Answer(b"data: [1, 2]\n\ndata: 7\n\n"),
        "JSON without end": Answer(b"data: " + b"[" * 100_000 + b"\n\n"),
        "an event cut in two": Answer(body[:within] + b"\n\n" + body[within:]),
        "an error in the middle": Answer(body[: body.index(b"\n\n", middle) + 2] + wire.broken_off("overloaded")),
        "an error at the start": Answer(wire.broken_off("overloaded")),
        "gzip that is none": Answer(body, headers=(("content-encoding", "gzip"),)),
    }


@pytest.mark.parametrize("fault", broken(WIRES[0]))
async def test_a_reply_that_does_not_arrive_whole_is_asked_for_again(wire: Wire, tmp_path: Path, fault: str) -> None:
    answers = then(wire, broken(wire)[fault])
    # The good replies that follow have to come within that time too.
    played = await play(wire, answers, tmp_path, timeout_s=0.6 if fault.startswith("silent") else 20)
    assert isinstance(played.result, Finished), played.result
    assert (played.noted, len(played.requests)) == (["one"], 3)
    [failure] = played.failures
    assert failure.transient
    # The provider may have billed all of these, but not what it says it did not work on.
    assert failure.estimated is (fault != "an error at the start")


async def test_a_server_that_is_not_there_is_a_clear_failure(wire: Wire, tmp_path: Path) -> None:
    async with providing(wire, {}) as provider:
        url = provider.url
    llm = wire.llm(url, cost_fn=price)
    runtime = AgentRuntime(llm=llm, agents=[AgentConfig("a")], checkpoint_store=MemoryCheckpointStore())
    result = await runtime.run_agent("a", "Hello?")
    assert isinstance(result, Failed)
    assert "cannot reach the model" in result.error
    assert "after 4 attempts" in result.error
    assert (result.spent.llm_calls, result.spent.estimated, result.spent.usage.cost_microusd) == (4, 0, 0)
    await llm.aclose()  # type: ignore[attr-defined]


async def test_a_reply_cut_at_any_byte_does_nothing(wire: Wire, tmp_path: Path) -> None:
    calls = [Call("note", json.dumps({"line": f"cut {n}"}), f"call-{n}") for n in range(2)]
    whole = wire.reply("I note it.", *calls)
    # What is left out at the end may be missing: the reply is whole before that.
    last = whole.body.rindex(b"[DONE]" if wire.name == "openai" else b"message_stop") + 3
    places = sorted({*range(0, last, 13), *range(last - 30, last)})
    scripts = {f"Note <{at}>.": then(wire, whole.cut(at, framed=at % 2 == 0)) for at in places}
    async with staged(wire, scripts, tmp_path) as stage:
        for start in range(0, len(places), 20):
            goals = [*scripts][start : start + 20]
            for played in await asyncio.gather(*map(stage.run, goals)):
                played.check()
                assert isinstance(played.result, Finished), played.result
                assert (played.noted, len(played.requests)) == (["one"], 3)
                assert played.result.spent.estimated == 1


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
async def test_a_flood_is_given_up_and_not_asked_for_again(wire: Wire, tmp_path: Path, kind: str) -> None:
    flood = Answer(b"data: " + b"x" * 60_000_000, kind=kind)
    played = await play(wire, [flood], tmp_path)
    assert isinstance(played.result, Failed)
    assert "larger than" in played.result.error
    assert len(played.requests) == 1


@pytest.mark.parametrize(("kind", "body"), [("text/html", b"<html>Welcome</html>"), ("application/json", b'{"ok": 1}')])
async def test_an_answer_that_is_no_stream_is_explained(wire: Wire, tmp_path: Path, kind: str, body: bytes) -> None:
    played = await play(wire, [Answer(body, kind=kind)], tmp_path)
    assert isinstance(played.result, Failed)
    assert "base_url" in played.result.error
    assert len(played.requests) == 1
    assert played.result.spent.estimated == (kind != "text/html")


async def test_attempts_end(wire: Wire, tmp_path: Path) -> None:
    played = await play(wire, [wire.error(503)], tmp_path, agent={"max_llm_attempts": 3})
    assert isinstance(played.result, Failed)
    assert "after 3 attempts" in played.result.error
    assert len(played.requests) == 3


# -- whole replies that are not as they should be ---------------------------------------------------------------------


async def test_a_tool_that_is_not_there_is_named_to_the_model(wire: Wire, tmp_path: Path) -> None:
    played = await play(wire, then(wire, wire.reply("", Call("notte", '{"line": "one"}'))), tmp_path)
    assert isinstance(played.result, Finished)
    assert played.noted == ["one"]
    [(_, said)] = wire.results(played.requests[1])
    assert "unknown tool 'notte'" in said
    assert "note" in said


@pytest.mark.parametrize(
    "arguments",
    ['{"line": ', "{'line': 'one'}", "[]", '"one"', "7", "null", '{"line": NaN}', '{"lime": "one"}', '{"line": 1e999}',
     '{"line": "one"} {"line": "two"}', "\x00", '{"line":' * 5_000],
)  # fmt: skip
async def test_arguments_that_do_not_fit_are_not_run(wire: Wire, tmp_path: Path, arguments: str) -> None:
    played = await play(wire, then(wire, wire.reply("", Call("note", arguments))), tmp_path)
    assert isinstance(played.result, Finished), played.result
    assert played.noted == ["one"]
    assert len(played.requests) == 3


async def test_calls_with_one_id_are_two_calls_with_an_answer_each(wire: Wire, tmp_path: Path) -> None:
    twice = wire.reply("", Call("note", '{"line": "a"}', "x"), Call("note", '{"line": "b"}', "x"))
    played = await play(wire, [twice, wire.reply("Noted.")], tmp_path)
    assert isinstance(played.result, Finished)
    assert sorted(played.noted) == ["a", "b"]
    answered = wire.results(played.requests[1])
    assert sorted(text for _, text in answered) == ["noted a", "noted b"]
    assert len({call_id for call_id, _ in answered}) == 2


NAN = float("nan")


@pytest.mark.parametrize(
    ("usage", "odd"),
    [
        (None, {}),
        (None, {"tokens_in": NAN, "tokens_out": NAN}),
        (None, {"tokens_in": "many", "tokens_out": None}),
        (None, {"tokens_in": -5, "tokens_out": -1}),
        (None, {"tokens_in": {}, "tokens_out": []}),
    ],
    ids=["missing", "NaN", "no number", "negative", "of another kind"],
)
async def test_a_reply_without_usage_is_charged_by_estimate(
    wire: Wire, tmp_path: Path, usage: None, odd: dict[str, object]
) -> None:
    played = await play(wire, then(wire, noting(wire, line="zero", usage=usage, **odd)), tmp_path)
    assert isinstance(played.result, Finished), played.result
    assert played.noted == ["zero", "one"]
    assert played.result.spent.estimated == 1
    assert played.records(LLMFinished)[0].usage.input_tokens > 0


async def test_a_reply_that_ended_at_its_limit_does_nothing(wire: Wire, tmp_path: Path) -> None:
    played = await play(wire, then(wire, noting(wire, line="half", finish="length")), tmp_path)
    assert isinstance(played.result, Finished)
    assert (played.noted, len(played.requests)) == (["one"], 3)
    assert played.result.spent.estimated == 0


async def test_a_filtered_reply_does_nothing_and_ends_the_run(wire: Wire, tmp_path: Path) -> None:
    played = await play(wire, [noting(wire, finish="content_filter")], tmp_path)
    assert isinstance(played.result, Failed)
    assert played.result.reason == "refused"
    assert (played.noted, len(played.requests)) == ([], 1)


async def test_an_empty_reply_is_asked_for_again(wire: Wire, tmp_path: Path) -> None:
    played = await play(wire, then(wire, wire.reply("")), tmp_path)
    assert isinstance(played.result, Finished)
    assert played.noted == ["one"]


# -- deadlines --------------------------------------------------------------------------------------------------------

SLACK_S = 0.75
"""What a busy machine may add to a tenth more than the deadline."""


def stalls(wire: Wire) -> dict[str, Answer]:
    """Ways in which a provider keeps a caller waiting."""
    whole = noting(wire)
    return {
        "first byte never": Answer(status=0, end="stall"),
        "head and nothing": whole.cut(0, "stall"),
        "silence in the middle": whole.cut(len(whole.body) // 2, "stall"),
        "nothing but comments": whole.cut(0, "drip"),
        "half and comments for ever": whole.cut(whole.body.index(b"\n\n", len(whole.body) // 2) + 2, "drip"),
        "come back in an hour": wire.error(429, retry_after="3600"),
        "come back in a century": wire.error(503, retry_after="Fri, 31 Dec 9999 23:59:59 GMT"),
        "in trouble for ever": wire.error(500),
    }


async def test_the_wall_clock_limit_ends_every_wait(wire: Wire, tmp_path: Path) -> None:
    limit_s = 0.5
    scripts: Scripts = {fault: [answer] for fault, answer in stalls(wire).items()}
    many = {"max_llm_attempts": 10_000}
    async with staged(wire, scripts, tmp_path, agent=many, max_wall_time_seconds=limit_s) as stage:
        all_played = await asyncio.gather(*map(stage.run, scripts))
    for fault, played in zip(scripts, all_played, strict=True):
        played.check()
        assert isinstance(played.result, Failed), fault
        assert played.result.reason == "budget", (fault, played.result.error)
        assert played.seconds <= limit_s * 1.1 + SLACK_S, fault
        assert played.noted == [], fault


@pytest.mark.parametrize("which", ["call_timeout_s", "silence_timeout_s"])
async def test_the_deadline_of_a_call_ends_it(wire: Wire, tmp_path: Path, which: str) -> None:
    limit_s = 0.3
    kinds = [fault for fault in stalls(wire) if not fault.startswith(("come", "in trouble"))]
    scripts: Scripts = {fault: [stalls(wire)[fault]] for fault in kinds}
    settings = {which: limit_s}
    async with staged(wire, scripts, tmp_path, agent={"max_llm_attempts": 1}, settings=settings) as stage:
        all_played = await asyncio.gather(*map(stage.run, scripts))
    for fault, played in zip(scripts, all_played, strict=True):
        played.check()
        assert isinstance(played.result, Failed), fault
        assert "no reply within its deadline" in played.result.error, fault
        assert played.seconds <= limit_s * 1.1 + SLACK_S, fault
        assert (played.noted, played.result.spent.estimated) == ([], 1), fault


# -- many calls at once -----------------------------------------------------------------------------------------------


async def test_two_runs_on_one_object_see_their_own_spending_only(wire: Wire, tmp_path: Path) -> None:
    both = asyncio.Event()
    usages: dict[str, Usage] = {"Be the first.": (100, 10), "Be the second.": (9_000, 700)}
    scripts = {goal: [replace(wire.reply(goal, usage=usage), after=both)] for goal, usage in usages.items()}
    async with staged(wire, scripts, tmp_path) as stage:
        runs = [asyncio.create_task(stage.run(goal)) for goal in scripts]
        while len(stage.provider.requests) < 2:  # noqa: ASYNC110 - both are to be asked before one is answered
            await asyncio.sleep(0.001)
        both.set()
        for played, usage in zip(await asyncio.gather(*runs), usages.values(), strict=True):
            played.check()
            assert isinstance(played.result, Finished)
            assert played.billed == [usage]
            assert (played.result.spent.llm_calls, played.result.spent.estimated) == (1, 0)


async def test_of_twenty_calls_at_once_two_are_sent_where_the_budget_is_for_two(wire: Wire) -> None:
    dear = wire.reply("done", usage=(100, 1_000))
    async with providing(wire, {"Do it.": [dear]}) as provider:
        llm = wire.llm(provider.url, cost_fn=lambda usage: usage["tokens_out"] / 10_000)
        runtime = AgentRuntime(
            llm=llm,
            agents=[AgentConfig("a", llm_settings=LLMSettings(max_output_tokens=1_000))],
            guardrail_config=GuardrailConfig(max_total_cost_usd=0.205, max_parallel_tasks=20),
            checkpoint_store=MemoryCheckpointStore(),
        )
        tasks = [Task(f"t{n}", "a", "Do it.", on_failure="skip") for n in range(20)]
        result = await runtime.run_plan(Plan(tasks))
        await llm.aclose()  # type: ignore[attr-defined]
    assert isinstance(result, Failed)
    assert result.reason == "budget"
    assert len(provider.requests["Do it."]) == 2
    assert result.spent.usage.cost_usd == pytest.approx(0.2)
    assert (result.spent.llm_calls, result.spent.usage.output_tokens) == (2, 2_000)


# -- what is told of it ------------------------------------------------------------------------------------------------

CANARY = "sk-canary-0123456789"


def with_key(wire: Wire, url: str) -> OpenAILLM | AnthropicLLM:
    """An adapter with a key, and with a password in its address."""
    address = url.replace("://", "://somebody:pw-canary-0123@")
    if wire.name == "openai":
        return OpenAILLM("m-1", api_key=CANARY, base_url=f"{address}/v1")
    return AnthropicLLM("m-1", api_key=CANARY, base_url=address)


async def test_a_key_that_a_server_repeats_is_in_no_error_journal_or_log(
    wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    """Gateways answer a key they do not know with the key."""
    caplog.set_level("DEBUG", logger="harness")
    said = f"Authentication error. Received={CANARY} pw-canary-0123"
    answers = {"Plain.": [wire.error(401, said)], "Broken.": [Answer(wire.broken_off(said))]}
    async with providing(wire, answers) as provider:
        llm = with_key(wire, provider.url)
        store = MemoryCheckpointStore()
        runtime = AgentRuntime(llm=llm, agents=[AgentConfig("a", max_llm_attempts=1)], checkpoint_store=store)
        results = [await runtime.run_agent("a", goal, run_id=goal) for goal in answers]
    results.append(await runtime.run_agent("a", "Down.", run_id="Down."))  # nobody listens there any more
    journals = [repr(entry) for goal in (*answers, "Down.") for entry in [e async for e in store.read(goal)]]
    for result in results:
        assert isinstance(result, Failed)
    assert "Received=***" in results[0].error
    assert "cannot reach the model at 'http://127.0.0.1" in results[2].error
    shown = "\n".join([*journals, *(result.error for result in results), repr(llm), caplog.text])
    assert "canary" not in shown
