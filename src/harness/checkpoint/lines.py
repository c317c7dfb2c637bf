"""The lines of a journal file: each is one append, a JSON object that begins with the checksum of what follows.

Only the last line may be damaged, by a crash in the middle of writing it. Damage before it is an error.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Generator
from pathlib import Path

import msgspec

from harness.checkpoint.base import RunStatus
from harness.errors import CheckpointCorrupt, RecordTooNew

FORMAT_VERSION = 1

_TAIL = 65_536  # bytes read from the end of a file to find its last line


class Line(msgspec.Struct, frozen=True):
    """One append as it stands in the file, after its checksum.

    Attributes:
        version: of this layout.
        run_id: the run; the name of the file is only a digest of it.
        seq: the sequence number of the last record.
        at: when it was appended, seconds since the epoch.
        token: the owner's fencing token.
        status: how the run stands after it.
        records: the records.
    """

    version: int
    run_id: str
    seq: int
    at: float
    token: int
    status: RunStatus
    records: msgspec.Raw


def format_line(line: Line) -> bytes:
    """Write a line with its checksum and its line feed."""
    body = msgspec.json.encode(line)[1:]
    return b'{"check":"%08x",%b\n' % (zlib.crc32(body), body)


def _parse(text: bytes, where: str) -> Line | None:
    """Read one line with its line feed, or return None for a damaged one."""
    head, body = text[:20], text[20:-1]
    if text[-1:] != b"\n" or head != b'{"check":"%08x",' % zlib.crc32(body):
        return None
    try:
        line = msgspec.json.decode(b"{" + body, type=Line)
    except msgspec.MsgspecError as error:
        version = _version(body)
        if version <= FORMAT_VERSION:
            raise CheckpointCorrupt(f"{where} is not a line of a journal: {error}") from None
    else:
        version = line.version
        if version <= FORMAT_VERSION:
            return line
    raise RecordTooNew(
        f"{where} was written by a newer react-agent-harness (layout {version}; this one reads up to "
        f"{FORMAT_VERSION}): update react-agent-harness to go on"
    )


def _version(body: bytes) -> int:
    try:
        raw = msgspec.json.decode(b"{" + body, type=dict[str, object])
    except msgspec.MsgspecError:
        return 0
    version = raw.get("version")
    return version if isinstance(version, int) else 0


def read_lines(path: Path) -> Generator[tuple[int, Line]]:
    """Yield the lines of a file with their numbers, up to a last one that is not whole."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        damaged = 0
        for number, text in enumerate(file, 1):
            if damaged:
                raise CheckpointCorrupt(f"{str(path)!r} is damaged in line {damaged}: restore it from a backup")
            line = _parse(text, f"{str(path)!r}, line {number}")
            if line is not None:
                yield number, line
            elif text.endswith(b"\n"):
                damaged = number
            else:
                return  # somebody may be writing it right now: what follows it later is not looked at


def last_line(fd: int, path: Path) -> tuple[Line | None, int]:
    """Return the last whole line, if there is one, and where it ends; what follows it is what a crash left."""
    size, window = os.fstat(fd).st_size, _TAIL
    while True:
        start = max(0, size - window)
        pieces = _pread(fd, size - start, start).split(b"\n")
        torn = pieces.pop()
        if start == 0 or len(pieces) > 2:
            break
        window *= 8
    if start > 0:
        del pieces[0]  # the window begins somewhere inside it
    end = size - len(torn)
    # Only the very last thing in the file may be damaged: the torn piece, or else the last line.
    for damage_allowed in (not torn, False):
        if not pieces:
            return None, 0
        text = pieces.pop() + b"\n"
        line = _parse(text, f"{str(path)!r}, the line that ends at byte {end}")
        if line is not None:
            return line, end
        if not damage_allowed:
            break
        end -= len(text)
    raise CheckpointCorrupt(
        f"{str(path)!r} is damaged before its last line, in the line that ends at byte {end}: restore it from a backup"
    )


def _pread(fd: int, count: int, offset: int) -> bytes:
    """Read exactly, unless the file ends: one system call returns at most 2 GB."""
    parts: list[bytes] = []
    while count and (part := os.pread(fd, count, offset)):
        parts.append(part)
        count, offset = count - len(part), offset + len(part)
    return b"".join(parts)
