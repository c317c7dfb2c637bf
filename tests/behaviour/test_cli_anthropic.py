"""The command line and Anthropic: how it is named and found, and a run that a resume goes on with at the same place."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from harness import AnthropicLLM, OpenAILLM
from harness.cli.choices import Choices
from harness.cli.config import merged, parse
from harness.cli.endpoint import ANTHROPIC_MODEL, Endpoint, NoLLM, find_endpoint, make_llm
from harness.errors import ConfigError

Run = Callable[..., tuple[int, str, str]]
EMPTY = merged([]).llm
KEY = "ANTHROPIC_API_KEY"


def claude(model: str = ANTHROPIC_MODEL, base_url: str | None = None, key_env: str = KEY) -> Endpoint:
    return Endpoint(base_url, model, "native", key_env, "anthropic")


@pytest.mark.parametrize(
    ("llm", "model", "found"),
    [
        ("anthropic:claude-x", None, claude("claude-x")),
        ("anthropic/claude-x", None, claude("claude-x")),
        ("anthropic", None, claude()),
        ("anthropic:", None, claude()),
        ("anthropic", "claude-y", claude("claude-y")),
        ("anthropic:claude-x", "claude-y", claude("claude-y")),
        (None, "anthropic:claude-x", claude("claude-x")),
        ("https://gateway.example#anthropic:claude-x", None, claude("claude-x", "https://gateway.example")),
    ],
)
@pytest.mark.parametrize("openai", [False, True])
def test_anthropic_is_named_with_its_model(
    llm: str | None, model: str | None, found: Endpoint, openai: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "k")
    if openai:
        monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert find_endpoint(llm, model, None, EMPTY) == found
    assert find_endpoint(found.base_url, found.named, found.protocol, EMPTY, key_env=found.key_env) == found


def test_its_key_alone_means_anthropic_and_its_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "k")
    assert find_endpoint(None, None, None, EMPTY) == claude()
    assert find_endpoint("claude-x", None, None, EMPTY) == claude("claude-x")
    assert claude().describe() == f"{ANTHROPIC_MODEL} at Anthropic (native protocol)"
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:1/")
    assert find_endpoint(None, None, None, EMPTY) == claude(base_url="http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("variable", "value", "file"),
    [
        ("OPENAI_API_KEY", "k", ""),
        ("OPENAI_BASE_URL", "http://127.0.0.1:2/v1", ""),
        ("NOTHING", "", '[llm]\nbase_url = "http://127.0.0.1:2/v1"\n'),
    ],
)
def test_what_names_openai_comes_first(variable: str, value: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "k")
    monkeypatch.setenv(variable, value)
    endpoint = find_endpoint(None, "anthropic-like", None, parse(file, Path("x")).data.llm)
    assert (endpoint.provider, endpoint.model) == ("openai", "anthropic-like")


def test_a_gateway_s_own_name_for_a_model_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "k")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://openrouter.example/api/v1")
    endpoint = find_endpoint("anthropic/claude-x", None, None, EMPTY)
    assert (endpoint.provider, endpoint.model) == ("openai", "anthropic/claude-x")
    assert find_endpoint("anthropic:claude-x", None, None, EMPTY) == claude("claude-x")


def test_a_file_names_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAUDE_KEY", "k")
    text = '[llm]\nmodel = "anthropic:claude-x"\napi_key_env = "CLAUDE_KEY"\n[llm.planner]\nmodel = "claude-y"\n'
    told = parse(text, Path("x")).data.llm
    endpoint = find_endpoint(None, None, None, told)
    assert endpoint == claude("claude-x", key_env="CLAUDE_KEY")
    assert endpoint.with_model(told.sites()["planner"].model) == claude("claude-y", key_env="CLAUDE_KEY")
    base = parse('[llm]\nmodel = "anthropic:claude-x"\nbase_url = "https://gateway.example"\n', Path("x")).data.llm
    assert find_endpoint(None, None, None, base) == claude("claude-x", "https://gateway.example")
    # What the file says of its own server is not said of Anthropic.
    monkeypatch.setenv(KEY, "k")
    local = parse('[llm]\nmodel = "m"\nbase_url = "http://127.0.0.1:2/v1"\napi_key_env = "BOX"\n', Path("x")).data.llm
    assert find_endpoint("anthropic:claude-x", None, None, local) == claude("claude-x")


def test_one_thing_a_run_asks_may_go_to_anthropic(monkeypatch: pytest.MonkeyPatch) -> None:
    openai = Endpoint("http://127.0.0.1:2/v1", "m", "text", "OPENAI_API_KEY")
    with pytest.raises(NoLLM, match="set ANTHROPIC_API_KEY"):
        openai.with_model("anthropic:claude-x")
    monkeypatch.setenv(KEY, "k")
    assert openai.with_model("anthropic:claude-x") == claude("claude-x")
    assert openai.with_model("org/other") == openai._replace(model="org/other")
    assert isinstance(make_llm(claude()), AnthropicLLM)
    assert isinstance(make_llm(openai), OpenAILLM)


def test_what_is_missing_or_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoLLM, match=r"^anthropic:claude-x is a model of Anthropic's: set ANTHROPIC_API_KEY$"):
        find_endpoint("anthropic:claude-x", None, None, EMPTY)
    with pytest.raises(NoLLM, match="export ANTHROPIC_API_KEY="):
        find_endpoint(None, None, None, EMPTY)
    monkeypatch.setenv(KEY, "k")
    with pytest.raises(ConfigError, match="'text' is for OpenAI-compatible servers"):
        find_endpoint("anthropic:claude-x", None, "text", EMPTY)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "nowhere")
    with pytest.raises(ConfigError, match="base URL"):
        find_endpoint("anthropic:claude-x", None, None, EMPTY)


def test_a_resume_stays_with_its_provider_or_leaves_it_whole() -> None:
    kept = Choices(model="anthropic:claude-x", protocol="native", api_key_env=KEY)
    assert Choices(model="claude-y").over(kept).model == "anthropic:claude-y"
    assert Choices(max_steps=3).over(kept) == Choices(
        model="anthropic:claude-x", protocol="native", api_key_env=KEY, max_steps=3
    )
    assert Choices(llm="http://127.0.0.1:2/v1").over(kept) == Choices(llm="http://127.0.0.1:2/v1")
    local = Choices(llm="http://127.0.0.1:2/v1", model="m", protocol="text", api_key_env="BOX")
    assert Choices(llm="anthropic:claude-x").over(local) == Choices(llm="anthropic:claude-x")
    assert Choices(model="other").over(local).model == "other"


# -- a run ----------------------------------------------------------------------------------------------------------


class Api(ThreadingHTTPServer):
    """Anthropic's API: a call first, an answer then. It refuses keys while it is told to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict] = []
        self.down_after: int | None = None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Api

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(asked)
        place = sum(turn["role"] == "assistant" for turn in asked["messages"])
        if self.server.down_after is not None and place >= self.server.down_after:
            self._send(
                401, "application/json", json.dumps({"error": {"type": "authentication_error", "message": "no"}})
            )
            return
        start: dict[str, object] = {"type": "text", "text": "It is 42."}
        if place == 0:
            start = {"type": "tool_use", "id": "toolu_1", "name": "read_file", "input": {"path": "answer.txt"}}
        usage = {"input_tokens": 10, "output_tokens": 5}
        events = [
            {"type": "message_start", "message": {"id": "msg", "model": asked["model"], "usage": usage}},
            {"type": "content_block_start", "index": 0, "content_block": start},
            {"type": "message_delta", "delta": {"stop_reason": "tool_use" if place == 0 else "end_turn"}},
            {"type": "message_stop"},
        ]
        self._send(200, "text/event-stream", "".join(f"data: {json.dumps(event)}\n\n" for event in events))

    def _send(self, status: int, kind: str, body: str) -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    with Api() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
        yield server
        server.shutdown()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command in a folder of its own."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "answer.txt").write_text("The answer is 42.\n")
    monkeypatch.chdir(project)

    def command(*words: str) -> tuple[int, str, str]:
        from harness.cli import main

        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["harness", *words])
            with pytest.raises(SystemExit) as left:
                main()
        return int(left.value.code or 0), *capsys.readouterr()

    return command


def test_a_run_and_its_resume_are_at_the_same_place(api: Api, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    api.down_after = 1
    code, out, _ = run("run", "What is the answer?", "--llm", "anthropic:claude-x", "--run-id", "r")
    assert code == 1
    assert f"claude-x at {api.url} (native protocol)" in out
    api.down_after = None
    monkeypatch.setenv("OPENAI_API_KEY", "k")  # which is no reason to go elsewhere
    code, out, err = run("resume", "r")
    assert (code, "answer: It is 42." in out) == (0, True), err
    assert [len(asked["messages"]) for asked in api.asked] == [1, 3, 3]
    assert {asked["model"] for asked in api.asked} == {"claude-x"}


def test_doctor_finds_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, _ = run("doctor")
    assert "set OPENAI_API_KEY, ANTHROPIC_API_KEY or OPENAI_BASE_URL, or pass --llm" in out
    monkeypatch.setenv(KEY, "k")
    _, out, _ = run("doctor")
    assert f"{ANTHROPIC_MODEL} at Anthropic (native protocol)" in out
    assert "anthropic, openai" in out
