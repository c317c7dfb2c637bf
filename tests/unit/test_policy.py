"""Rules: the strictest wins, what cannot be told never allows, and a wrong file names its line."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import ConfigError
from harness.hitl import Context, Policy, Rule, Verdict, decide, explain, load_policy
from harness.hitl.policy import ACTIONS, Action
from harness.hitl.policy_file import parse_policy
from harness.hitl.predicates import Between, Host, Inside, Matches, Not, OneOf, Predicate, Prefix, judge
from harness.messages import ToolCall

NOW = datetime(2030, 1, 1, tzinfo=UTC)
CONTEXT = Context(effect="once", now=NOW, workspace="/ws", agent_id="ann", tainted=False)
READ = msgspec.structs.replace(CONTEXT, effect="read")


def call(tool: str = "t", **args: object) -> ToolCall:
    return ToolCall("c1", tool, json.dumps(args))


def rule(action: Action = "allow", **words: object) -> Rule:
    return Rule(**{"id": action, "action": action, **words})  # type: ignore[arg-type]


def verdict(rules: list[Rule], the_call: ToolCall, context: Context = CONTEXT) -> Action:
    return decide(Policy(tuple(rules)), the_call, context).action


# --- the strictest wins, and the default ------------------------------------------------------------------------------


def test_without_a_rule_what_reads_is_allowed_and_an_effect_is_asked_for() -> None:
    assert verdict([], call(), READ) == "allow"
    assert verdict([], call()) == "ask"
    assert verdict([], call(), msgspec.structs.replace(CONTEXT, effect="idempotent")) == "ask"


@given(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=6))
def test_the_strictest_wins_in_any_order(actions: list[Action]) -> None:
    rules = [rule(action, id=f"r{number}") for number, action in enumerate(actions)]
    assert verdict(rules, call()) == max(actions, key=ACTIONS.index)
    assert verdict(rules, call(), READ) == max(actions, key=ACTIONS.index)


@given(
    st.lists(
        st.builds(
            lambda number, action, tool, name, value: Rule(
                id=str(number), action=action, tool=tool, args={name: OneOf((value,))}
            ),
            st.integers(0, 10**6),
            st.sampled_from(ACTIONS),
            st.sampled_from(["*", "t", "u"]),
            st.sampled_from(["a", "b"]),
            st.sampled_from([1, 2, "x"]),
        ),
        max_size=5,
        unique_by=lambda each: each.id,
    ),
    st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from([1, 2, "x", None, True, [1]])),
)
def test_another_rule_that_forbids_or_asks_never_makes_a_verdict_milder(
    rules: list[Rule], args: dict[str, object]
) -> None:
    without = verdict(rules, call(**args))
    for action in ("ask", "forbid"):
        assert ACTIONS.index(verdict([*rules, rule(action, id="more")], call(**args))) >= ACTIONS.index(without)


def test_a_tool_is_named_exactly_and_in_its_case() -> None:
    allow = rule(tool="mail_*")
    assert verdict([allow], call("mail_send")) == "allow"
    for other in ("Mail_send", "xmail_send", "mail", "mail_send\n"[:4]):
        assert verdict([allow], call(other)) == "ask"
    assert verdict([rule(tool="mail")], call("mail\n")) == "ask"
    assert verdict([rule(agent="b*")], call()) == "ask"
    assert verdict([rule(agent="a*")], call()) == "allow"


# --- what cannot be told ----------------------------------------------------------------------------------------------

PREDICATES: list[Predicate] = [
    Inside(("workspace",)),
    Host(("example.org",)),
    Between(0, 10),
    OneOf((1, "x", True)),
    Matches(".*"),
    Prefix(("ls",), ("*",)),
]
MALFORMED = [
    "{",
    "[]",
    "1",
    "null",
    '"x"',
    '{"a": NaN}',
    '{"a": Infinity}',
    '{"a": 1e999}',
    '{"a": 1, "a": 2}',
    '{"a": 1} x',
    '{"a": "\ud800"}',
    "[" * 5000,
]


@pytest.mark.parametrize("predicate", [*PREDICATES, *map(Not, PREDICATES)], ids=lambda each: repr(each)[:40])
@pytest.mark.parametrize("arguments", [*MALFORMED, "{}", '{"b": 1}', '{"a": null}', '{"a": [[]]}', '{"a": {}}'])
def test_what_cannot_be_told_never_allows_and_always_forbids(predicate: Predicate, arguments: str) -> None:
    the_call = ToolCall("c1", "t", arguments)
    for context in (CONTEXT, READ):
        assert verdict([rule("forbid", args={"a": predicate})], the_call, context) == "forbid"
        assert verdict([rule("ask", args={"a": predicate})], the_call, context) == "ask"
    allowed = verdict([rule("allow", args={"a": predicate})], the_call)
    assert allowed == "ask"


@pytest.mark.parametrize("arguments", MALFORMED)
def test_malformed_arguments_are_never_allowed(arguments: str) -> None:
    the_call = ToolCall("c1", "t", arguments)
    assert verdict([rule("allow")], the_call) == "ask"
    assert verdict([rule("allow")], the_call, READ) == "ask"
    assert verdict([], the_call, READ) == "ask"


@given(st.floats() | st.booleans() | st.none() | st.text(max_size=3) | st.integers())
def test_only_a_number_in_the_range_is_in_the_range(value: object) -> None:
    inside = judge(Between(0, 10), value) is True
    assert inside == (not isinstance(value, (bool, str)) and value is not None and 0 <= value <= 10)  # type: ignore[operator]


def test_values_are_compared_with_their_type() -> None:
    assert judge(OneOf((1,)), True) is None
    assert judge(OneOf((True,)), 1) is None
    assert judge(OneOf((1,)), 1.0) is True
    assert judge(OneOf((1,)), float("nan")) is None
    assert judge(OneOf(("a", 1)), "b") is False
    assert judge(Matches("a+"), "aaa") is True
    assert judge(Matches("a+"), "aaa\n") is False
    assert judge(Matches("a+"), "a" * 20_000) is None


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "holds"),
    [
        ("a.txt", True),
        (".", True),
        ("./a/./b", True),
        ("a/../b", True),
        ("a/b/../../c", True),
        ("/ws", True),
        ("/ws/a", True),
        ("...", True),
        ("..a/b", True),
        ("..", False),
        ("../x", False),
        ("a/../../x", False),
        ("/ws/../x", False),
        ("/wsx", False),
        ("/", False),
        ("/etc/passwd", False),
        ("a/../../ws/b", None),
        ("../ws/b", None),
        ("/etc/../ws/b", None),
        ("//ws/a", None),
        ("~/x", None),
        ("~root/x", None),
        ("$HOME/x", None),
        ("a\\..\\..\\x", None),
        ("C:/x", None),
        ("C:x", None),
        ("file:" + "//" + "/etc/passwd", None),
        ("file:/etc/passwd", None),
        ("http://x/", None),
        ("%2e%2e/x", None),
        ("a\0b", None),
        ("a\nb", None),
        ("\uff0e\uff0e/x", None),
        ("\u2025/x", None),
        ("a\uff0f..", None),
        ("\u202e/x", None),
        ("", None),
        (1, None),
        (None, None),
        (["a"], None),
    ],
)
def test_inside(path: object, holds: bool | None) -> None:
    assert judge(Inside(("workspace",)), path, "/ws") is holds
    assert judge(Not(Inside(("workspace",))), path, "/ws") is (None if holds is None else not holds)


def test_inside_a_part_of_the_workspace_or_another_folder() -> None:
    docs = Inside(("workspace/docs", "/data"))
    assert judge(docs, "docs/a", "/ws") is True
    assert judge(docs, "docs/../docs/a", "/ws") is True
    assert judge(docs, "docs/../a", "/ws") is False
    assert judge(docs, "/data/x", "/ws") is True
    assert judge(docs, "/datax", "/ws") is False
    assert judge(docs, "docs/a", "") is None
    assert judge(docs, "docs/a", "relative") is None


@given(st.lists(st.sampled_from(["..", ".", "a", "b", "ws", ""]), max_size=8), st.booleans())
def test_whatever_is_inside_stays_inside_at_every_step(steps: list[str], absolute: bool) -> None:
    path = ("/" if absolute else "") + "/".join(steps)
    if judge(Inside(("workspace",)), path, "/ws") is True:
        at = Path("/ws")
        for step in Path(path).parts:
            at = (at / step) if step != ".." else at.parent
        assert at.is_relative_to("/ws")


# --- hosts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "holds"),
    [
        ("https://example.org", True),
        ("http://example.org/", True),
        ("HTTPS://Example.ORG/a?b=c#d", True),
        ("https://example.org:443/", True),
        ("https://example.org/@user", True),
        ("https://a.sub.test/", True),
        ("https://x.a.sub.test/", True),
        ("http://[::1]:80/", True),
        ("http://[0:0:0:0:0:0:0:1]/", True),
        ("http://127.0.0.1/", True),
        ("http://box.test:8080/", True),
        ("http://[::2]:81/", True),
        ("http://[::2]/", None),
        ("https://sub.test/", False),
        ("https://evilsub.test/", False),
        ("https://evil.test/", False),
        ("https://example.org.evil.test/", False),
        ("https://evil.test/https://example.org/", False),
        ("https://example.org:444/", None),
        ("http://example.org:443/", None),
        ("http://box.test/", None),
        ("http://good@example.org/", None),
        ("http://example.org@evil.test/", None),
        ("http://example.org:80@evil.test/", None),
        ("http://example.org%40evil.test/", None),
        ("http://example.org\\@evil.test/", None),
        ("http://evil.test\\.example.org/", None),
        ("http://example.org#@evil.test/", None),
        ("http://example.org?@evil.test/", None),
        ("http://example.org;evil.test/", None),
        ("http://example.org.", None),
        ("http://example.org./", None),
        ("http://ex\u00e4mple.org/", None),
        ("http://example\u3002org/", None),
        ("http://\uff45xample.org/", None),
        ("http://example.org/\u00e4", None),
        (" http://example.org/", None),
        ("http://example.org /", None),
        ("http://exa\tmple.org/", None),
        ("http://example.org/\n", None),
        ("\x00http://example.org/", None),
        ("http:/example.org/", None),
        ("http:example.org/", None),
        ("http:///example.org/", None),
        ("//example.org/", None),
        ("example.org", None),
        ("ftp://example.org/", None),
        ("file://example.org/etc", None),
        ("javascript://example.org/", None),
        ("http://example.org:99999/", None),
        ("http://example.org:/", None),
        ("http://2130706433/", None),
        ("http://0x7f.1/", None),
        ("http://0x7f000001/", None),
        ("http://127.1/", None),
        ("http://0177.0.0.1/", None),
        ("http://[::ffff:127.0.0.1]/", None),
        ("http://[::1%25eth0]/", None),
        ("http://[v1.x]/", None),
        ("", None),
        (1, None),
        (None, None),
    ],
)
def test_host(url: object, holds: bool | None) -> None:
    host = Host(("example.org", "*.sub.test", "[::1]", "127.0.0.1", "box.test:8080", "[::2]:81"))
    assert judge(host, url) is holds


# --- commands ---------------------------------------------------------------------------------------------------------

STATUS = rule(tool="shell", args={"cmd": Prefix(("git", "status"), ("-s", "--porcelain="))})
LIST = rule(id="list", tool="shell", args={"cmd": Prefix(("ls",), ("*",))})
NO_RM = rule("forbid", tool="shell", args={"cmd": Prefix(("rm",))})
NO_PUSH = rule("forbid", id="no-push", tool="shell", args={"cmd": Prefix(("git", "push"))})


@pytest.mark.parametrize(
    ("command", "action"),
    [
        ("git status", "allow"),
        ("git status -s src", "allow"),
        ("git status --porcelain=v2 && ls -la", "allow"),
        (["git", "status", "-s"], "allow"),
        ("git status -v", "ask"),
        ("git status; date", "ask"),
        ("git status > x", "forbid"),
        ("git status; rm x", "forbid"),
        ("ls && git push --force", "forbid"),
        ("/bin/rm x", "forbid"),
        ("RM x", "forbid"),
        ("rm.exe x", "forbid"),
        ("sudo rm x", "forbid"),
        ("xargs rm", "forbid"),
        ("find . -exec rm x", "forbid"),
        ("bash -c 'rm x'", "forbid"),
        ("git -C x push", "forbid"),
        ("git -c alias.p=push p", "forbid"),
        (["sh", "-c", "cd x;rm y"], "forbid"),
        ("/bin/sh -c 'git push'", "forbid"),
        ("date rm", "ask"),
        ("git log push", "forbid"),
        ("git commit -m 'rm x'", "ask"),
        ("date", "ask"),
        ("$(x)", "forbid"),
        ("", "forbid"),
        ([], "forbid"),
        (["ls", 1], "forbid"),
        (1, "forbid"),
        (None, "forbid"),
    ],
)
def test_each_command_is_judged_and_the_strictest_verdict_holds(command: object, action: Action) -> None:
    assert verdict([STATUS, LIST, NO_RM, NO_PUSH], call("shell", cmd=command)) == action


def test_a_command_that_cannot_be_parsed_is_asked_for_at_least() -> None:
    assert verdict([rule(tool="shell")], call("shell", cmd="ls")) == "allow"
    assert verdict([rule(tool="shell")], call("shell", cmd="ls $X")) == "ask"
    assert verdict([], call("shell", cmd="ls $X"), READ) == "ask"
    assert verdict([], call("shell", script="ls"), READ) == "ask"
    assert verdict([rule(tool="shell")], call("shell", cmd="ls", command="rm x")) == "ask"


def test_what_stands_beside_a_command_has_to_be_spoken_for() -> None:
    assert verdict([STATUS], call("shell", cmd="git status", timeout_s=3)) == "allow"
    assert verdict([STATUS], call("shell", cmd="git status", env={"GIT_PAGER": "x"})) == "ask"
    assert verdict([STATUS], call("shell", cmd="git status", cwd="/elsewhere")) == "ask"
    here = msgspec.structs.replace(STATUS, args={**STATUS.args, "cwd": Inside(("workspace",))})
    assert verdict([here], call("shell", cmd="git status", cwd="src")) == "allow"
    assert verdict([here], call("shell", cmd="git status", cwd="/elsewhere")) == "ask"


def test_a_tool_can_be_declared_to_take_a_command() -> None:
    allow = rule(tool="terminal")
    assert decide(Policy((allow,)), call("terminal", cmd="ls $X"), CONTEXT).action == "allow"
    assert decide(Policy((allow,), ("terminal",)), call("terminal", cmd="ls $X"), CONTEXT).action == "ask"


def test_words_of_a_command_can_stand_in_any_argument() -> None:
    allow = rule(args={"argv": Prefix(("ls",))})
    assert verdict([allow], call(argv=["ls", "x"])) == "allow"
    assert verdict([allow], call(argv="ls x; ls y")) == "allow"
    assert verdict([allow], call(argv="ls x; rm y")) == "ask"
    assert verdict([allow], call(argv="ls > y")) == "ask"


# --- circumstances ----------------------------------------------------------------------------------------------------


def test_a_rule_expires() -> None:
    later = rule(expires=NOW + timedelta(seconds=1))
    assert verdict([later], call()) == "allow"
    assert verdict([rule(expires=NOW)], call()) == "ask"
    assert verdict([rule("forbid", expires=NOW)], call(), READ) == "allow"
    elsewhere = datetime(2030, 1, 1, 1, tzinfo=timezone(timedelta(hours=1)))  # the same instant
    assert verdict([rule(expires=elsewhere)], call()) == "ask"
    naive = msgspec.structs.replace(CONTEXT, now=datetime(2029, 1, 1))  # noqa: DTZ001 - it is what is tested
    assert verdict([later], call(), naive) == "ask"
    assert verdict([rule("forbid", expires=NOW)], call(), naive) == "forbid"


def test_a_rule_is_used_up() -> None:
    twice = rule(max_uses=2)
    for uses, action in ((0, "allow"), (1, "allow"), (2, "ask"), (3, "ask")):
        assert verdict([twice], call(), msgspec.structs.replace(CONTEXT, uses={"allow": uses})) == action


def test_the_rules_that_allowed_are_told() -> None:
    policy = Policy((rule(id="counted", max_uses=1), rule(id="free", tool="t")))
    assert decide(policy, call(), CONTEXT).used == ("free",)
    assert decide(policy, call("u"), CONTEXT).used == ("counted",)
    both = Policy((STATUS, LIST))
    assert decide(both, call("shell", cmd="ls; git status; ls"), CONTEXT).used == ("list", "allow")
    assert decide(both, call("shell", cmd="ls; date"), CONTEXT).used == ()


def test_taint_and_money() -> None:
    clean = rule(tainted=False)
    assert verdict([clean], call()) == "allow"
    for tainted in (True, None):
        assert verdict([clean], call(), msgspec.structs.replace(CONTEXT, tainted=tainted)) == "ask"
        known = msgspec.structs.replace(READ, tainted=tainted)
        assert verdict([rule("forbid", tainted=True)], call(), known) == "forbid"
    cheap = rule(spent_usd=Between(max=1), left_usd=Between(min=0.5))
    for spent, left, action in (
        (0.0, None, "allow"),
        (1.0, 0.5, "allow"),
        (1.1, None, "ask"),
        (0.0, 0.4, "ask"),
        (float("nan"), None, "ask"),
    ):
        assert verdict([cheap], call(), msgspec.structs.replace(CONTEXT, spent_usd=spent, left_usd=left)) == action


def test_the_reason_is_the_rules_own_and_says_what_cannot_be_told() -> None:
    no_rm = msgspec.structs.replace(NO_RM, reason="nothing is deleted here")
    assert decide(Policy((no_rm,)), call("shell", cmd="rm x"), CONTEXT).reason == "nothing is deleted here"
    reason = decide(Policy((no_rm,)), call("shell", cmd="x > y"), CONTEXT).reason
    assert reason.startswith("nothing is deleted here (it cannot be told whether cmd=")
    assert decide(Policy(), call("shell", cmd="x > y"), CONTEXT) == Verdict(
        "ask", reason="only a person can judge the command: it has a '>'"
    )


def test_explain_says_of_each_rule_whether_it_matches_and_why() -> None:
    lines = explain(Policy((STATUS, NO_RM)), call("shell", cmd="git status; rm \u0007x"), CONTEXT)
    assert lines[0] == "the call cannot be judged: only a person can judge the command: it has the character U+0007"
    lines = explain(Policy((STATUS, NO_RM)), call("shell", cmd="git status; rm x"), CONTEXT)
    assert lines == [
        "command ['git', 'status']",
        "rule 'allow' (allow) matches",
        "rule 'forbid' (forbid) does not match: cmd is a command that begins with 'rm' without flags: no",
        "command ['rm', 'x']",
        "rule 'allow' (allow) does not match: "
        "cmd is a command that begins with 'git status' with flags -s --porcelain=: no",
        "rule 'forbid' (forbid) matches",
        "verdict: forbid by rule 'forbid': rule 'forbid' says so",
    ]
    hostile = explain(Policy((rule(args={"a": Matches("x")}),)), call("t\x1b[2J", a="\x1b[2J\u202e" * 99), CONTEXT)
    assert all(line.isprintable() and line.isascii() and len(line) < 300 for line in hostile)


# --- what is refused when a rule is made ------------------------------------------------------------------------------


def test_examples_are_checked() -> None:
    prefix = {"cmd": Prefix(("git", "status"), ("-s",))}
    good = {"match": ("git status -s", {"command": ["git", "status"]}), "not_match": ("git push", "git status > x")}
    assert rule(args=prefix, **good).id == "allow"
    for words, message in (
        ({"match": ("git push",)}, "rule 'allow': it does not match its example 'git push' of match"),
        ({"match": ("git status | sh",)}, "does not match its example"),
        ({"not_match": ("git status -s; git status",)}, "rule 'allow': it matches its example"),
        ({"match": ("git status > x",)}, "it has a '>'"),
        ({"match": ({"cmd": "git status", "env": {}},)}, "'env', beside the command"),
    ):
        with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
            rule(args=prefix, **words)
    assert rule("forbid", args=prefix, match=("ls; git status", "ls > x"), not_match=("ls",)).action == "forbid"
    inside = {"path": Inside(("workspace",)), "n": Between(max=3)}
    assert rule(args=inside, match=({"path": "a", "n": 1},), not_match=({"path": "../a", "n": 1}, {"path": "a"})).args
    with pytest.raises(ConfigError, match=r"n=9 is at most 3: no"):
        rule(args=inside, match=({"path": "a", "n": 9},))
    assert rule(args={"cmd": Matches("ls .*")}, match=("ls x",), not_match=("rm x",)).args


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rule("alow"), "unknown action 'alow'; did you mean 'allow'"),
        (lambda: rule(expires=datetime(2030, 1, 1)), "needs a time zone"),  # noqa: DTZ001
        (lambda: rule(max_uses=0), "1 or more"),
        (lambda: rule("ask", max_uses=1), "for rules that allow"),
        (lambda: Policy((rule(), rule())), "two rules have this name"),
        (lambda: Inside(()), "a list with something in it"),
        (lambda: Inside("workspace"), "a list with something in it"),  # type: ignore[arg-type]
        (lambda: Inside(("docs",)), "must be 'workspace'"),
        (lambda: Inside(("workspace/../x",)), "must be 'workspace'"),
        (lambda: Host(("https://example.org",)), "a name in lower case"),
        (lambda: Host(("Example.org",)), "a name in lower case"),
        (lambda: Host(("ex*mple.org",)), "a name in lower case"),
        (lambda: Host(("example.org.",)), "a name in lower case"),
        (lambda: Host(("127.1",)), "a name in lower case"),
        (lambda: Host(("[0:0::1]",)), "a name in lower case"),
        (lambda: Host(("::1",)), "a name in lower case"),
        (lambda: Host(("*.*.example.org",)), "a name in lower case"),
        (Between, "a range of numbers"),
        (lambda: Between(2, 1), "a range of numbers"),
        (lambda: Between(float("nan")), "a range of numbers"),
        (lambda: OneOf(()), "a list with something in it"),
        (lambda: Matches("("), "not a regular expression"),
        (lambda: Prefix(()), "a list with something in it"),
        (lambda: Prefix(("ls",), ("l",)), "must begin with '-'"),
    ],
)
def test_a_wrong_rule_is_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


# --- the file ---------------------------------------------------------------------------------------------------------

FILE = """
shell_tools = ["terminal"]

[rules.look]
action = "allow"
tool = "shell"
args = { cmd = { prefix = ["git", "status"], flags = ["-s"] } }
match = ["git status -s"]
not_match = ["git status; rm x"]
max_uses = 3
expires = 2031-01-01T00:00:00Z

[rules.no-mail]
action = "forbid"
tool = "send_*"
agent = "ann"
reason = "no mail"
tainted = true
spent_usd = { min = 1 }

[rules.fetch.args]
url = { host = ["example.org", "*.example.org"] }
n = { min = 0, max = 10 }
mode = { in = ["a", 1] }
text = { equals = "x" }
name = { matches = "[a-z]+" }
path = { not = { inside = "workspace/secret" } }

[rules.fetch]
action = "allow_sandboxed"
match = [{ url = "https://a.example.org/", n = 3, mode = 1, text = "x", name = "b", path = "c" }]
"""


def test_a_file_says_what_python_says(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(FILE, encoding="utf-8")
    policy = load_policy(file)
    assert policy.shell_tools == ("terminal",)
    look, no_mail, fetch = policy.rules
    assert look == Rule(
        id="look",
        action="allow",
        tool="shell",
        args={"cmd": Prefix(("git", "status"), ("-s",))},
        match=("git status -s",),
        not_match=("git status; rm x",),
        max_uses=3,
        expires=datetime(2031, 1, 1, tzinfo=UTC),
    )
    assert (no_mail.agent, no_mail.tainted, no_mail.spent_usd) == ("ann", True, Between(min=1))
    assert fetch.args["path"] == Not(Inside(("workspace/secret",)))
    assert fetch.args["mode"] == OneOf(("a", 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'tool = "send_*"',
            'toll = "send_*"',
            r"p.toml:15: unknown word 'toll' in \[rules.no-mail\]; did you mean 'tool'",
        ),
        ("[rules.look]", "[rule.look]", r"p.toml:4: unknown word 'rule'; did you mean 'rules'"),
        ('"forbid"', '"forbit"', r"p.toml:14: rule 'no-mail': unknown action 'forbit'; did you mean 'forbid'"),
        ("max_uses = 3", 'max_uses = "3"', r"p.toml:10: rules.look.max_uses: expected `int"),
        ("00:00:00Z", "00:00:00", r"p.toml:11: rule 'look': expires needs a time zone"),
        ('"git status -s"', '"git push"', r"p.toml:8: rule 'look': it does not match its example 'git push'"),
        ('"git status; rm x"', '"git status"', r"p.toml:9: rule 'look': it matches its example 'git status'"),
        ("{ host =", "{ hots =", r"p.toml:22: unknown word 'hots' in \[rules.fetch.args.url\]; did you mean 'host'"),
        ("max = 10", "in = [1]", r"p.toml:23: rules.fetch.args.n: 'min' and 'in' do not go together"),
        ('equals = "x"', "equals = []", r"p.toml:25: rules.fetch.args.text.equals: expected"),
        ("[a-z]+", "[a-z", r"p.toml:26: rules.fetch.args.name: matches is not a regular expression"),
        ('{ equals = "x" }', "{}", r"p.toml:25: rules.fetch.args.text: says nothing"),
        ("min = 1 }", "mini = 1 }", r"p.toml:19: unknown word 'mini' in \[rules.no-mail.spent_usd\]"),
        ("tainted = true", "tainted = 1", r"p.toml:18: rules.no-mail.tainted: expected `bool"),
        ('agent = "ann"', "agent = ", r"p.toml:16: this is not TOML"),
        ('action = "forbid"', "", r"p.toml:13: rules.no-mail: object missing required field `action`"),
        ('["terminal"]', '"terminal"', r"p.toml:2: shell_tools: expected `array`, got `str`"),
    ],
)
def test_a_wrong_file_names_its_line_and_the_nearest_word(old: str, new: str, message: str) -> None:
    assert old in FILE
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        parse_policy(FILE.replace(old, new, 1), Path("p.toml"))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the policy"):
        load_policy(tmp_path / "none.toml")


def test_nothing_optional_is_loaded() -> None:
    code = (
        "import sys, harness, harness.hitl\n"
        "print({'pydantic', 'tree_sitter', 'harness.hitl.policy'} & set(sys.modules))\n"
        "harness.hitl.load_policy; harness.hitl.decide; print({'pydantic', 'tree_sitter'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\nset()\n"
