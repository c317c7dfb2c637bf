"""Runs with many agents on the command line: a real server, real processes, a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pyte
import pytest

from harness.cli.activity import Activity
from harness.events import Action, Observation, TaskDone, TaskStarted

HARNESS = [sys.executable, "-c", "from harness.cli import main; main()"]

CONFIG = """
[llm]
protocol = "native"

[agents.sre]
role = "finds causes"
tools = ["files"]
delegates = ["writer"]

[agents.writer]
role = "writes"
tools = []
"""

PLAN = {
    "rationale": "Two look, one writes.",
    "tasks": [
        {"id": "logs", "agent_id": "sre", "instruction": "Read the logs."},
        {"id": "metrics", "agent_id": "sre", "instruction": "Read the metrics."},
        {"id": "report", "agent_id": "writer", "instruction": "Write it up.", "depends_on": ["logs", "metrics"]},
    ],
}

BY_HAND = """
rationale = "One looks, one writes."

[[tasks]]
id = "logs"
agent = "sre"
instruction = "Read the logs."

[[tasks]]
id = "report"
agent_id = "writer"
instruction = "Write it up."
depends_on = ["logs"]
on_failure = "skip"
"""

BROUGHT = {
    "answer": "Two jobs ran at once.",
    "confidence": 0.8,
    "conflicts": ["02:10 or 02:12"],
    "unknowns": ["who owns job b"],
}


class Asked(NamedTuple):
    """What the model is asked: for what, the first words of the question, and how often it has replied."""

    what: str
    text: str
    replies: int
    body: dict[str, object]


Reply = str | dict[str, object] | list[tuple[str, dict[str, object]]] | int
"""A text, an object to write as one, tool calls, or an HTTP status."""


class Model(ThreadingHTTPServer):
    """An OpenAI-compatible server. A test puts a function in ``say``; what that leaves out is answered as below."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.asked: list[Asked] = []
        self.say: Callable[[Asked], Reply | None] = lambda asked: None

    def reply(self, asked: Asked) -> Reply:
        self.asked.append(asked)
        said = self.say(asked)
        if said is not None:
            return said
        defaults: dict[str, Reply] = {
            "classify": {"complexity": "complex", "rationale": "It takes several."},
            "route": {"agent_id": "sre", "rationale": "It finds causes."},
            "plan": PLAN,
            "synthesis": BROUGHT,
        }
        return defaults.get(asked.what, f"Done: {asked.text.splitlines()[0]}")

    def count(self, what: str, text: str = "") -> int:
        return sum(asked.what == what and asked.text.startswith(text) for asked in self.asked)


SITES = {
    "how a goal is worked on": "classify",
    "choose the agent": "route",
    "You plan": "plan",
    "Bring their results": "synthesis",
}


class _Handler(BaseHTTPRequestHandler):
    server: Model

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, "application/json", json.dumps({"data": [{"id": "tiny-1"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        system, *messages = body["messages"]
        what = next((site for words, site in SITES.items() if words in system["content"]), "step")
        users = [message["content"] for message in messages if message["role"] == "user"]
        replies = sum(message["role"] == "assistant" for message in messages)
        reply = self.server.reply(Asked(what, users[0], replies, body))
        if isinstance(reply, int):
            self._send(reply, "application/json", '{"error": {"message": "no such thing"}}')
            return
        calls = reply if isinstance(reply, list) else []
        text = json.dumps(reply) if isinstance(reply, dict) else reply
        delta: dict[str, object] = {"role": "assistant", "content": None if calls else text}
        if calls:
            delta["tool_calls"] = [
                {"index": i, "id": f"c{i}", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
                for i, (n, a) in enumerate(calls)
            ]
        common = {"id": "r", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        chunks = [
            {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
            {**common, "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if calls else "stop"}]},
            {**common, "choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}},
        ]
        lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        self._send(200, "text/event-stream", lines + "data: [DONE]\n\n")

    def _send(self, status: int, kind: str, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the command was stopped while it waited
            self.close_connection = True


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    server = Model()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "harness.toml").write_text(CONFIG)
    (folder / "plan.toml").write_text(BY_HAND)
    monkeypatch.chdir(folder)
    return folder


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], project: Path) -> Command:
    """Run a command to its end in this process."""

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


def events_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


# -- many agents --------------------------------------------------------------------------------


def test_with_several_agents_the_run_finds_out_who_works(model: Model, command: Command) -> None:
    done = command("run", "Why was it slow?", "--run-id", "many")
    assert done.returncode == 0, done.stderr
    for part in (
        "agents sre, writer",
        "-- run many\n",
        "-- dispatch · complex · a plan over several agents",
        "-- plan of 3 tasks",
        "   waiting   report   writer  ← logs, metrics · Write it up.",
        "[logs·sre] started: Read the logs.",
        "[metrics·sre] done · confidence 1.00 · 1 step",
        "[report·writer]   Done: Write it up.",
        "-- synthesis · confidence 0.80",
        "-- warning: conflict: 02:10 or 02:12",
        "-- open: who owns job b",
        "   report   writer  done · confidence 1.00 · 1 attempt",
        "answer: Two jobs ran at once.",
    ):
        assert part in done.stdout, part
    assert re.search(r"^many +finished +plan +\d+ s", command("runs").stdout, re.MULTILINE)
    (listed,) = events_of(command("runs", "--json"))
    assert (listed["key"], listed["agent_id"], listed["kind"]) == ("many", "", "plan")


def test_each_agent_is_asked_with_its_own_tools(model: Model, command: Command) -> None:
    command("run", "Why?")
    offered = {
        asked.text[:10]: {tool["function"]["name"] for tool in asked.body.get("tools", ())}  # type: ignore[attr-defined]
        for asked in model.asked
        if asked.what == "step"
    }
    assert offered["Read the l"] == {"list_files", "read_file", "search_files", "delegate_to_writer"}
    assert offered["Write it u"] == set()


def test_a_simple_goal_is_run_by_the_agent_that_is_chosen(model: Model, command: Command) -> None:
    model.say = lambda asked: {"classify": {"complexity": "simple"}, "route": {"agent_id": "nobody"}}.get(asked.what)
    done = command("run", "Greet me.", "--run-id", "one")
    assert done.returncode == 0
    assert "-- dispatch · simple · one agent" in done.stdout
    assert "-- route · sre" in done.stdout
    assert "-- warning: the router named 'nobody'" in done.stdout
    assert "answer: Done: Greet me." in done.stdout
    assert re.search(r"^one +finished +sre ", command("runs").stdout, re.MULTILINE)
    assert "run one:sre · finished · agent sre" in command("show", "one:sre").stdout
    assert command("resume", "one").stdout == "Done: Greet me.\n"


def test_one_agent_that_is_named_is_not_dispatched(model: Model, command: Command) -> None:
    done = command("run", "Why?", "--agent", "writer", "--run-id", "w")
    assert "-- run w:writer" in done.stdout
    assert [asked.what for asked in model.asked] == ["step"]


def test_json_lines_say_where_each_event_belongs(model: Model, command: Command) -> None:
    def say(asked: Asked) -> Reply | None:
        if asked.text.startswith("Read the logs") and not asked.replies:
            return [("delegate_to_writer", {"task": "Sum it up."})]
        return None

    model.say = say
    done = command("run", "Why?", "--json", "--run-id", "j")
    events = events_of(done)
    assert all({"scope", "parent"} <= set(event) for event in events)
    started = {str(event["scope"]): event for event in events if event["type"] == "TASK_STARTED"}
    inner = "logs/1/sre/delegate/1.0/writer"
    assert (started[inner]["parent"], started[inner]["agent_id"]) == ("logs/1/sre", "writer")
    assert started["report/1/writer"]["parent"] is None
    assert (events[0]["scope"], events[-1]["type"], events[-1]["scope"]) == ("", "DONE", "")
    assert events_of(command("show", "j", "--json")) == events
    assert {event["scope"] for event in events_of(command("show", "j:logs:sre", "--json"))} == {"logs/1/sre", inner}


def test_delegated_work_is_nested_below_who_gave_it(model: Model, command: Command) -> None:
    def say(asked: Asked) -> Reply | None:
        return [("delegate_to_writer", {"task": "Sum it up."})] if asked.text == "Why?" and not asked.replies else None

    model.say = say
    done = command("run", "Why?", "--agent", "sre", "--run-id", "nested")
    assert "[>writer]   started: Sum it up." in done.stdout
    assert "[>writer]     Done: Sum it up." in done.stdout
    assert done.stdout.index("[>writer]   done") < done.stdout.index("answer: Done: Why?")


# -- plans by hand ------------------------------------------------------------------------------


def test_a_plan_of_a_file_is_carried_out(model: Model, command: Command) -> None:
    done = command("run", "--plan", "plan.toml", "--run-id", "p")
    assert done.returncode == 0, done.stderr
    assert "goal: One looks, one writes." in done.stdout
    assert "report  writer  ← logs · Write it up." in done.stdout
    assert model.count("classify") == model.count("plan") == 0
    assert "goal: What happened?" in command("run", "What happened?", "--plan", "plan.toml").stdout
    again = command("run", "--plan", "plan.toml", "--run-id", "p")
    assert again.returncode == 0
    assert "answer: Two jobs ran at once." in again.stdout
    assert model.count("step") == 4  # two runs of two tasks: the third was over


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "bad.toml:1: a plan needs at least one task"),
        ("[[tasks]\n", "bad.toml:1: this is not TOML"),
        ("[[task]]\n", "bad.toml:1: unknown word 'task'; did you mean 'tasks'?"),
        ("rationale = 1\n", "bad.toml:1: rationale: input should be a valid string, not 1"),
        (BY_HAND.replace("agent_id", "agnt"), "bad.toml:11: unknown word 'agnt' in [[tasks]]; did you mean 'agent'?"),
        (BY_HAND.replace("agent_id", "agnt"), "bad.toml:9: [[tasks]] needs 'agent'"),
        (BY_HAND.replace('"skip"', '"skp"'), "bad.toml:14: tasks.on_failure: input should be 'retry', 'skip'"),
        (BY_HAND + "max_retries = -1\n", "bad.toml:15: tasks.max_retries: input should be greater"),
        (BY_HAND.replace('["logs"]', '["lgos"]'), "bad.toml:13: task 'report' depends on 'lgos'"),
        (BY_HAND.replace('["logs"]', '["lgos"]'), "did you mean 'logs'?"),
        (BY_HAND.replace('"report"', '"logs"'), "the id 'logs' is used twice"),
        (BY_HAND.replace('["logs"]', '["report"]'), "bad.toml:13: task 'report' depends on itself"),
        (
            BY_HAND.replace('logs."\n', 'logs."\ndepends_on = ["report"]\n'),
            "bad.toml:8: the tasks logs -> report -> logs depend on each other in a circle",
        ),
        (
            BY_HAND.replace('"writer"', '"writr"'),
            "bad.toml:11: task 'report' is for an unknown agent 'writr'; did you mean 'writer'?",
        ),
    ],
)
def test_a_wrong_plan_names_its_line_and_the_nearest_word(
    text: str, said: str, model: Model, project: Path, command: Command
) -> None:
    (project / "bad.toml").write_text(text)
    done = command("run", "--plan", "bad.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert not model.asked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--plan", "nope.toml"], "cannot read the plan 'nope.toml'"),
        (["--plan", "plan.toml", "--agent", "sre"], "--agent does not go with --plan"),
        (["again", "--plan", "plan.toml", "--continue", "last"], "--continue does not go with --plan"),
        (["again", "--continue", "nope"], "No checkpoint found for key='nope'"),
        (["again", "--continue", "last"], "there is no finished run to continue"),
        ([], 'harness run "GOAL"'),
    ],
)
def test_wrong_words_are_one_sentence(words: list[str], said: str, model: Model, command: Command) -> None:
    done = command("run", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


# -- how plans end ------------------------------------------------------------------------------


def test_a_replan_says_why_and_what_changed(model: Model, command: Command) -> None:
    again = {"tasks": [{"id": "fix", "agent_id": "writer", "instruction": "Do without.", "depends_on": ["logs"]}]}

    def say(asked: Asked) -> Reply | None:
        if asked.what == "plan" and "cannot go on" in asked.text:
            return again | {"rationale": "The logs will do."}
        return 400 if asked.text.startswith("Read the metrics") else None

    model.say = say
    done = command("run", "Why?", "--run-id", "re")
    assert done.returncode == 0, done.stderr
    for part in (
        "[metrics·sre] failed after 0 steps: ",
        "-- replan 1 · because of metrics",
        "no such thing",
        "-- The logs will do.",
        "   removed   metrics  sre     Read the metrics.",
        "   removed   report   writer  ← logs, metrics",
        "   added     fix  writer  ← logs · Do without.",
        "   kept      logs\n",
        "-- done · 2 tasks · 1 replan",
    ):
        assert part in done.stdout, part
    shown = command("show", "re").stdout
    assert "-- timings: 4 tasks, 2 of them replaced" in shown
    assert re.search(r"^ +replanned +metrics +sre +\+\d", shown, re.MULTILINE)
    assert re.search(r"^ +replanned +report +writer$", shown, re.MULTILINE)
    assert re.search(r"^ +done +fix +writer +\+\d+\.\d s +\d+\.\d s +15 ", shown, re.MULTILINE)


def test_what_is_skipped_doubtful_or_tried_again_is_seen(model: Model, project: Path, command: Command) -> None:
    text = """
    tasks = [
        {id = "bad", agent = "sre", instruction = "Fail.", on_failure = "retry"},
        {id = "after", agent = "writer", instruction = "Wait.", depends_on = ["bad"]},
        {id = "good", agent = "sre", instruction = "Work."},
    ]
    """
    (project / "mixed.toml").write_text(text)
    model.say = lambda asked: 400 if asked.text.startswith("Fail.") else "?" if asked.what == "synthesis" else None
    done = command("run", "Why?", "--plan", "mixed.toml", "--run-id", "m")
    assert done.returncode == 0, done.stderr
    assert "[bad·sre] started: attempt 2: Fail." in done.stdout
    assert "warning: task 'after' is skipped: it depends on 'bad', which was not done" in done.stdout
    assert "no synthesis could be had: the answer is the tasks' results, one after the other" in done.stdout
    assert re.search(r"^   bad    sre     failed · 2 attempts · the model call failed", done.stdout, re.MULTILINE)
    assert "   after  writer  skipped · it depends on 'bad'" in done.stdout
    shown = command("show", "m").stdout
    assert re.search(r"^ +state +task +agent +start +took +tries", shown, re.MULTILINE)
    assert re.search(r"^ +skipped +after +writer +it depends on 'bad', which was not done$", shown, re.MULTILINE)


def test_a_plan_that_cannot_be_had_and_a_task_that_must_not_fail_are_exit_code_1(
    model: Model, project: Path, command: Command
) -> None:
    model.say = lambda asked: "no plan" if asked.what == "plan" else None
    done = command("run", "Why?", "--run-id", "x")
    assert done.returncode == 1
    assert "Run failed: the planner gave no plan" in done.stderr
    assert "Resume: harness resume x\n" in done.stderr
    (project / "plan.toml").write_text(BY_HAND.replace('logs."', 'logs."\non_failure = "abort"'))
    model.say = lambda asked: 400
    done = command("run", "--plan", "plan.toml", "--run-id", "y")
    assert done.returncode == 1
    assert "on_failure: abort" in done.stderr
    model.say = lambda asked: None
    again = command("resume", "y")
    assert again.returncode == 0, again.stderr
    assert "[logs·sre] started: attempt 2: Read the logs." in again.stdout


def test_a_budget_is_exit_code_4(model: Model, command: Command) -> None:
    done = command("run", "Why?", "--max-cost", "0", "--run-id", "poor")
    assert done.returncode == 4
    assert "harness resume poor --max-cost MORE" in done.stderr
    assert re.search(r"^poor +failed +dispatch ", command("runs").stdout, re.MULTILINE)


# -- continued ----------------------------------------------------------------------------------


def test_a_finished_run_is_continued_by_its_agent(model: Model, command: Command) -> None:
    command("run", "What is the answer?", "--agent", "writer", "--run-id", "first")
    done = command("run", "And why?", "--continue", "first")
    assert done.returncode == 0, done.stderr
    assert "continues first:writer · agent writer" in done.stdout
    spoken = [message["content"] for message in model.asked[-1].body["messages"]][1:]  # type: ignore[index]
    assert spoken == ["What is the answer?", "Done: What is the answer?", "And why?"]
    other = command("run", "And you?", "--continue", "last", "--agent", "sre", "--run-id", "third")
    assert "agent sre" in other.stdout
    assert len(model.asked[-1].body["messages"]) == 6  # type: ignore[arg-type]
    assert "continues " in command("show", "third").stdout


def test_an_orchestration_is_continued_by_all_agents(model: Model, command: Command) -> None:
    command("run", "--plan", "plan.toml", "--run-id", "p")
    done = command("run", "And now?", "--continue", "last")
    assert done.returncode == 0, done.stderr
    assert "continues p · agents sre, writer" in done.stdout
    (planner,) = [asked for asked in model.asked if asked.what == "plan"]
    assert "Two jobs ran at once." in planner.text


def test_only_a_finished_run_is_continued(model: Model, command: Command) -> None:
    model.say = lambda asked: 400
    command("run", "Why?", "--agent", "sre", "--run-id", "failed")
    done = command("run", "And?", "--continue", "failed")
    assert (done.returncode, "has no answer yet" in done.stderr) == (2, True)


# -- interrupted and resumed --------------------------------------------------------------------


class Gate:
    """Holds the replies to one question until it is opened."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, asked: Asked) -> Reply | None:
        if asked.what == "step" and asked.text.startswith(self.text):
            self.reached.set()
            self.open.wait(20)
        return None


def interrupted(model: Model, gate: Gate, *words: str, after: str = "") -> str:
    """Interrupt a run where it waits at a gate and has said a word; return what it says on stderr."""
    model.say = gate
    process = subprocess.Popen([*HARNESS, "run", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(after in line for line in process.stdout)
    assert gate.reached.wait(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    gate.open.set()
    assert process.returncode == 130
    assert "Traceback" not in err
    return err


def test_an_interrupted_orchestration_is_resumed_as_a_whole(model: Model, command: Command) -> None:
    err = interrupted(model, Gate("Read the metrics"), "Why?", "--run-id", "cut", after="[logs·sre] done")
    assert err.count("Orchestration interrupted — checkpoint saved.\nResume: harness resume cut\n") == 1
    shown = command("show", "cut").stdout
    assert "run cut · interrupted · plan of 3 tasks for sre, writer" in shown
    assert re.search(r"^ +interrupted +metrics +sre +\+", shown, re.MULTILINE)
    assert re.search(r"^ +waiting +report +writer$", shown, re.MULTILINE)
    assert shown.endswith("Resume: harness resume cut\n")
    done = command("resume", "cut")
    assert done.returncode == 0, done.stderr
    assert "-- plan of 3 tasks that goes on" in done.stdout
    assert "   done      logs     sre" in done.stdout
    assert model.count("plan") == model.count("step", "Read the logs") == 1


def test_one_task_is_resumed_and_what_it_came_to_is_said(model: Model, command: Command) -> None:
    interrupted(model, Gate("Read the logs"), "--plan", "plan.toml", "--run-id", "cut")
    early = command("resume", "cut:report:writer")
    assert (early.returncode, "was not begun yet" in early.stderr) == (2, True)
    done = command("resume", "cut:logs:sre")
    assert done.returncode == 0, done.stderr
    assert "only task logs" in done.stdout
    assert "started: Write it up" not in done.stdout
    assert "Task 'logs' of agent 'sre' is done." in done.stderr
    assert "to go on with all of it: harness resume cut\n" in done.stderr
    again = command("resume", "cut:logs:sre")
    assert (again.returncode, again.stdout) == (0, "Done: Read the logs.\n")
    whole = command("resume", "cut")
    assert whole.returncode == 0
    assert "answer: Two jobs ran at once." in whole.stdout
    last = command("resume", "cut:logs:sre")
    assert last.stdout == "Done: Read the logs.\n"
    assert "to go on" not in last.stderr
    for key in ("cut:logs:writer", "cut:nope:sre", "cut:sre"):
        assert command("resume", key).returncode == 2


def test_a_fork_of_an_orchestration_goes_on(model: Model, command: Command) -> None:
    command("run", "--plan", "plan.toml", "--run-id", "p")
    done = command("fork", "p", "--at", "2", "--run-id", "copy")
    assert done.stdout == "copy\nResume: harness resume copy\n"
    went = command("resume", "copy")
    assert went.returncode == 0, went.stderr
    assert model.count("step", "Read the logs") == 1
    assert "forked from p at step 2" in command("show", "copy").stdout


# -- harness.toml -------------------------------------------------------------------------------


def test_agents_share_a_tool_and_two_of_one_name_are_refused(model: Model, project: Path, command: Command) -> None:
    (project / "first_tools.py").write_text('def look() -> str:\n    "Look."\n    return "seen"\n')
    (project / "second_tools.py").write_text('def look() -> str:\n    "Look."\n    return "other"\n')
    shared = '[agents.a]\ntools = ["first_tools:look"]\n[agents.b]\ntools = ["first_tools:look"]\n'
    (project / "harness.toml").write_text(shared)
    assert command("run", "Why?", "--trust", "--max-cost", "0").returncode == 4
    (project / "harness.toml").write_text(shared.replace('b]\ntools = ["first', 'b]\ntools = ["second'))
    done = command("run", "Why?", "--trust", "--max-cost", "0")
    assert done.returncode == 2
    assert "harness.toml:4: the tool 'second_tools:look': another tool is named 'look' already" in done.stderr
    assert command("run", "Why?", "--trust", "--agent", "b", "--max-cost", "0").returncode == 4


def test_an_agent_delegates_to_one_there_is(model: Model, project: Path, command: Command) -> None:
    (project / "harness.toml").write_text('[agents.a]\ndelegates = ["bb"]\n[agents.b]\n')
    done = command("run", "Why?")
    assert done.returncode == 2
    assert "harness.toml:2: it delegates to an unknown agent 'bb'; did you mean 'b'?" in done.stderr


def test_a_call_site_has_a_model_of_its_own(model: Model, project: Path, command: Command) -> None:
    (project / "harness.toml").write_text(CONFIG + '\n[llm.planner]\nmodel = "big"\n')
    command("run", "Why?")
    assert {asked.body["model"] for asked in model.asked if asked.what == "plan"} == {"big"}
    assert {asked.body["model"] for asked in model.asked if asked.what != "plan"} == {"tiny-1"}
    (project / "harness.toml").write_text('[llm.planer]\nmodel = "big"\n[llm.router]\nmodle = "b"\n')
    done = command("run", "Why?")
    assert "harness.toml:1: unknown word 'planer' in [llm]; did you mean 'planner'?" in done.stderr
    assert "harness.toml:4: unknown word 'modle' in [llm.router]; did you mean 'model'?" in done.stderr


# -- a real terminal ----------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal with a command on it."""

    def __init__(self, *words: str, width: int = 100) -> None:
        self.screen = pyte.Screen(width, 60)
        self._stream = pyte.ByteStream(self.screen)
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            size = {"TERM": "xterm-256color", "COLUMNS": str(width), "LINES": "60"}
            os.execve(sys.executable, [*HARNESS, *words], {**os.environ, **size})

    def read_until(self, done: Callable[[], object], seconds: float = 20) -> None:
        until = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < until, self.text
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    data = os.read(self._fd, 65536)
                except OSError:
                    return
                self._stream.feed(data)

    def end(self) -> int:
        self.read_until(lambda: False)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).strip()

    def colour(self, symbol: str) -> str:
        """Return the colour of the last such symbol on the screen."""
        places = [(y, line.index(symbol)) for y, line in enumerate(self.screen.display) if symbol in line]
        y, x = places[-1]
        return self.screen.buffer[y][x].fg


def test_the_tree_of_a_plan_while_it_runs_and_at_its_end(model: Model, project: Path) -> None:
    gate = model.say = Gate("Read the metrics")
    terminal = Terminal("run", "Why?", "--run-id", "live")
    terminal.read_until(lambda: gate.reached.is_set() and "1/3 done · 1 running" in terminal.text)
    terminal.read_until(lambda: re.search(r"✔ logs  ▶ metrics  ○ report", terminal.text))
    lines = terminal.text.splitlines()
    assert "├─ plan of 3 tasks" in lines
    assert "│  ○ report   writer  ← logs, metrics · Write it up." in lines
    assert "│ logs·sre      ▶  Read the logs." in lines
    assert "│ logs·sre      ✔  done · confidence 1.00 · 1 step" in lines
    assert "│ metrics·sre   asking the model" in lines[-3:]  # the footer says who works
    assert re.search(r"1/3 done · 1 running · \d+ tokens · .* s · live · Ctrl-C pauses$", lines[-1])
    assert (terminal.colour("✔"), terminal.colour("▶")) == ("green", "cyan")
    gate.open.set()
    assert terminal.end() == 0
    text = terminal.text
    assert "Ctrl-C pauses" not in text  # the footer is gone
    for part in (
        "│ report·writer ✔  done",
        "├─ synthesis · confidence 0.80",
        "│  ! conflict: 02:10 or 02:12",
        "│  ✔ report   writer  done · confidence 1.00 · 1 attempt",
        "╰─ Two jobs ran at once.",
    ):
        assert part in text, part
    assert not terminal.screen.cursor.hidden


def test_show_draws_who_worked_when(model: Model, command: Command) -> None:
    command("run", "Why?", "--run-id", "chart")
    terminal = Terminal("show", "chart")
    assert terminal.end() == 0, terminal.text
    assert re.search(r"^  ✔ logs +sre +\+\d\.\d s +\d\.\d s +15 +unpriced  ─*━+─*$", terminal.text, re.MULTILINE)


@pytest.mark.parametrize("width", [20, 40])
def test_a_narrow_terminal_is_not_broken(width: int, model: Model, command: Command) -> None:
    terminal = Terminal("run", "Why?", "--run-id", "narrow", width=width)
    assert terminal.end() == 0
    assert "metrics" in terminal.text
    assert "╰─" in terminal.text
    shown = Terminal("show", "narrow", width=width)
    assert shown.end() == 0
    assert re.search(r"^  ✔ logs +", shown.text, re.MULTILINE)


def test_what_a_plan_says_cannot_reach_the_terminal_raw(model: Model, command: Command) -> None:
    evil = "\x1b]0;owned\x07\u202e\u200b"
    tasks = [{"id": "a", "agent_id": "sre", "instruction": f"Read {evil}"}]
    model.say = lambda asked: {
        "plan": {"tasks": tasks, "rationale": evil},
        "synthesis": {"answer": evil, "confidence": 1, "conflicts": [evil], "unknowns": [evil]},
    }.get(asked.what, 400 if asked.replies else None)
    for words in (["run", "Why?", "--run-id", "evil"], ["show", "evil"]):
        done = command(*words)
        assert done.returncode == 0, done.stderr
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e]", done.stdout)
    for words in (["run", "Why?"], ["show", "evil"]):
        terminal = Terminal(*words, width=140)
        assert terminal.end() == 0
        assert terminal.text.count(r"\x1b]0;owned\x07\u202e\u200b") >= 5, terminal.text


def test_the_footer_keeps_the_tools_of_each_task_apart() -> None:
    activity = Activity()
    at = ("r", "sre", 1, 0.0)
    for scope in ("a/1/sre", "b/1/sre", "a/1/sre/delegate/1.0/writer"):
        activity.follow(TaskStarted(*at, scope, task_id="", attempt=1, instruction=""))
        activity.follow(Action(*at, scope, step=1, tool="read_file", args={}))
    activity.follow(Observation(*at, "b/1/sre", step=1, tool="read_file", observation=""))
    assert activity.at_work() == [
        ("b/1/sre", "asking the model"),
        ("a/1/sre/delegate/1.0/writer", "running read_file"),  # its parent waits for it
    ]
    activity.follow(TaskDone(*at, "a/1/sre/delegate/1.0/writer", answer="", confidence=1.0, steps=1))
    assert activity.at_work() == [("a/1/sre", "running read_file"), ("b/1/sre", "asking the model")]
