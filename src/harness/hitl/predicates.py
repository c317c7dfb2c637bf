"""Predicates: what a rule asks of one argument. Each is judged true, false, or None where that cannot be told.

A missing argument, a value of another type and a number that is none are None: they never satisfy a rule that allows,
and always one that forbids or asks.
"""

from __future__ import annotations

import ipaddress
import math
import posixpath
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import TypeAlias, assert_never
from urllib.parse import urlsplit

import msgspec

from harness.errors import ConfigError
from harness.hitl.programs import BUILTINS, RUNS_OTHERS, plain_name
from harness.hitl.shell import Ask, commands_of, line_in

Scalar: TypeAlias = str | int | float | bool

_MAX_CHARS = 10_000
_HOST_PATTERN = re.compile(r"(?:(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:]+\])(?::\d{1,5})?")


class Inside(msgspec.Struct, frozen=True):
    """A path is inside one of these folders.

    The path is taken as text: ``..`` is resolved, a symbolic link is not followed. A tool that opens it has to hold to
    the folder by itself. A path that cannot be read in one way only (a ``~``, a backslash, an address, a detour through
    a folder outside) is neither inside nor outside.

    Attributes:
        folders: ``workspace``, a folder under it as in ``workspace/docs``, or an absolute path.

    >>> judge(Inside(("workspace",)), "a/../b.txt", "/home/ann"), judge(Inside(("workspace",)), "/etc/x", "/home/ann")
    (True, False)
    """

    folders: tuple[str, ...]

    def __post_init__(self) -> None:
        for folder in _some(self, "folders", "inside"):
            if not (folder.startswith("/") or folder.split("/")[0] == "workspace") or ".." in folder.split("/"):
                raise ConfigError(f"inside must be 'workspace', 'workspace/...' or an absolute path, not {folder!r}")


class Host(msgspec.Struct, frozen=True):
    """The host of a URL is one of these.

    Only plain ``http`` and ``https`` addresses can be judged: one with a user name, an encoded or non-ASCII host, a
    host that is a number in disguise, or a port that is not the scheme's own (unless the pattern names it) cannot.

    Attributes:
        patterns: host names; ``*.example.org`` stands for every name under it, ``example.org:8080`` for that port.

    >>> judge(Host(("*.example.org",)), "https://docs.example.org/a"), judge(Host(("a.org",)), "http://a.org@b.org/")
    (True, None)
    """

    patterns: tuple[str, ...]

    def __post_init__(self) -> None:
        for pattern in _some(self, "patterns", "host"):
            name = _port_of(pattern)[0]
            if not _HOST_PATTERN.fullmatch(pattern) or _canonical_host(name) != name:
                raise ConfigError(
                    f"host must be a name in lower case, as in 'example.org', '*.example.org' or 'example.org:8080', "
                    f"not {pattern!r}"
                )


class Between(msgspec.Struct, frozen=True):
    """A number is in a range.

    Attributes:
        min: the least; None for no limit.
        max: the most; None for no limit.

    >>> judge(Between(max=10), 3), judge(Between(max=10), float("nan")), judge(Between(max=10), True)
    (True, None, None)
    """

    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.min, self.max) if limit is not None]
        if not limits or any(math.isnan(limit) for limit in limits) or limits != sorted(limits):
            raise ConfigError(f"min and max must be a range of numbers, not min={self.min!r}, max={self.max!r}")


class OneOf(msgspec.Struct, frozen=True):
    """A value is one of these, of the same type: 1 is not true, and "1" is not 1.

    Attributes:
        choices: the values.

    >>> judge(OneOf(("read", "list")), "read"), judge(OneOf((1, 2)), "1")
    (True, None)
    """

    choices: tuple[Scalar, ...]

    def __post_init__(self) -> None:
        _some(self, "choices", "in")


class Matches(msgspec.Struct, frozen=True):
    """A whole string matches a regular expression.

    The string comes from a model: write a pattern that cannot backtrack without end. Strings above 10 000 characters
    are not judged.

    Attributes:
        pattern: as Python's ``re`` takes it.

    >>> judge(Matches("[a-z]+"), "abc"), judge(Matches("[a-z]+"), "abc; rm")
    (True, False)
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ConfigError(f"matches is not a regular expression: {self.pattern!r}: {error}") from None


class Prefix(msgspec.Struct, frozen=True):
    """A command begins with these words and has no other flags than these.

    A command that may come to the same in another spelling (``/bin/rm``, ``git -C x push``, ``sudo rm``) cannot be
    judged; nor can one with a flag that is not listed.

    Attributes:
        words: the program, and the sub-command where it has one.
        flags: flags that may follow: ``-s``, ``--format=`` with any value, ``*`` for all. Every word that begins with
            ``-`` is held to be one. Other words are not looked at.

    >>> status = Prefix(("git", "status"), ("-s",))
    >>> judge(status, ["git", "status", "-s"]), judge(status, ["git", "status", "-v"]), judge(status, ["ls"])
    (True, None, False)
    """

    words: tuple[str, ...]
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _some(self, "words", "prefix")
        if wrong := [flag for flag in self.flags if flag != "*" and not flag.startswith("-")]:
            raise ConfigError(f"flags must begin with '-', or be '*', not {wrong[0]!r}")


class Not(msgspec.Struct, frozen=True):
    """A predicate is certainly false.

    Attributes:
        predicate: what must not hold.

    >>> judge(Not(OneOf(("a",))), "b"), judge(Not(OneOf(("a",))), 1)
    (True, None)
    """

    predicate: Predicate


Predicate: TypeAlias = Inside | Host | Between | OneOf | Matches | Prefix | Not


def _some(predicate: Inside | Host | OneOf | Prefix, field: str, word: str) -> Sequence[str]:
    """Return a field that must be a tuple with something in it."""
    values = getattr(predicate, field)
    if isinstance(values, str) or not values:
        raise ConfigError(f"{word} must be a list with something in it, not {values!r}")
    return values


def judge(predicate: Predicate, value: object, workspace: str = "") -> bool | None:
    """Say whether a value satisfies a predicate; None where that cannot be told."""
    match predicate:
        case Inside():
            return _any(predicate.folders, lambda folder: _inside(value, folder, workspace))
        case Host():
            return _host(value, predicate.patterns)
        case Between():
            return _between(value, predicate)
        case OneOf():
            same = [choice for choice in predicate.choices if _kind(choice) == _kind(value)]
            return value in same if same else None
        case Matches():
            if not isinstance(value, str) or len(value) > _MAX_CHARS:
                return None
            return re.fullmatch(predicate.pattern, value) is not None
        case Prefix():
            return _command(value, predicate)
        case Not():
            holds = judge(predicate.predicate, value, workspace)
            return None if holds is None else not holds
    assert_never(predicate)


def describe(predicate: Predicate) -> str:
    """Say in a few words what a predicate asks for."""
    match predicate:
        case Inside():
            return f"inside {' or '.join(predicate.folders)}"
        case Host():
            return f"at host {' or '.join(predicate.patterns)}"
        case Between():
            limits = (("at least", predicate.min), ("at most", predicate.max))
            return " and ".join(f"{words} {limit:g}" for words, limit in limits if limit is not None)
        case OneOf():
            return f"one of {', '.join(map(repr, predicate.choices))}"
        case Matches():
            return f"a match of {predicate.pattern!r}"
        case Prefix():
            flags = f" with flags {' '.join(predicate.flags)}" if predicate.flags else " without flags"
            return f"a command that begins with {' '.join(predicate.words)!r}{flags}"
        case Not():
            return f"not {describe(predicate.predicate)}"
    assert_never(predicate)


def _any(items: Sequence[str], holds: Callable[[str], bool | None]) -> bool | None:
    found = [holds(item) for item in items]
    return True if True in found else None if None in found else False


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number" if value == value else "none"  # noqa: PLR0124 - not a number is not equal to itself
    return type(value).__name__


def _between(value: object, limits: Between) -> bool | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return None
    return (limits.min is None or value >= limits.min) and (limits.max is None or value <= limits.max)


_DOUBTFUL_PATH = re.compile(r"[\\$]|^~|^//|://|^[A-Za-z]:|^file:|%[0-9A-Fa-f]{2}")


def _inside(path: object, folder: str, workspace: str) -> bool | None:
    if not isinstance(path, str) or not path or len(path) > _MAX_CHARS or not path.isprintable():
        return None
    if not workspace.startswith("/") or _DOUBTFUL_PATH.search(path):
        return None
    # A file system that normalises names may take what looks like a dot or a slash for one.
    plain = unicodedata.normalize("NFKC", path)
    if any(plain.count(mark) != path.count(mark) for mark in "./\\~"):
        return None
    root = posixpath.normpath(folder if folder.startswith("/") else workspace + folder.removeprefix("workspace"))
    steps = posixpath.join(posixpath.normpath(workspace), path).split("/")
    if not _is_under(posixpath.normpath("/".join(steps)), root):
        return False
    # With a detour outside, what a `..` there leads back to depends on links that are not seen here.
    turns = [place for place, step in enumerate(steps) if step == ".."]
    ways = (posixpath.normpath("/".join(steps[: place + 1])) for place in turns)
    return True if all(_is_under(way, root) or _is_under(way, posixpath.normpath(workspace)) for way in ways) else None


def _is_under(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


_DEFAULT_PORTS = {"http": 80, "https": 443}
_URL = re.compile(
    r"(?:http|https)://(\[[0-9a-f:]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)(?::\d{1,5})?(?:/.*)?", re.IGNORECASE
)


def _host(url: object, patterns: Sequence[str]) -> bool | None:
    if not isinstance(url, str) or len(url) > _MAX_CHARS or not url.isascii() or not url.isprintable():
        return None
    if " " in url or "\\" in url or not _URL.fullmatch(url):
        return None
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if host is None or "@" in parts.netloc or (name := _canonical_host(host)) is None:
        return None
    own = _DEFAULT_PORTS[parts.scheme]
    return _any(patterns, lambda pattern: _is_host(name, own if port is None else port, own, pattern))


def _is_host(name: str, port: int, own_port: int, pattern: str) -> bool | None:
    wanted, wanted_port = _port_of(pattern)
    if not (name.endswith(wanted[1:]) if wanted.startswith("*.") else name == wanted):
        return False
    # The right host at another port may be another server: not allowed, and not let go either.
    return True if port == (own_port if wanted_port is None else wanted_port) else None


def _port_of(pattern: str) -> tuple[str, int | None]:
    """Take a pattern apart: the host without brackets, and the port where it names one."""
    host, colon, port = ("", "", "") if pattern.endswith("]") else pattern.rpartition(":")
    return (host.strip("[]"), int(port)) if colon and port.isdecimal() else (pattern.strip("[]"), None)


def _canonical_host(host: str) -> str | None:
    """Return a host in the one spelling that is compared; None for an address that hides behind another spelling."""
    if ":" in host:
        try:
            address = ipaddress.IPv6Address(host)
        except ValueError:
            return None
        return None if address.ipv4_mapped or address.sixtofour or address.teredo else address.compressed
    last = host.rpartition(".")[2]
    if last.isdigit() or re.fullmatch(r"0x[0-9a-f]*", last):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            return None
    return host


def _command(value: object, prefix: Prefix) -> bool | None:
    line = line_in(value)
    commands = commands_of(line) if line is not None else Ask("")
    if isinstance(commands, Ask):
        return None
    found = {_begins(each.words, prefix) for each in commands}
    return found.pop() if len(found) == 1 else None


def _begins(words: tuple[str, ...], prefix: Prefix) -> bool | None:
    if words[: len(prefix.words)] != prefix.words:
        return None if _may_run(words, prefix.words) else False
    given = [word for word in words[len(prefix.words) :] if word.startswith("-")]
    known = "*" in prefix.flags or all(
        flag in prefix.flags or ("=" in flag and flag.partition("=")[0] + "=" in prefix.flags) for flag in given
    )
    return True if known else None


def _may_run(words: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Say whether a command may come to the wanted one: spelled otherwise, or run by another program."""
    program = words[0].replace("\\", "/").rpartition("/")[2]
    name = plain_name(program)
    names = [token for word in words[1:] for token in re.split(r"[^\w.+-]+", word.casefold())]
    if wanted[0].casefold() in (program.casefold(), name):
        return _in_order(wanted[1:], names)
    runs_others = name is None or name in RUNS_OTHERS or program in BUILTINS
    return (runs_others or (name == "git" and "-c" in names)) and _in_order(wanted, names)


def _in_order(wanted: Sequence[str], names: Sequence[str]) -> bool:
    left = iter(names)
    return all(word.casefold() in left for word in wanted)
