"""Three tools that read the files of one folder and nothing else.

Every path comes from a model and is not trusted. A path is resolved first, which tells where symbolic links lead, and
refused if that is outside the folder. Then it is opened from the folder downwards, one component at a time, each
relative to the directory opened before it and with ``O_NOFOLLOW``. The first step alone could be raced (a directory
exchanged for a link after the check); the second never follows a link at all, so what changed in between is an error
and not a way out.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from harness.errors import ConfigError, ToolError
from harness.tools.base import Tool
from harness.tools.function import FunctionTool

MAX_LISTED = 500
"""Files one list_files call shows."""

MAX_MATCHES = 100
"""Lines one search_files call shows."""

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
    methods = (reader.list_files, reader.read_file, reader.search_files)
    return [FunctionTool(method, effect="read") for method in methods]


@dataclass(slots=True)
class _Walk:
    """A walk over the files of a folder: its bounds, and what it had to leave out."""

    visited: int = 0
    notes: list[str] = field(default_factory=list)


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
            start_line: The first line to read. Lines count from 1.
            max_lines: The most lines to read.
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
            raise ToolError(f"{path!r} has {len(lines)} lines: start_line must be at most {len(lines)}")
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
        searched = 0
        for parts in self._walk(self._locate(path), walk):
            if not _matches(parts, pattern):
                continue
            data, size = self._read_found(parts)
            if b"\0" in data[:8192]:
                continue
            searched += 1
            left -= len(data)
            if size > len(data):
                walk.notes.append(f"of {_show(parts)} only the first {len(data)} bytes were searched")
            found += _find(data, wanted, _show(parts), limit=MAX_MATCHES + 1 - len(found))
            if len(found) > MAX_MATCHES or left <= 0:
                walk.notes.append(
                    f"the search stopped after {len(found)} lines in {searched} files; use a longer text or a pattern"
                )
                break
        return _fit(found[:MAX_MATCHES] or [f"no line contains {text!r} ({searched} files searched)"], walk.notes)

    def _locate(self, path: str) -> tuple[str, ...]:
        """Return the components of a path below the folder, with the links that stay in it resolved.

        Raises:
            ToolError: the path leads out of the folder, or is no path at all.
        """
        if "\0" in path or len(path) > 4096:
            raise ToolError(f"{path[:80]!r} is not a path: {_ACCEPTED}")
        if path.startswith("/") or ".." in path.split("/"):
            raise ToolError(f"{path!r} is outside the folder: {_ACCEPTED}")
        try:
            real = Path(os.path.realpath(self.root / path))
        except (OSError, ValueError) as error:
            raise ToolError(f"{path!r} is not a path ({error}): {_ACCEPTED}") from None
        if not real.is_relative_to(self.root):
            raise ToolError(f"{path!r} is a link that leads outside the folder: {_ACCEPTED}")
        return real.relative_to(self.root).parts
