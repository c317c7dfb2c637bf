"""TOML that people write: parsed, with the line of what is wrong."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from harness.errors import ConfigError


def read_text(path: Path, what: str) -> str:
    """Return a file's text.

    Raises:
        ConfigError: it cannot be read; the text says what the file was to be.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None


def parse_toml(text: str, path: Path) -> dict[str, object]:
    """Parse TOML.

    Raises:
        ConfigError: it is none; the text names file and line.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"^(.*?) \(at (?:line (\d+), column \d+|end of document)\)$", str(error), re.DOTALL)
        what, at = (found[1], found[2]) if found else (str(error), None)
        line = int(at) if at else max(1, len(text.splitlines()))
        raise ConfigError(f"{path}:{line}: this is not TOML: {what}") from None
    except RecursionError:
        raise ConfigError(f"{path}: it is nested too deeply to be read") from None


_HEADER = re.compile(r"^\s*\[\[?\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


def line_of(text: str, keys: Sequence[str]) -> int:
    """Return the line on which a key, or the deepest of its tables that can be found, is written; 1 where none is.

    >>> line_of('[llm]\\nmodel = "m"\\n\\n[budget]\\nmax_tools = 3\\n', ("budget", "max_tools"))
    5
    """
    best, depth = 1, 0
    table: tuple[str, ...] = ()
    counts: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = path = _parts(header[1])
            if line.lstrip().startswith("[[") and table != ("agents",):
                # An entry of a list is addressed by its place in it.
                counts[path] = counts.get(path, -1) + 1
                table = path = (*path, str(counts[path]))
        elif key := _KEY.match(line):
            path = (*table, *_parts(key[1]))
            # An entry of [[agents]] is addressed by its id, which stands in a line of the table.
            if table == ("agents",) and path == ("agents", "id"):
                table = path = ("agents", line.split("=", 1)[1].split("#")[0].strip().strip("\"'"))
        else:
            continue
        common = 0
        for own, wanted in zip(path, keys, strict=False):
            if own != wanted:
                break
            common += 1
        if common == len(path) and common > depth:
            best, depth = number, common
    return best


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in re.findall(r"\"[^\"]*\"|'[^']*'|[^.]+", dotted))
