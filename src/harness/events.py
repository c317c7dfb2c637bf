"""Events: what a stream yields. Each is a projection of one record; TOKEN, DISCARDED and PROGRESS are ephemeral.

Match on the class (``case TaskDone(answer=a)``) or on ``event.type`` with ``event.payload``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, TypeAlias, cast

import msgspec

from harness import records as r
from harness.keys import place_of
from harness.messages import JSON, Reasoning, Text, ToolCall
from harness.plan import Plan


class EventType(enum.StrEnum):
    """The vocabulary of a stream.

    >>> EventType.TOKEN == "TOKEN"
    True
    """

    STARTED = "STARTED"
    RESUMED = "RESUMED"
    DISPATCH = "DISPATCH"
    ROUTE = "ROUTE"
    PLAN = "PLAN"
    THOUGHT = "THOUGHT"
    TOKEN = "TOKEN"
    ACTION = "ACTION"
    OBSERVATION = "OBSERVATION"
    APPROVAL_REQUESTED = "APPROVAL_REQUESTED"
    APPROVAL_RESOLVED = "APPROVAL_RESOLVED"
    HUMAN_GUIDANCE = "HUMAN_GUIDANCE"
    PROGRESS = "PROGRESS"
    COMPACTED = "COMPACTED"
    DISCARDED = "DISCARDED"
    WARNING = "WARNING"
    TASK_STARTED = "TASK_STARTED"
    TASK_DONE = "TASK_DONE"
    REPLAN = "REPLAN"
    SYNTHESIS = "SYNTHESIS"
    DONE = "DONE"
    PARKED = "PARKED"
    CANCELLED = "CANCELLED"
    ERROR = "ERROR"


_COMMON = frozenset({"run_id", "agent_id", "seq", "timestamp", "scope"})


class BusEvent(msgspec.Struct, frozen=True, gc=False):
    """What every event has.

    Attributes:
        run_id: the run.
        agent_id: the agent it is about.
        seq: the place of the record it shows; for an ephemeral event the last record before it.
        timestamp: seconds since the epoch.
        scope: the path of the piece of work it is about: a task, attempt and agent, or what was delegated; empty for
            the run itself.

    >>> Observation("r1", "reader", 5, 0.0, step=1, tool="add", observation="3").payload["tool"]
    'add'
    """

    type: ClassVar[EventType]
    run_id: str
    agent_id: str
    seq: int
    timestamp: float
    scope: str = ""

    @property
    def parent(self) -> str | None:
        """The scope of the agent that delegated this piece of work (the root's is empty); None where none did."""
        return place_of(self.scope).parent

    @property
    def payload(self) -> Mapping[str, JSON]:
        """The event's own fields as plain nested data."""
        return MappingProxyType(_plain(_own(self)))

    @property
    def token(self) -> str:
        """The text of a TOKEN; empty on every other event."""
        return ""

    @property
    def error(self) -> str:
        """What went wrong, on an ERROR or a failed TASK_DONE; empty on every other event."""
        return ""


def _own(event: BusEvent) -> dict[str, object]:
    return {name: getattr(event, name) for name in event.__struct_fields__ if name not in _COMMON}


def _plain(value: Mapping[str, object]) -> dict[str, JSON]:
    """Return the same as JSON would give it back: lists, not tuples, and no objects."""
    return msgspec.json.decode(msgspec.json.encode(value))


def _all_fields(value: msgspec.Struct) -> dict[str, object]:
    """Return every field, those at their defaults included."""
    return {name: getattr(value, name) for name in value.__struct_fields__}


def _plan(plan: Plan) -> dict[str, object]:
    return {"tasks": [_all_fields(task) for task in plan.tasks], "rationale": plan.rationale}


class Started(BusEvent, frozen=True, kw_only=True):
    """The run exists; it can be resumed from here on."""

    type = EventType.STARTED
    goal: str


class Resumed(BusEvent, frozen=True, kw_only=True):
    """A driver took the run up again."""

    type = EventType.RESUMED
    epoch: int


class Dispatched(BusEvent, frozen=True, kw_only=True):
    """The goal was found to need one agent (``routed``), or a plan over several (``orchestrated``)."""

    type = EventType.DISPATCH
    complexity: r.Complexity
    path: str
    rationale: str


class Routed(BusEvent, frozen=True, kw_only=True):
    """An agent was chosen; it is the event's ``agent_id`` as well. ``warning`` says why it is not the one named."""

    type = EventType.ROUTE
    rationale: str
    warning: str = ""

    @property
    def payload(self) -> Mapping[str, JSON]:
        """agent_id, rationale, and a warning where there is one."""
        return MappingProxyType(
            {"agent_id": self.agent_id, "rationale": self.rationale}
            | ({"warning": self.warning} if self.warning else {})
        )


class Planned(BusEvent, frozen=True, kw_only=True):
    """A plan is in force; ``resumed`` says that it was before. ``plan`` holds its tasks and the rationale."""

    type = EventType.PLAN
    plan: Plan
    resumed: bool = False

    @property
    def payload(self) -> Mapping[str, JSON]:
        """plan: tasks (id, agent_id, instruction, depends_on, on_failure, max_retries) and rationale; resumed."""
        return MappingProxyType(_plain({"plan": _plan(self.plan), "resumed": self.resumed}))


class Replanned(BusEvent, frozen=True, kw_only=True):
    """What remained of the plan was replaced: ``added`` and ``removed`` say how, ``plan`` is what is in force now.

    Attributes:
        replan_count: how often so far.
        trigger_task: the task whose outcome led to it.
        reason: what was wrong with that.
        new_task_count: how many tasks were added.
        kept: ids of the tasks that stay, done or at work.
    """

    type = EventType.REPLAN
    replan_count: int
    trigger_task: str
    reason: str
    new_task_count: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    kept: tuple[str, ...]
    plan: Plan

    @property
    def payload(self) -> Mapping[str, JSON]:
        """The event's own fields, the plan's with every field of its tasks."""
        return MappingProxyType(_plain(_own(self) | {"plan": _plan(self.plan)}))


class TaskStarted(BusEvent, frozen=True, kw_only=True):
    """An agent begins an attempt at a task, or what another agent has delegated to it (then ``parent`` is set)."""

    type = EventType.TASK_STARTED
    task_id: str
    attempt: int
    instruction: str


class Synthesised(BusEvent, frozen=True, kw_only=True):
    """The tasks' results were brought together; ``joined`` where that failed and they stand one after the other."""

    type = EventType.SYNTHESIS
    answer: str
    confidence: float
    conflicts: tuple[str, ...]
    unknowns: tuple[str, ...]
    joined: bool = False


class Thought(BusEvent, frozen=True, kw_only=True):
    """What the model said before it acted; ``action`` names the tools, or ``finish``."""

    type = EventType.THOUGHT
    step: int
    thought: str
    action: str


class Token(BusEvent, frozen=True, kw_only=True):
    """A piece of a reply as it arrives (several may be joined). Ephemeral."""

    type = EventType.TOKEN
    text: str
    reasoning: bool = False

    @property
    def token(self) -> str:
        """The text."""
        return self.text


class Discarded(BusEvent, frozen=True, kw_only=True):
    """The tokens shown since the last record belong to a call that was cut: take them back. Ephemeral."""

    type = EventType.DISCARDED
    reason: str


class Action(BusEvent, frozen=True, kw_only=True):
    """The model asked for a tool call. ``args`` are its arguments, or the raw text where they are not an object."""

    type = EventType.ACTION
    step: int
    tool: str
    args: dict[str, object] | str


class Observation(BusEvent, frozen=True, kw_only=True):
    """A tool call has its result, as the model sees it."""

    type = EventType.OBSERVATION
    step: int
    tool: str
    observation: str
    status: r.ToolStatus = "ok"


class Progress(BusEvent, frozen=True, kw_only=True):
    """A running tool says how far it is. Ephemeral."""

    type = EventType.PROGRESS
    tool: str
    text: str


class Compacted(BusEvent, frozen=True, kw_only=True):
    """The oldest messages were summarised (``summary``) or, with an empty summary, dropped."""

    type = EventType.COMPACTED
    summary: str


class Warned(BusEvent, frozen=True, kw_only=True):
    """Something a person should know; the run goes on. ``task_id`` names a task that is skipped."""

    type = EventType.WARNING
    text: str
    task_id: str = ""


class TaskDone(BusEvent, frozen=True, kw_only=True):
    """An agent has its answer, or in an orchestration has none (``success``, ``message``).

    The last event of a run with one agent, which is the one that carries cost, seconds and budget; in an orchestration
    one for each attempt at a task and each piece of delegated work.
    """

    type = EventType.TASK_DONE
    answer: str
    confidence: float
    steps: int
    cost_usd: float = 0.0
    elapsed_seconds: float = 0.0
    budget: dict[str, object] = {}
    task_id: str = ""
    success: bool = True
    doubtful: bool = False
    message: str = ""

    @property
    def error(self) -> str:
        """Why there is no answer."""
        return self.message

    @property
    def payload(self) -> Mapping[str, JSON]:
        """What holds for it: what was spent at the end of a run, the task and its outcome within one."""
        own: dict[str, object] = {"answer": self.answer, "confidence": self.confidence, "steps": self.steps}
        if self.scope:
            own |= {"task_id": self.task_id, "success": self.success, "doubtful": self.doubtful, "error": self.message}
        else:
            own |= {"cost_usd": self.cost_usd, "elapsed_seconds": self.elapsed_seconds, "budget": self.budget}
        return MappingProxyType(_plain(own))


class Done(BusEvent, frozen=True, kw_only=True):
    """An orchestrated run has its answer: its last event."""

    type = EventType.DONE
    goal: str
    answer: str
    confidence: float
    conflicts: tuple[str, ...]
    unknowns: tuple[str, ...]
    replan_count: int
    cost_usd: float
    elapsed_seconds: float
    budget: dict[str, object]
    task_results: tuple[r.TaskResult, ...]

    @property
    def payload(self) -> Mapping[str, JSON]:
        """The event's own fields and ``run_id``; ``task_results`` by task id."""
        results = {result.task_id: _all_fields(result) for result in self.task_results}
        return MappingProxyType(_plain({"run_id": self.run_id} | _own(self) | {"task_results": results}))


class ApprovalRequested(BusEvent, frozen=True, kw_only=True):
    """A person is asked. ``args`` are the whole arguments; ``session`` is what "allow for this session" would cover."""

    type = EventType.APPROVAL_REQUESTED
    approval_id: str
    kind: r.ApprovalKind
    step: int
    tool: str
    args: dict[str, object] | str
    reason: str
    session: tuple[str, ...]
    expires_at: float


class ApprovalResolved(BusEvent, frozen=True, kw_only=True):
    """A question has its answer: ``approve``, ``session``, ``edit``, ``reject``, ``steer`` or ``expired``."""

    type = EventType.APPROVAL_RESOLVED
    approval_id: str
    decision: r.DecisionName
    by: str
    text: str
    args: dict[str, object] | str


class Guidance(BusEvent, frozen=True, kw_only=True):
    """A person steers: the agents at work are told this before their next model call."""

    type = EventType.HUMAN_GUIDANCE
    text: str
    by: str


class Parked(BusEvent, frozen=True, kw_only=True):
    """Nothing can go on without an answer; ``waiting`` names the questions. The last event until it is resumed."""

    type = EventType.PARKED
    waiting: tuple[str, ...]


class Cancelled(BusEvent, frozen=True, kw_only=True):
    """Somebody ended the run. Final."""

    type = EventType.CANCELLED
    reason: str


class Errored(BusEvent, frozen=True, kw_only=True):
    """The run failed; resuming it goes on. ``answer`` is the best partial answer."""

    type = EventType.ERROR
    reason: r.FailureReason
    message: str
    answer: str
    steps: int
    cost_usd: float
    elapsed_seconds: float
    budget: dict[str, object]

    @property
    def error(self) -> str:
        """What went wrong."""
        return self.message


Event: TypeAlias = (
    Started
    | Resumed
    | Dispatched
    | Routed
    | Planned
    | Replanned
    | TaskStarted
    | Synthesised
    | Thought
    | Token
    | Discarded
    | Action
    | Observation
    | Progress
    | Compacted
    | Warned
    | TaskDone
    | Done
    | ApprovalRequested
    | ApprovalResolved
    | Guidance
    | Parked
    | Cancelled
    | Errored
)


def _sum(shares: Sequence[r.Share], name: str) -> dict[str, object]:
    total: dict[str, r.Usage] = {}
    seconds: dict[str, float] = {}
    for share in shares:
        if key := getattr(share, name):
            total[key] = total.get(key, r.Usage()) + share.usage
            seconds[key] = seconds.get(key, 0.0) + share.active_s
    return {
        key: {
            "cost_usd": usage.cost_usd,
            "tokens": usage.input_tokens + usage.output_tokens,
            "unpriced_calls": usage.unpriced,
            "elapsed_seconds": round(seconds[key], 4),
        }
        for key, usage in total.items()
    }


def budget_payload(spent: r.Spent, shares: Sequence[r.Share] = ()) -> dict[str, object]:
    """Show what was spent as plain data: cost_usd, elapsed_seconds, tokens and their breakdown.

    With shares also ``by_site``, ``by_agent`` and ``by_task``: cost_usd, tokens, unpriced_calls and elapsed_seconds (at
    work; those who work at the same time count each) of each.
    """
    usage = spent.usage
    by: dict[str, object] = {
        f"by_{name.removesuffix('_id')}": _sum(shares, name) for name in ("site", "agent_id", "task_id")
    }
    return by | {
        "cost_usd": usage.cost_usd,
        "elapsed_seconds": spent.active_s,
        "tokens": usage.input_tokens + usage.output_tokens,
        "breakdown": {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cache_read_tokens": usage.cache_read_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
            "llm_calls": spent.llm_calls,
            "tool_calls": spent.tool_calls,
            "unpriced_calls": usage.unpriced,
            "estimated_calls": spent.estimated,
        },
    }


def arguments_for_show(arguments: str) -> dict[str, object] | str:
    """Return a call's arguments as an object, or the text the model wrote where it is not one."""
    try:
        args = msgspec.json.decode(arguments or "{}")
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return arguments
    return args if isinstance(args, dict) else arguments  # pyright: ignore[reportUnknownVariableType] - decoded JSON


class Projection:
    """Turns the entries of one run into events, in order. Many records show as none.

    It remembers what records say later ones are about: the agent that was chosen, the plan in force.

    Args:
        entries: those that come before the first one it shows.

    Attributes:
        agent_id: the agent of the run's root; empty while there is none.
        plan: the plan in force; None where there is none.
        is_fork: whether the run begins with what was copied from another.

    >>> started = r.RunStarted(r.VERSION, "Tidy up.", "a", r.Fingerprints("", "", ""))
    >>> [event.type.value for event in Projection().events(r.Entry("r1", 1, 0.0, started))]
    ['STARTED']
    """

    __slots__ = ("agent_id", "is_fork", "plan")

    def __init__(self, entries: Sequence[r.Entry] = ()) -> None:
        self.agent_id = ""
        self.is_fork = False
        self.plan: Plan | None = None
        for entry in entries:
            if type(entry.record) in _REMEMBERED:
                self.events(entry)

    def events(self, entry: r.Entry) -> Sequence[Event]:
        """Return the events that show one record."""
        show = _SHOW.get(type(entry.record))
        return () if show is None else show(self, entry, entry.record)

    def agent_of(self, scope: str) -> str:
        """Return the agent at work in a scope."""
        return place_of(scope).agent_id if scope else self.agent_id


def _llm_finished(told: Projection, entry: r.Entry, record: r.LLMFinished) -> Sequence[Event]:
    run_id, seq, at, scope = entry.run_id, entry.seq, entry.at, record.scope
    agent_id = told.agent_of(scope) if scope else told.agent_id
    if record.purpose != "step":
        if record.purpose != "compaction":
            return ()  # what came of a word on the run is a record of its own
        summary = "".join(p.text for p in record.parts if isinstance(p, Text))
        return (Compacted(run_id, agent_id, seq, at, scope, summary=summary),)
    calls: list[ToolCall] = []
    reasoning = text = ""
    for part in record.parts:
        # Types are compared, since isinstance asks a Struct's metaclass and costs six times as much where it fails.
        if type(part) is ToolCall:
            calls.append(part)
        elif type(part) is Text:
            text += part.text
        elif type(part) is Reasoning:
            reasoning += part.text
    if record.malformed or record.finish == "length":
        calls = []
    action = calls[0].name if len(calls) == 1 else ", ".join([call.name for call in calls]) or "finish"
    # With calls the text is what the model says about them; without, it is the answer and shows in TASK_DONE.
    said = text if calls else ""
    thought = f"{reasoning}\n{said}" if reasoning and said else reasoning or said
    step = record.step
    events: list[Event] = [Thought(run_id, agent_id, seq, at, scope, step=step, thought=thought, action=action)]
    for call in calls:
        args = arguments_for_show(call.arguments)
        events.append(Action(run_id, agent_id, seq, at, scope, step=step, tool=call.name, args=args))
    return events


def _tool_finished(told: Projection, entry: r.Entry, record: r.ToolFinished) -> Sequence[Event]:
    scope = record.scope
    return (
        Observation(
            entry.run_id, told.agent_of(scope), entry.seq, entry.at, scope,
            step=record.step, tool=record.tool, observation=record.text, status=record.status,
        ),
    )  # fmt: skip


_Common: TypeAlias = tuple[str, str, int, float, str]
"""The fields every event has, in order."""


def _common(told: Projection, entry: r.Entry, scope: str = "") -> _Common:
    return entry.run_id, told.agent_of(scope), entry.seq, entry.at, scope


def _run_started(told: Projection, entry: r.Entry, record: r.RunStarted) -> Sequence[Event]:
    told.agent_id = record.agent_id
    told.is_fork = record.forked_from is not None
    return (Started(*_common(told, entry), goal=record.goal),)


def _driver_started(told: Projection, entry: r.Entry, record: r.DriverStarted) -> Sequence[Event]:
    if record.epoch == 1 and not told.is_fork:
        return ()
    events: list[Event] = [Resumed(*_common(told, entry), epoch=record.epoch)]
    if told.plan is not None:
        events.append(Planned(*_common(told, entry), plan=told.plan, resumed=True))
    return events


def _config_differs(told: Projection, entry: r.Entry, record: r.ConfigDiffers) -> Sequence[Event]:
    text = "changed since the run was last driven: " + "; ".join(record.changes)
    if record.task_limits and told.plan is not None:
        limits = record.task_limits
        tasks = [msgspec.structs.replace(task, limits=limits.get(task.id, task.limits)) for task in told.plan.tasks]
        told.plan = Plan(tasks, told.plan.rationale)
    return (Warned(*_common(told, entry), text=text),)


def _dispatched(told: Projection, entry: r.Entry, record: r.Dispatched) -> Sequence[Event]:
    common = _common(told, entry)
    return (Dispatched(*common, complexity=record.complexity, path=record.path, rationale=record.rationale),)


def _routed(told: Projection, entry: r.Entry, record: r.Routed) -> Sequence[Event]:
    told.agent_id = record.agent_id
    return (Routed(*_common(told, entry), rationale=record.rationale, warning=record.warning),)


def _planned(told: Projection, entry: r.Entry, record: r.Planned) -> Sequence[Event]:
    told.plan = Plan(record.tasks, record.rationale)
    return (Planned(*_common(told, entry), plan=told.plan),)


def _replanned(told: Projection, entry: r.Entry, record: r.Replanned) -> Sequence[Event]:
    before = told.plan.tasks if told.plan is not None else ()
    # What a kept task was given by one that is gone, it has had.
    kept = [
        msgspec.structs.replace(task, depends_on=tuple(need for need in task.depends_on if need in record.kept))
        for task in before
        if task.id in record.kept
    ]
    told.plan = Plan((*kept, *record.tasks), record.rationale)
    replanned = Replanned(
        *_common(told, entry),
        replan_count=record.count,
        trigger_task=record.trigger_task,
        reason=record.reason,
        new_task_count=len(record.tasks),
        added=tuple(task.id for task in record.tasks),
        removed=record.removed,
        kept=record.kept,
        plan=told.plan,
    )
    return (replanned,)


def _scope_opened(told: Projection, entry: r.Entry, record: r.ScopeOpened) -> Sequence[Event]:
    common = _common(told, entry, record.child)
    task_id = place_of(record.child).task_id
    return (TaskStarted(*common, task_id=task_id, attempt=record.attempt, instruction=record.goal),)


def _scope_closed(told: Projection, entry: r.Entry, record: r.ScopeClosed) -> Sequence[Event]:
    done = TaskDone(
        *_common(told, entry, record.child),
        answer=record.answer,
        confidence=record.confidence,
        steps=record.steps,
        task_id=place_of(record.child).task_id,
        success=record.success,
        doubtful=record.doubtful,
        message=record.error,
    )
    return (done,)


def _task_skipped(told: Projection, entry: r.Entry, record: r.TaskSkipped) -> Sequence[Event]:
    return (
        Warned(
            *_common(told, entry), text=f"task {record.task_id!r} is skipped: {record.reason}", task_id=record.task_id
        ),
    )


def _synthesised(told: Projection, entry: r.Entry, record: r.Synthesised) -> Sequence[Event]:
    synthesised = Synthesised(
        *_common(told, entry),
        answer=record.answer,
        confidence=record.confidence,
        conflicts=record.conflicts,
        unknowns=record.unknowns,
        joined=record.joined,
    )
    return (synthesised,)


def _llm_failed(told: Projection, entry: r.Entry, record: r.LLMFailed) -> Sequence[Event]:
    again = "it will be tried again" if record.transient else "it is not tried again"
    of = f" of {record.model}" if record.model else ""
    text = f"model call failed (attempt {record.attempt}{of}): {record.error}; {again}"
    return (Warned(*_common(told, entry, record.scope), text=text),)


def _llm_detached(told: Projection, entry: r.Entry, record: r.LLMDetached) -> Sequence[Event]:
    later = "again" if record.transient else "when the run is resumed"
    text = f"the connection to a model call broke: {record.error}; its response goes on, and is taken up {later}"
    return (Warned(*_common(told, entry, record.scope), text=text),)


def _noted(told: Projection, entry: r.Entry, record: r.Noted) -> Sequence[Event]:
    return (Warned(*_common(told, entry, record.scope), text=record.text),)


def _approval_requested(told: Projection, entry: r.Entry, record: r.ApprovalRequested) -> Sequence[Event]:
    asked = ApprovalRequested(
        *_common(told, entry, record.scope),
        approval_id=record.approval_id,
        kind=record.kind,
        step=record.step,
        tool=record.tool,
        args=arguments_for_show(record.arguments),
        reason=record.reason,
        session=record.session,
        expires_at=record.expires_at,
    )
    return (asked,)


def _approval_resolved(told: Projection, entry: r.Entry, record: r.ApprovalResolved) -> Sequence[Event]:
    common = _common(told, entry, record.scope)
    answered = ApprovalResolved(
        *common,
        approval_id=record.approval_id,
        decision=record.decision,
        by=record.by,
        text=record.text,
        args=arguments_for_show(record.arguments),
    )
    if record.decision != "steer" or record.index == r.BUDGET:
        return (answered,)
    return (answered, Guidance(*common, text=record.text, by=record.by))


def _approval_voided(told: Projection, entry: r.Entry, record: r.ApprovalVoided) -> Sequence[Event]:
    text = f"the answer to {record.approval_id} does not hold: {record.reason}; it is asked again"
    return (Warned(*_common(told, entry, record.scope), text=text),)


def _guided(told: Projection, entry: r.Entry, record: r.Guided) -> Sequence[Event]:
    scope = record.scopes[0] if len(record.scopes) == 1 else ""
    return (Guidance(*_common(told, entry, scope), text=record.text, by=record.by),)


def _command_refused(told: Projection, entry: r.Entry, record: r.CommandRefused) -> Sequence[Event]:
    return (Warned(*_common(told, entry), text=f"a command was refused: {record.reason}"),)


def _run_parked(told: Projection, entry: r.Entry, record: r.RunParked) -> Sequence[Event]:
    return (Parked(*_common(told, entry), waiting=record.waiting),)


def _dropped(told: Projection, entry: r.Entry, record: r.Dropped) -> Sequence[Event]:
    return (Compacted(*_common(told, entry, record.scope), summary=""),)


def _run_finished(told: Projection, entry: r.Entry, record: r.RunFinished) -> Sequence[Event]:
    spent, common = record.spent, _common(told, entry)
    cost_usd, seconds, budget = spent.usage.cost_usd, spent.active_s, budget_payload(spent, record.shares)
    if not record.tasks:
        done = TaskDone(
            *common,
            answer=record.answer,
            confidence=record.confidence,
            steps=record.steps,
            cost_usd=cost_usd,
            elapsed_seconds=seconds,
            budget=budget,
        )
        return (done,)
    all_done = Done(
        *common,
        goal=record.goal,
        answer=record.answer,
        confidence=record.confidence,
        conflicts=record.conflicts,
        unknowns=record.unknowns,
        replan_count=record.replan_count,
        cost_usd=cost_usd,
        elapsed_seconds=seconds,
        budget=budget,
        task_results=record.tasks,
    )
    return (all_done,)


def _run_failed(told: Projection, entry: r.Entry, record: r.RunFailed) -> Sequence[Event]:
    spent = record.spent
    failed = Errored(
        *_common(told, entry),
        reason=record.reason,
        message=record.error,
        answer=record.answer,
        steps=record.steps,
        cost_usd=spent.usage.cost_usd,
        elapsed_seconds=spent.active_s,
        budget=budget_payload(spent, record.shares),
    )
    return (failed,)


def _run_cancelled(told: Projection, entry: r.Entry, record: r.RunCancelled) -> Sequence[Event]:
    return (Cancelled(*_common(told, entry), reason=record.reason),)


_REMEMBERED = frozenset({r.RunStarted, r.Routed, r.Planned, r.Replanned, r.ConfigDiffers})

_SHOW = cast(
    "Mapping[type[r.Record], Callable[[Projection, r.Entry, r.Record], Sequence[Event]]]",
    {
        r.RunStarted: _run_started,
        r.DriverStarted: _driver_started,
        r.ConfigDiffers: _config_differs,
        r.Dispatched: _dispatched,
        r.Routed: _routed,
        r.Planned: _planned,
        r.Replanned: _replanned,
        r.ScopeOpened: _scope_opened,
        r.ScopeClosed: _scope_closed,
        r.TaskSkipped: _task_skipped,
        r.Synthesised: _synthesised,
        r.LLMFinished: _llm_finished,
        r.LLMFailed: _llm_failed,
        r.LLMDetached: _llm_detached,
        r.ToolFinished: _tool_finished,
        r.Noted: _noted,
        r.ApprovalRequested: _approval_requested,
        r.ApprovalResolved: _approval_resolved,
        r.ApprovalVoided: _approval_voided,
        r.Guided: _guided,
        r.CommandRefused: _command_refused,
        r.RunParked: _run_parked,
        r.Dropped: _dropped,
        r.RunFinished: _run_finished,
        r.RunFailed: _run_failed,
        r.RunCancelled: _run_cancelled,
    },
)

SHOWN = frozenset(_SHOW)
"""The types of records that show as events."""
