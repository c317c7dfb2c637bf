"""Events in words: the lines that a terminal, a pipe and ``harness show`` have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

from harness.cli.text import one_line, safe, shorten
from harness.events import (
    Action,
    Cancelled,
    Compacted,
    Errored,
    Event,
    Observation,
    Progress,
    Resumed,
    Started,
    TaskDone,
    Thought,
    Warned,
)
from harness.keys import join_key

Kind: TypeAlias = Literal["thought", "call", "result", "failed", "note", "warning", "answer"]

RESULT_LINES = 6
CALL_WIDTH = 400


class Line(NamedTuple):
    """A line to print. Its text is safe for a terminal and may have newlines where it is prose."""

    kind: Kind
    text: str
    step: int = 0


class Narrator:
    """Turns events into lines.

    Args:
        width: the most characters of a line of a tool's result.
        result_lines: the most lines of a result; None shows all of it.
    """

    def __init__(self, width: int, *, result_lines: int | None = RESULT_LINES) -> None:
        self._width = width
        self._result_lines = result_lines
        self._calls = 0

    def lines(self, event: Event) -> Iterator[Line]:
        """Yield what a person should read of an event."""
        match event:
            case Thought():
                self._calls = 0
                if event.thought.strip():
                    yield Line("thought", safe(event.thought.strip()), event.step)
            case Action():
                self._calls += 1
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
            case TaskDone():
                yield Line("answer", safe(event.answer.strip()))
            case Errored() if event.answer.strip():
                yield Line("note", f"last words of the model: {one_line(event.answer, self._width * 4)}")
            case Cancelled():
                yield Line("warning", f"cancelled: {safe(event.reason)}")
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
        named = f"{safe(event.tool)}: " if self._calls > 1 else ""
        if event.status not in ("ok", "error"):
            named += f"({event.status}) "
        text = event.observation if event.observation.strip() else "(nothing)"
        most = self._result_lines
        shown = safe(text).split("\n") if most is None else shorten(text, most, self._width)
        for place, line in enumerate(shown):
            yield Line(kind, (named if place == 0 else "") + line, event.step)
