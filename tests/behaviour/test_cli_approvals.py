"""People in the loop of the command line: real processes, a real terminal, a real model server."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import pty
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyte
import pytest

from harness import SQLiteCheckpointStore
from harness.cli import config, trust
from harness.mailbox import Answer

HARNESS = [sys.executable, "-c", "from harness.cli import main; main()"]
SCREENS = Path(__file__).parent / "golden_screens"
PROMPT = "Approve? [y/n/a/e/correction]:"

TOOLS = """
import pathlib, time

def send(to: str, text: str) -> str:
    "Send a text."
    with pathlib.Path("calls").open("a") as file:
        file.write(f"{to}: {text}\\n")
    return f"sent to {to}"

def slow() -> str:
    "Take a long time."
    pathlib.Path("at-work").touch()
    time.sleep(60)
    return "late"

def look(what: str) -> str:
    "Look until it is told to stop."
    pathlib.Path("looking").touch()
    until = time.monotonic() + 10
    while time.monotonic() < until and not pathlib.Path("go").exists():
        time.sleep(0.02)
    return f"nothing at {what}"
"""

CONFIG = """
[llm]
protocol = "native"

[agents.worker]
prompt = "Work."
tools = ["mytools:send", "mytools:slow", "mytools:look"]
hitl_tools = ["send"]
"""

SEND = [("send", {"to": "ann", "text": "hi"})]

Calls = list[tuple[str, dict[str, object]]]
Say = Callable[[list[dict[str, str]]], "str | Calls"]


class Model(ThreadingHTTPServer):
    """An OpenAI-compatible server; a function says what it replies to a conversation."""

    daemon_threads = True

    def __init__(self, say: Say) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.say = say
        self.asked: list[list[dict[str, str]]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Model

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send("application/json", json.dumps({"data": [{"id": "tiny-1"}]}))

    def do_POST(self) -> None:
        messages = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"]
        self.server.asked.append(messages)
        reply = self.server.say(messages)
        calls = reply if isinstance(reply, list) else []
        delta: dict[str, object] = {"role": "assistant", "content": None if calls else reply}
        if calls:
            delta["tool_calls"] = [
                {"index": i, "id": f"c{i}", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
                for i, (n, a) in enumerate(calls)
            ]
        common = {"id": "r", "object": "chat.completion.chunk", "created": 1, "model": "tiny-1"}
        chunks = [
            {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
            {**common, "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if calls else "stop"}]},
            {**common, "choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}},
        ]
        self._send("text/event-stream", "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n")

    def _send(self, kind: str, body: str) -> None:
        data = body.encode()
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def script(*replies: str | Calls) -> Say:
    """Reply by how often the assistant has spoken in the conversation."""
    return lambda messages: replies[sum(message["role"] == "assistant" for message in messages)]


Serve = Callable[[Say], Model]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[Model] = []

    def make(say: Say) -> Model:
        server = Model(say)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def harness(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*HARNESS, *words], capture_output=True, text=True, timeout=30, check=False, env={**os.environ, **env}
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*HARNESS, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "mytools.py").write_text(TOOLS)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.delenv("EDITOR", raising=False)
    configure(folder, CONFIG)
    return folder


def configure(project: Path, text: str) -> None:
    path = project / "harness.toml"
    path.write_text(text)
    trust.remember(config.read(path).digest)


def calls(project: Path) -> str:
    path = project / "calls"
    return path.read_text() if path.exists() else ""


def wait_for(done: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until
        time.sleep(0.02)


class Terminal:
    """A pseudo-terminal with a command on it."""

    def __init__(self, *words: str, width: int = 100, **env: str) -> None:
        self.screen = pyte.Screen(width, 60)
        self._stream = pyte.ByteStream(self.screen)
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            size = {"TERM": "xterm-256color", "COLUMNS": str(width), "LINES": "60"}
            os.execve(sys.executable, [*HARNESS, *words], {**os.environ, **size, **env})

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
            self._stream.feed(data)

    def sees(self, text: str, times: int = 1) -> None:
        self.read_until(lambda: self.text.count(text) >= times)
        assert self.text.count(text) >= times, self.text

    def end(self) -> int:
        self.read_until(lambda: False)
        assert self.echoes  # the terminal is left as it was found
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._fd)[3] & termios.ECHO)

    def press(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).strip()


def run_at_terminal(server: Model, run_id: str, *words: str) -> Terminal:
    terminal = Terminal("run", "work", "--llm", server.url, "--run-id", run_id, *words)
    terminal.sees(PROMPT)
    return terminal


def same_screen(name: str, terminal: Terminal) -> None:
    """Compare what is on the screen, below the header, with the file of that name."""
    text = terminal.text
    text = text[text.index("├─ ") :]
    for pattern, stand_in in (
        (r"digest=[0-9a-f]{12}", "digest=DIGEST"),
        (r"\d+\.\d s", "TIME s"),
        (rf"console:{re.escape(getpass.getuser())}\b", "console:ME"),
    ):
        text = re.sub(pattern, stand_in, text)
    path = SCREENS / f"{name}.txt"
    if os.environ.get("HARNESS_UPDATE_SCREENS"):
        SCREENS.mkdir(exist_ok=True)
        path.write_text(f"{text}\n")
    assert f"{text}\n" == path.read_text()


# -- answers at the terminal --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys", "called", "seen_by_the_model"),
    [
        ("once", b"y\n", "ann: hi\n", ["sent to ann"]),
        ("session", b"a\n", "ann: hi\n", ["sent to ann"]),
        ("rejected", b"n\n", "", ["Tool rejected by human: no reason given"]),
        ("rejected_with_reason", b"no: not on a Friday\n", "", ["Tool rejected by human: not on a Friday"]),
        ("steered", b"Write to bob.\n", "", ["Human guidance: Write to bob."]),
    ],
)
def test_an_answer_at_the_terminal(
    name: str, keys: bytes, called: str, seen_by_the_model: list[str], serve: Serve, project: Path
) -> None:
    server = serve(script(SEND, "All done."))
    terminal = run_at_terminal(server, "asked")
    assert "Ctrl-C pauses" not in terminal.text  # nothing moves while somebody is asked
    terminal.press(keys)
    assert terminal.end() == 0, terminal.text
    same_screen(name, terminal)
    assert calls(project) == called
    told = json.dumps(server.asked[-1])
    assert all(text in told for text in seen_by_the_model)


LIMITED = f"{CONFIG}\n[budget]\nmax_llm_calls = 1\non_limit = 'ask'\n".replace('hitl_tools = ["send"]\n', "")
RAISE = "Raise the limit? [y/n/e/why not]:"


@pytest.mark.parametrize(
    ("name", "keys", "code", "asked"),
    [
        ("raised", b"y\n", 0, 2),
        ("not_raised", b"n: too dear\n", 4, 1),
        ("not_raised_for", b"Enough is known.\n", 4, 1),
    ],
)
def test_a_limit_is_raised_at_the_terminal(
    name: str, keys: bytes, code: int, asked: int, serve: Serve, project: Path
) -> None:
    configure(project, LIMITED)
    server = serve(script(SEND, "All done."))
    terminal = Terminal("run", "work", "--llm", server.url, "--run-id", name)
    terminal.sees(RAISE)
    terminal.press(keys)
    assert terminal.end() == code, terminal.text
    same_screen(name, terminal)
    assert len(server.asked) == asked


def test_a_limit_is_raised_to_what_is_typed(serve: Serve, project: Path) -> None:
    configure(project, LIMITED)
    server = serve(script(SEND, "All done."))
    terminal = Terminal("run", "work", "--llm", server.url, "--run-id", "typed")
    terminal.sees(RAISE)
    terminal.press(b"e\n")
    terminal.sees("Type the arguments as JSON")
    terminal.press(b'{"raise_to": 1}\n')
    terminal.sees(RAISE, 2)
    assert "raise_to must be more than" in terminal.text
    terminal.press(b"e\n")
    terminal.sees("Type the arguments as JSON", 2)
    terminal.press(b'{"raise_to": 9}\n')
    assert terminal.end() == 0, terminal.text
    assert "to 9 · " in terminal.text


def test_a_limit_is_raised_from_elsewhere(serve: Serve, project: Path) -> None:
    configure(project, LIMITED)
    server = serve(script(SEND, "All done."))
    parked = harness("run", "work", "--llm", server.url, "--run-id", "far")
    assert parked.returncode == 3, parked.stderr
    listed = harness("runs", "--status", "waiting").stdout
    approval_id = re.search(r"\[budget ([0-9a-f]{8})\]", listed)
    assert approval_id is not None, listed
    assert f"harness approve far:worker {approval_id[1]} --yes" in parked.stderr
    shown = harness("approve", "far").stdout
    assert "Tool: budget" in shown
    assert "Why: max_llm_calls=1 is reached" in shown
    assert "(--yes | --no [REASON] | --edit FILE)" in shown
    (project / "edit.json").write_text('{"raise_to": 1}')
    wrong = harness("approve", "far", "--edit", "edit.json")
    assert wrong.returncode == 2
    assert "raise_to must be more than the limit of 1" in wrong.stderr
    (project / "edit.json").write_text('{"raise_to": 7}')
    assert "raised to what was written" in harness("approve", "far", "--edit", "edit.json").stdout
    done = harness("resume", "far")
    assert done.returncode == 0, done.stderr
    assert calls(project) == "ann: hi\n"
    assert len(server.asked) == 2, "no call was paid twice"
    told = harness("show", "far").stdout
    assert "is max_llm_calls raised from 1 to 2?" in told
    assert "to 7 · " in told


def test_what_is_allowed_for_the_session_is_asked_once(serve: Serve, project: Path) -> None:
    server = serve(script(SEND, [("send", {"to": "bob", "text": "ho"})], "All done."))
    terminal = run_at_terminal(server, "twice")
    terminal.press(b"a\n")
    assert terminal.end() == 0, terminal.text
    assert terminal.text.count(PROMPT) == 1
    assert calls(project) == "ann: hi\nbob: ho\n"


def test_arguments_are_edited_in_an_editor(serve: Serve, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = project / "edit.py"
    editor.write_text(
        "import pathlib, sys\n"
        "path, count = pathlib.Path(sys.argv[1]), pathlib.Path('edits')\n"
        "text = path.read_text()\n"
        "first = not count.exists()\n"
        "count.touch()\n"
        "wrong, right = text.replace('\"to\"', '\"whom\"'), text.replace('whom', 'to').replace('ann', 'bob')\n"
        "path.write_text(wrong if first else right)\n"
    )
    monkeypatch.setenv("EDITOR", f"{sys.executable} {editor}")
    server = serve(script(SEND, "All done."))
    terminal = run_at_terminal(server, "edited")
    terminal.press(b"e\n")
    terminal.sees(PROMPT, 2)  # the first edit does not fit the tool
    assert "what was edited does not fit" in terminal.text
    terminal.press(b"e\n")
    assert terminal.end() == 0, terminal.text
    assert calls(project) == "bob: hi\n"
    assert "approved by console:" in terminal.text
    assert "A human changed the arguments" in json.dumps(server.asked[-1])


def test_ctrl_c_at_the_prompt_pauses_and_the_resume_asks_the_same(serve: Serve, project: Path) -> None:
    server = serve(script(SEND, "All done."))
    terminal = run_at_terminal(server, "paused")
    before = banner_on(terminal)
    terminal.press(b"\x03")
    assert terminal.end() == 130
    assert terminal.text.count("Run interrupted — checkpoint saved.\nResume: harness resume paused:worker") == 1
    assert "answered elsewhere" not in terminal.text
    same_screen("paused", terminal)
    again = Terminal("resume", "paused:worker")
    again.sees(PROMPT)
    assert banner_on(again) == before
    again.press(b"y\n")
    assert again.end() == 0, again.text
    assert len(server.asked) == 2  # no call was paid twice
    assert calls(project) == "ann: hi\n"


def banner_on(terminal: Terminal) -> str:
    found = re.search(r"──── HITL Approval Required.*?correction\]:", terminal.text, re.DOTALL)
    assert found, terminal.text
    return found[0]


def test_the_end_of_the_file_parks(serve: Serve, project: Path) -> None:
    terminal = run_at_terminal(serve(script(SEND, "All done.")), "parked")
    terminal.press(b"\n")
    terminal.sees(PROMPT, 2)
    terminal.press(b"\x04")
    assert terminal.end() == 3
    assert "harness approve parked:worker " in terminal.text
    same_screen("parked", terminal)
    assert calls(project) == ""


def test_agents_at_work_at_the_same_time_are_asked_about_one_after_the_other(serve: Serve, project: Path) -> None:
    def say(messages: list[dict[str, str]]) -> str | Calls:
        text = json.dumps(messages)
        if "Bring their results" in text:
            return json.dumps({"answer": "Both.", "confidence": 0.9, "conflicts": [], "unknowns": []})
        name = "ann" if "Write to ann" in text else "bob"
        return "Done." if messages[-1]["role"] == "tool" else [("send", {"to": name, "text": "hi"})]

    (project / "plan.toml").write_text(
        "".join(
            f'[[tasks]]\nid = "{name}"\nagent = "worker"\ninstruction = "Write to {name}."\n' for name in ("ann", "bob")
        )
    )
    server = serve(say)
    terminal = Terminal("run", "--plan", "plan.toml", "--llm", server.url, "--run-id", "both")
    terminal.sees(PROMPT)
    time.sleep(0.5)
    assert terminal.text.count(PROMPT) == 1
    terminal.press(b"n: no\ny\n")  # what is pasted after an answer answers no later question
    terminal.sees(PROMPT, 2)
    terminal.press(b"y\n")
    assert terminal.end() == 0, terminal.text
    assert len(calls(project).splitlines()) == 1
    assert "Run: both\n" in terminal.text  # the key of the whole run


# -- answers from elsewhere ---------------------------------------------------------------------


def test_another_process_answers_while_the_prompt_is_open(serve: Serve, project: Path) -> None:
    terminal = run_at_terminal(serve(script(SEND, "All done.")), "open")
    done = harness("approve", "open", "--yes")
    assert done.returncode == 0, done.stderr
    assert "approved once · " in done.stdout
    assert "The run is being driven" in done.stdout
    assert terminal.end() == 0, terminal.text
    assert "answered elsewhere" in terminal.text
    assert "approved once by " in terminal.text
    assert calls(project) == "ann: hi\n"


def test_an_answer_after_the_process_is_gone(serve: Serve, project: Path) -> None:
    terminal = run_at_terminal(serve(script(SEND, "All done.")), "gone")
    os.kill(terminal.pid, 9)
    terminal.end()
    listed = harness("approve", "gone")
    assert listed.returncode == 0, listed.stderr
    (approval_id,) = re.findall(r"^ID: (\w+)", listed.stdout, re.MULTILINE)
    assert PROMPT not in listed.stdout
    assert '"text": "hi"' in listed.stdout
    done = harness("approve", "gone", approval_id, "--say", "Write to bob.")
    assert done.stdout == f"answered · {approval_id}\nResume: harness resume gone:worker\n"
    again = harness("approve", "gone", "--yes")
    assert (again.returncode, "was answered by" in again.stderr) == (2, True)
    assert "has not taken the answer yet" in harness("approve", "gone").stdout
    resumed = harness("resume", "gone")
    assert resumed.returncode == 0, resumed.stderr
    assert "Write to bob." in resumed.stdout
    assert calls(project) == ""


def forge(run_id: str, approval_id: str) -> None:
    """Answer as somebody does who can write to the store and has no key."""

    async def post() -> None:
        store = SQLiteCheckpointStore(Path(os.environ["HARNESS_HOME"]) / "runs.db")
        await store.post(run_id, Answer(approval_id, "reject", "eve", "0" * 64))
        await store.close()

    asyncio.run(post())


@pytest.mark.parametrize("driven", [False, True], ids=["parked", "driven"])
def test_a_forged_answer_keeps_nobody_from_answering(driven: bool, serve: Serve, project: Path) -> None:
    server = serve(script(SEND, "All done."))
    if driven:
        terminal = run_at_terminal(server, "job")
        os.kill(terminal.pid, signal.SIGSTOP)  # its driver does not look into the mailbox before all is there
    else:
        assert harness("run", "work", "--llm", server.url, "--run-id", "job").returncode == 3
    question = json.loads(harness("approve", "job", "--json").stdout)
    forge("job", question["approval_id"])
    assert json.loads(harness("approve", "job", "--json").stdout) == {**question, "answered_by": None}
    done = harness("approve", "job", "--yes")
    assert done.returncode == 0, done.stderr
    assert json.loads(harness("approve", "job", "--json").stdout)["answered_by"] == getpass.getuser()
    again = harness("approve", "job", "--no")
    assert (again.returncode, f"was answered by {getpass.getuser()}" in again.stderr) == (2, True)
    if driven:
        os.kill(terminal.pid, signal.SIGCONT)
        assert terminal.end() == 0, terminal.text
    else:
        resumed = harness("resume", "job")
        assert resumed.returncode == 0, resumed.stderr
    assert calls(project) == "ann: hi\n"
    shown = harness("show", "job").stdout
    refused = shown.index("a command was refused: the answer is not signed with this installation's key")
    assert refused < shown.index(f"approved once by {getpass.getuser()}")


def test_without_a_terminal_the_run_parks_and_names_the_commands(serve: Serve, project: Path) -> None:
    server = serve(script(SEND, "All done."))
    parked = harness("run", "work", "--llm", server.url, "--run-id", "job")
    assert parked.returncode == 3
    (line,) = re.findall(r"^Approve: (harness approve job:worker (\w+) --yes)$", parked.stderr, re.MULTILINE)
    assert f'{line[1]}  send {{"to": "ann", "text": "hi"}}' in parked.stderr
    assert "Resume: harness resume job:worker" in parked.stderr
    assert "send waits for approval" in parked.stdout
    (listed,) = [json.loads(line) for line in harness("runs", "--json", "--status", "waiting").stdout.splitlines()]
    assert listed["waiting"] == [{"approval_id": line[1], "kind": "tool", "tool": "send"}]
    assert f"waiting  worker  0 s  [send {line[1]}] work" in re.sub(r"\d+ s", "0 s", harness("runs").stdout)
    assert harness("resume", "job").returncode == 3  # nobody has answered
    assert harness(*line[0].split()[1:]).returncode == 0
    done = harness("resume", "job")
    assert (done.returncode, calls(project)) == (0, "ann: hi\n")
    shown = harness("show", "job").stdout
    assert f"approved once by {getpass.getuser()} · {line[1]}" in shown
    assert shown.count("parked: waits for 1 answer") == 2


def test_park_asks_nobody_on_a_terminal_either(serve: Serve, project: Path) -> None:
    terminal = Terminal("run", "work", "--llm", serve(script(SEND)).url, "--park", "--run-id", "later")
    assert terminal.end() == 3
    assert PROMPT not in terminal.text
    assert "harness approve later:worker" in terminal.text


def test_json_tells_programs_the_same(serve: Serve, project: Path) -> None:
    done = harness("run", "work", "--llm", serve(script(SEND, "Done.")).url, "--json", "--run-id", "machine")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 3
    asked = next(event["payload"] for event in events if event["type"] == "APPROVAL_REQUESTED")
    assert (asked["tool"], asked["args"], asked["session"]) == ("send", {"to": "ann", "text": "hi"}, ["send"])
    assert events[-1]["type"] == "PARKED"
    (question,) = [json.loads(line) for line in harness("approve", "machine", "--json").stdout.splitlines()]
    assert question["approval_id"] == asked["approval_id"] == events[-1]["payload"]["waiting"][0]
    answered = json.loads(harness("approve", "machine", "--no", "too late", "--json").stdout)
    assert answered == {
        "key": "machine:worker",
        "approval_id": asked["approval_id"],
        "said": "rejected",
        "driven": False,
        "resume": "harness resume machine:worker",
    }
    assert harness("resume", "machine").returncode == 0
    (resolved,) = [
        event["payload"]
        for event in map(json.loads, harness("show", "machine", "--json").stdout.splitlines())
        if event["type"] == "APPROVAL_RESOLVED"
    ]
    assert (resolved["decision"], resolved["text"], resolved["by"]) == ("reject", "too late", getpass.getuser())


def test_edited_arguments_come_from_a_file(serve: Serve, project: Path) -> None:
    harness("run", "work", "--llm", serve(script(SEND, "Done.")).url, "--run-id", "file")
    (project / "args.json").write_text('{"to": "eve", "text": "hi"}')
    assert harness("approve", "file", "--edit", "args.json").returncode == 0
    assert harness("resume", "file").returncode == 0
    assert calls(project) == "eve: hi\n"


# -- steering and cancelling --------------------------------------------------------------------


def test_a_line_typed_while_a_run_works_steers_it(serve: Serve, project: Path) -> None:
    server = serve(script([("look", {"what": "the log"})], "All done."))
    terminal = Terminal("run", "work", "--llm", server.url, "--run-id", "typed", width=140)
    terminal.sees("a line + Enter steers · Ctrl-C pauses")
    wait_for((project / "looking").exists)
    terminal.press(b"Look at the disk, too.\n")
    terminal.sees("sent to the run: Look at the disk, too.")
    (project / "go").touch()
    assert terminal.end() == 0, terminal.text
    assert f"guidance from {getpass.getuser()}: Look at the disk, too." in terminal.text
    assert "Human guidance: Look at the disk, too." in json.dumps(server.asked[-1])


def test_another_process_steers_and_cancels(serve: Serve, project: Path) -> None:
    server = serve(script([("look", {"what": "the log"})], [("slow", {})]))
    process = start("run", "work", "--llm", server.url, "--run-id", "told")
    wait_for((project / "looking").exists)
    done = harness("steer", "told", "Hurry up.", "--agent", "worker")
    assert done.stdout == "guidance sent\nThe run is being driven: the process that does so takes it up.\n"
    time.sleep(1.5)  # a run at work looks into its mailbox once a second
    (project / "go").touch()
    wait_for((project / "at-work").exists)
    assert "Human guidance: Hurry up." in json.dumps(server.asked[-1])
    ended = harness("cancel", "told", "--reason", "not needed")
    assert (ended.returncode, ended.stdout) == (0, "cancelled: told:worker\n"), ended.stderr
    out, err = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "cancelled: not needed" in out
    assert "Run cancelled: not needed" in err
    assert harness("resume", "told").returncode == 1
    assert re.search(r"^told +cancelled", harness("runs").stdout, re.MULTILINE)


def test_another_process_cancels_while_the_prompt_is_open(serve: Serve, project: Path) -> None:
    terminal = run_at_terminal(serve(script(SEND)), "ended")
    assert harness("cancel", "ended", "--reason", "not needed").returncode == 0
    assert terminal.end() == 1
    assert f"{PROMPT}\n│  ! cancelled: not needed\n" in terminal.text
    assert "answered elsewhere" not in terminal.text


def test_a_waiting_run_is_cancelled_without_being_driven(serve: Serve, project: Path) -> None:
    harness("run", "work", "--llm", serve(script(SEND)).url, "--run-id", "idle")
    assert json.loads(harness("cancel", "idle", "--json").stdout) == {"key": "idle:worker", "cancelled": True}
    shown = harness("show", "idle")
    assert "Run cancelled" in shown.stderr
    assert "waits for approval.\n" not in shown.stderr
    late = harness("approve", "idle", "--yes")
    assert (late.returncode, "is over" in late.stderr) == (2, True)


# -- in doubt, plans, policies ------------------------------------------------------------------


def test_a_call_in_doubt_is_asked_about(serve: Serve, project: Path) -> None:
    server = serve(script([("slow", {})], "All done."))
    process = start("run", "work", "--llm", server.url, "--run-id", "doubt")
    wait_for((project / "at-work").exists)
    process.kill()
    process.communicate()
    terminal = Terminal("resume", "doubt")
    terminal.sees("Run it again? [y/n/what came of it]:")
    assert "it may or may not have had its effect" in re.sub(r"\s+", " ", terminal.text)
    terminal.press(b"It was half done.\n")
    assert terminal.end() == 0, terminal.text
    assert "a human says what came of it: It was half done." in json.dumps(server.asked[-1])


def test_a_call_in_doubt_is_answered_from_elsewhere(serve: Serve, project: Path) -> None:
    server = serve(script([("slow", {})], "All done."))
    configure(project, CONFIG.replace('hitl_tools = ["send"]', ""))  # where nobody is here, nothing is gated
    process = start("run", "work", "--llm", server.url, "--run-id", "doubt")
    wait_for((project / "at-work").exists)
    process.kill()
    process.communicate()
    terminal = Terminal("resume", "doubt")
    terminal.sees("Run it again? [y/n/what came of it]:")
    terminal.press(b"\x04")
    assert terminal.end() == 3
    assert harness("audit", "verify", "doubt").returncode == 0
    assert harness("approve", "doubt", "--say", "It was half done.").returncode == 0
    done = harness("resume", "doubt")
    assert done.returncode == 0, done.stdout
    assert "a human says what came of it: It was half done." in json.dumps(server.asked[-1])
    assert harness("audit", "verify", "doubt").returncode == 0


def test_a_plan_waits_for_a_yes(serve: Serve, project: Path) -> None:
    configure(project, f"approve_plans = true\n{CONFIG}")
    (project / "plan.toml").write_text('[[tasks]]\nid = "one"\nagent = "worker"\ninstruction = "Tell."\n')

    server = serve(lambda messages: json.dumps({"answer": "Told.", "confidence": 1, "conflicts": [], "unknowns": []}))
    terminal = Terminal("run", "--plan", "plan.toml", "--llm", server.url, "--run-id", "planned")
    terminal.sees("Approve? [y/n/e/correction]:")
    assert "  one · agent worker · on failure replan · retries 1\n      Tell.\n" in terminal.text
    assert server.asked == []
    terminal.press(b"y\n")
    assert terminal.end() == 0, terminal.text
    assert server.asked


def test_a_policy_of_the_project_holds_calls_back(serve: Serve, project: Path) -> None:
    (project / "policy.toml").write_text('[rules.no-mail]\naction = "forbid"\ntool = "send"\nreason = "no mail"\n')
    (project / "harness.toml").write_text(f'policy = "policy.toml"\n{CONFIG}')
    refused = harness("run", "work", "--llm", "http://127.0.0.1:9/v1#m")
    assert (refused.returncode, "the policy 'policy.toml'" in refused.stderr) == (2, True)
    done = harness("run", "work", "--llm", serve(script(SEND, "Done.")).url, "--trust")
    assert done.returncode == 0, done.stderr
    assert "Tool rejected by policy: no mail" in done.stdout
    assert calls(project) == ""


def test_ask_holds_a_tool_back_and_the_resume_remembers(serve: Serve, project: Path) -> None:
    (project / "go").touch()
    server = serve(script([("look", {"what": "a"})], [("look", {"what": "b"})], "Done."))
    first = harness("run", "work", "--llm", server.url, "--ask", "look", "--ask", "slow", "--run-id", "held")
    assert (first.returncode, "look waits for approval" in first.stdout) == (3, True)
    harness("approve", "held", "--yes")
    second = harness("resume", "held")
    assert (second.returncode, "look waits for approval" in second.stdout) == (3, True)


def test_a_question_that_expires_counts_as_a_no(serve: Serve, project: Path) -> None:
    configure(project, f"answer_within_s = 0.5\n{CONFIG}")
    terminal = Terminal("run", "work", "--llm", serve(script(SEND, "Done.")).url)
    terminal.sees(PROMPT)
    assert "Until: " in terminal.text
    assert terminal.end() == 0, terminal.text
    assert "too late to answer" in terminal.text
    assert "nobody answered in time: rejected" in terminal.text
    assert calls(project) == ""


# -- the audit ----------------------------------------------------------------------------------


def test_the_audit_holds_and_notices_what_was_changed(serve: Serve, project: Path) -> None:
    harness("run", "work", "--llm", serve(script(SEND, "Done.")).url, "--run-id", "kept")
    harness("approve", "kept", "--no", "never again")
    harness("resume", "kept")
    good = harness("audit", "verify", "kept")
    assert (good.returncode, good.stdout) == (0, "intact: kept:worker, 2 links\n"), good.stderr
    database = Path(os.environ["HARNESS_HOME"]) / "runs.db"
    backup = database.with_name("backup.db")
    shutil.copy(database, backup)
    assert change(database, b"never again", b"all is fine") > 0
    bad = harness("audit", "verify", "kept", "--json")
    told = json.loads(bad.stdout)
    assert (bad.returncode, told["ok"], told["links"]) == (1, False, 2)
    assert "vouches for another record" in told["problems"][0]
    assert "broken: kept:worker" in harness("audit", "verify", "kept").stdout


def test_a_chain_that_was_begun_at_a_terminal_goes_on_without_one(serve: Serve, project: Path) -> None:
    (project / "go").touch()
    configure(project, CONFIG.replace('hitl_tools = ["send"]', ""))
    server = serve(script([("look", {"what": "a"})], [("slow", {})], "Done."))
    terminal = Terminal("run", "work", "--llm", server.url, "--run-id", "chain")
    wait_for((project / "at-work").exists)
    assert not terminal.echoes  # the lower lines move, and what is typed would be drawn into them
    terminal.press(b"\x03")
    assert terminal.end() == 130
    assert harness("resume", "chain").returncode == 0
    checked = harness("audit", "verify", "chain")
    assert (checked.returncode, checked.stdout) == (0, "intact: chain:worker, 2 links\n")


def change(database: Path, old: bytes, new: bytes) -> int:
    """Change bytes in every value of every table."""
    changed = 0
    with sqlite3.connect(database) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            for column in columns:
                query = f"SELECT rowid, {column} FROM {table}"
                for rowid, value in connection.execute(query).fetchall():
                    data = value.encode() if isinstance(value, str) else value
                    if isinstance(data, bytes) and old in data:
                        data = data.replace(old, new)
                        data = data.decode() if isinstance(value, str) else data
                        connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (data, rowid))
                        changed += 1
    connection.close()
    return changed


def test_another_key_does_not_verify_and_does_not_answer(serve: Serve, project: Path) -> None:
    harness("run", "work", "--llm", serve(script(SEND, "Done.")).url, "--run-id", "keyed")
    assert harness("approve", "keyed", "--yes", HARNESS_APPROVAL_KEY="0" * 32).returncode == 0
    resumed = harness("resume", "keyed")
    assert resumed.returncode == 3
    assert "a command was refused: the answer is not signed with this installation's key" in resumed.stdout
    assert calls(project) == ""
    harness("approve", "keyed", "--yes")
    assert harness("resume", "keyed").returncode == 0
    assert harness("audit", "verify", "keyed", HARNESS_APPROVAL_KEY="0" * 32).returncode == 1


# -- wrong words --------------------------------------------------------------------------------


WRONG = [
    (["approve"], "KEY"),
    (["approve", "nope", "--yes"], "No checkpoint found for key='nope'"),
    (["approve", "w", "--yes", "--no"], "--yes and --no do not go together"),
    (["approve", "w", "zzz", "--yes"], "no question 'zzz' is open in run 'w'"),
    (["approve", "w", "--edit", "missing.json"], "missing.json"),
    (["approve", "w", "--edit", "mytools.py"], "mytools.py is no JSON"),
    (["approve", "w", "--say", " "], "--say is empty"),
    (["steer", "w", " "], "TEXT is empty"),
    (["steer", "w", "hi", "--agent", "nobody"], "no agent 'nobody' is at work in this run (at work: worker)"),
    (["steer", "nope", "hi"], "No checkpoint found for key='nope'"),
    (["cancel", "nope"], "No checkpoint found for key='nope'"),
    (["audit", "verify", "nope"], "No checkpoint found for key='nope'"),
    (["run", "x", "--llm", "http://127.0.0.1:9/v1#m", "--ask", "sned"], "did you mean 'send'?"),
]


def test_a_wrong_word_is_one_sentence_and_exit_code_2(serve: Serve, project: Path) -> None:
    assert harness("run", "work", "--llm", serve(script(SEND)).url, "--run-id", "w").returncode == 3
    for words, said in WRONG:
        done = harness(*words)
        assert (done.returncode, done.stdout) == (2, ""), (words, done.stderr)
        assert said in done.stderr


def test_hitl_tools_that_are_no_tools_are_refused_with_their_line(project: Path) -> None:
    configure(project, CONFIG.replace('["send"]', '["sned"]'))
    done = harness("run", "work", "--llm", "http://127.0.0.1:9/v1#m")
    assert done.returncode == 2
    assert "harness.toml:8: hitl_tools of agent 'worker' names 'sned', which is no tool of it" in done.stderr
    assert "did you mean 'send'?" in done.stderr
