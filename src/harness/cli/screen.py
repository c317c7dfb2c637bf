"""Where a run is shown: a live tree on a terminal, plain lines elsewhere, JSON lines for programs."""

from __future__ import annotations

import json
import os
import sys
from typing import NamedTuple, Protocol, TextIO

from harness.cli.ledger import Ledger
from harness.cli.narrator import Line, Narrator
from harness.cli.text import count, one_line, safe
from harness.events import Action, Discarded, Event, Observation, Progress, Token
from harness.result import Finished, RunResult

PLAIN_WIDTH = 160


class Header(NamedTuple):
    """What is said of a run before it begins.

    Attributes:
        goal: what it was asked.
        facts: the agent, the model, the folder: in a few words each.
        notes: sentences that must be read.
    """

    goal: str
    facts: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Screen(Protocol):
    """Shows one run."""

    tokens: bool

    def open(self, header: Header, ledger: Ledger) -> None:
        """Show what runs, and begin."""
        ...

    def show(self, event: Event) -> None:
        """Show an event."""
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


def choose(*, as_json: bool, tokens: bool) -> Screen:
    """Return the screen that fits where the output goes."""
    if as_json:
        return JSONLines(tokens=tokens)
    if is_terminal(sys.stdout):
        from harness.cli.tree import Tree

        return Tree(tokens=tokens)
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
        "seq": event.seq,
        "timestamp": event.timestamp,
        "payload": dict(event.payload),
    }


def print_json(value: object) -> None:
    """Print a value as one line of ASCII JSON."""
    print(json.dumps(value).replace("\x7f", "\\u007f"), flush=True)


class Plain:
    """Plain lines, without colour and control characters."""

    def __init__(self, *, tokens: bool = False, result_lines: int | None = 6) -> None:
        self.tokens = tokens
        self._narrator = Narrator(PLAIN_WIDTH, result_lines=result_lines)
        self._ledger = Ledger()
        self._in_tokens = False

    def open(self, header: Header, ledger: Ledger) -> None:
        """Print what runs."""
        self._ledger = ledger
        print(f"goal: {safe(header.goal)}")
        print(safe(" · ".join(header.facts)))
        for note in header.notes:
            print(safe(note))
        sys.stdout.flush()

    def show(self, event: Event) -> None:
        """Print an event's lines."""
        if isinstance(event, Token):
            self._in_tokens = True
            print(safe(event.text), end="", flush=True)
            return
        if self._in_tokens:
            self._in_tokens = False
            print()
        if isinstance(event, Discarded):
            print("(the reply above was cut and is taken back)")
        for line in self._narrator.lines(event):
            self.print(line)
        sys.stdout.flush()

    def print(self, line: Line) -> None:
        """Print one line."""
        step = f"[{line.step}] "
        match line.kind:
            case "thought" | "call":
                print(_indent(line.text, step))
            case "result":
                print(_indent(line.text, " " * len(step) + "  "))
            case "failed":
                print(_indent(line.text, " " * len(step) + "! "))
            case "answer":
                print(_indent(line.text, "answer: "))
            case "note":
                print(f"-- {line.text}")
            case "warning":
                print(f"-- warning: {line.text}")

    def note(self, text: str) -> None:
        """Print a remark of the command line's own."""
        print(f"-- {text}")

    def close(self) -> None:
        """End a line of tokens."""
        if self._in_tokens:
            self._in_tokens = False
            print(flush=True)

    def end(self, result: RunResult) -> None:
        """Print what was used."""
        print(summary(result, self._ledger), flush=True)


def _indent(text: str, first: str) -> str:
    return first + text.replace("\n", "\n" + " " * len(first))


def summary(result: RunResult, ledger: Ledger) -> str:
    """Say in one line what a run used: steps, tokens, cost, time and how sure the model is."""
    sure = f" · confidence {result.confidence:.2f}" if isinstance(result, Finished) else ""
    return f"{count(result.steps, 'step')} · {ledger.line()}{sure}"


def activity(event: Event, running: list[str]) -> str:
    """Say what the run does after an event. ``running`` holds the names of tools at work; it is kept up to date."""
    match event:
        case Action():
            running.append(event.tool)
        case Observation() if event.tool in running:
            running.remove(event.tool)
        case Progress():
            return one_line(f"{event.tool}: {event.text}", 60)
        case _:
            pass
    return one_line("running " + ", ".join(running), 60) if running else "asking the model"
