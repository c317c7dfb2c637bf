"""What a run has used so far: a fold of its journal for people to read."""

from __future__ import annotations

import time
from collections.abc import Iterable

from harness.budget import GuardrailConfig, Spent
from harness.cli.text import count, seconds
from harness.cli.timeline import Timeline
from harness.fold import apply
from harness.raising import raised_to
from harness.records import Entry
from harness.result import RunResult
from harness.state import RunState


class Ledger:
    """Follows a run's journal.

    Attributes:
        state: the journal, folded.
        timeline: its tasks, and when they were at work.
        limits: what the run may use; None where that is not known.
    """

    def __init__(self, run_id: str = "", limits: GuardrailConfig | None = None) -> None:
        self.state = RunState(run_id)
        self.timeline = Timeline()
        self.limits = limits
        self._attached_at = time.monotonic()
        self._attached_s: float | None = None

    def follow(self, entries: Iterable[Entry]) -> None:
        """Fold more of the journal."""
        for entry in entries:
            if entry.seq == self.state.seq + 1:
                apply(self.state, entry.record, entry.at)
                self.timeline.follow(entry)

    def attach_end(self, result: RunResult) -> None:
        """Take the numbers of a run that has ended."""
        self.state.spent = result.spent
        self._attached_s = None

    def attach(self) -> None:
        """Count elapsed time from here on, on top of what the journal says."""
        self._attached_at = time.monotonic()
        self._attached_s = self.state.spent.active_s

    @property
    def elapsed_s(self) -> float:
        """Seconds the run has been driven."""
        if self._attached_s is None:
            return self.state.spent.active_s
        return self._attached_s + time.monotonic() - self._attached_at

    def line(self) -> str:
        """Say tokens, cost and time: ``2,134 tokens · $0.0012 of $2.00 · 12.3 s``."""
        return f"{self.tokens()} · {self.cost()} · {seconds(self.elapsed_s)}"

    def total(self) -> str:
        """Say the same of a run that is looked back on, and how much of it is an estimate."""
        return f"{self.tokens()} · {self.cost()}{self.estimated()} · {seconds(self.elapsed_s)}"

    def estimated(self) -> str:
        """Say in brackets how many calls are charged by estimate; nothing where none is."""
        number = self.state.spent.estimated
        return f" ({count(number, 'call')} estimated)" if number else ""

    def tokens(self) -> str:
        """Say how many tokens went both ways."""
        usage = self.state.spent.usage
        return f"{usage.input_tokens + usage.output_tokens:,} tokens"

    def cost(self) -> str:
        """Say what it cost, and of how much."""
        cap = self.limits.max_total_cost_usd if self.limits else None
        if cap is not None:
            cap = max(cap, raised_to(self.state, "max_total_cost_usd"))
        return cost(self.state.spent, cap)


def cost(spent: Spent, cap: float | None = None) -> str:
    """Write a cost. An unknown price is called unpriced, never zero.

    >>> cost(Spent())
    'no cost yet'
    """
    usage = spent.usage
    of = f" of ${cap:.2f}" if cap is not None else ""
    if usage.unpriced and not usage.cost_microusd:
        return "unpriced"
    if usage.unpriced:
        return f"${usage.cost_usd:.4f}{of} + {usage.unpriced} unpriced calls"
    if not (usage.input_tokens or usage.output_tokens or usage.cost_microusd):
        return "no cost yet"
    return f"${usage.cost_usd:.4f}{of}"
