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
from harness.messages import JSON, Reasoning, Text, ToolCall


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


_COMMON = frozenset({"run_id", "agent_id", "seq", "timestamp"})


class BusEvent(msgspec.Struct, frozen=True, gc=False):
    """What every event has.

    Attributes:
        run_id: the run.
        agent_id: the agent it is about.
        seq: the place of the record it shows; for an ephemeral event the last record before it.
        timestamp: seconds since the epoch.

    >>> Observation("r1", "reader", 5, 0.0, step=1, tool="add", observation="3").payload["tool"]
    'add'
    """

    type: ClassVar[EventType]
    run_id: str
    agent_id: str
    seq: int
    timestamp: float

    @property
    def payload(self) -> Mapping[str, JSON]:
        """The event's own fields as plain nested data."""
        own = {name: getattr(self, name) for name in self.__struct_fields__ if name not in _COMMON}
        return MappingProxyType(msgspec.to_builtins(own))

    @property
    def token(self) -> str:
        """The text of a TOKEN; empty on every other event."""
        return ""

    @property
    def error(self) -> str:
        """What went wrong, on an ERROR or a failed TASK_DONE; empty on every other event."""
        return ""


class Started(BusEvent, frozen=True, kw_only=True):
    """The run exists; it can be resumed from here on."""

    type = EventType.STARTED
    goal: str


class Resumed(BusEvent, frozen=True, kw_only=True):
    """A driver took the run up again."""

    type = EventType.RESUMED
    epoch: int


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
    """Something a person should know; the run goes on."""

    type = EventType.WARNING
    text: str


class TaskDone(BusEvent, frozen=True, kw_only=True):
    """The agent has its answer. The last event of a run with one agent."""

    type = EventType.TASK_DONE
    answer: str
    confidence: float
    steps: int
    cost_usd: float
    elapsed_seconds: float
    budget: dict[str, object]


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
    | Thought
    | Token
    | Discarded
    | Action
    | Observation
    | Progress
    | Compacted
    | Warned
    | TaskDone
    | Cancelled
    | Errored
)


def budget_payload(spent: r.Spent) -> dict[str, object]:
    """Show what was spent as plain data: cost_usd, elapsed_seconds, tokens and their breakdown."""
    usage = spent.usage
    return {
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
        },
    }


def arguments_for_show(call: ToolCall) -> dict[str, object] | str:
    """Return a call's arguments as an object, or the text the model wrote where it is not one."""
    try:
        args = msgspec.json.decode(call.arguments or "{}")
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return call.arguments
    return args if isinstance(args, dict) else call.arguments  # pyright: ignore[reportUnknownVariableType] - decoded JSON


def events_of(entry: r.Entry, agent_id: str) -> Sequence[Event]:
    """Return the events that show one record; many records show as none."""
    record = entry.record
    show = _SHOW.get(type(record))
    return () if show is None else show(record, (entry.run_id, agent_id, entry.seq, entry.at))


_Common: TypeAlias = tuple[str, str, int, float]
"""The fields every event has, in order."""


def _llm_finished(record: r.LLMFinished, common: _Common) -> Sequence[Event]:
    if record.purpose == "compaction":
        return (Compacted(*common, summary="".join(p.text for p in record.parts if isinstance(p, Text))),)
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
    action = ", ".join([call.name for call in calls]) or "finish"
    # With calls the text is what the model says about them; without, it is the answer and shows in TASK_DONE.
    said = text if calls else ""
    thought = f"{reasoning}\n{said}" if reasoning and said else reasoning or said
    events: list[Event] = [Thought(*common, step=record.step, thought=thought, action=action)]
    events += [Action(*common, step=record.step, tool=call.name, args=arguments_for_show(call)) for call in calls]
    return events


def _tool_finished(record: r.ToolFinished, common: _Common) -> Sequence[Event]:
    return (
        Observation(*common, step=record.step, tool=record.tool, observation=record.text, status=record.status),
    )  # fmt: skip


def _run_started(record: r.RunStarted, common: _Common) -> Sequence[Event]:
    return (Started(*common, goal=record.goal),)


def _driver_started(record: r.DriverStarted, common: _Common) -> Sequence[Event]:
    return (Resumed(*common, epoch=record.epoch),) if record.epoch > 1 else ()


def _config_differs(record: r.ConfigDiffers, common: _Common) -> Sequence[Event]:
    return (Warned(*common, text="changed since the run was last driven: " + "; ".join(record.changes)),)


def _llm_failed(record: r.LLMFailed, common: _Common) -> Sequence[Event]:
    again = "it will be tried again" if record.transient else "it is not tried again"
    return (Warned(*common, text=f"model call failed (attempt {record.attempt}): {record.error}; {again}"),)


def _noted(record: r.Noted, common: _Common) -> Sequence[Event]:
    return (Warned(*common, text=record.text),)


def _dropped(_record: r.Dropped, common: _Common) -> Sequence[Event]:
    return (Compacted(*common, summary=""),)


def _run_finished(record: r.RunFinished, common: _Common) -> Sequence[Event]:
    spent = record.spent
    done = TaskDone(
        *common,
        answer=record.answer,
        confidence=record.confidence,
        steps=record.steps,
        cost_usd=spent.usage.cost_usd,
        elapsed_seconds=spent.active_s,
        budget=budget_payload(spent),
    )
    return (done,)


def _run_failed(record: r.RunFailed, common: _Common) -> Sequence[Event]:
    spent = record.spent
    failed = Errored(
        *common,
        reason=record.reason,
        message=record.error,
        answer=record.answer,
        steps=record.steps,
        cost_usd=spent.usage.cost_usd,
        elapsed_seconds=spent.active_s,
        budget=budget_payload(spent),
    )
    return (failed,)


def _run_cancelled(record: r.RunCancelled, common: _Common) -> Sequence[Event]:
    return (Cancelled(*common, reason=record.reason),)


_SHOW = cast(
    "Mapping[type[r.Record], Callable[[r.Record, _Common], Sequence[Event]]]",
    {
        r.RunStarted: _run_started,
        r.DriverStarted: _driver_started,
        r.ConfigDiffers: _config_differs,
        r.LLMFinished: _llm_finished,
        r.LLMFailed: _llm_failed,
        r.ToolFinished: _tool_finished,
        r.Noted: _noted,
        r.Dropped: _dropped,
        r.RunFinished: _run_finished,
        r.RunFailed: _run_failed,
        r.RunCancelled: _run_cancelled,
    },
)
