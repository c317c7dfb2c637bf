"""A request in the words of the Responses protocol: our messages and tools as its JSON. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from harness.llm.base import LLMRequest
from harness.llm.calls import NO_RESULT, CallBook
from harness.llm.chat_request import arguments_on_the_wire
from harness.llm.replies import CONFIDENCE_REQUEST
from harness.messages import JSON, Image, Message, Part, Reasoning, Text, ToolCall, ToolResult
from harness.tools.base import ToolSpec

Wire = dict[str, JSON]

OURS = "openai_responses"
"""The key of a reasoning part's provider data that holds an item as the API sent it."""

NEXT_ID = "next_id"
"""The key that holds the id of the item it led to. The API takes the one only with the other."""

ENCRYPTED = "reasoning.encrypted_content"


def responses_body(
    request: LLMRequest, model: str, *, background: bool, summary: str | None, encrypted: bool, reasoning: bool = True
) -> Wire:
    """Build the body of a streamed response.

    Args:
        request: what is asked.
        model: the model's name.
        background: whether the provider goes on without a listener; it then keeps the response.
        summary: how the model is to sum up its reasoning; None for not at all.
        encrypted: whether a provider that keeps nothing is asked for the reasoning in a form it can read later.
        reasoning: whether earlier reasoning is sent back.
    """
    prompt = request.system
    if request.confidence:
        prompt = f"{prompt}\n\n{CONFIDENCE_REQUEST}".strip()
    body: Wire = {
        "model": model,
        "input": list[JSON](input_items(request.messages, reasoning=reasoning)),
        "stream": True,
        "store": background,
    }
    if background:
        body["background"] = True
    elif encrypted:
        body["include"] = [ENCRYPTED]
    if prompt:
        body["instructions"] = prompt
    settings = request.settings
    if settings.temperature is not None:
        body["temperature"] = settings.temperature
    if settings.max_output_tokens is not None:
        body["max_output_tokens"] = settings.max_output_tokens
    thinking: Wire = {"effort": settings.reasoning_effort} if settings.reasoning_effort is not None else {}
    if summary is not None:
        thinking["summary"] = summary
    if thinking:
        body["reasoning"] = thinking
    if request.tools:
        body["tools"] = [_tool(spec) for spec in request.tools]
    if request.response_schema is not None:
        body["text"] = {"format": _format(request.response_schema)}
    return body


def _tool(spec: ToolSpec) -> Wire:
    # Not strict, which is the protocol's default: that takes only schemas in which every property is required.
    return {
        "type": "function",
        "name": spec.name,
        "description": spec.description,
        "parameters": dict(spec.schema),
        "strict": False,
    }


def _format(schema: Mapping[str, JSON]) -> Wire:
    return {"type": "json_schema", "name": "reply", "strict": True, "schema": dict(schema)}


def input_items(messages: Sequence[Message], *, reasoning: bool = True) -> list[Wire]:
    """Map the conversation to the protocol's items.

    >>> from harness.messages import user
    >>> input_items([user("hi")])
    [{'type': 'message', 'role': 'user', 'content': [{'type': 'input_text', 'text': 'hi'}]}]
    """
    conversation = _Conversation(reasoning)
    for position, message in enumerate(messages):
        conversation.add(position, message)
    conversation.end_turn()
    return conversation.items


@dataclass(slots=True)
class _Conversation:
    """Items under construction.

    Attributes:
        reasoning: whether reasoning items are among them.
        items: what was built so far.
        calls: the calls among them.
        after: what follows the turn's results as a user's message.
    """

    reasoning: bool
    items: list[Wire] = field(default_factory=list[Wire])
    calls: CallBook = field(default_factory=CallBook)
    after: list[JSON] = field(default_factory=list[JSON])

    def add(self, position: int, message: Message) -> None:
        """Add one of our messages."""
        if message.role == "tool":
            for part in message.parts:
                if isinstance(part, ToolResult):
                    self._result(part)
                elif isinstance(part, Image):
                    self.after.append(_image(part))
            return
        self.end_turn()
        if message.role == "assistant":
            self._assistant(position, message)
        elif said := _said(message.parts):
            self.items.append({"type": "message", "role": message.role, "content": said})

    def end_turn(self) -> None:
        """Close the turn: an answer for every call that has none, then what a user has to say."""
        for wire_id in self.calls.unanswered():
            self.items.append({"type": "function_call_output", "call_id": wire_id, "output": NO_RESULT})
        if self.after:
            self.items.append({"type": "message", "role": "user", "content": self.after})
        self.after = []

    def _assistant(self, position: int, message: Message) -> None:
        thought: list[Wire] = []  # sent only with what it led to, which the API insists on
        next_id = ""
        index = 0
        for part in message.parts:
            if isinstance(part, Reasoning):
                if self.reasoning and part.provider_data and isinstance(item := part.provider_data.get(OURS), dict):
                    thought.append(cast("Wire", item))
                    next_id = str(part.provider_data.get(NEXT_ID) or "")
                continue
            if isinstance(part, Text):
                wire = _spoken(part)
            elif isinstance(part, ToolCall):
                wire = _call(part, self.calls.opened(part, position, index))
                index += 1
            else:
                continue
            if next_id:
                wire["id"] = next_id
                if isinstance(part, Text):
                    wire["status"] = "completed"
            self.items += [*thought, wire]
            thought, next_id = [], ""

    def _result(self, result: ToolResult) -> None:
        wire_id = self.calls.answered(result)
        if wire_id is None:  # its call was dropped; the protocol refuses a result without one
            told: Wire = {"type": "input_text", "text": f"Result of {result.name}:\n{result.text}"}
            self.after.append(told)
            return
        self.items.append({"type": "function_call_output", "call_id": wire_id, "output": result.text})


def _spoken(part: Text) -> Wire:
    said: Wire = {"type": "output_text", "text": part.text, "annotations": []}
    return {"type": "message", "role": "assistant", "content": [said]}


def _call(call: ToolCall, wire_id: str) -> Wire:
    arguments = arguments_on_the_wire(call.arguments)
    return {"type": "function_call", "call_id": wire_id, "name": call.name, "arguments": arguments}


def _said(parts: Sequence[Part]) -> list[JSON]:
    said: list[JSON] = []
    for part in parts:
        if isinstance(part, Text):
            said.append({"type": "input_text", "text": part.text})
        elif isinstance(part, Image):
            said.append(_image(part))
    return said


def _image(image: Image) -> Wire:
    return {"type": "input_image", "image_url": image.url, "detail": image.detail}
