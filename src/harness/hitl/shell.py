"""Shell commands: what may be executed without a shell, and what "allow for this session" would cover.

``parse`` takes a command line apart with a real bash grammar and accepts a small part of the language: plain words and
quoted strings, joined by ``&& || ; |``. What it returns is exactly what bash would execute and is executed as it is,
without a shell and without being parsed again. Everything else is a question to a person.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import msgspec

from harness.hitl.programs import BUILTINS, GIT_READS, RUNS_OTHERS, plain_name

if TYPE_CHECKING:
    from tree_sitter import Node, Tree

SHELL_NAMES = frozenset({"shell", "bash", "run", "exec"})
"""Tools with these names take a command."""

COMMAND_NAMES = ("cmd", "command")
"""The arguments that may hold it."""

HARMLESS_NAMES = frozenset({"timeout", "timeout_s", "timeout_ms", "timeout_seconds", "description"})
"""Arguments beside a command that do not change what it does."""

CommandLine: TypeAlias = str | tuple[str, ...]
"""A command line that has yet to be parsed, or the words of one command."""

Joint: TypeAlias = Literal["", "&&", "||", ";", "|"]

_MAX_COMMANDS = 50
_MAX_CHARS = 8_000
_MAX_SCOPE_CHARS = 200


class Argv(msgspec.Struct, frozen=True):
    """One command of a command line.

    Attributes:
        words: the program and its arguments.
        joint: what stands before it; empty for the first. ``|`` binds closest, then ``&&`` and ``||`` from left to
            right, then ``;``.

    >>> parse("git status -s && ls 'my docs'")
    (Argv(words=('git', 'status', '-s'), joint=''), Argv(words=('ls', 'my docs'), joint='&&'))
    """

    words: tuple[str, ...]
    joint: Joint = ""


class Ask(msgspec.Struct, frozen=True):
    """A command line that only a person can judge.

    Attributes:
        reason: why, in a few words.

    >>> parse("echo $HOME")
    Ask(reason="it has a '$'")
    """

    reason: str


class _Refused(Exception):
    """Why a command line is not accepted."""


def command_of(args: Mapping[str, object]) -> CommandLine | None:
    """Return the command in the arguments of a shell-like tool.

    None means that no command can be judged by itself: there is none or more than one, it is neither a string nor a
    list of strings, or another argument (an environment, a folder) could change what it does.

    >>> command_of({"cmd": "ls"}), command_of({"command": ["ls", "-l"]}), command_of({"cmd": "ls", "env": {"A": "b"}})
    ('ls', ('ls', '-l'), None)
    """
    return None if others(args) else stated(args)


def stated(args: Mapping[str, object]) -> CommandLine | None:
    """Return the one command that arguments state, whatever stands beside it."""
    given = [args[name] for name in COMMAND_NAMES if args.get(name) is not None]
    return line_in(given[0]) if len(given) == 1 else None


def line_in(value: object) -> CommandLine | None:
    """Return a value as a command line, or None where it is none."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)) or not value:
        return None
    words = cast("Sequence[object]", value)
    return tuple(str(word) for word in words) if all(isinstance(word, str) for word in words) else None


def others(args: Mapping[str, object]) -> list[str]:
    """Name the arguments beside a command that could change what it does."""
    silent = HARMLESS_NAMES.union(COMMAND_NAMES)
    return [name for name, value in args.items() if name not in silent and value is not None]


def parse(command: str) -> tuple[Argv, ...] | Ask:
    """Take a command line apart, or say why a person has to judge it.

    It never raises: what cannot be parsed, for any reason, is asked.

    >>> parse("ls > files.txt")
    Ask(reason="it has a '>'")
    """
    try:
        return tuple(_commands(command))
    except _Refused as refusal:
        return Ask(str(refusal))


def commands_of(line: CommandLine) -> tuple[Argv, ...] | Ask:
    """Return the commands of a command line; one that is a list of words needs no parsing."""
    return parse(line) if isinstance(line, str) else (Argv(line),)


# A character that may stand in a word without quotes, and one that may begin it.
_PLAIN = re.compile(r"[A-Za-z0-9_./:,+=@%-][A-Za-z0-9_./:,+=@%^-]*")
_SINGLE = re.compile(r"'[^']*'")
_DOUBLE = re.compile(r'"(?:[^"\\$`!]|\\[^$`!])*"')
_PIECE = re.compile(rf"{_PLAIN.pattern}|{_SINGLE.pattern}|{_DOUBLE.pattern}")
_QUOTED = re.compile(rf"{_SINGLE.pattern}|{_DOUBLE.pattern}")
_SPECIAL = re.compile(r"[$`!<>(){}\[\]*?~#\\]|(?<!&)&(?!&)|\|&")
_GAP = re.compile(r"[ \t]+")
_JOINT = re.compile(r"[ \t]*(&&|\|\||;|\|)[ \t]*")
_BLANK = re.compile(r"[ \t]*")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*\+?=")
_RESERVED = frozenset(
    shlex.split("! [[ ]] { } case coproc do done elif else esac fi for function if in select then time until while")
)
_LEAVES = frozenset({"word", "number", "raw_string", "string", "concatenation"})
_BRANCHES = frozenset({"program", "list", "pipeline"})
_JOINTS = frozenset({"&&", "||", ";", "|"})


def _commands(command: str) -> Iterator[Argv]:
    """Yield the commands.

    The grammar says what the words are. Each has to be made of characters that mean nothing to a shell, and everything
    between two words has to be a blank or the operator that belongs there: nothing of the line is left unexplained.
    """
    _check_characters(command)
    source = command.encode()
    nodes = list(_command_nodes(_tree(source).root_node))
    if not nodes:
        raise _Refused("there is no command in it")
    if len(nodes) > _MAX_COMMANDS:
        raise _Refused(f"it has more than {_MAX_COMMANDS} commands")
    end, joint = 0, ""
    for number, node in enumerate(nodes):
        if number:
            joint = _between(_JOINT, source[end : node.start_byte])
        else:
            _between(_BLANK, source[: node.start_byte])
        yield Argv(_words(node, source), cast("Joint", joint))
        end = node.end_byte
    _between(_BLANK, source[end:])


def _check_characters(command: str) -> None:
    """Refuse what no accepted command has, in words that help."""
    if len(command) > _MAX_CHARS:
        raise _Refused(f"it is longer than {_MAX_CHARS} characters")
    if "\n" in command or "\r" in command:
        raise _Refused("it has more than one line")
    for character in command:
        if character != "\t" and not character.isprintable():
            raise _Refused(f"it has the character U+{ord(character):04X}")
    if found := _SPECIAL.search(_QUOTED.sub("''", command)):
        raise _Refused(f"it has a {found[0]!r}")


def _command_nodes(node: Node) -> Iterator[Node]:
    """Yield the commands under a node, in order, and refuse every construct that is no plain command."""
    waiting = [node]  # a long list is a deep tree: no recursion
    while waiting:
        node = waiting.pop()
        if node.type == "command":
            yield node
        elif node.type in _BRANCHES:
            waiting.extend(reversed(node.children))
        elif node.type not in _JOINTS:
            raise _Refused(f"it has a {node.type.replace('_', ' ')!r}")


def _words(node: Node, source: bytes) -> tuple[str, ...]:
    words: list[str] = []
    end = node.start_byte
    for child in node.children:
        leaf = child.children[0] if child.type == "command_name" and child.child_count == 1 else child
        if leaf.type not in _LEAVES or leaf.is_missing or (child.type == "command_name") is bool(words):
            raise _Refused(f"it has a {leaf.type.replace('_', ' ')!r}")
        if words:
            _between(_GAP, source[end : leaf.start_byte])
        words.append(_value(_text(source[leaf.start_byte : leaf.end_byte])))
        end = leaf.end_byte
    if not words or not words[0]:
        raise _Refused("a command has no name")
    if words[0] in _RESERVED or _ASSIGNMENT.match(words[0]):
        raise _Refused(f"{words[0]!r} is a word of the shell's language")
    if words[0] in BUILTINS:
        raise _Refused(f"{words[0]!r} acts on the shell itself")
    return tuple(words)


def _value(word: str) -> str:
    """Return what a word means: its pieces, without their quotes."""
    parts: list[str] = []
    at = 0
    while at < len(word):
        piece = _PIECE.match(word, at)
        if piece is None:
            raise _Refused(f"it has a {word[at]!r}")
        at = piece.end()
        text = piece[0]
        if text[0] == '"':
            text = re.sub(r'\\(["\\])', r"\1", text[1:-1])
        elif text[0] == "'":
            text = text[1:-1]
        parts.append(text)
    return "".join(parts)


def _between(allowed: re.Pattern[str], gap: bytes) -> str:
    found = allowed.fullmatch(_text(gap))
    if found is None:
        raise _Refused(f"it has {_text(gap).strip()!r} where no such thing is expected")
    return found[1] if found.re.groups else ""


def _text(source: bytes) -> str:
    return source.decode("utf-8", "replace")  # a piece that is cut within a character is not a word of ours


def _tree(source: bytes) -> Tree:
    parser = _parser()
    if parser is None:
        raise _Refused("shell commands cannot be parsed here: install the extra 'shell'")
    tree = parser(source)
    if tree.root_node.has_error:
        raise _Refused("it is not a command line that can be parsed")
    return tree


@cache
def _parser() -> Callable[[bytes], Tree] | None:
    """Load the grammar when the first command is parsed; None where it is not installed or does not work."""
    try:
        import tree_sitter
        import tree_sitter_bash

        language = tree_sitter.Language(tree_sitter_bash.language())
    except (ImportError, ValueError, TypeError, AttributeError, OSError):
        return None
    # A parser of its own for each call: one is not to be shared by threads.
    return lambda source: tree_sitter.Parser(language).parse(source)


def session_scope(words: Sequence[str]) -> str | None:
    """Return what "allow for this session" would cover for one command; None where it is not to be offered.

    The scope of a program is the whole command, word for word: ``ls -l src`` covers ``ls -l src``. A git command that
    only reads is covered by command and sub-command, with any of the flags that are known to be harmless there and
    with places inside the folder: ``git log`` covers ``git log --oneline src``.

    There is no scope for what may run something else (wrappers, interpreters, builders, programs with such a flag),
    for a program that is named by a path, for git with options before its sub-command, nor for what cannot be shown.

    >>> session_scope(("git", "log", "--oneline")), session_scope(("ls", "-l")), session_scope(("env", "ls"))
    ('git log', 'ls -l', None)
    """
    if not words or not all(word.isprintable() for word in words):
        return None
    name = plain_name(words[0])
    if name is None or name in RUNS_OTHERS or words[0] in BUILTINS or words[0] in _RESERVED:
        return None
    if name == "git":
        if len(words) < 2 or not re.fullmatch(r"[a-z][a-z-]*", words[1]):
            return None
        flags = GIT_READS.get(words[1])
        if words[0] == "git" and flags is not None and all(_is_read(word, flags) for word in words[2:]):
            return f"git {words[1]}"
    return shlex.join(words)


def _is_read(word: str, flags: Collection[str]) -> bool:
    """Say whether a word after a reading sub-command is a known flag, or a place that is not outside of the folder."""
    if word.startswith("-"):
        return word in flags or (word.partition("=")[0] + "=") in flags or bool(re.fullmatch(r"-n?\d+", word))
    return not word.startswith(("/", "~", ":")) and ".." not in re.split(r"[/:]", word)


def session_scopes(command: CommandLine) -> tuple[str, ...] | None:
    """Return the scopes of a whole command line; None unless every command has one.

    Commands that are joined by ``|`` have one scope together: each may be harmless while one's output is not harmless
    as the other's input.

    >>> session_scopes("git status && ls | wc -l"), session_scopes("git status; sudo ls")
    (('git status', 'ls | wc -l'), None)
    """
    parsed = commands_of(command)
    if isinstance(parsed, Ask):
        return None
    scopes: list[str] = []
    for each in parsed:
        scope = session_scope(each.words)
        if scope is None:
            return None
        if each.joint == "|":
            scope = f"{scopes.pop()} | {scope}"
        scopes.append(scope)
    if any(len(scope) > _MAX_SCOPE_CHARS for scope in scopes):
        return None
    return tuple(dict.fromkeys(scopes))


def covered(command: CommandLine, allowed: Collection[str]) -> bool:
    """Say whether every part of a command line is in a scope that was allowed for this session.

    >>> covered("git status -s", {"git status"}), covered("git status; rm x", {"git status"})
    (True, False)
    """
    scopes = session_scopes(command)
    return scopes is not None and all(scope in allowed for scope in scopes)
