"""The live tree on a terminal: lines that scroll by, and a footer that moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from harness.cli import chart
from harness.cli.activity import Activity
from harness.cli.heading import Header, summary
from harness.cli.ledger import Ledger
from harness.cli.narrator import RESULT_LINES, Line, Narrator, label_of
from harness.cli.text import one_line, safe
from harness.cli.timeline import ENDED, Timeline
from harness.events import Discarded, Event, Planned, Replanned, Thought, Token
from harness.keys import place_of, task_scope
from harness.result import RunResult

STYLES = {
    "thought": "",
    "call": "cyan",
    "result": "dim",
    "failed": "red",
    "note": "dim italic",
    "warning": "yellow",
    "asked": "bold yellow",
    "answer": "bold",
    "head": "bold",
    "reply": "",
}

MARKS = {
    "waiting": ("○", "dim"),
    "running": ("▶", "cyan"),
    "done": ("✔", "green"),
    "doubtful": ("≈", "yellow"),
    "failed": ("✘", "red"),
    "skipped": ("⊘", "dim"),
    "replanned": ("↻", "magenta"),
    "interrupted": ("‖", "yellow"),
    "added": ("+", "green"),
    "removed": ("-", "magenta"),
    "kept": ("=", "dim"),
}
"""How a task stands, as a symbol and its colour."""

SIGNS = {"note": "·", "warning": "!", "asked": "?"}
"""What stands before remarks."""

LABEL_STYLES = ("cyan", "magenta", "blue", "green", "bright_cyan", "bright_magenta", "bright_blue", "bright_green")
"""Tasks take turns at them; red and yellow say that something is wrong."""

TAIL = 400
"""Characters of a reply that are kept to show its end while it arrives."""

MOST_AT_WORK = 6
"""The most tasks whose work the footer names."""

PAUSE = " · Ctrl-C pauses"
STEER = " · a line + Enter steers"


class Tree:
    """Prints a run as a tree with a live footer.

    Args:
        tokens: show the end of replies while they arrive.
        live: show the footer.
        result_lines: the most lines of a result; None shows all of it.
        steers: whether lines that are typed reach the agents; the footer says so where there is room.
        pauses: whether Ctrl-C pauses a run; the footer says so.
    """

    def __init__(
        self,
        *,
        tokens: bool = False,
        live: bool = True,
        result_lines: int | None = RESULT_LINES,
        steers: bool = False,
        pauses: bool = True,
    ) -> None:
        self.tokens = tokens
        self._pause = PAUSE if pauses else ""
        self._console = Console(markup=False, highlight=False, emoji=False)
        self._narrator = Narrator(max(20, self._console.width - 10), result_lines=result_lines)
        self._clips = result_lines is not None
        self._ledger = Ledger()
        self._activity = Activity()
        self._labels = _Labels()
        self._tail = ""
        self._tail_of = ""
        self._steps: dict[str, int] = {}
        self._key = ""
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        self._wants_live = live
        self._steers = steers

    def open(self, header: Header, ledger: Ledger) -> None:
        """Print what runs, and show the footer."""
        self._ledger = ledger
        self._narrator.timeline = ledger.timeline
        self._key = ledger.state.run_id
        self._print("● ", "  ", safe(header.goal), "bold")
        self._print("│ ", "│ ", safe(" · ".join(header.facts)), "dim")
        for note in header.notes:
            self._print("│ ", "│ ", safe(note), "magenta")
        self.go_on()

    def show(self, event: Event) -> None:
        """Print an event's lines."""
        if event.run_id:
            self._key = event.run_id
        if isinstance(event, Token):
            if self._tail_of != event.scope:
                self._tail, self._tail_of = "", event.scope
            self._tail = (self._tail + event.text)[-TAIL:]
            return
        if isinstance(event, (Thought, Discarded)) and event.scope == self._tail_of:
            self._tail = ""
        if isinstance(event, (Planned, Replanned)):
            for task in event.plan.tasks:  # so that no name is wider than those before it
                self._labels.fit(task_scope(task.id, 1, task.agent_id), self._label_width)
        self._activity.follow(event)
        for line in self._narrator.lines(event):
            self._line(line)

    def note(self, text: str, scope: str = "") -> None:
        """Print a remark of the command line's own."""
        self._line(Line("note", text, scope=scope))

    def suspend(self) -> None:
        """Take the footer away for a while."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def go_on(self) -> None:
        """Show the footer."""
        if self._wants_live and self._live is None:
            self._live = Live(
                _Footer(self),
                console=self._console,
                transient=True,
                refresh_per_second=8,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    def close(self) -> None:
        """Take the footer away for good."""
        self._wants_live = False
        self.suspend()

    def end(self, result: RunResult) -> None:
        """Print what was used."""
        self.close()
        self._print("   ", "   ", summary(result, self._ledger), "dim")

    def chart(self, timeline: Timeline, *, driven: bool) -> None:
        """Draw who worked when, and what each task took."""
        rows = chart.rows_of(timeline, driven=driven)
        layout = chart.lay_out(rows, self._console.width - 4, bars=True)
        self._print("  ", "  ", chart.caption(timeline), "bold")
        self._console.print(Text(f"    {chart.headings(layout)}", style="dim"), soft_wrap=True)
        for row in rows:
            symbol, style = MARKS[row.standing]
            drawn = Text.assemble((f"  {symbol} ", style), chart.cells(row, layout))
            if row.bars and layout.bar:
                drawn.append("  ")
                for text, standing in chart.draw(row, timeline.now_s, layout.bar):
                    drawn.append(text, MARKS[standing][1] if standing else "dim")
            elif row.note:
                drawn.rstrip()
                drawn.append(f"  {row.note}", "dim")
            drawn.truncate(self._console.width, overflow="ellipsis")
            self._console.print(drawn, soft_wrap=True)

    # -- the footer -----------------------------------------------------------------------------

    def footer(self) -> RenderableType:
        """Return what moves: what is done now, and what was used so far."""
        width = self._console.width
        grid = Table.grid()
        if self._tail:
            label = f"{label_of(self._tail_of)} " if self._tail_of else ""
            tail = one_line(label + self._tail[-width:], max(10, width - 6))
            grid.add_row(Text(f"│    {tail}", style="dim", no_wrap=True))
        for line in self._at_work(width):
            grid.add_row(line)
        doing = self._activity.text(self._ledger.timeline)
        if rows := self._ledger.timeline.current:
            grid.add_row(self._tasks(width))
            done = sum(row.standing in ENDED for row in rows)
            running = sum(row.standing == "running" for row in rows)
            doing = f"{done}/{len(rows)} done · {f'{running} running' if running else doing}"
        facts = f"{doing} · {self._ledger.line()} · {safe(self._key)}"
        # How to stop is the last to go where the terminal is narrow.
        room = max(10, width - 3 - len(self._pause))
        steer = STEER if self._steers and cell_len(facts) + len(STEER) <= room else ""
        row = Table.grid(padding=(0, 1))
        row.add_row(self._spinner, Text(one_line(facts, room) + steer + self._pause, style="dim", no_wrap=True))
        grid.add_row(row)
        return grid

    def _at_work(self, width: int) -> Iterator[Text]:
        """Yield a line for each task and each piece of delegated work: what it does right now."""
        at_work = self._activity.at_work()
        for scope, said in at_work[:MOST_AT_WORK]:
            name = self._labels.fit(scope, self._label_width)
            line = Text.assemble(("│ ", "dim"), (name, self._labels.style(scope)), (f" {said}", "dim"))
            line.truncate(width - 1, overflow="ellipsis")
            yield line
        if (more := len(at_work) - MOST_AT_WORK) > 0:
            yield Text(f"│ … {more} more", style="dim")

    def _tasks(self, width: int) -> Text:
        """Return how every task stands; where there is no room, those that have ended are the first to go."""
        rows = self._ledger.timeline.current
        names = [one_line(row.task.id, 20) for row in rows]
        room = width - 3 - sum(cell_len(name) + 4 for name in names)
        line = Text("│ ", style="dim")
        for row, name in zip(rows, names, strict=True):
            if room < 0 and row.standing in ENDED:
                room += cell_len(name) + 4
                continue
            symbol, style = MARKS[row.standing]
            line.append(f"{symbol} ", style)
            line.append(f"{name}  ", "" if row.standing == "running" else "dim")
        line.truncate(width - 1, overflow="ellipsis")
        return line

    @property
    def _label_width(self) -> int:
        """The most columns a task's name may take."""
        return max(8, self._console.width // 4)

    # -- lines ----------------------------------------------------------------------------------

    def _line(self, line: Line) -> None:
        if line.scope:
            self._scoped(line)
            return
        if line.kind in ("task", "outcome"):
            symbol, style = MARKS[line.mark]
            self._print(Text.assemble(("│  ", "dim"), (f"{symbol} ", style)), "│    ", line.text, "", clip=self._clips)
            return
        style = STYLES[line.kind]
        if line.kind == "head":
            self._print("├─ ", "│  ", line.text, style)
            return
        if line.kind == "answer":
            self._print("╰─ ", "   ", line.text, style)
            return
        if line.kind in SIGNS:
            self._print(f"│  {SIGNS[line.kind]} ", "│    ", line.text, style)
            return
        rest = "│    "
        first = rest
        if line.step != self._steps.get(""):
            self._steps[""] = line.step
            first = f"├─ {line.step} ".ljust(len(rest))
        if line.kind in ("result", "failed"):
            first, rest = first + "  ", rest + "  "
        self._print(first, rest, line.text, style)

    def _scoped(self, line: Line) -> None:
        """Print a line of a task or of delegated work: its name stands before every row, in a colour of its own."""
        name = self._labels.fit(line.scope, self._label_width)
        gutter = Text.assemble(("│ ", "dim"), (name, self._labels.style(line.scope)))
        gutter.append(" " + "  " * place_of(line.scope).depth)
        first, rest = gutter.copy(), gutter.append("   ")
        style = STYLES.get(line.kind, "")
        if line.kind == "task":
            symbol, colour = MARKS[line.mark]
            first.append(f"{symbol}  ", colour)
            style = colour if line.mark in ("failed", "doubtful") else ""
        elif line.kind in SIGNS:
            first.append(f"{SIGNS[line.kind]}  ", style)
        elif line.step and line.step != self._steps.get(line.scope):
            self._steps[line.scope] = line.step
            first.append(f"{line.step:<3}", "dim")
        else:
            first.append("   ")
        if line.kind in ("result", "failed"):
            first, rest = first.append("  "), rest.copy().append("  ")
        clip = self._clips and (
            line.kind in ("result", "failed", "reply") or (line.kind, line.mark) == ("task", "running")
        )
        self._print(first, rest, line.text, style, clip=clip)

    def _print(self, first: str | Text, rest: str | Text, text: str, style: str, *, clip: bool = False) -> None:
        """Print a text behind a gutter, wrapped to the width of the terminal or clipped at it."""
        gutter, rest = (Text(part, style="dim") if isinstance(part, str) else part for part in (first, rest))
        room = max(10, self._console.width - rest.cell_len)
        for paragraph in text.split("\n"):
            whole = Text(paragraph)
            if clip:
                whole.truncate(room, overflow="ellipsis")
            for row in whole.wrap(self._console, room) if paragraph else [Text("")]:
                row.rstrip()
                row.style = style
                self._console.print(Text.assemble(gutter, row), soft_wrap=True)
                gutter = rest


class _Labels:
    """The names of tasks and of delegated work before their lines: as wide as the widest, each in a colour."""

    def __init__(self) -> None:
        self._width = 0
        self._order: dict[str, int] = {}

    def style(self, scope: str) -> str:
        """Return the colour of the task a scope belongs to."""
        task = place_of(scope).task_id
        return LABEL_STYLES[self._order.setdefault(task, len(self._order)) % len(LABEL_STYLES)]

    def fit(self, scope: str, most: int) -> str:
        """Return a name in at most so many columns. Its middle goes first: ids often differ at their ends."""
        label = label_of(scope)
        if cell_len(label) > most and (task := safe(place_of(scope).task_id)):
            label = f"{task}>{safe(place_of(scope).agent_id)}" if place_of(scope).depth else task
        if cell_len(label) > most:
            half = (most - 1) // 2
            label = f"{label[: most - 1 - half]}…{label[-half:]}"
        self._width = max(self._width, min(most, cell_len(label)))
        return set_cell_size(label, self._width)


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
