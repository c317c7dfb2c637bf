"""Journals an older release wrote: every release reads them, and they mean what they meant."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from harness.approval import Seal, broken_links
from harness.fold import fold
from harness.records import Entry, Record, RunCancelled, RunFinished, decode, encode
from harness.state import RunState

GOLDEN = Path(__file__).parent / "golden"
KEY = b"golden-key-golden-key-golden-key-"
"""What the answers in them were signed with."""


def read(name: str) -> list[Record]:
    return decode((GOLDEN / name).read_bytes(), where=name)


def meaning(records: list[Record]) -> RunState:
    return fold("golden", [Entry("golden", seq, float(seq), record) for seq, record in enumerate(records, 1)])


def test_a_run_with_a_failure_a_resume_and_compactions() -> None:
    state = meaning(read("v1-run.json"))
    assert isinstance(state.over, RunFinished)
    assert state.over.answer == "All was looked at."
    assert state.epoch == 2
    assert state.summarizations >= 1
    assert state.spent == state.over.spent
    assert state.scopes[""].messages[0].text.startswith("Look at all.")


def test_a_fork_with_every_rare_record() -> None:
    state = meaning(read("v1-rare.json"))
    assert isinstance(state.over, RunCancelled)
    assert state.fingerprints is not None
    assert state.fingerprints.prompt == "4"
    assert (state.inherited.llm_calls, state.spent.llm_calls) == (1, 1)
    assert state.spent == state.over.spent
    assert [message.role for message in state.scopes[""].messages] == ["user", "assistant", "tool"]


def test_a_plan_that_was_replaced_with_work_that_was_delegated() -> None:
    state = meaning(read("v2-plan.json"))
    assert isinstance(state.over, RunFinished)
    assert state.over.answer == "The report."
    assert state.plan is not None
    assert {task_id: task.status for task_id, task in state.plan.tasks.items()} == dict.fromkeys(
        ("t1", "t1.2", "t5"), "ended"
    )
    assert state.plan.replans == 1
    assert list(state.scopes) == [""]
    assert (
        sum(usage.cost_microusd for charges in state.charges.values() for usage in charges)
        == state.spent.usage.cost_microusd
    )


def test_a_conversation_that_was_routed() -> None:
    state = meaning(read("v2-conversation.json"))
    root = state.scopes[""]
    assert root.agent_id == "reader"
    assert [message.role for message in root.messages] == ["user", "assistant", "user", "assistant"]
    assert root.messages[2].pinned


def test_a_task_that_was_skipped() -> None:
    state = meaning(read("v2-skipped.json"))
    assert state.plan is not None
    assert {task_id: task.status for task_id, task in state.plan.tasks.items()} == {
        "a": "ended", "b": "skipped", "c": "ended"
    }  # fmt: skip


def test_a_run_that_was_parked_answered_steered_and_held_by_rules() -> None:
    records = read("v3-approvals.json")
    state = meaning(records)
    assert isinstance(state.over, RunFinished)
    assert state.over.answer == "All was done that may be done."
    assert (state.epoch, state.questions, list(state.allowed), state.uses) == (3, {}, ["pay"], {"reads": 1})
    assert len(state.commands) == 6
    messages = state.scopes[""].messages
    assert [message.role for message in messages] == [
        "user", "assistant", "tool", "user", "assistant", "tool", "assistant"
    ]  # fmt: skip
    assert messages[3].text == "Human guidance: Be quick.\n\nHuman guidance: Pay no more than 5."
    assert broken_links(records, Seal(KEY)) == []


def test_a_plan_that_was_rejected_asked_about_anew_and_ended() -> None:
    records = read("v3-plan.json")
    parked = meaning(records[:-1])
    assert parked.parked is not None
    assert parked.parked.waiting == tuple(parked.questions)
    state = meaning(records)
    assert isinstance(state.over, RunCancelled)
    assert (state.over.reason, state.steps, state.plan is not None) == ("never mind", 0, True)
    assert broken_links(records, Seal(KEY)) == []


def test_a_call_that_fell_back_and_was_taken_up_by_the_next_process() -> None:
    records = read("v4-background.json")
    state = meaning(records)
    assert isinstance(state.over, RunFinished)
    assert (state.epoch, state.scopes[""].tainted) == (2, True)
    assert state.spent == state.over.spent, "the call that was taken up counts once, and nothing is estimated"
    cut = meaning(records[:7])
    assert cut.scopes[""].accepted is not None
    assert cut.reserved.output_tokens == 256, "its worst case stays held when its process has died"


def test_a_plan_with_limits_of_its_own_in_which_one_was_raised() -> None:
    records = read("v4-limits.json")
    state = meaning(records)
    assert isinstance(state.over, RunFinished)
    assert state.over.answer == "All was looked at."
    assert state.spent == state.over.spent
    assert state.spent.llm_calls == 3, "one more than the limit it began with"
    assert state.plan is not None
    assert (limits := state.plan.tasks["t1"].task.limits) is not None
    assert (limits.max_tool_calls, state.accounts["task", "t1"].spent.tool_calls) == (3, 1)
    assert broken_links(records, Seal(KEY)) == []


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_it_is_written_as_it_was_read(name: str) -> None:
    records = read(name)
    assert decode(encode(records)) == records
    for length in range(1, len(records)):
        meaning(records[:length])


def test_every_kind_of_record_is_among_them() -> None:
    seen = {type(record) for path in GOLDEN.iterdir() for record in read(path.name)}
    assert seen == set(get_args(Record))
