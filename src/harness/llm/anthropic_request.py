"""A request in the words of the Messages API: our messages and tools as its JSON. Pure functions."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast
from urllib.parse import unquote_to_bytes

import msgspec

from harness.llm.base import LLMRequest
from harness.llm.calls import CallBook, Wire, in_words, unreadable
from harness.llm.images import SHOWN_AS
from harness.llm.replies import decode, is_object, system_prompt
from harness.messages import JSON, Image, Message, Reasoning, Text, ToolCall, ToolResult
from harness.tools.base import ToolSpec

OURS = "anthropic"
"""The key of a reasoning part's provider data that holds a block as the API sent it."""

BEFORE = "before"
"""The key that holds the digest of what was before that block."""

REPLY_TOOL = "reply"
"""The tool a model is made to call where it cannot be held to a schema."""

OPENING = "(The conversation begins here.)"
GO_ON = "Go on."
NO_TEXT = "(no text)"

LEAST_THINKING = 1024
"""The fewest tokens a thinking budget may have."""

# Up to Claude 4.5: claude-3-7-sonnet, claude-opus-4-1-20250805, claude-haiku-4-5; not claude-opus-4-6.
_BUDGETED = re.compile(r"claude-(?:3-7|(?:opus|sonnet|haiku)-4(?:-[015])?(?!-?[.\d]\b))(?=$|[-@:_])", re.IGNORECASE)
_BUDGET_SHARE = {"minimal": 0.125, "low": 0.25, "medium": 0.5}
_CALL_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]")
_IMAGE_TYPES = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})


class Asked(NamedTuple):
    """A request for the wire.

    Attributes:
        body: the JSON of it, without the temperature.
        digest: of everything in it that was said so far; a reply's thinking holds for a conversation that begins so.
        forced: whether the model is made to reply through a tool.
        wrapped: whether that tool's input holds the reply under ``reply``.
    """

    body: Wire
    digest: str
    forced: bool = False
    wrapped: bool = False


def messages_body(request: LLMRequest, model: str, *, max_tokens: int, caching: bool, forced: bool = False) -> Asked:
    """Build the body of a streamed message.

    Args:
        request: what is asked.
        model: the model's name.
        max_tokens: the output limit where the request has none.
        caching: whether the API is asked to keep what it has read.
        forced: whether a reply that must match a schema is asked for as the input of a tool.
    """
    limit = request.settings.max_output_tokens or max_tokens
    prompt = system_prompt(request)
    tools = [_tool(spec) for spec in request.tools]
    forced = forced and request.response_schema is not None
    wrapped = False
    if forced and request.response_schema is not None:
        schema, wrapped = _as_input(request.response_schema)
        tools.append({"name": reply_tool(request), "description": "Give the reply.", "input_schema": schema})
    conversation = _Conversation(hashlib.blake2b(_encoded([prompt, *tools]), digest_size=16))
    for position, message in enumerate(request.messages):
        conversation.add(position, message)
    conversation.close()
    body: Wire = {
        "model": model,
        "max_tokens": limit,
        "messages": list[JSON](conversation.turns),
        "stream": True,
        **_thinking(request, model, limit, conversation.turns, forced=forced),
    }
    if prompt.strip():
        system: Wire = {"type": "text", "text": prompt}
        body["system"] = [system]
    if tools:
        body["tools"] = list[JSON](tools)
    if forced:
        choice: Wire = {"type": "any"} if request.tools else {"type": "tool", "name": reply_tool(request)}
        body["tool_choice"] = choice
    elif request.response_schema is not None:
        form: Wire = {"type": "json_schema", "schema": dict(request.response_schema)}
        body["output_config"] = {**cast("Wire", body.get("output_config", {})), "format": form}
    if caching:
        _mark(body)
    return Asked(body, conversation.seen.hexdigest(), forced, wrapped)


def reply_tool(request: LLMRequest) -> str:
    """Return the name of the tool a reply is given through, which no other tool has."""
    name = REPLY_TOOL
    while any(spec.name == name for spec in request.tools):
        name += "_"
    return name


def _tool(spec: ToolSpec) -> Wire:
    return {"name": spec.name, "description": spec.description, "input_schema": dict(spec.schema)}


def _as_input(schema: Mapping[str, JSON]) -> tuple[Wire, bool]:
    """Return a schema as a tool's input schema, which must be of an object; and whether it had to be wrapped."""
    if schema.get("type") == "object" and not {"anyOf", "oneOf", "allOf", "$ref"} & schema.keys():
        return dict(schema), False
    inner = dict(schema)
    definitions = {place: inner.pop(place) for place in ("$defs", "definitions") if place in inner}
    return {
        "type": "object", "properties": {REPLY_TOOL: inner}, "required": [REPLY_TOOL],
        "additionalProperties": False, **definitions,
    }, True  # fmt: skip


def is_closed(schema: JSON) -> bool:
    """Say whether every object a schema describes names all its properties, as the API's own schemas must.

    >>> is_closed({"type": "object", "additionalProperties": {"type": "integer"}})
    False
    """
    if isinstance(schema, list):
        return all(is_closed(item) for item in schema)
    if not isinstance(schema, dict):
        return True
    return not schema.get("additionalProperties") and all(is_closed(item) for item in schema.values())


# -- thinking ----------------------------------------------------------------------------------------------------------


def is_budgeted(model: str) -> bool:
    """Say whether a model is told how much to think in tokens; newer ones are told an effort and see for themselves.

    >>> is_budgeted("claude-haiku-4-5-20251001"), is_budgeted("claude-opus-4-6"), is_budgeted("claude-sonnet-5-5")
    (True, False, False)
    """
    return _BUDGETED.search(model.replace(".", "-")) is not None


def _thinking(request: LLMRequest, model: str, limit: int, turns: list[Wire], *, forced: bool) -> Wire:
    """Return what a reasoning effort is in the API's words; nothing where none is set: the model's own default."""
    effort = request.settings.reasoning_effort
    if effort is None:
        return {}
    if effort == "none":
        return {} if is_budgeted(model) else {"thinking": {"type": "disabled"}}
    if is_budgeted(model):
        budget = min(max(LEAST_THINKING, int(limit * _BUDGET_SHARE.get(effort, 0.75))), limit - 1)
        if forced or budget < LEAST_THINKING or not _may_think(turns):
            return {}
        return {"thinking": {"type": "enabled", "budget_tokens": budget}}
    wire: Wire = {"output_config": {"effort": "low" if effort == "minimal" else effort}}
    if not forced:  # thinking and a tool that must be called exclude each other
        wire["thinking"] = {"type": "adaptive", "display": "summarized"}
    return wire


def _may_think(turns: list[Wire]) -> bool:
    """Say whether a model with a budget may think: a step of tools it has begun without thinking, it ends so."""
    if len(turns) < 2:
        return True
    said, heard = (cast("list[Wire]", turn["content"]) for turn in turns[-2:])
    in_a_step = any(block["type"] == "tool_result" for block in heard)
    return not in_a_step or said[0]["type"] in ("thinking", "redacted_thinking")


# -- caching -----------------------------------------------------------------------------------------------------------


def _mark(body: Wire) -> None:
    """Mark where the API is to remember what it has read: at most four places.

    The ends of tools and prompt serve every request alike. The end of the conversation is what the next step goes on
    from, and the end of the user's turn before it is what the step before has written. A question that is asked once
    has no next step, and writing costs more than reading.
    """
    turns = cast("list[Wire]", body["messages"])
    tools = cast("list[Wire]", body.get("tools", []))
    ends = [tools[-1]] if tools else []
    if "system" in body:
        ends += cast("list[Wire]", body["system"])[-1:]
    if tools or len(turns) > 1:
        users = [turn for turn in turns if turn["role"] == "user"]
        ends += [cast("list[Wire]", turn["content"])[-1] for turn in users[-2:]]
    for block in ends:
        block["cache_control"] = {"type": "ephemeral"}


# -- the conversation --------------------------------------------------------------------------------------------------


def _takes_id(call_id: str) -> bool:
    return _CALL_ID.fullmatch(call_id) is not None


@dataclass(slots=True)
class _Conversation:
    """Turns under construction. User and assistant alternate, and a turn's results come first in the user's.

    Thinking goes back to the API only where everything before it is as it was when it was thought: the newer models
    refuse it otherwise (https://platform.claude.com/docs/en/build-with-claude/preserved-thinking), and the history may
    have been summarised or told by another model since. So a digest of what was said runs along.

    Attributes:
        seen: the digest of what was said so far.
        turns: what was built so far.
        calls: the calls in it.
        after: what follows the turn's results.
    """

    seen: hashlib.blake2b
    turns: list[Wire] = field(default_factory=list[Wire])
    calls: CallBook = field(default_factory=lambda: CallBook(_takes_id))
    after: list[Wire] = field(default_factory=list[Wire])

    def add(self, position: int, message: Message) -> None:
        """Add one of our messages."""
        if message.role == "tool":
            self._results(message)
            return
        self._end_turn()
        if message.role == "assistant":
            self._assistant(position, message)
            return
        for part in message.parts:
            if isinstance(part, Text):
                self._say("user", *_texts(part.text))
            elif isinstance(part, Image):
                self._say("user", image_block(part))

    def close(self) -> None:
        """Close the last turn. The API answers a user; a conversation that ends otherwise is asked to go on."""
        self._end_turn()
        if not self.turns or self.turns[-1]["role"] == "assistant":
            self._say("user", *_texts(GO_ON))

    def _say(self, role: str, *blocks: Wire) -> None:
        for block in blocks:
            if not self.turns and role == "assistant":
                self._say("user", *_texts(OPENING))
            if not self.turns or self.turns[-1]["role"] != role:
                self.turns.append({"role": role, "content": []})
            cast("list[JSON]", self.turns[-1]["content"]).append(block)
            self.seen.update(_encoded([role, block]))

    def _end_turn(self) -> None:
        for result in self.calls.unanswered():
            self._say("user", {"type": "tool_result", "tool_use_id": result.call_id, "content": result.text})
        self._say("user", *self.after)
        self.after = []

    def _results(self, message: Message) -> None:
        """Add a step's results. An image is part of the one result it can belong to, else it follows them."""
        results = [part for part in message.parts if isinstance(part, ToolResult)]
        images = [image_block(part) for part in message.parts if isinstance(part, Image)]
        words = [block for part in message.parts if isinstance(part, Text) for block in _texts(part.text)]
        inside = images if len(results) == 1 and not results[0].is_error else []
        for result in results:
            wire_id = self.calls.answered(result)
            if wire_id is None:
                self.after += [*_texts(in_words(result)), *inside]
                continue
            said: Wire = {"type": "text", "text": result.text if result.text.strip() else NO_TEXT}
            content: JSON = [said, *inside] if inside else said["text"]
            block: Wire = {"type": "tool_result", "tool_use_id": wire_id, "content": content}
            if result.is_error:
                block["is_error"] = True
            self._say("user", block)
        self.after += words if inside else [*words, *images]

    def _assistant(self, position: int, message: Message) -> None:
        before = self.seen.hexdigest()
        blocks: list[Wire] = []
        for part in self.calls.opened(message, position).parts:
            if isinstance(part, Text):
                blocks += _texts(part.text)
            elif isinstance(part, Reasoning):
                blocks += _thought(part, before)
            elif isinstance(part, ToolCall):
                name = _NOT_IN_NAMES.sub("_", part.name)[:128] or "_"
                blocks.append({"type": "tool_use", "id": part.id, "name": name, "input": _input(part.arguments)})
        while blocks and blocks[-1]["type"] in ("thinking", "redacted_thinking"):  # nothing came of it
            blocks.pop()
        self._say("assistant", *blocks)


def _encoded(value: JSON | list[JSON] | list[str | Wire]) -> bytes:
    return msgspec.json.encode(value)


def _texts(text: str) -> list[Wire]:
    """Return a text as a block; no block for a blank one, which the API refuses."""
    return [{"type": "text", "text": text}] if text.strip() else []


def _thought(part: Reasoning, before: str) -> list[Wire]:
    """Return the block a thought came in, where it is the API's and still holds."""
    data = part.provider_data or {}
    block = data.get(OURS)
    return [dict(block)] if is_object(block) and data.get(BEFORE) == before else []


def _input(written: str) -> JSON:
    """Return arguments as an object, which is all the API takes."""
    try:
        value = decode(written)
    except ValueError:
        value = None
    return value if is_object(value) else unreadable(written)


def image_block(image: Image) -> Wire:
    """Return an image as the API takes it; in words where it is of a kind that it does not.

    >>> image_block(Image("https://example.org/cat.png"))["source"]
    {'type': 'url', 'url': 'https://example.org/cat.png'}
    """
    if image.url[:5].lower() != "data:":
        return {"type": "image", "source": {"type": "url", "url": image.url}}
    head, _, data = image.url[5:].partition(",")
    media_type, *options = head.lower().split(";")
    media_type = {"image/jpg": "image/jpeg"}.get(media_type.strip(), media_type.strip())
    try:
        content = base64.b64decode(unquote_to_bytes(data)) if "base64" in options else unquote_to_bytes(data)
    except binascii.Error:
        content = b""
    if media_type not in _IMAGE_TYPES or not content:
        return {"type": "text", "text": SHOWN_AS}
    source: Wire = {"type": "base64", "media_type": media_type, "data": base64.b64encode(content).decode()}
    return {"type": "image", "source": source}
