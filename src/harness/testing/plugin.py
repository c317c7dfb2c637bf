"""The kill sweep for pytest: ``pytest_plugins = ["harness.testing.plugin"]`` in the top conftest.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.testing import sweep
from harness.testing.forkserver import ForkServer
from harness.testing.sweep import StoreFactory, SweepReport, Workload, sqlite_store

KillSweep = Callable[..., SweepReport]

_LINES = pytest.StashKey[list[str]]()


@pytest.fixture
def say_at_end(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Print a line when all tests are through, whether or not output is captured."""
    return pytestconfig.stash.setdefault(_LINES, []).append


@pytest.fixture(scope="session")
def fork_servers() -> Iterator[list[ForkServer]]:
    """Two servers that fork real processes, for the whole session."""
    with ForkServer() as first, ForkServer() as second:
        yield [first, second]


@pytest.fixture
def kill_sweep(say_at_end: Callable[[str], None], tmp_path: Path, fork_servers: list[ForkServer]) -> KillSweep:
    """Kill a workload at every point; see ``harness.testing.kill_sweep``. The counts are printed at the end."""

    def sweep_here(
        workload: Workload,
        *,
        store: StoreFactory = sqlite_store,
        kill_every: int = 1,
        kill_again_every: int = 0,
        at_risk: int = 1,
        varies: bool = False,
    ) -> SweepReport:
        report = sweep.kill_sweep(
            workload,
            store=store,
            folder=tmp_path / f"{workload.__name__}-{store.__name__}",
            servers=fork_servers,
            kill_every=kill_every,
            kill_again_every=kill_again_every,
            at_risk=at_risk,
            varies=varies,
        )
        say_at_end(str(report))
        return report

    return sweep_here


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was counted."""
    lines = config.stash.get(_LINES, None)
    if lines:
        terminalreporter.section("counts")
        for line in lines:
            terminalreporter.write_line(line)
