"""The command line as a person meets it: real processes, a real terminal, a real model server, real signals."""

from __future__ import annotations

import json
import os
import pty
import re
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyte
import pytest

from support.read_only import only_to_be_read, powerless

HARNESS = [sys.executable, "-c", "from harness.cli import main; main()"]
HINT = "Run interrupted — checkpoint saved."


def harness(*words: str, timeout: float = 30, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a process of its own."""
    done = subprocess.run(
        [*HARNESS, *words], capture_output=True, text=True, timeout=timeout, check=False, env={**os.environ, **env}
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command to its end in this process: the same but for signals, and much quicker."""

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        from harness.cli import main

        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["harness", *words])
            for name, value in env.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as left:
                main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return subprocess.CompletedProcess(words, int(left.value.code or 0), out, err)

    return run


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*HARNESS, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], mark: str) -> str:
    """Read stdout up to the line that holds ``mark``."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if mark in line:
            return seen
    raise AssertionError(f"the command ended without {mark!r}:\n{seen}\n{process.stderr and process.stderr.read()}")


def interrupt(process: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[int, str, float]:
    """Send a signal; return exit code, stderr and the seconds it took."""
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    return process.returncode, err, time.monotonic() - began


def key_in(text: str) -> str:
    found = re.search(r"harness resume (\S+)", text)
    assert found, text
    return found[1]


# -- a model server -----------------------------------------------------------------------------


class ModelServer(ThreadingHTTPServer):
    """An OpenAI-compatible server that replies from a script, chosen by the assistant messages it is sent."""

    daemon_threads = True

    def __init__(self, script: list[object]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.tells_usage = True
        self.asked: list[dict[str, object]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ModelServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send("application/json", json.dumps({"data": [{"id": "tiny-1"}, {"id": "tiny-2"}]}))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(asked)
        place = sum(1 for message in asked["messages"] if message["role"] == "assistant")
        reply = self.server.script[place]
        calls = reply if isinstance(reply, list) else []
        delta: dict[str, object] = {"role": "assistant", "content": None if calls else reply}
        if calls:
            delta["tool_calls"] = [
                {"index": i, "id": f"c{i}", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
                for i, (n, a) in enumerate(calls)
            ]
        common = {"id": "r", "object": "chat.completion.chunk", "created": 1, "model": asked["model"]}
        chunks = [
            {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
            {**common, "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if calls else "stop"}]},
            {**common, "choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}},
        ]
        told = chunks if self.server.tells_usage else chunks[:-1]
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in told) + "data: [DONE]\n\n"
        self._send("text/event-stream", body)

    def _send(self, kind: str, body: str) -> None:
        data = body.encode()
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def serve() -> Iterator[Callable[..., ModelServer]]:
    servers: list[ModelServer] = []

    def make(*script: object) -> ModelServer:
        server = ModelServer(list(script))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "answer.txt").write_text("The answer is 42.\n")
    monkeypatch.chdir(folder)
    return folder


# -- the first minute ---------------------------------------------------------------------------


def test_demo_answers_in_plain_lines_and_says_what_is_recorded() -> None:
    done = harness("demo", "--fast")
    assert done.returncode == 0, done.stderr
    assert "recording of Qwen2.5-Coder-1.5B-Instruct" in done.stdout
    assert "tools run for real" in done.stdout
    assert "no space left on device" in done.stdout  # read from the real file
    assert "answer: The nightly export" in done.stdout
    assert "unpriced" in done.stdout
    assert "$0" not in done.stdout
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout)


def test_demo_as_json_lines(command: Command) -> None:
    done = command("demo", "--fast", "--json", "--run-id", "mine")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert events[0]["type"] == "STARTED"
    assert events[-1]["type"] == "TASK_DONE"
    assert all(
        set(e) == {"type", "run_id", "agent_id", "scope", "parent", "seq", "timestamp", "payload"} for e in events
    )
    assert {e["run_id"] for e in events} == {"mine"}
    assert not any(e["type"] == "TOKEN" for e in events)

    shown = [json.loads(line) for line in command("show", "mine", "--json").stdout.splitlines()]
    assert shown == events

    (listed,) = [json.loads(line) for line in command("runs", "--json").stdout.splitlines()]
    assert (listed["run_id"], listed["status"], listed["agent_id"]) == ("mine", "finished", "reader")


def test_tokens_are_shown_on_request(command: Command) -> None:
    events = [json.loads(line) for line in command("demo", "--fast", "--json", "--tokens").stdout.splitlines()]
    text = "".join(e["payload"]["text"] for e in events if e["type"] == "TOKEN")
    assert "The nightly export of 14 March failed" in text


def test_runs_and_show_print_a_finished_run_and_resume_prints_its_answer(command: Command) -> None:
    command("demo", "--fast", "--run-id", "seen")
    assert re.search(r"^seen +finished +reader +\d+ s +Why did", command("runs").stdout, re.MULTILINE)
    shown = command("show", "seen:reader")
    assert shown.returncode == 0
    for part in ("run seen:reader", "finished", "[2] list_files", "tokens in", "answer: The nightly", "4 steps"):
        assert part in shown.stdout
    again = command("resume", "seen")
    assert (again.returncode, again.stdout.strip()) == (0, shown.stdout.split("answer: ")[1].splitlines()[0])


def test_run_finds_a_local_server_and_its_first_model(
    serve: Callable[..., ModelServer], project: Path, command: Command
) -> None:
    server = serve([("read_file", {"path": "answer.txt"})], "It is 42.")
    done = command("run", "What is the answer?", "--protocol", "native", OPENAI_BASE_URL=server.url)
    assert done.returncode == 0, done.stderr
    assert f"tiny-1 at {server.url} (native protocol)" in done.stdout
    assert "The answer is 42." in done.stdout
    assert "answer: It is 42." in done.stdout
    assert server.asked[0]["model"] == "tiny-1"


def test_a_local_server_is_asked_in_text_by_default(
    serve: Callable[..., ModelServer], project: Path, command: Command
) -> None:
    step = {"thought": "I know.", "action": "finish", "answer": "It is 42.", "confidence": 0.9}
    server = serve(json.dumps(step))
    done = command("run", "What is the answer?", "--llm", f"{server.url}#named")
    assert "(text protocol)" in done.stdout
    assert server.asked[0]["model"] == "named"
    assert "tools" not in server.asked[0]


def test_without_any_model_the_three_ways_are_named() -> None:
    done = harness("run", "anything")
    assert done.returncode == 2
    for part in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "--llm", "harness demo"):
        assert part in done.stderr
    assert done.stdout == ""


def test_a_server_that_does_not_answer_is_named(command: Command) -> None:
    done = command("run", "anything", "--llm", "http://127.0.0.1:9/v1")
    assert done.returncode == 1
    assert "no model server answers at 'http://127.0.0.1:9/v1'" in done.stderr


def test_importing_the_library_leaves_the_command_line_alone() -> None:
    loaded = "import sys, harness, harness.runtime; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in names if name.startswith(("harness.cli", "cyclopts", "rich"))]


# -- interrupted --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_names_the_resume_command(number: int) -> None:
    process = start("demo", "--tokens")
    read_until(process, "-- run ")
    code, err, took = interrupt(process, number)
    assert (code, err.count(HINT), err.count("Resume: ")) == (130, 1, 1), err
    assert took < 2
    done = harness("resume", key_in(err), "--json", "--fast")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert (events[0]["type"], events[-1]["type"]) == ("RESUMED", "TASK_DONE")


TOOLS = """
import asyncio, pathlib, time
from harness.tools import run_process

def mark() -> None:
    pathlib.Path("at-work").touch()

def sync_block() -> str:
    "Block a thread."
    mark(); time.sleep(60); return "late"

async def loop_block() -> str:
    "Block the event loop."
    mark(); time.sleep(60); return "late"

async def deaf() -> str:
    "Ignore being cancelled."
    mark()
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

async def programs() -> str:
    "Start programs."
    word = pathlib.Path("word").read_text()
    line = f"(setsid sleep {word} &) ; sleep {word} & touch at-work; sleep {word}"
    return (await run_process("sh", "-c", line)).stdout

async def programs_and_block() -> str:
    "Start programs, and block the event loop."
    working = asyncio.create_task(programs())
    while not pathlib.Path("at-work").exists():
        await asyncio.sleep(0.01)
    time.sleep(60)
    return await working

calls = pathlib.Path("calls")

def send(text: str) -> str:
    "Send a text."
    with calls.open("a") as file:
        file.write(text + "\\n")
    return "sent"
"""


def stuck(project: Path, tool: str) -> None:
    (project / "mytools.py").write_text(TOOLS)
    (project / "harness.toml").write_text(f'[agents.worker]\nprompt = "Work."\ntools = ["mytools:{tool}"]\n')
    assert harness("trust").returncode == 0


def wait_for(path: Path, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize("tool", ["sync_block", "loop_block", "deaf"])
def test_a_tool_that_will_not_stop_does_not_keep_the_process(
    tool: str, serve: Callable[..., ModelServer], project: Path
) -> None:
    stuck(project, tool)
    server = serve([(tool, {})], "done")
    process = start("run", "work", "--llm", server.url, "--protocol", "native")
    wait_for(project / "at-work")
    code, err, took = interrupt(process)
    assert (code, err.count(HINT), err.count("Resume: ")) == (130, 1, 1), err
    assert took < 2.2  # two seconds, and what a busy machine adds
    assert harness("show", key_in(err)).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("tool", ["programs", "programs_and_block"])
def test_what_tools_have_started_ends_with_the_run(tool: str, serve: Callable[..., ModelServer], project: Path) -> None:
    stuck(project, tool)
    word = f"1000.{secrets.randbelow(10**9):09}"  # seconds that nobody else sleeps
    (project / "word").write_text(word)
    process = start("run", "work", "--llm", serve([(tool, {})], "done").url, "--protocol", "native")
    wait_for(project / "at-work")
    code, err, _ = interrupt(process)
    assert (code, err.count(HINT)) == (130, 1), err
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if _says(path, f"sleep\0{word}\0")]


def _says(path: Path, line: str) -> bool:
    try:
        return path.read_bytes() == line.encode()
    except OSError:  # it has ended
        return False


def test_a_second_interrupt_ends_the_process_at_once(serve: Callable[..., ModelServer], project: Path) -> None:
    stuck(project, "deaf")
    process = start("run", "work", "--llm", serve([("deaf", {})]).url, "--protocol", "native")
    wait_for(project / "at-work")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    code, err, took = interrupt(process)
    assert (code, err.count(HINT)) == (130, 1), err
    assert took < 1


def test_killed_and_resumed_pays_no_call_twice_and_runs_no_tool_twice(
    serve: Callable[..., ModelServer], project: Path, command: Command
) -> None:
    (project / "mytools.py").write_text(TOOLS)
    (project / "harness.toml").write_text('[agents.worker]\ntools = ["mytools:send", "mytools:sync_block"]\n')
    command("trust")
    server = serve([("send", {"text": "one"})], [("sync_block", {})], "All done.")
    process = start("run", "work", "--llm", server.url, "--protocol", "native", "--run-id", "killed")
    wait_for(project / "at-work")
    process.kill()
    process.communicate()
    assert re.search(r"^killed +interrupted", command("runs").stdout, re.MULTILINE)
    paid = len(server.asked)
    done = command("resume")  # the only unfinished run
    assert done.returncode == 0, done.stderr
    assert "answer: All done." in done.stdout
    assert "unknown" in done.stdout  # the tool in doubt was not run again
    assert (project / "calls").read_text() == "one\n"
    assert (paid, len(server.asked)) == (2, 3)


def test_a_reader_that_goes_away_stops_the_run_without_a_traceback() -> None:
    process = start("demo")
    read_until(process, "-- run ")
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert err.count(HINT) == 1


# -- resumed, forked, limited -------------------------------------------------------------------


def in_shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run ``"$@" …`` in a shell, where ``"$@"`` is the command."""
    done = subprocess.run(["sh", "-c", line, "sh", *HARNESS], capture_output=True, text=True, timeout=30, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", ["demo --fast", "demo --fast --json", "runs --json", "--help"])
def test_a_full_disk_behind_stdout_is_one_sentence(words: str, command: Command) -> None:
    command("demo", "--fast", "--run-id", "before")
    done = in_shell(f'"$@" {words} >/dev/full')
    assert done.returncode == 1
    assert "harness: stdout cannot be written: No space left on device" in done.stderr


def test_a_closed_stream_is_no_mystery() -> None:
    done = in_shell('"$@" demo --fast >&-')
    assert (done.returncode, done.stderr) == (1, "harness: stdout is closed: there is nowhere to print to\n")
    assert in_shell('"$@" runs <&-').returncode == 0
    assert in_shell('"$@" show nope 2>&-').returncode == 2
    assert in_shell('"$@" runs <&- >&- 2>&-').returncode == 1


INTERRUPTED_IMPORT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "cyclopts":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from harness.cli import main
main()
"""


def test_ctrl_c_while_the_command_starts_ends_it_without_a_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def interrupted(run_id: str) -> None:
    process = start("demo", "--run-id", run_id)
    read_until(process, "-- run ")
    process.kill()
    process.communicate()


def test_which_run_a_resume_without_a_key_means(command: Command) -> None:
    none = command("resume")
    assert (none.returncode, "no unfinished run" in none.stderr) == (2, True)
    interrupted("first")
    interrupted("second")
    both = command("resume")
    assert both.returncode == 2
    assert "2 runs are unfinished" in both.stderr
    assert "first" in both.stderr
    assert "second" in both.stderr
    assert "run second" in command("show", "second").stdout
    last = command("resume", "--last", "--json", "--fast")
    assert json.loads(last.stdout.splitlines()[-1])["run_id"] == "second"
    assert command("resume", "--fast").returncode == 0  # one is left


def test_a_run_of_a_script_names_the_script(project: Path, command: Command) -> None:
    (project / "job.py").write_text(
        "import asyncio, os\n"
        "from harness import AgentConfig, AgentRuntime\n"
        "from harness.testing import ScriptedLLM\n"
        "runtime = AgentRuntime(llm=ScriptedLLM(lambda request: os._exit(9)), agents=[AgentConfig('a')])\n"
        "asyncio.run(runtime.run_agent('a', 'work', run_id='scripted'))\n"
    )
    subprocess.run([sys.executable, "job.py", "--fast"], check=False, timeout=30)
    done = command("resume", "scripted")
    assert done.returncode == 2
    assert f"cd {project} && python job.py --fast --resume scripted" in done.stderr
    assert done.stdout == ""


def test_a_fork_has_its_own_key_and_goes_on(command: Command) -> None:
    command("demo", "--fast", "--run-id", "whole")
    done = command("fork", "whole", "--at", "3")
    key, line = done.stdout.splitlines()
    assert line == f"Resume: harness resume {key}"
    went = command("resume", key)
    assert went.returncode == 0
    assert "[3]" in went.stdout
    assert "[2]" not in went.stdout
    assert "forked from whole at step 3" in command("show", key).stdout
    beyond = command("fork", "whole", "--at", "9")
    assert (beyond.returncode, "steps 1 to 4" in beyond.stderr) == (2, True)


def test_a_run_is_found_by_its_id_as_it_was_given(command: Command) -> None:
    command("demo", "--fast", "--run-id", "a:b")
    assert "run a%3Ab:reader" in command("show", "a:b").stdout
    assert "14 March" in command("resume", "a:b").stdout
    copy = command("fork", "a:b", "--run-id", "c:d").stdout
    assert "harness resume c%3Ad" in copy
    assert "14 March" in command("resume", "c:d", "--fast").stdout
    assert command("show", "a:other").returncode == 2


def test_a_long_key_does_not_widen_the_listing(command: Command) -> None:
    command("demo", "--fast", "--run-id", "k" * 60, "--max-steps", "1")
    listed = command("runs")
    assert f"{'k' * 39}…  failed" in listed.stdout
    assert "k" * 60 in command("runs", "--json").stdout
    assert "1 step ·" in command("show", "k" * 60).stdout


def test_a_spent_budget_is_exit_code_4_and_more_of_it_goes_on(command: Command) -> None:
    spent = command("demo", "--fast", "--max-seconds", "0", "--run-id", "poor")
    assert spent.returncode == 4
    assert "max_wall_time_seconds=0 is over" in spent.stderr
    assert "harness resume poor:reader --max-seconds MORE" in spent.stderr
    assert command("resume", "poor").returncode == 4
    assert command("resume", "poor", "--max-seconds", "60").returncode == 0


def test_what_is_charged_by_estimate_is_said_so(
    serve: Callable[..., ModelServer], project: Path, command: Command
) -> None:
    server = serve([("read_file", {"path": "answer.txt"})], "It is 42.")
    server.tells_usage = False
    words = ("--protocol", "native", "--run-id", "guessed", "--max-steps", "1")
    cut = command("run", "What?", *words, OPENAI_BASE_URL=server.url)
    assert "(1 call estimated)" in cut.stdout.splitlines()[-1]
    resumed = command("resume", "guessed", "--max-steps", "9", OPENAI_BASE_URL=server.url)
    assert resumed.returncode == 0, resumed.stderr
    assert "(2 calls estimated)" in resumed.stdout.splitlines()[-1]
    shown = command("show", "guessed").stdout
    assert "(2 calls estimated)" in shown.splitlines()[-1]
    assert shown.count(" out (estimated)") == 2
    server.tells_usage = True
    told = command("run", "What?", "--protocol", "native", "--run-id", "told", OPENAI_BASE_URL=server.url)
    assert "estimated" not in told.stdout


def test_a_run_that_fails_is_exit_code_1_and_is_resumed(command: Command) -> None:
    failed = command("demo", "--fast", "--max-steps", "1", "--run-id", "short")
    assert failed.returncode == 1
    assert "Run failed: no answer within max_steps=1" in failed.stderr
    assert command("resume", "short", "--max-steps", "9").returncode == 0


def test_a_resume_says_what_changed(serve: Callable[..., ModelServer], project: Path, command: Command) -> None:
    server = serve("", "", "", "")
    failed = command("run", "goal", "--llm", f"{server.url}#old", "--protocol", "native", "--run-id", "r")
    assert failed.returncode == 1
    other = serve("", "", "", "", "yes")
    done = command("resume", "r", "--llm", f"{other.url}#new", "--json")
    warnings = [e["payload"]["text"] for e in map(json.loads, done.stdout.splitlines()) if e["type"] == "WARNING"]
    assert any("the llm (" in text and "old -> " in text for text in warnings), done.stdout


# -- wrong words --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["frobnicate"], 'Unknown command "frobnicate"'),
        (["run", "hi", "--folde", "."], "--folder"),
        (["run", "hi", "--max-cost", "much"], "--max-cost"),
        (["run"], "GOAL"),
        (["run", " "], "say what to do"),
        (["run", "hi", "--agent", "raeder"], "unknown agent 'raeder'; did you mean 'reader'?"),
        (["run", "hi", "--folder", "/nowhere"], "an existing folder, not '/nowhere': No such file or directory\n"),
        (["run", "hi", "--config", "missing.toml"], "missing.toml"),
        (["run", "hi", "--llm", "ftp://x"], "must look like http://"),
        (["show", "nope"], "No checkpoint found for key='nope'"),
        (["resume", "nope"], "No checkpoint found for key='nope'"),
        (["fork", "nope"], "No checkpoint found for key='nope'"),
        (["resume", "nope", "--last"], "not both"),
        (["runs", "--limit", "0"], "--limit"),
        (["trust", "nowhere.toml"], "nowhere.toml"),
        (["demo", "--run-id", ""], "--run-id is empty"),
        (["run", "hi", "--run-id", " "], "--run-id is empty"),
        (["run", "f\udcfcr"], r"'f\udcfcr' is not UTF-8: write it in a terminal that is set to UTF-8"),
        (["show", "f\udcfcr"], "is not UTF-8"),
        (["doctor", "extra"], "doctor takes no words: 'extra'"),
        (["policy", "explain"], "See: harness policy explain --help"),
        (["steer", "policy"], "See: harness steer --help"),
        (["show", "a", "b"], "show takes no more words (put those that belong together in quotes): 'b'"),
    ],
)
def test_a_wrong_word_is_one_sentence_and_exit_code_2(words: list[str], said: str, command: Command) -> None:
    done = command(*words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert said in done.stderr
    assert done.stderr.startswith("harness: ")


def test_a_folder_whose_name_is_no_text_is_one_sentence_too(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "d\udcfcr"
    odd.mkdir()
    monkeypatch.chdir(odd)
    done = command("demo", "--fast")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("harness: the name of the working directory is not UTF-8")


def test_the_package_runs_as_the_command() -> None:
    words = [sys.executable, "-m", "harness", "runs", "--limit", "0"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, "--limit" in done.stderr) == (2, True)


def test_a_run_id_of_another_goal_is_refused(command: Command) -> None:
    command("demo", "--fast", "--run-id", "taken")
    done = command("run", "another", "--llm", "http://127.0.0.1:9/v1#m", "--run-id", "taken")
    assert (done.returncode, "'taken' names a run with another goal" in done.stderr) == (2, True)


def test_a_state_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    done = harness("demo", "--fast", HARNESS_HOME=str(file))
    assert done.returncode == 1
    assert str(file) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    for words in (("runs",), ("show", "x"), ("resume",), ("resume", "x"), ("fork", "x")):
        done = harness(*words, HARNESS_HOME=str(file / "below"))
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{str(file)!r} is no folder: set HARNESS_HOME to another folder, or move the file away" in done.stderr
    sick = harness("doctor", HARNESS_HOME=str(file))
    assert sick.returncode == 1
    assert "BAD state" in sick.stdout


def test_runs_that_may_only_be_read_are_listed_and_shown(command: Command) -> None:
    command("demo", "--fast", "--run-id", "seen")
    told = {words: command(*words).stdout for words in (("show", "seen"), ("replay", "seen"), ("runs", "--json"))}
    state = Path(os.environ["HARNESS_HOME"])
    main = "from harness.cli import main; main()"
    with only_to_be_read(state):
        for words, stdout in told.items():
            done = powerless(main, *words)
            assert (done.returncode, done.stdout) == (0, stdout), done.stderr
        refused = powerless(main, "fork", "seen", "--at", "2")
        files = [file.name for file in state.iterdir()]
    assert (refused.returncode, refused.stdout) == (1, "")
    assert re.fullmatch(r"harness: '.*runs\.db' cannot be opened for writing \(.*\): check its .*\n", refused.stderr)
    assert files == ["runs.db"]


def test_doctor_is_content_with_a_good_installation(command: Command) -> None:
    command("demo", "--fast")
    done = command("doctor")
    out = done.stdout
    assert done.returncode == 0, out
    assert [line[4:].split()[0] for line in out.splitlines()] == [
        "python",
        "state",
        "store",
        "llm",
        "extras",
        "terminal",
    ]
    assert "journal_mode=wal synchronous=2" in out
    assert "1 finished" in out


def test_a_store_that_is_no_store_is_one_sentence(command: Command) -> None:
    state = Path(os.environ["HARNESS_HOME"])
    state.mkdir(parents=True)
    (state / "runs.db").write_bytes(b"not a database " * 500)
    for words in (("runs",), ("show", "x"), ("demo", "--fast"), ("resume",)):
        done = command(*words)
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (1, 1), done.stderr
        assert "runs.db" in done.stderr
        assert "set HARNESS_HOME to another folder, or move the file away" in done.stderr
    assert "move the file away" in command("doctor").stdout


# -- a real terminal ----------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal with a command on it."""

    def __init__(self, *words: str, width: int = 100, run: list[str] = HARNESS, **env: str) -> None:
        self.screen = pyte.Screen(width, 50)
        self.raw = b""
        self._stream = pyte.ByteStream(self.screen)
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            size = {"TERM": "xterm-256color", "COLUMNS": str(width), "LINES": "50"}
            os.execve(sys.executable, [*run, *words], {**os.environ, **size, **env})

    def read_until(self, done: Callable[[], bool], seconds: float = 20) -> None:
        until = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < until, self.text
            if not select.select([self._fd], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(self._fd, 65536)
            except OSError:
                return
            if not data:
                return
            self.raw += data
            self._stream.feed(data)

    def end(self) -> int:
        self.read_until(lambda: False)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def press(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).strip()


def shown(*words: str) -> str:
    terminal = Terminal(*words)
    assert terminal.end() == 0, terminal.text
    return terminal.text


def test_the_live_tree() -> None:
    terminal = Terminal("demo")
    terminal.read_until(lambda: "Ctrl-C pauses" in terminal.text and "├─ 1" in terminal.text)
    assert re.search(r"· unpriced · \d+\.\d s · \w{12}", terminal.text), terminal.text
    terminal.press(b"\x03")
    code = terminal.end()
    assert code == 130
    assert "Ctrl-C pauses" not in terminal.text  # the footer is gone
    assert terminal.text.count(HINT) == 1
    assert not terminal.screen.cursor.hidden

    resumed = Terminal("resume", key_in(terminal.text), "--tokens", "--fast")
    assert resumed.end() == 0
    assert "╰─ The nightly export of 14 March failed" in resumed.text
    assert "confidence" in resumed.text
    assert re.search(rb"\x1b\[[0-9;]*3[0-7]m", resumed.raw)  # colour


def test_a_run_in_the_background_of_a_shell_is_not_stopped() -> None:
    shell = 'import subprocess, sys; sys.exit(subprocess.call(["bash", "-mc", sys.argv[1], "bash", *sys.argv[2:]]))'
    job = '"$@" & wait -n; echo "it ended with $?"; stty -a'
    terminal = Terminal(*HARNESS[1:], "demo", "--fast", run=[sys.executable, "-c", shell, job, sys.executable])
    assert terminal.end() == 0
    assert "╰─ The nightly export of 14 March failed" in terminal.text
    assert "it ended with 0" in terminal.text
    assert " echo " in terminal.text  # nothing was changed on the terminal of somebody else


def test_how_to_pause_is_seen_in_80_columns() -> None:
    terminal = Terminal("demo", "--run-id", "a-rather-long-id-of-a-run-that-has-no-room", width=80)
    terminal.read_until(lambda: "Ctrl-C pauses" in terminal.text)
    assert any(len(line) <= 80 and line.endswith("… · Ctrl-C pauses") for line in terminal.text.splitlines())
    terminal.press(b"\x03")
    assert terminal.end() == 130


def test_no_color_is_honoured_and_a_dumb_terminal_gets_plain_lines() -> None:
    terminal = Terminal("demo", "--fast", NO_COLOR="1")
    assert terminal.end() == 0
    assert not re.search(rb"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-7])m", terminal.raw)
    dumb = Terminal("demo", "--fast", TERM="dumb")
    assert dumb.end() == 0
    assert b"\x1b" not in dumb.raw
    assert "answer: The nightly" in dumb.text


def test_what_a_model_and_a_file_say_cannot_reach_the_terminal_raw(
    serve: Callable[..., ModelServer], project: Path
) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202egnp\u200b\x9b31m[bold]x[/bold]\r"
    (project / "evil.txt").write_text(evil)
    server = serve([("read_file", {"path": "evil.txt"})], f"It says {evil}!")
    terminal = Terminal("run", f"Read {evil}", "--llm", server.url, "--protocol", "native")
    assert terminal.end() == 0, terminal.text
    assert b"\x1b]0;" not in terminal.raw
    assert b"\x1b[2J" not in terminal.raw
    for char in ("\u202e", "\u200b", "\x9b"):
        assert char.encode() not in terminal.raw
    assert terminal.text.count(r"\x1b]0;owned\x07") >= 3  # goal, result, answer
    assert "[bold]x[/bold]" in terminal.text


def test_trust_is_asked_for_on_a_terminal(serve: Callable[..., ModelServer], project: Path) -> None:
    (project / "harness.toml").write_text(f'[llm]\nbase_url = "{serve("It is 42.").url}"\nprotocol = "native"\n')
    for answer, code in ((b"\n", 2), (b"y\n", 0)):
        terminal = Terminal("run", "What is the answer?")
        terminal.read_until(lambda terminal=terminal: "[y/N]" in terminal.text)
        terminal.press(answer)
        assert terminal.end() == code, terminal.text
    assert "It is 42." in shown("run", "What is the answer?")


def test_runs_is_a_table_on_a_terminal(command: Command) -> None:
    command("demo", "--fast", "--run-id", "one")
    assert re.search(r"one +finished +reader", shown("runs"))


def test_the_table_of_runs_can_be_read_in_40_columns(command: Command) -> None:
    command("demo", "--fast", "--run-id", "one")
    terminal = Terminal("runs", width=40)
    assert terminal.end() == 0
    heading, *goal = terminal.text.splitlines()
    assert re.fullmatch(r"one finished reader \d+ s", heading)
    assert goal == ["  Why did the nightly export of 14 March", "  fail? Read its log f…"]


def test_a_run_that_another_process_drives_is_left_to_it(command: Command) -> None:
    process = start("demo", "--run-id", "busy")
    read_until(process, "-- run ")
    done = command("resume", "busy")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert str(process.pid) in done.stderr
    assert "running" in command("runs").stdout
    process.kill()
    process.communicate()
