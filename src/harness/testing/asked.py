"""What a model was asked, in a form that can be kept, compared and read. Pure."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import msgspec

from harness.agent import AgentConfig
from harness.llm.absent import NoModel
from harness.llm.base import LLMRequest
from harness.messages import JSON, Image, Message, Part, Reasoning, Text, ToolCall, ToolResult
from harness.perform import writable
from harness.registry import fingerprints
from harness.tools import definition_hash

Scrub: TypeAlias = Callable[[str], str]
"""Takes out of a text what differs from run to run, or must not be written down. Twice must be the same as once."""

NOT_KEPT = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}not in the journal\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
"""Stands in a text for what a journal does not keep; it is like whatever was asked in its place."""

MAX_URL_CHARS = 200
"""Characters of an image's address that are kept; of a longer one, such as the image itself, a digest is."""

MAX_DIFF_LINES = 60
"""Lines of a difference that are shown."""

Frame: TypeAlias = Literal["system", "tools", "settings", "confidence", "schema"]
"""The parts of a request beside its messages."""

FRAME: tuple[Frame, ...] = get_args(Frame)

SETTINGS = ("temperature", "max_output_tokens", "reasoning_effort")
"""How a model is asked; how long it is waited for is no part of the question."""

_NAMES: dict[Frame, str] = {
    "system": "the system prompt",
    "tools": "the tools",
    "settings": "the settings",
    "confidence": "whether a confidence is asked for",
    "schema": "the schema of the reply",
}


def unchanged(text: str) -> str:
    """Return a text as it is."""
    return text


class ToolShown(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tool as the model is told of it."""

    name: str
    description: str = ""
    schema: dict[str, object] = {}


class Digests(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a journal keeps of an agent's prompt and tools: enough to tell whether they are the same."""

    system: str
    tools: dict[str, str] = {}


class Asked(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request as a cassette keeps it.

    Left out is what is no part of the question: time limits, which messages are pinned, opaque data of a provider's.
    Ids of calls are numbered as they come, tools are in the order of their names.

    Attributes:
        settings: how the model is asked: temperature, max_output_tokens, reasoning_effort, where they are set.
        digests: of the system prompt and the tools, where they themselves are not known.
        unknown: parts that are not known: whatever is asked is like them.
    """

    system: str = ""
    tools: tuple[ToolShown, ...] = ()
    settings: dict[str, object] = {}
    confidence: bool = False
    schema: dict[str, object] | None = None
    messages: tuple[Message, ...] = ()
    digests: Digests | None = None
    unknown: tuple[Frame, ...] = ()

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "tools", tuple(sorted(self.tools, key=lambda tool: tool.name)))


def asked(request: LLMRequest, scrub: Scrub = unchanged) -> Asked:
    """Return a request in the form that is kept.

    Args:
        request: what the model is asked.
        scrub: applied to every text.
    """
    ids: dict[str, str] = {}
    settings = {name: value for name in SETTINGS if (value := getattr(request.settings, name)) is not None}
    return Asked(
        writable(scrub(request.system)),
        tuple([ToolShown(spec.name, writable(scrub(spec.description)), _plain(spec.schema)) for spec in request.tools]),
        settings,
        request.confidence,
        None if request.response_schema is None else _plain(request.response_schema),
        tuple([_message(message, ids, scrub) for message in request.messages]),
    )


def _plain(schema: Mapping[str, JSON]) -> dict[str, object]:
    """Return a schema as a file gives it back: lists, not tuples."""
    return msgspec.json.decode(msgspec.json.encode(schema), type=dict[str, object])


def digests_of(request: LLMRequest) -> Digests:
    """Return the digests a journal would keep of a request's system prompt and tools."""
    return Digests(prompt_digest(request.system), {spec.name: definition_hash(spec) for spec in request.tools})


def prompt_digest(system: str) -> str:
    """Return the digest a journal keeps of an agent's prompt."""
    return fingerprints(AgentConfig("any", system_prompt=system), {}, NoModel()).prompt


def _message(message: Message, ids: dict[str, str], scrub: Scrub) -> Message:
    return Message(message.role, tuple([_part(part, ids, scrub) for part in message.parts]))


def _part(part: Part, ids: dict[str, str], scrub: Scrub) -> Part:
    match part:
        case Text(text=text):
            return Text(writable(scrub(text)))
        case Reasoning(text=text):
            return Reasoning(writable(scrub(text)))
        case ToolCall(id=raw, name=name, arguments=arguments):
            return ToolCall(ids.setdefault(raw, f"c{len(ids) + 1}"), name, writable(scrub(arguments)))
        case ToolResult(call_id=raw, name=name, text=text, is_error=is_error):
            return ToolResult(ids.get(raw, "c0"), name, writable(scrub(text)), is_error)
        case Image(url=url, detail=detail):
            if len(url) > MAX_URL_CHARS:
                digest = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:16]
                url = f"{url[:40]}... ({len(url)} characters, sha256 {digest})"
            return Image(url, detail)


# -- comparing ---------------------------------------------------------------------------------------------------------


def differences(kept: Asked, now: Asked, digests: Digests | None = None) -> list[str]:
    """Say in a few words each what of a request differs from one that is kept; nothing where it is the same.

    Args:
        kept: what is kept.
        now: what is asked.
        digests: of what is asked; needed where ``kept`` has some.
    """
    found: list[str] = []
    if kept.digests is not None and digests is not None:
        if kept.digests.system != digests.system:
            found.append(_NAMES["system"])
        found += _changed(kept.digests.tools, digests.tools)
    for part in FRAME:
        if part not in kept.unknown and getattr(kept, part) != getattr(now, part):
            found += _changed_tools(kept, now) if part == "tools" else [_NAMES[part]]
    return found + _changed_messages(kept.messages, now.messages)


def is_same(kept: Asked, now: Asked, digests: Digests | None) -> bool:
    """Say whether a request is the one that is kept."""
    if len(kept.messages) != len(now.messages):  # asked first: most requests begin alike
        return False
    return not differences(kept, now, digests) if kept.unknown else kept == now


def _is_like(kept: str, now: str) -> bool:
    """Compare texts, one of which may have holes."""
    if NOT_KEPT not in kept:
        return kept == now
    return re.fullmatch(".*?".join(map(re.escape, kept.split(NOT_KEPT))), now, re.DOTALL) is not None


def _changed_tools(kept: Asked, now: Asked) -> list[str]:
    return _changed({tool.name: tool for tool in kept.tools}, {tool.name: tool for tool in now.tools})


def _changed(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    found = [f"tool {name!r} is gone" for name in old if name not in new]
    found += [f"tool {name!r} is new" for name in new if name not in old]
    return found + [f"tool {name!r} is defined differently" for name in old if name in new and old[name] != new[name]]


def _changed_messages(kept: Sequence[Message], now: Sequence[Message]) -> list[str]:
    """Name the first message that differs; those after it follow from that as a rule."""
    for place, (old, new) in enumerate(zip(kept, now, strict=False), start=1):
        if not _is_like_message(old, new):
            return [f"message {place} of {len(now)} ({_title(new)})"]
    if len(kept) > len(now):
        return [f"{_messages(len(kept) - len(now))} fewer"]
    return [f"{_messages(len(now) - len(kept))} more"] if len(now) > len(kept) else []


def _messages(number: int) -> str:
    return f"{number} message{'' if number == 1 else 's'}"


def _is_like_message(kept: Message, now: Message) -> bool:
    if kept == now:
        return True
    if kept.role != now.role or len(kept.parts) != len(now.parts):
        return False
    return all(
        old == new or (isinstance(old, Text) and isinstance(new, Text) and _is_like(old.text, new.text))
        for old, new in zip(kept.parts, now.parts, strict=True)
    )


def _title(message: Message) -> str:
    """Name a message: who speaks, and what was called or came back."""
    tools = [part.name for part in message.parts if isinstance(part, (ToolCall, ToolResult))]
    what = {"tool": "result of", "assistant": "calling"}.get(message.role, "about")
    return f"{message.role}, {what} {', '.join(tools)}" if tools else message.role


# -- reading -----------------------------------------------------------------------------------------------------------


def lines_of(request: Asked, *, but: Sequence[Frame] = (), ids: bool = False) -> list[str]:
    """Write a request for people, line by line.

    Args:
        request: the request.
        but: parts to leave out.
        ids: say which result belongs to which call.
    """
    lines: list[str] = []
    if "system" not in but:
        lines += ["system:", *_indented(request.system)]
    for tool in request.tools if "tools" not in but else ():
        lines += [f"tool {tool.name}:", *_indented(tool.description), f"  {_json(tool.schema)}"]
    if "settings" not in but and request.settings:
        lines.append(f"settings: {_json(request.settings)}")
    if "confidence" not in but and request.confidence:
        lines.append("confidence: asked for")
    if "schema" not in but and request.schema is not None:
        lines.append(f"schema: {_json(request.schema)}")
    for place, message in enumerate(request.messages, start=1):
        lines.append(f"message {place} ({message.role}):")
        for part in message.parts:
            number = f"{getattr(part, 'id', getattr(part, 'call_id', ''))} " if ids else ""
            lines += _indented(number + _part_text(part))
    return lines


def _part_text(part: Part) -> str:
    match part:
        case Text(text=text):
            return text
        case Reasoning(text=text):
            return f"(reasoning) {text}"
        case ToolCall(name=name, arguments=arguments):
            return f"call {name} {arguments}"
        case ToolResult(name=name, text=text, is_error=is_error):
            return f"{'error' if is_error else 'result'} of {name}: {text}"
        case Image(url=url, detail=detail):
            return f"image {url}{'' if detail == 'auto' else f' ({detail} detail)'}"


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.split("\n")] if text else []


def _json(value: object) -> str:
    return msgspec.json.encode(value, order="deterministic").decode()


def diff(kept: Asked, now: Asked) -> str:
    """Return the difference of two requests, line by line; what is not known of the kept one is left out."""
    filled = msgspec.structs.replace(kept, messages=tuple(map(_filled, kept.messages, now.messages)) + _rest(kept, now))
    lines: list[str] = []
    for ids in (False, True):  # they are shown where nothing else differs
        old, new = (lines_of(request, but=kept.unknown, ids=ids) for request in (filled, now))
        lines = lines or [*difflib.unified_diff(old, new, "recorded", "asked now", n=2, lineterm="")]
    if (more := len(lines) - MAX_DIFF_LINES) > 0:
        lines = [*lines[:MAX_DIFF_LINES], f"({more} more lines)"]
    return "\n".join(lines)


def _rest(kept: Asked, now: Asked) -> tuple[Message, ...]:
    return kept.messages[len(now.messages) :]


def _filled(kept: Message, now: Message) -> Message:
    """Take what is asked where the kept message is like it, so that holes are no difference."""
    return now if _is_like_message(kept, now) else kept


def likeness(kept: Asked, now: Asked) -> float:
    """Say how much of a request is in a kept one, from 0 to 1."""
    old, new = (set(lines_of(request, but=kept.unknown)) for request in (kept, now))
    shared = sum(len(line) for line in old & new)
    size = max(sum(map(len, old)), sum(map(len, new)), 1)
    return shared / size
