"""Where a run is shown: a live tree on a terminal, plain lines elsewhere, JSON lines for programs."""

from __future__ import annotations

import json
import os
import sys
from typing import Protocol, TextIO

from harness.cli.heading import Header, summary
from harness.cli.ledger import Ledger
from harness.cli.narrator import Line, Narrator, label_of
from harness.cli.text import safe
from harness.cli.timeline import Timeline
from harness.events import Discarded, Event, Token
from harness.keys import place_of
from harness.result import RunResult

PLAIN_WIDTH = 160


class Screen(Protocol):
    """Shows one run."""

    tokens: bool

    def open(self, header: Header, ledger: Ledger) -> None:
        """Show what runs, and begin."""
        ...

    def show(self, event: Event) -> None:
        """Show an event."""
        ...

    def suspend(self) -> None:
        """Stop whatever moves for as long as a person is asked."""
        ...

    def go_on(self) -> None:
        """Let it move again, unless the screen was closed meanwhile."""
        ...

    def note(self, text: str, scope: str = "") -> None:
        """Show a remark of the command line's own."""
        ...

    def close(self) -> None:
        """Stop whatever moves, so that other lines can be printed. More than one call does nothing."""
        ...

    def end(self, result: RunResult) -> None:
        """Show what the run came to."""
        ...


def is_terminal(stream: TextIO) -> bool:
    """Say whether a stream can show a live tree."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def choose(*, as_json: bool, tokens: bool, steers: bool = False) -> Screen:
    """Return the screen that fits where the output goes."""
    if as_json:
        return JSONLines(tokens=tokens)
    if is_terminal(sys.stdout):
        from harness.cli.tree import Tree

        return Tree(tokens=tokens, steers=steers)
    return Plain(tokens=tokens)


class JSONLines:
    """One JSON object a line for every event; everything but ASCII is escaped."""

    def __init__(self, *, tokens: bool = False) -> None:
        self.tokens = tokens

    def open(self, header: Header, ledger: Ledger) -> None:
        """Print nothing: the first event says it."""

    def show(self, event: Event) -> None:
        """Print the event."""
        print_json(event_as_json(event))

    def suspend(self) -> None:
        """Do nothing: nothing moves."""

    def go_on(self) -> None:
        """Do nothing."""

    def note(self, text: str, scope: str = "") -> None:
        """Print nothing: a program reads events."""

    def close(self) -> None:
        """Do nothing."""

    def end(self, result: RunResult) -> None:
        """Print nothing: the last event says it."""


def event_as_json(event: Event) -> dict[str, object]:
    """Return an event as plain data."""
    return {
        "type": event.type.value,
        "run_id": event.run_id,
        "agent_id": event.agent_id,
        "scope": event.scope,
        "parent": event.parent,
        "seq": event.seq,
        "timestamp": event.timestamp,
        "payload": dict(event.payload),
    }


def print_json(value: object) -> None:
    """Print a value as one line of ASCII JSON."""
    print(json.dumps(value).replace("\x7f", "\\u007f"), flush=True)


class Plain:
    """Plain lines, without colour and control characters. Every line of a task begins with its name."""

    def __init__(self, *, tokens: bool = False, result_lines: int | None = 6) -> None:
        self.tokens = tokens
        self._narrator = Narrator(PLAIN_WIDTH, result_lines=result_lines)
        self._ledger = Ledger()
        self._in_tokens: str | None = None

    def open(self, header: Header, ledger: Ledger) -> None:
        """Print what runs."""
        self._ledger = ledger
        self._narrator.timeline = ledger.timeline
        print(f"goal: {safe(header.goal)}")
        print(safe(" · ".join(header.facts)))
        for note in header.notes:
            print(safe(note))
        sys.stdout.flush()

    def show(self, event: Event) -> None:
        """Print an event's lines."""
        if isinstance(event, Token):
            if self._in_tokens != event.scope:
                self.close()
                print(f"[{label_of(event.scope)}] " if event.scope else "", end="")
                self._in_tokens = event.scope
            print(safe(event.text), end="", flush=True)
            return
        self.close()
        if isinstance(event, Discarded):
            print(_named("(the reply above was cut and is taken back)", event.scope))
        for line in self._narrator.lines(event):
            self.print(line)
        sys.stdout.flush()

    def print(self, line: Line) -> None:
        """Print one line."""
        if line.scope:
            self._print_scoped(line)
            return
        step = f"[{line.step}] "
        match line.kind:
            case "thought" | "call":
                print(_indent(line.text, step))
            case "result" | "reply":
                print(_indent(line.text, " " * len(step) + "  "))
            case "failed":
                print(_indent(line.text, " " * len(step) + "! "))
            case "answer":
                print(_indent(line.text, "answer: "))
            case "note" | "head":
                print(f"-- {line.text}")
            case "warning":
                print(f"-- warning: {line.text}")
            case "asked":
                print(f"?? {line.text}")
            case "task":
                print(f"   {line.mark:<9} {line.text}")
            case "outcome":
                print(f"   {line.text}")

    def _print_scoped(self, line: Line) -> None:
        step = ""
        text = line.text
        match line.kind:
            case "thought" | "call":
                step = f" {line.step}"
            case "result" | "reply":
                text = _indent(text, "  ")
            case "failed":
                text = _indent(text, "! ")
            case "note":
                text = f"-- {text}"
            case "warning":
                text = f"-- warning: {text}"
            case "asked":
                text = f"?? {text}"
            case "task" if line.mark == "running":
                text = f"started: {text}"
            case _:
                pass
        print(_named(text, line.scope, step))

    def note(self, text: str, scope: str = "") -> None:
        """Print a remark of the command line's own."""
        print(_named(f"-- {text}", scope))

    def suspend(self) -> None:
        """End a line of tokens."""
        self.close()

    def go_on(self) -> None:
        """Do nothing: nothing moves."""

    def close(self) -> None:
        """End a line of tokens."""
        if self._in_tokens is not None:
            self._in_tokens = None
            print(flush=True)

    def chart(self, timeline: Timeline, *, driven: bool) -> None:
        """Print what each task took."""
        from harness.cli import chart

        rows = chart.rows_of(timeline, driven=driven)
        layout = chart.lay_out(rows, PLAIN_WIDTH, bars=False)
        print(f"-- timings: {chart.caption(timeline)}")
        print(f"   {'state':<11} {chart.headings(layout)}".rstrip())
        for row in rows:
            note = "" if row.note == row.standing else row.note
            print(f"   {row.standing:<11} {chart.cells(row, layout)}  {note}".rstrip())

    def end(self, result: RunResult) -> None:
        """Print what was used."""
        print(summary(result, self._ledger), flush=True)


def _indent(text: str, first: str) -> str:
    return first + text.replace("\n", "\n" + " " * len(first))


def _named(text: str, scope: str, step: str = "") -> str:
    """Put a task's name before each line, so that lines of tasks at work at the same time can be told apart."""
    if not scope:
        return text
    first = f"[{label_of(scope)}{step}] " + "  " * place_of(scope).depth
    return "\n".join(first + line for line in text.split("\n"))
