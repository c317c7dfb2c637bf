"""Raising a limit through an approval: a run that meets one asks, waits, and goes on or ends as it is told.

Model calls are counted at the model, effects in a file the tools write to.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import (
    AgentConfig,
    AgentRuntime,
    CheckpointStore,
    ConfigError,
    Failed,
    FileCheckpointStore,
    Finished,
    GuardrailConfig,
    LLMError,
    LLMSettings,
    MemoryCheckpointStore,
    Parked,
    Plan,
    SQLiteCheckpointStore,
    Task,
    Usage,
    delegate,
)
from harness.approval import GatedCall, Judged
from harness.budget import Reservation, Spent
from harness.checkpoint.base import this_process
from harness.events import ApprovalResolved as Answered
from harness.events import Guidance
from harness.hitl import ApprovalRequest, Approve, Context, Decision, Edit, Policy, Reject, Rule, Steer
from harness.hitl.gate import context_of
from harness.hitl.predicates import Between
from harness.llm.base import LLMRequest
from harness.raising import LIMITS, invalid_raise, limit_in, proposed
from harness.records import (
    BUDGET,
    ApprovalRequested,
    ApprovalResolved,
    ApprovalVoided,
    CommandRefused,
    LLMFailed,
    LLMStarted,
    Record,
    RunFailed,
    ToolFinished,
    ToolStarted,
)
from harness.testing import RecordingTool, Reply, ScriptedLLM, call

RUN = "run"
ROUND = [call("read", path="a"), call("read", path="b"), call("read", path="c"), "Done."]


class Desk:
    """A person who gives prepared answers, and keeps what was asked."""

    name = "desk:ann"

    def __init__(self, *answers: Decision | None) -> None:
        self.asked: list[ApprovalRequest] = []
        self._answers = list(answers)

    async def decide(self, request: ApprovalRequest, /) -> Decision | None:
        self.asked.append(request)
        return self._answers.pop(0) if self._answers else None


@pytest.fixture(params=["memory", "sqlite", "file"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[CheckpointStore]:
    made: dict[str, Callable[[], CheckpointStore]] = {
        "memory": MemoryCheckpointStore,
        "sqlite": lambda: SQLiteCheckpointStore(tmp_path / "runs.db"),
        "file": lambda: FileCheckpointStore(tmp_path / "runs"),
    }
    store = made[request.param]()
    yield store
    await store.close()


class Desks:
    """Runtimes that come and go on one store, and what happened outside of them."""

    def __init__(self, store: CheckpointStore, folder: Path) -> None:
        self.store = store
        self.log = folder / "effects.log"
        self.llm = ScriptedLLM(ROUND)

    def runtime(
        self,
        limits: GuardrailConfig,
        *answers: Decision | None,
        desk: object = None,
        script: Sequence[Reply] | Callable[[LLMRequest], Reply] | ScriptedLLM = ROUND,
        agent: AgentConfig | None = None,
        **options: object,
    ) -> AgentRuntime:
        self.llm = script if isinstance(script, ScriptedLLM) else ScriptedLLM(script)
        self.desk = Desk(*answers)
        return AgentRuntime(
            llm=self.llm,
            agents=[agent or AgentConfig("clerk")],
            tools=[RecordingTool("read", self.log, effect="read"), RecordingTool("send", self.log)],
            checkpoint_store=self.store,
            guardrail_config=limits,
            approver=self.desk if answers else desk,  # type: ignore[arg-type]
            auto_resume=False,
            **options,  # type: ignore[arg-type]
        )

    def effects(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [f"{row[0]} {row[2]}" for row in (line.split("\t") for line in lines)]

    async def found(self, kind: type[Record], run_id: str = RUN) -> list[Record]:
        return [entry.record async for entry in self.store.read(run_id) if isinstance(entry.record, kind)]


@pytest.fixture
def desks(store: CheckpointStore, tmp_path: Path) -> Desks:
    return Desks(store, tmp_path)


@pytest.fixture
def room(tmp_path: Path) -> Desks:
    return Desks(MemoryCheckpointStore(), tmp_path)


def asks(**limits: object) -> GuardrailConfig:
    return GuardrailConfig(on_limit="ask", **limits)  # type: ignore[arg-type]


def about(request: ApprovalRequest | Record) -> dict[str, object]:
    arguments = request.arguments  # type: ignore[union-attr]
    return json.loads(arguments) if isinstance(arguments, str) else dict(arguments)


# -- what is asked -----------------------------------------------------------------------------------------------------


PRICED = ScriptedLLM(ROUND, price=lambda sent, got: 100 * (sent + got), usage=Usage(100, 20, cost_microusd=12_000))
MET: dict[str, tuple[GuardrailConfig, ScriptedLLM, dict[str, object]]] = {
    "calls": (
        asks(max_llm_calls=2),
        ScriptedLLM(ROUND),
        {"limit": "max_llm_calls", "now": 2, "spent": 2, "raise_to": 4},
    ),
    "tools": (
        asks(max_tool_calls=2),
        ScriptedLLM(ROUND),
        {"limit": "max_tool_calls", "now": 2, "spent": 2, "raise_to": 4},
    ),
    "money": (
        asks(max_total_cost_usd=0.04),
        PRICED,
        {"limit": "max_total_cost_usd", "now": 0.04, "spent": 0.012, "raise_to": 0.08},
    ),
    "input": (
        asks(max_input_tokens=220),
        ScriptedLLM(ROUND, usage=Usage(100, 20)),
        {"limit": "max_input_tokens", "now": 220, "spent": 100, "raise_to": 440},
    ),
    "output": (
        asks(max_output_tokens=300),
        ScriptedLLM(ROUND, usage=Usage(100, 100)),
        {"limit": "max_output_tokens", "now": 300, "spent": 100, "raise_to": 600},
    ),
    "no calls at all": (
        asks(max_llm_calls=0),
        ScriptedLLM(ROUND),
        {"limit": "max_llm_calls", "now": 0, "spent": 0, "raise_to": 10},
    ),
}


@pytest.mark.parametrize("which", MET)
async def test_a_limit_that_is_met_is_asked_about_and_a_yes_goes_on(desks: Desks, which: str) -> None:
    limits, llm, question = MET[which]
    llm.requests.clear()
    agent = AgentConfig("clerk", llm_settings=LLMSettings(max_output_tokens=280))
    runtime = desks.runtime(limits, *[Approve()] * 3, script=llm, agent=agent)
    result = await runtime.run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished), result.error
    assert (result.answer, len(llm.requests)) == ("Done.", 4)
    assert about(desks.desk.asked[0]) == question
    assert desks.desk.asked[0].kind == "budget"
    assert desks.desk.asked[0].reason.startswith(str(question["limit"]))
    assert len(desks.effects()) == 3
    assert len(await desks.found(ApprovalRequested)) == len(desks.desk.asked)
    assert not await desks.found(ApprovalVoided)


async def test_by_default_a_limit_ends_the_run_and_asks_nobody(room: Desks) -> None:
    result = await room.runtime(GuardrailConfig(max_llm_calls=2), Approve()).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Failed)
    assert (result.reason, result.error) == (
        "budget",
        "max_llm_calls=2 is reached; raise the limit and resume to go on",
    )
    assert room.desk.asked == []


async def test_what_no_number_raises_is_not_asked_about(room: Desks) -> None:
    runtime = room.runtime(asks(on_unpriced="refuse"), Approve(), script=ScriptedLLM(ROUND))
    result = await runtime.run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Failed)
    assert room.desk.asked == []


def test_what_a_limit_does_must_be_one_of_two_things() -> None:
    with pytest.raises(ConfigError, match="on_limit must be 'fail' or 'ask', not 'park'"):
        GuardrailConfig(on_limit="park")  # type: ignore[arg-type]


# -- the answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decision", "why"),
    [
        (Reject(), "no reason given"),
        (Reject("enough"), "enough"),
        (Steer("It goes in circles."), "It goes in circles."),
    ],
)
async def test_no_ends_the_run_and_a_resume_asks_anew(desks: Desks, decision: Decision, why: str) -> None:
    result = await desks.runtime(asks(max_llm_calls=2), decision).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Failed)
    assert result.reason == "budget"
    assert result.error == f"max_llm_calls=2 is reached, and a human has not raised it: {why}"
    assert len(desks.llm.requests) == 2
    again = desks.runtime(asks(max_llm_calls=2), Approve())
    assert isinstance(await again.resume(RUN), Finished)
    first, second = await desks.found(ApprovalRequested)
    assert first.approval_id != second.approval_id  # type: ignore[attr-defined]
    assert not any("No circles" in str(message) for message in desks.llm.requests[-1].messages), "no model is told"


async def test_an_edit_raises_to_another_number(desks: Desks) -> None:
    runtime = desks.runtime(asks(max_llm_calls=1), Edit({"raise_to": 3}), Edit({"raise_to": 4}))
    assert isinstance(await runtime.run_agent("clerk", "Go.", run_id=RUN), Finished)
    assert [about(asked)["now"] for asked in desks.desk.asked] == [1, 3]


UNFIT: list[dict[str, object]] = [
    {"raise_to": 2},
    {"raise_to": 1},
    {"raise_to": -5},
    {"raise_to": 10**13},
    {"raise_to": 3.5},
    {"raise_to": "9"},
    {"raise_to": None},
    {"limit": "max_tool_calls", "raise_to": 9},
    {"spent": 0, "raise_to": 9},
    {"max_llm_calls": 9},
    {"raise_to": 9, "max_tool_calls": 9},
    {},
]


@pytest.mark.parametrize("edited", UNFIT, ids=str)
async def test_an_edit_that_does_not_fit_is_asked_again_and_refused_from_elsewhere(
    room: Desks, edited: dict[str, object]
) -> None:
    runtime = room.runtime(asks(max_llm_calls=2), Edit(edited), None)  # type: ignore[arg-type]
    assert isinstance(await runtime.run_agent("clerk", "Go.", run_id=RUN), Parked)
    assert "what was edited does not fit" in room.desk.asked[1].reason
    await runtime.answer(RUN, Edit(edited))  # type: ignore[arg-type]
    assert isinstance(await room.runtime(asks(max_llm_calls=2)).resume(RUN), Parked)
    [refused] = await room.found(CommandRefused)
    assert "what was edited does not fit" in refused.reason  # type: ignore[attr-defined]


async def test_a_question_that_expires_ends_the_run(room: Desks) -> None:
    runtime = room.runtime(asks(max_llm_calls=2), answer_within_s=0.05)
    parked = await runtime.run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(parked, Parked)
    while await _is_fresh(parked):
        pass
    result = await room.runtime(asks(max_llm_calls=2)).resume(RUN)
    assert isinstance(result, Failed)
    assert result.error == "max_llm_calls=2 is reached, and a human has not raised it: nobody answered in time"


async def _is_fresh(parked: Parked) -> bool:
    await asyncio.sleep(0.01)
    return datetime.now(UTC).timestamp() <= parked.waiting[0].expires_at


async def test_a_question_after_long_work_has_its_whole_time(room: Desks) -> None:
    async def work() -> str:
        """Work for longer than a question stands."""
        await asyncio.sleep(0.3)
        return "worked"

    runtime = AgentRuntime(
        llm=ScriptedLLM([call("work"), "Done."]),
        agents=[AgentConfig("clerk")],
        tools=[work],
        checkpoint_store=room.store,
        guardrail_config=asks(max_llm_calls=1),
        approver=Desk(Approve()),
        answer_within_s=0.2,
        auto_resume=False,
    )
    assert isinstance(await runtime.run_agent("clerk", "Go.", run_id=RUN), Finished)


async def test_a_viewer_sees_the_question_and_the_answer_and_no_guidance(room: Desks) -> None:
    runtime = room.runtime(asks(max_llm_calls=2), Steer("Enough."))
    stream = runtime.run_agent_stream("clerk", "Go.", run_id=RUN)
    async with stream:
        events = [event async for event in stream]
    assert [event.decision for event in events if isinstance(event, Answered)] == ["steer"]
    assert not [event for event in events if isinstance(event, Guidance)]


# -- over processes ----------------------------------------------------------------------------------------------------


async def test_a_run_parks_at_a_limit_and_is_answered_from_elsewhere(desks: Desks) -> None:
    limits = asks(max_llm_calls=2)
    parked = await desks.runtime(limits).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(parked, Parked)
    assert [asked.kind for asked in parked.waiting] == ["budget"]
    assert isinstance(await desks.runtime(limits).resume(RUN), Parked), "the same question stands"
    await desks.runtime(limits).answer(RUN, Approve(), by="bob")
    first = len(await desks.found(LLMStarted))
    result = await desks.runtime(limits).resume(RUN)
    assert isinstance(result, Finished)
    assert len(desks.llm.requests) == 4 - first, "nothing that was paid for is paid for again"
    assert len(await desks.found(ApprovalRequested)) == 1


async def test_a_raise_holds_in_every_process_and_never_lowers_what_is_configured(desks: Desks) -> None:
    twice = [*ROUND[:3], call("read", path="d"), call("read", path="e"), "Done."]
    runtime = desks.runtime(asks(max_llm_calls=2), Approve(), None, script=twice)
    assert isinstance(await runtime.run_agent("clerk", "Go.", run_id=RUN), Parked)
    assert [about(asked)["now"] for asked in desks.desk.asked] == [2, 4]
    elsewhere = desks.runtime(asks(max_llm_calls=1), script=twice)
    parked = await elsewhere.resume(RUN)
    assert isinstance(parked, Parked), "four calls were allowed and made"
    assert about(parked.waiting[0])["now"] == 4
    result = await desks.runtime(asks(max_llm_calls=100), script=twice).resume(RUN)
    assert isinstance(result, Finished)
    [voided] = await desks.found(ApprovalVoided)
    assert voided.reason == "the configured limit is 100 now"  # type: ignore[attr-defined]


@pytest.mark.parametrize("more", [GuardrailConfig(max_llm_calls=100), GuardrailConfig()], ids=["higher", "none"])
async def test_a_resume_with_a_higher_limit_needs_no_answer(room: Desks, more: GuardrailConfig) -> None:
    runtime = room.runtime(asks(max_llm_calls=2))
    parked = await runtime.run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(parked, Parked)
    resumed = room.runtime(more)
    assert isinstance(await resumed.resume(RUN), Finished)
    with pytest.raises(ConfigError, match="is over"):
        await resumed.answer(RUN, Approve())


async def test_a_question_that_stands_is_heeded_where_limits_end_a_run(room: Desks) -> None:
    assert isinstance(await room.runtime(asks(max_llm_calls=2)).run_agent("clerk", "Go.", run_id=RUN), Parked)
    ends = GuardrailConfig(max_llm_calls=2)
    assert isinstance(await room.runtime(ends).resume(RUN), Parked)
    await room.runtime(ends).answer(RUN, Edit({"raise_to": 3}))
    result = await room.runtime(ends).resume(RUN)
    assert isinstance(result, Failed)
    assert result.error.startswith("max_llm_calls=3 is reached; raise"), "the next limit ends it"


async def test_a_fork_has_the_limits_that_are_configured(room: Desks) -> None:
    limits = asks(max_llm_calls=3)
    runtime = room.runtime(limits, Approve())
    assert isinstance(await runtime.run_agent("clerk", "Go.", run_id=RUN), Finished)
    fork = await runtime.fork(RUN, at=2)
    assert not await room.found(ApprovalResolved, fork)
    again = room.runtime(asks(max_llm_calls=2), None)
    parked = await again.resume(fork)
    assert isinstance(parked, Parked), "its own spending, and no raise of another run"
    assert about(parked.waiting[0])["now"] == 2
    refused = room.runtime(limits, Steer("Never."))
    await refused.run_agent("clerk", "Go.", run_id="other")
    copied = await refused.fork("other", at=4)
    assert isinstance(await room.runtime(GuardrailConfig()).resume(copied), Finished)
    assert not any("Never" in str(message) for message in room.llm.requests[-1].messages)


# -- forgeries ---------------------------------------------------------------------------------------------------------


async def replanted(room: Desks, change: Callable[[Record], Record | None], run_id: str = RUN) -> Desks:
    """Write the journal anew, changed, as whoever can write to the store could."""
    entries = [entry.record async for entry in room.store.read(RUN)]
    records = [changed for record in entries if (changed := change(record)) is not None]
    store = MemoryCheckpointStore()
    owner = await store.claim(run_id, this_process())
    await store.append(run_id, 0, records, owner=owner)
    await store.release(owner)
    return Desks(store, room.log.parent)


def other_number(arguments: str) -> str:
    return json.dumps(json.loads(arguments) | {"raise_to": 1000})


FORGED: dict[str, Callable[[Record], Record]] = {
    "the number that was shown": lambda record: (
        msgspec.structs.replace(record, arguments=other_number(record.arguments))
        if isinstance(record, ApprovalRequested)
        else record
    ),
    "the limit that was shown": lambda record: (
        msgspec.structs.replace(record, arguments=record.arguments.replace("max_llm_calls", "on_limit"))
        if isinstance(record, ApprovalRequested)
        else record
    ),
    "the signature": lambda record: (
        msgspec.structs.replace(record, mac="0" * 64) if isinstance(record, ApprovalResolved) else record
    ),
    "an edit": lambda record: (
        msgspec.structs.replace(record, decision="edit", arguments='{"raise_to":1000}')
        if isinstance(record, ApprovalResolved)
        else record
    ),
}


@pytest.mark.parametrize("how", FORGED)
async def test_a_raise_that_was_changed_in_the_store_raises_nothing(room: Desks, how: str) -> None:
    script = [*ROUND[:3], call("read", path="d"), "Done."]
    runtime = room.runtime(asks(max_llm_calls=2), Edit({"raise_to": 4}), script=script)
    assert isinstance(await runtime.run_agent("clerk", "Go.", run_id=RUN), Parked)
    seen: list[Record] = []

    def until_the_answer(record: Record) -> Record | None:
        answered = any(isinstance(each, ApprovalResolved) for each in seen)
        seen.append(record)
        return None if answered else FORGED[how](record)

    other = await replanted(room, until_the_answer)
    parked = await other.runtime(asks(max_llm_calls=2), script=script).resume(RUN)
    assert isinstance(parked, Parked)
    assert await other.found(ApprovalVoided), "the reason is written down"
    assert about(parked.waiting[0])["now"] == 2
    assert other.llm.requests == [], "no call is made that nobody has allowed"


async def test_a_raise_that_was_voided_is_not_in_force_where_it_would_hold(
    room: Desks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_APPROVAL_KEY", "the key of the people who answer in this test")
    script = [*ROUND[:3], call("read", path="d"), "Done."]
    runtime = room.runtime(asks(max_llm_calls=2), Edit({"raise_to": 4}), script=script)
    assert isinstance(await runtime.run_agent("clerk", "Go.", run_id=RUN), Parked)
    seen: list[Record] = []

    def until_the_answer(record: Record) -> Record | None:
        answered = any(isinstance(each, ApprovalResolved) for each in seen)
        seen.append(record)
        return None if answered else record

    other = await replanted(room, until_the_answer)
    monkeypatch.setenv("HARNESS_APPROVAL_KEY", "a key of somebody else, who answers elsewhere")
    assert isinstance(await other.runtime(asks(max_llm_calls=2), script=script).resume(RUN), Parked)
    assert await other.found(ApprovalVoided)
    monkeypatch.setenv("HARNESS_APPROVAL_KEY", "the key of the people who answer in this test")
    parked = await other.runtime(asks(max_llm_calls=2), script=script).resume(RUN)
    assert isinstance(parked, Parked)
    assert about(parked.waiting[0])["now"] == 2
    assert other.llm.requests == []


async def test_a_raise_is_none_of_another_run(room: Desks) -> None:
    runtime = room.runtime(asks(max_llm_calls=2), Approve(), script=[*ROUND[:2], "Done."])
    assert isinstance(await runtime.run_agent("clerk", "Go.", run_id=RUN), Finished)
    seen: list[Record] = []

    def until_the_answer(record: Record) -> Record | None:
        answered = any(isinstance(each, ApprovalResolved) for each in seen)
        seen.append(record)
        return None if answered else record

    other = await replanted(room, until_the_answer, "other")
    assert isinstance(await other.runtime(asks(max_llm_calls=2)).resume("other"), Parked)
    assert await other.found(ApprovalVoided, "other")


@pytest.mark.parametrize("decision", [Approve(), Edit({"raise_to": 5})], ids=["yes", "an edit"])
async def test_a_question_that_was_changed_in_the_store_is_asked_anew(room: Desks, decision: Decision) -> None:
    runtime = room.runtime(asks(max_llm_calls=2))
    assert isinstance(await runtime.run_agent("clerk", "Go.", run_id=RUN), Parked)
    other = await replanted(room, FORGED["the limit that was shown"])
    runtime = other.runtime(asks(max_llm_calls=2))
    await runtime.answer(RUN, decision)
    parked = await runtime.resume(RUN)
    assert isinstance(parked, Parked)
    assert other.llm.requests == []
    assert await other.found(ApprovalVoided) or await other.found(CommandRefused)


async def test_rules_are_told_of_no_raise_that_nobody_has_signed(room: Desks) -> None:
    """Of a raise that was put into the store before any limit was met, too: no decision has looked at it yet."""
    limits = asks(max_total_cost_usd=0.03)
    assert isinstance(await room.runtime(limits).run_agent("clerk", "Go.", run_id=RUN), Finished)
    asked = ApprovalRequested(
        "q", "", "budget", '{"limit":"max_total_cost_usd","now":0.03,"spent":0,"raise_to":100}', 1, BUDGET, "", "budget"
    )
    forged = [asked, ApprovalResolved("q", "approve", "eve", "0" * 64, 1, BUDGET)]
    entries = [entry.record async for entry in room.store.read(RUN)]
    before = next(place for place, record in enumerate(entries) if isinstance(record, LLMStarted))
    store = MemoryCheckpointStore()
    owner = await store.claim(RUN, this_process())
    await store.append(RUN, 0, [*entries[:before], *forged], owner=owner)
    await store.release(owner)
    seen: list[float] = []

    def rules(asked: GatedCall) -> Judged:
        seen.append(asked.raised_usd)
        return Judged("allow")

    assert isinstance(await Desks(store, room.log.parent).runtime(limits, policy=rules).resume(RUN), Finished)
    assert seen == [0.0, 0.0, 0.0]


# -- many agents -------------------------------------------------------------------------------------------------------


async def test_parallel_tasks_ask_once_and_what_is_in_flight_is_kept(desks: Desks) -> None:
    at_work = asyncio.Event()
    let_go = asyncio.Event()

    class Slow(ScriptedLLM):
        async def stream(self, request: LLMRequest, /) -> AsyncIterator[object]:  # type: ignore[override]
            if len(self.requests) == 2:  # the third call is under way when the limit is met by the other two
                at_work.set()
                await let_go.wait()
            async for delta in super().stream(request):
                yield delta

    def reply(request: LLMRequest) -> Reply:
        if request.response_schema is not None:
            return '{"answer": "All done.", "confidence": 1}'
        said = sum(message.role == "assistant" for message in request.messages)
        return [call("send", to=request.messages[0].text[:6]), "Done."][said]

    llm = Slow(reply)
    runtime = desks.runtime(asks(max_llm_calls=3), Approve(), Approve(), script=llm)
    plan = Plan([Task(f"t{n}", "clerk", f"Part {n}.") for n in range(3)])
    running = asyncio.create_task(runtime.run_plan(plan, goal="All.", run_id=RUN))
    await at_work.wait()
    for _ in range(50):
        await asyncio.sleep(0)
    assert desks.desk.asked == [], "it is not asked before what is in flight has its outcome"
    let_go.set()
    result = await running
    assert isinstance(result, Finished), result.error
    assert [about(asked)["now"] for asked in desks.desk.asked] == [3, 6]
    assert [asked.scope for asked in desks.desk.asked] == ["", ""]
    assert len(llm.requests) == 7, "two for each task, one to bring them together"
    assert len(desks.effects()) == 3
    assert not await desks.found(LLMFailed)


async def test_one_task_alone_asks_about_the_limit_of_its_run(room: Desks) -> None:
    def reply(request: LLMRequest) -> Reply:
        if request.response_schema is not None:
            return '{"answer": "All done.", "confidence": 1}'
        said = sum(message.role == "assistant" for message in request.messages)
        return ([call("read", path="a"), "Done."] if "first" in request.messages[0].text else ["Done."])[said]

    runtime = room.runtime(asks(max_llm_calls=1), script=reply)
    plan = Plan([Task("t", "clerk", "The first."), Task("u", "clerk", "The second.", depends_on=("t",))])
    assert isinstance(await runtime.run_plan(plan, goal="All.", run_id=RUN), Parked)
    alone = room.runtime(asks(max_llm_calls=1), Approve(), script=reply)
    assert isinstance(await alone.resume(f"{RUN}:t:clerk"), Finished)
    assert isinstance(await room.runtime(asks(max_llm_calls=1), *[Approve()] * 3, script=reply).resume(RUN), Finished)


async def test_delegated_work_asks_too(room: Desks) -> None:
    def reply(request: LLMRequest) -> Reply:
        said = sum(message.role == "assistant" for message in request.messages)
        if "Look" in request.messages[0].text:
            return [call("read", path="a"), "Seen."][said]
        return [call("delegate_to_helper", task="Look."), "Done."][said]

    desk = Desk(Approve(), Approve())
    runtime = AgentRuntime(
        llm=ScriptedLLM(reply),
        agents=[AgentConfig("clerk", allowed_tools=("delegate_to_helper",))],
        tools=[
            delegate(AgentConfig("helper", allowed_tools=("read",))),
            RecordingTool("read", room.log, effect="read"),
        ],
        checkpoint_store=room.store,
        guardrail_config=asks(max_llm_calls=2, max_tool_calls=1),
        approver=desk,
        auto_resume=False,
    )
    assert isinstance(await runtime.run_agent("clerk", "Go.", run_id=RUN), Finished)
    assert sorted(str(about(asked)["limit"]) for asked in desk.asked) == ["max_llm_calls", "max_tool_calls"]


async def test_who_has_asked_goes_on_at_the_yes_whatever_others_are_at_by_then(room: Desks) -> None:
    """Somebody else's call may have begun while it was asked: where it takes long, nobody waits for it."""
    both, beside, done = asyncio.Event(), asyncio.Event(), asyncio.Event()
    tried: list[None] = []

    class Model(ScriptedLLM):
        async def stream(self, request: LLMRequest, /) -> AsyncIterator[object]:  # type: ignore[override]
            said = sum(message.role == "assistant" for message in request.messages)
            if "first" in request.messages[0].text:
                if said == 2:
                    done.set()
            elif not tried:
                tried.append(None)
                await both.wait()
                raise LLMError("busy", transient=True)  # so that it is between two calls when the limit is met
            else:
                beside.set()
                await asyncio.wait_for(done.wait(), 5)
            async for delta in super().stream(request):
                yield delta

    def reply(request: LLMRequest) -> Reply:
        said = sum(message.role == "assistant" for message in request.messages)
        if request.response_schema is not None:
            return '{"answer": "All done.", "confidence": 1}'
        return (
            [call("look", at="a"), call("look", at="b"), "Done."] if "first" in request.messages[0].text else ["Done."]
        )[said]

    async def look(at: str) -> str:
        """Look somewhere."""
        both.set()
        return at

    class Slow(Desk):
        async def decide(self, request: ApprovalRequest, /) -> Decision | None:
            await beside.wait()
            return await super().decide(request)

    runtime = AgentRuntime(
        llm=Model(reply),
        agents=[AgentConfig("clerk")],
        tools=[look],
        checkpoint_store=room.store,
        guardrail_config=asks(max_tool_calls=1),
        approver=Slow(Approve()),
        auto_resume=False,
    )
    plan = Plan([Task("t", "clerk", "The first."), Task("u", "clerk", "The second.")])
    result = await runtime.run_plan(plan, goal="All.", run_id=RUN)
    assert isinstance(result, Finished), result.error
    assert [str(record.error) for record in await room.found(LLMFailed)] == ["busy"]  # type: ignore[attr-defined]


# -- time --------------------------------------------------------------------------------------------------------------


async def test_time_is_asked_for_and_a_call_at_work_is_not_cut(room: Desks) -> None:
    async def work() -> str:
        """Work beyond the time there is."""
        await asyncio.sleep(0.4)
        return "worked"

    waited: list[float] = []

    class Late(Desk):
        async def decide(self, request: ApprovalRequest, /) -> Decision | None:
            await asyncio.sleep(0.5)
            waited.append(0.5)
            return await super().decide(request)

    desk = Late(Edit({"raise_to": 60}))
    runtime = AgentRuntime(
        llm=ScriptedLLM([call("work"), "Done."]),
        agents=[AgentConfig("clerk")],
        tools=[work],
        checkpoint_store=room.store,
        guardrail_config=asks(max_wall_time_seconds=0.2),
        approver=desk,
        auto_resume=False,
    )
    result = await runtime.run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished), result.error
    [worked] = await room.found(ToolFinished)
    assert worked.status == "ok", "it was at work when the time was over"  # type: ignore[attr-defined]
    assert about(desk.asked[0])["limit"] == "max_wall_time_seconds"
    spent = about(desk.asked[0])["spent"]
    assert isinstance(spent, float)
    assert spent >= 0.4
    assert result.spent.active_s < spent + 0.4, "waiting for a person does not count"


async def test_time_that_is_raised_holds_after_a_resume_where_limits_end_a_run(room: Desks) -> None:
    async def work() -> str:
        """Work beyond the time there is."""
        await asyncio.sleep(0.2)
        return "worked"

    def runtime(limits: GuardrailConfig, script: Sequence[Reply], *answers: Decision) -> AgentRuntime:
        return AgentRuntime(
            llm=ScriptedLLM(script),
            agents=[AgentConfig("clerk")],
            tools=[work],
            checkpoint_store=room.store,
            guardrail_config=limits,
            approver=Desk(*answers) if answers else None,
            auto_resume=False,
        )

    script = [call("work"), call("work"), "Done."]
    parked = await runtime(asks(max_wall_time_seconds=0.1), script).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(parked, Parked)
    ends = GuardrailConfig(max_wall_time_seconds=0.1)
    await runtime(ends, script).answer(RUN, Edit({"raise_to": 60}))
    result = await runtime(ends, script).resume(RUN)
    assert isinstance(result, Finished), result.error


# -- what rules see of it ----------------------------------------------------------------------------------------------


async def test_rules_see_what_the_raised_budget_leaves(room: Desks) -> None:
    seen: list[float] = []

    def rules(asked: GatedCall) -> Judged:
        seen.append(asked.raised_usd)
        return Judged("allow")

    llm = ScriptedLLM(ROUND, price=lambda sent, got: 10 * (sent + got), usage=Usage(10, 10, cost_microusd=15_000))
    agent = AgentConfig("clerk", llm_settings=LLMSettings(max_output_tokens=300))
    runtime = room.runtime(asks(max_total_cost_usd=0.03), Approve(), script=llm, agent=agent, policy=rules)
    assert isinstance(await runtime.run_agent("clerk", "Go.", run_id=RUN), Finished)
    assert seen == [0.0, 0.0, 0.06]
    policy = Policy((Rule(id="rich", action="allow", left_usd=Between(min=0.01)),))
    assert policy.rules
    call_now = GatedCall("read", "{}", "read", "clerk", 0.0, 40_000, {}, None, 0.06)
    context = context_of(call_now, None, 0.03)
    assert isinstance(context, Context)
    assert context.left_usd == pytest.approx(0.02)


# -- arithmetic --------------------------------------------------------------------------------------------------------


numbers = st.one_of(st.integers(0, 10**9), st.floats(0, 1e6, allow_nan=False).map(lambda value: round(value, 4)))


@given(name=st.sampled_from(sorted(LIMITS)), now=numbers, over=numbers, needed=st.integers(0, 10**6))
def test_what_is_proposed_leaves_room_and_is_a_valid_answer(name: str, now: float, over: float, needed: int) -> None:
    whole = isinstance(LIMITS[name].unit, int)
    now, spent = (int(now), int(over)) if whole else (now, over)
    raise_to = proposed(name, now, spent, needed)
    assert raise_to > spent
    assert raise_to > now
    assert raise_to >= round(spent + needed, 4) - 1e-4
    asked = json.dumps({"limit": name, "now": now, "spent": spent, "raise_to": raise_to})
    assert invalid_raise(asked, asked) == ""


@given(name=st.sampled_from(sorted(LIMITS)))
def test_every_limit_is_known_by_the_words_that_are_said_of_it(name: str) -> None:
    from harness.budget import Held, exceeded, reserve

    spent = Spent(Usage(10, 10, cost_microusd=10), llm_calls=10, tool_calls=10, active_s=10)
    limits = GuardrailConfig(**({"max_total_cost_usd": None, "max_wall_time_seconds": None} | {name: 0}))  # type: ignore[arg-type]
    said = [exceeded(spent, limits), reserve(spent, Held(), limits, tokens=5, output=None, price=lambda *_: 100)]
    assert name == "max_tool_calls" or any(isinstance(text, str) and limit_in(text) == name for text in said)
    assert all(not isinstance(text, str) or limit_in(text) == name for text in said)
    assert LIMITS[name].needed(Reservation(1, 1, 1)) >= 0


async def test_no_tool_is_started_before_the_answer(room: Desks) -> None:
    batch = [
        [call("send", to="ann"), call("send", to="bob", call_id="2"), call("send", to="cid", call_id="3")],
        "Sent.",
    ]
    parked = await room.runtime(asks(max_tool_calls=1), script=batch).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(parked, Parked)
    assert (len(room.effects()), len(await room.found(ToolStarted))) == (1, 1)
    again = room.runtime(asks(max_tool_calls=1), Approve(), Approve(), script=batch)
    assert isinstance(await again.resume(RUN), Finished)
    assert len(room.effects()) == 3
    assert not await room.found(RunFailed)
