"""A script that uses the library is interrupted: it is out in time, says how to go on, and that line works."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness import RunQuery, SQLiteCheckpointStore
from harness.fold import fold
from harness.records import Entry, LLMFinished, RunFinished
from harness.testing import RecordingTool

pytestmark = pytest.mark.timeout(120)

PROGRAM = Path(__file__).with_name("program.py")
HINT = "Run interrupted — checkpoint saved."


class Script:
    """The script at work, in a process group of its own."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, line: str) -> None:
        assert self.process.stdout is not None
        for seen in self.process.stdout:
            if seen.strip() == line:
                return
        raise AssertionError(self.process.communicate()[1])

    def send(self, number: signal.Signals, *, within_s: float) -> str:
        """Send a signal; return what it wrote to stderr until it ended, which it has to in time."""
        self.process.send_signal(number)
        return self.end(within_s)

    def end(self, within_s: float) -> str:
        begun = time.monotonic()
        try:
            _, errors = self.process.communicate(timeout=within_s + 10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        took = time.monotonic() - begun
        assert took < within_s, f"it took {took:.1f} s: {errors}"
        with pytest.raises(ProcessLookupError):  # nothing of its process group is left
            os.killpg(self.process.pid, 0)
        return errors


def journal(folder: Path) -> list[Entry]:
    async def read() -> list[Entry]:
        store = SQLiteCheckpointStore(folder / "runs.db")
        try:
            runs = [run async for run in store.runs(RunQuery())]
            return [entry async for entry in store.read(runs[0].run_id)] if runs else []
        finally:
            await store.close()

    return asyncio.run(read()) if (folder / "runs.db").exists() else []


def resume(errors: str) -> str:
    """Run the printed line as a person would, and return what the script prints."""
    line = re.search(r"^Resume: (python .* --resume \S+)$", errors, re.MULTILINE)
    assert line, errors
    _, *words = shlex.split(line[1])
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_counts(folder: Path, before: list[Entry], calls: int) -> None:
    """No recorded model call was sent again, and no effect happened twice."""
    answered = {entry.record.response_id for entry in before if isinstance(entry.record, LLMFinished)}
    again = (folder / "llm.log").read_text().split()[calls:]
    assert not answered & set(again)
    assert set(Counter(key for _, key, _ in RecordingTool("log", folder / "effects.log").effects()).values()) == {1}


def interrupt(entry: str, folder: Path, after_s: float) -> bool:
    """Interrupt the script at an instant and go on with it; returns whether there was a run to go on with."""
    folder.mkdir()
    script = Script(str(folder), entry, "quick")
    script.wait_for("ready")
    time.sleep(after_s)
    errors = script.send(signal.SIGINT, within_s=2.0)
    before = journal(folder)
    unfinished = bool(before) and not isinstance(before[-1].record, RunFinished)
    assert errors.count(HINT) == unfinished, errors
    if not unfinished:
        return False
    assert fold(before[0].run_id, before).failed is None
    calls = len((folder / "llm.log").read_text().split())
    assert f"answer: All is done. run: {before[0].run_id}" in resume(errors)
    check_counts(folder, before, calls)
    return True


def test_ctrl_c_at_any_instant(tmp_path: Path) -> None:
    instants = random.Random(7)
    cases = [(["agent", "stream"][n % 2], tmp_path / str(n), instants.uniform(0, 0.25)) for n in range(20)]
    with ThreadPoolExecutor(2) as threads:
        resumed = list(threads.map(interrupt, *zip(*cases, strict=True)))
    assert any(resumed[::2])
    assert any(resumed[1::2])


@pytest.mark.parametrize("entry", ["agent", "stream"])
def test_ctrl_c_while_a_blocking_tool_holds_its_thread(entry: str, tmp_path: Path) -> None:
    script = Script(str(tmp_path), entry, "blocks")
    script.wait_for("ready")
    wait_for_effects(tmp_path, 1)
    errors = script.send(signal.SIGINT, within_s=2.0)
    assert errors.count(HINT) == 1, errors
    assert [e.record.index for e in journal(tmp_path) if type(e.record).__name__ == "ToolStarted"] == [0, 1]


def test_ctrl_c_while_a_tool_ignores_its_cancellation(tmp_path: Path) -> None:
    script = Script(str(tmp_path), "agent", "stubborn")
    script.wait_for("ready")
    wait_for_effects(tmp_path, 1)
    errors = script.send(signal.SIGINT, within_s=2.0)
    assert errors.count(HINT) == 1, errors
    assert "answer: All is done." in resume(errors)


def test_ctrl_c_twice_forces_out_a_tool_that_will_never_stop(tmp_path: Path) -> None:
    """At its end asyncio.run waits for every task, so a script needs a second Ctrl-C; the hint comes with the first."""
    script = Script(str(tmp_path), "agent", "unstoppable")
    script.wait_for("ready")
    wait_for_effects(tmp_path, 1)
    script.process.send_signal(signal.SIGINT)
    assert script.process.stderr is not None
    begun = time.monotonic()
    while (line := script.process.stderr.readline()) and HINT not in line:
        pass
    assert HINT in line
    assert time.monotonic() - begun < 2.0
    time.sleep(0.05)
    script.send(signal.SIGINT, within_s=2.0)


def test_a_script_may_ignore_resume(tmp_path: Path) -> None:
    script = Script(str(tmp_path), "agent", "quick")
    script.wait_for("ready")
    wait_for_effects(tmp_path, 2)
    errors = script.send(signal.SIGINT, within_s=2.0)
    run_id = journal(tmp_path)[0].run_id
    other = Script(str(tmp_path), "no-auto-resume", "quick", "--resume", run_id)
    other.wait_for("ready")
    assert other.process.stdout is not None
    assert run_id not in other.process.stdout.read()
    other.end(5)
    assert run_id in resume(errors)


def test_sigterm_kills_and_the_next_process_takes_over_at_once(tmp_path: Path) -> None:
    script = Script(str(tmp_path), "agent", "quick")
    script.wait_for("ready")
    wait_for_effects(tmp_path, 3)
    errors = script.send(signal.SIGTERM, within_s=2.0)
    assert (script.process.returncode, errors) == (-signal.SIGTERM, "")
    before = journal(tmp_path)
    calls = len((tmp_path / "llm.log").read_text().split())
    begun = time.monotonic()
    assert "All is done." in resume(f"Resume: python {PROGRAM} {tmp_path} agent quick --resume {before[0].run_id}")
    assert time.monotonic() - begun < 10  # far less than a lease
    check_counts(tmp_path, before, calls)


def wait_for_effects(folder: Path, count: int) -> None:
    end = time.monotonic() + 20
    tool = RecordingTool("log", folder / "effects.log")
    while len(tool.effects()) < count:
        assert time.monotonic() < end
        time.sleep(0.002)
