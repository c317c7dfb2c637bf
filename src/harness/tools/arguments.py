"""Read the arguments a model wrote, and tell it in one text all that is wrong and what is accepted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import msgspec

from harness.messages import JSON
from harness.tools.base import InvalidArguments, ToolSpec
from harness.tools.output import encodable
from harness.tools.threads import as_tool_error

_MAX_PROBLEMS = 20
_MAX_SHOWN = 80
_MAX_DEPTH = 4

_decode = msgspec.json.Decoder().decode


class BadJSON(ValueError):
    """The arguments are not one JSON object; the text says why."""


def parse_object(text: str) -> dict[str, JSON]:
    """Parse one JSON object, strictly: no NaN or Infinity, no number out of range, no name twice.

    A name that stands twice is refused because readers differ on which one counts: what a person approved could be
    another value than the one that runs.

    Args:
        text: JSON text. Empty text is an object without members, as some models write it.

    Raises:
        BadJSON: it is anything else.

    >>> parse_object('{"path": "a.txt"}')
    {'path': 'a.txt'}
    """
    if not text or text.isspace():
        return {}
    try:
        value: object = _decode(text)
        # Every member has a colon, so as many colons as members of the object means that none was dropped.
        if isinstance(value, dict) and text.count(":") != len(cast("dict[str, JSON]", value)):
            _decode_members(text)
    except RecursionError:
        raise BadJSON("the arguments are nested too deeply") from None
    except BadJSON:
        raise
    except ValueError as error:
        raise BadJSON(f"the arguments are not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadJSON(f"the arguments must be one JSON object, not {shown(value)}")
    return cast("dict[str, JSON]", value)


def _once_each(pairs: list[tuple[str, object]]) -> None:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadJSON(f"the arguments name {shown(twice)} twice")


_decode_members = json.JSONDecoder(object_pairs_hook=_once_each).decode


def refuse(spec: ToolSpec, problems: Sequence[str]) -> InvalidArguments:
    """Make the error for arguments that do not fit: every problem, then everything that is accepted."""
    listed = [f"- {problem}" for problem in problems[:_MAX_PROBLEMS]]
    if len(problems) > _MAX_PROBLEMS:
        listed.append(f"- and {len(problems) - _MAX_PROBLEMS} more")
    accepted = describe_arguments(spec.schema)
    lines = [
        f"Invalid arguments for tool {spec.name!r}:",
        *listed,
        "Accepted arguments, as one JSON object:" if accepted else "It takes no arguments: write {}.",
        *accepted,
    ]
    return InvalidArguments(encodable("\n".join(lines)))


def shown(value: object) -> str:
    """Show a value in an error, shortened."""
    try:
        text = msgspec.json.encode(value).decode()
    except Exception:  # whatever it is, it is only shown
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def describe_arguments(schema: Mapping[str, JSON]) -> list[str]:
    """Describe an object schema, one line for each argument: name, type, whether it is required, what it is for.

    >>> describe_arguments({"properties": {"n": {"type": "integer", "default": 3}}, "additionalProperties": False})
    ['- n (integer, optional, default 3)']
    """
    required = _strings(schema.get("required"))
    lines: list[str] = []
    for name, given in _properties(schema).items():
        about = _follow(given, schema)
        facts = [_type(about, schema, 0), "required" if name in required else "optional"]
        if about.get("default") is not None:
            facts.append(f"default {shown(about['default'])}")
        text = about.get("description")
        lines.append(f"- {name} ({', '.join(facts)})" + (f": {text}" if isinstance(text, str) and text else ""))
    if schema.get("additionalProperties", True) is not False:
        lines.append("- any other name, with any value")
    return lines


def _type(schema: Mapping[str, JSON], root: Mapping[str, JSON], depth: int) -> str:
    """Say in words which values a schema takes."""
    schema = _follow(schema, root)
    if depth > _MAX_DEPTH:
        return "any"
    if "const" in schema:
        return shown(schema["const"])
    if isinstance(choices := schema.get("enum"), list):
        return "one of " + ", ".join(shown(choice) for choice in choices)
    if isinstance(members := schema.get("anyOf") or schema.get("oneOf"), list):
        return " or ".join(dict.fromkeys(_type(_mapping(member), root, depth + 1) for member in members))
    kind = schema.get("type")
    if isinstance(kind, list):
        return " or ".join(str(one) for one in kind)
    if kind == "array":
        return f"list of {_type(_mapping(schema.get('items')), root, depth + 1)}"
    if kind == "object" and (properties := _properties(schema)):
        required = _strings(schema.get("required"))
        members = (
            f"{name}{'' if name in required else ' (optional)'}: {_type(about, root, depth + 1)}"
            for name, about in properties.items()
        )
        return "object {" + ", ".join(members) + "}"
    return kind if isinstance(kind, str) else "any"


def check(value: JSON, schema: Mapping[str, JSON]) -> list[str]:
    """List what is wrong with a value, by the plain part of JSON Schema.

    Looked at are ``type``, ``enum``, ``const``, ``required``, ``properties``, ``additionalProperties``, ``items`` and
    local ``$ref``; everything else is left to the tool, whose schema it is.

    >>> check({"n": "x"}, {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n", "m"]})
    ['m: missing', 'n: must be integer, not "x"']
    """
    return list(_problems(value, schema, schema, ""))


def _problems(value: JSON, schema: Mapping[str, JSON], root: Mapping[str, JSON], where: str) -> Iterator[str]:
    schema = _follow(schema, root)
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(choices, list) and not any(_same(value, choice) for choice in choices):
        yield f"{where or 'arguments'}: must be {_type(schema, root, 0)}, not {shown(value)}"
        return
    kinds = schema.get("type")
    if kinds is not None and not any(_is(value, kind) for kind in (kinds if isinstance(kinds, list) else [kinds])):
        yield f"{where or 'arguments'}: must be {_type(schema, root, 0)}, not {shown(value)}"
        return
    if isinstance(value, dict):
        yield from _member_problems(value, schema, root, where)
    if isinstance(value, list) and isinstance(items := schema.get("items"), dict):
        for index, item in enumerate(value):
            yield from _problems(item, items, root, f"{where}[{index}]")


def _member_problems(
    value: dict[str, JSON], schema: Mapping[str, JSON], root: Mapping[str, JSON], where: str
) -> Iterator[str]:
    properties, others = _properties(schema), schema.get("additionalProperties", True)
    for name in _strings(schema.get("required")):
        if name not in value:
            yield f"{_join(where, name)}: missing"
    for name, member in value.items():
        if name in properties:
            yield from _problems(member, properties[name], root, _join(where, name))
        elif others is False:
            yield f"{_join(where, name)}: not accepted"
        elif isinstance(others, dict):
            yield from _problems(member, others, root, _join(where, name))


def _same(value: JSON, choice: JSON) -> bool:
    return value == choice and isinstance(value, bool) == isinstance(choice, bool)


def _is(value: JSON, kind: JSON) -> bool:
    match kind:
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "number":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case "integer":
            return not isinstance(value, bool) and (isinstance(value, int) or _is_whole(value))
        case _:
            return True  # not a type of JSON Schema: nothing to hold the value to


def _is_whole(value: JSON) -> bool:
    return isinstance(value, float) and value.is_integer()


def _follow(schema: Mapping[str, JSON], root: Mapping[str, JSON]) -> Mapping[str, JSON]:
    """Return the schema a local ``$ref`` names, with what stands beside the reference."""
    for _ in range(_MAX_DEPTH):
        target = schema.get("$ref")
        if not isinstance(target, str) or not target.startswith("#/"):
            break
        found: JSON = cast("dict[str, JSON]", root)
        for step in target[2:].split("/"):
            found = _mapping(found).get(step.replace("~1", "/").replace("~0", "~"))
        beside = {key: value for key, value in schema.items() if key != "$ref"}
        schema = {**_mapping(found), **beside}
    return schema


def _properties(schema: Mapping[str, JSON]) -> dict[str, dict[str, JSON]]:
    return {name: _mapping(about) for name, about in _mapping(schema.get("properties")).items()}


def _mapping(value: JSON) -> dict[str, JSON]:
    return value if isinstance(value, dict) else {}


def _strings(value: JSON) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _join(where: str, name: str) -> str:
    name = name if len(name) <= _MAX_SHOWN else f"{name[: _MAX_SHOWN - 3]}..."
    return f"{where}.{name}" if where else name


def why(error: Exception) -> str:
    """Say what an exception of a user's own validator was."""
    return str(as_tool_error(error))[:300]
