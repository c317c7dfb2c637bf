"""``harness policy``: a file of rules is checked, and asked what becomes of a call."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]

POLICY = """
[rules.look-around]
action = "allow"
tool = "shell"
args = { cmd = { prefix = ["git", "status"], flags = ["-s"] } }
match = ["git status -s"]
not_match = ["git status; rm -rf build", "git push"]

[rules.no-push]
action = "forbid"
tool = "shell"
args = { cmd = { prefix = ["git", "push"] } }
reason = "pushing is done by people"

[rules.write-here]
action = "allow_sandboxed"
tool = "write_file"
args = { path = { inside = "workspace" } }

[rules.cheap]
action = "allow"
tool = "buy"
left_usd = { min = 1 }

[rules.clerks-send]
action = "allow"
tool = "send"
agent = "clerk*"
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command in a project folder that has the policy above in force."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    Path("harness.toml").write_text('policy = "rules.toml"\n')
    Path("rules.toml").write_text(POLICY)

    def command(*words: str) -> tuple[int, str, str]:
        from harness.cli import main

        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["harness", *words])
            with pytest.raises(SystemExit) as left:
                main()
        return int(left.value.code or 0), *capsys.readouterr()

    return command


def wrong(done: tuple[int, str, str]) -> str:
    """Return the sentence of a command whose words or files are wrong."""
    code, out, err = done
    assert (code, out) == (2, "")
    first, *rest = err.removeprefix("harness: ").rstrip("\n").split("\n")
    assert all(line.startswith("See: harness ") for line in rest), err
    assert "Traceback" not in err
    return first


# -- check --------------------------------------------------------------------------------------


def test_the_rules_of_each_action_are_counted(run: Run) -> None:
    code, out, err = run("policy", "check")
    assert (code, err) == (0, "")
    first, *counts = out.splitlines()
    assert first == f"{Path.cwd() / 'rules.toml'}: 5 rules, 3 examples hold"
    assert [line.split() for line in counts] == [
        ["forbid", "1"],
        ["ask", "0"],
        ["allow_sandboxed", "1"],
        ["allow", "3"],
    ]


def test_a_file_that_is_named_wins_and_needs_no_configuration(run: Run) -> None:
    Path("harness.toml").write_text("not TOML")
    Path("other.toml").write_text('[rules.a]\naction = "ask"\nexpires = 2020-01-01T00:00:00Z\n')
    code, out, _ = run("policy", "check", "other.toml")
    assert code == 0
    assert out.startswith("other.toml: 1 rule\n")
    assert "rule 'a' matches nothing any more: it expired at 2020-01-01T00:00:00+00:00" in out
    code, out, _ = run("policy", "check", "other.toml", "--json")
    assert code == 0
    assert json.loads(out) == {
        "policy": "other.toml",
        "rules": {"forbid": 0, "ask": 1, "allow_sandboxed": 0, "allow": 0},
        "examples": 0,
        "expired": ["a"],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[rules.a]\naction = "alow"\n', "rules.toml:2: rule 'a': unknown action 'alow'; did you mean 'allow'?"),
        ('[rules.a]\naction = "ask"\ntoool = "x"\n', "rules.toml:3: unknown word 'toool' in [rules.a]"),
        ("[rules.a\n", "rules.toml:1: this is not TOML: "),
        (
            POLICY.replace('match = ["git status -s"]', 'match = ["git status -s && git push"]'),
            "rules.toml:6: rule 'look-around': it does not match its example 'git status -s && git push' of match",
        ),
        ("a = " + "[" * 100_000, "rules.toml"),
        ("[rules.a]\naction = 'ask'\n[rules.a.args.x" + ".not" * 3000 + "]\nequals = 1\n", "rules.toml"),
    ],
)
def test_a_wrong_policy_is_one_sentence_with_its_line(text: str, said: str, run: Run) -> None:
    Path("rules.toml").write_text(text)
    for words in (("check",), ("check", "rules.toml"), ("explain", "send")):
        assert said in wrong(run("policy", *words))


def test_a_policy_that_is_not_there_is_named_where_it_is_named(run: Run) -> None:
    assert "cannot read the policy 'gone.toml'" in wrong(run("policy", "check", "gone.toml"))
    Path("harness.toml").write_text('\npolicy = "gone.toml"\n')
    assert "harness.toml:2: the policy " in wrong(run("policy", "check"))
    Path("harness.toml").write_text("")
    assert wrong(run("policy", "check")).startswith("no harness.toml here names a policy")
    Path("harness.toml").unlink()
    assert wrong(run("policy", "explain", "send")).startswith("no harness.toml here names a policy")


# -- explain ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "verdict"),
    [
        (("shell", "--command", "git status -s"), 0, "verdict: allow by rule 'look-around'"),
        (("shell", '{"cmd": "git status -s"}'), 0, "verdict: allow by rule 'look-around'"),
        (("shell", "--command", "git status && make"), 3, "verdict: ask: no rule matches, and the tool has an effect"),
        (("shell", "--command", "git status; git push"), 1, "verdict: forbid by rule 'no-push': pushing is done by"),
        (("read_file",), 0, "verdict: allow: no rule matches, and the tool only reads"),
        (("look", "--effect", "read"), 0, "verdict: allow: no rule matches, and the tool only reads"),
        (("look",), 3, "verdict: ask: no rule matches, and the tool has an effect"),
        (("send", "--agent", "clerk-2"), 0, "verdict: allow by rule 'clerks-send'"),
        (("send", "--agent", "cook"), 3, "verdict: ask: no rule matches"),
        (("write_file", '{"path": "a.md"}'), 3, "verdict: ask: no rule matches"),
        (("write_file", '{"path": "../a.md"}', "--workspace", "."), 3, "verdict: ask: no rule matches"),
    ],
)
def test_the_exit_code_says_what_becomes_of_a_call(words: tuple[str, ...], code: int, verdict: str, run: Run) -> None:
    done, out, err = run("policy", "explain", *words)
    assert (done, err) == (code, "")
    assert any(line.startswith(verdict) for line in out.splitlines()), out
    assert ("allow for session" in out) == (code == 3)


def test_where_the_file_tools_work_is_known(run: Run) -> None:
    rule = "[rules.in-here]\naction = 'forbid'\ntool = '*_file'\nargs = { path = { not = { inside = 'workspace' } } }\n"
    Path("rules.toml").write_text(rule)
    assert run("policy", "explain", "read_file", '{"path": "a.md"}')[0] == 0
    assert run("policy", "explain", "read_file", '{"path": "../a.md"}')[0] == 1
    assert run("policy", "explain", "read_file", '{"path": "a.md"}', "--workspace", "/srv")[0] == 0
    code, out, _ = run("policy", "explain", "write_file", '{"path": "a.md"}')
    assert code == 1, out  # where another tool works cannot be told


def test_each_rule_is_explained_for_each_command(run: Run) -> None:
    _, out, _ = run("policy", "explain", "shell", "--command", "git status && git -C .. push")
    first, *lines = out.splitlines()
    assert first == 'shell {"cmd": "git status && git -C .. push"} · agent (any) · effect once · workspace (none)'
    assert lines[0] == "command ['git', 'status']"
    assert lines[1] == "rule 'look-around' (allow) matches"
    assert lines[6] == "command ['git', '-C', '..', 'push']"
    assert lines[8].startswith("rule 'no-push' (forbid) matches: ")
    assert len(lines) == 13


@pytest.mark.parametrize(
    ("words", "session"),
    [
        (("shell", "--command", "git log --oneline | wc -l"), ["shell: git log | wc -l"]),
        (("shell", "--command", "git log; ls -l src"), ["shell: git log", "shell: ls -l src"]),
        (("shell", "--command", "env ls"), []),
        (("post", '{"to": "ann"}'), ["post"]),
    ],
)
def test_it_says_what_a_yes_for_the_session_would_cover(words: tuple[str, ...], session: list[str], run: Run) -> None:
    code, out, _ = run("policy", "explain", *words)
    assert code == 3
    covered = ", ".join(f"'{scope}'" for scope in session)
    last = f"'allow for session' would cover {covered}" if session else "'allow for session' is not offered"
    assert out.splitlines()[-1] == last
    code, out, _ = run("policy", "explain", *words, "--json")
    assert (code, json.loads(out)["session"]) == (3, session)


def test_a_call_that_is_allowed_in_a_sandbox_is_asked_about(run: Run) -> None:
    words = ("policy", "explain", "write_file", '{"path": "a.md"}', "--workspace", ".")
    code, out, _ = run(*words)
    assert code == 3
    assert "verdict: allow_sandboxed by rule 'write-here'" in out
    assert "it is asked about: rule 'write-here' allows it in a sandbox only" in out
    code, out, err = run(*words, "--json")
    facts = json.loads(out)
    assert (code, err) == (3, "")
    assert (facts["verdict"], facts["action"], facts["rule"]) == ("allow_sandboxed", "ask", "write-here")
    assert (facts["args"], facts["workspace"]) == ({"path": "a.md"}, str(Path.cwd().resolve()))
    assert facts["lines"][-1].startswith("verdict: allow_sandboxed")


def test_what_a_run_may_spend_is_known(run: Run) -> None:
    assert run("policy", "explain", "buy")[0] == 0
    Path("harness.toml").write_text('policy = "rules.toml"\n[budget]\nmax_total_cost_usd = 0.5\n')
    code, out, _ = run("policy", "explain", "buy")
    assert code == 3
    assert "rule 'cheap' (allow) does not match: $0.5 left is at least 1: no" in out


def test_the_argument_that_holds_a_command_is_the_one_the_rules_name(run: Run) -> None:
    rule = '[rules.a]\naction = "forbid"\ntool = "term"\nargs = { command = { matches = ".*curl.*" } }\n'
    Path("other.toml").write_text(f'shell_tools = ["term"]\n{rule}')
    words = ("policy", "explain", "term", "--policy", "other.toml", "--command")
    assert run(*words, "curl example.org")[0] == 1
    assert run(*words, "ls")[0] == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("explain",), "TOOL requires an argument"),
        (("explain", " "), "TOOL is empty"),
        (("explain", "look", "{"), "ARGS-JSON: the arguments are not valid JSON"),
        (("explain", "look", "[1]"), "ARGS-JSON: the arguments must be one JSON object, not [1]"),
        (("explain", "look", '{"a": NaN}'), "ARGS-JSON: the arguments are not valid JSON"),
        (("explain", "look", '{"a": 1, "a": 2}'), "ARGS-JSON: "),
        (("explain", "look", "{}", "more"), "takes no more words"),
        (("explain", "shell", "{}", "--command", "ls"), "--command does not go with ARGS-JSON"),
        (("explain", "look", "--command", "ls"), "--command: 'look' is not known to take a command"),
        (("explain", "look", "--effect", "reed"), 'Invalid value "reed" for --effect'),
        (("explain", "look", "--agent", "a:b"), "agent_id must be a printable name"),
        (("explain", "send"), "rule 'clerks-send' depends on the agent that calls: name it with --agent"),
        (("explain", "look", "--policy", "gone.toml"), "cannot read the policy 'gone.toml'"),
        (("chek",), "chek"),
        (("check", "rules.toml", "more"), "takes no more words"),
    ],
)
def test_wrong_words_are_one_sentence(words: tuple[str, ...], said: str, run: Run) -> None:
    assert said in wrong(run("policy", *words))


def test_what_a_call_says_cannot_act_on_the_screen(run: Run) -> None:
    Path("other.toml").write_text('[rules.a]\naction = "ask"\nreason = "x\\u001b[2J\\ny"\n')
    code, out, _ = run("policy", "explain", "look\x1b[2J\nverdict: allow", '{"a":\n"\u202e"}', "--policy", "other.toml")
    assert code == 3
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert not any(line.startswith("verdict: allow") for line in out.splitlines())


def test_a_policy_of_a_checkout_is_read_without_trust_and_nothing_is_kept(run: Run, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    assert run("policy", "check")[0] == 0
    assert run("policy", "explain", "look")[0] == 3
    assert set(tmp_path.rglob("*")) == before
