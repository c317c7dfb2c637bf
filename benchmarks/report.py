"""Measuring and reporting, the same for every benchmark of this folder."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Cost:
    """Seconds of CPU and of wall clock."""

    cpu: float
    wall: float


def measure(
    work: Callable[[], Coroutine[None, None, None]], *, before: Callable[[], Coroutine[None, None, None]] | None = None
) -> Cost:
    """Run a coroutine in an event loop of its own. The loop's making and ending, and ``before``, are not counted."""
    cost = Cost(0.0, 0.0)

    async def main() -> None:
        if before is not None:
            await before()
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        await work()
        cost.cpu, cost.wall = time.process_time() - cpu, time.perf_counter() - wall

    asyncio.run(main())
    return cost


def best(costs: Sequence[Cost]) -> Cost:
    """Take the median: of CPU and of wall clock."""
    return Cost(statistics.median(c.cpu for c in costs), statistics.median(c.wall for c in costs))


def alternate(rounds: int, *works: Callable[[], Cost]) -> list[Cost]:
    """Measure several things in turns, so that a busy moment of the machine hits all of them alike."""
    found: list[list[Cost]] = [[] for _ in works]
    for _ in range(rounds):
        for costs, work in zip(found, works, strict=True):
            costs.append(work())
    return [best(costs) for costs in found]


class Folder:
    """A folder for databases, one file for each measurement."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made = 0

    def new(self) -> Path:
        """Name a file that does not exist."""
        self._made += 1
        return self.path / f"{self._made}.db"


def heading(text: str) -> None:
    print(f"\n{text}", flush=True)


def row(
    name: str, our: float, beside: float | None, unit: str, *, target: str = "", reached: bool | None = None
) -> None:
    """Print a figure, the bare one, the ratio, the target and whether it is reached."""
    theirs = f"{beside:>10.2f} {our / beside:>7.2f}x" if beside else f"{'':>10} {'':>8}"
    verdict = "" if reached is None else ("reached" if reached else "NOT REACHED")
    print(f"  {name:<44}{our:>10.2f}{theirs}  {unit:<9} {target:<22} {verdict}".rstrip(), flush=True)


def columns() -> None:
    print(f"  {'':<44}{'ours':>10}{'bare':>10} {'ratio':>8}  {'unit':<9} {'target':<22}")
