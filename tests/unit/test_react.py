"""The pure core, driven by a simulated world: random replies, results, crashes and resumes."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import GuardrailConfig, Usage
from harness.agent import AgentConfig
from harness.budget import Reservation
from harness.fold import apply, fold
from harness.messages import Text, ToolCall
from harness.records import (
    VERSION,
    DriverStarted,
    Dropped,
    Entry,
    Fingerprints,
    LLMAccepted,
    LLMDetached,
    LLMFailed,
    LLMFinished,
    LLMStarted,
    Noted,
    ProcessId,
    Record,
    Reopened,
    RunFailed,
    RunFinished,
    RunStarted,
    ToolFinished,
    ToolNotDone,
    ToolStarted,
    decode,
    encode,
)
from harness.state import RunState
from harness.strategies.base import Pause, RunConfig, Wait
from harness.strategies.react import react
from harness.tools.base import ToolSpec
from harness.working_memory import cap, is_over

PROCESS = ProcessId("host", "boot", 1, "0")
SPECS = {
    "look": ToolSpec("look", "", {}, "read"),
    "put": ToolSpec("put", "", {}, "idempotent"),
    "send": ToolSpec("send", "", {}, "once"),
    "pay": ToolSpec("pay", "", {}, "once", reconciles=True),
}


class World:
    """A driver without effects: it asks the strategy and lets `draw` decide what becomes of each call."""

    def __init__(self, draw: st.DataObject, config: RunConfig) -> None:
        self.draw = draw.draw
        self.config = config
        self.journal: list[Record] = []
        self.state = RunState("r")
        self.open: list[Record] = []
        self.started: dict[tuple[int, int], int] = {}
        self.note(RunStarted(VERSION, "goal", "a", Fingerprints("", "", ""), tokens=5))
        self.take()

    def note(self, record: Record) -> None:
        self.journal.append(record)
        apply(self.state, record, float(len(self.journal)))

    def take(self) -> None:
        """A new driver: whatever was open is in doubt."""
        self.open = []
        self.note(DriverStarted(VERSION, self.state.epoch + 1, PROCESS))

    def decide(self) -> None:
        while self.state.over is None and self.state.failed is None:
            steps = react(self.state.scopes[""], self.state, self.config)
            for step in steps:
                if isinstance(step, Pause):
                    self.state.scopes[""].waited = True
                elif not isinstance(step, Wait):
                    self.note(step)
                    if isinstance(step, (LLMStarted, ToolStarted)):
                        self.open.append(step)
            if all(isinstance(step, (LLMStarted, ToolStarted, Wait)) for step in steps):
                return

    def outcome(self, start: Record) -> None:
        clock = len(self.journal) / 100
        if isinstance(start, LLMStarted):
            self.note(self.listened(start, clock))
            return
        assert isinstance(start, ToolStarted)
        if start.reconcile:
            verdict = self.draw(st.sampled_from(["done", "not done", "unknown"]))
            if verdict == "not done":
                self.note(ToolNotDone(start.step, start.index, clock))
                return
            status = "reconciled" if verdict == "done" else "unknown"
        else:
            key = (start.step, start.index)
            self.started[key] = self.started.get(key, 0) + 1
            status = self.draw(st.sampled_from(["ok", "ok", "error", "timeout"]))
        text = self.draw(st.sampled_from(["same", "other", "long " * 40]))
        self.note(ToolFinished(start.step, start.index, start.tool, status, text, clock, tokens=len(text) // 4))

    def accept(self) -> None:
        """Have the provider say that it goes on with the call in flight, whatever becomes of its listener."""
        for start in self.open:
            if isinstance(start, LLMStarted) and self.state.scopes[""].accepted is None:
                response_id = f"resp_{len(self.journal)}"
                self.note(LLMAccepted(start.step, response_id, "p", "", start.attempt, start.purpose))

    def listened(self, start: LLMStarted, clock: float) -> Record:
        accepted = self.state.scopes[""].accepted
        if accepted is not None and self.draw(st.booleans()):
            transient, pause_s = self.draw(st.booleans()), self.draw(st.sampled_from([0.0, 0.5]))
            return LLMDetached(start.step, clock, "cut", transient, "", start.attempt, start.purpose, pause_s)
        return self.reply(start, clock)

    def reply(self, start: LLMStarted, clock: float) -> Record:
        kind = self.draw(st.sampled_from(["calls", "calls", "calls", "answer", "malformed", "cut", "empty", "fault"]))
        usage = Usage(input_tokens=self.draw(st.integers(0, 400)), output_tokens=3, cost_microusd=10)
        common = {"usage": usage, "attempt": start.attempt, "purpose": start.purpose, "tokens": 8}
        if kind == "fault":
            transient = self.draw(st.booleans())
            return LLMFailed(start.step, clock, "down", transient, attempt=start.attempt, purpose=start.purpose)
        if start.purpose == "compaction":
            return LLMFinished(start.step, clock, (Text("summary"),), "stop", **common)
        if kind == "calls":
            names = self.draw(st.lists(st.sampled_from([*SPECS, "gone"]), min_size=1, max_size=4))
            args = self.draw(st.sampled_from(["{}", '{"x":1}']))
            parts = tuple(ToolCall("", name, args) for name in names)
            return LLMFinished(start.step, clock, parts, "tool_calls", **common)
        if kind == "malformed":
            return LLMFinished(start.step, clock, (Text("?"),), "stop", malformed="no JSON", **common)
        if kind == "cut":
            return LLMFinished(start.step, clock, (Text("ab"), ToolCall("", "send", "{")), "length", **common)
        if kind == "empty":
            return LLMFinished(start.step, clock, (), "stop", **common)
        return LLMFinished(start.step, clock, (Text("42"),), "stop", **common)

    def run(self) -> None:
        for _ in range(400):
            self.decide()
            if self.state.over is not None:
                return
            if self.state.failed is not None:
                if not self.draw(st.booleans()):
                    return
                self.note(Reopened("again"))
                self.take()
                continue
            what = self.draw(st.sampled_from(["outcome", "outcome", "outcome", "outcome", "crash", "accept"]))
            if what == "crash":
                self.take()
            elif what == "accept":
                self.accept()
            else:
                assert self.open, "the strategy waits for nothing"
                self.outcome(self.open.pop(self.draw(st.integers(0, len(self.open) - 1))))
        raise AssertionError("the run does not end")


def config(draw: st.DataObject) -> RunConfig:
    agent = AgentConfig(
        "a",
        max_steps=draw.draw(st.integers(1, 8)),
        working_memory_max_tokens=draw.draw(st.sampled_from([20, 60, 8000])),
        max_parallel_tools=draw.draw(st.integers(1, 3)),
        max_llm_attempts=draw.draw(st.integers(1, 3)),
    )
    limits = GuardrailConfig(
        max_llm_calls=draw.draw(st.sampled_from([None, 5])), max_tool_calls=draw.draw(st.sampled_from([None, 4]))
    )
    return RunConfig(agent, SPECS, limits, overhead_tokens=10)


def entries(journal: list[Record]) -> list[Entry]:
    return [Entry("r", seq, float(seq), record) for seq, record in enumerate(journal, 1)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_life_of_a_run_ends_and_keeps_its_promises(data: st.DataObject) -> None:
    world = World(data, config(data))
    world.run()
    once = {(r.step, r.index) for r in world.journal if isinstance(r, ToolStarted) and r.tool == "send"}
    assert all(world.started.get(key, 0) <= 1 for key in once)
    if world.config.limits.max_tool_calls is not None:
        assert world.state.spent.tool_calls <= 4
    started = [r for r in world.journal if isinstance(r, (LLMStarted, ToolStarted))]
    finals = [r for r in world.journal if isinstance(r, (RunFinished, RunFailed))]
    assert started
    assert finals


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_call_that_the_provider_goes_on_with_is_bought_once_and_charged_once(data: st.DataObject) -> None:
    world = World(data, config(data))
    world.run()
    charged = Usage()
    call: LLMStarted | None = None
    accepted = ""
    for record in world.journal:
        if isinstance(record, LLMStarted):
            assert record.response_id == accepted, "what the provider goes on with is taken up, and no other is bought"
            if accepted:
                assert call is not None
                assert msgspec.structs.replace(record, response_id="") == call
            else:
                call = record
        elif isinstance(record, LLMAccepted):
            accepted = record.response_id
        elif isinstance(record, (LLMFinished, LLMFailed)):
            charged += record.usage
            call, accepted = None, ""
        elif isinstance(record, DriverStarted) and call is not None and not accepted:
            charged += call.reserved.as_usage(priced=call.priced)
            call = None
    state = world.state
    assert state.spent.usage == charged
    bought = [record for record in world.journal if isinstance(record, LLMStarted) and not record.response_id]
    assert state.spent.llm_calls == len(bought)
    held = call.reserved if call is not None else Reservation()
    assert (state.reserved.input_tokens, state.reserved.output_tokens) == (held.input_tokens, held.output_tokens)
    if call is None:
        assert state.in_flight == sum(isinstance(step, ToolStarted) for step in world.open)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_prefix_folds_and_can_be_resumed(data: st.DataObject) -> None:
    world = World(data, config(data))
    world.run()
    journal = entries(world.journal)
    assert decode(encode(world.journal)) == world.journal
    for length in range(1, len(journal)):
        state = fold("r", journal[:length])
        if state.over is not None or state.failed is not None:
            continue
        apply(state, DriverStarted(VERSION, state.epoch + 1, PROCESS), 0.0)
        steps = react(state.scopes[""], state, world.config)
        assert steps, "a resumed run has something to do"
        for step in steps:
            if isinstance(step, LLMStarted) and step.purpose == "step":
                past = world.journal[:length]
                recorded = [r.step for r in past if isinstance(r, LLMFinished) and r.purpose == "step"]
                assert step.step == max(recorded, default=0) + 1, "no recorded model call is made again"
            if isinstance(step, ToolStarted) and not step.reconcile:
                done = [(r.step, r.index) for r in world.journal[:length] if isinstance(r, ToolFinished)]
                assert (step.step, step.index) not in done, "no finished tool runs again"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_the_model_sees_is_well_formed(data: st.DataObject) -> None:
    world = World(data, config(data))
    world.run()
    state = RunState("r")
    for record in world.journal:
        apply(state, record, 0.0)
        scope = state.scopes[""]
        if not isinstance(record, LLMStarted) or record.purpose == "compaction":
            continue
        messages = scope.messages
        assert messages[0].role == "user"
        assert messages[0].text.startswith("goal"), "the goal is never summarised away"
        assert len(messages) == len(scope.tokens)
        assert sum(scope.tokens) == scope.total_tokens
        for before, after in pairwise(messages):
            assert (before.role, after.role) not in {("assistant", "assistant"), ("user", "user"), ("tool", "tool")}
            assert bool(before.tool_calls) == (after.role == "tool"), "a call and its result are never parted"
        if is_over(scope, world.config.agent.working_memory_max_tokens):
            assistants = [m for m in messages if m.role == "assistant"]
            assert len(assistants) <= 1 or scope.passes or len(messages) <= 4


@pytest.mark.parametrize("length", [99, 100, 101, 5000])
def test_a_capped_text_says_what_was_cut(length: int) -> None:
    text = "x" * length
    capped = cap(text, 100)
    if length <= 100:
        assert capped == text
    else:
        assert f"{length - 100} of {length} characters cut here" in capped
        assert len(capped) < 250


def test_an_unknown_field_of_a_newer_record_is_kept_out_by_its_version() -> None:
    data = msgspec.json.encode([{"type": "RunStarted", "version": VERSION + 1}])
    with pytest.raises(Exception, match="newer react-agent-harness"):
        decode(data)


def test_dropping_comes_after_two_passes() -> None:
    agent = AgentConfig("a", working_memory_max_tokens=10, max_steps=50)
    run = RunConfig(agent, SPECS)
    state = RunState("r")
    apply(state, RunStarted(VERSION, "goal", "a", Fingerprints("", "", ""), tokens=1), 0.0)
    apply(state, DriverStarted(VERSION, 1, PROCESS), 0.0)
    seen: list[str] = []
    for turn in range(60):
        [step] = react(state.scopes[""], state, run)
        apply(state, step, 0.0)
        if isinstance(step, LLMStarted) and step.purpose == "compaction":
            seen.append("compact")
            text = (Text("a summary that is longer than what it replaces"),)
            apply(state, LLMFinished(step.step, 0.0, text, "stop", Usage(), purpose="compaction", tokens=50), 0.0)
        elif isinstance(step, LLMStarted):
            call = (ToolCall("", "look", f'{{"turn":{turn}}}'),)
            apply(state, LLMFinished(step.step, 0.0, call, "tool_calls", Usage(), tokens=4), 0.0)
        elif isinstance(step, Dropped):
            seen.append("drop")
            if seen.count("drop") == 2:
                break
        elif isinstance(step, ToolStarted):
            text = f"result {turn}"
            apply(state, ToolFinished(step.step, step.index, "look", "ok", text, 0.0, tokens=4), 0.0)
        else:
            assert isinstance(step, Noted)
    assert "drop" in seen
    assert seen[: seen.index("drop")].count("compact") <= 2
