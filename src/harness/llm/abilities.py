"""What a server does not offer: read from the errors it answers with, in the texts that real servers send; remembered.

A request that is refused for one of its parts was not worked on, so nothing of it is billed. It may be sent again
without that part at once, once for each part.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

from harness.errors import LLMHTTPError
from harness.messages import JSON

log = logging.getLogger(__name__)

Ability: TypeAlias = Literal[
    "images",
    "json_schema",
    "response_format",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "reasoning_effort",
    "system",
    "tools",
]
"""A part of a chat completion's request that some servers or models refuse."""

ABILITIES: tuple[Ability, ...] = get_args(Ability)

OUTPUT_LIMITS: frozenset[Ability] = frozenset({"max_tokens", "max_completion_tokens"})
"""The two names of the output limit. A server has to take one of them: a limit that was set is never dropped."""

INSTEAD: Mapping[Ability, str] = {
    "images": "images; it is shown [image] instead",
    "json_schema": "a JSON schema of its reply; it is asked for any JSON object",
    "response_format": "response_format; the form of its reply is in the prompt only",
    "stream_options": "stream_options; what a call uses is estimated where it does not say it by itself",
    "max_tokens": "max_tokens; the output limit is sent as max_completion_tokens",
    "max_completion_tokens": "max_completion_tokens; the output limit is sent as max_tokens",
    "temperature": "a temperature; it uses its own",
    "reasoning_effort": "reasoning_effort; it reasons as it likes",
    "system": "a system prompt; it is put before the first message of the user",
    "tools": "native tool calls; they are made as text",
}
"""What a server does not take, and what is done instead, in words."""

STATUSES = frozenset({400, 404, 405, 415, 422, 500, 501})
"""HTTP statuses under which servers refuse a part of a request; llama.cpp takes 500."""

MAX_READ_CHARS = 4_000

_LOCATION = re.compile(r"""loc["']?\s*:\s*[\[(]\s*["']body["']\s*,\s*["'](\w+)["']\s*[\])]""")
_FORBIDDEN = re.compile(r"extra_forbidden|extra (?:inputs|fields) (?:are )?not (?:permitted|allowed)", re.IGNORECASE)

_REFUSED = (
    r"(?:(?:\b(?:not|cannot|no longer)|n't)\s(?:\w+\s){0,2}?(?:support(?:ed)?|allow(?:ed)?|permitted|available|enabled|"
    r"implemented|accept(?:ed)?|recogni[sz]ed|combined)\b|unsupported|unavailable|\bunknown\b|\bunexpected\b|"
    r"unrecogni[sz]ed|extra_forbidden|\bextra (?:inputs|fields|parameters)|endpoints found that support|"
    r"only (?:be )?supported|requires? --)"
)


def _refusal(name: str) -> re.Pattern[str]:
    """Match a refusal that is said right before or after a name."""
    return re.compile(rf"(?:{name})[^\n]{{0,120}}?{_REFUSED}|{_REFUSED}[^\n]{{0,60}}?(?:{name})", re.IGNORECASE)


_IMAGES = _refusal(r"\bimages?\b|image_url|\bvision\b|\bmulti-?modal")
_IMAGES_TOO = re.compile(
    # Servers of text-only models know a message's content as a string only.
    r"not a multi-?modal|at most 0 image|unknown variant .?image_url|expected a string|content must be a string|"
    r"valid string|untagged enum ChatCompletionRequestContent",
    re.IGNORECASE,
)
_THIS_IMAGE = re.compile(
    r"\bformats?\b|\bmime|media[ _]type|too (?:large|big|many)|dimension|resolution|download|fetch|decode|corrupt|"
    r"base64",
    re.IGNORECASE,
)
_FORMAT = re.compile(
    r"response[_ ]format|json[_ ]?schema|json[_ ]object|json mode|structured[_ ]output|guided|\bgrammar\b",
    re.IGNORECASE,
)
_WHICH_FORMAT = re.compile(r"\btype\b(?![\"'])|json[_ ]?schema|\bschema|structured|guided|\bgrammar\b", re.IGNORECASE)
_OF_A_TOOL = re.compile(r"for function|function\.parameters|\btools?\b.{0,40}\bschema", re.IGNORECASE)
_TOOLS = _refusal(r"\btools?\b|\btool[_ -](?:use|calls?|calling|choice)\b|\bfunction[_ -]call(?:s|ing)?\b")
_THIS_TOOL = re.compile(r"schema|\brole\b|tool_?call_?id|call id|tools\[|tools\.\d|\bname\b", re.IGNORECASE)
_REASONING_WITH_TOOLS = re.compile(r"function tools with reasoning", re.IGNORECASE)
_EFFORT = _refusal(r"reasoning[_. ]effort|\bthink(?:ing)?\b|\breasoning\b")
_TEMPERATURE = _refusal(r"\btemperature\b")
_ONE_TEMPERATURE = re.compile(r"invalid temperature: only", re.IGNORECASE)
_OTHER_VALUES = re.compile(
    r"supported values|must be (?:one of|between)|input should be|\b(?:above|below|greater|less|range)\b|"
    r"at (?:most|least)",
    re.IGNORECASE,
)
_WILL_PASS = re.compile(
    r"temporar|\btry again|\bretry\b|overload|"
    r"(?:backend|encoder|engine|worker)s?\b[^\n]{0,40}(?:unavailable|not ready|down\b)",
    re.IGNORECASE,
)
_SYSTEM = re.compile(
    rf"(?:system (?:role|prompt|message)s?|role.{{0,20}}\bsystem\b)[^\n]{{0,60}}?{_REFUSED}|"
    rf"\.role['\"]?[^\n]{{0,20}}{_REFUSED}[^\n]{{0,10}}\bsystem\b|only user and assistant roles",
    re.IGNORECASE,
)
_PLAIN: Mapping[Ability, re.Pattern[str]] = {
    "stream_options": _refusal(r"stream_options|include_usage"),
    "max_tokens": _refusal(r"\bmax_tokens\b"),
    "max_completion_tokens": _refusal(r"\bmax_completion_tokens\b"),
}


class ServerAbilities:
    """What one model at one server was found not to take. Runs that share an adapter share it.

    Attributes:
        missing: the parts that are left out from now on.
        calls_tools: whether it has made a native tool call.

    Args:
        name: the model.
        provider: the server.

    >>> abilities = ServerAbilities("m", "127.0.0.1")
    >>> refusal = LLMHTTPError("no", status=400, body="m does not support tools")
    >>> abilities.learn(refusal, {"tools": [{}]}), sorted(abilities.missing)
    (True, ['tools'])
    """

    def __init__(self, name: str, provider: str) -> None:
        self.missing: frozenset[Ability] = frozenset()
        self.calls_tools = False
        self._name = name
        self._provider = provider

    def learn(self, error: LLMHTTPError, sent: Mapping[str, JSON]) -> bool:
        """Learn from an error what is to be left out.

        Args:
            error: what the server answered.
            sent: the request's body.

        Returns:
            Whether the same call may be sent again now, with less. Each time there is less that could be refused.
        """
        ability = missing_ability(error.status, error.body, sent)
        if ability is None or self.missing | {ability} >= OUTPUT_LIMITS:
            return False
        self.lose(ability, " ".join(str(error).split())[:300])
        return True

    def lose(self, ability: Ability, why: str) -> None:
        """Do without an ability from now on, and say so once."""
        if ability not in self.missing:
            self.missing = frozenset((*self.missing, ability))
            log.warning("%s at %s does not take %s from now on (%s)", self._name, self._provider, INSTEAD[ability], why)


def missing_ability(status: int, said: str, sent: Mapping[str, JSON]) -> Ability | None:
    """Say which part of a request a server has refused because it, or its model, never takes such a part.

    Args:
        status: the HTTP status of the answer.
        said: its body, as text.
        sent: the request's body. Only what was sent can have been refused.

    Returns:
        The part, or None where the error is about something else: a wrong key, a schema with a mistake in it, an
        image that cannot be read, a number out of range, or it will pass.

    >>> missing_ability(400, "registry.ollama.ai/library/gemma3:4b does not support tools", {"tools": [{}]})
    'tools'
    >>> missing_ability(400, "Invalid schema for function 'f': 'oneOf' is not permitted", {"tools": [{}]}) is None
    True
    """
    if status not in STATUSES or not said or said.lstrip().startswith("<"):
        return None
    said = said[:MAX_READ_CHARS].replace("\\", "")
    if _WILL_PASS.search(said):
        return None
    if _FORBIDDEN.search(said) and (names := _LOCATION.findall(said)):
        return next((ability for ability in ABILITIES if ability in names and ability in sent), None)
    return next(
        (ability for ability in ABILITIES if _is_sent(ability, sent) and _is_refused(ability, said, sent)), None
    )


def _is_sent(ability: Ability, sent: Mapping[str, JSON]) -> bool:
    if ability == "json_schema":
        return "response_format" in sent
    if ability == "images":
        return any(_has_image(message) for message in _messages(sent))
    if ability == "system":
        return any(isinstance(message, dict) and message.get("role") == "system" for message in _messages(sent))
    return ability in sent


def _messages(sent: Mapping[str, JSON]) -> list[JSON]:
    messages = sent.get("messages")
    return messages if isinstance(messages, list) else []


def _has_image(message: JSON) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") == "image_url" for part in content
    )


def _is_refused(ability: Ability, said: str, sent: Mapping[str, JSON]) -> bool:
    match ability:
        case "images":
            return bool(_IMAGES.search(said) or _IMAGES_TOO.search(said)) and not _THIS_IMAGE.search(said)
        case "json_schema":
            asked = sent["response_format"]
            return (
                isinstance(asked, dict)
                and asked.get("type") == "json_schema"
                and _is_about_the_format(said)
                and bool(_WHICH_FORMAT.search(said))
            )
        case "response_format":
            return _is_about_the_format(said)
        case "temperature":
            return bool(_ONE_TEMPERATURE.search(said) or _TEMPERATURE.search(said)) and not _OTHER_VALUES.search(said)
        case "reasoning_effort":
            if _REASONING_WITH_TOOLS.search(said):
                return False  # the effort was asked for; the calls can be made as text
            return bool(_EFFORT.search(said)) and not _OTHER_VALUES.search(said)
        case "system":
            return bool(_SYSTEM.search(said))
        case "tools":
            return bool(_TOOLS.search(said)) and not _THIS_TOOL.search(said)
        case _:
            return bool(_PLAIN[ability].search(said))


def _is_about_the_format(said: str) -> bool:
    """Say whether an error is about the form of the reply: without it the reply is still checked when it is there."""
    return bool(_FORMAT.search(said)) and not _OF_A_TOOL.search(said)
