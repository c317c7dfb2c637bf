"""What every screen says before a run and after it."""

from __future__ import annotations

from typing import NamedTuple

from harness.cli.ledger import Ledger
from harness.cli.text import count
from harness.result import Finished, RunResult


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


def summary(result: RunResult, ledger: Ledger) -> str:
    """Say in one line what a run used: steps, tokens, cost, time and how sure the model is."""
    sure = f" · confidence {result.confidence:.2f}" if isinstance(result, Finished) else ""
    return f"{count(result.steps, 'step')} · {ledger.total()}{sure}"
