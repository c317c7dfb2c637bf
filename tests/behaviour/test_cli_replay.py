"""`harness replay` and `harness fork --llm` as a person meets them: real processes, and a server that counts."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from llmock.pytest_plugin import LLMock

from harness import AgentConfig, AgentRuntime, OpenAILLM, SQLiteCheckpointStore, tool
from harness.events import EventType

HARNESS = [sys.executable, "-c", "from harness.cli import main; main()"]
SEALED = """
import sys

def deny(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen", "os.exec", "os.fork"):
        raise RuntimeError(f"a replay does {event}")

sys.addaudithook(deny)
from harness.cli import main
main()
"""
NOBODY = "http://127.0.0.1:9/v1"  # the discard port: whoever asks there is refused at once

Command = Callable[..., subprocess.CompletedProcess[str]]


def offline(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a process of its own that may reach nobody, start nothing and knows no key."""
    env = {**os.environ, "OPENAI_BASE_URL": NOBODY, "OPENAI_API_KEY": "", "HTTP_PROXY": NOBODY, "HTTPS_PROXY": NOBODY}
    words = (sys.executable, "-c", SEALED, *words)
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False, env=env)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def state() -> Path:
    """Where runs are kept: the top conftest gives each test a folder of its own."""
    return Path(os.environ["HARNESS_HOME"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "a.txt").write_text("forty-two\n")
    (folder / "b.txt").write_text("forty-three\n")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Command:
    """Run a command to its end in this process: the same, and much quicker."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        from harness.cli import main

        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["harness", *words])
            with pytest.raises(SystemExit) as left:
                main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return subprocess.CompletedProcess(words, int(left.value.code or 0), out, err)

    return run


def asking(llmock: LLMock, model: str = "model-a") -> list[str]:
    return ["--llm", f"{llmock.base_url()}#{model}", "--protocol", "native"]


def body(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what a run or a replay has printed after its header, which says how it stands."""
    lines = done.stdout.splitlines()
    return lines[next(place for place, line in enumerate(lines) if line.startswith("-- run ")) :]


def script(llmock: LLMock) -> None:
    llmock.call_tool("read_file", {"path": "a.txt"}).call_tool("read_file", {"path": "b.txt"}).reply("43 is more.")


def counts(llmock: LLMock) -> Counter[str | None]:
    return Counter(request.model for request in llmock.requests)


def contents(database: Path) -> list[str]:
    """Return everything a store holds, wherever in its files it lies."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        lines = [*connection.iterdump()]
    connection.close()
    return lines


# -- replay ------------------------------------------------------------------------------------------------------------


def test_a_replay_prints_what_the_run_has_printed_and_changes_no_byte(
    llmock: LLMock, command: Command, state: Path
) -> None:
    script(llmock)
    ran = command("run", "Which is more?", "--run-id", "r", *asking(llmock))
    assert ran.returncode == 0, ran.stderr
    llmock.outage()
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    done = offline("replay", "r")
    assert (done.returncode, done.stderr) == (0, "")
    assert body(done) == body(ran)
    assert done.stdout.splitlines()[0] == "goal: Which is more?"
    assert "run r:reader · finished · agent reader · model 127.0.0.1:model-a" in done.stdout
    assert "answer: 43 is more." in done.stdout
    assert command("replay", "r:reader", "--speed", "1000").stdout == done.stdout
    assert {path.name: path.read_bytes() for path in state.iterdir()} == before
    assert len(llmock.requests) == 3


def test_the_events_are_those_of_the_run(llmock: LLMock, command: Command) -> None:
    script(llmock)
    ran = command("run", "Which is more?", "--run-id", "r", "--json", *asking(llmock))
    done = command("replay", "r", "--json")
    assert done.stdout == ran.stdout
    types = [json.loads(line)["type"] for line in done.stdout.splitlines()]
    assert types == ["STARTED", *["THOUGHT", "ACTION", "OBSERVATION"] * 2, "THOUGHT", "TASK_DONE"]
    assert done.stderr == ""


PLAN = """
[[tasks]]
id = "one"
agent = "reader"
instruction = "Read one."

[[tasks]]
id = "two"
agent = "reader"
instruction = "Read two."
depends_on = ["one"]
"""


def test_a_plan_is_replayed_and_each_of_its_tasks(llmock: LLMock, command: Command, folder: Path) -> None:
    (folder / "plan.toml").write_text(PLAN)
    llmock.reply("One is read.").reply("Two is read.").reply('{"answer": "Both are read.", "confidence": 0.9}')
    ran = command("run", "--plan", "plan.toml", "--run-id", "p", *asking(llmock))
    assert ran.returncode == 0, ran.stderr
    done = command("replay", "p")
    assert body(done) == body(ran)
    assert "[two·reader] started: Read two." in done.stdout
    task = command("replay", "p:two:reader")
    assert task.returncode == 0
    assert "only task two" in task.stdout
    assert "Two is read." in task.stdout
    assert "[one·reader]" not in task.stdout
    assert "Task 'two' of agent 'reader' is done." in task.stderr


def test_a_waiting_run_and_a_failed_one_are_replayed_and_stay_as_they_are(llmock: LLMock, command: Command) -> None:
    script(llmock)
    ran = command("run", "Which?", "--run-id", "w", "--ask", "read_file", "--park", *asking(llmock))
    assert ran.returncode == 3
    done = command("replay", "w")
    assert done.returncode == 0
    assert body(done) == body(ran)
    assert "?? parked: waits for 1 answer" in done.stdout
    assert "Approve: harness approve w:reader" in done.stderr
    llmock.reset()
    llmock.fail(400, message="no such thing", times=None)
    ran = command("run", "Which?", "--run-id", "f", *asking(llmock))
    assert ran.returncode == 1
    done = command("replay", "f")
    assert done.returncode == 0
    assert body(done) == body(ran)
    assert done.stderr == ran.stderr
    stand = {run["run_id"]: run["status"] for run in map(json.loads, command("runs", "--json").stdout.splitlines())}
    assert stand == {"f": "failed", "w": "waiting"}


def test_a_killed_run_is_replayed_and_nothing_of_it_changes(llmock: LLMock, command: Command, state: Path) -> None:
    llmock.call_tool("read_file", {"path": "a.txt"}).stall(after_chunks=1, seconds=1)
    words = [*HARNESS, "run", "Which is more?", "--run-id", "k", *asking(llmock)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    shown: list[str] = []
    for line in process.stdout:
        shown.append(line.rstrip("\n"))
        if "forty-two" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = contents(state / "runs.db")
    done = command("replay", "k")
    assert (done.returncode, done.stderr) == (0, "")
    assert body(done)[: len(shown) - 2] == shown[2:]
    assert body(done)[-1].startswith("-- the journal ends here, after ")
    assert contents(state / "runs.db") == before
    assert "interrupted" in command("runs").stdout
    llmock.reset()
    llmock.reply("42.")
    went = command("resume", "k")
    assert went.returncode == 0, went.stderr
    assert body(command("replay", "k"))[:-1] == [*body(done)[:-1], *went.stdout.splitlines()[2:-1]]


def test_what_cannot_be_replayed_is_one_sentence(llmock: LLMock, command: Command, state: Path) -> None:
    for words, said in (
        (["replay", "nope"], "No checkpoint found for key='nope'"),
        (["replay"], "requires an argument"),
        (["replay", "x", "--speed", "-1"], "--speed must be 0 (at once) or more, not -1"),
        (["replay", "x", "--speed", "fast"], "fast"),
    ):
        done = command(*words)
        assert done.returncode == 2, words
        assert said in done.stderr
        assert done.stdout == ""
    assert not state.exists()  # looking makes no store


def test_on_a_terminal_it_is_the_tree(llmock: LLMock, command: Command) -> None:
    script(llmock)
    command("run", "Which is more?", "--run-id", "r", *asking(llmock))
    mine, theirs = pty.openpty()
    words = [*HARNESS, "replay", "r", "--speed", "10"]
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    seen = b""
    while select.select([mine], [], [], 20)[0]:
        try:
            more = os.read(mine, 65536)
        except OSError:
            break
        if not more:
            break
        seen += more
    os.close(mine)
    assert process.wait(10) == 0
    text = seen.decode()
    assert "Which is more?" in text
    assert "╰─ " in text
    assert "43 is more." in text
    assert "Ctrl-C pauses" not in text


# -- fork, and go on with another model --------------------------------------------------------------------------------


def test_a_fork_goes_on_with_another_model_and_the_steps_before_are_not_paid_again(
    llmock: LLMock, command: Command
) -> None:
    script(llmock)
    assert command("run", "Which is more?", "--run-id", "r", *asking(llmock, "model-a")).returncode == 0
    assert counts(llmock) == {"model-a": 3}
    done = command("fork", "r", "--at", "2", "--run-id", "f", "--llm", f"{llmock.base_url()}#model-b")
    assert (done.returncode, done.stdout) == (0, "f\nResume: harness resume f\n")
    assert counts(llmock) == {"model-a": 3}
    llmock.call_tool("read_file", {"path": "b.txt"}).reply("b.txt has more.")
    went = command("resume", "f")
    assert went.returncode == 0, went.stderr
    assert (
        "-- warning: changed since the run was last driven: the llm (127.0.0.1:model-a -> 127.0.0.1:model-b)"
        in went.stdout
    )
    assert "answer: b.txt has more." in went.stdout
    assert counts(llmock) == {"model-a": 3, "model-b": 2}
    assert "forked from r at step 2" in command("show", "f").stdout
    again = command("resume", "f")
    assert (again.returncode, again.stdout) == (0, "b.txt has more.\n")
    assert counts(llmock) == {"model-a": 3, "model-b": 2}
    assert "43 is more." in command("resume", "r").stdout  # the run it was copied from is what it was


def test_a_resume_with_another_model_says_so(llmock: LLMock, command: Command) -> None:
    llmock.fail(400)
    assert command("run", "Which?", "--run-id", "r", *asking(llmock, "model-a")).returncode == 1
    llmock.call_tool("read_file", {"path": "a.txt"}).reply("42.")
    went = command("resume", "r", "--llm", f"{llmock.base_url()}#model-b")
    assert went.returncode == 0, went.stderr
    assert "the llm (127.0.0.1:model-a -> 127.0.0.1:model-b)" in went.stdout
    assert counts(llmock) == {"model-a": 1, "model-b": 2}


def test_a_demo_is_forked_to_a_real_model(llmock: LLMock, command: Command) -> None:
    assert command("demo", "--fast", "--run-id", "d").returncode == 0
    done = command("fork", "d", "--at", "4", "--run-id", "f", *asking(llmock, "model-b"))
    assert done.returncode == 0, done.stderr
    llmock.reply("The disk was full.")
    went = command("resume", "f")
    assert "answer: The disk was full." in went.stdout
    assert "-> 127.0.0.1:model-b)" in went.stdout
    assert counts(llmock) == {"model-b": 1}


def test_a_model_that_cannot_be_had_is_refused_before_anything_is_copied(
    llmock: LLMock, command: Command, folder: Path
) -> None:
    script(llmock)
    command("run", "Which is more?", "--run-id", "r", *asking(llmock))
    for words, said in (
        (["--llm", "localhost:8080"], "write it with http://"),
        (["--llm", "ftp://x/v1"], "base URL"),
        (["--at", "9", "--llm", f"{llmock.base_url()}#b"], "steps 1 to 3"),
    ):
        done = command("fork", "r", "--run-id", "f", *words)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert said in done.stderr
    (folder / "job.py").write_text(
        "import asyncio\nfrom harness import AgentConfig, AgentRuntime\nfrom harness.testing import ScriptedLLM\n"
        "runtime = AgentRuntime(llm=ScriptedLLM(['Hello.']), agents=[AgentConfig('a')])\n"
        "asyncio.run(runtime.run_agent('a', 'Greet me.', run_id='s'))\n"
    )
    subprocess.run([sys.executable, "job.py"], check=True, timeout=30)
    done = command("fork", "s", "--llm", f"{llmock.base_url()}#b")
    assert (done.returncode, done.stdout) == (2, "")
    assert "was started by a script" in done.stderr
    assert [json.loads(line)["run_id"] for line in command("runs", "--json").stdout.splitlines()] == ["s", "r"]


async def test_a_fork_in_python_goes_on_with_the_model_of_the_runtime(llmock: LLMock, tmp_path: Path) -> None:
    looked: list[str] = []

    @tool(effect="once")
    def look(where: str) -> str:
        """Look somewhere."""
        looked.append(where)
        return f"nothing in {where}"

    models: list[OpenAILLM] = []

    def runtime(model: str) -> AgentRuntime:
        models.append(OpenAILLM(model=model, base_url=llmock.base_url(), api_key="k"))
        return AgentRuntime(llm=models[-1], agents=[AgentConfig("a")], tools=[look], checkpoint_store=store)

    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    llmock.call_tool("look", {"where": "here"}).call_tool("look", {"where": "there"}).reply("Nowhere.")
    first = await runtime("model-a").run_agent("a", "Find it.", run_id="r")
    assert counts(llmock) == {"model-a": 3}
    other = runtime("model-b")
    fork = await other.fork("r", at=2)
    llmock.call_tool("look", {"where": "under it"}).reply("Under it.")
    seen = [event async for event in other.resume_stream(fork)]
    assert seen[-1].payload["answer"] == "Under it."
    assert [event.payload["text"] for event in seen if event.type == EventType.WARNING] == [
        "changed since the run was last driven: the llm (127.0.0.1:model-a -> 127.0.0.1:model-b)"
    ]
    assert counts(llmock) == {"model-a": 3, "model-b": 2}
    assert looked == ["here", "there", "under it"]
    result = await other.resume(fork)
    assert result.spent.llm_calls == 2
    assert first.spent.llm_calls == 3
    for llm in models:
        await llm.aclose()
    await store.close()
