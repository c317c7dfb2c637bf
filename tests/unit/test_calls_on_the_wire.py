"""Any conversation in the words of OpenAI's two protocols: every call has one answer, and nothing is lost."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from harness.llm.base import LLMRequest
from harness.llm.chat_request import chat_body
from harness.llm.responses_request import responses_body
from harness.messages import Image, Message, Text, ToolCall, ToolResult, user

Told = tuple[str, str, str]
"""What a request tells: ``call`` or ``answer``, its id, and the call's arguments or the answer's text."""

NO_RESULT = "(this call has no recorded result)"
IDS = st.sampled_from(["", "c", "c", "d", "call_0_0", "call_1_0", "call_1_0_"])
NAMES = st.sampled_from(["f", "g"])
PICTURE = Image("https://x.example/a.png")

CALLS = st.builds(ToolCall, IDS, NAMES, st.sampled_from(["{}", "[", '{"a": 1}']))
SAID = st.builds(
    lambda parts: Message("assistant", tuple(parts)), st.lists(st.one_of(CALLS, st.just(Text("t"))), max_size=4)
)
GIVEN = st.builds(
    lambda parts: Message("tool", tuple(parts)),
    st.lists(st.one_of(st.builds(ToolResult, IDS, NAMES, st.sampled_from(["r", ""])), st.just(PICTURE)), max_size=4),
)
CONVERSATIONS = st.lists(st.one_of(SAID, GIVEN, GIVEN, st.just(user("u"))), max_size=8)


def chat(messages: list[Message]) -> tuple[list[Told], str]:
    """Read the calls and answers of a chat-completions request; and all that a user says."""
    told: list[Told] = []
    users: list[Any] = []
    body: Any = chat_body(LLMRequest("", messages), "m", is_openai=True)
    for message in body["messages"]:
        told += [("call", c["id"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
        if message["role"] == "tool":
            told.append(("answer", message["tool_call_id"], message["content"]))
        if message["role"] == "user":
            users.append(message["content"])
    return told, str(users)


def responses(messages: list[Message]) -> tuple[list[Told], str]:
    """Read the calls and answers of a Responses request; and all that a user says."""
    told: list[Told] = []
    users: list[Any] = []
    request = LLMRequest("", messages)
    body: Any = responses_body(request, "m", background=False, summary=None, encrypted=False)
    for item in body["input"]:
        if item["type"] == "function_call":
            told.append(("call", item["call_id"], item["arguments"]))
        elif item["type"] == "function_call_output":
            told.append(("answer", item["call_id"], item["output"]))
        elif item["role"] == "user":
            users.append(item["content"])
    return told, str(users)


@given(CONVERSATIONS)
def test_every_call_has_one_answer_right_after_it_and_nothing_is_lost(messages: list[Message]) -> None:
    told, users = chat(messages)
    assert responses(messages)[0] == told
    made = [wire_id for kind, wire_id, _ in told if kind == "call"]
    assert len(set(made)) == len(made) == sum(len(message.tool_calls) for message in messages)
    waiting: list[str] = []
    for kind, wire_id, _ in told:
        if kind == "call":
            waiting.append(wire_id)
        else:
            waiting.remove(wire_id)
    assert not waiting
    results = [part for message in messages for part in message.parts if isinstance(part, ToolResult)]
    pictures = [part for message in messages for part in message.parts if isinstance(part, Image)]
    answers = [text for kind, _, text in told if kind == "answer"]
    for said in (users, responses(messages)[1]):
        assert answers.count("r") + answers.count("") + said.count("Result of ") == len(results)
        assert said.count(PICTURE.url) == len(pictures)
    assert answers.count(NO_RESULT) == len(made) - answers.count("r") - answers.count("")
