"""What each part of a run is doing right now, for the footer."""

from __future__ import annotations

from harness.cli.text import one_line
from harness.cli.timeline import Timeline
from harness.events import (
    Action,
    ApprovalRequested,
    Dispatched,
    Event,
    Observation,
    Planned,
    Progress,
    Replanned,
    TaskDone,
)
from harness.events import TaskStarted as Began
from harness.keys import place_of

ASKING = "asking the model"
WIDTH = 60


class Activity:
    """Follows a run's events.

    >>> Activity().text()
    'starting'
    """

    def __init__(self) -> None:
        self._said = {"": "starting"}
        self._tools: dict[str, list[str]] = {}
        self._has_plan = False

    def follow(self, event: Event) -> None:
        """Take one more event."""
        scope = event.scope
        if isinstance(event, TaskDone) and scope:
            self._said.pop(scope, None)
            self._tools.pop(scope, None)
            return
        tools = self._tools.setdefault(scope, [])
        match event:
            case Began():
                tools.clear()
            case Dispatched():
                self._said[scope] = "planning" if event.path == "orchestrated" else "choosing an agent"
                return
            case Planned() | Replanned():
                self._has_plan = True
            case Action():
                tools.append(event.tool)
            case Observation() if event.tool in tools:
                tools.remove(event.tool)
            case ApprovalRequested():
                self._said[scope] = one_line(f"{event.tool} waits for approval", WIDTH)
                return
            case Progress():
                self._said[scope] = one_line(f"{event.tool}: {event.text}", WIDTH)
                return
            case _:
                pass
        self._said[scope] = one_line("running " + ", ".join(tools), WIDTH) if tools else ASKING

    def at_work(self) -> list[tuple[str, str]]:
        """Return the scopes at work with what they do; one that waits for another's work is left out."""
        waits = {place_of(scope).parent for scope in self._said if scope}
        return [(scope, said) for scope, said in self._said.items() if scope and scope not in waits]

    def text(self, timeline: Timeline | None = None) -> str:
        """Say what the run itself does."""
        rows = timeline.current if timeline is not None and self._has_plan and self._said[""] == ASKING else ()
        if rows and all(row.standing in ("done", "doubtful", "skipped") for row in rows):
            return "bringing the results together"
        return self._said.get("", ASKING)
