"""The file tools: what they show, and that nothing outside the folder can be reached."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from harness import AgentConfig, AgentRuntime, MemoryCheckpointStore
from harness.approval import GatedCall
from harness.errors import ConfigError, ToolError
from harness.hitl import Policy, Rule
from harness.hitl.gate import gate_of
from harness.hitl.predicates import Inside, Not
from harness.llm.chat_request import chat_body
from harness.records import LLMStarted
from harness.testing import ScriptedLLM, call
from harness.tools import InvalidArguments, ToolContext, file_tools, tool

CONTEXT: ToolContext[object] = ToolContext("run", "0/0", None)
SECRET = "top secret line"
ALL_FOUR = (
    "[searched: a.py, b.txt, sub/c.txt, sub/deep/d.py; it may be there in other words: read the files that matter]"
)

Run = Callable[..., Awaitable[str]]


def runner(folder: Path) -> Run:
    tools = {each.spec.name: each for each in file_tools(folder)}

    async def run(name: str, **arguments: object) -> str:
        return (await tools[name](arguments, CONTEXT)).text

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with some files; beside it one that must never be read."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text(SECRET)
    (tmp_path / "folder-too").mkdir()
    (tmp_path / "folder-too" / "secret.txt").write_text(SECRET)
    root = tmp_path / "folder"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("needle in git")
    (root / "b.txt").write_text("one\ntwo Needle\nthree\n")
    (root / "a.py").write_text("print('needle')\n")
    (root / "sub" / "c.txt").write_text("nothing here")
    (root / "sub" / "deep" / "d.py").write_text("# x\r\n# NEEDLE\r\n")
    (root / "image.bin").write_bytes(b"\x89PNG\0needle")
    return root


@pytest.fixture
def run(folder: Path) -> Run:
    return runner(folder)


# --- what they show -------------------------------------------------------------------------------------------------


async def test_list_files(run: Run) -> None:
    assert await run("list_files") == "a.py\nb.txt\nimage.bin\nsub/c.txt\nsub/deep/d.py"
    assert await run("list_files", path="sub") == "sub/c.txt\nsub/deep/d.py"
    assert await run("list_files", path="b.txt") == "b.txt"
    assert await run("list_files", pattern="*.none") == "no files match the pattern '*.none' in '.'"


@pytest.mark.parametrize("path", ["", ".", "./", "sub/.//", "./sub"])
async def test_spellings_of_a_folder(run: Run, path: str) -> None:
    assert "sub/c.txt" in await run("list_files", path=path)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.py", "a.py\nsub/deep/d.py"),
        ("**/*.py", "a.py\nsub/deep/d.py"),
        ("./*.py", "a.py\nsub/deep/d.py"),
        ("sub/*.py", "sub/deep/d.py"),
        ("deep/*", "sub/deep/d.py"),
        ("sub/**/*.txt", "sub/c.txt"),
        ("?.txt", "b.txt\nsub/c.txt"),
        ("s*", "no files match the pattern 's*' in '.'"),
        ("", "a.py\nb.txt\nimage.bin\nsub/c.txt\nsub/deep/d.py"),
    ],
)
async def test_patterns(run: Run, pattern: str, expected: str) -> None:
    assert await run("list_files", pattern=pattern) == expected


async def test_read_file(run: Run) -> None:
    assert await run("read_file", path="b.txt") == "one\ntwo Needle\nthree"
    assert await run("read_file", path="./sub/deep/d.py") == "# x\n# NEEDLE"
    assert (
        await run("read_file", path="b.txt", start_line=2, max_lines=1)
        == "two Needle\n[lines 2 to 2 of 3; to go on, use start_line 3]"
    )
    assert await run("read_file", path="b.txt", start_line=3) == "three\n[lines 3 to 3 of 3]"


async def test_read_file_at_its_edges(folder: Path, run: Run) -> None:
    (folder / "empty").write_bytes(b"")
    (folder / "latin").write_bytes(b"caf\xe9\n")
    (folder / "bom").write_bytes(b"\xef\xbb\xbfhello")
    (folder / "long").write_text("x" * 50_000 + "\nnext\n")
    (folder / "many").write_text("".join(f"line {number}\n" for number in range(1, 5001)))
    assert await run("read_file", path="empty") == "(the file is empty)"
    assert await run("read_file", path="latin") == "caf\ufffd"
    assert await run("read_file", path="bom") == "hello"
    long = await run("read_file", path="long")
    assert len(long) < 13_000
    assert "line 1 has 50000 characters; only the first 12000 are shown" in long
    assert "to go on, use start_line 2" in long
    assert (await run("read_file", path="many")).endswith("[lines 1 to 500 of 5000; to go on, use start_line 501]")
    pages, start = "", 1
    while start <= 5000:  # reading on as the note says shows every line once
        page = (await run("read_file", path="many", start_line=start, max_lines=3000)).split("\n[")[0]
        pages += page + "\n"
        start += page.count("\n") + 1
    assert pages == (folder / "many").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"path": "none.txt"}, "there is no 'none.txt'"),
        ({"path": "b.txt/c"}, "there is no 'b.txt/c'"),
        ({"path": "sub"}, "'sub' is a folder"),
        ({"path": "."}, "'.' is a folder"),
        ({"path": "image.bin"}, "is not a text file"),
        ({"path": "b.txt", "start_line": 4}, "has 3 lines"),
        ({"path": "b.txt", "start_line": 0}, "must be 1 or more"),
        ({"path": "b.txt", "max_lines": -1}, "must be 1 or more"),
    ],
)
async def test_an_error_says_what_to_do(run: Run, arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ToolError) as caught:
        await run("read_file", **arguments)
    assert text in str(caught.value)


async def test_a_wrong_path_is_told_which_exist(folder: Path, run: Run) -> None:
    for wrong in ("settings.json", "/settings.json", "../settings.json"):
        with pytest.raises(ToolError) as caught:
            await run("read_file", path=wrong)
        assert str(caught.value).endswith(
            ". These exist, use one of them: a.py, b.txt, image.bin, sub/c.txt, sub/deep/d.py"
        )
    for number in range(20):
        (folder / f"n{number:02}").write_text("x")
    with pytest.raises(ToolError) as caught:
        await run("list_files", path="settings")
    named = str(caught.value).partition("use one of them: ")[2]
    assert named == "a.py, b.txt, image.bin, n00, n01, n02, n03, n04 and others, which list_files shows"
    with pytest.raises(ToolError, match=r"use one of them: sub/deep/d\.py and others"):
        await run("read_file", path="deep/d.py")


async def test_search_files(run: Run) -> None:
    found = "a.py:1: print('needle')\nb.txt:2: two Needle\nsub/deep/d.py:2: # NEEDLE"
    assert await run("search_files", text="needle") == found
    assert await run("search_files", text="NEEDLE", pattern="*.txt") == "b.txt:2: two Needle"
    assert await run("search_files", text="needle", path="sub") == "sub/deep/d.py:2: # NEEDLE"
    assert await run("search_files", text="needle", path="b.txt") == "b.txt:2: two Needle"
    assert await run("search_files", text="(needle|x") == f"no line contains '(needle|x' (4 files searched)\n{ALL_FOUR}"
    for text in ("", "  ", "a\nb"):
        with pytest.raises(ToolError, match="must be one line"):
            await run("search_files", text=text)


async def test_a_search_in_vain_names_some_of_the_files(folder: Path, run: Run) -> None:
    for number in range(20):
        (folder / "sub" / "deep" / f"n{number:02}").write_text("nothing")
    said, note = (await run("search_files", text="elephant", path="sub")).split("\n")
    assert said == "no line contains 'elephant' (22 files searched)"
    assert note.startswith("[searched: sub/c.txt, sub/deep/d.py, sub/deep/n00,")
    assert "sub/deep/n05 and others; " in note
    assert "n06" not in note
    assert await run("search_files", text="x", pattern="*.none") == "no line contains 'x' (0 files searched)"


async def test_a_search_in_vain_shows_the_lines_with_the_most_of_the_words(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "oncall.txt").write_text("2026-11-02 Piet Haan\n2026-11-09 Mirela Voss\n")
    (tmp_path / "a.txt").write_text("Call us.\nWe call nobody on 2026-11-09, though.\n" + "call\n" * 50)
    run = runner(tmp_path)
    first, *nearest, note = (await run("search_files", text="Who is on call, 2026-11-09?")).split("\n")
    assert first == (
        "no line contains 'Who is on call, 2026-11-09?' (2 files searched); "
        "lines with 2 of the words who, call, 2026-11-09:"
    )
    assert nearest == ["a.txt:2: We call nobody on 2026-11-09, though."]
    assert note.startswith("[searched: a.txt, notes/oncall.txt;")
    _, *nearest, _ = (await run("search_files", text="on 2026-11-02 at")).split("\n")
    assert nearest == ["notes/oncall.txt:1: 2026-11-02 Piet Haan"]
    _, *nearest, _ = (await run("search_files", text="call elephants")).split("\n")
    assert nearest == ["a.txt:1: Call us.", "a.txt:2: We call nobody on 2026-11-09, though."] + [
        f"a.txt:{number}: call" for number in range(3, 11)
    ]
    for nothing in ("elephant", "on it", "two elephants"):
        said = await run("search_files", text=nothing)
        assert said.startswith(f"no line contains {nothing!r} (2 files searched)\n[")


async def test_only_the_start_of_a_huge_file_is_read(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.write(b"first\n" + b"\n" * 10_000)
        file.truncate(10_000_001)  # a hole of zeros: nothing is written to the disk
        file.seek(20_000_000)
        file.write(b"needle")
    run = runner(tmp_path)
    assert "only the first 10000000 of 20000006 bytes are read" in await run("read_file", path="huge", max_lines=1)
    assert "of huge only the first 10000000 bytes were searched" in await run("search_files", text="needle")


async def test_results_are_bounded_and_say_so(tmp_path: Path) -> None:
    for number in range(600):
        (tmp_path / f"{number:03}.txt").write_text("hit " * 2000)
    run = runner(tmp_path)
    listed = await run("list_files")
    assert listed.count(".txt") == 500
    assert listed.startswith("000.txt\n001.txt")
    assert "only the first 500 files are listed" in listed
    found = await run("search_files", text="hit")
    assert len(found) < 13_000
    assert "the search stopped after" in found
    assert "more lines are not shown" in found


def test_the_descriptions_hold_nothing_to_copy(folder: Path) -> None:
    for each in file_tools(folder):
        text = f"{each.spec.name} {each.spec.description} {each.spec.schema}"  # all that a model is told of it
        assert each.spec.effect == "read"
        assert not any(sign in text for sign in ("e.g.", "example", "*.py", "src", "folder/", str(folder)))
        assert each.spec.schema["additionalProperties"] is False
    with pytest.raises(InvalidArguments, match="Accepted arguments"):
        file_tools(folder)[1].validate('{"file": "b.txt"}')


def test_the_folder_must_exist(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file", "a\0b"):
        with pytest.raises(ConfigError, match="file_tools needs"):
            file_tools(path)


# --- what they must not show ----------------------------------------------------------------------------------------

ESCAPES = [
    "..",
    "../outside/secret.txt",
    "../folder-too/secret.txt",
    "sub/../../outside/secret.txt",
    "sub/deep/../../../outside/secret.txt",
    "./../outside/secret.txt",
    ".//..//outside/secret.txt",
    "sub/..",
    "../folder/b.txt",
    "none/../../outside/secret.txt",
    "{outside}/secret.txt",
    "/{outside}/secret.txt",
    "///{outside}/secret.txt",
    "{folder}/b.txt",
    "/etc/passwd",
    "/proc/self/environ",
    "/dev/zero",
    "/",
    "//",
    "link-file",
    "link-folder/secret.txt",
    "link-folder",
    "link-relative/secret.txt",
    "link-absolute-in-two/secret.txt",
    "link-chain/secret.txt",
    "sub/link-up/outside/secret.txt",
    "link-root/etc/passwd",
    "link-sibling/secret.txt",
    "link-loop",
    "link-loop/secret.txt",
    "link-dangling",
    "link-proc/environ",
    "link-device",
    "~/secret.txt",
    "~root/.profile",
    "$HOME/secret.txt",
    "%2e%2e/outside/secret.txt",
    "..\\outside\\secret.txt",
    "file://{outside}/secret.txt",
    "b.txt\0",
    "\0",
    "b.txt\0/../../outside/secret.txt",
    "sub\n/../../outside/secret.txt",
    "\udcff/../../outside/secret.txt",
    "\ud800",
    "a" * 300,
    "a/" * 3000,
    "pipe",
    "socket",
]


@pytest.fixture
def trapped(folder: Path) -> Path:
    """The folder with every kind of way out in it."""
    outside = folder.parent / "outside"
    for name, target in {
        "link-file": outside / "secret.txt",
        "link-folder": outside,
        "link-relative": "../outside",
        "link-absolute-in-two": folder / "link-folder",
        "link-chain": "link-relative",
        "link-root": "/",
        "link-sibling": "../folder-too",
        "link-loop": "link-loop",
        "link-dangling": outside / "none",
        "link-proc": "/proc/self",
        "link-device": "/dev/zero",
        "sub/link-up": "../..",
    }.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.open(folder, os.O_RDONLY)
        try:
            listening.bind(f"/proc/self/fd/{here}/socket")  # a socket's own path may only be short
        finally:
            os.close(here)
    return folder


@pytest.mark.parametrize("spelling", ESCAPES)
@pytest.mark.parametrize(("name", "extra"), [("read_file", {}), ("list_files", {}), ("search_files", {"text": "e"})])
async def test_no_spelling_leads_out(trapped: Path, spelling: str, name: str, extra: dict[str, object]) -> None:
    path = spelling.format(outside=trapped.parent / "outside", folder=trapped) if "{" in spelling else spelling
    with pytest.raises(ToolError) as caught:
        await runner(trapped)(name, path=path, **extra)
    assert len(str(caught.value)) < 6000
    assert "secret line" not in str(caught.value)


async def test_walks_pass_by_every_way_out(trapped: Path) -> None:
    run = runner(trapped)
    assert await run("list_files") == "a.py\nb.txt\nimage.bin\nsub/c.txt\nsub/deep/d.py"
    assert await run("search_files", text=SECRET) == f"no line contains {SECRET!r} (4 files searched)\n{ALL_FOUR}"


async def test_a_link_that_stays_inside_can_be_read(folder: Path, run: Run) -> None:
    (folder / "inside").symlink_to("sub/deep")
    assert await run("read_file", path="inside/d.py") == "# x\n# NEEDLE"
    assert await run("list_files", path="inside") == "sub/deep/d.py"


async def test_a_folder_exchanged_for_a_link_meanwhile(folder: Path, run: Run) -> None:
    (folder / "door").mkdir()
    (folder / "door" / "secret.txt").write_text("harmless")
    (folder / "out").symlink_to("../outside")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for here, there in (("door", "kept"), ("out", "door"), ("door", "out"), ("kept", "door")):
                (folder / here).rename(folder / there)

    thread = threading.Thread(target=swap)
    thread.start()
    shown: set[str] = set()
    try:
        for _ in range(300):
            with contextlib.suppress(ToolError):
                shown.add(await run("read_file", path="door/secret.txt"))
            assert "secret.txt:1" not in await run("search_files", text=SECRET)
    finally:
        stop.set()
        thread.join()
    assert shown == {"harmless"}  # the race was on: some reads got through, none got out


async def test_names_that_are_not_plain_text(folder: Path, run: Run) -> None:
    for name in ("two\nlines", "\x1b[31mred", os.fsdecode(b"\xff")):
        (folder / name).write_text("needle")
    listed = await run("list_files")
    assert r"'two\nlines'" in listed
    assert "\x1b" not in listed
    listed.encode()
    (await run("search_files", text="needle")).encode()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_what_may_not_be_read_is_a_note(folder: Path, run: Run) -> None:
    (folder / "sub").chmod(0)
    try:
        assert "[" in await run("list_files")
        with pytest.raises(ToolError, match="cannot be read"):
            await run("list_files", path="sub")
    finally:
        (folder / "sub").chmod(0o700)


# --- what a policy knows of them ------------------------------------------------------------------------------------


def decided(folder: Path, arguments: str, rule: Rule) -> str:
    """What becomes of a call of read_file where one rule asks where its path leads."""
    specs = {each.spec.name: each.spec for each in file_tools(folder)}
    gate = gate_of(AgentConfig("a"), specs, Policy((rule,)))
    assert gate is not None
    return gate(GatedCall("read_file", arguments, "read", "a")).action


INSIDE = Rule(id="inside", action="allow", tool="read_file", args={"path": Inside(("workspace",))})
OUTSIDE = Rule(id="outside", action="forbid", tool="read_file", args={"path": Not(Inside(("workspace",)))})
TRICKS = [
    "../outside/secret.txt",
    "sub/../../outside/secret.txt",
    "../folder-too/secret.txt",
    "../folder/../outside/secret.txt",
    "/etc/passwd",
    "sub/./../../folder-too/secret.txt",
    "..",
    "~/secret.txt",
    "sub\\..\\..\\outside",
    "\uff0e\uff0e/outside/secret.txt",
    "",
]


@pytest.mark.parametrize("path", ["b.txt", "sub/deep/d.py", "./b.txt", "sub/../b.txt", "not there"])
def test_a_rule_can_tell_that_a_path_is_inside_the_folder(folder: Path, path: str) -> None:
    arguments = json.dumps({"path": path})
    assert decided(folder, arguments, msgspec.structs.replace(INSIDE, action="ask")) == "ask"
    assert decided(folder, arguments, OUTSIDE) == "allow"
    assert decided(folder, json.dumps({"path": str(folder / path)}), OUTSIDE) == "allow"


@pytest.mark.parametrize("path", TRICKS)
async def test_no_path_that_leads_out_is_taken_for_one_inside(folder: Path, run: Run, path: str) -> None:
    arguments = json.dumps({"path": path})
    assert decided(folder, arguments, OUTSIDE) == "forbid"
    with pytest.raises(ToolError):
        await run("read_file", path=path, start_line=1, max_lines=5)


async def test_a_link_that_leads_out_is_not_followed_though_its_path_is_inside(folder: Path, run: Run) -> None:
    (folder / "link").symlink_to(folder.parent / "outside")
    arguments = json.dumps({"path": "link/secret.txt"})
    assert decided(folder, arguments, OUTSIDE) == "allow", "a path is text to a rule"
    with pytest.raises(ToolError, match="leads outside"):
        await run("read_file", path="link/secret.txt", start_line=1, max_lines=5)


def test_a_folder_that_is_reached_by_a_link_is_known_by_where_it_is(folder: Path) -> None:
    (folder.parent / "other name").symlink_to(folder)
    assert {each.spec.workspace for each in file_tools(folder.parent / "other name")} == {str(folder.resolve())}


def test_where_the_folder_is_costs_no_tokens_and_is_told_to_no_model(folder: Path) -> None:
    llm = ScriptedLLM([call("list_files"), "Done."])
    runtime = AgentRuntime(
        llm=llm,
        agents=[AgentConfig("a")],
        tools=file_tools(folder),
        checkpoint_store=MemoryCheckpointStore(),
        auto_resume=False,
    )
    result = asyncio.run(runtime.run_agent("a", "Go."))
    deep = folder / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    there = AgentRuntime(
        llm=ScriptedLLM([call("list_files"), "Done."]),
        agents=[AgentConfig("a")],
        tools=file_tools(deep),
        checkpoint_store=MemoryCheckpointStore(),
        auto_resume=False,
    )
    other = asyncio.run(there.run_agent("a", "Go."))
    records = [[entry.record for entry in each.trace] for each in (result, other)]
    sizes = [next(record.tokens for record in those if isinstance(record, LLMStarted)) for those in records]
    assert sizes[0] == sizes[1]
    body = json.dumps(chat_body(llm.requests[0], "m", is_openai=True))
    assert "list_files" in body
    assert str(folder) not in body


def test_a_workspace_is_an_absolute_path() -> None:
    @tool(effect="read", workspace=Path("/srv/site"))
    def read(path: str) -> str:
        return path

    assert read.spec.workspace == "/srv/site"
    for wrong in ("site", 5):
        with pytest.raises(ConfigError, match="workspace must be the absolute path of a folder"):
            tool(workspace=wrong)  # type: ignore[call-overload]
