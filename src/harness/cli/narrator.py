"""Events in words: the lines that a terminal, a pipe and ``harness show`` have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from harness.cli.text import count, one_line, safe, shorten
from harness.cli.timeline import Standing, Timeline
from harness.events import (
    Action,
    ApprovalRequested,
    ApprovalResolved,
    Cancelled,
    Compacted,
    Dispatched,
    Done,
    Errored,
    Event,
    Guidance,
    Observation,
    Parked,
    Planned,
    Progress,
    Replanned,
    Resumed,
    Routed,
    Started,
    Synthesised,
    TaskDone,
    TaskStarted,
    Thought,
    Warned,
)
from harness.hitl.shown import safe_word
from harness.keys import join_key, place_of
from harness.plan import Plan, Task

Kind: TypeAlias = Literal[
    "thought", "call", "result", "failed", "note", "warning", "asked", "answer", "head", "task", "outcome", "reply"
]
"""``asked``: a person is to answer, or has said something; ``head`` opens a part of an orchestration; ``task`` says how
a task stands, ``outcome`` in words how it ended; ``reply`` is a task's answer."""

Mark: TypeAlias = Standing | Literal["added", "removed", "kept", ""]
"""What a ``task`` line says of its task."""

RESULT_LINES = 6
CALL_WIDTH = 400
NAME_WIDTH = 24


class Line(NamedTuple):
    """A line to print. Its text is safe for a terminal and may have newlines where it is prose.

    Attributes:
        step: the agent's step it belongs to.
        scope: the task or delegated work it belongs to; empty for the run itself.
        mark: of a ``task``, how it stands.
    """

    kind: Kind
    text: str
    step: int = 0
    scope: str = ""
    mark: Mark = ""


def label_of(scope: str) -> str:
    """Name a scope for a person; what was delegated comes after whoever delegated it.

    >>> label_of("t3/1/researcher/delegate/2.0/writer")
    't3·researcher>writer'
    """
    place = place_of(scope)
    if place.depth:
        return f"{label_of(place.parent or '')}>{safe(place.agent_id)}"
    return f"{safe(place.task_id)}·{safe(place.agent_id)}" if scope else ""


class Narrator:
    """Turns events into lines.

    Args:
        width: the most characters of a line of a tool's result.
        result_lines: the most lines of a result; None shows all of it.

    Attributes:
        timeline: the run's tasks, where somebody follows them.
    """

    def __init__(self, width: int, *, result_lines: int | None = RESULT_LINES) -> None:
        self.timeline = Timeline()
        self._width = width
        self._result_lines = result_lines
        self._calls: dict[str, int] = {}
        self._plan: Plan | None = None
        self._about_limits: set[str] = set()

    def lines(self, event: Event) -> Iterator[Line]:
        """Yield what a person should read of an event."""
        for line in self._lines(event):
            yield line._replace(scope=event.scope) if event.scope else line

    def _lines(self, event: Event) -> Iterable[Line]:
        match event:
            case Thought():
                self._calls[event.scope] = 0
                if event.thought.strip():
                    yield Line("thought", safe(event.thought.strip()), event.step)
            case Action():
                self._calls[event.scope] = self._calls.get(event.scope, 0) + 1
                yield Line("call", self._call(event), event.step)
            case Observation():
                yield from self._observation(event)
            case Started():
                yield Line("note", f"run {safe(join_key(event.run_id, event.agent_id))}")
            case Progress():
                yield Line("note", one_line(f"{event.tool}: {event.text}", self._width))
            case Resumed():
                yield Line("note", "resumed")
            case Compacted():
                what = "summarised" if event.summary else "left out"
                yield Line("note", f"the oldest part of the conversation was {what} for the model")
            case Warned():
                yield Line("warning", safe(event.text))
            case ApprovalRequested() | ApprovalResolved() | Guidance() | Parked():
                yield Line("asked", self._about_people(event))
            case TaskDone() if not event.scope:
                yield Line("answer", safe(event.answer.strip()))
            case Errored() if event.answer.strip():
                what = "what was found so far" if self._plan is not None else "last words of the model"
                yield Line("note", f"{what}: {one_line(event.answer, self._width * 4)}")
            case Cancelled():
                yield Line("warning", f"cancelled: {safe(event.reason)}")
            case _:
                yield from self._orchestration(event)

    def _orchestration(self, event: Event) -> Iterable[Line]:
        match event:
            case Dispatched():
                how = "one agent" if event.path == "routed" else "a plan over several agents"
                yield Line("head", f"dispatch · {event.complexity} · {how}")
                yield from _said(event.rationale)
            case Routed():
                yield Line("head", f"route · {safe(event.agent_id)}")
                yield from _said(event.rationale)
                if event.warning:
                    yield Line("warning", safe(event.warning))
            case Planned():
                yield from self._planned(event)
            case Replanned():
                yield from self._replanned(event)
            case TaskStarted():
                again = f"attempt {event.attempt}: " if event.attempt > 1 else ""
                yield Line("task", again + one_line(self._instruction(event), self._width), mark="running")
            case TaskDone():
                yield from self._task_done(event)
            case Synthesised():
                yield from _synthesised(event)
            case Done():
                yield from self._done(event)
            case _:
                return

    def _call(self, event: Action) -> str:
        if isinstance(event.args, str):
            return one_line(f"{event.tool}({event.args})", CALL_WIDTH)
        args = ", ".join(f"{name}={value!r}" for name, value in event.args.items())
        return one_line(f"{event.tool}({args})", CALL_WIDTH)

    def _observation(self, event: Observation) -> Iterator[Line]:
        good = event.status in ("ok", "reconciled", "unrepresentable")
        kind: Kind = "result" if good else "failed"
        named = f"{safe(event.tool)}: " if self._calls.get(event.scope, 0) > 1 else ""
        if event.status not in ("ok", "error"):
            named += f"({event.status}) "
        text = event.observation if event.observation.strip() else "(nothing)"
        for place, line in enumerate(self._shortened(text)):
            yield Line(kind, (named if place == 0 else "") + line, event.step)

    def _shortened(self, text: str) -> list[str]:
        most = self._result_lines
        return safe(text).split("\n") if most is None else shorten(text, most, self._width)

    def _about_people(self, event: ApprovalRequested | ApprovalResolved | Guidance | Parked) -> str:
        """Say what a person is asked, what they have answered, and what they have told the agents."""
        match event:
            case ApprovalRequested():
                if event.kind == "budget":
                    self._about_limits.add(event.approval_id)
                return safe_word(f"{_asked(event)} · {event.approval_id}") + (
                    f" · {safe_word(event.reason)}" if event.reason else ""
                )
            case ApprovalResolved():
                is_limit = event.approval_id in self._about_limits
                return safe(f"{_raised(event) if is_limit else _answered(event)} · {event.approval_id}")
            case Guidance():
                return safe(f"guidance from {event.by}: {event.text}")
            case Parked():
                return f"parked: waits for {count(len(event.waiting), 'answer')}"

    # -- a plan and its tasks -------------------------------------------------------------------

    def _planned(self, event: Planned) -> Iterable[Line]:
        known, self._plan = self._plan, event.plan
        if event.resumed and known is not None:  # it was shown
            return
        goes_on = " that goes on" if event.resumed else ""
        yield Line("head", f"plan of {count(len(event.plan.tasks), 'task')}{goes_on}")
        yield from _said(event.plan.rationale)
        for task, text in zip(event.plan.tasks, _listed(event.plan.tasks), strict=True):
            mark = self.timeline.standing_of(task.id) if event.resumed else "waiting"
            yield Line("task", text, mark=mark)

    def _replanned(self, event: Replanned) -> Iterable[Line]:
        before = self._plan.tasks if self._plan is not None else ()
        self._plan = event.plan
        trigger = f" · because of {safe(event.trigger_task)}" if event.trigger_task else ""
        yield Line("head", f"replan {event.replan_count}{trigger}")
        yield from _said(event.reason)
        yield from _said(event.plan.rationale)
        for text in _listed([task for task in before if task.id in event.removed]):
            yield Line("task", text, mark="removed")
        for text in _listed([task for task in event.plan.tasks if task.id in event.added]):
            yield Line("task", text, mark="added")
        if event.kept:
            yield Line("task", safe(", ".join(event.kept)), mark="kept")

    def _instruction(self, event: TaskStarted) -> str:
        """Return what was planned; what the agent is told besides are results that were shown."""
        tasks = self._plan.tasks if self._plan is not None and event.parent is None else ()
        return next((task.instruction for task in tasks if task.id == event.task_id), event.instruction)

    def _task_done(self, event: TaskDone) -> Iterable[Line]:
        stretch = self.timeline.stretches.get(event.scope)
        steps = count(event.steps, "step")
        if not event.success:
            yield Line("task", f"failed after {steps}: {safe(event.message)}", mark="failed")
            return
        mark: Mark = "doubtful" if stretch is not None and stretch.standing == "doubtful" else "done"
        yield Line("task", f"{mark} · confidence {event.confidence:.2f} · {steps}", mark=mark)
        for line in self._shortened(event.answer.strip()):
            yield Line("reply", line)

    def _done(self, event: Done) -> Iterable[Line]:
        replans = f" · {count(event.replan_count, 'replan')}" if event.replan_count else ""
        yield Line("head", f"done · {count(len(event.task_results), 'task')}{replans}")
        names = _columns([(result.task_id, result.agent_id) for result in event.task_results])
        for name, result in zip(names, event.task_results, strict=True):
            sure = f" · confidence {result.confidence:.2f}" if result.status in ("done", "doubtful") else ""
            tries = f" · {count(result.attempts, 'attempt')}" if result.attempts else ""
            why = f" · {one_line(result.error, self._width)}" if result.error else ""
            yield Line("outcome", f"{name}  {result.status}{sure}{tries}{why}", mark=result.status)
        yield Line("answer", safe(event.answer.strip()))


def _asked(event: ApprovalRequested) -> str:
    match event.kind:
        case "tool":
            return f"{event.tool} waits for approval"
        case "in_doubt":
            return f"{event.tool} is in doubt"
        case "plan":
            return "the plan waits for approval"
        case "budget":
            args = event.args if isinstance(event.args, dict) else {}
            return f"is {args.get('limit')} raised from {args.get('now')} to {args.get('raise_to')}?"


def _raised(event: ApprovalResolved) -> str:
    """Say what was answered to the question whether a limit is raised."""
    match event.decision:
        case "approve" | "session":
            return f"raised by {event.by}"
        case "edit":
            to = event.args.get("raise_to") if isinstance(event.args, dict) else event.args
            return f"raised by {event.by} to {to}"
        case "reject" | "steer":
            return f"not raised by {event.by}: {event.text or 'no reason given'}"
        case "expired":
            return "nobody answered in time: not raised"


def _answered(event: ApprovalResolved) -> str:
    match event.decision:
        case "approve":
            return f"approved once by {event.by}"
        case "session":
            return f"allowed for this session by {event.by}"
        case "edit":
            return f"approved by {event.by} with other arguments: {event.args}"
        case "reject":
            return f"rejected by {event.by}: {event.text or 'no reason given'}"
        case "steer":
            return f"not approved; {event.by} has said something instead"
        case "expired":
            return "nobody answered in time: rejected"


def _said(text: str) -> Iterable[Line]:
    if text.strip():
        yield Line("note", safe(text.strip()))


def _synthesised(event: Synthesised) -> Iterable[Line]:
    yield Line("head", f"synthesis · confidence {event.confidence:.2f}")
    if event.joined:
        yield Line("warning", "no synthesis could be had: the answer is the tasks' results, one after the other")
    for conflict in event.conflicts:
        yield Line("warning", f"conflict: {safe(conflict)}")
    for unknown in event.unknowns:
        yield Line("note", f"open: {safe(unknown)}")


def _listed(tasks: Sequence[Task]) -> list[str]:
    """Write tasks with their agents and what they depend on, in columns."""
    names = _columns([(task.id, task.agent_id) for task in tasks])
    lines: list[str] = []
    for name, task in zip(names, tasks, strict=True):
        needs = f"← {', '.join(task.depends_on)} · " if task.depends_on else ""
        lines.append(f"{name}  {safe(needs)}{one_line(task.instruction, CALL_WIDTH)}")
    return lines


def _columns(names: Sequence[tuple[str, str]]) -> list[str]:
    """Write task and agent ids below each other."""
    rows = [(one_line(task, NAME_WIDTH), one_line(agent, NAME_WIDTH)) for task, agent in names]
    widths = [max((len(row[place]) for row in rows), default=0) for place in (0, 1)]
    return [f"{task.ljust(widths[0])}  {agent.ljust(widths[1])}" for task, agent in rows]
