"""Shell commands: only what bash would execute word for word is accepted, and no trick is allowed for a session."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from harness.hitl.shell import (
    SHELL_NAMES,
    Argv,
    Ask,
    command_of,
    covered,
    parse,
    session_scope,
    session_scopes,
)

BASH = shutil.which("bash")


def words_of(command: str) -> list[list[str]]:
    parsed = parse(command)
    assert not isinstance(parsed, Ask), parsed.reason
    return [list(each.words) for each in parsed]


# What somebody allowed for the session, and what then must be asked all the same.
TRICKS = [
    ("git status", "git status; rm -rf x"),
    ("git status", "git status;rm x"),
    ("git status", "git status && rm x"),
    ("git status", "git status || rm x"),
    ("git status", "git status | sh"),
    ("git status", "git status & rm x"),
    ("git status", "git status\nrm x"),
    ("git status", "git status\r\nrm x"),
    ("git status", "git status \\\n; rm x"),
    ("git status", "git status $(rm x)"),
    ("git status", "git status `rm x`"),
    ("git status", 'git status "$(rm x)"'),
    ("git status", 'git status "`rm x`"'),
    ("git status", "git status <(rm x)"),
    ("git status", "git status >(rm x)"),
    ("git status", "git status > ~/.bashrc"),
    ("git status", "git status >> x"),
    ("git status", "git status 2> x"),
    ("git status", "git status &> x"),
    ("git status", "git status < x"),
    ("git status", "git status << E\nE"),
    ("git status", "git status <<< x"),
    ("git status", "git -c alias.x='!sh' x"),
    ("git status", "git -c core.fsmonitor=./x status"),
    ("git status", "git -c core.pager=./x status"),
    ("git status", "git -C /elsewhere status"),
    ("git status", "git --exec-path=/tmp/x status"),
    ("git status", "git --git-dir=/tmp/x status"),
    ("git status", "git --work-tree=/ status"),
    ("git status", "git -p status"),
    ("git status", "git --config-env=core.pager=X status"),
    ("git status", "GIT_PAGER=./x git status"),
    ("git status", "GIT_DIR=x git status"),
    ("git status", "A+=1 git status"),
    ("git status", "env git status"),
    ("git status", "./git status"),
    ("git status", "/tmp/git status"),
    ("git status", "git status --ignored=$X"),
    ("git status", "git statusx"),
    ("git status", "git 'status;rm x'"),
    ("git status", "'git status'"),
    ("git status", "git"),
    ("git status", "git status() { rm x; }"),
    ("git status", "function git { rm x; }; git status"),
    ("git status", "alias git=rm; git status"),
    ("git status", "(git status; rm x)"),
    ("git status", "{ git status; rm x; }"),
    ("git status", "! git status"),
    ("git status", "time git status"),
    ("git status", "coproc git status"),
    ("git status", "eval git status"),
    ("git status", "exec git status"),
    ("git status", "command git status"),
    ("git status", "builtin git status"),
    ("git status", "source git status"),
    ("git status", ". git status"),
    ("git status", "cd /elsewhere && git status"),
    ("git status", "pushd /elsewhere; git status"),
    ("git status", "export GIT_PAGER=x; git status"),
    ("git status", "if git status; then rm x; fi"),
    ("git status", "while git status; do rm x; done"),
    ("git status", "for i in git status; do rm x; done"),
    ("git status", "case git in git) rm x;; esac"),
    ("git status", "[[ git == status ]]"),
    ("git status", "((x=1)); git status"),
    ("git status", "git status # ; rm x"),
    ("git status", "git status $'\\x3b' rm"),
    ("git status", 'git status $"x"'),
    ("git status", "git status !rm"),
    ("git status", 'git status "!rm"'),
    ("git status", "git st*"),
    ("git status", "git st?tus"),
    ("git status", "git [s]tatus"),
    ("git status", "git {status,rm}"),
    ("git status", "git @(status|rm)"),
    ("git status", "git status ~root"),
    ("git status", "git status /etc"),
    ("git status", "git status ../../elsewhere"),
    ("git status", "git\u00a0status; rm x"),
    ("git status", "git\u2003status"),
    ("git status", "git status\u2028rm x"),
    ("git status", "git status\x00; rm x"),
    ("git status", "git status \x1b[2K"),
    ("git status", "git status \u202e x"),
    ("git status", "git status \u200b x"),
    ("git status", "git status '\u200b'"),
    ("git status", "g\u0456t status"),
    ("git status", "\uff47it status"),
    ("git status", "git status \ud800"),
    ("git status", "git status |& sh"),
    ("git status", "git status |"),
    ("git status", "| git status"),
    ("git status", "git status ;; rm x"),
    ("git status", "git status 'x"),
    ("git status", 'git status "x'),
    ("git status", "git status \\"),
    ("git status", "git status %{x}"),
    ("git status", "git status" + "; git status" * 50),
    ("git status", "git status " + "x" * 10_000),
    ("git diff", "git diff --output=x"),
    ("git diff", "git diff --output x"),
    ("git diff", "git diff --outp=x"),
    ("git diff", "git diff --ext-diff"),
    ("git diff", "git diff --textconv"),
    ("git diff", "git diff --no-index /etc/shadow /dev/null"),
    ("git diff", "git diff /etc/shadow /dev/null"),
    ("git diff", "git diff -O/etc/shadow"),
    ("git log", "git log --output=x -p"),
    ("git log", "git log -p --ext-diff"),
    ("git log", "git log | sh"),
    ("git show", "git show HEAD:../../x"),
    ("git branch", "git branch -D main"),
    ("git ls-files", "git ls-files --with-tree=x"),
    ("ls", "ls; rm x"),
    ("ls", "ls -l"),
    ("ls", "ls /etc"),
    ("ls", "ls | xargs rm"),
    ("ls", "ls | sh"),
    ("env", "env -S 'rm x'"),
    ("env", "env"),
    ("env ls", "env rm x"),
    ("sed -n p x", "sed 1e x"),
    ("sed", "sed -i s/a/b/w x"),
    ("sed -n 1p x", "sed -n 1p x"),
    ("awk 1 x", "awk 'BEGIN{system(\"rm x\")}'"),
    ("awk 1 x", "awk 1 x"),
    ("tar -tf x", "tar -tf x --checkpoint=1 --checkpoint-action=exec=sh"),
    ("tar -tf x", "tar --to-command=sh -xf x"),
    ("tar -tf x", "tar -I sh -xf x"),
    ("sort x", "sort -o y x"),
    ("sort x", "sort --compress-program=sh x"),
    ("find .", "find . -fprint x"),
    ("find .", "find . -exec rm x +"),
    ("find .", "find . -delete"),
    ("find .", "find ."),
    ("xargs ls", "xargs rm"),
    ("make", "make --eval 'x:;rm y'"),
    ("make test", "make test SHELL=./x"),
    ("python x.py", "python -c 'import os'"),
    ("python3.11 x.py", "python3.11 x.py"),
    ("perl x", "perl -e 'unlink x'"),
    ("node x.js", "node -e x"),
    ("npm test", "npm test --script-shell=./x"),
    ("npx tsc", "npx anything"),
    ("ssh host ls", "ssh -o ProxyCommand=x host ls"),
    ("scp a b", "scp -S ./x a b"),
    ("rsync a b", "rsync -e ./x a b"),
    ("docker ps", "docker run -v /:/x i"),
    ("sudo ls", "sudo rm x"),
    ("nohup ls", "nohup rm x"),
    ("time ls", "time rm x"),
    ("timeout 1 ls", "timeout 1 rm x"),
    ("watch ls", "watch rm x"),
    ("parallel ls", "parallel rm"),
    ("nice ls", "nice rm x"),
    ("stdbuf -o0 ls", "stdbuf -o0 rm x"),
    ("setsid ls", "setsid rm x"),
    ("busybox ls", "busybox rm x"),
    ("bash x", "bash -c 'rm x'"),
    ("sh x", "sh -c 'rm x'"),
    ("vim x", "vim -c ':!rm x'"),
    ("less x", "less +'!rm x' x"),
    ("man ls", "man -P ./x ls"),
    ("rg x", "rg --pre ./x y"),
    ("split x", "split --filter=./x y"),
    ("zip a b", "zip a b -TT ./x -T"),
    ("curl https://example.org/", "curl -o x https://example.org/"),
    ("cat x", "cat /etc/shadow"),
    ("cat x", "cat x y"),
    ("echo x", "echo x | tee y"),
    ("tee y", "echo x | tee y"),
    ("xargs", "echo x|xargs"),
    ("rm x", "rm -rf x"),
    ("rm x", "rm x y"),
    ("npm", "NPM.cmd test"),
]


def test_the_corpus_is_larger_than_the_known_tricks() -> None:
    assert len(set(TRICKS)) > 150


@pytest.mark.parametrize(("allowed", "trick"), TRICKS, ids=[ascii(trick)[:40] for _, trick in TRICKS])
def test_no_trick_is_covered(allowed: str, trick: str) -> None:
    # What was allowed is both what the program offers and what somebody may have written down by hand.
    scopes = {allowed, *(session_scopes(allowed) or ()), allowed.partition(" ")[0]}
    assert not covered(trick, scopes)


def test_some_commands_are_covered() -> None:
    pairs = [
        ("git status", "git status"),
        ("git status", "git status -s -- src/a.py"),
        ("git status -s", "git status --porcelain=v2"),
        ("git log", "git log --oneline -n 5 HEAD^ src"),
        ("git log", "git log -5 main..topic"),
        ("ls -l src", "ls   -l 'src'"),
        ("git status && ls", "ls; git status -b"),
        ("git log | head -5", "git log --oneline | head -5"),
    ]
    for allowed, command in pairs:
        scopes = session_scopes(allowed)
        assert scopes is not None
        assert covered(command, scopes), command


@pytest.mark.parametrize(
    ("words", "scope"),
    [
        (("git", "status", "-s"), "git status"),
        (("git", "commit", "-m", "a b"), "git commit -m 'a b'"),
        (("git", "diff", "--output=x"), "git diff --output=x"),
        (("git", "-c", "a=b", "status"), None),
        (("git", "--version"), None),
        (("git",), None),
        (("ls",), "ls"),
        (("ls", "-l", "a b"), "ls -l 'a b'"),
        (("python3.12", "x.py"), None),
        (("PYTHON.EXE", "x.py"), None),
        (("gcc-12", "x.c"), None),
        (("./ls",), None),
        (("/bin/ls",), None),
        (("..",), None),
        (("cd", "x"), None),
        (("",), None),
        ((), None),
        (("ls", "a\nb"), None),
        (("ls", "\x1b[2J"), None),
        (("ls", "\u202e"), None),
    ],
)
def test_the_scope_of_a_command(words: tuple[str, ...], scope: str | None) -> None:
    assert session_scope(words) == scope


def test_a_scope_that_is_too_long_to_be_shown_is_not_offered() -> None:
    assert session_scopes("ls " + "x" * 300) is None
    assert session_scopes(("ls", "x" * 300)) is None
    assert session_scopes(" | ".join(["ls -l"] * 40)) is None


def test_commands_of_a_pipeline_are_allowed_together_only() -> None:
    assert session_scopes("cat x | nl") == ("cat x | nl",)
    assert not covered("cat x | nl", {"cat x", "nl"})
    assert not covered("cat x", {"cat x | nl"})
    assert not covered(("cat", "x", "|", "nl"), {"cat x | nl"})
    assert covered("date && cat x | nl; date", {"date", "cat x | nl"})


def test_words_are_what_bash_makes_of_them() -> None:
    assert words_of("ls") == [["ls"]]
    assert words_of("  ls\t-l  'a b' ") == [["ls", "-l", "a b"]]
    assert words_of("""x "it's" 'a"b' a'b'"c"d ''""") == [["x", "it's", 'a"b', "abcd", ""]]
    assert words_of(r"""x "a\"b\\c\d" 'a\b'""") == [["x", r'a"b\c\d', r"a\b"]]
    assert words_of("x '$HOME `y` * ~ # ; | & > !'") == [["x", "$HOME `y` * ~ # ; | & > !"]]
    assert words_of('x "* ~ # ; | & > é"') == [["x", "* ~ # ; | & > é"]]
    assert words_of("x A=1 2 -- --a=b,c:d @e %f +g h^") == [
        ["x", "A=1", "2", "--", "--a=b,c:d", "@e", "%f", "+g", "h^"]
    ]


def test_the_operators_are_kept() -> None:
    parsed = parse("a&&b  ||  c;d|e")
    assert parsed == (Argv(("a",)), Argv(("b",), "&&"), Argv(("c",), "||"), Argv(("d",), ";"), Argv(("e",), "|"))


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("", "there is no command"),
        ("  ", "there is no command"),
        ("echo $HOME", "'$'"),
        ("ls > x", "'>'"),
        ("ls &", "'&'"),
        ("ls\nls", "more than one line"),
        ("ls\x00", "U+0000"),
        ("ls\u00a0x", "U+00A0"),
        ("A=1 ls", "variable assignment"),
        ("then", "language"),
        ("cd x", "'cd' acts on the shell itself"),
        ("'' x", "no name"),
        ("export A=1", "declaration command"),
        ("x 'y", "not a command line"),
        ("x;" * 51 + "x", "more than 50 commands"),
        ("x" * 8001, "longer than 8000 characters"),
        ("ls;", "';'"),
        ("ls é", "'é'"),
    ],
)
def test_the_reason_is_said(command: str, reason: str) -> None:
    parsed = parse(command)
    assert isinstance(parsed, Ask)
    assert reason in parsed.reason


def test_fifty_commands_are_accepted() -> None:
    assert len(words_of("; ".join(["x"] * 50))) == 50


@pytest.mark.parametrize(
    "piece", ["a&&", "a|", "a;", "(", "{ ", "$(", "`", '"', "'", "[", "<<a ", "if ", "a=", "\\", "((", "x[", "$"]
)
def test_what_is_nested_or_repeated_is_answered_quickly(piece: str) -> None:
    started = time.process_time()
    parse(piece * (7_900 // len(piece)) + "a")
    assert time.process_time() - started < 1


def test_the_command_of_a_call() -> None:
    assert frozenset({"shell", "bash", "run", "exec"}) == SHELL_NAMES
    assert command_of({"cmd": "ls"}) == "ls"
    assert command_of({"command": ["ls", "-l"], "timeout_s": 3}) == ("ls", "-l")
    assert command_of({"command": "ls", "cwd": None}) == "ls"
    for args in (
        {},
        {"cmd": 1},
        {"cmd": []},
        {"cmd": ["ls", 1]},
        {"cmd": "ls", "command": "rm x"},
        {"cmd": "ls", "env": {"PAGER": "x"}},
        {"cmd": "ls", "cwd": "/"},
        {"script": "ls"},
    ):
        assert command_of(args) is None, args


def test_without_the_grammar_everything_is_asked() -> None:
    code = (
        "import sys; sys.modules['tree_sitter_bash'] = None\n"
        "from harness.hitl.shell import covered, parse, session_scopes\n"
        "print(parse('ls').reason, session_scopes('ls'), covered('ls', {'ls'}), session_scopes(('ls',)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "install the extra 'shell'" in done.stdout
    assert done.stdout.endswith("None False ('ls',)\n")


def test_the_grammar_is_loaded_with_the_first_command() -> None:
    code = "import sys, harness, harness.hitl.shell; print({'tree_sitter', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- against the real bash -------------------------------------------------------------------------------------------

# Every command is unknown to this bash, whose handler for unknown commands writes down the words it was given.
HANDLER = 'command_not_found_handle() { printf "%s\\0" "$#" "$@" >&3; }; export -f command_not_found_handle; '


def what_bash_runs(command: str, folder: Path) -> list[list[str]]:
    """Return the words of each command that bash executes, sorted: the parts of a pipeline run at the same time."""
    assert BASH
    out = folder / "words"
    script = HANDLER + 'PATH=/nowhere exec "$1" -c "$2" 3>"$3"'
    subprocess.run(
        [BASH, "-c", script, "-", BASH, command, str(out)], stdin=subprocess.DEVNULL, check=False, cwd=folder
    )
    fields = [os.fsdecode(field) for field in out.read_bytes().split(b"\0")[:-1]]
    found: list[list[str]] = []
    while fields:
        count = int(fields[0])
        found.append(fields[1 : 1 + count])
        del fields[: 1 + count]
    return sorted(found)


def what_we_would_run(parsed: tuple[Argv, ...]) -> list[list[str]]:
    """Return the words of each command that is executed where every one succeeds."""
    found: list[list[str]] = []
    skipped = False
    for each in parsed:
        if each.joint != "|":
            skipped = each.joint == "||"
        if not skipped:
            found.append(list(each.words))
    return sorted(found)


plain = st.text("xyz01_./:,+=@%-^", min_size=1, max_size=6)
quoted = st.one_of(
    st.text(st.characters(exclude_characters="'", exclude_categories=("C",)), max_size=6).map(lambda t: f"'{t}'"),
    st.text("xyz '#;|&<>*~()[]{}\\\t", max_size=6).map(lambda t: f'"{t}"'),
    st.sampled_from(['"\\""', '"\\\\"', '"\\x"', "''", '""']),
)
word = st.lists(st.one_of(plain, quoted), min_size=1, max_size=3).map("".join)
name = st.text("xyz", min_size=1, max_size=3)
blank = st.sampled_from([" ", "  ", "\t"])
one = st.builds(lambda first, sep, rest: sep.join([first, *rest]), name, blank, st.lists(word, max_size=4))
joint = st.sampled_from(["&&", " && ", "||", " || ", ";", " ; ", "|", " | "])
line = st.lists(st.tuples(joint, one), max_size=3).flatmap(
    lambda tail: one.map(lambda first: first + "".join(j + c for j, c in tail))
)
# Anything at all, of the characters that matter to a shell.
_MIXED = [*"xyz01 \t'\"\\$`!<>(){}[]*?~#;|&=+-@^%:,./é", "&&", "||", "$(", "${", "<<", "\n", "''", "x=", "if "]
soup = st.one_of(
    st.lists(st.sampled_from(_MIXED), max_size=24).map("".join),
    st.text("xy1 '\";|&=+-@^%:,./\\", max_size=10),
)

bash_settings = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.skipif(BASH is None, reason="there is no bash")
@bash_settings
@given(command=line)
@example(command="x 'a'\"b\"c\t''||y;z|x")
def test_bash_executes_exactly_the_words_that_were_parsed(command: str, tmp_path: Path) -> None:
    parsed = parse(command)
    if not isinstance(parsed, Ask):
        assert what_bash_runs(command, tmp_path) == what_we_would_run(parsed)


@pytest.mark.skipif(BASH is None, reason="there is no bash")
@bash_settings
@given(rest=soup)
def test_bash_agrees_on_whatever_is_accepted_of_a_soup(rest: str, tmp_path: Path) -> None:
    command = f"x {rest}"
    parsed = parse(command)
    if not isinstance(parsed, Ask) and all(set(each.words[0]) <= set("xyz") for each in parsed):
        assert what_bash_runs(command, tmp_path) == what_we_would_run(parsed)


@given(command=line)
def test_most_plain_lines_are_accepted(command: str) -> None:
    parsed = parse(command)
    if isinstance(parsed, Ask):
        # What is left are characters that only quotes would take the meaning from, and escapes at a string's end.
        assert "^" in command or "\\" in command or not command.replace("\t", "").isprintable(), (
            command,
            parsed.reason,
        )


@settings(max_examples=1000, deadline=None)
@given(rest=st.one_of(soup, st.text(max_size=30)), glue=st.sampled_from(["", " ", ";", "\n", "|", "&"]))
def test_nothing_a_grammar_can_make_is_allowed_beyond_the_scope(rest: str, glue: str) -> None:
    command = f"git status{glue}{rest}"
    if covered(command, {"git status", "git", "x", "xx"}):
        for words in words_of(command):
            assert words[:2] == ["git", "status"] or words in (["x"], ["xx"]), command
            assert shlex.join(words).isprintable()


@given(text=st.text(max_size=60))
def test_parsing_never_raises(text: str) -> None:
    parsed = parse(text)
    assert isinstance(parsed, Ask) or all(each.words and each.words[0] for each in parsed)
    session_scopes(text)
