"""The journal: every record a run can hold, and how they are written to disk.

Rules of evolution: a field never changes its type, a tag is never used for something else, any new field or tag
raises ``VERSION``, and a journal of a higher version is refused by name. New fields have defaults, so that every
release reads every older journal.

Records and what they hold are trees, so the garbage collector need not look at them (``gc=False``).

Calls are addressed by name: scope, step and position. An outcome's ``clock_s`` is the number of seconds during which
the run had been driven when it came, on a clock that does not jump.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias, cast

import msgspec

from harness.budget import Limits, Reservation, Spent, Usage
from harness.errors import CheckpointCorrupt, RecordTooNew
from harness.messages import Image, Message, Part
from harness.plan import Task

VERSION = 4
"""The version of the records this release writes."""

Effect: TypeAlias = Literal["read", "idempotent", "once"]
"""What running a tool twice means: nothing; nothing with the same idempotency key; a second effect."""

Site: TypeAlias = Literal["agent", "summariser", "classifier", "router", "planner", "synthesiser"]
"""Where in a run a model is called; each may have a model of its own."""

EFFECT_STRICTNESS: dict[Effect, int] = {"read": 0, "idempotent": 1, "once": 2}

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter", "error"]

LLMPurpose: TypeAlias = Literal["step", "compaction", "classify", "route", "plan", "synthesis"]
"""What a model is asked for: an agent's next step, a summary of its past, or a word on the whole run."""

SITE_OF: dict[LLMPurpose, Site] = {
    "step": "agent",
    "compaction": "summariser",
    "classify": "classifier",
    "route": "router",
    "plan": "planner",
    "synthesis": "synthesiser",
}

StrategyName: TypeAlias = Literal["react", "dispatch", "route", "pick", "orchestrate"]
"""How a scope decides what to do next: one agent's loop; simple or complex; which agent, to run it or only to name it;
a plan over many agents."""

ToolStatus: TypeAlias = Literal[
    "ok",  # the tool returned
    "error",  # the tool raised
    "invalid",  # unknown tool or arguments that do not fit; it never ran
    "timeout",  # it did not end in time; a read or idempotent tool may simply be called again
    "unknown",  # it was started and its outcome cannot be known; it is not run again
    "rejected",  # a person or a policy said no; it never ran
    "reconciled",  # its reconcile() found the result of a call whose outcome was lost
    "unrepresentable",  # it succeeded, its result cannot be written down
]

FailureReason: TypeAlias = Literal[
    "llm", "budget", "max_steps", "no_progress", "malformed", "length", "refused", "plan", "task"
]
"""``plan``: the planner gave no plan that can be carried out. ``task``: one the run cannot do without failed."""

DecisionName: TypeAlias = Literal["approve", "session", "edit", "reject", "steer", "expired"]
"""What became of a question: yes once; yes for the rest of the run; yes with other arguments; no; no, but do this
instead; nobody answered in time."""

ApprovalKind: TypeAlias = Literal["tool", "in_doubt", "plan", "budget"]
"""What is asked: may this call run; what becomes of one whose outcome is lost; may this plan be carried out; is a limit
of the run raised."""

BUDGET = -2
"""Stands for the position of a call where a question is about a limit of the run."""

Complexity: TypeAlias = Literal["simple", "complex"]


class ProcessId(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A process that cannot be mistaken for a later one with the same number.

    Attributes:
        host: the machine's name, for people.
        boot_id: changes when the machine starts anew.
        pid: the process number.
        start_time: when the process started, in the kernel's own unit.
        namespace: where the number is valid: containers of one machine number their processes apart.
    """

    host: str
    boot_id: str
    pid: int
    start_time: str
    namespace: str = ""


class Origin(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """How a run came to be, so that a person can be told how to go on with it.

    Attributes:
        kind: ``cli`` for the harness command, ``script`` for a user's own program.
        command: the words that start it again, without ``--resume``.
        cwd: the folder it was started in.
        settings: what the harness command needs to build the same runtime again.
    """

    kind: Literal["cli", "script"]
    command: tuple[str, ...] = ()
    cwd: str = ""
    settings: dict[str, str] = {}


class Fingerprints(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Short digests of what a run was configured with.

    Attributes:
        agent: the agent's settings without its prompt.
        prompt: the agent's system prompt.
        llm: the model's provider and name, readable.
        tools: a digest of each tool's definition, by name.
    """

    agent: str
    prompt: str
    llm: str
    tools: dict[str, str] = {}


class ForkPoint(msgspec.Struct, frozen=True, gc=False):
    """Where a forked run was copied from.

    Attributes:
        run_id: the run it was copied from.
        step: the first step that was not copied.
        copied: how many records after RunStarted are copies.
    """

    run_id: str
    step: int
    copied: int


class RunStarted(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """The first record of every run.

    Attributes:
        agent_id: the agent of a run with one; empty where the run itself finds out who works.
        fingerprints: of that agent, or of the model that plans.
        agents: of every other agent that may be at work, by id.
        continues: the run whose conversation this one goes on with.
    """

    version: int
    goal: str
    agent_id: str
    fingerprints: Fingerprints
    tokens: int = 0
    strategy: StrategyName = "react"
    origin: Origin | None = None
    forked_from: ForkPoint | None = None
    agents: dict[str, Fingerprints] = {}
    continues: str = ""


class Continued(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """The conversation of an earlier run, which this one goes on with: it comes before the goal.

    Attributes:
        messages: what the model was shown and answered.
        tokens: estimated tokens of each.
        summary: what comes before them, where they are not all of it.
        summary_tokens: estimated tokens of that.
        tainted: whether something untrusted had reached it; None where that is not known.
    """

    messages: tuple[Message, ...]
    tokens: tuple[int, ...]
    summary: str = ""
    summary_tokens: int = 0
    tainted: bool | None = None


class DriverStarted(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A driver took the run. Calls started in an older epoch without an outcome are in doubt from here on."""

    version: int
    epoch: int
    process: ProcessId


class ConfigDiffers(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A resume found a configuration other than the last one, and goes on with the new one.

    Attributes:
        task_limits: limits of tasks of the plan in force that are others now, by id; None for none of its own.
    """

    changes: tuple[str, ...]
    fingerprints: Fingerprints
    agents: dict[str, Fingerprints] = {}
    task_limits: dict[str, Limits | None] = {}


class Dispatched(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """The goal was found to need one agent, or a plan over several."""

    complexity: Complexity
    path: Literal["routed", "orchestrated"]
    rationale: str = ""
    scope: str = ""


class Routed(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """An agent was chosen for the goal; the scope is that agent's from here on.

    Attributes:
        tokens: estimated tokens of the goal, as that agent counts them.
        warning: why it is not the one that was named.
    """

    agent_id: str
    tokens: int
    rationale: str = ""
    warning: str = ""
    scope: str = ""


class Planned(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A plan is in force."""

    tasks: tuple[Task, ...]
    rationale: str = ""
    scope: str = ""


class Replanned(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """What remained of the plan was replaced. What was done or at work is kept.

    Attributes:
        tasks: what takes the place of what remained.
        trigger_task: the task whose outcome led to it.
        reason: what was wrong with that.
        count: which replan it is, from 1.
        kept: ids of the tasks that stay.
        removed: ids of the tasks that are gone.
    """

    tasks: tuple[Task, ...]
    trigger_task: str
    reason: str
    count: int
    rationale: str = ""
    kept: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    scope: str = ""


class ScopeOpened(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """An agent begins a piece of work within the run: an attempt at a task, or what another agent gave to it.

    Attributes:
        child: the path of the new scope.
        agent_id: the agent at work in it.
        goal: what it is asked.
        tokens: estimated tokens of that.
        scope: where it belongs: the plan's scope, or the delegating agent's.
        task_id: the task, for an attempt at one.
        attempt: which attempt it is, from 1.
        step, index: the tool call by which it was delegated, otherwise.
    """

    child: str
    agent_id: str
    goal: str
    tokens: int
    scope: str = ""
    task_id: str = ""
    attempt: int = 1
    step: int = 0
    index: int = 0


class ScopeClosed(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A piece of work within the run came to its end.

    Attributes:
        child: the scope that is closed.
        success: whether there is an answer.
        doubtful: whether a task's answer is below the confidence threshold.
        answer: the answer, or the last text the model gave.
        reason, error: why there is none.
        scope: the scope that opened it.
    """

    child: str
    success: bool
    steps: int
    answer: str = ""
    confidence: float = 0.0
    reason: FailureReason | None = None
    error: str = ""
    scope: str = ""
    doubtful: bool = False


class TaskSkipped(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A task is not done, because something it depends on was not."""

    task_id: str
    reason: str
    scope: str = ""


class Synthesised(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """The tasks' results were brought together.

    Attributes:
        joined: no synthesis could be had; the answer is the results, one after the other.
    """

    answer: str
    confidence: float
    conflicts: tuple[str, ...] = ()
    unknowns: tuple[str, ...] = ()
    joined: bool = False
    scope: str = ""


class LLMStarted(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A model call is about to be sent.

    The request is a pure projection of the journal before this record and of the configuration, so this record's
    place identifies exactly what was asked.

    Attributes:
        tokens: estimated tokens of the request.
        upto: for a compaction, how many of the messages shown are summarised.
        reserved: the worst case of the call, held until it has its outcome.
        max_output: tokens the reply may have at the most, where that was lowered to make the call fit; 0 otherwise.
        priced: whether the reservation's cost is known.
        model: which model is asked, where the agent's model is made of several; empty otherwise.
        response_id: the response that is taken up again: nothing is bought, and the attempt is the one that did.
    """

    step: int
    scope: str = ""
    attempt: int = 1
    purpose: LLMPurpose = "step"
    tokens: int = 0
    upto: int = 0
    reserved: Reservation = Reservation()
    max_output: int = 0
    priced: bool = False
    model: str = ""
    response_id: str = ""


class LLMAccepted(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """The provider has taken a model call and answers it whether or not anybody listens.

    Written before the answer is read on, so that whoever drives the run next takes the response up, and buys no other.

    Attributes:
        response_id: names the response at the provider.
        provider: whose response it is; nobody else is asked for it.
    """

    step: int
    response_id: str
    provider: str
    scope: str = ""
    attempt: int = 1
    purpose: LLMPurpose = "step"


class LLMDetached(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """Nobody listens to an accepted call any more. It has no outcome yet, and what it may cost stays held.

    Attributes:
        error: what went wrong.
        transient: whether the response can be taken up again soon; otherwise when the run is resumed.
        retry_in_s: seconds to wait before that.
    """

    step: int
    clock_s: float
    error: str
    transient: bool
    scope: str = ""
    attempt: int = 1
    purpose: LLMPurpose = "step"
    retry_in_s: float = 0.0


class LLMFinished(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A model call was answered. What it cost is in the same record.

    Attributes:
        parts: the reply: text, reasoning and tool calls in the model's order.
        malformed: what is wrong with the reply, if it could not be understood.
        confidence: how sure the model says it is of a final answer, 0 to 1.
        tokens: estimated tokens of the reply as a message of the conversation.
        estimated: the provider has not said what it used; ``usage`` is the reservation.
    """

    step: int
    clock_s: float
    parts: tuple[Part, ...]
    finish: FinishReason
    usage: Usage
    scope: str = ""
    attempt: int = 1
    purpose: LLMPurpose = "step"
    model: str = ""
    response_id: str = ""
    malformed: str = ""
    confidence: float | None = None
    tokens: int = 0
    estimated: bool = False


class LLMFailed(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A model call ended without a reply that can be used.

    Attributes:
        transient: whether the same call may succeed later.
        retry_in_s: seconds to wait before that, chosen with chance and therefore written down.
        estimated: the call was cut while it was answered; ``usage`` is the reservation.
        model: which model was asked, where the agent's model is made of several; empty otherwise.
        heard: a part of the reply had come.
    """

    step: int
    clock_s: float
    error: str
    transient: bool
    scope: str = ""
    attempt: int = 1
    purpose: LLMPurpose = "step"
    retry_in_s: float = 0.0
    refused: bool = False
    usage: Usage = Usage()
    estimated: bool = False
    model: str = ""
    heard: bool = False


class ToolStarted(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A tool is about to run (or, with ``reconcile``, to be asked what became of an earlier start).

    Attributes:
        approval_id: the question whose answer allows it.
        rules: the rules that allow it.
        untrusted: what it returns comes from outside: whoever reads it may be led astray.
    """

    step: int
    index: int
    tool: str
    effect: Effect
    scope: str = ""
    attempt: int = 1
    reconcile: bool = False
    approval_id: str = ""
    rules: tuple[str, ...] = ()
    untrusted: bool = False


class ToolNotDone(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A tool's ``reconcile`` says that the lost call had no effect: it may be run."""

    step: int
    index: int
    clock_s: float
    scope: str = ""


class Cut(msgspec.Struct, frozen=True, gc=False):
    """What was left out of a text for the model.

    Attributes:
        chars: length of the whole text.
        blob: the digest under which the store keeps it.
    """

    chars: int
    blob: str


class ToolFinished(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A tool call has its result.

    Attributes:
        text: what the model sees.
        cut: set when ``text`` is shorter than the result; the whole is a blob.
        images: images the tool returned.
        tokens: estimated tokens of the result as a message of the conversation.
    """

    step: int
    index: int
    tool: str
    status: ToolStatus
    text: str
    clock_s: float
    scope: str = ""
    cut: Cut | None = None
    images: tuple[Image, ...] = ()
    tokens: int = 0


class Noted(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """The harness tells the model something: its reply was malformed, cut, or brings nothing new.

    With ``no_replan`` it is told to nobody: the planner could not be had, and the plan stays as it is.
    """

    step: int
    reason: Literal["malformed", "length", "no_progress", "no_replan"]
    text: str
    scope: str = ""
    tokens: int = 0


class ApprovalRequested(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A person is asked. The question stands until it is answered, over any number of processes.

    Attributes:
        approval_id: names the question.
        digest: of everything that decides what would happen.
        index: the call's position in its step; -1 for a plan, BUDGET for a limit of the run.
        tool, arguments: the call, with its whole arguments as JSON text; of a plan the plan itself; of a limit its
            name, what it is, what is spent and what it is to be raised to.
        reason: why it is asked.
        session: what "allow for this session" would cover; empty where that is not offered.
        expires_at: when it is too late to answer, seconds since the epoch; 0 for never.
    """

    approval_id: str
    digest: str
    tool: str
    arguments: str
    step: int
    index: int = 0
    scope: str = ""
    kind: ApprovalKind = "tool"
    reason: str = ""
    session: tuple[str, ...] = ()
    expires_at: float = 0.0


class ApprovalResolved(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A question has its answer.

    Attributes:
        by: who answered.
        text: the reason of a rejection, or the guidance.
        arguments: the edited arguments, JSON text.
        mac: the signature over all of it and the question's digest.
        tokens: estimated tokens of the guidance as a message.
        command_id: the mailbox's command it came by.
    """

    approval_id: str
    decision: DecisionName
    by: str
    mac: str
    step: int
    index: int = 0
    scope: str = ""
    text: str = ""
    arguments: str = ""
    tokens: int = 0
    command_id: str = ""


class ApprovalVoided(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """An answer does not hold for what would run now; the question is asked anew."""

    approval_id: str
    reason: str
    step: int
    index: int = 0
    scope: str = ""


class Guided(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A person steers: agents are told this before their next model call.

    Attributes:
        scopes: whom it is for.
        tokens: estimated tokens of it as a message.
    """

    text: str
    by: str
    scopes: tuple[str, ...]
    tokens: int = 0
    command_id: str = ""


class CommandRefused(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A command from the mailbox was not carried out."""

    command_id: str
    reason: str


class Audited(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """One link of the audit chain: a decision, or the effect of a call that a gate looked at.

    Attributes:
        what: the record it is about, as JSON, digested.
        mac: the signature over that and the link before.
    """

    what: str
    mac: str


class Dropped(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """The summary and the messages before ``upto`` are shown to the model no more: summarising made too little room."""

    step: int
    upto: int
    scope: str = ""


class TaskResult(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """How one task of a plan ended.

    Attributes:
        status: ``doubtful``: answered below the confidence threshold, and used all the same.
        attempts: how often it was begun.
        error: why it has no answer.

    >>> TaskResult("t1", "reader", "done", answer="42", confidence=0.9, attempts=1).status
    'done'
    """

    task_id: str
    agent_id: str
    status: Literal["done", "doubtful", "failed", "skipped"]
    answer: str = ""
    confidence: float = 0.0
    attempts: int = 0
    error: str = ""


class Share(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What one call site used for one agent and task.

    Attributes:
        site: ``agent``, ``summariser``, ``classifier``, ``router``, ``planner`` or ``synthesiser``.
        active_s: seconds at work: an agent's with its model and its tools, not waiting for work it has delegated; of
            another site its model calls. Work at the same time counts for each that does it.
    """

    site: Site
    usage: Usage
    agent_id: str = ""
    task_id: str = ""
    active_s: float = 0.0


class RunFinished(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """The run has its answer. Final.

    Attributes:
        shares: what was used, by call site, agent and task.
        goal: what was asked; with the fields below it, only where a plan was carried out.
        tasks: how each of its tasks ended.
        conflicts: what the results contradict each other in.
        unknowns: what they leave open.
        replan_count: how often the plan was replaced.
    """

    answer: str
    confidence: float
    steps: int
    spent: Spent
    shares: tuple[Share, ...] = ()
    goal: str = ""
    tasks: tuple[TaskResult, ...] = ()
    conflicts: tuple[str, ...] = ()
    unknowns: tuple[str, ...] = ()
    replan_count: int = 0


class RunFailed(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """The run stopped without an answer. Resuming it goes on after Reopened.

    Attributes:
        answer: the best partial answer: the last text the model gave.
    """

    reason: FailureReason
    error: str
    steps: int
    spent: Spent
    answer: str = ""
    shares: tuple[Share, ...] = ()


class RunCancelled(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """Somebody ended the run. Final."""

    reason: str
    steps: int
    spent: Spent
    command_id: str = ""


class RunParked(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """Nothing in the run can go on without an answer; nobody drives it until it is resumed.

    Attributes:
        waiting: ids of the questions.
    """

    waiting: tuple[str, ...]
    steps: int
    spent: Spent


class Reopened(msgspec.Struct, frozen=True, gc=False, tag=True):
    """A failed run goes on: limits on steps and attempts count from here."""

    reason: str


Record: TypeAlias = (
    RunStarted
    | Continued
    | DriverStarted
    | ConfigDiffers
    | Dispatched
    | Routed
    | Planned
    | Replanned
    | ScopeOpened
    | ScopeClosed
    | TaskSkipped
    | Synthesised
    | LLMStarted
    | LLMAccepted
    | LLMDetached
    | LLMFinished
    | LLMFailed
    | ToolStarted
    | ToolNotDone
    | ToolFinished
    | Noted
    | ApprovalRequested
    | ApprovalResolved
    | ApprovalVoided
    | Guided
    | CommandRefused
    | Audited
    | Dropped
    | RunFinished
    | RunFailed
    | RunCancelled
    | RunParked
    | Reopened
)


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One record in its place.

    Attributes:
        run_id: the run it belongs to.
        seq: its place, from 1, without gaps.
        at: when it was appended, seconds since the epoch.
        record: the record itself.

    >>> Entry("r1", 1, 0.0, Reopened("again")).seq
    1
    """

    run_id: str
    seq: int
    at: float
    record: Record


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(list[Record])
_batch_decoder = msgspec.json.Decoder(list[list[Record]])
_probe = msgspec.json.Decoder(list[dict[str, object]])
_VERSIONED = frozenset({RunStarted, DriverStarted})
_KNOWN = frozenset(kind.__name__ for kind in Record.__args__)  # type: ignore[attr-defined]  # a union alias has __args__


def encode(records: Sequence[Record]) -> bytes:
    """Write records as one JSON array."""
    return _encoder.encode(records)


def decode(data: bytes, *, where: str = "journal") -> list[Record]:
    """Read what ``encode`` wrote.

    Args:
        data: a JSON array of records.
        where: names the source in an error.

    Raises:
        RecordTooNew: a record's type or version is unknown to this release.
        CheckpointCorrupt: the bytes are not records.
    """
    try:
        records = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _explain(data, where, error) from None
    _check_versions(records, where)
    return records


def decode_batches(batches: Sequence[bytes], *, where: str = "journal") -> Iterator[list[Record]]:
    """Do what ``decode`` does with each of many, at less cost."""
    try:
        decoded = _batch_decoder.decode(b"[%b]" % b",".join(batches))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        decoded = []
    if len(decoded) == len(batches):
        for records in decoded:
            _check_versions(records, where)
            yield records
    else:  # one of them is no array of records: those before it can be read, and it is named
        for data in batches:
            yield decode(data, where=where)


def _check_versions(records: Sequence[Record], where: str) -> None:
    for record in records:
        # Looked up, not asked with isinstance: that would cost more than decoding the record.
        if type(record) in _VERSIONED and (version := cast("RunStarted | DriverStarted", record).version) > VERSION:
            raise RecordTooNew(_too_new(where, f"version {version}"))


def _explain(data: bytes, where: str, error: Exception) -> RecordTooNew | CheckpointCorrupt:
    try:
        raw = _probe.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return CheckpointCorrupt(f"{where} holds bytes that are not a journal: {error}")
    for record in raw:
        version, tag = record.get("version", 0), record.get("type")
        if isinstance(version, int) and version > VERSION:
            return RecordTooNew(_too_new(where, f"version {version}"))
        if isinstance(tag, str) and tag not in _KNOWN:
            return RecordTooNew(_too_new(where, f"a record {tag!r}"))
    return CheckpointCorrupt(f"{where} holds a record this release cannot read: {error}")


def _too_new(where: str, what: str) -> str:
    return (
        f"{where} was written by a newer react-agent-harness ({what}; this one reads up to version {VERSION}): "
        "update react-agent-harness to go on"
    )
