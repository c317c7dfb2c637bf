"""The person at the terminal of a run: who is asked when a call waits for approval, and who steers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from harness import host
from harness.cli.ledger import Ledger
from harness.cli.screen import Screen
from harness.errors import HarnessError
from harness.events import ApprovalRequested, Event
from harness.hitl.console import ConsoleApprover
from harness.hitl.keyboard import Keyboard
from harness.records import Origin
from harness.registry import ToolRegistry

CATCH_UP_S = 2.0
"""Seconds a question waits for what came before it to be shown."""


class Asking:
    """Shares a terminal between the events of a run, the questions it asks, and what a person says unasked.

    Args:
        here: whether a person is at the terminal and is to be asked.

    Attributes:
        approver: asks them; None where nobody is here, and a run that has a question parks.
    """

    def __init__(self, *, here: bool) -> None:
        self._keyboard = Keyboard(sys.stdin.fileno()) if here else None
        self.approver = (
            ConsoleApprover(
                surface=self,
                keyboard=self._keyboard,
                output=sys.stdout,
                resume=lambda key: host.resume_command(Origin("cli"), key),
                workspace_of=self._workspace_of,
            )
            if here
            else None
        )
        self.tools = ToolRegistry()
        self._screen: Screen | None = None
        self._ledger = Ledger()
        self._may_show = asyncio.Event()
        self._may_show.set()
        self._news = asyncio.Event()
        self._has_begun = False
        self._asked: set[str] = set()

    @classmethod
    def at_terminal(cls, *, as_json: bool, park: bool) -> Asking:
        """Return what fits this process: a person is asked where they see the question and can type an answer."""
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        return cls(here=terminal and not as_json and not park)

    @property
    def is_here(self) -> bool:
        """Whether a person is."""
        return self.approver is not None

    def attach(self, screen: Screen, ledger: Ledger) -> None:
        """Take the screen of a run, whose open questions have been shown before."""
        self._screen, self._ledger = screen, ledger
        self._asked.update(ledger.state.questions)

    # -- events and questions take turns --------------------------------------------------------

    async def may_show(self) -> None:
        """Wait while a question is on the screen."""
        await self._may_show.wait()

    def shown(self, event: Event) -> None:
        """Note that an event was shown."""
        self._has_begun = True
        if isinstance(event, ApprovalRequested):
            self._asked.add(event.approval_id)
        self._news.set()

    @asynccontextmanager
    async def pause(self, approval_id: str, /) -> AsyncGenerator[None]:
        """Show no event while a question is on the screen; see ``harness.hitl.console.Surface``."""
        try:
            async with asyncio.timeout(CATCH_UP_S):
                while not (self._has_begun and approval_id in self._asked):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            pass  # it is asked all the same
        self._may_show.clear()
        if self._screen is not None:
            self._screen.suspend()
        try:
            yield
        finally:
            self._ledger.attach()  # the run's clock stood still
            if self._screen is not None:
                self._screen.go_on()
            self._may_show.set()

    def _workspace_of(self, tool: str) -> str:
        return self.tools.get(tool).spec.workspace if tool in self.tools.all_names() else ""

    # -- said unasked ---------------------------------------------------------------------------

    def listen(self, listener: Callable[[str], None]) -> None:
        """Give a listener what is typed while no question is open; does nothing where nobody is here."""
        if self._keyboard is not None:
            self._keyboard.listen(listener)

    def close(self) -> None:
        """Leave the terminal as it was found. More than one call does nothing."""
        if self._keyboard is not None:
            self._keyboard.close()

    def restore(self) -> None:
        """Leave the terminal as it was found, from any thread."""
        if self._keyboard is not None:
            self._keyboard.restore()


class Steering:
    """Sends what a person types while a run works.

    Args:
        send: sends one line.
        say: shows what became of it.
    """

    def __init__(self, send: Callable[[str], asyncio.Task[None] | None], say: Callable[[str], None]) -> None:
        self._send = send
        self._say = say
        self._under_way: set[asyncio.Task[None]] = set()

    def take(self, line: str) -> None:
        """Send a line; an empty one says nothing."""
        if not line.strip():
            return
        task = self._send(line.strip())
        if task is None:
            self._say("not sent: the run has not begun")
            return
        self._under_way.add(task)
        task.add_done_callback(lambda task: self._sent(task, line.strip()))

    def _sent(self, task: asyncio.Task[None], line: str) -> None:
        self._under_way.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, HarnessError):
            self._say(f"not sent: {error}")
        elif error is not None:
            raise error
        else:  # what is typed is not echoed, and the agents are told only after the call they wait for
            self._say(f"sent to the run: {line}")

    async def join(self) -> None:
        """Wait for what is on its way."""
        if self._under_way:
            await asyncio.wait(set(self._under_way))
