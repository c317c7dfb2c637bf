"""People in the loop: what runs is exactly what somebody said yes to, whoever answers, wherever, whenever.

Effects are counted in a file the tools write to.
"""

# ruff: noqa: ASYNC110
# A model has no event to wait for when it is asked, and nothing else runs while a test reads a file.

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

import harness
from harness import (
    AgentConfig,
    AgentRuntime,
    Cancelled,
    CheckpointStore,
    ConfigError,
    Failed,
    FileCheckpointStore,
    Finished,
    GuardrailConfig,
    MemoryCheckpointStore,
    Parked,
    Plan,
    RunNotFound,
    SQLiteCheckpointStore,
    Task,
    delegate,
    tool,
)
from harness.approval import GatedCall, Judged
from harness.checkpoint.base import this_process
from harness.hitl import ApprovalRequest, Approve, ApproverChain, CallbackApprover, Decision, Edit, Reject, Steer
from harness.hitl import ApproveForSession as Session
from harness.llm.base import LLMRequest
from harness.mailbox import Answer, Cancel
from harness.messages import ToolResult
from harness.records import (
    ApprovalRequested,
    ApprovalResolved,
    ApprovalVoided,
    CommandRefused,
    LLMStarted,
    Record,
    RunCancelled,
    RunFinished,
    ToolFinished,
    ToolStarted,
)
from harness.testing import RecordingTool, Reply, ScriptedLLM, call

RUN = "run"
Store = CheckpointStore
Answers = Sequence[Decision | None] | Callable[[ApprovalRequest], object]


@pytest.fixture(params=["memory", "sqlite", "file"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    made: dict[str, Callable[[], Store]] = {
        "memory": MemoryCheckpointStore,
        "sqlite": lambda: SQLiteCheckpointStore(tmp_path / "runs.db"),
        "file": lambda: FileCheckpointStore(tmp_path / "runs"),
    }
    store = made[request.param]()
    yield store
    await store.close()


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Store]:
    """One store, for what does not depend on it."""
    store = MemoryCheckpointStore()
    yield store
    await store.close()


class Desk:
    """A person at a desk: gives prepared answers, and keeps what was asked."""

    name = "desk:ann"

    def __init__(self, answers: Answers = ()) -> None:
        self.asked: list[ApprovalRequest] = []
        self._answers = answers if callable(answers) else list(answers)

    async def decide(self, request: ApprovalRequest, /) -> Decision | None:
        self.asked.append(request)
        if callable(self._answers):
            answer = self._answers(request)
            return await answer if isinstance(answer, Awaitable) else answer  # type: ignore[return-value]
        return self._answers.pop(0) if self._answers else None


class Nobody:
    """Takes the question and never answers; notes that it was told to stop."""

    name = "nobody"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.closed: list[str] = []
        self.busy = asyncio.Event()

    async def decide(self, request: ApprovalRequest, /) -> Decision | None:
        self.asked.append(request.approval_id)
        self.busy.set()
        try:
            await asyncio.sleep(3600)
        finally:
            self.closed.append(request.approval_id)
        return None


class Office:
    """Tools whose effects are lines of a file, and runtimes that come and go on one store."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.log = folder / "effects.log"

    def tools(self, **changed: str) -> list[RecordingTool]:
        tools = [
            RecordingTool("send", self.log),
            RecordingTool("pay", self.log),
            RecordingTool("read", self.log, effect="read"),
        ]
        for made in tools:
            if text := changed.get(made.spec.name):
                made.spec = msgspec.structs.replace(made.spec, description=text)
        return tools

    def runtime(
        self,
        script: Sequence[Reply] | Callable[[LLMRequest], Reply] | ScriptedLLM,
        *,
        hitl: tuple[str, ...] = ("send", "pay"),
        tools: Sequence[object] | None = None,
        agent: dict[str, object] | None = None,
        **options: object,
    ) -> AgentRuntime:
        config = AgentConfig("clerk", hitl_tools=hitl, **(agent or {}))  # type: ignore[arg-type]
        return AgentRuntime(
            llm=script if isinstance(script, ScriptedLLM) else ScriptedLLM(script),
            agents=[config, *options.pop("others", ())],  # type: ignore[misc]
            tools=self.tools() if tools is None else tools,
            checkpoint_store=self.store,
            auto_resume=False,
            **options,  # type: ignore[arg-type]
        )

    def effects(self) -> list[str]:
        """Every effect so far: the tool and its arguments."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [f"{row[0]} {row[2]}" for row in (line.split("\t") for line in lines)]

    async def records(self, run_id: str = RUN) -> list[Record]:
        return [entry.record async for entry in self.store.read(run_id)]

    async def found(self, kind: type[Record], run_id: str = RUN) -> list[Record]:
        return [record for record in await self.records(run_id) if isinstance(record, kind)]


@pytest.fixture
def office(store: Store, tmp_path: Path) -> Office:
    return Office(store, tmp_path)


@pytest.fixture
def room(kept: Store, tmp_path: Path) -> Office:
    return Office(kept, tmp_path)


def told(llm: ScriptedLLM) -> list[str]:
    """What the model was shown last: results and words of a user."""
    parts = [part for message in llm.requests[-1].messages[1:] for part in message.parts]
    return [part.text for part in parts if isinstance(part, ToolResult)] + [
        message.text for message in llm.requests[-1].messages[1:] if message.role == "user"
    ]


SEND = [call("send", to="ann"), "Sent."]
BATCH = [[call("send", to="ann"), call("read", path="a"), call("pay", cents=5)], "Done."]


async def by_tool(runtime: AgentRuntime, key: str = RUN) -> dict[str, str]:
    return {asked.tool: asked.approval_id for asked in await runtime.pending(key)}


# -- what is asked -----------------------------------------------------------------------------------------------------


def test_a_gate_on_a_tool_that_is_not_there_is_refused(room: Office) -> None:
    with pytest.raises(ConfigError, match=r"hitl_tools of agent 'clerk' names 'sned', which is no tool of it"):
        room.runtime(SEND, hitl=("sned",))
    with pytest.raises(ConfigError, match="'pay'"):
        room.runtime(SEND, hitl=("pay",), agent={"allowed_tools": ("send",)})


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_question_must_stand_for_some_time(room: Office, seconds: float) -> None:
    with pytest.raises(ConfigError, match="answer_within_s"):
        room.runtime(SEND, answer_within_s=seconds)


async def test_a_function_answers_and_what_cannot_is_refused(tmp_path: Path) -> None:
    tool = RecordingTool("send", tmp_path / "log")
    runtime = AgentRuntime(
        llm=ScriptedLLM([call("send"), "Sent."]),
        agents=[AgentConfig("clerk", hitl_tools=("send",))],
        tools=[tool],
        checkpoint_store=MemoryCheckpointStore(),
        approver=lambda request: Approve() if request.tool == "send" else None,
        auto_resume=False,
    )
    assert (await runtime.run_agent("clerk", "Send it.")).success
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    for wrong, said in ((CallbackApprover, "CallbackApprover()"), ("ann", "a str is neither")):
        with pytest.raises(ConfigError, match=re.escape(said)):
            AgentRuntime(llm=ScriptedLLM([]), approver=wrong)  # type: ignore[arg-type]


async def test_without_a_gate_nobody_is_asked(office: Office) -> None:
    desk = Desk()
    result = await office.runtime(SEND, hitl=(), approver=desk).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished)
    assert (desk.asked, office.effects()) == ([], ['send {"to":"ann"}'])


async def test_the_ungated_calls_of_a_batch_run_while_the_gated_wait(office: Office) -> None:
    runtime = office.runtime(BATCH)
    result = await runtime.run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Parked)
    assert not result.success
    assert [asked.tool for asked in result.waiting] == ["send", "pay"]
    assert office.effects() == ['read {"path":"a"}']
    assert [run.status async for run in runtime.runs()] == ["waiting"]
    assert await runtime.recover() == [], "a run that waits for a person is not taken for one that was left"


async def test_every_gated_call_is_asked_for_itself_and_shown_whole(office: Office) -> None:
    long = "x" * 50_000
    desk = Desk([Approve(), Reject()])
    script = [[call("send", to=long), call("send", to="bob")], "Done."]
    result = await office.runtime(script, approver=desk).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished)
    assert [dict(asked.arguments) for asked in desk.asked] == [{"to": long}, {"to": "bob"}]
    assert len({asked.approval_id for asked in desk.asked}) == len({asked.digest for asked in desk.asked}) == 2
    assert {(asked.kind, asked.agent_id, asked.step, asked.key) for asked in desk.asked} == {
        ("tool", "clerk", 1, "run:clerk")
    }
    assert len(office.effects()) == 1


async def test_a_question_keeps_its_id_over_any_number_of_resumes(office: Office) -> None:
    first = await office.runtime(BATCH).run_agent("clerk", "Go.", run_id=RUN)
    for _ in range(3):
        again = await office.runtime(BATCH).resume(RUN)
        assert isinstance(again, Parked)
        assert again.waiting == first.waiting  # type: ignore[union-attr]
    desk = Desk()
    assert isinstance(await office.runtime(BATCH, approver=desk).resume(RUN), Parked)
    assert [asked.approval_id for asked in desk.asked] == [asked.approval_id for asked in again.waiting]
    assert len(await office.found(ApprovalRequested)) == 2
    assert office.effects() == ['read {"path":"a"}']


async def test_a_call_whose_arguments_do_not_fit_is_not_asked_about(room: Office) -> None:
    @tool
    async def book(seats: int) -> str:
        """Book seats."""
        return f"{seats} booked"

    desk = Desk([Approve()])
    llm = ScriptedLLM([call("book", seats="many"), call("book", seats=2), "Done."])
    await room.runtime(llm, tools=[book], hitl=("book",), approver=desk).run_agent("clerk", "Go.", run_id=RUN)
    assert [dict(asked.arguments) for asked in desk.asked] == [{"seats": 2}]


# -- answers -----------------------------------------------------------------------------------------------------------


async def answered(office: Office, decision: Decision, script: Sequence[Reply] = SEND) -> tuple[object, ScriptedLLM]:
    """Park, answer from a second runtime, resume in a third."""
    parked = await office.runtime(script).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(parked, Parked)
    await office.runtime(script).answer(RUN, decision, by="ann")
    llm = ScriptedLLM(script)
    return await office.runtime(llm).resume(RUN), llm


async def test_yes_runs_it_once(office: Office) -> None:
    result, _ = await answered(office, Approve())
    assert isinstance(result, Finished)
    assert office.effects() == ['send {"to":"ann"}']
    [asked], [said] = await office.found(ApprovalRequested), await office.found(ApprovalResolved)
    [begun] = await office.found(ToolStarted)
    assert begun.approval_id == asked.approval_id == said.approval_id
    assert (said.by, said.decision) == ("ann", "approve")
    assert await office.store.inbox(RUN) == []


@pytest.mark.parametrize(("reason", "text"), [("too late", "too late"), ("", "no reason given")])
async def test_no_is_told_with_its_reason(office: Office, reason: str, text: str) -> None:
    result, llm = await answered(office, Reject(reason))
    assert isinstance(result, Finished)
    assert told(llm) == [f"Tool rejected by human: {text}"]
    assert office.effects() == []


async def test_guidance_skips_only_its_call_and_is_a_users_word(office: Office) -> None:
    llm = ScriptedLLM(BATCH)
    desk = Desk(lambda asked: Steer("Use the post.") if asked.tool == "send" else Approve())
    result = await office.runtime(llm, approver=desk).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished)
    assert sorted(office.effects()) == ['pay {"cents":5}', 'read {"path":"a"}']
    assert told(llm) == [
        "Tool not run: a human has given guidance instead", "ok", "ok", "Human guidance: Use the post."
    ]  # fmt: skip
    assert [message.role for message in llm.requests[-1].messages] == ["user", "assistant", "tool", "user"]
    assert [asked.tool for asked in desk.asked] == ["send", "pay"]


async def test_an_edit_runs_what_was_edited_and_the_model_is_told(office: Office) -> None:
    result, llm = await answered(office, Edit({"to": "bob"}))
    assert isinstance(result, Finished)
    assert office.effects() == ['send {"to":"bob"}']
    assert told(llm) == ['(A human changed the arguments to {"to":"bob"})\nok']


async def test_an_edit_that_does_not_fit_is_asked_again(office: Office) -> None:
    desk = Desk([Edit({"to": 5}), Edit({"nobody": 1}), Edit({"to": "bob"})])
    calls: list[str] = []

    @tool
    async def send(to: str) -> str:
        """Send."""
        calls.append(to)
        return "sent"

    script = [call("send", to="ann"), "Sent."]
    result = await office.runtime(script, tools=[send], hitl=("send",), approver=desk).run_agent("clerk", "Go.")
    assert isinstance(result, Finished)
    assert calls == ["bob"]
    assert len({asked.approval_id for asked in desk.asked}) == 1
    assert "does not fit" in desk.asked[1].reason


async def test_an_edit_that_does_not_fit_is_refused_from_elsewhere(office: Office) -> None:
    @tool
    async def send(to: str) -> str:
        """Send."""
        raise AssertionError(f"sent to {to}")

    runtime = office.runtime(SEND, tools=[send], hitl=("send",))
    await runtime.run_agent("clerk", "Go.", run_id=RUN)
    await runtime.answer(RUN, Edit({"to": 5}))
    again = await runtime.resume(RUN)
    assert isinstance(again, Parked)
    [refused] = await office.found(CommandRefused)
    assert "does not fit" in refused.reason
    assert await office.store.inbox(RUN) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", object()], ids=str)
async def test_an_edit_that_is_no_json_is_no_answer(room: Office, value: object) -> None:
    """JSON has no such numbers: null in their place would be signed, and nobody has said null."""
    runtime = room.runtime(SEND, hitl=("send",))
    await runtime.run_agent("clerk", "Go.", run_id=RUN)
    with pytest.raises(ConfigError, match="edited arguments"):
        await runtime.answer(RUN, Edit({"to": value}))  # type: ignore[dict-item]
    assert await room.store.inbox(RUN) == []


async def test_an_answer_with_bytes_that_are_no_text_is_taken(office: Office) -> None:
    """As a terminal of another encoding gives them."""
    runtime = office.runtime(SEND, hitl=("send",))
    await runtime.run_agent("clerk", "Go.", run_id=RUN)
    await runtime.steer(RUN, "wait\udcff", by="ann\udcff")
    await runtime.answer(RUN, Reject("not now\udcff"), by="ann\udcff")
    assert isinstance(await runtime.resume(RUN), Finished)
    [answer] = await office.found(ApprovalResolved)
    assert (answer.text, answer.by) == ("not now?", "ann?")
    parked = office.runtime(SEND, hitl=("send",))
    await parked.run_agent("clerk", "Go.", run_id="other")
    await parked.cancel("other", "enough\udcff", by="ann\udcff")
    assert (await office.found(RunCancelled, "other"))[0].reason == "enough?"


async def test_an_edit_that_never_fits_does_not_hold_the_loop(room: Office) -> None:
    @tool
    async def send(to: str) -> str:
        """Send."""
        raise AssertionError(f"sent to {to}")

    desk = Desk(lambda _: Edit({"to": 5}))
    runtime = room.runtime(SEND, tools=[send], hitl=("send",), approver=desk)
    result = await asyncio.wait_for(runtime.run_agent("clerk", "Go.", run_id=RUN), 10)
    assert isinstance(result, Parked)
    assert 1 < len(desk.asked) < 20


async def test_yes_for_the_session_covers_the_same_tool_by_every_agent_of_the_run(office: Office) -> None:
    def reply(request: LLMRequest) -> Reply:
        said = sum(message.role == "assistant" for message in request.messages)
        if "Help" in request.messages[0].text:
            return [call("send", to="helped"), "Helped."][said]
        return [call("send", to="ann"), call("delegate_to_helper", task="Help."), call("send", to="cid"), "Done."][said]

    desk = Desk([Session()])
    others = [AgentConfig("helper", allowed_tools=("send",), hitl_tools=("send",))]
    tools = [*office.tools(), delegate(others[0])]
    runtime = office.runtime(reply, tools=tools, others=others, approver=desk)
    result = await runtime.run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished)
    assert len(office.effects()) == 3
    assert len(desk.asked) == 1
    assert isinstance(await runtime.run_agent("clerk", "Go.", run_id="other"), Parked), "never another run"
    assert len(office.effects()) == 3


async def test_yes_for_the_session_survives_a_restart(office: Office) -> None:
    script = [call("send", to="ann"), call("pay", cents=1), call("send", to="bob"), "Done."]
    await office.runtime(script).run_agent("clerk", "Go.", run_id=RUN)
    await office.runtime(script).answer(RUN, Session())
    parked = await office.runtime(script).resume(RUN)
    assert isinstance(parked, Parked)
    assert [asked.tool for asked in parked.waiting] == ["pay"], "of this tool only"
    await office.runtime(script).answer(RUN, Approve())
    assert isinstance(await office.runtime(script).resume(RUN), Finished)
    assert office.effects() == ['send {"to":"ann"}', 'pay {"cents":1}', 'send {"to":"bob"}']


async def test_yes_for_the_session_ends_where_the_tool_becomes_another(office: Office) -> None:
    script = [call("send", to="ann"), call("pay", cents=1), call("send", to="bob"), "Done."]
    await office.runtime(script).run_agent("clerk", "Go.", run_id=RUN)
    await office.runtime(script).answer(RUN, Session())
    await office.runtime(script).resume(RUN)
    changed = office.runtime(script, tools=office.tools(send="Send it to everybody."))
    await changed.answer(RUN, Approve())
    result = await changed.resume(RUN)
    assert isinstance(result, Parked)
    assert [asked.tool for asked in result.waiting] == ["send"]
    assert office.effects() == ['send {"to":"ann"}', 'pay {"cents":1}']


@pytest.mark.parametrize("swapped", [False, True])
async def test_answers_land_on_their_own_calls_in_any_order(office: Office, swapped: bool) -> None:
    runtime = office.runtime(BATCH)
    await runtime.run_agent("clerk", "Go.", run_id=RUN)
    ids = await by_tool(runtime)
    answers: list[tuple[str, Decision]] = [(ids["send"], Approve()), (ids["pay"], Reject("no"))]
    for approval_id, decision in reversed(answers) if swapped else answers:
        await runtime.answer(RUN, decision, approval_id=approval_id)
    assert isinstance(await runtime.resume(RUN), Finished)
    assert sorted(office.effects()) == ['read {"path":"a"}', 'send {"to":"ann"}']


async def test_which_question_is_meant_must_be_said_where_several_wait(office: Office) -> None:
    runtime = office.runtime(BATCH)
    await runtime.run_agent("clerk", "Go.", run_id=RUN)
    with pytest.raises(ConfigError, match="waits for 2 answers"):
        await runtime.answer(RUN, Approve())
    with pytest.raises(ConfigError, match="no question 'q' is open"):
        await runtime.answer(RUN, Approve(), approval_id="q")
    for entry in (runtime.pending, runtime.resume):
        with pytest.raises(RunNotFound):
            await entry("nobody")


async def test_a_second_answer_to_one_question_changes_nothing(office: Office) -> None:
    runtime = office.runtime(SEND)
    await runtime.run_agent("clerk", "Go.", run_id=RUN)
    await runtime.answer(RUN, Reject("first"))
    await runtime.answer(RUN, Approve())
    assert isinstance(await runtime.resume(RUN), Finished)
    assert office.effects() == []
    [refused] = await office.found(CommandRefused)
    assert "it has its answer" in refused.reason
    with pytest.raises(ConfigError, match="is over"):
        await runtime.answer(RUN, Approve())


# -- time --------------------------------------------------------------------------------------------------------------


async def test_a_question_that_has_expired_is_a_no(office: Office) -> None:
    llm = ScriptedLLM(SEND)
    parked = await office.runtime(llm, answer_within_s=0.05).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(parked, Parked)
    await asyncio.sleep(0.1)
    await office.runtime(SEND).answer(RUN, Approve())
    desk = Desk([Approve()])
    assert isinstance(await office.runtime(llm, approver=desk).resume(RUN), Finished)
    assert (office.effects(), desk.asked) == ([], [])
    assert told(llm) == ["Tool rejected by human: nobody answered in time"]
    [refused] = await office.found(CommandRefused)
    assert "after it had expired" in refused.reason


async def test_an_answer_that_came_in_time_holds_however_late_it_is_taken(office: Office) -> None:
    await office.runtime(SEND, answer_within_s=0.3).run_agent("clerk", "Go.", run_id=RUN)
    await office.runtime(SEND).answer(RUN, Approve())
    await asyncio.sleep(0.4)
    assert isinstance(await office.runtime(SEND).resume(RUN), Finished)
    assert office.effects() == ['send {"to":"ann"}']


async def test_an_answer_from_elsewhere_in_time_is_not_lost_to_an_open_prompt(office: Office) -> None:
    nobody = Nobody()
    runtime = office.runtime(SEND, approver=nobody, answer_within_s=0.6)
    running = asyncio.create_task(runtime.run_agent("clerk", "Go.", run_id=RUN))
    await asyncio.wait_for(nobody.busy.wait(), 5)
    await office.runtime(SEND).answer(RUN, Approve())
    assert isinstance(await asyncio.wait_for(running, 10), Finished)
    assert office.effects() == ['send {"to":"ann"}']


async def test_a_forged_answer_does_not_keep_a_question_open(office: Office) -> None:
    runtime = office.runtime(SEND, approver=Nobody(), answer_within_s=0.3)
    running = asyncio.create_task(runtime.run_agent("clerk", "Go.", run_id=RUN))
    while not (asked := await office.found(ApprovalRequested)):
        await asyncio.sleep(0.01)
    await office.store.post(RUN, Answer(asked[0].approval_id, "approve", "eve", "0" * 64))
    assert isinstance(await asyncio.wait_for(running, 10), Finished)
    assert office.effects() == []
    assert [said.decision for said in await office.found(ApprovalResolved)] == ["expired"]
    assert len(await office.found(CommandRefused)) == 1


@pytest.mark.parametrize("driven", [False, True], ids=["parked", "driven"])
async def test_an_honest_answer_after_a_forged_one_is_taken(office: Office, driven: bool) -> None:
    nobody = Nobody()
    runtime = office.runtime(SEND, approver=nobody if driven else None)
    running = asyncio.create_task(runtime.run_agent("clerk", "Go.", run_id=RUN))
    if driven:
        await asyncio.wait_for(nobody.busy.wait(), 5)
        [asked] = await office.runtime(SEND).pending(RUN)
    else:
        [asked] = (await running).waiting  # type: ignore[union-attr]
    for mac in ("", "0" * 64):
        await office.store.post(RUN, Answer(asked.approval_id, "reject", "eve", mac))
    await office.runtime(SEND).answer(RUN, Approve(), by="ann")
    await office.store.post(RUN, Answer(asked.approval_id, "reject", "eve", "1" * 64))
    result = await (asyncio.wait_for(running, 10) if driven else office.runtime(SEND).resume(RUN))
    assert isinstance(result, Finished)
    assert office.effects() == ['send {"to":"ann"}']
    taken = [record for record in await office.records() if isinstance(record, (CommandRefused, ApprovalResolved))]
    assert ["not signed" in record.reason for record in taken[:2] if isinstance(record, CommandRefused)] == [True, True]
    [said] = await office.found(ApprovalResolved)
    assert (taken[2], said.by, said.decision) == (said, "ann", "approve")
    assert len(nobody.asked) == int(driven), "the prompt has stood until somebody answered"
    assert await office.store.inbox(RUN) == []


async def test_a_prompt_that_stands_too_long_is_closed_and_is_a_no(room: Office) -> None:
    nobody = Nobody()
    result = await room.runtime(SEND, approver=nobody, answer_within_s=0.1).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished)
    assert nobody.closed == nobody.asked
    assert room.effects() == []


async def test_a_yes_that_comes_too_late_is_a_no_even_from_who_does_not_stop(room: Office) -> None:
    async def slow(_: ApprovalRequest) -> Decision:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            return Approve()
        raise AssertionError

    result = await room.runtime(SEND, approver=Desk(slow), answer_within_s=0.1).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished)
    assert room.effects() == []


async def test_a_timeout_of_the_approvers_own_is_no_answer(room: Office) -> None:
    def late(_: ApprovalRequest) -> object:
        raise TimeoutError("the chat did not answer")

    result = await room.runtime(SEND, approver=Desk(late), answer_within_s=60).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Parked)


async def test_the_wall_clock_stands_still_while_every_branch_waits(room: Office) -> None:
    async def slow(_: ApprovalRequest) -> Decision:
        await asyncio.sleep(0.6)
        return Approve()

    limits = GuardrailConfig(max_wall_time_seconds=0.4)
    result = await room.runtime(SEND, approver=Desk(slow), guardrail_config=limits).run_agent("clerk", "Go.")
    assert isinstance(result, Finished), result.error
    assert result.spent.active_s < 0.4
    both = [[call("send", to="ann"), call("pay", cents=1)], "Done."]
    result = await room.runtime(both, approver=Desk(slow), guardrail_config=limits).run_agent("clerk", "Go.")
    assert isinstance(result, Finished), result.error
    assert result.spent.active_s < 0.4


async def test_the_wall_clock_goes_on_while_another_branch_works(room: Office) -> None:
    @tool(effect="read")
    async def work() -> str:
        """Work."""
        await asyncio.sleep(0.5)
        return "worked"

    async def slow(_: ApprovalRequest) -> Decision:
        await asyncio.sleep(0.5)
        return Approve()

    script = [[call("send", to="ann"), call("work")], "Done."]
    runtime = room.runtime(script, tools=[*room.tools(), work], approver=Desk(slow))
    result = await runtime.run_agent("clerk", "Go.")
    assert isinstance(result, Finished)
    assert 0.4 < result.spent.active_s < 0.9


# -- approvers ---------------------------------------------------------------------------------------------------------

NONSENSE: list[object] = [
    None, True, "yes", "approve", 1, object(), Approve, {"decision": "approve"}, Edit("no object"), Edit([1]),  # type: ignore[arg-type]
    Edit({"to": object()}), Reject(None), Steer(5), Steer(None), Session,  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize("nonsense", NONSENSE, ids=range(len(NONSENSE)))
async def test_an_approver_that_answers_with_nonsense_has_not_answered(room: Office, nonsense: object) -> None:
    result = await asyncio.wait_for(
        room.runtime(SEND, approver=Desk(lambda _: nonsense)).run_agent("clerk", "Go.", run_id=RUN), 10
    )
    assert isinstance(result, Parked)
    assert room.effects() == []


@pytest.mark.parametrize("error", [RuntimeError("no"), OSError("no terminal"), EOFError(), StopAsyncIteration()])
async def test_an_approver_that_raises_has_not_answered(room: Office, error: Exception) -> None:
    def raises(_: ApprovalRequest) -> object:
        raise error

    result = await room.runtime(SEND, approver=Desk(raises)).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Parked)
    assert room.effects() == []


async def test_a_chain_asks_the_next_where_one_has_no_answer(room: Office) -> None:
    chain = ApproverChain(
        CallbackApprover(lambda _: None, name="first"), CallbackApprover(lambda _: Approve(), name="second")
    )
    assert isinstance(await room.runtime(SEND, approver=chain).run_agent("clerk", "Go.", run_id=RUN), Finished)
    [said] = await room.found(ApprovalResolved)
    assert said.by == "second"


class Courteous:
    """Hands a question on to a chain, and has something else to do before it says what the answer is."""

    def __init__(self, chain: ApproverChain, others: asyncio.Event, *, beside: bool) -> None:
        self._chain = chain
        self._others = others
        self._beside = beside

    @property
    def name(self) -> str:
        return self._chain.name

    async def decide(self, request: ApprovalRequest, /) -> Decision | None:
        asking = self._chain.decide(request)
        decision = await (asyncio.create_task(asking) if self._beside else asking)
        if request.tool == "send":
            await asyncio.wait_for(self._others.wait(), 5)
        return decision


@pytest.mark.parametrize("beside", [False, True], ids=["in the same task", "in a task beside"])
@pytest.mark.parametrize("nested", [False, True], ids=["chain", "chain of chains"])
async def test_an_answer_is_written_down_under_who_gave_it_whoever_answers_meanwhile(
    room: Office, nested: bool, beside: bool
) -> None:
    answered = asyncio.Event()  # the second question, while the first has its answer and is not yet through

    def boss(request: ApprovalRequest) -> Decision | None:
        if request.tool != "pay":
            return None
        answered.set()
        return Reject("too much")

    def clerk(request: ApprovalRequest) -> Decision | None:
        return Approve() if request.tool == "send" else None

    members = CallbackApprover(clerk, name="clerk"), CallbackApprover(boss, name="boss")
    chain = ApproverChain(*(ApproverChain(member) for member in members)) if nested else ApproverChain(*members)
    runtime = room.runtime(BATCH, approver=Courteous(chain, answered, beside=beside))
    assert isinstance(await asyncio.wait_for(runtime.run_agent("clerk", "Go.", run_id=RUN), 10), Finished)
    said = [record for record in await room.records() if isinstance(record, ApprovalResolved)]
    assert {(record.by, record.decision) for record in said} == {("clerk", "approve"), ("boss", "reject")}


def test_threads_that_share_a_chain_write_down_who_answered_them(tmp_path: Path) -> None:
    """What a run does with an answer before it is written down is another thread's time to be answered."""
    is_over = threading.Event()

    class Slow(RecordingTool):
        def validate(self, arguments: str, /) -> Mapping[str, object]:
            if "bob" in arguments:
                is_over.wait(5)
            return super().validate(arguments)

    def quick(request: ApprovalRequest) -> Decision | None:
        return Edit({"to": "bob"}) if request.arguments["to"] == "ann" else None

    chain = ApproverChain(CallbackApprover(quick, name="quick"), CallbackApprover(lambda _: Approve(), name="last"))

    async def who_answered(to: str) -> list[str]:
        office = Office(MemoryCheckpointStore(), tmp_path)
        runtime = office.runtime(
            [call("send", to=to), "Sent."], tools=[Slow("send", office.log)], hitl=("send",), approver=chain
        )
        await runtime.run_agent("clerk", "Go.", run_id=RUN)
        if to == "eve":
            is_over.set()
        return [record.by for record in await office.records() if isinstance(record, ApprovalResolved)]

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(asyncio.run, [who_answered("ann"), who_answered("eve")]))
    assert found == [["quick"], ["last"]]


async def test_a_chain_that_is_asked_directly_says_who_answered_last() -> None:
    chain = ApproverChain(
        CallbackApprover(lambda asked: Approve() if asked.tool == "send" else None, name="first"),
        CallbackApprover(lambda asked: Reject() if asked.tool == "pay" else None, name="second"),
    )
    assert chain.name == "first, second"
    for tool_name, decision, name in (
        ("send", Approve(), "first"), ("pay", Reject(), "second"), ("read", None, "second"),
    ):  # fmt: skip
        asked = ApprovalRequest(approval_id="q", tool=tool_name, arguments={}, digest="", run_id=RUN)
        assert (await chain.decide(asked), chain.name) == (decision, name)


@pytest.mark.parametrize("script", [SEND, BATCH], ids=["one", "batch"])
async def test_an_open_prompt_closes_when_the_answer_comes_from_elsewhere(
    office: Office, script: Sequence[Reply]
) -> None:
    nobody = Nobody()
    running = asyncio.create_task(office.runtime(script, approver=nobody).run_agent("clerk", "Go.", run_id=RUN))
    await asyncio.wait_for(nobody.busy.wait(), 5)
    elsewhere = office.runtime(script)
    for asked in await elsewhere.pending(RUN):
        await elsewhere.answer(RUN, Approve(), approval_id=asked.approval_id)
    result = await asyncio.wait_for(running, 5)
    assert isinstance(result, Finished)
    assert sorted(nobody.closed) == sorted(nobody.asked)
    assert 'send {"to":"ann"}' in office.effects()


async def test_a_prompt_that_will_not_close_is_left_behind(room: Office) -> None:
    done = asyncio.Event()
    busy = asyncio.Event()

    async def stubborn(_: ApprovalRequest) -> Decision:
        busy.set()
        while not done.is_set():
            try:
                await asyncio.wait_for(done.wait(), 60)
            except asyncio.CancelledError:
                continue
        return Reject("too late")

    runtime = room.runtime(SEND, approver=Desk(stubborn))
    running = asyncio.create_task(runtime.run_agent("clerk", "Go.", run_id=RUN))
    await asyncio.wait_for(busy.wait(), 5)
    await runtime.answer(RUN, Approve())
    assert isinstance(await asyncio.wait_for(running, 10), Finished)
    assert room.effects() == ['send {"to":"ann"}']
    done.set()


async def test_a_run_that_is_asked_about_can_be_stopped(office: Office) -> None:
    nobody = Nobody()
    running = asyncio.create_task(office.runtime(SEND, approver=nobody).run_agent("clerk", "Go.", run_id=RUN))
    await asyncio.wait_for(nobody.busy.wait(), 5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert nobody.closed == nobody.asked
    desk = Desk([Approve()])
    assert isinstance(await office.runtime(SEND, approver=desk).resume(RUN), Finished)
    assert [asked.approval_id for asked in desk.asked] == nobody.asked


async def test_a_parked_run_is_owned_by_nobody(office: Office) -> None:
    await office.runtime(SEND).run_agent("clerk", "Go.", run_id=RUN)
    other = msgspec.structs.replace(this_process(), host="elsewhere", boot_id="other", pid=1)
    owner = await office.store.claim(RUN, other)
    await office.store.release(owner)
    assert [run.status async for run in office.runtime(SEND).runs()] == ["waiting"]


# -- forgeries ---------------------------------------------------------------------------------------------------------


def flipped(text: str) -> str:
    """Change one character."""
    middle = len(text) // 2
    return text[:middle] + ("b" if text[middle] == "a" else "a") + text[middle + 1 :]


async def with_answer(office: Office, decision: Decision, script: Sequence[Reply] = SEND) -> Answer:
    """Park a run and have it answered; take the answer out of the mailbox before anybody sees it."""
    runtime = office.runtime(script, answer_within_s=3600)
    parked = await runtime.run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(parked, Parked)
    await runtime.answer(RUN, decision, approval_id=parked.waiting[0].approval_id, by="ann")
    [mail] = await office.store.inbox(RUN)
    await office.store.discard_mail(RUN, [mail.id])
    assert isinstance(mail.command, Answer)
    return mail.command


BY_FIELD: dict[str, tuple[Decision, Callable[[Answer], Answer]]] = {
    "mac": (Approve(), lambda a: msgspec.structs.replace(a, mac=flipped(a.mac))),
    "no mac": (Approve(), lambda a: msgspec.structs.replace(a, mac="")),
    "mac that is no text of ours": (Approve(), lambda a: msgspec.structs.replace(a, mac="é" * 64)),
    "by": (Approve(), lambda a: msgspec.structs.replace(a, by="Ann")),
    "a no into a yes": (Reject("no"), lambda a: msgspec.structs.replace(a, decision="approve")),
    "a yes into one for the session": (Approve(), lambda a: msgspec.structs.replace(a, decision="session")),
    "a yes into an edit": (
        Approve(), lambda a: msgspec.structs.replace(a, decision="edit", arguments='{"to":"eve"}')
    ),
    "guidance into a yes": (Steer("Do not."), lambda a: msgspec.structs.replace(a, decision="approve")),
    "text": (Reject("no"), lambda a: msgspec.structs.replace(a, text="mo")),
    "edited arguments": (
        Edit({"to": "bob"}), lambda a: msgspec.structs.replace(a, arguments=a.arguments.replace("bob", "eve"))
    ),
    "arguments beside a yes": (Approve(), lambda a: msgspec.structs.replace(a, arguments='{"to":"eve"}')),
    "an expired one into a yes": (
        Approve(), lambda a: msgspec.structs.replace(a, decision="expired")
    ),
}  # fmt: skip


@pytest.mark.parametrize("field", BY_FIELD)
async def test_an_answer_that_was_changed_on_its_way_is_refused(office: Office, field: str) -> None:
    decision, change = BY_FIELD[field]
    good = await with_answer(office, decision)
    await office.store.post(RUN, change(good))
    assert isinstance(await office.runtime(SEND).resume(RUN), Parked)
    assert office.effects() == []
    [refused] = await office.found(CommandRefused)
    assert "not signed" in refused.reason
    await office.store.post(RUN, good)
    assert isinstance(await office.runtime(SEND).resume(RUN), Finished), "the answer itself still holds"


async def test_an_answer_is_good_for_its_own_question_only(office: Office) -> None:
    script = [[call("send", to="ann"), call("send", to="ann")], call("send", to="ann"), "Done."]
    good = await with_answer(office, Approve(), script)
    runtime = office.runtime(script)
    other = next(a.approval_id for a in await runtime.pending(RUN) if a.approval_id != good.approval_id)
    await office.store.post(RUN, msgspec.structs.replace(good, approval_id=other))
    await runtime.resume(RUN)
    assert office.effects() == [], "the same tool with the same arguments, in another place"
    await office.store.post(RUN, good)
    await office.store.post(RUN, good)
    await runtime.resume(RUN)
    assert len(office.effects()) == 1
    await runtime.answer(RUN, Reject(), approval_id=other)
    parked = await runtime.resume(RUN)
    assert isinstance(parked, Parked)
    for approval_id in (good.approval_id, parked.waiting[0].approval_id):
        await office.store.post(RUN, msgspec.structs.replace(good, approval_id=approval_id))
    await runtime.resume(RUN)
    assert len(office.effects()) == 1, "nor in a later step"
    await runtime.run_agent("clerk", "Go.", run_id="other")
    [asked, _] = await runtime.pending("other")
    for approval_id in (good.approval_id, asked.approval_id):
        await office.store.post("other", msgspec.structs.replace(good, approval_id=approval_id))
    assert isinstance(await runtime.resume("other"), Parked)
    assert len(office.effects()) == 1, "nor in another run"
    assert len(await office.found(CommandRefused)) == 4
    assert len(await office.found(CommandRefused, "other")) == 2


async def test_an_answer_from_who_has_the_store_and_not_the_key_is_refused(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    await office.runtime(SEND).run_agent("clerk", "Go.", run_id=RUN)
    monkeypatch.setenv("HARNESS_APPROVAL_KEY", "another key " * 4)
    await office.runtime(SEND).answer(RUN, Approve())
    monkeypatch.delenv("HARNESS_APPROVAL_KEY")
    assert isinstance(await office.runtime(SEND).resume(RUN), Parked)
    assert office.effects() == []


async def replanted(office: Office, change: Callable[[Record], Record | None], run_id: str = RUN) -> Office:
    """Write the journal anew, changed, as whoever can write to the store could."""
    records = [changed for record in await office.records() if (changed := change(record)) is not None]
    store = MemoryCheckpointStore()
    owner = await store.claim(run_id, this_process())
    await store.append(run_id, 0, records, owner=owner)
    await store.release(owner)
    return Office(store, office.log.parent)


def altering(kind: type[Record], /, **fields: object) -> Callable[[Record], Record]:
    def change(record: Record) -> Record:
        if not isinstance(record, kind):
            return record
        new = {
            name: value(getattr(record, name)) if callable(value) else value for name, value in fields.items()
        }  # fmt: skip
        return msgspec.structs.replace(record, **new)

    return change


REQUESTED: dict[str, dict[str, object]] = {
    "digest": {"digest": flipped},
    "id": {"approval_id": flipped},
    "arguments that were shown": {"arguments": '{"to":"eve"}'},
    "tool that was shown": {"tool": "pay"},
    "what is asked": {"kind": "in_doubt"},
    "session": {"session": ("pay",)},
    "expiry": {"expires_at": lambda at: at + 1e-6 * 2**10},
    "no expiry": {"expires_at": 0.0},
}


@pytest.mark.parametrize("field", REQUESTED)
@pytest.mark.parametrize("decision", [Approve(), Session()], ids=["yes", "session"])
async def test_a_question_that_was_changed_in_the_store_cannot_be_answered_with_an_old_yes(
    room: Office, field: str, decision: Decision
) -> None:
    good = await with_answer(room, decision)
    other = await replanted(room, altering(ApprovalRequested, **REQUESTED[field]))
    [asked] = await other.found(ApprovalRequested)
    await other.store.post(RUN, msgspec.structs.replace(good, approval_id=asked.approval_id))
    assert isinstance(await other.runtime(SEND).resume(RUN), Parked)
    assert other.effects() == []
    assert await other.found(CommandRefused) or await other.found(ApprovalVoided)


RESOLVED: dict[str, dict[str, object]] = {
    "mac": {"mac": flipped},
    "by": {"by": flipped},
    "id": {"approval_id": flipped},
    "text": {"text": "x"},
    "arguments": {"arguments": '{"to":"eve"}'},
    "an edit": {"decision": "edit", "arguments": '{"to":"eve"}'},
    "session": {"decision": "session"},
}


@pytest.mark.parametrize("field", RESOLVED)
async def test_an_answer_that_was_changed_in_the_store_does_not_hold(room: Office, field: str) -> None:
    """Everything up to the answer is stored; what follows it, the start of the call, is cut off."""
    await answered(room, Approve())
    room.log.unlink()
    records = await room.records()
    until = next(place for place, record in enumerate(records) if isinstance(record, ToolStarted))
    change = altering(ApprovalResolved, **RESOLVED[field])
    keep = iter(range(len(records)))
    other = await replanted(room, lambda record: change(record) if next(keep) < until else None)
    assert isinstance(await other.runtime(SEND).resume(RUN), Parked)
    assert other.effects() == []
    voided = await other.found(ApprovalVoided)
    assert voided, "the reason is written down"
    same = await replanted(other, lambda record: record)
    assert isinstance(await same.runtime(SEND, approver=Desk([Approve()])).resume(RUN), Finished)


async def test_a_call_that_was_changed_in_the_store_is_asked_about_anew(room: Office) -> None:
    good = await with_answer(room, Approve())

    def change(record: Record) -> Record:
        text = msgspec.json.encode(record).replace(rb"\"to\":\"ann\"", rb"\"to\":\"eve\"")
        return msgspec.json.decode(text, type=type(record))

    other = await replanted(room, change)
    await other.store.post(RUN, good)
    result = await other.runtime(SEND).resume(RUN)
    assert isinstance(result, Parked)
    assert result.waiting[0].arguments == '{"to":"eve"}'
    assert other.effects() == []


@pytest.mark.parametrize("decision", [Approve(), Session()], ids=["yes", "session"])
async def test_a_run_under_another_name_takes_no_yes_along(room: Office, decision: Decision) -> None:
    script = [call("send", to="ann"), call("send", to="bob"), "Done."]
    await answered(room, decision, [call("send", to="ann"), call("read", path="a"), call("send", to="bob"), "Done."])
    room.log.unlink()
    records = await room.records()
    until = next(place for place, record in enumerate(records) if isinstance(record, ToolStarted))
    keep = iter(range(len(records)))
    other = await replanted(room, lambda record: record if next(keep) < until else None, "other")
    assert isinstance(await other.runtime(script).resume("other"), Parked)
    assert other.effects() == []


@pytest.mark.parametrize("scope", ["send", "pay"])
async def test_what_a_session_covers_cannot_be_widened_in_the_store(room: Office, scope: str) -> None:
    script = [call("send", to="ann"), call("pay", cents=5), "Done."]
    await answered(room, Session(), script)
    assert room.effects() == ['send {"to":"ann"}']
    other = await replanted(room, altering(ApprovalRequested, session=("send", "pay") if scope == "pay" else ("pay",)))
    assert isinstance(await other.runtime(script).resume(RUN), Parked)
    assert room.effects() == ['send {"to":"ann"}']


async def test_an_answer_is_bound_to_the_tool_as_it_was_defined(office: Office) -> None:
    await office.runtime(SEND).run_agent("clerk", "Go.", run_id=RUN)
    await office.runtime(SEND).answer(RUN, Approve())
    changed = office.runtime(SEND, tools=office.tools(send="Send it to everybody."))
    result = await changed.resume(RUN)
    assert isinstance(result, Parked)
    assert office.effects() == []
    [voided] = await office.found(ApprovalVoided)
    assert "not the one that was asked about" in voided.reason
    await changed.answer(RUN, Approve())
    assert isinstance(await changed.resume(RUN), Finished)


async def test_an_answer_is_bound_to_the_folder_the_tool_works_in(room: Office) -> None:
    def tools(folder: str) -> list[RecordingTool]:
        made = room.tools()
        made[0].spec = msgspec.structs.replace(made[0].spec, workspace=folder)
        return made

    await room.runtime(SEND, tools=tools("/home/ann")).run_agent("clerk", "Go.", run_id=RUN)
    await room.runtime(SEND, tools=tools("/home/ann")).answer(RUN, Approve())
    assert isinstance(await room.runtime(SEND, tools=tools("/home/bob")).resume(RUN), Parked)
    assert room.effects() == []


# -- calls in doubt ----------------------------------------------------------------------------------------------------


async def interrupted(office: Office, first: Sequence[Decision] = (), *, runtime: AgentRuntime | None = None) -> None:
    """Stop a run while ``send`` has had its effect and has not returned."""
    tools = office.tools()
    tools[0] = RecordingTool("send", office.log, delay_s=60)
    before = len(office.effects())
    runtime = office.runtime(SEND, tools=tools, hitl=("send",) if first else (), approver=Desk(first))
    begin = runtime.resume(RUN) if await office.records() else runtime.run_agent("clerk", "Go.", run_id=RUN)
    running = asyncio.create_task(begin)
    for _ in range(500):
        if len(office.effects()) > before:
            break
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(office.effects()) == before + 1


async def test_a_call_in_doubt_runs_again_where_a_person_says_so(office: Office) -> None:
    await interrupted(office)
    desk = Desk([Approve()])
    assert isinstance(await office.runtime(SEND, hitl=(), approver=desk).resume(RUN), Finished)
    [asked] = desk.asked
    assert asked.kind == "in_doubt"
    assert "interrupted" in asked.reason
    assert len(office.effects()) == 2


async def test_a_call_in_doubt_stays_unknown_where_a_person_says_no(office: Office) -> None:
    await interrupted(office)
    llm = ScriptedLLM(SEND)
    assert isinstance(await office.runtime(llm, hitl=(), approver=Desk([Reject()])).resume(RUN), Finished)
    assert "its outcome is unknown" in told(llm)[0]
    assert len(office.effects()) == 1


async def test_a_person_says_what_came_of_a_call_in_doubt(office: Office) -> None:
    await interrupted(office)
    llm = ScriptedLLM(SEND)
    desk = Desk([Edit({"to": "eve"}), Session(), Steer("It was sent at noon.")])
    assert isinstance(await office.runtime(llm, hitl=(), approver=desk).resume(RUN), Finished)
    assert told(llm) == ["send was interrupted; a human says what came of it: It was sent at noon."]
    assert len(office.effects()) == 1


async def test_a_call_in_doubt_is_asked_about_again_after_a_second_crash(office: Office) -> None:
    await interrupted(office)
    await interrupted(office, [Approve()])
    desk = Desk([Approve()])
    assert isinstance(await office.runtime(SEND, hitl=(), approver=desk).resume(RUN), Finished)
    asked = await office.found(ApprovalRequested)
    assert [record.kind for record in asked] == ["in_doubt", "in_doubt"]
    assert len({record.approval_id for record in asked}) == 2
    assert len(office.effects()) == 3


async def test_a_call_in_doubt_runs_again_as_a_person_had_edited_it(office: Office) -> None:
    await interrupted(office, [Edit({"to": "bob"})])
    desk = Desk([Approve()])
    llm = ScriptedLLM(SEND)
    assert isinstance(await office.runtime(llm, approver=desk).resume(RUN), Finished)
    assert dict(desk.asked[0].arguments) == {"to": "bob"}
    assert office.effects() == ['send {"to":"bob"}'] * 2
    assert told(llm) == ['(A human changed the arguments to {"to":"bob"})\nok']


async def test_a_yes_to_the_call_is_none_to_running_it_again(room: Office) -> None:
    """Somebody who can write to the store gives the old yes as the answer to the new question."""
    good = await with_answer(room, Approve())
    await room.store.post(RUN, good)
    await interrupted(room, [Approve()])
    desk = Desk()
    parked = await room.runtime(SEND, approver=desk).resume(RUN)
    assert isinstance(parked, Parked)
    [asked] = parked.waiting
    assert asked.kind == "in_doubt"
    await room.store.post(RUN, msgspec.structs.replace(good, approval_id=asked.approval_id))
    assert isinstance(await room.runtime(SEND, approver=desk).resume(RUN), Parked)
    assert len(room.effects()) == 1


async def test_where_nobody_is_here_a_call_in_doubt_is_told_to_the_model(office: Office) -> None:
    await interrupted(office)
    llm = ScriptedLLM(SEND)
    assert isinstance(await office.runtime(llm, hitl=()).resume(RUN), Finished)
    assert "its outcome is unknown" in told(llm)[0]
    assert len(office.effects()) == 1


# -- plans -------------------------------------------------------------------------------------------------------------

PLAN = [
    {"id": "t1", "agent_id": "clerk", "instruction": "Sweep."},
    {"id": "t2", "agent_id": "clerk", "instruction": "Mop."},
]
OTHER = [{"id": "t1", "agent_id": "clerk", "instruction": "Dust."}]


class Planner:
    """Plans, does tasks and brings results together; remembers what it was asked."""

    def __init__(self, *plans: object, tasks: Callable[[str], Reply] = "done: {}".format) -> None:
        self.plans = list(plans)
        self.asked: list[str] = []
        self.done: list[str] = []
        self._tasks = tasks

    def __call__(self, request: LLMRequest) -> Reply:
        text = request.messages[0].text
        if "synthes" in request.system or "Bring their results together" in request.system:
            return '{"answer": "All is clean.", "confidence": 1}'
        if request.response_schema is not None:
            self.asked.append(text)
            reply = self.plans.pop(0) if self.plans else PLAN
            if isinstance(reply, (str, Exception)):
                return reply
            return msgspec.json.encode({"rationale": "why not", "tasks": reply}).decode()
        self.done.append(text)
        return self._tasks(text)


def planned(office: Office, planner: Planner, *answers: Decision, **options: object) -> tuple[AgentRuntime, Desk]:
    desk = Desk(answers)
    options.setdefault("approver", desk)
    return office.runtime(planner, hitl=(), approve_plans=True, **options), desk


async def test_nothing_of_a_plan_runs_before_the_yes(office: Office) -> None:
    planner = Planner()
    runtime, _ = planned(office, planner, approver=None)
    parked = await runtime.run("Clean up.", run_id=RUN)
    assert isinstance(parked, Parked)
    assert planner.done == []
    [asked] = parked.waiting
    assert (asked.kind, asked.tool) == ("plan", "plan")
    assert [task["instruction"] for task in msgspec.json.decode(asked.arguments)["tasks"]] == ["Sweep.", "Mop."]
    await runtime.answer(RUN, Approve())
    result = await planned(office, planner)[0].resume(RUN)
    assert isinstance(result, Finished), result.error
    assert len(planner.done) == 2
    assert len(planner.asked) == 1


@pytest.mark.parametrize("written_by", ["planner", "hand"])
async def test_a_plan_that_is_rejected_ends_the_run_and_is_asked_about_anew(office: Office, written_by: str) -> None:
    planner = Planner()
    plan = Plan(tuple(Task(**task) for task in PLAN))
    runtime, desk = planned(office, planner, Reject("not on a Friday"), Approve())
    begin = runtime.run("Clean up.", run_id=RUN) if written_by == "planner" else runtime.run_plan(plan, run_id=RUN)
    result = await begin
    assert isinstance(result, Failed)
    assert (result.reason, result.error) == ("plan", "the plan was rejected by a human: not on a Friday")
    assert planner.done == []
    assert isinstance(await runtime.resume(RUN), Finished)
    assert len({asked.approval_id for asked in desk.asked}) == 2


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "defaults left out"])
@pytest.mark.parametrize("by_mail", [True, False], ids=["mail", "desk"])
async def test_a_plan_that_is_edited_is_the_plan(office: Office, whole: bool, by_mail: bool) -> None:
    tasks = msgspec.to_builtins(tuple(Task(**task) for task in OTHER)) if whole else OTHER
    edit = Edit({"tasks": tasks})
    planner = Planner()
    runtime, desk = planned(office, planner, *(() if by_mail else (edit,)))
    if by_mail:
        await runtime.run("Clean up.", run_id=RUN)
        await runtime.answer(RUN, edit)
        result = await runtime.resume(RUN)
    else:
        result = await runtime.run("Clean up.", run_id=RUN)
    assert isinstance(result, Finished), result.error
    assert len(planner.done) == 1
    assert "Dust." in planner.done[0]
    assert len(desk.asked) == 1
    assert len(await office.found(ApprovalRequested)) == 1


BAD_PLANS: list[object] = [
    {"tasks": []},
    {"tasks": [{"id": "t1", "agent_id": "nobody", "instruction": "Dust."}]},
    {"tasks": [{"id": "t1", "agent_id": "clerk", "instruction": "a", "depends_on": ["t1"]}]},
    {"tasks": "none"},
    {},
]


@pytest.mark.parametrize("tasks", BAD_PLANS)
async def test_a_plan_that_is_edited_into_one_that_cannot_be_is_asked_again(
    office: Office, tasks: dict[str, object]
) -> None:
    planner = Planner()
    runtime, desk = planned(office, planner, Edit(tasks), Approve())  # type: ignore[arg-type]
    assert isinstance(await runtime.run("Clean up.", run_id=RUN), Finished)
    assert "does not fit" in desk.asked[1].reason
    assert len(planner.done) == 2


async def test_guidance_has_the_planner_write_it_again_and_that_is_asked_about(office: Office) -> None:
    planner = Planner(PLAN, OTHER)
    runtime, desk = planned(office, planner, Steer("Dust only."), Approve())
    result = await runtime.run("Clean up.", run_id=RUN)
    assert isinstance(result, Finished), result.error
    assert len(planner.asked) == 2
    assert "Dust only." in planner.asked[1]
    assert [task["instruction"] for task in desk.asked[1].arguments["tasks"]] == ["Dust."]  # type: ignore[index,union-attr]
    assert len(planner.done) == 1


@pytest.mark.parametrize("reply", ["no plan at all", harness.LLMError("down")], ids=["unreadable", "down"])
async def test_guidance_that_the_planner_cannot_follow_ends_the_run(room: Office, reply: object) -> None:
    planner = Planner(PLAN, *[reply] * 30)
    runtime, _ = planned(room, planner, *[Steer("Dust only.")] * 5)
    result = await asyncio.wait_for(runtime.run("Clean up.", run_id=RUN), 20)
    assert isinstance(result, (Failed, Parked))
    assert len(planner.asked) < 20
    assert planner.done == []


@pytest.mark.parametrize("answer", [Approve(), "edit"], ids=["yes", "edit"])
async def test_a_replaced_plan_is_asked_about_anew_and_what_is_done_stays(
    office: Office, answer: Decision | str
) -> None:
    first = [
        {"id": "good", "agent_id": "clerk", "instruction": "Sweep."},
        {"id": "bad", "agent_id": "clerk", "instruction": "Fail."},
    ]
    second = [{"id": "new", "agent_id": "clerk", "instruction": "Mop."}]

    def work(text: str) -> Reply:
        return harness.LLMRefused("no") if "Fail." in text else "done"

    planner = Planner(first, second, tasks=work)

    def decide(asked: ApprovalRequest) -> Decision:
        if answer == "edit" and len(desk.asked) == 2:
            tasks = [
                task | {"instruction": "Mop twice."} if task["id"] == "new" else task
                for task in asked.arguments["tasks"]
            ]  # type: ignore[index,union-attr,operator]
            return Edit({"tasks": tasks})  # type: ignore[dict-item]
        return Approve()

    desk = Desk(decide)
    runtime, _ = planned(office, planner, approver=desk)
    result = await runtime.run("Clean up.", run_id=RUN)
    assert isinstance(result, Finished), result.error
    assert len(desk.asked) == 2
    assert len({asked.approval_id for asked in desk.asked}) == 2
    assert sum("Sweep." in text for text in planner.done) == 1, "what was done is not done again"
    assert sum(("Mop twice." if answer == "edit" else "Mop.") in text for text in planner.done) == 1


async def test_a_replaced_plan_is_edited_while_a_task_is_at_work(room: Office) -> None:
    first = [
        {"id": "slow", "agent_id": "clerk", "instruction": "Slow."},
        {"id": "bad", "agent_id": "clerk", "instruction": "Fail."},
    ]
    second = [{"id": "new", "agent_id": "clerk", "instruction": "Mop."}]
    asked_twice = asyncio.Event()

    @tool(effect="read")
    async def wait() -> str:
        """Wait."""
        await asyncio.wait_for(asked_twice.wait(), 5)
        await asyncio.sleep(0.05)
        return "waited"

    def work(text: str) -> Reply:
        if "Fail." in text:
            return harness.LLMRefused("no")
        if "Slow." in text and sum("Slow." in done for done in planner.done) == 1:
            return call("wait")
        return "done"

    planner = Planner(first, second, tasks=work)

    def decide(asked: ApprovalRequest) -> Decision:
        if len(desk.asked) == 1:
            return Approve()
        asked_twice.set()
        return Edit({"tasks": [{"id": "new", "agent_id": "clerk", "instruction": "Dust."}]})

    desk = Desk(decide)
    runtime, _ = planned(room, planner, approver=desk, tools=[wait])
    result = await asyncio.wait_for(runtime.run("Clean up.", run_id=RUN), 20)
    assert isinstance(result, Finished), result.error
    assert isinstance(await runtime.resume(RUN), Finished), "its journal is read back"
    assert any("Dust." in text for text in planner.done)


async def test_a_plan_by_hand_waits_as_long_as_any_question(room: Office) -> None:
    planner = Planner()
    runtime, desk = planned(room, planner, Approve(), answer_within_s=60)
    assert isinstance(await runtime.run_plan(Plan((Task("t1", "clerk", "Sweep."),)), run_id=RUN), Finished)
    assert desk.asked[0].expires_at > time.time()


async def test_a_question_asked_anew_much_later_has_its_whole_time(room: Office) -> None:
    await room.runtime(SEND, answer_within_s=0.3).run_agent("clerk", "Go.", run_id=RUN)
    await room.runtime(SEND).answer(RUN, Approve())
    await asyncio.sleep(0.4)
    changed = room.runtime(SEND, tools=room.tools(send="Another."), answer_within_s=0.3, approver=Desk([Approve()]))
    assert isinstance(await changed.resume(RUN), Finished)
    assert room.effects() == ['send {"to":"ann"}']


# -- scopes and forks --------------------------------------------------------------------------------------------------


async def test_calls_of_tasks_and_of_delegated_work_are_asked_about(office: Office) -> None:
    def reply(request: LLMRequest) -> Reply:
        said = sum(message.role == "assistant" for message in request.messages)
        text = request.messages[0].text
        if "Bring their results together" in request.system:
            return '{"answer": "All is sent.", "confidence": 1}'
        if "Help" in text:
            return [call("send", to="helped"), "Helped."][said]
        return [[call("send", to="task"), call("delegate_to_helper", task="Help.")], "Done."][said]

    helper = AgentConfig("helper", allowed_tools=("send",), hitl_tools=("send",))
    tools = [*office.tools(), delegate(helper)]
    runtime = office.runtime(reply, tools=tools, others=[helper])
    parked = await runtime.run_plan(Plan((Task("t1", "clerk", "Send."),)), goal="Send.", run_id=RUN)
    assert isinstance(parked, Parked), parked.error
    assert {(asked.scope, asked.arguments) for asked in parked.waiting} == {
        ("t1/1/clerk", '{"to":"task"}'),
        (next(asked.scope for asked in parked.waiting if "helped" in asked.arguments), '{"to":"helped"}'),
    }
    first, second = parked.waiting
    await runtime.answer(RUN, Reject("no"), approval_id=second.approval_id)
    await runtime.answer(RUN, Approve(), approval_id=first.approval_id)
    result = await runtime.resume(RUN)
    assert isinstance(result, Finished), result.error
    assert office.effects() == [f"send {first.arguments}"]


async def test_delegated_work_can_be_gated_and_edited(room: Office) -> None:
    def reply(request: LLMRequest) -> Reply:
        said = sum(message.role == "assistant" for message in request.messages)
        if request.system == "helper":
            return f"helped: {request.messages[0].text}"
        return [call("delegate_to_helper", task="Empty the safe."), "Done."][said]

    llm = ScriptedLLM(reply)
    helper = AgentConfig("helper", system_prompt="helper", allowed_tools=())
    desk = Desk([Edit({"task": "Count the safe."})])
    runtime = room.runtime(llm, tools=[delegate(helper)], others=[helper], hitl=("delegate_to_helper",), approver=desk)
    result = await runtime.run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished), result.error
    assert not any("Empty" in r.messages[0].text for r in llm.requests if r.system == "helper")
    assert "helped: Count the safe." in told(llm)[0]


async def test_a_fork_takes_no_yes_along(office: Office) -> None:
    script = [call("send", to="ann"), call("send", to="bob"), "Done."]
    await answered(office, Session(), script)
    assert len(office.effects()) == 2
    runtime = office.runtime(script)
    for at, seen in ((1, []), (2, ["send"]), (3, ["send"] * 2)):
        fork = await runtime.fork(RUN, at=at)
        kinds = {type(record) for record in await office.records(fork)}
        assert kinds.isdisjoint({ApprovalRequested, ApprovalResolved, ApprovalVoided, CommandRefused})
        done = [record.tool for record in await office.found(ToolFinished, fork)]
        assert done == seen
        before = len(office.effects())
        result = await runtime.resume(fork)
        if at == 3:
            assert isinstance(result, Finished)
        else:
            assert isinstance(result, Parked)
            assert {asked.approval_id for asked in result.waiting}.isdisjoint(
                {record.approval_id for record in await office.found(ApprovalRequested)}
            )
        assert len(office.effects()) == before


async def test_a_fork_says_once_what_a_person_said(room: Office) -> None:
    llm = ScriptedLLM([call("send", to="ann"), call("read", path="a"), "Done."])
    runtime = room.runtime(llm, approver=Desk([Steer("Use the post.")]))
    await runtime.run_agent("clerk", "Go.", run_id=RUN)
    await runtime.steer(fork := await runtime.fork(RUN, at=3), "Hurry.")
    await runtime.resume(fork)
    assert guidance(llm.requests[-1]) == ["Use the post.", "Hurry."]


async def test_a_fork_knows_what_came_of_a_call_in_doubt_from_its_result_alone(room: Office) -> None:
    await interrupted(room)
    llm = ScriptedLLM(SEND)
    runtime = room.runtime(llm, hitl=(), approver=Desk([Steer("It was sent at noon.")]))
    await runtime.resume(RUN)
    await runtime.resume(await runtime.fork(RUN, at=2))
    assert told(llm) == ["send was interrupted; a human says what came of it: It was sent at noon."]


# -- steering ----------------------------------------------------------------------------------------------------------


def guidance(request: LLMRequest) -> list[str]:
    """What the model was told of a person's words; the roles of what it sees take turns."""
    roles = [message.role for message in request.messages]
    assert all(before != after for before, after in pairwise(roles)), roles
    return [found for m in request.messages if m.role == "user" for found in re.findall("Human guidance: (.*)", m.text)]


async def test_a_run_nobody_drives_is_told_when_it_is_resumed_and_once(office: Office) -> None:
    script = [call("send", to="ann"), call("read", path="a"), "Done."]
    await office.runtime(script).run_agent("clerk", "Go.", run_id=RUN)
    await office.runtime(script).steer(RUN, "Be quick.")
    await office.runtime(script).answer(RUN, Approve())
    llm = ScriptedLLM(script)
    assert isinstance(await office.runtime(llm).resume(RUN), Finished)
    assert [len(guidance(request)) for request in llm.requests] == [1, 1]
    assert [message.role for message in llm.requests[0].messages] == ["user", "assistant", "tool", "user"]
    with pytest.raises(ConfigError, match="is over"):
        await office.runtime(script).steer(RUN, "Be quick.")


async def test_guidance_before_the_first_step_is_part_of_what_the_model_sees_first(office: Office) -> None:
    """The run was started, and stopped before its model was asked."""
    llm = ScriptedLLM(["Done."], delay_s=60)
    running = asyncio.create_task(office.runtime(llm, hitl=()).run_agent("clerk", "Go.", run_id=RUN))
    while not llm.requests:
        await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait({running})
    await office.runtime(["Done."], hitl=()).steer(RUN, "Be quick.")
    llm = ScriptedLLM(["Done."])
    assert isinstance(await office.runtime(llm, hitl=()).resume(RUN), Finished)
    [request] = llm.requests
    assert guidance(request) == ["Be quick."]
    assert request.messages[0].text.startswith("Go.")


@pytest.mark.parametrize("elsewhere", [True, False])
async def test_guidance_while_the_model_answers_finally_goes_on_with_the_run(office: Office, elsewhere: bool) -> None:
    llm = ScriptedLLM(["Too early.", "Done."], delay_s=0.3 if not elsewhere else 1.3)
    runtime = office.runtime(llm, hitl=())
    running = asyncio.create_task(runtime.run_agent("clerk", "Go.", run_id=RUN))
    while not llm.requests:
        await asyncio.sleep(0.01)
    await (office.runtime([], hitl=()) if elsewhere else runtime).steer(RUN, "One more thing.")
    result = await asyncio.wait_for(running, 10)
    assert result.answer == "Done."
    assert [message.role for message in llm.requests[1].messages] == ["user", "assistant", "user"]
    assert len(guidance(llm.requests[1])) == 1


async def test_one_agent_or_all_of_those_at_work_are_told(office: Office) -> None:
    seen: dict[str, list[str]] = {}
    begun = asyncio.Event()

    @tool(effect="read")
    async def wait() -> str:
        """Wait."""
        begun.set()
        await asyncio.sleep(0.4)
        return "waited"

    def reply(request: LLMRequest) -> Reply:
        if "Bring their results together" in request.system:
            return '{"answer": "Done.", "confidence": 1}'
        said = sum(message.role == "assistant" for message in request.messages)
        if said:
            seen[request.system] = guidance(request)
            return "Done."
        return call("wait")

    agents = [AgentConfig(name, system_prompt=name) for name in ("one", "two")]
    runtime = office.runtime(reply, hitl=(), tools=[wait], others=agents)
    plan = Plan((Task("a", "one", "Work."), Task("b", "two", "Work.")))
    running = asyncio.create_task(runtime.run_plan(plan, goal="Work.", run_id=RUN))
    await asyncio.wait_for(begun.wait(), 5)
    await runtime.steer(RUN, "For all.")
    await runtime.steer(RUN, "For two.", "two")
    await runtime.steer(RUN, "For nobody.", "three")
    assert isinstance(await asyncio.wait_for(running, 10), Finished)
    assert seen == {
        "one": ["For all."],
        "two": ["For all.", "For two."],
    }
    [refused] = await office.found(CommandRefused)
    assert "no agent 'three' is at work" in refused.reason


async def test_guidance_while_an_agent_is_chosen_reaches_that_agent_at_once(office: Office) -> None:
    def reply(request: LLMRequest) -> Reply:
        return '{"agent_id": "clerk", "rationale": "why not"}' if request.response_schema else "Done."

    llm = ScriptedLLM(reply, delay_s=0.2)
    runtime = office.runtime(llm, hitl=(), others=[AgentConfig("other")])
    running = asyncio.create_task(runtime.run_routed("Go.", run_id=RUN))
    while not llm.requests:
        await asyncio.sleep(0.01)
    await runtime.steer(RUN, "Be quick.")
    assert isinstance(await asyncio.wait_for(running, 10), Finished)
    assert len(llm.requests) == 2
    assert guidance(llm.requests[1]) == ["Be quick."]


# -- cancelling --------------------------------------------------------------------------------------------------------


async def ended(office: Office, reason: str) -> None:
    """A cancelled run is over for good, whoever comes, and its journal ends with that."""
    records = await office.records()
    assert isinstance(records[-1], RunCancelled)
    assert sum(isinstance(record, (RunCancelled, RunFinished)) for record in records) == 1
    assert records[-1].reason == reason
    runtime = office.runtime(SEND)
    result = await runtime.resume(RUN)
    assert isinstance(result, Cancelled)
    assert result.error == reason
    assert await office.records() == records
    with pytest.raises(ConfigError, match="is over"):
        await runtime.cancel(RUN)
    assert [run.status async for run in runtime.runs()] == ["cancelled"]
    assert await office.store.inbox(RUN) == []


async def test_a_parked_run_is_cancelled(office: Office) -> None:
    await office.runtime(SEND).run_agent("clerk", "Go.", run_id=RUN)
    await office.runtime(SEND).steer(RUN, "Be quick.")
    await office.runtime(SEND).cancel(RUN, "never mind", by="ann")
    await ended(office, "never mind")
    assert office.effects() == []


async def test_a_run_that_was_left_is_cancelled(office: Office) -> None:
    await interrupted(office)
    await office.runtime(SEND).cancel(RUN, "never mind")
    await ended(office, "never mind")
    assert len(office.effects()) == 1


@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("beside", [True, False])
async def test_cancelling_stops_a_tool_at_work(office: Office, elsewhere: bool, beside: bool) -> None:
    begun, stopped = asyncio.Event(), asyncio.Event()

    @tool
    async def hang() -> str:
        """Hang."""
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()
        return "done"

    script = [[call("hang"), call("read", path="a")] if beside else call("hang"), "Done."]
    runtime = office.runtime(script, hitl=(), tools=[*office.tools(), hang])
    running = asyncio.create_task(runtime.run_agent("clerk", "Go.", run_id=RUN))
    await asyncio.wait_for(begun.wait(), 5)
    await (office.runtime(SEND) if elsewhere else runtime).cancel(RUN, "never mind")
    result = await asyncio.wait_for(running, 5)
    assert isinstance(result, Cancelled)
    assert result.error == "never mind"
    assert stopped.is_set()
    await ended(office, "never mind")


@pytest.mark.parametrize("elsewhere", [True, False])
async def test_cancelling_closes_an_open_prompt(office: Office, elsewhere: bool) -> None:
    nobody = Nobody()
    runtime = office.runtime(SEND, approver=nobody)
    running = asyncio.create_task(runtime.run_agent("clerk", "Go.", run_id=RUN))
    await asyncio.wait_for(nobody.busy.wait(), 5)
    await (office.runtime(SEND) if elsewhere else runtime).cancel(RUN, "never mind")
    assert isinstance(await asyncio.wait_for(running, 5), Cancelled)
    assert nobody.closed == nobody.asked
    await ended(office, "never mind")


async def test_a_cancel_that_waits_in_the_mailbox_ends_the_run_and_nothing_follows(office: Office) -> None:
    """Whoever drove the run died before it could look."""
    await office.runtime(SEND).run_agent("clerk", "Go.", run_id=RUN)
    await office.runtime(SEND).answer(RUN, Approve())
    await office.store.post(RUN, Cancel("never mind", "ann"))
    await office.runtime(SEND).steer(RUN, "Be quick.")
    assert isinstance(await office.runtime(SEND).resume(RUN), Cancelled)
    assert office.effects() == []
    await ended(office, "never mind")


async def test_a_tool_that_swallows_its_cancelling_does_not_keep_the_run(room: Office) -> None:
    begun = asyncio.Event()

    @tool
    async def stubborn() -> str:
        """Ignore it once."""
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "done all the same"
        return "done"

    runtime = room.runtime([call("stubborn"), "Done."], hitl=(), tools=[*room.tools(), stubborn])
    running = asyncio.create_task(runtime.run_agent("clerk", "Go.", run_id=RUN))
    await asyncio.wait_for(begun.wait(), 5)
    await runtime.cancel(RUN, "never mind")
    assert isinstance(await asyncio.wait_for(running, 5), Cancelled)
    [finished] = await room.found(ToolFinished)
    assert finished.text == "done all the same"
    await ended(room, "never mind")


CANCEL = """
import asyncio, sys
from harness import AgentConfig, AgentRuntime, FileCheckpointStore, SQLiteCheckpointStore
from harness.testing import ScriptedLLM

async def main():
    kind, path, what = sys.argv[1:]
    store = (SQLiteCheckpointStore if kind == "sqlite" else FileCheckpointStore)(path)
    runtime = AgentRuntime(llm=ScriptedLLM([]), agents=[AgentConfig("x")], checkpoint_store=store, auto_resume=False)
    await getattr(runtime, what)("run", "from elsewhere")
    await store.close()
asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["sqlite", "file"])
@pytest.mark.parametrize("what", ["cancel", "steer"])
async def test_another_process_speaks_to_a_run_at_work(kind: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "runs"
    store = (SQLiteCheckpointStore if kind == "sqlite" else FileCheckpointStore)(path)
    office = Office(store, tmp_path)
    begun, heard = asyncio.Event(), asyncio.Event()

    @tool(effect="read")
    async def wait() -> str:
        """Wait."""
        begun.set()
        await asyncio.wait_for(heard.wait(), 30)
        return "waited"

    llm = ScriptedLLM([call("wait"), "Done."])
    runtime = office.runtime(llm, hitl=(), tools=[*office.tools(), wait])
    running = asyncio.create_task(runtime.run_agent("clerk", "Go.", run_id=RUN))
    await asyncio.wait_for(begun.wait(), 5)
    library = str(Path(harness.__file__).parent.parent)
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CANCEL, kind, str(path), what,
        stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": library},
    )  # fmt: skip
    assert await asyncio.wait_for(other.wait(), 30) == 0
    if what == "cancel":
        assert isinstance(await asyncio.wait_for(running, 10), Cancelled)
        await ended(office, "from elsewhere")
    else:
        await asyncio.sleep(1.2)  # a run at work looks once a second
        heard.set()
        assert isinstance(await asyncio.wait_for(running, 10), Finished)
        assert guidance(llm.requests[-1]) == ["from elsewhere"]
    await store.close()


# -- policies ----------------------------------------------------------------------------------------------------------


def rules(asked: GatedCall) -> Judged:
    """Never pay; ask before sending; read twice."""
    if asked.tool == "pay":
        return Judged("forbid", "money is not ours to spend", "no-money")
    if asked.tool == "send":
        return Judged("ask", "it leaves the house", "ask-before-sending")
    return Judged("allow", rule="reads") if asked.uses.get("reads", 0) < 2 else Judged("ask", "enough", "reads")


async def test_rules_forbid_ask_and_allow(office: Office) -> None:
    llm = ScriptedLLM(BATCH)
    desk = Desk([Approve()])
    assert isinstance(
        await office.runtime(llm, hitl=(), policy=rules, approver=desk).run_agent("clerk", "Go.", run_id=RUN), Finished
    )
    assert [(asked.tool, asked.reason) for asked in desk.asked] == [("send", "it leaves the house")]
    assert told(llm) == ["ok", "ok", "Tool rejected by policy: money is not ours to spend"]
    assert {record.tool: record.rules for record in await office.found(ToolStarted)} == {"send": (), "read": ("reads",)}
    assert sorted(office.effects()) == ['read {"path":"a"}', 'send {"to":"ann"}']


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_rule_counts_its_uses(office: Office, at_once: bool) -> None:
    calls = [call("read", path=str(n)) for n in range(3)]
    script: list[Reply] = [calls, "Done."] if at_once else [*calls, "Done."]
    parked = await office.runtime(script, hitl=(), policy=rules).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(parked, Parked)
    assert len(office.effects()) == 2
    assert len(await office.found(LLMStarted)) == (1 if at_once else 3)


async def test_what_an_agent_asks_about_is_asked_whatever_the_rules_allow(room: Office) -> None:
    def lax(_: GatedCall) -> Judged:
        return Judged("allow", rule="all")

    parked = await room.runtime(BATCH, hitl=("send",), policy=lax).run_agent("clerk", "Go.", run_id=RUN)
    assert [asked.tool for asked in parked.waiting] == ["send"]  # type: ignore[union-attr]


async def test_an_edit_is_judged_again_and_what_is_forbidden_stays_so(room: Office) -> None:
    def strict(asked: GatedCall) -> Judged:
        return Judged("forbid", "not to eve") if "eve" in asked.arguments else Judged("ask")

    desk = Desk([Edit({"to": "eve"}), Edit({"to": "bob"})])
    result = await room.runtime(SEND, hitl=(), policy=strict, approver=desk).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished)
    assert room.effects() == ['send {"to":"bob"}']
    assert len(desk.asked) == 2
    [voided] = await room.found(ApprovalVoided)
    assert "not to eve" in voided.reason


async def test_an_edit_that_is_forbidden_for_ever_comes_to_an_end(room: Office) -> None:
    def strict(asked: GatedCall) -> Judged:
        return Judged("forbid", "not to eve") if "eve" in asked.arguments else Judged("ask")

    desk = Desk(lambda _: Edit({"to": "eve"}))
    runtime = room.runtime(SEND, hitl=(), policy=strict, approver=desk)
    result = await asyncio.wait_for(runtime.run_agent("clerk", "Go.", run_id=RUN), 10)
    assert isinstance(result, (Parked, Finished))
    assert room.effects() == []
    assert len(desk.asked) < 20


@pytest.mark.parametrize("judged", [RuntimeError("the rules are broken"), None, "allow", Judged("yes")])  # type: ignore[arg-type]
async def test_a_policy_that_is_broken_lets_nothing_run(room: Office, judged: object) -> None:
    def broken(_: GatedCall) -> Judged:
        if isinstance(judged, Exception):
            raise judged
        return judged  # type: ignore[return-value]

    runtime = room.runtime(SEND, hitl=(), policy=broken)
    with contextlib.suppress(RuntimeError, AttributeError):
        assert isinstance(await runtime.run_agent("clerk", "Go.", run_id=RUN), Parked)
    assert room.effects() == []
    assert isinstance(await room.runtime(SEND, hitl=(), approver=Desk([Approve()])).resume(RUN), Finished | Parked)
