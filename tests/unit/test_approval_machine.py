"""Approvals without effects: random answers, forgeries, expiries, crashes, forks and changed tools, on the pure core.

The simulated driver keeps books of its own about what people have really said; a call that starts must be in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import msgspec
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from harness.agent import AgentConfig
from harness.approval import AUDITED, GatedCall, Judged, Seal, audited, broken_links
from harness.budget import GuardrailConfig, Usage
from harness.fold import apply, fold
from harness.fork import fork_records
from harness.hitl.gate import gate_of
from harness.inbox import record_of
from harness.mailbox import Answer, Guidance, Mail
from harness.messages import Text, ToolCall
from harness.raising import invalid_raise
from harness.records import (
    VERSION,
    ApprovalRequested,
    ApprovalResolved,
    ApprovalVoided,
    Audited,
    CommandRefused,
    DecisionName,
    DriverStarted,
    Entry,
    Fingerprints,
    Guided,
    LLMFailed,
    LLMFinished,
    LLMStarted,
    ProcessId,
    Record,
    Reopened,
    RunFailed,
    RunFinished,
    RunParked,
    RunStarted,
    ToolFinished,
    ToolNotDone,
    ToolStarted,
    decode,
    encode,
)
from harness.state import RunState, asked_about, open_questions, question_of
from harness.strategies.base import Ask, Pause, RunConfig, Wait
from harness.strategies.react import react
from harness.tools.base import ToolSpec

PROCESS = ProcessId("host", "boot", 1, "0")
SEAL, OTHER_SEAL = Seal(b"k" * 32), Seal(b"o" * 32)
ARGUMENTS = ('{"to":"ann"}', '{"to": "bob"}')
EDITED = ('{"to":"cid"}', "[1]", '{"to":"eve"}')
RAISES = tuple(f'{{"raise_to":{number}}}' for number in (2, 4, 7, 30))
DECISIONS: tuple[DecisionName, ...] = ("approve", "session", "edit", "reject", "steer")
GATED = ("send", "pay", "put", "ruled")


@dataclass(frozen=True)
class Said:
    """What a person has really said: to this question, about this call, as the tool was then."""

    run_id: str
    request: ApprovalRequested
    answer: ApprovalResolved
    definition: str
    workspace: str


def policy(asked: GatedCall) -> Judged:
    if asked.tool != "ruled":
        return Judged("allow")
    if "eve" in asked.arguments:
        return Judged("forbid", "not to eve", "no-eve")
    return Judged("allow", rule="first") if asked.uses.get("first", 0) < 1 else Judged("ask", "enough", "first")


def unfit(request: ApprovalRequested, arguments: str) -> str:
    if request.kind == "budget":
        return invalid_raise(request.arguments, arguments)
    return "" if arguments.startswith("{") else "no object"


class World:
    """A driver without effects, people who answer, and somebody who can write to the store but has no key."""

    def __init__(self, data: st.DataObject, *, forgers: bool = True) -> None:
        self.draw = data.draw
        self.forgers = forgers
        self.now = 1000.0
        self.run_id = "r"
        self.within_s = self.draw(st.sampled_from([None, None, 5.0]))
        self.human = self.draw(st.booleans())
        self.memory = self.draw(st.sampled_from([8000, 8000, 12]))
        self.most_calls = self.draw(st.sampled_from([None, 1, 3]))
        self.definitions = dict.fromkeys([*GATED, "look"], "1")
        self.workspace = "/a"
        self.state = RunState(self.run_id)
        self.entries: list[Entry] = []
        self.open: list[Record | Ask] = []
        self.said: dict[tuple[str, str], Said] = {}
        self.posted: list[Answer] = []
        self.mails = 0
        self.used: dict[tuple[str, str], int] = {}
        self.forged = False
        self.asked_of: dict[tuple[str, str], tuple[str, str]] = {}
        self.note(RunStarted(VERSION, "goal", "a", Fingerprints("", "", ""), tokens=5))
        self.take()

    @property
    def config(self) -> RunConfig:
        specs = {
            "look": ToolSpec("look", "", {}, "read"),
            "send": ToolSpec("send", "", {}, "once", workspace=self.workspace),
            "pay": ToolSpec("pay", "", {}, "once", reconciles=True),
            "put": ToolSpec("put", "", {}, "idempotent"),
            "ruled": ToolSpec("ruled", "", {}, "once"),
        }
        agent = AgentConfig(
            "a",
            max_steps=4,
            max_llm_attempts=2,
            hitl_tools=("send", "pay", "put"),
            working_memory_max_tokens=self.memory,
        )
        return RunConfig(
            agent,
            specs,
            GuardrailConfig(max_llm_calls=self.most_calls, on_limit="ask"),
            gate=gate_of(agent, specs, policy),
            seal=SEAL,
            definitions=dict(self.definitions),
            human=self.human,
            answer_within_s=self.within_s,
        )

    # -- the journal ---------------------------------------------------------------------------------------------------

    def note(self, record: Record) -> None:
        self.check(record)
        self.append(record)
        if type(record) in AUDITED:
            what = audited(record)
            self.append(Audited(what, SEAL.mac(f"{self.state.audit}{what}".encode())))

    def append(self, record: Record) -> None:
        self.now += 0.01
        self.entries.append(Entry(self.run_id, len(self.entries) + 1, self.now, record))
        apply(self.state, record, self.now)

    def check(self, record: Record) -> None:
        """A gated call starts by a rule, or by what somebody has really said, in time, of exactly this call.

        No model is called beyond the limit, or what somebody has really raised it to.
        """
        if isinstance(record, LLMStarted) and self.most_calls is not None:
            assert self.state.spent.llm_calls < max([self.most_calls, *self.raised()]), "nobody has raised it that far"
        if not isinstance(record, ToolStarted) or record.reconcile or record.tool not in GATED:
            return
        call = self.state.scopes[record.scope].calls[record.index]
        if record.rules:
            assert record.tool == "ruled"
            assert not record.approval_id
            assert self.state.uses.get("first", 0) < 1, "a rule that was used up"
            return
        said = self.said[self.run_id, record.approval_id]  # or nobody has said so
        request, answer = said.request, said.answer
        assert answer.decision in ("approve", "session", "edit")
        now = (self.definitions[record.tool], self.workspace if record.tool == "send" else "")
        assert (said.definition, said.workspace) == now, "the tool has become another since"
        if (request.scope, request.step, request.index) != (record.scope, record.step, record.index):
            assert answer.decision == "session"
            assert record.tool in request.session
            return
        key = (self.run_id, record.approval_id)
        self.used[key] = self.used.get(key, 0) + 1
        if request.kind == "in_doubt" or (record.effect == "once" and record.tool != "pay"):
            assert self.used[key] == 1, "one yes is one start"
        wanted = answer.arguments if answer.decision == "edit" else request.arguments
        assert call.arguments == wanted, "it runs with exactly what was approved"
        assert answer.decision == "edit" or request.arguments == call.arguments

    def raised(self) -> list[int]:
        """What people have really raised the limit to, in this run."""
        found: list[int] = []
        for (run_id, _), said in self.said.items():
            yes = said.answer.decision in ("approve", "edit")
            if yes and run_id == self.run_id and said.request.kind == "budget":
                text = said.answer.arguments or said.request.arguments
                found.append(msgspec.json.decode(text, type=dict[str, object])["raise_to"])  # type: ignore[arg-type]
        return found

    def take(self) -> None:
        """A new driver: whatever was open is in doubt, and nobody is being asked."""
        self.open = []
        if self.state.failed is not None:
            self.note(Reopened("again"))
        self.note(DriverStarted(VERSION, self.state.epoch + 1, PROCESS))

    def decide(self) -> None:
        for _ in range(200):
            if self.state.ended:
                return
            scope = self.state.scopes[""]
            steps = react(scope, self.state, self.config)
            facts = 0
            for step in steps:
                if isinstance(step, Pause):
                    scope.waited = True
                    facts += 1
                elif isinstance(step, Ask):
                    asked_about(self.state, step.scope, step.index).asking = True
                    self.open.append(step)
                elif not isinstance(step, Wait):
                    self.note(step)
                    if isinstance(step, (LLMStarted, ToolStarted)):
                        self.open.append(step)
                    else:
                        facts += 1
            if not facts:
                return
        raise AssertionError("the strategy states facts for ever")

    # -- the world -----------------------------------------------------------------------------------------------------

    def answer(self, request: ApprovalRequested, decision: DecisionName, seal: Seal = SEAL) -> ApprovalResolved:
        text = "why" if decision in ("reject", "steer") else ""
        numbers = RAISES if request.kind == "budget" else EDITED
        arguments = self.draw(st.sampled_from(numbers)) if decision == "edit" else ""
        mac = seal.sign(
            request.digest, decision, by="ann", text=text, arguments=arguments, expires_at=request.expires_at
        )
        return ApprovalResolved(
            request.approval_id, decision, "ann", mac, request.step, request.index, request.scope, text, arguments
        )

    def remember(self, request: ApprovalRequested, answer: ApprovalResolved) -> None:
        if request.kind == "budget":
            self.said[self.run_id, request.approval_id] = Said(self.run_id, request, answer, "", "")
            return
        scope = self.state.scopes[request.scope]
        spec = self.config.tools[scope.calls[request.index].call.name]
        # What was asked is asked of the tool as it was then: that is what the digest says.
        definition, workspace = self.asked_of[self.run_id, request.approval_id]
        assert spec.name == request.tool
        self.said[self.run_id, request.approval_id] = Said(self.run_id, request, answer, definition, workspace)

    def by_mail(self, answer: Answer, at: float | None = None) -> None:
        """Have a command taken, as the driver does."""
        self.mails += 1
        request = question_of(self.state, answer.approval_id)
        mail = Mail(f"m{self.mails}", self.now if at is None else at, answer)
        record = record_of(mail, self.state, len, SEAL, unfit)
        assert record is not None
        if isinstance(record, ApprovalResolved):
            assert request is not None
            known = self.said.get((self.run_id, answer.approval_id))
            assert known is not None, "nobody has said so"
            assert (known.answer.decision, known.answer.arguments) == (answer.decision, answer.arguments)
            assert not request.expires_at or mail.received_at <= request.expires_at
        self.close(answer.approval_id) if isinstance(record, ApprovalResolved) else None
        self.note(record)
        assert record_of(mail, self.state, len, SEAL, unfit) is None, "a command is taken once"

    def close(self, approval_id: str) -> None:
        self.open = [step for step in self.open if not (isinstance(step, Ask) and step.approval_id == approval_id)]

    def people(self, request: ApprovalRequested) -> None:
        """Somebody answers, here or from elsewhere, or only seems to."""
        how = self.draw(st.sampled_from(["here", "mail", "mail", "late", "nobody", *(["forge"] * 3 * self.forgers)]))
        decision = self.draw(st.sampled_from(DECISIONS))
        if how == "nobody":
            return
        if how == "forge":
            self.forge(request)
            return
        if how == "late":
            if not request.expires_at:
                return
            self.now = max(self.now, request.expires_at + 1)
            event("late answer")
            self.by_mail(_letter(self.answer(request, decision)))
            assert isinstance(self.entries[-1].record, CommandRefused)
            self.expire(request)
            return
        answer = self.answer(request, decision)
        if request.expires_at and self.now > request.expires_at:
            self.expire(request)
            return
        fits = (decision != "session" or request.session) and (
            decision != "edit" or (request.kind != "in_doubt" and not unfit(request, answer.arguments))
        )
        if how == "here":
            if not fits:
                return  # an approver is asked once more
            self.remember(request, answer)
            self.close(request.approval_id)
            self.note(answer)
        else:
            letter = _letter(answer)
            if fits:
                self.remember(request, answer)
                self.posted.append(letter)
            elif request.kind == "in_doubt" and decision == "edit":
                return  # refused by the tools' own validation, which stands for more than ``unfit`` here
            self.by_mail(letter)
        event(f"answered {decision} {how}")

    def expire(self, request: ApprovalRequested) -> None:
        mac = SEAL.sign(request.digest, "expired", by="time", text="", arguments="", expires_at=request.expires_at)
        self.close(request.approval_id)
        self.note(
            ApprovalResolved(
                request.approval_id, "expired", "time", mac, request.step, request.index, request.scope
            )
        )  # fmt: skip

    def forge(self, request: ApprovalRequested) -> None:
        """Somebody without the key tries: by mail, or in the journal itself."""
        how = self.draw(st.sampled_from(["key", "flip", "decision", "replay", "swap", "journal", "journal replay"]))
        good = self.answer(request, self.draw(st.sampled_from(DECISIONS)))
        event(f"forged by {how}")
        if how == "key":
            self.by_mail(_letter(self.answer(request, "approve", OTHER_SEAL)))
        elif how == "flip":
            self.by_mail(
                msgspec.structs.replace(_letter(good), mac=good.mac[:-1] + ("0" if good.mac[-1] != "0" else "1"))
            )
        elif how == "decision":
            refusing = self.answer(request, "reject")
            self.by_mail(msgspec.structs.replace(_letter(refusing), decision="approve"))
        elif how in ("replay", "swap", "journal replay") and not self.posted:
            return
        elif how == "replay":
            self.by_mail(self.draw(st.sampled_from(self.posted)))
        elif how == "swap":
            old = self.draw(st.sampled_from(self.posted))
            if old.approval_id != request.approval_id:
                self.by_mail(msgspec.structs.replace(old, approval_id=request.approval_id))
        else:
            self.forged = True
            mac = "0" * 64 if how == "journal" else self.draw(st.sampled_from(self.posted)).mac
            resolved = msgspec.structs.replace(good, mac=mac)
            if how == "journal" or resolved.mac != good.mac:
                self.close(request.approval_id)
                self.append(resolved)

    def outcome(self, start: Record) -> None:
        clock = len(self.entries) / 100
        if isinstance(start, LLMStarted):
            self.note(self.reply(start, clock))
            return
        assert isinstance(start, ToolStarted)
        if start.reconcile and self.draw(st.booleans()):
            self.note(ToolNotDone(start.step, start.index, clock))
            return
        status = "unknown" if start.reconcile else "ok"
        self.note(ToolFinished(start.step, start.index, start.tool, status, self.draw(st.sampled_from("ab")), clock))

    def reply(self, start: LLMStarted, clock: float) -> Record:
        if self.draw(st.integers(0, 9)) == 0:
            return LLMFailed(
                start.step, clock, "down", transient=True, attempt=start.attempt, purpose=start.purpose
            )  # fmt: skip
        if start.purpose == "compaction":
            return LLMFinished(start.step, clock, (Text("summary"),), "stop", Usage(), purpose="compaction", tokens=2)
        names = self.draw(st.lists(st.sampled_from([*GATED, "look"]), max_size=3))
        if not names:
            return LLMFinished(start.step, clock, (Text("42"),), "stop", Usage(), attempt=start.attempt)
        parts = tuple(ToolCall("", name, self.draw(st.sampled_from(ARGUMENTS))) for name in names)
        return LLMFinished(start.step, clock, parts, "tool_calls", Usage(), attempt=start.attempt)

    def fork(self) -> None:
        """Go on with a copy, which knows of no yes."""
        first = self.draw(st.integers(1, self.state.steps + 1))
        records = fork_records(self.run_id, self.entries, min(first, max(1, self.state.steps)))
        self.run_id += "f"
        self.state = RunState(self.run_id)
        self.entries, self.open = [], []
        self.forged = False
        for record in records:
            assert not isinstance(record, (ApprovalRequested, ApprovalResolved, ApprovalVoided, Audited))
            self.append(record)
        assert not self.state.allowed
        self.take()
        event("forked")

    def run(self) -> None:
        forks = 0
        for _ in range(120):
            before = len(self.entries)
            self.decide()
            for entry in self.entries[before:]:
                if isinstance(entry.record, ApprovalRequested) and entry.record.kind != "budget":
                    tool = entry.record.tool
                    place = self.workspace if tool == "send" else ""
                    self.asked_of[self.run_id, entry.record.approval_id] = (self.definitions[tool], place)
            if self.state.over is not None or self.state.failed is not None:
                if forks < 1 and self.state.steps and self.draw(st.integers(0, 3)) == 0:
                    forks += 1
                    self.fork()
                    continue
                return
            asked = open_questions(self.state)
            calls = [step for step in self.open if not isinstance(step, Ask)]
            assert calls or asked, "the strategy waits for nothing"
            what = self.draw(st.sampled_from(["go on"] * 6 + ["crash", "change", "steer", "time"]))
            if what == "crash":
                self.take()
            elif what == "change":
                name = self.draw(st.sampled_from(["send", "pay", "put", "ruled", "workspace"]))
                if name == "workspace":
                    self.workspace = "/b" if self.workspace == "/a" else "/a"
                else:
                    self.definitions[name] = self.draw(st.sampled_from("123"))
                self.take()  # a configuration is another process's
            elif what == "steer":
                self.mails += 1
                mail = Mail(f"m{self.mails}", self.now, Guidance("this way", "ann"))
                record = record_of(mail, self.state, len, SEAL, unfit)
                assert isinstance(record, Guided)
                self.note(record)
            elif what == "time":
                self.now += 3.0
            elif calls and (not asked or self.draw(st.booleans())):
                start = self.draw(st.sampled_from(calls))
                self.open.remove(start)
                self.outcome(start)
            elif asked:
                self.people(self.draw(st.sampled_from(asked)))
                if not self.open and open_questions(self.state) and self.draw(st.booleans()):
                    self.park()
        self.park()

    def park(self) -> None:
        """Nobody is here: the run stops where it is, and whoever takes it finds the same questions."""
        waiting = open_questions(self.state)
        if self.state.ended or not waiting:
            return
        self.open = []
        self.note(RunParked(tuple(asked.approval_id for asked in waiting), self.state.steps, self.state.spent))
        event("parked")
        self.take()
        assert open_questions(self.state) == waiting


def _letter(answer: ApprovalResolved) -> Answer:
    return Answer(answer.approval_id, answer.decision, answer.by, answer.mac, answer.text, answer.arguments)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_no_call_starts_but_by_a_real_yes_to_exactly_it(data: st.DataObject) -> None:
    world = World(data)
    world.run()
    records = [entry.record for entry in world.entries]
    asked = {record.approval_id for record in records if isinstance(record, ApprovalRequested)}
    settled = {
        record.approval_id for record in records if isinstance(record, (ApprovalResolved, ApprovalVoided))
    }  # fmt: skip
    waiting = {request.approval_id for request in open_questions(world.state)}
    assert asked - settled == waiting, "every question is answered, or stands"
    if world.state.over is not None:
        assert not waiting
    finals = [record for record in records if isinstance(record, (RunFinished, RunFailed))]
    assert len(finals) <= 1 + len([record for record in records if isinstance(record, Reopened)])
    if not world.forged:
        assert broken_links(records, SEAL) == []


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_prefix_folds_and_goes_on(data: st.DataObject) -> None:
    world = World(data)
    world.run()
    records = [entry.record for entry in world.entries]
    assert decode(encode(records)) == records
    for length in range(1, len(world.entries)):
        state = fold(world.run_id, world.entries[:length])
        for request in open_questions(state):
            assert question_of(state, request.approval_id) is request
        if state.over is not None or state.failed is not None:
            continue
        apply(state, DriverStarted(VERSION, state.epoch + 1, PROCESS), world.now)
        assert react(state.scopes[""], state, world.config), "a resumed run has something to do, or somebody to ask"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_an_agent_is_told_is_well_formed_whoever_speaks(data: st.DataObject) -> None:
    world = World(data)
    world.run()
    state = RunState(world.run_id)
    for entry in world.entries:
        apply(state, entry.record, entry.at)
        if isinstance(entry.record, LLMStarted):
            roles = [message.role for message in state.scopes[""].messages]
            assert all(before != after for before, after in pairwise(roles)), roles
            assert sum(state.scopes[""].tokens) == state.scopes[""].total_tokens
            assert not state.scopes[""].guidance, "whatever was said is told before the next call"
            assert len(state.scopes[""].messages) == len(state.scopes[""].tokens)


# -- the audit chain ---------------------------------------------------------------------------------------------------


def linked(records: list[Record]) -> list[int]:
    """The places of what the chain vouches for, and of its links."""
    return [place for place, record in enumerate(records) if isinstance(record, Audited) or type(record) in AUDITED]


CHANGES = ("change", "remove", "insert", "repeat", "swap", "remove pair", "foreign link")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_change_to_what_is_linked_is_found(data: st.DataObject) -> None:
    world = World(data, forgers=False)
    world.run()
    records = [entry.record for entry in world.entries]
    links = [place for place in linked(records) if isinstance(records[place], Audited)]
    if not links:
        return
    assert broken_links(records, SEAL) == []
    assert broken_links(records, OTHER_SEAL) != []
    how = data.draw(st.sampled_from(CHANGES))
    event(how)
    place = data.draw(st.sampled_from(links))
    before, link = records[place - 1], records[place]
    assert isinstance(link, Audited)
    changed = [*records]
    if how == "change":
        if data.draw(st.booleans()):
            changed[place - 1] = _other(before)
        else:
            field = data.draw(st.sampled_from(["what", "mac"]))
            changed[place] = msgspec.structs.replace(link, **{field: "0" * 64})
    elif how == "remove":
        if len(links) == 1:
            return  # without any link it is a journal in which nothing is gated
        del changed[place - data.draw(st.integers(0, 1))]
    elif how == "insert":
        first = links[0] + 1  # before the first link there is nothing to hold on to
        changed.insert(data.draw(st.integers(first, len(records))), _other(before))
    elif how == "repeat":
        changed[place + 1 : place + 1] = [before, link]
    elif how == "swap":
        other = data.draw(st.sampled_from(links))
        if other == place or records[other - 1] == before:
            return
        changed[place - 1], changed[other - 1] = records[other - 1], before
    elif how == "remove pair":
        if place == links[-1]:
            return  # what was cut off at the end cannot be seen
        del changed[place - 1 : place + 1]
    else:
        changed[place] = Audited(link.what, OTHER_SEAL.mac(link.what.encode()))
    assert broken_links(changed, SEAL) != []


def _other(record: Record) -> Record:
    if isinstance(record, ApprovalVoided):
        return msgspec.structs.replace(record, reason=f"{record.reason}!")
    assert isinstance(record, (ApprovalResolved, ToolFinished))
    return msgspec.structs.replace(record, text=f"{record.text}!")


@pytest.mark.parametrize("text", ["é" * 64, "", "\x00"])
def test_a_link_may_hold_any_text(text: str) -> None:
    finished = ToolFinished(1, 0, "send", "ok", "done", 0.0)
    assert broken_links([finished, Audited(audited(finished), text)], SEAL)
