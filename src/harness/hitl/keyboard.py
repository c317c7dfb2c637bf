"""The keyboard of a terminal, line by line, for whoever wants to hear it right now. It never blocks the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import termios
from collections.abc import Callable, Generator

QUIET_S = 0.06
"""Seconds without another line after which an answer is taken as whole: what was pasted is one answer."""

BACKGROUND_S = 0.5
"""Seconds between two looks whether a process in the background was brought to the front. There it leaves the terminal
alone: whoever reads it or changes its modes from there is stopped."""

MOST_CHARS = 1_000_000
"""Characters of one answer that are kept; the rest of it is thrown away."""


class Keyboard:
    """Reads lines from a terminal.

    While somebody asks, its lines are theirs alone; otherwise they go to the listener, if there is one.

    Args:
        fd: the terminal.

    >>> import pty
    >>> far, near = pty.openpty()
    >>> async def main():
    ...     keyboard = Keyboard(near)
    ...     with keyboard.asking():
    ...         os.write(far, b"hello\\n")
    ...         return await keyboard.answer()
    >>> asyncio.run(main())
    'hello'
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lines: asyncio.Queue[str | None] | None = None
        self._listener: Callable[[str], None] | None = None
        self._partial = b""
        self._saved: list[object] | None = None
        self._later: asyncio.TimerHandle | None = None

    # -- listening ------------------------------------------------------------------------------

    def listen(self, listener: Callable[[str], None]) -> None:
        """Give every line that answers no question to a listener.

        What is typed is not echoed: it would be drawn into what moves on the screen.
        """
        self._listener = listener
        self._attach()
        self._echo()

    def close(self) -> None:
        """Stop reading, and leave the terminal as it was found. More than one call does nothing."""
        self._listener = None
        self._detach()
        self.restore()

    def restore(self) -> None:
        """Leave the terminal as it was found; may be called from any thread."""
        saved, self._saved = self._saved, None
        if saved is not None and _is_in_front(self._fd):
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetattr(self._fd, termios.TCSADRAIN, saved)  # type: ignore[arg-type]  # what tcgetattr gave

    # -- asking ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def asking(self) -> Generator[None]:
        """Take the lines that are typed from here on; what was typed before is thrown away."""
        self.drain()
        self._lines = asyncio.Queue()
        self._attach()
        self._echo()
        try:
            yield
        finally:
            self._lines = None
            self.drain()
            if self._listener is None:
                self.close()
            else:
                self._echo()

    async def answer(self) -> str | None:
        """Wait for an answer: a line, with all that arrives together with it. None at the end of the file."""
        assert self._lines is not None  # within ``asking``
        lines: list[str] = []
        chars = 0
        line = await self._lines.get()
        while line is not None:
            if chars <= MOST_CHARS:
                lines.append(line)
                chars += len(line) + 1
            try:
                async with asyncio.timeout(QUIET_S):
                    line = await self._lines.get()
            except TimeoutError:
                return "\n".join(lines)
        return None

    def drain(self) -> None:
        """Throw away what was typed and not read yet."""
        self._partial = b""
        if self._lines is not None:
            while not self._lines.empty():
                self._lines.get_nowait()
        if _is_in_front(self._fd):
            with contextlib.suppress(termios.error, OSError):
                termios.tcflush(self._fd, termios.TCIFLUSH)

    @contextlib.contextmanager
    def lent(self) -> Generator[None]:
        """Leave the terminal to another program, and take it back as it was."""
        self._detach()
        modes: list[object] | None = None
        with contextlib.suppress(termios.error, OSError):
            modes = list(termios.tcgetattr(self._fd))
        try:
            yield
        finally:
            if modes is not None:
                with contextlib.suppress(termios.error, OSError):
                    termios.tcsetattr(self._fd, termios.TCSADRAIN, modes)  # type: ignore[arg-type]  # as above
            self.drain()
            self._attach()

    # -- reading --------------------------------------------------------------------------------

    def _attach(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._fd, self._read)
            self._wait_for_the_front()

    def _detach(self) -> None:
        loop, self._loop = self._loop, None
        later, self._later = self._later, None
        if later is not None:
            later.cancel()
        if loop is not None and not loop.is_closed():
            loop.remove_reader(self._fd)

    def _read(self) -> None:
        """Read what is there: the terminal holds it back until a line is whole."""
        if not _is_in_front(self._fd):
            self._wait_for_the_front()
            return
        try:
            data = os.read(self._fd, 65536)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
            self._detach()  # the terminal is gone
        if not data:
            self._partial = b""
            if self._lines is not None:
                self._lines.put_nowait(None)
            return
        # A line without its end was cut by the end-of-file key: it is no answer until Enter is pressed.
        *whole, self._partial = (self._partial + data)[-MOST_CHARS:].split(b"\n")
        for line in whole:
            self._give(line.decode("utf-8", "replace").removesuffix("\r"))

    def _give(self, line: str) -> None:
        if self._lines is not None:
            self._lines.put_nowait(line)
        elif self._listener is not None:
            self._listener(line)

    def _wait_for_the_front(self) -> None:
        """Where the process is in the background, read nothing until it is in front."""
        loop = self._loop
        if loop is not None and not _is_in_front(self._fd):
            loop.remove_reader(self._fd)
            self._later = loop.call_later(BACKGROUND_S, self._look_again)

    def _look_again(self) -> None:
        self._detach()
        self._attach()
        self._echo()

    def _echo(self) -> None:
        """Echo what is typed while somebody asks, and nothing else."""
        if not _is_in_front(self._fd):
            return
        with contextlib.suppress(termios.error, OSError):
            modes = termios.tcgetattr(self._fd)
            if self._saved is None:
                self._saved = list(modes)
            echo = termios.ECHO
            modes[3] = modes[3] | echo | termios.ICANON if self._lines is not None else modes[3] & ~echo
            termios.tcsetattr(self._fd, termios.TCSADRAIN, modes)


def _is_in_front(fd: int) -> bool:
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return True  # no terminal that controls this process: nothing stops it
