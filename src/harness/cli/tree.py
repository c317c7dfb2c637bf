"""The live tree on a terminal: lines that scroll by, and a footer that moves."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from harness.cli.ledger import Ledger
from harness.cli.narrator import RESULT_LINES, Line, Narrator
from harness.cli.screen import Header, activity, summary
from harness.cli.text import one_line, safe
from harness.events import Discarded, Event, Thought, Token
from harness.result import RunResult

STYLES = {
    "thought": "",
    "call": "cyan",
    "result": "dim",
    "failed": "red",
    "note": "dim italic",
    "warning": "yellow",
    "answer": "bold",
}
TAIL = 400
"""Characters of a reply that are kept to show its end while it arrives."""

PAUSE = " · Ctrl-C pauses"


class Tree:
    """Prints a run as a tree with a live footer."""

    def __init__(self, *, tokens: bool = False, live: bool = True, result_lines: int | None = RESULT_LINES) -> None:
        self.tokens = tokens
        self._console = Console(markup=False, highlight=False, emoji=False)
        self._narrator = Narrator(max(20, self._console.width - 10), result_lines=result_lines)
        self._ledger = Ledger()
        self._activity = "starting"
        self._running: list[str] = []
        self._tail = ""
        self._step = 0
        self._key = ""
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        self._wants_live = live

    def open(self, header: Header, ledger: Ledger) -> None:
        """Print what runs, and show the footer."""
        self._ledger = ledger
        self._key = ledger.state.run_id
        self._print("● ", "  ", safe(header.goal), "bold")
        self._print("│ ", "│ ", safe(" · ".join(header.facts)), "dim")
        for note in header.notes:
            self._print("│ ", "│ ", safe(note), "magenta")
        if self._wants_live:
            self._live = Live(
                _Footer(self),
                console=self._console,
                transient=True,
                refresh_per_second=8,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    def show(self, event: Event) -> None:
        """Print an event's lines."""
        if event.run_id:
            self._key = event.run_id
        if isinstance(event, Token):
            self._tail = (self._tail + event.text)[-TAIL:]
            return
        if isinstance(event, (Thought, Discarded)):
            self._tail = ""
        self._activity = activity(event, self._running)
        for line in self._narrator.lines(event):
            self._line(line)

    def note(self, text: str) -> None:
        """Print a remark of the command line's own."""
        self._line(Line("note", text))

    def close(self) -> None:
        """Take the footer away."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def end(self, result: RunResult) -> None:
        """Print what was used."""
        self.close()
        self._print("   ", "   ", summary(result, self._ledger), "dim")

    def footer(self) -> RenderableType:
        """Return what moves: what is done now, and what was used so far."""
        width = self._console.width
        row = Table.grid(padding=(0, 1))
        facts = f"{self._activity} · {self._ledger.line()} · {safe(self._key)}"
        # How to stop is the last to go where the terminal is narrow.
        room = max(10, width - 3 - len(PAUSE))
        row.add_row(self._spinner, Text(one_line(facts, room) + PAUSE, style="dim", no_wrap=True))
        if not self._tail:
            return row
        tail = one_line(self._tail[-width:], max(10, width - 6))
        grid = Table.grid()
        grid.add_row(Text(f"│    {tail}", style="dim", no_wrap=True))
        grid.add_row(row)
        return grid

    def _line(self, line: Line) -> None:
        style = STYLES[line.kind]
        if line.kind == "answer":
            self._print("╰─ ", "   ", line.text, style)
            return
        if line.kind in ("note", "warning"):
            self._print("│  " + ("! " if line.kind == "warning" else "· "), "│    ", line.text, style)
            return
        rest = "│    "
        first = rest
        if line.step != self._step:
            self._step = line.step
            first = f"├─ {line.step} ".ljust(len(rest))
        if line.kind in ("result", "failed"):
            first, rest = first + "  ", rest + "  "
        self._print(first, rest, line.text, style)

    def _print(self, first: str, rest: str, text: str, style: str) -> None:
        """Print a text behind a gutter, wrapped to the width of the terminal."""
        room = max(10, self._console.width - len(rest))
        gutter = first
        for paragraph in text.split("\n"):
            wrapped = Text(paragraph).wrap(self._console, room) if paragraph else [Text("")]
            for row in wrapped:
                row.rstrip()
                row.style = style
                self._console.print(Text.assemble((gutter, "dim"), row), soft_wrap=True)
                gutter = rest


def print_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; its cells are safe for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(names):
        table.add_column(name, no_wrap=place < len(names) - 1, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(markup=False, highlight=False, emoji=False).print(table)


class _Footer:
    """Draws the footer anew each time it is refreshed."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def __rich__(self) -> RenderableType:
        return self._tree.footer()
