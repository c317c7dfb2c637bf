"""For pytest, the kill sweep and cassettes: ``pytest_plugins = ["harness.testing.plugin"]`` in the top conftest.py."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from harness.errors import ConfigError
from harness.testing import sweep
from harness.testing.asked import Scrub, unchanged
from harness.testing.cassette import CassetteLLM, RecordMode
from harness.testing.forkserver import ForkServer
from harness.testing.sweep import StoreFactory, SweepReport, Workload, sqlite_store

KillSweep = Callable[..., SweepReport]

RECORD_VARIABLE = "HARNESS_RECORD"
"""Records as ``--record`` does: ``1`` or ``always``; with ``missing``, only what a cassette lacks."""

_RECORD: dict[str, RecordMode] = {
    "": "never", "0": "never", "never": "never", "1": "always", "always": "always", "missing": "missing",
}  # fmt: skip

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


class MakeCassette(Protocol):
    """What the fixture ``cassette`` gives."""

    def __call__(self, llm: object = None, /, name: str = "", *, scrub: Scrub = unchanged) -> CassetteLLM:
        """Make a cassette in the test's file; another name is another file."""
        ...


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--record``."""
    text = "ask the real models, and record the cassettes of these tests anew"
    parser.getgroup("harness").addoption("--record", action="store_true", help=text)


@pytest.fixture
def cassette(request: pytest.FixtureRequest) -> MakeCassette:
    """Put a model on a cassette: ``cassette(llm)`` replays ``cassettes/<file>/<test>.json`` beside the test's file.

    With ``--record``, or ``HARNESS_RECORD=1``, the model is asked and the file written anew.
    """
    value = os.environ.get(RECORD_VARIABLE, "")
    if value not in _RECORD:
        raise ConfigError(f"{RECORD_VARIABLE} must be 1, always, missing or never, not {value!r}")
    record: RecordMode = "always" if request.config.getoption("--record", default=False) else _RECORD[value]
    folder, test = request.path.parent / "cassettes" / request.path.stem, request.node.nodeid.partition("::")[2]
    made: dict[str, CassetteLLM] = {}

    def make(llm: object = None, /, name: str = "", *, scrub: Scrub = unchanged) -> CassetteLLM:
        if name not in made:
            words = re.sub(r"[^\w.\[\]=-]+", "-", f"{test}{'.' if name else ''}{name}")
            path = folder / f"{words}.json"
            made[name] = CassetteLLM(path, llm, record="never" if llm is None else record, scrub=scrub)
        return made[name]

    return make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was counted."""
    lines = config.stash.get(_LINES, None)
    if lines:
        terminalreporter.section("counts")
        for line in lines:
            terminalreporter.write_line(line)
