"""Images for models that see none."""

from __future__ import annotations

import msgspec

from harness.llm.base import LLMRequest
from harness.messages import Image, Message, Part, Text, ToolResult

SHOWN_AS = "[image]"


def without_images(request: LLMRequest) -> LLMRequest:
    """Return a request with the word ``[image]`` in the place of every image.

    >>> from harness.messages import Image, Message
    >>> request = LLMRequest("", [Message("user", (Image("https://example.org/cat.png"),))])
    >>> without_images(request).messages[0].text
    '[image]'
    """
    if not any(_has_image(message) for message in request.messages):
        return request
    return msgspec.structs.replace(request, messages=[_in_words(message) for message in request.messages])


def _has_image(message: Message) -> bool:
    return any(isinstance(part, Image) for part in message.parts)


def _in_words(message: Message) -> Message:
    if not _has_image(message):
        return message
    parts: list[Part] = []
    for part in message.parts:
        if not isinstance(part, Image):
            parts.append(part)
        elif parts and isinstance(result := parts[-1], ToolResult):  # a step's results hold no text beside them
            parts[-1] = msgspec.structs.replace(result, text=f"{result.text}\n{SHOWN_AS}".lstrip())
        else:
            parts.append(Text(SHOWN_AS))
    return msgspec.structs.replace(message, parts=tuple(parts))
