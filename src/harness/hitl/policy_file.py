"""A policy as a TOML file. A wrong file names its line and the nearest right word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TypeVar, cast

import msgspec

from harness.errors import ConfigError, nearest
from harness.hitl.policy import Example, Policy, Rule, RuleError
from harness.hitl.predicates import Between, Host, Inside, Matches, Not, OneOf, Predicate, Prefix, Scalar
from harness.toml_text import line_of, parse_toml, read_text

T = TypeVar("T")


class _Table(msgspec.Struct, kw_only=True):
    """What stands in ``[rules.NAME]``."""

    action: str
    tool: str = "*"
    agent: str = "*"
    args: dict[str, dict[str, object]] = {}
    tainted: bool | None = None
    spent_usd: dict[str, object] | None = None
    left_usd: dict[str, object] | None = None
    expires: datetime | None = None
    max_uses: int | None = None
    reason: str = ""
    match: list[str | dict[str, object]] = []
    not_match: list[str | dict[str, object]] = []


class _Wrong(Exception):
    """What is wrong, and at which keys."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


def load_policy(path: Path | str) -> Policy:
    """Read a policy from a file.

    Raises:
        ConfigError: it cannot be read or is wrong; the text names file, line and what to write instead.

    >>> with open("policy.toml", "w", encoding="utf-8") as file:
    ...     _ = file.write('[rules.no-mail]\\naction = "forbid"\\ntool = "send_*"\\n')
    >>> load_policy("policy.toml").rules[0].id
    'no-mail'
    """
    path = Path(path).expanduser()
    return parse_policy(read_text(path, "policy"), path)


def parse_policy(text: str, path: Path) -> Policy:
    """Make a policy of the text of a file; the path is for what is said of it.

    Raises:
        ConfigError: it is wrong.
    """
    raw = parse_toml(text, path)
    try:
        return _policy(raw)
    except _Wrong as wrong:
        raise ConfigError(f"{path}:{line_of(text, wrong.keys)}: {wrong}") from None
    except RecursionError:
        raise ConfigError(f"{path}: it is nested too deeply to be read") from None


def _policy(raw: Mapping[str, object]) -> Policy:
    _known(raw, ("rules", "shell_tools"))
    rules = _convert(raw.get("rules", {}), dict[str, dict[str, object]], "rules")
    shell_tools = _convert(raw.get("shell_tools", []), list[str], "shell_tools")
    return Policy(tuple(_rule(name, table) for name, table in rules.items()), tuple(shell_tools))


def _rule(name: str, raw: dict[str, object]) -> Rule:
    where = ("rules", name)
    _known(raw, _Table.__struct_fields__, *where)
    table = _convert(raw, _Table, *where)
    args = {argument: _predicate(predicate, *where, "args", argument) for argument, predicate in table.args.items()}
    try:
        return Rule(
            id=name,
            action=table.action,  # type: ignore[arg-type]  # checked by Rule, which names the nearest
            tool=table.tool,
            agent=table.agent,
            args=args,
            tainted=table.tainted,
            spent_usd=_range(table.spent_usd, *where, "spent_usd"),
            left_usd=_range(table.left_usd, *where, "left_usd"),
            expires=table.expires,
            max_uses=table.max_uses,
            reason=table.reason,
            match=tuple(cast("list[Example]", table.match)),
            not_match=tuple(cast("list[Example]", table.not_match)),
        )
    except RuleError as error:
        raise _Wrong(str(error), *where, *error.where) from None


_WORDS = {
    "inside": {"inside"},
    "host": {"host"},
    "min": {"min", "max"},
    "max": {"min", "max"},
    "in": {"in"},
    "equals": {"equals"},
    "matches": {"matches"},
    "prefix": {"prefix", "flags"},
    "flags": {"prefix", "flags"},
    "not": {"not"},
}


def _predicate(raw: Mapping[str, object], *where: str) -> Predicate:
    _known(raw, _WORDS, *where)
    for word in raw:
        if apart := sorted(raw.keys() - _WORDS[word]):
            raise _Wrong(f"{'.'.join(where)}: {word!r} and {apart[0]!r} do not go together", *where)
    try:
        return _of_kind(raw, *where)
    except ConfigError as error:
        raise _Wrong(f"{'.'.join(where)}: {error}", *where) from None


def _of_kind(raw: Mapping[str, object], *where: str) -> Predicate:
    match next(iter(raw), ""):
        case "inside":
            return Inside(_strings(raw, "inside", *where))
        case "host":
            return Host(_strings(raw, "host", *where))
        case "min" | "max":
            return Between(**_convert(raw, dict[str, float], *where))
        case "in":
            return OneOf(tuple(_convert(raw["in"], list[Scalar], *where, "in")))
        case "equals":
            return OneOf(tuple(_convert([raw["equals"]], list[Scalar], *where, "equals")))
        case "matches":
            return Matches(_convert(raw["matches"], str, *where, "matches"))
        case "prefix" | "flags":
            return Prefix(_strings(raw, "prefix", *where), _strings(raw, "flags", *where))
        case "not":
            return Not(_predicate(_convert(raw["not"], dict[str, object], *where, "not"), *where))
        case _:
            raise _Wrong(f"{'.'.join(where)}: says nothing{nearest('', _WORDS)}", *where)


def _range(raw: Mapping[str, object] | None, *where: str) -> Between | None:
    if raw is None:
        return None
    _known(raw, ("min", "max"), *where)
    found = _predicate(raw, *where)
    assert isinstance(found, Between)
    return found


def _strings(raw: Mapping[str, object], word: str, *where: str) -> tuple[str, ...]:
    """Return a list of strings; one alone may stand for it."""
    value = raw.get(word, [])
    return (value,) if isinstance(value, str) else tuple(_convert(value, list[str], *where, word))


def _known(raw: Mapping[str, object], words: Iterable[str], *where: str) -> None:
    for word, value in raw.items():
        if word not in words:
            below = list(cast("dict[str, object]", value))[:1] if isinstance(value, dict) else []
            table = f" in [{'.'.join(where)}]" if where else ""
            raise _Wrong(f"unknown word {word!r}{table}{nearest(word, words)}", *where, word, *below)


def _convert(value: object, kind: type[T], *where: str) -> T:
    """Return a value as what it must be."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        what, _, at = str(error).partition(" - at `")
        keys = [*where, *re.findall(r"[A-Za-z_][\w-]*", at.rstrip("`"))]
        raise _Wrong(f"{'.'.join(keys)}: {what[0].lower()}{what[1:]}", *keys) from None
