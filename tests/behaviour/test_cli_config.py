"""harness.toml: what it can say, what is said when it is wrong, and what needs trust."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from llmock.pytest_plugin import LLMock
from llmock.scenarios import Match, Reply

from harness.cli.config import line_of, merged, parse, read
from harness.cli.endpoint import DEFAULT_MODEL, Endpoint, NoLLM, find_endpoint, is_loopback
from harness.cli.trust import trust_file
from harness.errors import ConfigError

Run = Callable[..., tuple[int, str, str]]
NOBODY = "http://127.0.0.1:9/v1#nobody"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command in a project folder of its own."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)

    def command(*words: str) -> tuple[int, str, str]:
        from harness.cli import main

        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["harness", *words])
            with pytest.raises(SystemExit) as left:
                main()
        return int(left.value.code or 0), *capsys.readouterr()

    return command


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[llm]\nmodel = "m"\n\n[budgt]\n', ":4: unknown word 'budgt'; did you mean 'budget'?"),
        ('[llm]\nmodle = "m"\n', ":2: unknown word 'modle' in [llm]; did you mean 'model'?"),
        (
            "[budget]\n# a note\nmax_llm_cals = 3\n",
            ":3: unknown word 'max_llm_cals' in [budget]; did you mean 'max_llm_calls'?",
        ),
        (
            '[agents.a]\nrole = "r"\nmax_step = 3\n',
            ":3: unknown word 'max_step' in [agents.a]; did you mean 'max_steps'?",
        ),
        ('[[agents]]\nid = "a"\n[[agents]]\nid = "b"\nmax_step = 3\n', ":5: unknown word 'max_step'"),
        ("agents.a.max_step = 3\n", ":1: unknown word 'max_step'"),
        (
            "[budget]\nmax_llm_calls = -1\n",
            ":2: budget.max_llm_calls: input should be greater than or equal to 0, not -1",
        ),
        ('[budget]\nmax_total_cost_usd = "two"\n', ":2: budget.max_total_cost_usd: "),
        (
            '[llm]\nprotocol = "txt"\n',
            ":2: llm.protocol: input should be 'native', 'text', 'responses' or 'background', not 'txt'",
        ),
        (
            "[llm.rate]\nrequests_per_min = 9\n",
            ":2: unknown word 'requests_per_min' in [llm.rate]; did you mean 'requests_per_minute'?",
        ),
        ('[llm.planner]\nmodel = "m"\nrate = { max_concurent = 9 }\n', "in [llm.planner.rate]; did you mean 'max_conc"),
        ("[llm]\nrate = 9\n", ":2: llm.rate: input should be a valid dictionary or instance of RateTable, not 9"),
        (
            "[llm.rate]\nmax_concurrent = 0\n",
            ":2: llm.rate.max_concurrent: input should be greater than or equal to 1, not 0",
        ),
        ("[llm.rate]\ntokens_per_minute = 1.5\n", ":2: llm.rate.tokens_per_minute: input should be a valid integer"),
        (f"[llm.rate]\ntokens_per_minute = {10**400}\n", ":2: llm.rate.tokens_per_minute: input should be less than"),
        ("[llm.rate]\nwindow_s = 0\n", ":2: llm.rate.window_s: input should be greater than 0, not 0"),
        ("[llm.rate]\nwindow_s = inf\n", ":2: llm.rate.window_s: input should be a finite number, not inf"),
        ("[llm.rate]\nwindow_s = nan\n", ":2: llm.rate.window_s: "),
        (
            "[llm]\n[llm.rate]\nrequests_per_minute = 10\nwindow_s = 1\n",
            ":2: llm.rate: RateLimit(requests_per_minute=10) leaves nothing for a window of 1 s; make window_s 6",
        ),
        (
            '[llm.planner]\nmodel = "m"\n[llm.planner.rate]\ntokens_per_minute = 1\nwindow_s = 1\n',
            ":3: llm.planner.rate: RateLimit(tokens_per_minute=1) leaves nothing",
        ),
        ("[llm]\nmodel = \n", ":2: this is not TOML: "),
        ("[llm\n", ":1: this is not TOML: "),
        ('[agents."a:b"]\nrole = "r"\n', ":1: agent_id must be a printable name"),
        ('[agents.a]\nprompt = "p"\nprompt_file = "f"\n', ":1: agent 'a' has a prompt and a prompt_file; keep one"),
        ("[[agents]]\nrole = 'r'\n", ":1: each [[agents]] needs an id"),
        ("[[agents]]\nid = 'a'\n[[agents]]\nid = 'a'\n", "agent 'a' is defined twice"),
        ('[agents.a]\ntools = ["flies"]\n', ":2: agent 'a' names an unknown tool 'flies'; did you mean 'files'?"),
        (
            '[agents.a]\ntools = ["read_fil"]\n',
            ":2: agent 'a' names an unknown tool 'read_fil'; did you mean 'read_file'?",
        ),
        ('[agents.a]\nprompt_file = "gone.md"\n', ":2: cannot read the prompt file"),
    ],
)
def test_a_wrong_file_names_its_line_and_the_nearest_word(text: str, said: str, run: Run) -> None:
    Path("harness.toml").write_text(text)
    code, out, err = run("run", "goal", "--llm", NOBODY)
    assert (code, out) == (2, "")
    assert f"harness.toml{said}" in err or (not said.startswith(":") and said in err), err
    assert "Traceback" not in err


def test_every_mistake_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        parse('[llm]\nmodle = "m"\n[budget]\nmax_llm_cals = 1\n', Path("x.toml"))
    assert [line.split(": ")[0] for line in str(told.value).splitlines()] == ["x.toml:2", "x.toml:4"]


def test_the_documented_file_is_right_and_every_key_is_named() -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    sample = page.split("```toml\n")[1].split("```")[0]
    data = parse(sample, Path("harness.toml")).data
    assert (list(data.agents), data.budget.max_llm_calls) == (["sre", "writer"], 40)
    for model in (data.llm, data.agents["sre"], data.budget):
        for key in type(model).model_fields:
            assert f"`{key}`" in page, key
    for key in type(data).model_fields:
        assert f"`{key}`" in page or f"`[{key}" in page, key


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read(tmp_path / "x.toml")


def test_a_later_file_wins_key_by_key() -> None:
    mine = parse('[llm]\nmodel = "a"\nprotocol = "text"\n[agents.x]\nrole = "mine"\n', Path("config.toml"))
    theirs = parse('[llm]\nmodel = "b"\n[agents.y]\n[budget]\nmax_llm_calls = 7\n', Path("harness.toml"))
    both = merged([mine, theirs])
    assert (both.llm.model, both.llm.protocol) == ("b", "text")
    assert list(both.agents) == ["x", "y"]
    limits = both.budget.limits()
    assert (limits.max_llm_calls, limits.max_total_cost_usd) == (7, 2.0)
    assert both.llm.rate is None
    mine, theirs = (
        parse(f"[llm.rate]\n{keys}\n", Path("x.toml"))
        for keys in ("requests_per_minute = 60\nmax_concurrent = 4", "max_concurrent = 2")
    )
    rate = merged([mine, theirs]).llm.rate
    assert repr(rate and rate.limit()) == "RateLimit(requests_per_minute=60, max_concurrent=2)"


def test_a_line_is_found_in_quoted_and_dotted_keys() -> None:
    text = '[agents."my agent"]\nrole = "r"\n\n[ budget ]  # limits\n"max_llm_calls" = 1\n'
    assert line_of(text, ("agents", "my agent", "role")) == 2
    assert line_of(text, ("budget", "max_llm_calls")) == 5
    assert line_of(text, ("nothing",)) == 1


# -- rate ---------------------------------------------------------------------------------------


PLAN = """
goal = "Look."
[[tasks]]
id = "left"
agent = "one"
instruction = "Look left."
[[tasks]]
id = "right"
agent = "two"
instruction = "Look right."
"""


def carry_out(run: Run, llmock: LLMock, rate: str) -> None:
    """Have two agents work at the same time, and the model of a site put together what they have found."""
    Path("harness.toml").write_text(f"{rate}\n[agents.one]\n[agents.two]\n")
    Path("plan.toml").write_text(PLAN)
    llmock.add(Reply(text='{"answer": "Nothing.", "confidence": 1.0}', match=Match(model="small")))
    llmock.reply("Nothing there.", times=2)
    code, _, err = run(
        "run", "--plan", "plan.toml", "--llm", f"{llmock.base_url()}#large", "--protocol", "native", "--park"
    )
    assert code == 0, err
    assert sorted(request.model or "" for request in llmock.requests) == ["large", "large", "small"]


SYNTHESISER = '[llm.synthesiser]\nmodel = "small"\n'


def in_flight(llmock: LLMock) -> int:
    """Return how many requests the server has had at a time, at the most."""
    requests = llmock.requests
    return max(
        sum(other.started_at <= request.started_at < other.ended_at for other in requests) for request in requests
    )


@pytest.mark.parametrize(("most", "seen"), [("", 2), ("[llm.rate]\nmax_concurrent = 1", 1)])
def test_no_more_calls_are_in_flight_than_the_file_says(most: str, seen: int, run: Run, llmock: LLMock) -> None:
    llmock.delay(0.3, times=None)
    carry_out(run, llmock, f"{SYNTHESISER}{most}")
    assert in_flight(llmock) == seen


def test_no_more_calls_are_made_in_any_window_than_the_file_says(run: Run, llmock: LLMock) -> None:
    carry_out(run, llmock, f"{SYNTHESISER}[llm.rate]\nrequests_per_minute = 120\nwindow_s = 0.5\n")
    began = sorted(request.started_at for request in llmock.requests)
    assert all(later - earlier >= 0.5 for earlier, later in pairwise(began)), "two models, one limit"


def test_a_site_may_have_a_limit_of_its_own(run: Run, llmock: LLMock) -> None:
    own = "rate = { requests_per_minute = 1 }\n"
    carry_out(run, llmock, f"{SYNTHESISER}{own}[llm.rate]\nrequests_per_minute = 2\n")  # or it would take a minute


# -- agents -------------------------------------------------------------------------------------


def test_one_agent_is_taken_and_of_several_all_or_the_one_that_is_named(run: Run) -> None:
    Path("harness.toml").write_text('[agents.solo]\nprompt = "Be brief."\ntools = ["read_file"]\n')
    _, out, _ = run("run", "goal", "--llm", NOBODY, "--max-seconds", "0")
    assert "agent solo" in out
    Path("harness.toml").write_text("[agents.one]\n[agents.two]\n")
    _, out, _ = run("run", "goal", "--llm", NOBODY, "--max-seconds", "0")
    assert "agents one, two" in out
    _, out, _ = run("run", "goal", "--llm", NOBODY, "--agent", "two", "--max-seconds", "0")
    assert "agent two" in out


def test_the_budget_of_the_file_holds_and_a_flag_wins(run: Run) -> None:
    Path("harness.toml").write_text("[budget]\nmax_wall_time_seconds = 0\n")
    code, _, err = run("run", "goal", "--llm", NOBODY)
    assert code == 4
    assert "max_wall_time_seconds=0 is over" in err
    Path("harness.toml").write_text("[budget]\nmax_llm_calls = 0\n")
    code, _, err = run("run", "goal", "--llm", NOBODY)
    assert code == 4
    assert "max_llm_calls=0" in err


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('broken on import')", "RuntimeError: broken on import"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = 1", "AttributeError"),
        ("look = 1", "look"),
    ],
)
def test_a_tool_that_cannot_be_loaded_is_named_with_its_line(code: str, said: str, run: Run, tmp_path: Path) -> None:
    module = f"tools_{tmp_path.name.replace('-', '_')}"
    Path(f"{module}.py").write_text(code)
    Path("harness.toml").write_text(f'[agents.a]\ntools = ["{module}:look"]\n')
    exit_code, _, err = run("run", "goal", "--llm", NOBODY, "--trust")
    assert exit_code == 2
    assert "harness.toml:2: " in err
    assert said in err


# -- trust --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '[agents.a]\ntools = ["evil:run"]\n',
        '[llm]\nbase_url = "https://evil.example/v1"\n',
        '[llm]\napi_key_env = "AWS_SECRET_ACCESS_KEY"\n',
        '[agents.a]\nprompt_file = "../../secret.txt"\n',
    ],
)
def test_a_project_file_that_can_do_harm_is_refused_until_it_is_trusted(text: str, run: Run) -> None:
    Path("evil.py").write_text("import pathlib\npathlib.Path('ran').touch()\ndef run() -> str:\n    return ''\n")
    file = Path("harness.toml").absolute()
    file.write_text(text)
    code, out, err = run("run", "goal", "--llm", NOBODY)
    assert (code, out) == (2, "")
    assert f"harness trust {file}" in err
    assert not Path("ran").exists()

    assert run("trust")[0] == 0
    assert stat.S_IMODE(trust_file().stat().st_mode) == 0o600
    _, _, err = run("run", "goal", "--llm", NOBODY)
    assert "is not trusted" not in err

    file.write_text(text + "# changed\n")
    _, _, err = run("run", "goal", "--llm", NOBODY)
    assert "is not trusted" in err


def test_a_file_without_danger_needs_no_trust_and_the_flag_gives_it(run: Run) -> None:
    Path("harness.toml").write_text('[llm]\nmodel = "m"\n[agents.a]\ntools = ["files"]\n')
    assert run("trust")[1].endswith("it needs no trust.\n")
    assert not trust_file().exists()
    Path("harness.toml").write_text('[llm]\nbase_url = "http://127.0.0.1:9/v1"\nmodel = "m"\n')
    code, out, _ = run("run", "goal", "--trust", "--max-seconds", "0")
    assert (code, "m at http://127.0.0.1:9/v1" in out) == (4, True)


def test_the_users_own_file_needs_no_trust(run: Run) -> None:
    trust_file().parent.mkdir(parents=True)
    (trust_file().parent / "config.toml").write_text('[llm]\nbase_url = "http://127.0.0.1:9/v1"\nmodel = "mine"\n')
    _, out, _ = run("run", "goal", "--max-seconds", "0")
    assert "mine at http://127.0.0.1:9/v1" in out


def test_a_project_cannot_vouch_for_itself(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout may bring a .harness folder; what it says there about trust counts nothing."""
    monkeypatch.delenv("HARNESS_HOME")
    Path("harness.toml").write_text('[llm]\nbase_url = "https://evil.example/v1"\nmodel = "m"\n')
    Path(".harness").mkdir()
    Path(".harness/trusted").write_text(read(Path("harness.toml")).digest + "\n")
    Path(".harness/config.toml").write_text("this is not read")
    code, _, err = run("run", "goal")
    assert (code, "is not trusted" in err) == (2, True), err


def test_a_journal_cannot_send_a_resume_to_its_own_server(run: Run) -> None:
    code, _, _ = run("run", "goal", "--llm", "http://192.0.2.1/v1#m", "--max-seconds", "0", "--run-id", "r")
    assert code == 4
    code, _, err = run("resume", "r")
    assert code == 4  # this user has named the server before
    trust_file().unlink()
    code, _, err = run("resume", "r")
    assert code == 2
    assert "add --llm http://192.0.2.1/v1 to go on with it" in err


# -- the model ----------------------------------------------------------------------------------

EMPTY = merged([]).llm


def test_flags_win_over_the_environment_and_that_over_files(monkeypatch: pytest.MonkeyPatch) -> None:
    told = parse('[llm]\nbase_url = "http://127.0.0.1:1/v1"\nmodel = "file"\n', Path("x")).data.llm
    assert find_endpoint(None, None, None, told) == Endpoint("http://127.0.0.1:1/v1", "file", "text", "OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:2/v1/")
    assert find_endpoint(None, "flag", "native", told)[:3] == ("http://127.0.0.1:2/v1", "flag", "native")
    assert find_endpoint("https://other.example/v1#m", None, None, told)[:3] == (
        "https://other.example/v1",
        "m",
        "native",
    )


def test_a_key_alone_means_openai_and_its_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert find_endpoint(None, None, None, EMPTY) == Endpoint(None, DEFAULT_MODEL, "native", "OPENAI_API_KEY")
    assert find_endpoint("gpt-x", None, None, EMPTY).model == "gpt-x"


def test_nothing_found_and_a_server_elsewhere_without_a_model() -> None:
    with pytest.raises(NoLLM):
        find_endpoint(None, None, None, EMPTY)
    with pytest.raises(NoLLM):
        find_endpoint("just-a-model", None, None, EMPTY)
    with pytest.raises(ConfigError, match="name a model for"):
        find_endpoint("https://other.example/v1", None, None, EMPTY)


@pytest.mark.parametrize(
    "word",
    [
        "htp:/bad",
        "http:/127.0.0.1/v1",
        "127.0.0.1:8080/v1",
        "127.0.0.1",
        "[::1]:8080",
        "localhost:8080",
        "localhost/v1",
        "gpu-box:8080#m",
        "gpu-box:8080/v1",
        "api.example.com/v1",
    ],
)
def test_an_address_without_its_scheme_is_never_a_models_name(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with pytest.raises(ConfigError, match="write it with http://"):
        find_endpoint(word, None, None, EMPTY)


@pytest.mark.parametrize("name", ["gpt-x", "gpt-4.1", "org/model", "llama3:8b", "org/model-r1:free", "localhosted"])
def test_a_models_name_is_one_and_without_a_key_says_what_is_missing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoLLM, match=f"'{name}' is a model's name: set OPENAI_API_KEY"):
        find_endpoint(name, None, None, EMPTY)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert find_endpoint(name, None, None, EMPTY).model == name


@pytest.mark.parametrize("url", ["ftp://x/v1", "http://", "http://[::1", "http://x:port/v1", "://"])
def test_what_is_no_base_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="base URL"):
        find_endpoint(f"{url}#m", None, None, EMPTY)


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8080/v1", True),
        ("http://localhost/v1", True),
        ("http://[::1]:1/v1", True),
        ("http://127.0.0.1.evil.example/v1", False),
        ("http://127.0.0.1@evil.example/v1", False),
        ("https://api.openai.com/v1", False),
    ],
)
def test_which_servers_are_this_machine(url: str, local: bool) -> None:
    assert is_loopback(url) is local
