"""Run a program for a tool, and end it with the call: on a timeout, a cancel, Ctrl-C, and when the program has ended.

A tool that starts a process by itself has to end it by itself: a call that is cancelled leaves it running, with all
that it has started. Here the program gets a process group of its own, and a mark in its environment that everything it
starts inherits. When the call ends, the group is killed and, on Linux, whatever bears the mark elsewhere, too: what has
left the group. The program is reaped only afterwards, so that its number is nobody else's meanwhile, and the others are
killed through a handle of the kernel's, so that no number comes to name another process in between.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from harness.errors import ToolError
from harness.tools.threads import run_in_thread

MAX_BYTES = 1_000_000
"""Bytes kept of each of a program's two outputs."""

MARK = "HARNESS_PROCESS"
"""The variable by which what a program has started is found."""

END_S = 1.0
"""Seconds that killed processes may take to be gone before they are left to the kernel."""

_CHUNK = 65_536
_MOST_CHUNKS = 32
"""Chunks that a pipe may hold at the most."""

_LOOK_EVERY_S = 0.02


class ProcessOutput(msgspec.Struct, frozen=True):
    """What a program wrote, and how it ended.

    Attributes:
        exit_code: its exit code; the negative number of the signal that ended it.
        stdout, stderr: what it wrote, as text; bytes that are no UTF-8 are replaced.
        cut: whether more was written than was kept.

    >>> ProcessOutput(0, "hello", "").cut
    False
    """

    exit_code: int
    stdout: str
    stderr: str
    cut: bool = False


async def run_process(
    *argv: str,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> ProcessOutput:
    """Run a program to its end; nothing that it has started outlives the call.

    It has no input and no shell: the words are what the program gets. A program that fails is no error: look at
    ``exit_code``.

    Args:
        argv: the program and its arguments.
        cwd: the folder it runs in; that of this process where it is left out.
        env: its environment; that of this process where it is left out.
        max_bytes: bytes kept of each of its outputs; what is more is read and thrown away.

    Raises:
        ToolError: it cannot be started.

    >>> asyncio.run(run_process("echo", "hello")).stdout
    'hello\\n'
    """
    program = _Program(argv, cwd, env, max_bytes)
    try:
        await program.ended.wait()
        await run_in_thread(program.kill)  # to look for what it has left behind takes some milliseconds
    finally:
        program.end()
    return ProcessOutput(program.exit_code, *program.texts(), cut=program.is_cut)


def end_all() -> None:
    """End every program that still runs in this process: it is about to be ended without its calls being cancelled."""
    for program in list(_running):
        if program.owner == os.getpid():  # a process that was forked off has inherited the list, not the programs
            program.kill()


class _Program:
    """A program at work.

    Attributes:
        ended: set when the program has ended.
        owner: the process that has started it.
    """

    def __init__(
        self,
        argv: tuple[str, ...],
        cwd: str | os.PathLike[str] | None,
        env: Mapping[str, str] | None,
        max_bytes: int,
    ) -> None:
        self.ended = asyncio.Event()
        self.owner = os.getpid()
        self._is_killed = False
        self._lock = threading.Lock()  # the program is not reaped while its number is used
        self._loop = asyncio.get_running_loop()
        given = os.environ if env is None else env
        self._mark = secrets.token_hex(16)
        # A program that runs programs by these means is found by its own mark and by those of whoever runs it.
        marks = f"{given[MARK]}:{self._mark}" if MARK in given else self._mark
        self._pipes = [_Pipe(max_bytes), _Pipe(max_bytes)]
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=self._pipes[0].write_end,
                stderr=self._pipes[1].write_end,
                cwd=cwd,
                env={**given, MARK: marks},
                start_new_session=True,
            )
        except (OSError, ValueError, IndexError, TypeError) as error:
            for pipe in self._pipes:
                pipe.close()
            raise ToolError(f"cannot run {argv[0] if argv else 'a program without a name'!r}: {error}") from error
        _running.add(self)
        for pipe in self._pipes:
            pipe.close_write_end()
            self._loop.add_reader(pipe.read_end, self._read, pipe)
        self._exit_fd = _handle_of(self._process.pid)
        self._timer: asyncio.TimerHandle | None = None
        if self._exit_fd is None:
            self._look()
        else:
            self._loop.add_reader(self._exit_fd, self.ended.set)

    @property
    def exit_code(self) -> int:
        return self._process.returncode if self._process.returncode is not None else -signal.SIGKILL

    @property
    def is_cut(self) -> bool:
        return any(pipe.is_cut for pipe in self._pipes)

    def texts(self) -> tuple[str, str]:
        stdout, stderr = (pipe.kept.decode("utf-8", "replace") for pipe in self._pipes)
        return stdout, stderr

    def _read(self, pipe: _Pipe) -> None:
        if not pipe.read():
            self._loop.remove_reader(pipe.read_end)

    def _look(self) -> None:
        """Look from time to time whether the program has ended, without reaping it."""
        if self._has_ended():
            self.ended.set()
        else:
            self._timer = self._loop.call_later(_LOOK_EVERY_S, self._look)

    def _has_ended(self) -> bool:
        if hasattr(os, "waitid"):
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if self._process.poll() is None:
            return False
        self._kill_group()  # it is reaped already: now, while its number is still fresh
        return True

    def end(self) -> None:
        """Kill what is left of it, and forget it."""
        if self._timer is not None:
            self._timer.cancel()
        if self._exit_fd is not None:
            self._loop.remove_reader(self._exit_fd)
            os.close(self._exit_fd)
        if not self._is_killed:
            self.kill()
        with self._lock, contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        _running.discard(self)
        for pipe in self._pipes:
            self._loop.remove_reader(pipe.read_end)
            pipe.read_the_rest()
            pipe.close()

    def kill(self) -> None:
        """Kill the program and all that it has started, and wait until they are gone."""
        with self._lock:
            if self._process.returncode is None:
                self._kill_group()
        until = time.monotonic() + END_S
        while _kill_marked(self._mark.encode()) and time.monotonic() < until:
            time.sleep(0.001)  # what forks while it is looked for is found by the next look
        self._is_killed = True

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


class _Pipe:
    """One output of a program."""

    def __init__(self, most: int) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self.kept = bytearray()
        self.is_cut = False
        self._most = most

    def read(self) -> bool:
        """Take what is there; False where nothing is, or nothing will come any more."""
        try:
            data = os.read(self.read_end, _CHUNK)
        except (BlockingIOError, InterruptedError):
            return False
        room = self._most - len(self.kept)
        self.kept += data[:room]
        self.is_cut = self.is_cut or len(data) > room
        return bool(data)

    def read_the_rest(self) -> None:
        """Take what was written before the end. Whoever writes on without end does not hold us."""
        for _ in range(_MOST_CHUNKS):
            if not self.read():
                return

    def close_write_end(self) -> None:
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def close(self) -> None:
        self.close_write_end()
        os.close(self.read_end)


def _handle_of(pid: int) -> int | None:
    """Return a handle of a process that becomes readable when it has ended; None where there are none."""
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _kill_marked(mark: bytes) -> int:
    """Kill the processes that bear a mark. Returns how many there were; ended ones bear none."""
    if sys.platform != "linux":
        return 0
    found = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and _bears(entry.name, mark):
            found += _kill_if_marked(int(entry.name), mark)
    return found


def _kill_if_marked(pid: int, mark: bytes) -> int:
    handle = _handle_of(pid)
    if handle is None:
        return 0
    try:
        if not _bears(str(pid), mark):  # the number is another process's by now
            return 0
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except OSError:
        return 0
    finally:
        os.close(handle)
    return 1


def _bears(pid: str, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended, or is another user's
        return False


_running: set[_Program] = set()
# Processes belong to this process, not to a tool or a loop: whoever ends it must know them.
atexit.register(end_all)
