"""The console approver: what is shown, and what counts as an answer. On a pseudo-terminal of its own."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.hitl import ApprovalRequest, Approve, ApproveForSession, ConsoleApprover, Decision, Edit, Reject, Steer
from harness.hitl.banner import banner, choices, described, prompt, reply_of
from harness.hitl.keyboard import Keyboard
from harness.hitl.shown import rows

UNSEEN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e0fff]"
)
REQUEST = ApprovalRequest(
    approval_id="a1b2c3d4",
    tool="send",
    arguments={"to": "ann", "text": "hi"},
    digest="0123456789abcdef" * 4,
    run_id="r1",
    key="r1:worker",
    agent_id="worker",
    step=2,
    reason="this tool asks before it runs",
    session=("send",),
)


def asked(**changes: object) -> ApprovalRequest:
    fields = {name: getattr(REQUEST, name) for name in REQUEST.__struct_fields__}
    return ApprovalRequest(**(fields | changes))  # type: ignore[arg-type]


class Desk:
    """A person at a pseudo-terminal, and what they see."""

    def __init__(self) -> None:
        self._far, self._near = pty.openpty()
        self.seen = io.StringIO()
        self.keyboard = Keyboard(self._near)
        self._echo = threading.Thread(target=self._read, daemon=True)
        self._echo.start()

    def _read(self) -> None:
        while True:  # what is echoed must not fill the terminal up
            try:
                if not os.read(self._far, 65536):
                    return
            except OSError:
                return

    def approver(self, **given: object) -> ConsoleApprover:
        return ConsoleApprover(
            keyboard=self.keyboard,
            output=self.seen,
            resume=lambda key: f"harness resume {key}",
            **given,  # type: ignore[arg-type]
        )

    def type(self, keys: bytes) -> None:
        os.write(self._far, keys)

    async def sees(self, text: str, times: int = 1) -> None:
        until = time.monotonic() + 5
        while self.seen.getvalue().count(text) < times:
            assert time.monotonic() < until, self.seen.getvalue()
            await asyncio.sleep(0.005)

    async def answer(self, keys: bytes, request: ApprovalRequest = REQUEST, **given: object) -> Decision | None:
        """Ask, and type keys at the prompt."""
        task = asyncio.create_task(self.approver(**given).decide(request))
        await self.sees(prompt(request))
        self.type(keys)
        return await asyncio.wait_for(task, 10)

    def close(self) -> None:
        os.close(self._near)
        os.close(self._far)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


# -- what is shown ------------------------------------------------------------------------------


def test_the_banner() -> None:
    assert "\n".join(banner(REQUEST, "harness resume r1:worker")) == (
        "──── HITL Approval Required ────\n"
        "Tool: send\n"
        "Args: {\n"
        '    "to": "ann",\n'
        '    "text": "hi"\n'
        "  }\n"
        "Agent: worker  step=2\n"
        "Run: r1:worker\n"
        "ID: a1b2c3d4  digest=0123456789ab\n"
        "Why: this tool asks before it runs\n"
        "y = approve once | a = allow 'send' for session | n = reject | e = edit | <text> = steer\n"
        "Ctrl-C to pause. Resume: harness resume r1:worker"
    )
    assert prompt(REQUEST) == "Approve? [y/n/a/e/correction]:"


def test_a_is_offered_only_where_there_is_something_to_allow() -> None:
    request = asked(session=())
    assert choices(request) == "y = approve once | n = reject | e = edit | <text> = steer"
    assert prompt(request) == "Approve? [y/n/e/correction]:"
    assert reply_of("a", request)[0] is None
    assert reply_of("allow", request)[0] is None


def test_of_a_plan_every_task_is_shown() -> None:
    task = {"id": "t2", "agent_id": "sre", "instruction": "Look.\nThen\x1b[2J tell.", "depends_on": ["t1"]}
    plan = {"tasks": [task | {"on_failure": "retry", "max_retries": 3}]}
    text = "\n".join(described(asked(kind="plan", tool="plan", arguments=plan)))
    assert "  t2 · agent sre · after t1 · on failure retry · retries 3\n      Look.\n" in text
    assert "      Then\\x1b[2J tell." in text


def test_a_call_in_doubt_has_answers_of_its_own() -> None:
    request = asked(kind="in_doubt", session=(), reason="it was interrupted")
    assert "Why: it was interrupted" in described(request)
    assert choices(request) == (
        "y = run it again | n = leave its outcome unknown | <text> = say what came of it"
    )  # fmt: skip
    assert reply_of("e", request)[0] is None
    assert reply_of("it was sent", request)[0] == Steer("it was sent")


TEXT = st.text(max_size=60) | st.sampled_from(
    ["\x1b[2J\x1b]0;x\x07", "\u202egnp", "a\u200bb", "\x9b31m", "\r\n\r", "\ud800"]
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT, lambda inner: st.lists(inner, max_size=3), max_leaves=5
)


@given(
    tool=TEXT,
    arguments=st.dictionaries(TEXT, JSON_VALUES, max_size=4),
    agent_id=TEXT,
    key=TEXT,
    reason=TEXT,
    session=st.lists(TEXT, max_size=2).map(tuple),
    kind=st.sampled_from(["tool", "plan", "in_doubt"]),
    diff=TEXT,
)
def test_no_unseen_character_reaches_the_terminal(**fields: object) -> None:
    diff = str(fields.pop("diff"))
    request = asked(**fields)
    text = "\n".join([*banner(request, request.key, diff), prompt(request)])
    assert not UNSEEN.search(text)
    text.encode()
    # Nothing but the banner's own words stands at the left edge.
    own = "────", "Tool:", "Args:", "Diff:", "Agent:", "Run:", "ID:", "Why:", "y = ", "Ctrl-C", "Approve?", "Run it"
    assert all(line.startswith((*own, "  ")) for line in text.split("\n"))


@given(st.text(max_size=300), st.integers(4, 40))
def test_rows_leave_nothing_out(line: str, width: int) -> None:
    broken = list(rows(line.replace("\n", ""), width))
    assert broken[0] + "".join(row.removeprefix("  ") for row in broken[1:]) == line.replace("\n", "")
    assert all(row.startswith("  ") for row in broken[1:])


async def test_long_arguments_are_shown_page_by_page_and_whole(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "12")
    monkeypatch.setenv("COLUMNS", "80")
    request = asked(arguments={"lines": [f"line {number}" for number in range(40)], "end": "x" * 400 + "END"})
    task = asyncio.create_task(desk.approver().decide(request))
    pages = 0
    while prompt(request) not in desk.seen.getvalue():
        pages += 1
        await desk.sees("Enter for the next page", pages)
        assert "y" not in desk.seen.getvalue().rsplit("\n", 1)[-1].split("--")[0]
        desk.type(b"y\n")  # at the end of a page it is no answer
        await asyncio.sleep(0.1)
    assert pages > 4
    desk.type(b"n\n")
    assert await task == Reject()
    shown = desk.seen.getvalue()
    assert all(f'"line {number}"' in shown for number in range(40))
    assert "END" in shown
    assert shown.count("x") >= 400


# -- what counts as an answer -------------------------------------------------------------------

NOT_YES = [
    "",
    "   ",
    "yes please",
    "ye",
    "yess",
    "y y",
    "ok",
    "sure",
    "Y!",
    "yep",
    "approve",
    "1",
    "true",
    "oui",
    "y\u200b",
    "\uff59",  # a wide y
    "ye\u017f",  # a long s
    "\x1by",
]


@pytest.mark.parametrize("text", NOT_YES)
def test_what_is_not_exactly_yes_does_not_approve(text: str) -> None:
    decision, _ = reply_of(text, REQUEST)
    assert decision is None or isinstance(decision, (Steer, Reject))
    assert not isinstance(reply_of(text, asked(kind="in_doubt"))[0], (Approve, ApproveForSession))


@given(st.text(max_size=12))
def test_only_the_exact_words_approve(text: str) -> None:
    decision, _ = reply_of(text, REQUEST)
    approves = isinstance(decision, (Approve, ApproveForSession))
    assert approves == (text.strip(" \t\r\n").lower() in ("y", "yes", "a", "allow"))


@pytest.mark.parametrize(
    ("keys", "decision"),
    [
        (b"y\n", Approve()),
        (b"YES\n", Approve()),
        (b" y \n", Approve()),
        (b"a\n", ApproveForSession()),
        (b"Allow\n", ApproveForSession()),
        (b"n\n", Reject()),
        (b"No\n", Reject()),
        (b"n: not on a Friday\n", Reject("not on a Friday")),
        (b"NO:\n", Reject("")),
        (b"no need to hurry\n", Steer("no need to hurry")),
        (b"yes please\n", Steer("yes please")),
        ("nimm ü\n".encode(), Steer("nimm ü")),
        (b"y\nrm -rf /\n", Steer("y\nrm -rf /")),  # one paste is one answer
        (b"\x04", None),  # the end of the file
        (b"y\x04\x04", None),  # a line without its end, and then the end of the file
    ],
)
async def test_an_answer_at_the_terminal(keys: bytes, decision: Decision | None, desk: Desk) -> None:
    assert await desk.answer(keys) == decision
    assert ("'send' allowed for this session\n" in desk.seen.getvalue()) == isinstance(decision, ApproveForSession)


@pytest.mark.parametrize("keys", [b"\n", b"   \n", b"\t\n"])
async def test_what_is_no_answer_is_asked_again(keys: bytes, desk: Desk) -> None:
    task = asyncio.create_task(desk.approver().decide(asked(session=())))
    wanted = prompt(asked(session=()))
    await desk.sees(wanted)
    desk.type(b"a\n")  # not offered
    await desk.sees(wanted, 2)
    desk.type(keys)
    await desk.sees(wanted, 3)
    assert desk.seen.getvalue().count("Not approved: ") == 2
    desk.type(b"n\n")
    assert await task == Reject()


async def test_a_paste_of_a_megabyte_is_one_answer_and_approves_nothing(desk: Desk) -> None:
    task = asyncio.create_task(desk.approver().decide(REQUEST))
    await desk.sees(prompt(REQUEST))
    paste = b"y\n" + (b"yes " * 200 + b"\n") * 1300 + b"y\n"
    assert len(paste) > 1_000_000
    await asyncio.to_thread(_type_slowly, desk, paste)
    await desk.sees(prompt(REQUEST), 2)
    assert "characters are too many" in desk.seen.getvalue()
    assert not task.done()
    desk.type(b"n\n")
    assert await task == Reject()


def _type_slowly(desk: Desk, keys: bytes) -> None:
    for start in range(0, len(keys), 1000):  # a terminal holds four thousand characters
        desk.type(keys[start : start + 1000])


async def test_what_was_typed_before_the_prompt_is_no_answer(desk: Desk) -> None:
    desk.type(b"y\ny\ny")
    await asyncio.sleep(0.05)
    task = asyncio.create_task(desk.approver().decide(REQUEST))
    await desk.sees(prompt(REQUEST))
    await asyncio.sleep(0.2)
    assert not task.done()
    desk.type(b"n\n")
    assert await task == Reject()


async def test_questions_are_asked_one_after_the_other(desk: Desk) -> None:
    approver = desk.approver()
    first, second = (asyncio.create_task(approver.decide(asked(approval_id=name))) for name in ("one", "two"))
    await desk.sees(prompt(REQUEST))
    desk.type(b"y\ny\n")  # the second line is no answer to the second question
    assert await asyncio.wait_for(first, 5) == Steer("y\ny")
    await desk.sees(prompt(REQUEST), 2)
    await asyncio.sleep(0.2)
    assert not second.done()
    desk.type(b"n\n")
    assert await second == Reject()
    assert desk.seen.getvalue().index("ID: one") < desk.seen.getvalue().index("ID: two")


async def test_a_question_that_is_answered_elsewhere_closes_at_once(desk: Desk) -> None:
    task = asyncio.create_task(desk.approver().decide(REQUEST))
    await desk.sees(prompt(REQUEST))
    task.cancel()
    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 0.2
    assert desk.seen.getvalue().endswith("answered elsewhere\n")


async def test_the_event_loop_goes_on_while_somebody_thinks(desk: Desk) -> None:
    task = asyncio.create_task(desk.approver().decide(REQUEST))
    await desk.sees(prompt(REQUEST))
    began = time.monotonic()
    for _ in range(50):
        await asyncio.sleep(0.001)
    assert time.monotonic() - began < 1
    desk.type(b"n\n")
    await task


async def test_without_a_terminal_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert await ConsoleApprover().decide(REQUEST) is None


async def test_what_else_is_on_the_screen_waits(desk: Desk) -> None:
    order: list[str] = []

    class Surface:
        @asynccontextmanager
        async def pause(self, approval_id: str, /) -> AsyncIterator[None]:
            order.append(f"paused for {approval_id}")
            yield
            order.append("goes on")

    assert await desk.answer(b"y\n", surface=Surface()) == Approve()
    assert order == ["paused for a1b2c3d4", "goes on"]


async def test_lines_that_answer_nothing_go_to_the_listener(desk: Desk) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    desk.keyboard.listen(heard.put_nowait)
    desk.type(b"look at the log\n")
    assert await heard.get() == "look at the log"
    assert await desk.answer(b"y\n") == Approve()
    desk.type(b"and hurry\n")
    assert await heard.get() == "and hurry"
    desk.keyboard.close()
    assert heard.empty()


# -- editing, and what would change -------------------------------------------------------------


@pytest.fixture
def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def make(code: str) -> None:
        script = tmp_path / "edit.py"
        script.write_text(f"import sys\npath = sys.argv[1]\ntext = open(path).read()\n{code}\n")
        monkeypatch.setenv("EDITOR", f"{sys.executable} {script}")
        monkeypatch.delenv("VISUAL", raising=False)

    return make


async def test_editing_in_an_editor(desk: Desk, editor: Callable[[str], None]) -> None:
    editor("open(path, 'w').write(text.replace('ann', 'bob'))")
    assert await desk.answer(b"e\n") == Edit({"to": "bob", "text": "hi"})


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("open(path, 'w').write('{\"to\": ')", "is no JSON"),
        ("open(path, 'w').write('{\"to\": NaN}')", "NaN is no JSON"),
        ("open(path, 'w').write('[1]')", "must be a JSON object"),
        ("open(path, 'w').write(' ')", "nothing was edited"),
        ("pass", "nothing was changed"),
        ("sys.exit(3)", "exit code 3"),
    ],
)
async def test_an_edit_that_is_none_asks_again(
    code: str, problem: str, desk: Desk, editor: Callable[[str], None]
) -> None:
    editor(code)
    task = asyncio.create_task(desk.approver().decide(REQUEST))
    await desk.sees(prompt(REQUEST))
    desk.type(b"e\n")
    await desk.sees(prompt(REQUEST), 2)
    assert problem in desk.seen.getvalue()
    desk.type(b"n\n")
    assert await task == Reject()


async def test_an_editor_that_cannot_be_started_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISUAL", "/nowhere/editor")
    task = asyncio.create_task(desk.approver().decide(REQUEST))
    await desk.sees(prompt(REQUEST))
    desk.type(b"e\n")
    await desk.sees(prompt(REQUEST), 2)
    assert "the editor /nowhere/editor did not do its work" in desk.seen.getvalue()
    desk.type(b"\x04")
    assert await task is None


async def test_without_an_editor_json_is_typed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.delenv("EDITOR", raising=False)
    task = asyncio.create_task(desk.approver().decide(REQUEST))
    await desk.sees(prompt(REQUEST))
    desk.type(b"e\n")
    await desk.sees("Type the arguments as JSON")
    desk.type(b'{"to":\n')
    await asyncio.sleep(0.1)
    desk.type(b'"eve"}\n')
    assert await asyncio.wait_for(task, 5) == Edit({"to": "eve"})


async def test_a_file_that_would_be_written_is_compared(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("one\ntwo\n")
    request = asked(tool="write", arguments={"path": "notes.txt", "content": "one\n\x1b[2Jthree\n"})
    assert await desk.answer(b"y\n", request, workspace_of=lambda tool: str(tmp_path)) == Approve()
    shown = desk.seen.getvalue()
    assert "Diff:\n  --- notes.txt (now)\n  +++ notes.txt (then)\n" in shown
    assert "  -two\n  +\\x1b[2Jthree\n" in shown
    assert json.dumps("one\n\x1b[2Jthree\n") in shown  # and the argument itself is shown whole


@pytest.mark.parametrize("path", ["../outside.txt", "/etc/passwd", "missing.txt", "binary", ".", "link", "a\0b"])
async def test_no_file_outside_and_no_binary_is_compared(path: str, desk: Desk, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (tmp_path / "outside.txt").write_text("secret")
    (folder / "binary").write_bytes(b"\x00\xff")
    (folder / "link").symlink_to(tmp_path / "outside.txt")
    request = asked(tool="write", arguments={"path": path, "content": "x"})
    await desk.answer(b"n\n", request, workspace_of=lambda tool: str(folder))
    assert "Diff:" not in desk.seen.getvalue()
    assert "secret" not in desk.seen.getvalue()
