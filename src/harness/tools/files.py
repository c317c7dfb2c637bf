"""Three tools that read the files of one folder and nothing else.

Every path comes from a model and is not trusted. A path is resolved first, which tells where symbolic links lead, and
refused if that is outside the folder. Then it is opened from the folder downwards, one component at a time, each
relative to the directory opened before it and with ``O_NOFOLLOW``. The first step alone could be raced (a directory
exchanged for a link after the check); the second never follows a link at all, so what changed in between is an error
and not a way out.
"""

from __future__ import annotations

import difflib
import errno
import os
import stat
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from harness.errors import ConfigError, ToolError
from harness.tools.base import Tool
from harness.tools.function import tool

MAX_LISTED = 500
"""Files one list_files call shows."""

MAX_MATCHES = 100
"""Lines one search_files call shows."""

MAX_NEAREST = 10
"""Lines one search_files call shows of those that have only some of the words."""

MAX_WORDS = 10
"""Words of a text that are looked for by themselves."""

MIN_WORD_CHARS = 3
"""Characters from which on a word is looked for by itself."""

MAX_VISITED = 50_000
"""Directory entries one call looks at."""

MAX_FILE_BYTES = 10_000_000
"""Bytes read of one file."""

MAX_SEARCHED_BYTES = 100_000_000
"""Bytes one search_files call reads."""

MAX_CHARS = 12_000
"""Characters of one result: room for a note within what an agent shows of a result by default."""

MAX_LINE_CHARS = 300
"""Characters of one matching line."""

MAX_COMPARED = 2_000
"""Paths that are looked at for one like a path that does not exist."""

MAX_NAMED = 8
"""Paths that are named instead of it."""

_SKIPPED_FOLDERS = frozenset({".git"})
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def file_tools(folder: str | os.PathLike[str]) -> list[Tool]:
    """Make ``list_files``, ``read_file`` and ``search_files`` for one folder.

    They only read, and only below the folder: no ``..``, no absolute path, no symbolic link that leads out, no device.
    Results are bounded, and say what was left out.

    Args:
        folder: an existing folder.

    Raises:
        ConfigError: there is no such folder.

    >>> [each.spec.name for each in file_tools(".")]
    ['list_files', 'read_file', 'search_files']
    """
    try:
        root = Path(folder).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"file_tools needs an existing folder, not {os.fspath(folder)!r}: {error}") from None
    if not root.is_dir():
        raise ConfigError(f"file_tools needs a folder, and {os.fspath(folder)!r} is a file")
    reader = _Folder(root)
    made = tool(effect="read", workspace=root)
    return [made(method) for method in (reader.list_files, reader.read_file, reader.search_files)]


@dataclass(slots=True)
class _Walk:
    """A walk over the files of a folder: its bounds, and what it had to leave out."""

    visited: int = 0
    notes: list[str] = field(default_factory=list[str])


@dataclass(slots=True, frozen=True)
class _Folder:
    """The folder, and the three functions a model calls."""

    root: Path

    def list_files(self, path: str = ".", pattern: str = "*") -> str:
        """List the files of the folder and of its subfolders, one path per line.

        Args:
            path: The subfolder to list. Leave it out to list everything.
            pattern: Which file names to list; * stands for any text. Leave it out to list every file.
        """
        walk, listed = _Walk(), list[str]()
        for parts in self._walk(self._locate(path), walk):
            if not _matches(parts, pattern):
                continue
            if len(listed) == MAX_LISTED:
                walk.notes.append(f"only the first {MAX_LISTED} files are listed; list a subfolder, or use a pattern")
                break
            listed.append(_show(parts))
        return _fit(listed or [f"no files match the pattern {pattern!r} in {path!r}"], walk.notes)

    def read_file(self, path: str, start_line: int = 1, max_lines: int = 500) -> str:
        """Read a text file of the folder.

        Args:
            path: The file to read, written as list_files shows it.
            start_line: The first line to read; lines count from 1. Leave it out to read from the top.
            max_lines: The most lines to read. Leave it out to read all that fit.
        """
        if start_line < 1 or max_lines < 1:
            raise ToolError(f"start_line and max_lines must be 1 or more, not {start_line} and {max_lines}")
        parts = self._locate(path)
        data, size = self._read(parts)
        if b"\0" in data[:8192]:
            raise ToolError(f"{path!r} is not a text file ({size} bytes): this tool reads text files")
        notes = [f"only the first {len(data)} of {size} bytes are read"] if size > len(data) else []
        lines = _lines(data)
        if not lines:
            return "(the file is empty)"
        if start_line > len(lines):
            few = f"start_line must be at most {len(lines)}; leave it out to read from the top"
            raise ToolError(f"{path!r} has {len(lines)} lines: {few}")
        wanted = lines[start_line - 1 : start_line - 1 + max_lines]
        shown = _count_fitting(wanted)
        end = start_line - 1 + max(shown, 1)
        if start_line > 1 or end < len(lines):
            more = f"; to go on, use start_line {end + 1}" if end < len(lines) else ""
            notes.append(f"lines {start_line} to {end} of {len(lines)}{more}")
        if not shown:
            notes.append(f"line {start_line} has {len(wanted[0])} characters; only the first {MAX_CHARS} are shown")
        return _with_notes("\n".join(wanted[:shown]) if shown else wanted[0][:MAX_CHARS], notes)

    def search_files(self, text: str, pattern: str = "*", path: str = ".") -> str:
        """Find the lines that contain a text, in all files of the folder. Large and small letters count as the same.

        Where no line contains it, the lines with the most of its words are returned.

        Args:
            text: The text to find, on one line. It is taken literally.
            pattern: Which file names to search; * stands for any text. Leave it out to search every file.
            path: The subfolder or file to search. Leave it out to search everything.
        """
        wanted = text.casefold()
        if not wanted.strip() or "\n" in wanted:
            raise ToolError(f"text must be one line with at least one letter or digit, not {text[:80]!r}")
        walk, found = _Walk(), list[str]()
        left = MAX_SEARCHED_BYTES
        searched, named = 0, list[str]()
        words, nearest = _words(wanted), dict[int, list[str]]()
        for parts in self._walk(self._locate(path), walk):
            if not _matches(parts, pattern):
                continue
            try:
                data, size = self._read(parts)
            except ToolError as error:
                walk.notes.append(str(error))
                continue
            if b"\0" in data[:8192]:
                continue
            searched += 1
            if searched <= MAX_NAMED:
                named.append(_show(parts))
            left -= len(data)
            if size > len(data):
                walk.notes.append(f"of {_show(parts)} only the first {len(data)} bytes were searched")
            found += _find(data, wanted, _show(parts), limit=MAX_MATCHES + 1 - len(found))
            if not found:
                _find_nearest(data, words, _show(parts), nearest)
            if len(found) > MAX_MATCHES or left <= 0:
                walk.notes.append(
                    f"the search stopped after {min(len(found), MAX_MATCHES)} lines in {searched} files; "
                    "use a longer text, a pattern or a subfolder"
                )
                break
        if found:
            return _fit(found[:MAX_MATCHES], walk.notes)
        if named:  # a weak model takes what it did not find for what is not there
            more = " and others" if searched > MAX_NAMED else ""
            walk.notes.insert(
                0, f"searched: {', '.join(named)}{more}; it may be there in other words: read the files that matter"
            )
        first = f"no line contains {text!r} ({searched} files searched)"
        if not nearest:
            return _fit([first], walk.notes)
        most = max(nearest)
        return _fit([f"{first}; lines with {most} of the words {', '.join(words)}:", *nearest[most]], walk.notes)

    def _locate(self, path: str) -> tuple[str, ...]:
        """Return the components of a path below the folder, with the links that stay in it resolved.

        Raises:
            ToolError: the path leads out of the folder, or is no path at all.
        """
        if "\0" in path or len(path) > 4096:
            raise ToolError(f"{path[:80]!r} is not a path: {_ACCEPTED}")
        if path.startswith("/") or ".." in path.split("/"):
            raise ToolError(f"{path!r} is outside the folder{self._existing(path)}")
        try:
            real = Path(os.path.realpath(self.root / path))
        except (OSError, ValueError, RecursionError) as error:
            raise ToolError(f"{path!r} is not a path ({error}): {_ACCEPTED}") from None
        if not real.is_relative_to(self.root):
            raise ToolError(f"{path!r} is a link that leads outside the folder: {_ACCEPTED}")
        return real.relative_to(self.root).parts

    def _walk(self, start: tuple[str, ...], walk: _Walk) -> Iterator[tuple[str, ...]]:
        """Yield the files below ``start``, a folder before its subfolders, each in the order of names."""
        about = self._stat(start)
        if not stat.S_ISDIR(about.st_mode):
            _need_regular(about, start)
            yield start
            return
        waiting = deque([start])
        while waiting:
            here = waiting.popleft()
            try:
                files, folders = self._entries(here, walk)
            except ToolError as error:
                if here == start:
                    raise
                walk.notes.append(str(error))
                continue
            yield from ((*here, name) for name in files)
            waiting += [(*here, name) for name in folders if name not in _SKIPPED_FOLDERS]
            if walk.visited >= MAX_VISITED:
                walk.notes.append(f"only the first {MAX_VISITED} entries were looked at; name a subfolder")
                return

    def _entries(self, parts: tuple[str, ...], walk: _Walk) -> tuple[list[str], list[str]]:
        """Return the names of the files and of the folders in a folder. Links and devices are neither."""
        files, folders = list[str](), list[str]()
        with _explained(parts), self._open(parts, os.O_DIRECTORY) as folder, os.scandir(folder) as entries:
            for entry in entries:
                if walk.visited >= MAX_VISITED:
                    break
                walk.visited += 1
                if entry.is_file(follow_symlinks=False):
                    files.append(entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
        return sorted(files), sorted(folders)

    def _stat(self, parts: tuple[str, ...]) -> os.stat_result:
        if not parts:
            return os.stat(self.root, follow_symlinks=False)
        try:
            with self._open(parts[:-1], os.O_DIRECTORY) as parent:
                return os.stat(parts[-1], dir_fd=parent, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            raise ToolError(self._no_such(parts)) from None
        except OSError as error:
            raise _explain(error, parts) from None

    def _no_such(self, parts: tuple[str, ...]) -> str:
        path = _show(parts)
        return f"there is no {path!r}{self._existing(path)}"

    def _existing(self, path: str) -> str:
        """Say which paths exist, those like a wrong one first: a weak model asks for what it made up until it is told.

        It says so in positive words only: of "without a leading '/'" such a model remembers the '/'.
        """
        known = [_show(found) for found in islice(self._walk((), _Walk()), MAX_COMPARED)]
        named = difflib.get_close_matches(path, known, n=MAX_NAMED) or known[:MAX_NAMED]
        if not named:
            return f": {_ACCEPTED}"
        more = " and others, which list_files shows" if len(named) < len(known) else ""
        return f". These exist, use one of them: {', '.join(named)}{more}"

    def _read(self, parts: tuple[str, ...]) -> tuple[bytes, int]:
        """Return the first bytes of a file, and its size."""
        # Before it is opened, because to open a device can do something; and after it, when it may be another one.
        about = self._stat(parts)
        if stat.S_ISDIR(about.st_mode):
            raise ToolError(f"{_show(parts)!r} is a folder: this tool reads one file; list_files shows which there are")
        _need_regular(about, parts)
        with _explained(parts), self._open(parts, 0) as fd:
            about = os.fstat(fd)
            _need_regular(about, parts)
            with os.fdopen(fd, "rb", closefd=False) as file:
                data = file.read(MAX_FILE_BYTES)
        # What the kernel makes up as it is read (/proc, /sys) has a size that means nothing.
        return data, max(about.st_size, len(data)) if len(data) == MAX_FILE_BYTES else len(data)

    @contextmanager
    def _open(self, parts: tuple[str, ...], flags: int) -> Generator[int]:
        """Open a path below the folder, one component at a time, following no link."""
        fd = os.open(self.root, _READ | os.O_DIRECTORY)
        try:
            for index, part in enumerate(parts):
                kind = flags if index == len(parts) - 1 else os.O_DIRECTORY
                below = os.open(part, _READ | kind, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)


_ACCEPTED = "a path is relative to the folder, as list_files shows it"


@contextmanager
def _explained(parts: tuple[str, ...]) -> Generator[None]:
    """Turn an error of the system into one a model can act on."""
    try:
        yield
    except OSError as error:
        raise _explain(error, parts) from None


def _explain(error: OSError, parts: tuple[str, ...]) -> ToolError:
    name = _show(parts)
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return ToolError(f"there is no {name!r}: {_ACCEPTED}")
        case errno.ELOOP | errno.EMLINK:
            return ToolError(f"{name!r} is a symbolic link that is not followed: {_ACCEPTED}")
        case errno.ENAMETOOLONG:
            return ToolError(f"{name[:80]!r}... is too long for a path: {_ACCEPTED}")
        case _:
            return ToolError(f"{name!r} cannot be read: {error.strerror}")


def _need_regular(about: os.stat_result, parts: tuple[str, ...]) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise ToolError(f"{_show(parts)!r} is not a regular file (a pipe, socket, device or link): it is not read")


def _show(parts: tuple[str, ...]) -> str:
    """Write a path so that one line holds it and nothing in it is invisible."""
    path = "/".join(parts) or "."
    return path if path.isprintable() else repr(path)


def _matches(parts: tuple[str, ...], pattern: str) -> bool:
    """Match a name, or with a ``/`` in the pattern the path or its end. ``**/`` means any folder, also none."""
    pattern = pattern.removeprefix("./").replace("**/", "")
    if "/" not in pattern:
        return not pattern or fnmatchcase(parts[-1], pattern)
    path = "/".join(parts)
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*/{pattern}")


def _lines(data: bytes) -> list[str]:
    text = data.decode("utf-8-sig", "replace").replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _find(data: bytes, wanted: str, name: str, *, limit: int) -> list[str]:
    """Return up to ``limit`` lines of a file that contain a casefolded text."""
    if wanted not in data.decode("utf-8-sig", "replace").casefold():
        return []
    found: list[str] = []
    for number, line in enumerate(_lines(data), 1):
        at = line.casefold().find(wanted)
        if at < 0:
            continue
        found.append(_at(name, number, line, at))
        if len(found) == limit:
            break
    return found


def _at(name: str, number: int, line: str, at: int) -> str:
    """Show a line, or what is around a place in a long one."""
    start = max(0, min(at - MAX_LINE_CHARS // 3, len(line) - MAX_LINE_CHARS))
    cut = line[start : start + MAX_LINE_CHARS]
    return f"{name}:{number}: {'...' if start else ''}{cut}{'...' if start + len(cut) < len(line) else ''}"


def _words(wanted: str) -> list[str]:
    """Return the words of a text that can be looked for one by one; none where it is one word only."""
    words = [*dict.fromkeys(word.strip(".,;:!?\"'()[]") for word in wanted.split())]
    return [word for word in words if len(word) >= MIN_WORD_CHARS][:MAX_WORDS] if len(words) > 1 else []


def _find_nearest(data: bytes, words: list[str], name: str, nearest: dict[int, list[str]]) -> None:
    """Add a file's lines that hold some of the words to ``nearest``, under how many these are."""
    text = data.decode("utf-8-sig", "replace").casefold() if words else ""
    here = [word for word in words if word in text]
    if not here or len(here) < max(nearest, default=0):
        return
    for number, line in enumerate(_lines(data), 1):
        folded = line.casefold()
        places = [at for word in here if (at := folded.find(word)) >= 0]
        if places and len(places) >= max(nearest, default=0):
            lines = nearest.setdefault(len(places), [])
            if len(lines) < MAX_NEAREST:
                lines.append(_at(name, number, line, min(places)))


def _count_fitting(lines: list[str]) -> int:
    """Count how many of the lines fit into one result."""
    room = MAX_CHARS
    for count, line in enumerate(lines):
        room -= len(line) + 1
        if room < 0:
            return count
    return len(lines)


def _fit(lines: list[str], notes: list[str]) -> str:
    count = _count_fitting(lines)
    if count < len(lines):
        notes = [*notes, f"{len(lines) - count} more lines are not shown; use a pattern or a subfolder"]
    return _with_notes("\n".join(lines[:count]), notes)


def _with_notes(text: str, notes: list[str]) -> str:
    """Put what was left out below the text, in brackets; of many notes the first ones."""
    return "\n".join([text, *(f"[{note}]" for note in notes[:5])])
