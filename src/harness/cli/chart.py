"""What each task of a run took: a table, and where there is room a chart of who worked when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size

from harness.budget import Spent, Usage
from harness.cli.ledger import cost
from harness.cli.text import count, one_line, seconds
from harness.cli.timeline import Row, Stretch, Timeline

LEAST_BAR = 8
MOST_BAR = 48
NAME_WIDTH = 24

HEADINGS = ("task", "agent", "start", "took", "tries", "tokens", "cost")


class Bar(NamedTuple):
    """A piece of a chart's row: a thin line where nobody works, or an attempt and what came of it."""

    text: str
    standing: str


class ChartRow(NamedTuple):
    """One row.

    Attributes:
        standing: how it stands.
        cells: as many as there are headings; those that do not hold are empty.
        bars: the attempts, as seconds from and to.
        note: what stands in the place of numbers.
    """

    standing: str
    cells: tuple[str, ...]
    bars: tuple[tuple[float, float, str], ...] = ()
    note: str = ""


def rows_of(timeline: Timeline, *, driven: bool) -> list[ChartRow]:
    """Return a row for each task and each piece of delegated work.

    Args:
        timeline: the run.
        driven: whether somebody drives it now; otherwise what is not ended was interrupted.
    """
    found: list[ChartRow] = []
    for row in timeline.rows:
        found.append(_task(row, timeline, driven=driven))
        found += [_delegated(stretch, timeline, driven=driven) for stretch in row.delegated]
    return found


def _task(row: Row, timeline: Timeline, *, driven: bool) -> ChartRow:
    standing = _now(row.standing, driven=driven)
    name, agent = one_line(row.task.id, NAME_WIDTH), one_line(row.task.agent_id, NAME_WIDTH)
    reason = one_line(row.reason, 400)
    if not row.attempts:
        return ChartRow(standing, (name, agent, "", "", "", "", ""), note=reason or standing)
    bars = tuple(_bar(stretch, timeline, driven=driven) for stretch in row.attempts)
    took = sum(until - since for since, until, _ in bars)
    tries = str(len(row.attempts))
    cells = (name, agent, f"+{seconds(bars[0][0])}", seconds(took), tries, *_used(row.usage))
    return ChartRow(standing, cells, bars, reason if row.standing == "failed" else "")


def _delegated(stretch: Stretch, timeline: Timeline, *, driven: bool) -> ChartRow:
    bar = _bar(stretch, timeline, driven=driven)
    name = "  " * stretch.depth + "> " + one_line(stretch.agent_id, NAME_WIDTH)
    cells = (name, "", f"+{seconds(bar[0])}", seconds(bar[1] - bar[0]), "", *_used(stretch.usage))
    return ChartRow(bar[2], cells, (bar,))


def _bar(stretch: Stretch, timeline: Timeline, *, driven: bool) -> tuple[float, float, str]:
    until = timeline.now_s if stretch.ended_s is None else stretch.ended_s
    return stretch.began_s, until, _now(stretch.standing, driven=driven)


def _now(standing: str, *, driven: bool) -> str:
    return "interrupted" if standing == "running" and not driven else standing


def _used(usage: Usage) -> tuple[str, str]:
    tokens = usage.input_tokens + usage.output_tokens
    return (f"{tokens:,}", cost(Spent(usage))) if tokens or usage.cost_microusd else ("", "")


class Layout(NamedTuple):
    """Which columns a width has room for.

    Attributes:
        columns: places of the cells that are shown, in order.
        widths: their widths.
        bar: the width of the chart; 0 for none.
    """

    columns: tuple[int, ...]
    widths: tuple[int, ...]
    bar: int


def lay_out(rows: Sequence[ChartRow], width: int, *, bars: bool) -> Layout:
    """Fit the columns into a width: cost, tokens, tries, agent and start are left out, in this order.

    Args:
        rows: the rows.
        width: the room there is.
        bars: whether there is to be a chart.
    """
    every = {
        place: max(cell_len(heading), *(cell_len(row.cells[place]) for row in rows))
        for place, heading in enumerate(HEADINGS)
    }
    if all(row.cells[4] in ("", "1") for row in rows):
        del every[4]
    least = LEAST_BAR if bars else 0
    for dropped in (6, 5, 4, 1, 2):
        if sum(every.values()) + 2 * len(every) + least <= width:
            break
        every.pop(dropped, None)
    every[0] = max(4, min(every[0], width - 2 - sum(every[place] + 2 for place in every if place)))
    room = width - sum(every.values()) - 2 * len(every)
    return Layout(tuple(every), tuple(every.values()), min(room, MOST_BAR) if bars and room >= LEAST_BAR else 0)


def cells(row: ChartRow, layout: Layout) -> str:
    """Return a row's cells, padded; its note where it has no numbers."""
    return "  ".join(
        set_cell_size(row.cells[place], width) if place < 2 else row.cells[place].rjust(width)
        for place, width in zip(layout.columns, layout.widths, strict=True)
    )


def headings(layout: Layout) -> str:
    """Return the headings, padded as the cells are."""
    return cells(ChartRow("", HEADINGS), layout)


def draw(row: ChartRow, total_s: float, width: int) -> list[Bar]:
    """Draw who worked when, in pieces that differ by what came of them."""
    drawn: list[Bar] = []
    at = 0
    scale = width / total_s if total_s > 0 else 0.0
    for since, until, standing in row.bars:
        begin = max(at, min(math.floor(since * scale), width - 1))
        end = min(width, max(math.ceil(until * scale), begin + 1))
        if end > begin:
            drawn += [Bar("─" * (begin - at), ""), Bar("━" * (end - begin), standing)]
            at = end
    return [*drawn, Bar("─" * (width - at), "")]


def caption(timeline: Timeline) -> str:
    """Say what the chart is of."""
    replaced = sum(row.standing == "replanned" for row in timeline.rows)
    more = f", {replaced} of them replaced" if replaced else ""
    return f"{count(len(timeline.rows), 'task')}{more} · {seconds(timeline.now_s)}"
