"""Real processes by the thousand: a small server without threads that forks a child for each job.

A child starts in milliseconds, because the server has imported everything already, and shares nothing with anybody
but the files it opens itself. It can be stopped, killed and waited for like any process.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, cast

from harness.messages import JSON

Say: TypeAlias = Callable[[JSON], None]
"""Tells the parent something, at once. What a child said before it was killed has arrived."""

Job: TypeAlias = Callable[..., JSON]
"""What a child runs: called with ``say`` and the arguments it was started with; it returns JSON."""

_Pipes: TypeAlias = dict[int, tuple[int, bytes]]  # from a child's pipe to its process number and what is half read


class ChildFailed(Exception):
    """A child raised an exception, or did not end in time."""


class Child:
    """A process of a fork server.

    Attributes:
        pid: its process number.
        said: what it has said so far.
        result: what its job returned.
        error: the traceback of what it raised; empty where it did not.
        status: its exit code, or minus the signal that ended it; None while it runs.

    >>> with ForkServer() as server:
    ...     child = server.start(echo, [1, 2]).wait()
    >>> child.result, child.status, child.killed
    ([1, 2], 0, False)
    """

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self.said: list[JSON] = []
        self.result: JSON = None
        self.error = ""
        self.status: int | None = None
        self._server = server

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.status == -signal.SIGKILL

    def wait(self, timeout_s: float = 60.0) -> Child:
        """Wait until it has ended.

        Raises:
            ChildFailed: it raised an exception, or still runs after ``timeout_s`` (it is killed then).
        """
        if not self._server.receive_until(lambda: self.status is not None, timeout_s):
            self.signal(signal.SIGKILL)
            self._server.receive_until(lambda: self.status is not None, 10)
            raise ChildFailed(f"process {self.pid} did not end within {timeout_s:g} s; it said {self.said!r}")
        if self.error:
            raise ChildFailed(self.error)
        return self

    def wait_for(self, said: JSON, timeout_s: float = 30.0) -> None:
        """Wait until it has said something.

        Raises:
            ChildFailed: it has not within ``timeout_s``, or ended without saying it.
        """
        self._server.receive_until(lambda: said in self.said or self.status is not None, timeout_s)
        if said not in self.said:
            raise ChildFailed(f"process {self.pid} did not say {said!r} but {self.said!r}. {self.error}")

    def hear(self, timeout_s: float = 30.0) -> bool:
        """Wait until it has said anything. Returns False where it ended without a word.

        Raises:
            ChildFailed: it neither says anything nor ends within ``timeout_s``.
        """
        if not self._server.receive_until(lambda: bool(self.said) or self.status is not None, timeout_s):
            raise ChildFailed(f"process {self.pid} has said nothing within {timeout_s:g} s")
        return bool(self.said)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class ForkServer:
    """Starts processes by forking one that has imported the library; a context manager.

    >>> with ForkServer() as server:
    ...     child = server.start(echo, "hello").wait()
    >>> child.result
    'hello'
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        program = f"import sys; sys.path[:] = {sys.path!r}; from harness.testing.forkserver import serve; "
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{program}serve({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._socket = ours
        self._rest = b""
        self._children: dict[int, Child] = {}
        self._started: list[Child] = []

    def start(self, job: Job, /, *args: JSON) -> Child:
        """Start a process.

        Args:
            job: the function to run, defined at the top of a module or of a test file.
            args: what to call it with, after ``say``.
        """
        self._socket.sendall(json.dumps([address_of(job), args]).encode() + b"\n")
        if not self.receive_until(lambda: bool(self._started), 60):
            raise ChildFailed("the fork server does not answer")
        return self._started.pop()

    def receive_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Take what the server has to say until something holds. Returns whether it does."""
        end = time.monotonic() + timeout_s
        while not done():
            self._socket.settimeout(max(0.001, end - time.monotonic()))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                return done()
            if not data:
                raise ChildFailed("the fork server has ended: see its output above")
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(*json.loads(line))
        return True

    def close(self) -> None:
        """End the server and every process it started."""
        self._socket.close()
        self._process.wait(timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, what: str, pid: int, value: JSON) -> None:
        if what == "started":
            self._children[pid] = Child(self, pid)
            self._started.append(self._children[pid])
            return
        child = self._children[pid]
        match what:
            case "said":
                child.said.append(value)
            case "returned":
                child.result = value
            case "raised":
                child.error = str(value)
            case _:
                child.status = cast("int", value)
                del self._children[pid]


def address_of(function: Callable[..., object]) -> str:
    """Name a function so that another process finds it: by its module, or by its file where that is on no path.

    Raises:
        ValueError: it is not at the top of a module, or of the program itself.
    """
    module, name = function.__module__, function.__qualname__
    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__" or "." in name or file is None:
        raise ValueError(f"{module}:{name} cannot be found by another process: define it at the top of a module")
    place = module.replace(".", "/")
    for folder in sys.path:
        if file in (str(Path(folder) / f"{place}.py"), str(Path(folder) / place / "__init__.py")):
            return f"{module}:{name}"
    return f"{file}:{name}"


def at_address(address: str) -> Callable[..., object]:
    """Return the function that ``address_of`` named."""
    place, _, name = address.rpartition(":")
    if not place.endswith(".py"):
        return cast("Callable[..., object]", getattr(importlib.import_module(place), name))
    module = sys.modules.get(place)
    if module is None:
        spec = importlib.util.spec_from_file_location(place, place)
        assert spec is not None  # a file that ends with .py has a loader
        assert spec.loader is not None
        module = sys.modules[place] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return cast("Callable[..., object]", getattr(module, name))


def echo(_say: Say, value: JSON) -> JSON:
    """Return a value: a job to try a server with."""
    return value


def serve(fd: int) -> None:
    """Fork a child for each command until the parent goes away. Runs in a process of its own."""
    parent = socket.socket(fileno=fd)
    pipes: _Pipes = {}
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(parent, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                data = os.read(key.fd, 65536)
                if key.fd != parent.fileno():
                    _forward(parent, selector, pipes, key.fd, data)
                elif data:
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        pid, pipe = _fork(parent, selector, pipes, *json.loads(line))
                        pipes[pipe] = (pid, b"")
                        selector.register(pipe, selectors.EVENT_READ)
                        _tell(parent, "started", pid, None)
                else:
                    for pid, _rest in pipes.values():
                        os.kill(pid, signal.SIGKILL)
                    return


def _forward(parent: socket.socket, selector: selectors.BaseSelector, pipes: _Pipes, pipe: int, data: bytes) -> None:
    pid, rest = pipes[pipe]
    if data:
        *lines, rest = (rest + data).split(b"\n")
        pipes[pipe] = (pid, rest)
        for line in lines:
            what, value = json.loads(line)
            _tell(parent, what, pid, value)
        return
    selector.unregister(pipe)
    os.close(pipe)
    del pipes[pipe]
    _tell(parent, "ended", pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _tell(parent: socket.socket, what: str, pid: int, value: JSON) -> None:
    parent.sendall(json.dumps([what, pid, value]).encode() + b"\n")


def _fork(
    parent: socket.socket,
    selector: selectors.BaseSelector,
    pipes: dict[int, tuple[int, bytes]],
    job: str,
    args: list[JSON],
) -> tuple[int, int]:
    for address in (job, *args):
        # Imported once here instead of once in every child. The child says what is wrong with it.
        with contextlib.suppress(Exception):
            if isinstance(address, str) and ":" in address:
                at_address(address)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    status = 1
    try:
        selector.close()
        parent.close()
        for pipe in (reading, *pipes):
            os.close(pipe)
        status = _work(writing, job, args)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _work(pipe: int, job: str, args: list[JSON]) -> int:
    def tell(what: str, value: JSON) -> None:
        data = json.dumps([what, value]).encode() + b"\n"
        while data:
            data = data[os.write(pipe, data) :]

    try:
        work = cast("Job", at_address(job))
        tell("returned", work(partial(tell, "said"), *args))
        return 0
    except BaseException:
        tell("raised", traceback.format_exc())
        return 1
