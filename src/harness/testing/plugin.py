"""The kill sweep for pytest: ``pytest_plugins = ["harness.testing.plugin"]`` in the top conftest.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.testing import sweep
from harness.testing.forkserver import ForkServer
from harness.testing.sweep import StoreFactory, SweepReport, Workload, sqlite_store

KillSweep = Callable[..., SweepReport]

_REPORTS = pytest.StashKey[list[SweepReport]]()


@pytest.fixture(scope="session")
def fork_servers() -> Iterator[list[ForkServer]]:
    """Two servers that fork real processes, for the whole session."""
    with ForkServer() as first, ForkServer() as second:
        yield [first, second]


@pytest.fixture
def kill_sweep(pytestconfig: pytest.Config, tmp_path: Path, fork_servers: list[ForkServer]) -> KillSweep:
    """Kill a workload at every point; see ``harness.testing.kill_sweep``. The counts are printed at the end."""
    reports = pytestconfig.stash.setdefault(_REPORTS, [])

    def sweep_here(
        workload: Workload,
        *,
        store: StoreFactory = sqlite_store,
        kill_every: int = 1,
        kill_again_every: int = 0,
        at_risk: int = 1,
    ) -> SweepReport:
        report = sweep.kill_sweep(
            workload,
            store=store,
            folder=tmp_path / f"{workload.__name__}-{store.__name__}",
            servers=fork_servers,
            kill_every=kill_every,
            kill_again_every=kill_again_every,
            at_risk=at_risk,
        )
        reports.append(report)
        return report

    return sweep_here


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what the sweeps counted."""
    reports = config.stash.get(_REPORTS, None)
    if reports:
        terminalreporter.section("kill sweeps")
        for report in reports:
            terminalreporter.write_line(str(report))
