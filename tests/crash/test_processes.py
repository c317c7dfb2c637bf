"""What a tool has started ends with its call: on a cancel, a timeout, Ctrl-C, and when the call is over. Nothing else.

Processes are counted in the kernel's list, by a word in their command lines.
"""

# ruff: noqa: ASYNC110
# The kernel tells nobody when a process appears in its list.

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import harness
from harness import AgentConfig, AgentRuntime, Cancelled, Finished, SQLiteCheckpointStore, tool
from harness.errors import ToolError
from harness.records import ToolFinished
from harness.testing import ScriptedLLM, call
from harness.tools import run_process

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]

RUN = "run"
LIBRARY = str(Path(harness.__file__).parent.parent)
TREE = 'sleep {0} & (setsid sleep {0} &) ; sh -c "trap : TERM INT; sleep {0} & wait" & sleep {0}'
"""A shell with a child, a grandchild that has left its session and its parent, and one that does not heed signals."""


def alive(word: str) -> list[str]:
    """The command lines of processes that hold a word; ended ones hold none."""
    found: list[str] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if word in line and line.startswith("sleep"):
                found.append(line)
    return found


async def until(count: int, word: str) -> None:
    async with asyncio.timeout(20):
        while len(alive(word)) != count:
            await asyncio.sleep(0.01)


@pytest.fixture
def word() -> str:
    """Seconds to sleep that nobody else sleeps."""
    return f"1000.{secrets.randbelow(10**9):09}"


@pytest.fixture
def bystander(word: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of somebody else's, with the same command line."""
    process = subprocess.Popen(["sleep", f"{word}1"])
    yield process
    assert process.poll() is None, "somebody else's process was killed"
    process.kill()
    process.wait()


# -- a program by itself -----------------------------------------------------------------------------------------------


async def test_what_a_program_says_and_how_it_ends() -> None:
    done = await run_process("sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.exit_code, done.stdout, done.stderr, done.cut) == (3, "out\n", "err\n", False)
    assert (await run_process("sh", "-c", "kill -9 $$")).exit_code == -9
    assert (await run_process("cat")).stdout == "", "it has no input"
    assert (await run_process("printf", "\\377")).stdout == "\ufffd"
    assert (await run_process("sh", "-c", "echo $HOME:$THIS", env={"THIS": "that"})).stdout == ":that\n"


async def test_a_program_that_cannot_be_started_is_said_so(tmp_path: Path) -> None:
    for words, cwd in ((("no-such-program",), None), ((), None), (("a\0b",), None), (("true",), tmp_path / "gone")):
        with pytest.raises(ToolError, match="cannot run"):
            await run_process(*words, cwd=cwd)


async def test_output_is_kept_up_to_a_limit_and_the_program_goes_on(tmp_path: Path) -> None:
    line = "head -c 3000000 /dev/zero | tr '\\0' x; head -c 5 /dev/zero | tr '\\0' y >&2; touch done"
    done = await run_process("sh", "-c", line, cwd=tmp_path, max_bytes=1000)
    assert (done.stdout, done.stderr, done.cut) == ("x" * 1000, "y" * 5, True)
    assert (tmp_path / "done").exists()


async def test_what_a_program_leaves_behind_ends_with_it_and_does_not_hold_the_call(
    word: str, bystander: subprocess.Popen[bytes]
) -> None:
    begun = time.monotonic()
    done = await run_process("sh", "-c", f"sleep {word} & (setsid sleep {word} &) ; echo out")
    assert done.stdout == "out\n"
    assert time.monotonic() - begun < 20, "a grandchild that holds the pipe holds nobody"
    assert alive(f"{word} ") == []


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_no_file_of_this_process_stays_open() -> None:
    await run_process("true")
    before = open_files()
    for _ in range(5):
        await run_process("true")
        with pytest.raises(ToolError):
            await run_process("no-such-program")
        with pytest.raises(ToolError, match="cannot run 'echo'"):
            await run_process("echo", 5)  # type: ignore[arg-type]  # as a careless tool does
    assert open_files() == before


async def test_many_at_once_end_alone(word: str) -> None:
    stays = asyncio.create_task(run_process("sleep", word))
    await until(1, word)
    outs = await asyncio.gather(*(run_process("echo", str(n)) for n in range(8)))
    assert [done.stdout for done in outs] == [f"{n}\n" for n in range(8)]
    assert len(alive(word)) == 1
    stays.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stays
    assert alive(word) == [], "it is gone when the cancelled call is"


async def test_a_program_that_runs_programs_by_these_means_takes_all_of_them_along(word: str) -> None:
    inner = (
        "import asyncio, sys; from harness.tools import run_process; "
        f"asyncio.run(run_process('sh', '-c', '(setsid sleep {word} &) ; sleep {word}'))"
    )
    outer = asyncio.create_task(
        run_process(sys.executable, "-c", inner, env={**os.environ, "PYTHONPATH": LIBRARY})
    )  # fmt: skip
    await until(2, word)
    outer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await outer
    assert alive(word) == []


async def test_a_process_that_is_forked_off_ends_nothing(word: str) -> None:
    line = f"""
import asyncio, os, sys
from harness.tools import run_process

async def main():
    task = asyncio.create_task(run_process("sleep", "{word}"))
    await asyncio.sleep(0.2)
    child = os.fork()
    if child == 0:
        from harness.tools.process import end_all
        end_all()
        os._exit(0)
    os.waitpid(child, 0)
    await asyncio.sleep(0.1)
    print(task.done())

asyncio.run(main())
"""
    done = await run_process(sys.executable, "-c", line, env={**os.environ, "PYTHONPATH": LIBRARY})
    assert (done.stdout, done.exit_code) == ("False\n", 0), done.stderr
    assert alive(word) == []


# -- a tool's call -----------------------------------------------------------------------------------------------------


CANCEL = """
import asyncio, sys
from harness import AgentConfig, AgentRuntime, SQLiteCheckpointStore
from harness.testing import ScriptedLLM

async def main():
    store = SQLiteCheckpointStore(sys.argv[1])
    runtime = AgentRuntime(llm=ScriptedLLM([]), agents=[AgentConfig("x")], checkpoint_store=store, auto_resume=False)
    await runtime.cancel("run", "from elsewhere")
    await store.close()
asyncio.run(main())
"""


def runtime_of(store: SQLiteCheckpointStore, word: str, timeout_s: float = 120.0) -> AgentRuntime:
    @tool(timeout_s=timeout_s)
    async def build() -> str:
        """Build it."""
        return (await run_process("sh", "-c", TREE.format(word))).stdout

    return AgentRuntime(
        llm=ScriptedLLM([call("build"), "Done."]),
        agents=[AgentConfig("clerk")],
        tools=[build],
        checkpoint_store=store,
        auto_resume=False,
    )


async def test_a_cancel_from_another_process_ends_the_whole_tree(
    word: str, bystander: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    running = asyncio.create_task(runtime_of(store, word).run_agent("clerk", "Go.", run_id=RUN))
    await until(4, f"{word} ")
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CANCEL, str(tmp_path / "runs.db"), env={**os.environ, "PYTHONPATH": LIBRARY}
    )
    assert await other.wait() == 0
    assert isinstance(await asyncio.wait_for(running, 20), Cancelled)
    assert alive(f"{word} ") == [], "they are gone by the time the run says that it is cancelled"
    await store.close()


async def test_a_tool_that_takes_too_long_is_ended_with_its_tree(
    word: str, bystander: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    begun = time.monotonic()
    result = await runtime_of(store, word, timeout_s=1.0).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished)
    assert time.monotonic() - begun < 20
    [finished] = [entry.record for entry in result.trace if isinstance(entry.record, ToolFinished)]
    assert "did not end within 1 s" in finished.text
    assert alive(f"{word} ") == []
    await store.close()


SCRIPT = """
import asyncio, sys
from harness import AgentConfig, AgentRuntime, SQLiteCheckpointStore
from harness.testing import ScriptedLLM, call
from harness.tools import run_process

async def build() -> str:
    "Build it."
    return (await run_process("sh", "-c", sys.argv[2])).stdout

store = SQLiteCheckpointStore(sys.argv[1])
llm = ScriptedLLM([call("build"), "Done."])
runtime = AgentRuntime(llm=llm, agents=[AgentConfig("clerk")], tools=[build], checkpoint_store=store, auto_resume=False)
runtime.run_sync(runtime.run_agent("clerk", "Go.", run_id="run"))
"""


async def test_ctrl_c_in_a_script_ends_the_tree(word: str, bystander: subprocess.Popen[bytes], tmp_path: Path) -> None:
    script = [sys.executable, "-c", SCRIPT, str(tmp_path / "runs.db"), TREE.format(word)]
    process = await asyncio.create_subprocess_exec(
        *script, env={**os.environ, "PYTHONPATH": LIBRARY}, stderr=subprocess.DEVNULL
    )
    await until(4, f"{word} ")
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), 20) != 0
    assert alive(f"{word} ") == []
