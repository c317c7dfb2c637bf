"""Turn whatever a tool returned into text (and images) that can be written down. Never raises."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence
from enum import Enum
from types import GeneratorType
from typing import cast

import msgspec

from harness.messages import Image
from harness.tools.base import ToolOutput
from harness.tools.threads import as_tool_error


def to_output(result: object) -> ToolOutput:
    """Make the output of a tool's result.

    A string stays as it is, None reads ``null``, bytes are UTF-8 text or else base64; an Image, or a list that holds
    images, becomes images; a ToolOutput passes through; everything else is written as JSON. What cannot be written
    comes back with ``representable=False``: the tool did succeed, so this is not an error.

    >>> to_output({"rows": 3}).text
    '{"rows":3}'
    >>> to_output(object()).representable
    False
    """
    try:
        if isinstance(result, str):
            return ToolOutput(encodable(str.__str__(result)))  # the text, whatever a subclass prints
        if isinstance(result, ToolOutput):
            return _checked(result)
        if isinstance(result, Image):
            return _from_items([result])
        if isinstance(result, (list, tuple)):
            return _from_items(cast("Sequence[object]", result))
        return ToolOutput(_text(result))
    except Exception as error:  # a result may run any code of its own while it is read
        return _not_representable(type(cast("object", result)), error)


def encodable(text: str) -> str:
    r"""Return the text with lone surrogates replaced, so that it can be written as UTF-8.

    >>> encodable("caf\u00e9 \ud800")
    'café �'
    """
    if text.isascii():  # a flag of the string: no pass over it
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        # By way of UTF-16 the two halves of a split pair become the one character they stand for.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _not_representable(kind: type, error: Exception) -> ToolOutput:
    reason = encodable(str(as_tool_error(error)))[:300]
    name = encodable(kind.__qualname__)
    return ToolOutput(f"succeeded, but its result (type {name}) cannot be represented: {reason}", representable=False)


def _from_items(items: Sequence[object]) -> ToolOutput:
    """Make the output of a list: with images in it they travel apart, and the text says how many there are."""
    images = [item for item in items if isinstance(item, Image)]
    if not images:
        return ToolOutput(_text(items))
    others = [item for item in items if not isinstance(item, Image)]
    texts = others if all(isinstance(item, str) for item in others) else [_text(others)]
    count = f"({len(images)} image{'s' if len(images) > 1 else ''})"
    return _checked(ToolOutput("\n".join([*map(str, texts), count]), tuple(images)))


def _checked(output: ToolOutput) -> ToolOutput:
    """Check what a Struct does not check when it is made: that the values are of the declared types."""
    images = tuple(Image(encodable(image.url), image.detail) for image in output.images)
    cleaned = ToolOutput(encodable(output.text), images, output.representable)
    msgspec.convert(msgspec.to_builtins(cleaned), ToolOutput)
    return cleaned


def _text(value: object) -> str:
    if isinstance(value, GeneratorType):
        raise TypeError("a generator has no value of its own; return a list")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _bytes_text(bytes(cast("bytes", value)))
    import pydantic_core  # here, because importing harness.tools must stay cheap

    try:
        return pydantic_core.to_json(value, fallback=_foreign, inf_nan_mode="strings").decode()
    except Exception:
        # Lone surrogates and bytes that are not UTF-8 are refused there; this slower way takes them.
        return encodable(json.dumps(value, default=_plain, ensure_ascii=False, separators=(",", ":")))


def _bytes_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return f"({len(data)} bytes that are not UTF-8 text, as base64) {base64.b64encode(data).decode()}"


def _foreign(value: object) -> object:
    """Serialise what pydantic does not know."""
    if isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value, enc_hook=_jsonable)
    raise TypeError(f"{type(value).__qualname__} has no JSON form; return a string, dict, list or dataclass")


def _jsonable(value: object) -> object:
    import pydantic_core

    return pydantic_core.to_jsonable_python(value, fallback=_foreign)


def _plain(value: object) -> object:
    """Take one value apart for ``json.dumps``."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _bytes_text(bytes(cast("bytes", value)))
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset)):
        return list(cast("frozenset[object]", value))
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) else _jsonable(value)
