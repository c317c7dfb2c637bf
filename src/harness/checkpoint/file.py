"""Checkpoints in a folder: one append-only text file for each run, readable with any tool.

A line is one append: a JSON object that starts with the checksum of the rest of the line. What a crash left of a last
line is cut off when the run is next claimed; damage anywhere before it is reported, never skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import os
import secrets
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from harness.checkpoint.base import (
    LEASE_S,
    Owner,
    RunQuery,
    RunStatus,
    RunSummary,
    describe,
    final_status,
    is_alive,
    lease_clock,
)
from harness.checkpoint.lines import FORMAT_VERSION, Line, format_line, last_line, read_lines
from harness.checkpoint.local import create_private_file, private_folder, sync_folder, write_private_file
from harness.errors import CheckpointConflict, CheckpointCorrupt, CheckpointError, OwnershipLost, RunNotFound
from harness.mailbox import Command, Mail, decode_command, encode_command
from harness.records import Entry, ProcessId, Record, RunStarted, decode, encode

T = TypeVar("T")

_CHUNK = 200  # lines read at a time
_THREADS = 8
_LOCK_TRIES = 50  # looks at a lock whose holder has no name, 2 ms apart
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LockNote(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the lock file says for people and for the next owner. The lock itself is the kernel's."""

    token: int
    process: ProcessId | None = None


@dataclass(slots=True)
class Held:
    """A run this store owns: its lock, its file, and where the file ends."""

    owner: Owner
    lease_until: float
    lock: int
    path: Path
    seq: int = 0
    status: RunStatus = "interrupted"
    end: int = 0
    file: int | None = None
    lost: bool = False
    broken: bool = False
    using: threading.Lock = field(default_factory=threading.Lock)


class FileCheckpointStore:
    """Keep each run in a file of its own under one folder, on a local disk.

    The owner of a run holds a lock of the kernel, from ``claim`` to ``release``. It ends with the process, so a dead
    owner is replaced at once. It does not end while the process lives: an owner in another process that is stopped or
    hangs cannot be replaced when its lease is over, only ended.

    Args:
        checkpoint_dir: the folder. The default is ``CHECKPOINT_DIR``, else ``~/.agent-harness/checkpoints``.

    >>> import asyncio, tempfile
    >>> from harness.checkpoint.base import this_process
    >>> from harness.records import Noted
    >>> async def main(folder):
    ...     store = FileCheckpointStore(folder)
    ...     owner = await store.claim("r1", this_process())
    ...     await store.append("r1", 0, [Noted(1, "malformed", "again, please")], owner=owner)
    ...     return [entry.seq async for entry in store.read("r1")]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     asyncio.run(main(folder))
    [1]
    """

    def __init__(self, checkpoint_dir: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(
            checkpoint_dir or os.environ.get("CHECKPOINT_DIR") or Path.home() / ".agent-harness" / "checkpoints"
        )
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._held: dict[str, Held] = {}
        self._claiming = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="harness-checkpoint")

    async def append(self, run_id: str, expected_seq: int, records: Sequence[Record], /, *, owner: Owner) -> float:
        """Append records after ``expected_seq``, durable on return. See ``CheckpointStore.append``."""
        if not records:
            raise ValueError("append needs at least one record")
        return await self._call(self._append, run_id, expected_seq, records, owner)

    async def read(self, run_id: str, /, *, after: int = 0) -> AsyncIterator[Entry]:
        """Yield the entries with ``seq > after`` in order.

        Raises:
            CheckpointCorrupt: the file is damaged before its last line; the message names file and line.
            RecordTooNew: a newer release wrote it.
        """
        entries = self._entries(run_id, after)
        try:
            while chunk := await self._call(_take, entries):
                for entry in chunk:
                    yield entry
        finally:
            with contextlib.suppress(ValueError):  # the thread of a read that was cancelled may still be at it
                entries.close()

    async def delete(self, run_id: str, /) -> bool:
        """Forget a run. Returns whether it existed.

        Raises:
            OwnershipLost: another process owns it; its file cannot be taken away under it.
        """
        return await self._call(self._delete, run_id)

    async def runs(self, query: RunQuery, /) -> AsyncIterator[RunSummary]:
        """Yield summaries, the last started first. Files that cannot be read are left out: reading them says why."""
        for summary in await self._call(self._summaries, query):
            yield summary

    async def claim(self, run_id: str, process: ProcessId, /, *, lease_s: float = LEASE_S) -> Owner:
        """Become the owner of a run. See ``CheckpointStore.claim``.

        Raises:
            OwnershipLost: a live process owns it (in another process: whether or not its lease is over).
            CheckpointError: the run was left by an older release in another format.
        """
        claiming = self._submit(self._claim, run_id, process, lease_s)
        try:
            return await asyncio.wrap_future(claiming)
        except asyncio.CancelledError:
            claiming.add_done_callback(self._give_back)
            raise

    async def renew(self, owner: Owner, /, *, lease_s: float = LEASE_S) -> None:
        """Extend the lease. See ``CheckpointStore.renew``."""
        self._owned(owner.run_id, owner).lease_until = lease_clock() + lease_s

    async def release(self, owner: Owner, /) -> None:
        """Give the run up."""
        await self._call(self._release, owner)

    async def post(self, run_id: str, command: Command, /) -> Mail:
        """Put a command into a run's mailbox. See ``CheckpointStore.post``."""
        return await self._call(self._post, run_id, command)

    async def inbox(self, run_id: str, /) -> list[Mail]:
        """Return what is in a run's mailbox."""
        return await self._call(self._inbox, run_id)

    async def discard_mail(self, run_id: str, ids: Sequence[str], /) -> None:
        """Remove commands that were taken."""
        await self._call(self._discard_mail, run_id, ids)

    async def put_blob(self, run_id: str, data: bytes, /) -> str:
        """Keep a large value of a run, durable on return. Returns its digest."""
        return await self._call(self._put_blob, run_id, data)

    async def get_blob(self, run_id: str, digest: str, /) -> bytes:
        """Return a kept value."""
        return await self._call(self._get_blob, run_id, digest)

    async def close(self) -> None:
        """Give up every run this store holds, and its files. Using the store again opens them anew."""
        for held in list(self._held.values()):
            await self.release(held.owner)
        self._threads.shutdown(wait=False)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="harness-checkpoint")

    @staticmethod
    def purge_old(days: float = 7, checkpoint_dir: str | os.PathLike[str] | None = None) -> int:
        """Delete the runs that are over and were last written more than some days ago.

        A run that somebody drives, or that waits to be resumed, is kept, however old.

        Args:
            days: the age at which a run is deleted.
            checkpoint_dir: the folder, as for the store.

        Returns:
            How many runs were deleted.
        """
        store = FileCheckpointStore(checkpoint_dir)
        before = time.time() - days * 86_400
        return sum(store._purge(path, before) for path in sorted(store.folder.glob("*.jsonl")))

    def _claim(self, run_id: str, process: ProcessId, lease_s: float) -> Owner:
        path = self._path(run_id)
        with self._claiming:
            held = self._held.get(run_id)
            if held is not None:
                if lease_clock() < held.lease_until and is_alive(held.owner.process):
                    raise _owned_by(run_id, held.owner.process)
                self._let_go(held)
            self._refuse_oldformat_line(run_id, path)
            private_folder(self.folder)
            lock = _lock(path, run_id)
            try:
                # Drawn from the clock, a token is new even for a run that was deleted and begun anew.
                token = max(_note(lock).token + 1, time.time_ns() // 1000)
                _write_note(lock, LockNote(token, process))
                held = Held(Owner(run_id, token, process), lease_clock() + lease_s, lock, path)
                _open_journal(held)
            except BaseException:
                os.close(lock)
                raise
            self._held[run_id] = held
            return held.owner

    def _release(self, owner: Owner) -> None:
        with self._claiming:
            held = self._held.get(owner.run_id)
            if held is not None and held.owner == owner:
                self._let_go(held)

    def _give_back(self, claiming: Future[Owner]) -> None:
        # The task that wanted the run is gone: a claim that came through all the same would block the run.
        if not claiming.cancelled() and claiming.exception() is None:
            self._release(claiming.result())

    def _let_go(self, held: Held) -> None:
        with held.using:  # an append that was cancelled may still be writing
            del self._held[held.owner.run_id]
            held.lost = True
            if held.file is None:
                _lock_path(held.path).unlink(missing_ok=True)  # claimed and never written
            else:
                with contextlib.suppress(OSError):  # it only informs
                    _write_note(held.lock, LockNote(held.owner.token))
                os.close(held.file)
            os.close(held.lock)

    def _owned(self, run_id: str, owner: Owner) -> Held:
        self._after_fork()
        held = self._held.get(run_id)
        if held is None:
            raise OwnershipLost(
                f"this store does not own run {run_id!r}: it was released or deleted; claim it before appending"
            )
        if held.owner != owner:
            raise _owned_by(run_id, held.owner.process)
        return held

    def _after_fork(self) -> None:
        """Let go of what was inherited over a fork. Closing this process' copies leaves the parent's lock alone."""
        if self._pid == os.getpid():
            return
        inherited = self._held
        self._begin()
        for held in inherited.values():
            os.close(held.lock)
            if held.file is not None:
                os.close(held.file)

    def _append(self, run_id: str, expected_seq: int, records: Sequence[Record], owner: Owner) -> float:
        held = self._owned(run_id, owner)
        with held.using:
            if held.lost:
                raise OwnershipLost(f"run {run_id!r} was released: claim it before appending")
            if held.broken:
                raise CheckpointError(f"writing {str(held.path)!r} failed before: claim run {run_id!r} again")
            if held.seq != expected_seq:
                raise CheckpointConflict(f"run {run_id!r} ends at record {held.seq}, not at {expected_seq}")
            at, status = time.time(), held.status
            for record in records:
                status = final_status(record) or status
            seq = expected_seq + len(records)
            line = Line(FORMAT_VERSION, run_id, seq, at, owner.token, status, msgspec.Raw(encode(records)))
            _write_line(held, format_line(line))
            held.seq, held.status = seq, status
            return at

    def _delete(self, run_id: str) -> bool:
        path = self._path(run_id)
        with self._claiming:
            held = self._held.get(run_id)
            if held is not None:
                self._let_go(held)
            if not path.exists() and not _blobs(path).exists():
                return False
            lock = _lock(path, run_id)
            try:
                return _remove(path)
            finally:
                os.close(lock)

    def _put_blob(self, run_id: str, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        folder = _blobs(self._path(run_id))
        private_folder(folder)
        if not (folder / digest).exists():
            write_private_file(folder / digest, data)
        return digest

    def _post(self, run_id: str, command: Command) -> Mail:
        path = self._path(run_id)
        if not path.exists():
            raise RunNotFound(run_id)
        mail = Mail(secrets.token_hex(8), time.time(), command)
        private_folder(_mailbox(path))
        write_private_file(_mailbox(path) / f"{mail.id}.json", encode_command(command), at=mail.received_at)
        return mail

    def _inbox(self, run_id: str) -> list[Mail]:
        found: list[Mail] = []
        for path in _mailbox(self._path(run_id)).glob("[!.]*.json"):
            with contextlib.suppress(FileNotFoundError):  # taken meanwhile
                command = decode_command(path.read_bytes(), where=repr(str(path)))
                found.append(Mail(path.stem, path.stat().st_mtime, command))
        return sorted(found, key=lambda mail: mail.received_at)

    def _discard_mail(self, run_id: str, ids: Sequence[str]) -> None:
        folder = _mailbox(self._path(run_id))
        for mail_id in ids:
            if mail_id.isalnum():  # an id comes out of a record: it must not lead to another file
                (folder / f"{mail_id}.json").unlink(missing_ok=True)

    def _entries(self, run_id: str, after: int) -> Generator[Entry]:
        path = self._path(run_id)
        self._refuse_oldformat_line(run_id, path)
        expected = 1
        for number, line in read_lines(path):
            where = f"{str(path)!r}, line {number}"
            if line.run_id != run_id:
                raise CheckpointCorrupt(f"{where} belongs to run {line.run_id!r}, not to {run_id!r}")
            if line.seq <= after:
                expected = line.seq + 1
                continue
            records = decode(bytes(line.records), where=where)
            seq = line.seq - len(records) + 1
            if seq != expected:
                raise CheckpointCorrupt(f"{where} starts at record {seq} where {expected} is due: lines are missing")
            expected = line.seq + 1
            for place, record in enumerate(records, seq):
                if place > after:
                    yield Entry(run_id, place, line.at, record)

    def _get_blob(self, run_id: str, digest: str) -> bytes:
        path = _blobs(self._path(run_id)) / digest
        # A digest comes out of a record: it must not lead to another file.
        if len(digest) != 64 or not digest.isalnum() or not path.is_file():
            raise CheckpointError(f"run {run_id!r} keeps no value under the digest {digest!r}")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointCorrupt(f"{str(path)!r} is damaged: its content does not match its name")
        return data

    def _summaries(self, query: RunQuery) -> list[RunSummary]:
        found: list[RunSummary] = []
        for path in self.folder.glob("*.jsonl"):
            with contextlib.suppress(CheckpointError, OSError):
                summary = _summary(path)
                if summary is not None and query.status in (None, summary.status):
                    found.append(summary)
        found.sort(key=lambda summary: summary.started_at, reverse=True)
        return found[: query.limit]

    def _purge(self, path: Path, before: float) -> bool:
        try:
            summary = _summary(path)
            if summary is None or summary.status in ("running", "interrupted", "waiting"):
                return False
            lock = _lock(path, summary.run_id)
        except (CheckpointError, OSError):
            return False
        try:
            # Looked at under the lock, so that nobody has gone on with it in between.
            return path.stat().st_mtime < before and _remove(path)
        finally:
            os.close(lock)

    def _path(self, run_id: str) -> Path:
        # Any string is a run id; only its digest is ever part of a file name.
        try:
            return self.folder / f"{hashlib.sha256(run_id.encode()).hexdigest()}.jsonl"
        except UnicodeEncodeError as error:
            raise CheckpointError(f"run id {run_id!r} cannot be written: {error}") from error

    def _refuse_oldformat_line(self, run_id: str, path: Path) -> None:
        """Refuse to begin anew a run that an older release left as one JSON document ``<run id>.json``."""
        if not run_id or "/" in run_id or "\0" in run_id or len(os.fsencode(run_id)) > 250 or path.exists():
            return
        old = self.folder / f"{run_id}.json"
        if old.is_file():
            raise CheckpointError(
                f"{str(old)!r} is a checkpoint in an older format, which this release does not read: "
                "finish the run with the release that wrote it, or delete the file and start again"
            )

    def _submit(self, work: Callable[..., T], *values: object) -> Future[T]:
        self._after_fork()
        return self._threads.submit(_explained, self.folder, functools.partial(work, *values))

    async def _call(self, work: Callable[..., T], *values: object) -> T:
        return await asyncio.wrap_future(self._submit(work, *values))


def _explained(folder: Path, work: Callable[[], T]) -> T:
    try:
        return work()
    except OSError as error:
        place = repr(str(error.filename or folder))
        if error.errno in _FULL:
            raise CheckpointError(f"{place}: the disk is full and nothing was written: free some space") from error
        raise CheckpointError(f"{place} cannot be used ({error.strerror}): check the folder") from error


def _take(entries: Iterator[Entry]) -> list[Entry]:
    return list(itertools.islice(entries, _CHUNK))


def _lock_path(path: Path) -> Path:
    return path.with_suffix(".lock")


def _mailbox(path: Path) -> Path:
    return path.with_suffix(".mail")


def _blobs(path: Path) -> Path:
    return path.with_suffix(".blobs")


def _lock(path: Path, run_id: str) -> int:
    """Take the kernel's lock of a run and return its descriptor."""
    place = _lock_path(path)
    tries_left = _LOCK_TRIES
    while True:
        lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever deleted the run meanwhile left us with the lock of a file that has no name any more.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), place.stat()):
                    return lock
        except BlockingIOError:
            holder = _note(lock).process
            os.close(lock)
            if tries_left <= 0 or (holder is not None and is_alive(holder)):
                raise _owned_by(run_id, holder) from None
            # Who has just taken the lock writes its name next, and who took its name out lets go of the lock next.
            tries_left -= 1
            time.sleep(0.002)
            continue
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _note(lock: int) -> LockNote:
    try:
        return msgspec.json.decode(os.pread(lock, 4096, 0), type=LockNote)
    except msgspec.MsgspecError:
        return LockNote(0)


def _write_note(lock: int, note: LockNote) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, msgspec.json.encode(note), 0)


def _owned_by(run_id: str, process: ProcessId | None) -> OwnershipLost:
    if process is None:
        return OwnershipLost(f"run {run_id!r} is being claimed or deleted by another process: try again")
    if not is_alive(process):
        return OwnershipLost(
            f"the lock of run {run_id!r} outlived {describe(process)}: a child that it forked still holds it; end it"
        )
    return OwnershipLost(
        f"run {run_id!r} is owned by {describe(process)}: wait until it ends, or stop it "
        "(a process that is only suspended keeps the run)"
    )


def _open_journal(held: Held) -> None:
    """Find out where a claimed run ends, and cut off what a crash left of a last line."""
    try:
        held.file = os.open(held.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        line, end = last_line(held.file, held.path)
        if line is not None and line.run_id != held.owner.run_id:
            raise CheckpointCorrupt(f"{str(held.path)!r} belongs to run {line.run_id!r}, not {held.owner.run_id!r}")
        if end < os.fstat(held.file).st_size:
            os.ftruncate(held.file, end)
            os.fsync(held.file)
    except BaseException:
        os.close(held.file)
        raise
    held.end = end
    if line is not None:
        held.seq, held.status = line.seq, line.status


def _write_line(held: Held, text: bytes) -> None:
    """Append a line and make it durable, or leave the file as it was."""
    if held.file is None:
        create_private_file(held.path)
        held.file = os.open(held.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    elif os.fstat(held.file).st_nlink == 0:
        held.broken = True
        raise CheckpointError(f"{str(held.path)!r} was removed while run {held.owner.run_id!r} was being driven")
    try:
        if (written := os.write(held.file, text)) < len(text):
            # Writing the rest says why the first part was all that fitted.
            _write_rest(held.file, text[written:])
        _sync(held.file)
    except BaseException as error:
        # After a failed flush the kernel forgets what was not written: this file is not trusted before a new claim.
        held.broken = True
        with contextlib.suppress(OSError):
            os.ftruncate(held.file, held.end)
            os.fsync(held.file)
            held.broken = not isinstance(error, OSError) or error.errno not in _FULL
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(held.path)) from error
        raise
    held.end += len(text)


def _write_rest(fd: int, text: bytes) -> None:
    while text:
        text = text[os.write(fd, text) :]


def _sync(fd: int) -> None:
    """Flush to the disk itself; macOS needs a call of its own for it."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined]  # only there on macOS
    else:
        os.fsync(fd)


def _remove(path: Path) -> bool:
    """Delete what belongs to a run, the journal first: what is left after a crash is found by nobody."""
    existed = path.exists()
    path.unlink(missing_ok=True)
    shutil.rmtree(_blobs(path), ignore_errors=True)
    shutil.rmtree(_mailbox(path), ignore_errors=True)
    _lock_path(path).unlink(missing_ok=True)
    sync_folder(path.parent)
    return existed


def _summary(path: Path) -> RunSummary | None:
    first = next((line for _, line in read_lines(path)), None)
    if first is None:
        return None
    started = decode(bytes(first.records), where=repr(str(path)))[0]
    if not isinstance(started, RunStarted):
        return None
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        last = last_line(fd, path)[0] or first
    finally:
        os.close(fd)
    status = "running" if last.status == "interrupted" and _is_driven(path) else last.status
    return RunSummary(
        first.run_id, started.goal, started.agent_id, status, first.at, last.at, started.origin
    )  # fmt: skip


def _is_driven(path: Path) -> bool:
    try:
        lock = os.open(_lock_path(path), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        holder = _note(lock).process
    finally:
        os.close(lock)
    return holder is not None and is_alive(holder)
