"""The console approver: asks the person at the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol, TextIO, cast

from harness import host
from harness.approval import ApproveForSession, Decision, Edit
from harness.hitl.banner import banner, diff_of, prompt, reply_of, scope_of, written_file
from harness.hitl.base import ApprovalRequest
from harness.hitl.keyboard import Keyboard
from harness.hitl.shown import rows, safe, safe_word
from harness.messages import JSON

MOST_DIFF_BYTES = 200_000
"""Bytes of a file that a difference is shown of; the new text is shown whole in any case."""


class Surface(Protocol):
    """What else is shown on the terminal, and has to wait while somebody is asked."""

    def pause(self, approval_id: str, /) -> AbstractAsyncContextManager[None]:
        """Show nothing until the context is left. What came before the question is shown first."""
        ...


class ConsoleApprover:
    """Asks the person at the terminal, one question after the other; where there is no terminal it does not answer.

    Only ``y``, ``yes``, ``a`` and ``allow``, alone on their line, approve. ``n`` or ``no`` rejects, ``n: reason`` says
    why; ``e`` opens the arguments in ``$VISUAL`` or ``$EDITOR``; any other text steers. An empty line asks again, and
    the end of the file leaves the question open.

    Args:
        surface: what else is shown on the terminal.
        keyboard: what reads the terminal, where somebody else reads it, too; None reads standard input.
        output: where the question is shown; None takes stdout, or stderr where that alone is a terminal.
        resume: returns the line that goes on with a run, by its key; None names the running script's.
        workspace_of: returns the folder a tool works in, by its name; the difference a call would make to a file in
            there is shown.

    >>> ConsoleApprover().name.startswith("console:")
    True
    """

    def __init__(
        self,
        *,
        surface: Surface | None = None,
        keyboard: Keyboard | None = None,
        output: TextIO | None = None,
        resume: Callable[[str], str] | None = None,
        workspace_of: Callable[[str], str] | None = None,
    ) -> None:
        self.name = f"console:{host.who()}"
        self._surface = surface
        self._keyboard = keyboard
        self._output = output
        self._resume = resume or _resume_this_script
        self._workspace_of = workspace_of
        self._turn: asyncio.Lock | None = None
        self._turn_of: asyncio.AbstractEventLoop | None = None
        self._drafts: dict[str, str] = {}

    async def decide(self, request: ApprovalRequest, /) -> Decision | None:
        """Ask, and return the answer; None where there is no terminal, or at the end of the file."""
        output = self._output or _terminal_of_output()
        keyboard = self._keyboard or _keyboard()
        if output is None or keyboard is None:
            return None
        async with self._one_at_a_time():
            if self._surface is None:
                return await self._ask(request, _Console(output, keyboard))
            async with self._surface.pause(request.approval_id):
                return await self._ask(request, _Console(output, keyboard))

    def _one_at_a_time(self) -> asyncio.Lock:
        loop = asyncio.get_running_loop()
        if self._turn is None or self._turn_of is not loop:  # a lock belongs to one event loop
            self._turn, self._turn_of = asyncio.Lock(), loop
        return self._turn

    async def _ask(self, request: ApprovalRequest, console: _Console) -> Decision | None:
        try:
            with console.keyboard.asking():
                diff = await self._diff(request)
                if not await console.page(banner(request, self._resume(request.key or request.run_id), diff)):
                    return None
                decision = await self._answer(request, console)
        except asyncio.CancelledError:
            late = request.expires_at and time.time() >= request.expires_at
            console.say("" if _is_stopping() else f"\n{'too late to answer' if late else 'answered elsewhere'}")
            raise
        if isinstance(decision, ApproveForSession):
            console.say(f"{scope_of(request)} allowed for this session")
        return decision

    async def _answer(self, request: ApprovalRequest, console: _Console) -> Decision | None:
        while True:
            console.write(f"{prompt(request)} ")
            text = await console.keyboard.answer()
            if text is None:
                console.say("\nNo answer: the question stays open.")
                return None
            reply, problem = reply_of(text, request)
            if reply == "edit":
                arguments, problem = await self._edit(request, console)
                if arguments is not None:
                    return Edit(arguments)
            elif reply is not None:
                return reply
            if problem:
                console.say(f"Not approved: {problem}.")

    # -- editing --------------------------------------------------------------------------------

    async def _edit(self, request: ApprovalRequest, console: _Console) -> tuple[dict[str, JSON] | None, str]:
        """Have the arguments edited. Returns them, or why there are none."""
        before = json.dumps(request.arguments, indent=2, ensure_ascii=False)
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
        if not editor:
            text = await _typed(console)
        else:
            try:
                text = await _edited(self._drafts.get(request.approval_id, before), shlex.split(editor), console)
            except (OSError, ValueError) as error:
                return None, f"the editor {safe_word(editor)} did not do its work: {safe_word(str(error))}"
        if text is None:
            return None, "nothing was edited"
        self._drafts[request.approval_id] = text  # what the tool refuses is mended, not written anew
        try:
            arguments: object = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            return None, f"what was edited is no JSON: {safe_word(str(error))}"
        if not isinstance(arguments, dict):
            return None, "the arguments must be a JSON object, in braces"
        if arguments == request.arguments:
            return None, "nothing was changed"
        return cast("dict[str, JSON]", arguments), ""

    # -- what would change ----------------------------------------------------------------------

    async def _diff(self, request: ApprovalRequest) -> str:
        """Return what a call that writes a file would change in it; empty where that cannot be said."""
        written = written_file(request.arguments)
        folder = self._workspace_of(request.tool) if self._workspace_of is not None else ""
        if written is None or not folder or request.kind == "plan" or len(written[1]) > MOST_DIFF_BYTES:
            return ""
        before = await asyncio.to_thread(_text_inside, Path(folder), written[0])
        return "" if before is None else diff_of(written[0], before, written[1])


class _Console:
    """A terminal: where questions are shown, and what reads the answers."""

    def __init__(self, output: TextIO, keyboard: Keyboard) -> None:
        self.keyboard = keyboard
        self._output = output

    def write(self, text: str) -> None:
        self._output.write(safe(text))
        self._output.flush()

    def say(self, text: str) -> None:
        self.write(f"{text}\n")

    async def page(self, lines: list[str]) -> bool:
        """Show lines, a screen at a time where they are more than one. Returns False at the end of the file."""
        size = shutil.get_terminal_size()
        # The last line is the command that resumes the run: it can be copied as it is.
        every = [*(row for line in lines[:-1] for row in rows(line, size.columns)), lines[-1]]
        most = max(5, size.lines - 2)
        everything = len(every) <= most
        while len(every) > most and not everything:
            page, every = every[: most - 1], every[most - 1 :]
            self.say("\n".join(page))
            self.write(f"-- {len(every)} more rows: Enter for the next page, all for the rest -- ")
            text = await self.keyboard.answer()
            if text is None:
                self.say("\nNo answer: the question stays open.")
                return False
            everything = text.strip().lower() == "all"
        self.say("\n".join(every))
        self.keyboard.drain()
        return True


def _resume_this_script(key: str) -> str:
    return host.resume_command(host.script_origin(), key)


def _is_stopping() -> bool:
    """Say whether more than this question ends: then it was not answered elsewhere, but the run is being stopped."""
    here = asyncio.current_task()
    return any(task.cancelling() for task in asyncio.all_tasks() if task is not here)


def _terminal_of_output() -> TextIO | None:
    return next((stream for stream in (sys.stdout, sys.stderr) if _is_terminal(stream)), None)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _keyboard() -> Keyboard | None:
    return Keyboard(sys.stdin.fileno()) if _is_terminal(sys.stdin) else None


def _refuse(word: str) -> object:
    raise ValueError(f"{word} is no JSON")


async def _typed(console: _Console) -> str | None:
    """Read JSON that is typed, up to where it is whole or an empty line."""
    console.say("No editor is set ($VISUAL, $EDITOR). Type the arguments as JSON; an empty line ends them.")
    text = ""
    while (line := await console.keyboard.answer()) is not None:
        if not line.strip():
            return text or None
        text += f"{line}\n"
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(text)
            return text
        if line.endswith("\n"):
            return text
    return None


async def _edited(text: str, editor: list[str], console: _Console) -> str | None:
    """Have a text edited in a program of the user's."""
    path = _private_file(f"{text}\n")
    try:
        with console.keyboard.lent():
            process = await asyncio.create_subprocess_exec(*editor, str(path))
            try:
                code = await process.wait()
            except BaseException:  # raised again: the program must not outlive the question
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                raise
        if code:
            raise ValueError(f"it ended with exit code {code}")
        return _text_of(path)
    finally:
        _forget(path)


def _private_file(text: str) -> Path:
    fd, name = tempfile.mkstemp(prefix="harness-", suffix=".json")  # for nobody else to read
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
    return Path(name)


def _text_of(path: Path) -> str | None:
    text = path.read_text(encoding="utf-8")
    return text if text.strip() else None


def _forget(path: Path) -> None:
    path.unlink(missing_ok=True)


def _text_inside(folder: Path, path: str) -> str | None:
    """Return the text of a small file inside of a folder; None where it is none, or lies outside."""
    try:
        root = folder.resolve()
        file = (root / path).resolve()
        if not file.is_relative_to(root) or not file.is_file() or file.stat().st_size > MOST_DIFF_BYTES:
            return None
        text = file.read_bytes().decode()
    except (OSError, ValueError, RuntimeError):  # no such file, no text, a path that cannot be one
        return None
    return None if "\0" in text else text
