"""Text ReAct and models of one's own: what is asked, what is read, and that only a whole reply is acted on."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness import ConfigError, LLMError, LLMHTTPError, MalformedResponse
from harness.agent import LLMSettings
from harness.budget import Usage
from harness.llm import CompleteLLM, TextReActLLM, as_llm
from harness.llm.base import LLM, LLMDelta, LLMRequest, LLMResponse, ReasoningDelta, ResponseDone, TextDelta
from harness.llm.replies import USE_THE_INTERFACE
from harness.messages import Image, Message, Reasoning, Text, ToolCall, ToolResult, assistant, user
from harness.records import FinishReason
from harness.testing import ScriptedLLM
from harness.tools.base import ToolSpec

SPEC = {"type": "object", "properties": {"path": {"type": "string", "description": "where"}}, "required": ["path"]}
READ = ToolSpec("read_file", "Read a file.", SPEC)
LIST = ToolSpec("list_files", "List files.", {"type": "object", "properties": {}})
TOOLS = (READ, LIST)


class Fake:
    """A model that gives its replies in turn (the last one for ever) and keeps what it was asked."""

    name = "fake"
    provider = "test"

    def __init__(self, *replies: str | Exception, finish: FinishReason = "stop", pieces: int = 1_000_000) -> None:
        self.replies = list(replies)
        self.finish: FinishReason = finish
        self.pieces = pieces
        self.requests: list[LLMRequest] = []

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        self.requests.append(request)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        for at in range(0, len(reply), self.pieces):
            yield TextDelta(reply[at : at + self.pieces])
        yield ResponseDone(LLMResponse((Text(reply),), self.finish, Usage(1, 2)))


async def ask(llm: LLM, request: LLMRequest | None = None) -> tuple[list[LLMDelta], LLMResponse]:
    deltas = [delta async for delta in llm.stream(request or LLMRequest("Be brief.", [user("go")], TOOLS))]
    done = deltas.pop()
    assert isinstance(done, ResponseDone)
    return deltas, done.response


async def read(text: str, *, parallel_calls: bool = True, finish: FinishReason = "stop") -> LLMResponse:
    return (await ask(TextReActLLM(Fake(text, finish=finish), parallel_calls=parallel_calls)))[1]


def actions(reply: LLMResponse) -> list[object]:
    """What a driver would act on: calls, or the answer of a good reply without calls."""
    if reply.malformed or reply.finish not in ("stop", "tool_calls"):
        return []
    return list(reply.parts)


# -- reading --------------------------------------------------------------------------------------------------------


async def test_one_call() -> None:
    reply = await read('{"thought": "look", "action": "read_file", "args": {"path": "a",  "n": 1e2}}')
    assert reply == LLMResponse(
        (Reasoning("look"), ToolCall("call_1_0", "read_file", '{"path": "a",  "n": 1e2}')), "tool_calls", Usage(1, 2)
    )


async def test_several_calls() -> None:
    reply = await read(
        '{"thought": "", "actions": [{"tool": "read_file", "args": {"path": "a"}}, {"tool": "list_files"}]}'
    )
    assert reply.parts == (ToolCall("call_1_0", "read_file", '{"path": "a"}'), ToolCall("call_1_1", "list_files", "{}"))
    one = await read('{"actions": [{"tool": "list_files"}]}', parallel_calls=False)
    assert one.parts == (ToolCall("call_1_0", "list_files", "{}"),)


@pytest.mark.parametrize(
    ("said", "confidence"),
    [
        ("0.8", 0.8),
        ('"0.9"', 0.9),
        ('"90%"', 0.9),
        ("90", 0.9),
        ("-1", 0.0),
        ("1.2", 1.0),
        ("null", None),
        ('"high"', None),
    ],
)
async def test_an_answer_and_its_confidence(said: str, confidence: float | None) -> None:
    reply = await read(f'{{"thought": "done", "action": "finish", "answer": "It is 4.", "confidence": {said}}}')
    assert (reply.parts, reply.finish, reply.malformed) == ((Reasoning("done"), Text("It is 4.")), "stop", "")
    assert reply.confidence == confidence


@pytest.mark.parametrize(
    "text",
    [
        '\n  {"action": "finish", "answer": "4"}  \n',
        '```json\n{"action": "finish", "answer": "4"}\n```',
        '```\n{"action": "finish", "answer": "4"}\n```\n',
        '{"action": "finish", "answer": 4}',
        '{"action": "finish", "args": {"answer": "4"}}',
        '{"action": "finish", "answer": {"thought": "t", "action": "finish", "answer": "4"}}',
        json.dumps({"action": "finish", "answer": '{"action": "finish", "answer": "4"}'}),
        '{"action": "finish", "answer": "4", "args": {}, "actions": []}',
        '<think>\nfour\n</think>\n\n{"action": "finish", "answer": "4"}',
    ],
)
async def test_forms_of_an_answer(text: str) -> None:
    reply = await read(text)
    assert reply.malformed == ""
    assert [part for part in reply.parts if isinstance(part, Text)] == [Text("4")]


CALL = '{"thought": "t", "action": "read_file", "args": {"path": "a"}}'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a JSON object"),
        ("It is 4.", "not a JSON object"),
        (f"I will look.\n{CALL}", "not a JSON object"),
        (f"{CALL} done", "not a JSON object"),
        (f"{CALL}\n{CALL}", "not a JSON object"),
        (f"```json\n{CALL}\n```\n```json\n{CALL}\n```", "not a JSON object"),
        (f"{{{CALL}}}", "not a JSON object"),
        (f"[{CALL}]", "not a JSON object"),
        ('{"thought": "t"}', "named no action"),
        ('{"name": "read_file", "arguments": {"path": "a"}}', "named no action"),
        ('{"action": 7}', "$.action"),
        ('{"action": "read_file", "args": {"path": NaN}}', "not a JSON object"),
        ('{"actions": [{"args": {}}]}', "tool"),
        ('{"action": "read_file", "args": {}, "answer": "4"}', "at once"),
        ('{"action": "finish", "answer": "4", "actions": [{"tool": "read_file", "args": {}}]}', "at once"),
        ('{"actions": [{"tool": "read_file"}, {"tool": "finish", "args": {"answer": "4"}}]}', "at once"),
        ('{"action": "read_file", "actions": [{"tool": "read_file"}]}', "both"),
        ('{"action": "finish"}', "without an answer"),
        ('{"action": "finish", "answer": null}', "without an answer"),
        ('{"action": "finish", "answer": "  "}', "without an answer"),
        (json.dumps({"action": "finish", "answer": CALL}), "is a tool call"),
        ('{"action": "finish", "answer": "{\\"name\\": \\"read_file\\", \\"arguments\\": {}}"}', "is a tool call"),
        ('{"a":' * 100_000, "not a JSON object"),
    ],
)
async def test_malformed_replies_say_what_is_wrong(text: str, says: str) -> None:
    reply = await read(text)
    assert says in reply.malformed
    assert not actions(reply)
    assert reply.parts == ((Text(text),) if text else ())
    assert reply.usage == Usage(1, 2)  # it was paid for


MARKED = [
    ('<tool_call>\n{"name": "read_file", "arguments": {"path": "a < b"}}\n</tool_call>', '{"path": "a < b"}'),
    ('<tool_call>{"name": "read_file", "arguments": "{\\"path\\": \\"a\\"}"}</tool_call>', '{"path": "a"}'),
    ('[TOOL_CALLS][{"name": "read_file", "arguments": {"path": "a"}}]', '{"path": "a"}'),
    ('[TOOL_CALLS]read_file{"path": "a"}', '{"path": "a"}'),
    ('[TOOL_CALLS]read_file[CALL_ID]x9[ARGS]{"path": "a"}', '{"path": "a"}'),
    ('<function=read_file>{"path": "a"}</function>', '{"path": "a"}'),
    ('<|python_tag|>{"name": "read_file", "parameters": {"path": "a"}}', '{"path": "a"}'),
    ('```json\n<tool_call>{"name": "read_file", "arguments": {}}</tool_call>\n```', "{}"),
]


@pytest.mark.parametrize(("text", "arguments"), MARKED)
async def test_a_call_in_the_marks_of_the_model_is_a_step(text: str, arguments: str) -> None:
    reply = await read(text)
    assert reply.parts == (ToolCall("call_1_0", "read_file", arguments),)
    for end in range(len(text)):
        assert actions(await read(text[:end])) == [], text[:end]


@pytest.mark.parametrize(
    "text",
    [
        'I will look. <tool_call>{"name": "read_file", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "read_file", "arguments": {}}</tool_call> Then I answer.',
        '<tool_call>{"name": "read_file", "arguments": {}}',
        '<tool_call>{"name": "read_file"',
        "[TOOL_CALLS]read_file{'path': 'a'}",
        "[TOOL_CALLS]read_file",
        "<function=read_file>",
        "<|python_tag|>import os",
    ],
)
async def test_marked_calls_beside_anything_else_are_not_made(text: str) -> None:
    reply = await read(text)
    assert reply.malformed
    assert not actions(reply)


async def test_several_marked_calls_are_several_calls_where_that_is_offered() -> None:
    text = (
        '<tool_call>{"name": "read_file", "arguments": {"path": "a"}}</tool_call>\n'
        '<tool_call>{"name": "list_files", "arguments": {}}</tool_call>'
    )
    assert [call.name for call in (await read(text)).parts if isinstance(call, ToolCall)] == ["read_file", "list_files"]
    assert "one call in each step" in (await read(text, parallel_calls=False)).malformed


async def test_a_note_about_the_interface_is_told_in_steps() -> None:
    note = user(f"Your last reply could not be used: {USE_THE_INTERFACE}. Reply again.")
    fake = Fake(CALL)
    await ask(TextReActLLM(fake), LLMRequest("", [user("look"), assistant("hm"), note], TOOLS))
    told = fake.requests[0].messages[-1].text
    assert "interface" not in told
    assert '"action"' in told


async def test_one_call_a_step_where_that_was_asked() -> None:
    reply = await read('{"actions": [{"tool": "list_files"}, {"tool": "list_files"}]}', parallel_calls=False)
    assert "one call in each step" in reply.malformed


@pytest.mark.parametrize("finish", ["length", "content_filter", "error"])
async def test_a_reply_that_did_not_end_well_is_not_read(finish: FinishReason) -> None:
    reply = await read(CALL, finish=finish)
    assert (reply.finish, reply.parts) == (finish, (Text(CALL),))


GOOD = [
    json.dumps({"thought": "lööp \U0001f600", "action": "read_file", "args": {"path": "a", "deep": {"x": [1, {}]}}}),
    json.dumps({"thought": "t", "actions": [{"tool": "list_files", "args": {}}, {"tool": "read_file", "args": {}}]}),
    json.dumps({"thought": "t", "action": "finish", "answer": '{"action": "finish", "answer": "4"}', "confidence": 1}),
    '```json\n{"action": "finish", "answer": "4"}\n```',
]


@pytest.mark.parametrize("good", GOOD)
async def test_a_reply_cut_at_any_character_does_nothing(good: str) -> None:
    for end in range(len(good)):
        assert actions(await read(good[:end])) == [], good[:end]
    assert actions(await read(good))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ARGS = st.dictionaries(st.text(), VALUES, max_size=3)
THOUGHT = st.text(st.characters(codec="utf-8"))


@given(THOUGHT, st.lists(st.tuples(st.sampled_from(["read_file", "list_files"]), ARGS), min_size=1, max_size=3))
async def test_calls_survive_the_way_to_the_model_and_back(thought: str, calls: list[tuple[str, dict]]) -> None:
    made = tuple(ToolCall(f"call_1_{i}", name, json.dumps(args)) for i, (name, args) in enumerate(calls))
    parts = (*((Reasoning(thought),) if thought else ()), *made)
    fake = Fake("{}")
    await ask(TextReActLLM(fake), LLMRequest("", [user("go"), Message("assistant", parts)], TOOLS))
    reply = await read(fake.requests[0].messages[1].text)
    back = [(call.name, json.loads(call.arguments)) for call in reply.parts if isinstance(call, ToolCall)]
    assert back == calls
    assert [part.text for part in reply.parts if isinstance(part, Reasoning)] == ([thought] if thought else [])


@given(THOUGHT, st.text(st.characters(codec="utf-8")).filter(lambda text: text.strip() and "{" not in text))
async def test_an_answer_survives(thought: str, answer: str) -> None:
    reply = await read(json.dumps({"thought": thought, "action": "finish", "answer": answer}))
    assert actions(reply)[-1] == Text(answer)


@given(
    st.text()
    | st.sampled_from(GOOD).flatmap(lambda text: st.integers(0, len(text)).map(lambda n: text[:n] + text[n + 1 :]))
)
@example('{"thought":"\\ud800","action":"finish","answer":"\\ud800"}')
async def test_any_text_is_read_or_malformed(text: str) -> None:
    reply = await read(text)
    for part in reply.parts:
        if isinstance(part, Text | Reasoning) and part.text is not text:
            part.text.encode()  # what was made of it can be written down
    assert reply.malformed or actions(reply)


@pytest.mark.parametrize(
    "unit",
    [
        "x",
        "{",
        "[",
        '{"a":',
        "```",
        '"',
        "\\",
        "<tool_call>",
        "[TOOL_CALLS]",
        "<function=a>{",
        '{"action": "finish", "answer": "',
        ",",
        "{,",
    ],
)
async def test_two_megabytes_of_bad_text_are_handled_at_once(unit: str) -> None:
    text = unit * (2_000_000 // len(unit))
    llm = TextReActLLM(Fake(text))
    before = time.process_time()
    _, reply = await ask(llm)
    assert time.process_time() - before < 0.2
    assert reply.malformed
    assert len(reply.malformed) < 1000


# -- asking ---------------------------------------------------------------------------------------------------------


async def test_prompt_and_schema_show_the_tools_in_full() -> None:
    fake = Fake(CALL)
    await ask(
        TextReActLLM(fake), LLMRequest("Be brief.", [user("go")], TOOLS, LLMSettings(temperature=0), confidence=True)
    )
    [asked] = fake.requests
    assert asked.system.startswith("Be brief.\n\n")
    for needed in (
        "read_file",
        "Read a file.",
        '"path" (string): where',
        json.dumps(SPEC),
        '"confidence"',
        '"actions"',
    ):
        assert needed in asked.system
    assert (asked.tools, asked.confidence, asked.settings) == ((), False, LLMSettings(temperature=0))
    assert asked.response_schema is not None
    forms = asked.response_schema["anyOf"]
    assert [list(form["properties"]) for form in forms] == [  # type: ignore[union-attr, index, call-overload]
        ["thought", "action", "args"],
        ["thought", "action", "args"],
        ["thought", "actions"],
        ["thought", "action", "answer", "confidence"],
    ]
    assert forms[0]["properties"]["args"] == SPEC  # type: ignore[index, call-overload]


async def test_one_call_a_step_is_all_that_is_offered() -> None:
    fake = Fake(CALL)
    await ask(TextReActLLM(fake, parallel_calls=False))
    assert "actions" not in fake.requests[0].system
    assert "actions" not in json.dumps(fake.requests[0].response_schema)


async def test_definitions_of_a_schema_are_moved_to_its_root() -> None:
    schema = {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/Node"}},
        "$defs": {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}},
    }
    fake = Fake('{"action": "grow", "args": {}}')
    await ask(TextReActLLM(fake), LLMRequest("", [user("go")], (ToolSpec("grow", "Grow.", schema),)))
    sent = fake.requests[0].response_schema
    assert sent is not None
    assert sent["$defs"] == {"grow.Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/grow.Node"}}}}
    assert schema["$defs"]["Node"]["properties"]["next"] == {"$ref": "#/$defs/Node"}  # the tool's own is not touched
    assert json.dumps(sent).count("#/$defs/Node") == 0


async def test_the_conversation_is_told_in_steps_with_alternating_roles() -> None:
    picture = Image("data:image/png;base64,AA")
    conversation = [
        user("look"),
        Message("assistant", (Reasoning("hm"), ToolCall("c", "read_file", '{"path": "a"}'))),
        Message("tool", (ToolResult("c", "read_file", "text of a"), picture)),
        user("a note"),
        Message("assistant", (Text("not a step"),)),
        user("try again"),
        Message("assistant", (ToolCall("x", "list_files", "{}"), ToolCall("x", "read_file", "not json"))),
        Message("tool", (ToolResult("x", "list_files", "a"), ToolResult("x", "read_file", "no", is_error=True))),
        Message("assistant", (Reasoning("t"), Text("an answer"))),
    ]
    fake = Fake(CALL)
    await ask(TextReActLLM(fake), LLMRequest("", conversation, TOOLS))
    told = fake.requests[0].messages
    assert [message.role for message in told] == ["user", "assistant"] * 4
    texts = [message.text for message in told]
    assert json.loads(texts[1]) == {"thought": "hm", "action": "read_file", "args": {"path": "a"}}
    assert texts[2] == 'Result of read_file({"path": "a"}):\ntext of a\n\na note'
    assert picture in told[2].parts
    assert texts[3] == "not a step"
    assert json.loads(texts[5])["actions"][1] == {"tool": "read_file", "args": "not json"}
    assert "Error from read_file(not json):\nno\n(An error holds no facts" in texts[6]
    assert texts[6].count("holds no facts") == 1
    assert json.loads(texts[7]) == {"thought": "t", "action": "finish", "answer": "an answer"}


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ("57", 'Result of read_file({"path": "a"}) [Read a file.]:\n57'),
        ("-1,204.50", 'Result of read_file({"path": "a"}) [Read a file.]:\n-1,204.50'),
        ("57 pieces", 'Result of read_file({"path": "a"}):\n57 pieces'),
    ],
)
async def test_a_bare_number_is_told_with_what_its_tool_does(result: str, told: str) -> None:
    fake = Fake(CALL)
    await ask(TextReActLLM(fake), LLMRequest("", [user("go"), *called("a", result)], TOOLS))
    assert fake.requests[0].messages[-1].text == told


def called(path: str, result: str) -> list[Message]:
    return [
        Message("assistant", (ToolCall("c", "read_file", json.dumps({"path": path})),)),
        Message("tool", (ToolResult("c", "read_file", result),)),
    ]


@pytest.mark.parametrize(
    ("failures", "results", "offered"),
    [
        (0, 0, {"look", "send", "finish"}),
        (1, 0, {"look"}),
        (2, 0, {"send", "finish"}),  # the same again is in vain
        (1, 1, {"look", "send", "finish"}),
    ],
)
async def test_where_the_first_thing_tried_has_failed_it_looks_further_before_it_answers(
    failures: int, results: int, offered: set[str]
) -> None:
    look = ToolSpec("look", "Look.", {"type": "object", "properties": {}}, "read")
    send = ToolSpec("send", "Send.", {"type": "object", "properties": {}}, "once")
    failed = [
        Message("assistant", (ToolCall("d", "look", "{}"),)),
        Message("tool", (ToolResult("d", "look", "no such folder", is_error=True),)),
    ]
    history = [user("go"), *failed * failures, *called("a", "1") * results]
    for tools, actions in (((look, send), offered), ((send,), {"send", "finish"})):
        fake = Fake(CALL)
        await ask(TextReActLLM(fake, parallel_calls=False), LLMRequest("", history, tools))
        forms = fake.requests[0].response_schema["anyOf"]  # type: ignore[index]
        assert {form["properties"]["action"]["const"] for form in forms} == actions  # type: ignore[index, call-overload, union-attr]
        assert "finish" in fake.requests[0].system


async def test_a_circle_of_calls_leaves_only_the_answer() -> None:
    listed = [
        Message("assistant", (ToolCall("d", "list_files", "{}"),)),
        Message("tool", (ToolResult("d", "list_files", "a"),)),
    ]
    fake = Fake('{"action": "finish", "answer": "4"}')
    await ask(TextReActLLM(fake), LLMRequest("", [user("go"), *(called("a", "1") + listed) * 2], TOOLS))
    [form] = fake.requests[0].response_schema["anyOf"]  # type: ignore[index, misc]
    assert form["properties"]["action"] == {"const": "finish"}  # type: ignore[index, call-overload]


async def test_a_server_that_refuses_the_schema_is_asked_without_it_from_then_on() -> None:
    refusal = LLMHTTPError("HTTP 400: unknown field 'response_format'", status=400)
    fake = Fake(refusal, CALL)
    llm = TextReActLLM(fake)
    assert (await ask(llm))[1].finish == "tool_calls"
    await ask(llm)
    assert [request.response_schema is None for request in fake.requests] == [False, True, True]


@pytest.mark.parametrize(
    "error",
    [
        LLMHTTPError("HTTP 400: the prompt is too long", status=400),
        LLMHTTPError("HTTP 500: response_format", status=500, transient=True),
        LLMError("schema"),
    ],
)
async def test_other_errors_pass(error: LLMError) -> None:
    fake = Fake(error)
    with pytest.raises(LLMError) as caught:
        await ask(TextReActLLM(fake))
    assert caught.value is error
    assert len(fake.requests) == 1


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 1000])
async def test_a_viewer_sees_thought_and_answer_without_json(pieces: int) -> None:
    step = {"thought": 'a "quoted"\nlöt\\', "args": {"answer": "no"}, "action": "finish", "answer": "it is\t4 \u00e9"}
    fake = Fake(json.dumps(step), pieces=pieces)
    deltas, _ = await ask(TextReActLLM(fake))
    thought = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    answer = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    assert (thought, answer) == (step["thought"], step["answer"])


async def test_a_request_without_tools_is_passed_on() -> None:
    fake = Fake("A summary.")
    request = LLMRequest("Summarise.", [user("text")], (), LLMSettings(), True, {"type": "object"})
    deltas, reply = await ask(TextReActLLM(fake), request)
    assert fake.requests == [request]
    assert deltas == [TextDelta("A summary.")]
    assert reply.parts == (Text("A summary."),)
    _, step = await ask(TextReActLLM(Fake('{"action": "finish", "answer": "4"}')), LLMRequest("", [user("2+2")]))
    assert step.parts == (Text("4"),)


# -- models of one's own --------------------------------------------------------------------------------------------


class Mine:
    """Returns what it is given, and keeps what it was asked."""

    def __init__(self, reply: object) -> None:
        self.reply = reply
        self.asked: list[tuple[str, list, dict]] = []

    async def complete(self, system: str, messages: list[dict], **kw: object) -> object:
        self.asked.append((system, messages, kw))
        if isinstance(self.reply, BaseException):
            raise self.reply
        return self.reply


@pytest.mark.parametrize(
    ("reply", "parts"),
    [
        (CALL, (Reasoning("t"), ToolCall("call_1_0", "read_file", '{"path": "a"}'))),
        ({"text": CALL}, (Reasoning("t"), ToolCall("call_1_0", "read_file", '{"path": "a"}'))),
        (
            {"content": CALL, "finish_reason": "stop"},
            (Reasoning("t"), ToolCall("call_1_0", "read_file", '{"path": "a"}')),
        ),
        (json.loads(CALL), (Reasoning("t"), ToolCall("call_1_0", "read_file", '{"path": "a"}'))),
        ({"thought": "t", "action": "finish", "answer": "4", "usage": {}}, (Reasoning("t"), Text("4"))),
    ],
)
async def test_what_complete_may_return(reply: object, parts: tuple) -> None:
    assert (await ask(as_llm(Mine(reply))))[1].parts == parts


async def test_what_complete_is_given() -> None:
    mine = Mine(CALL)
    settings = LLMSettings(temperature=0.5)
    await ask(as_llm(mine), LLMRequest("Be brief.", [user("go"), assistant("hm"), user("on")], TOOLS, settings))
    [(system, messages, keywords)] = mine.asked
    assert system.startswith("Be brief.")
    assert messages == [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "hm"},
        {"role": "user", "content": "on"},
    ]
    assert keywords.keys() == {"response_format", "temperature"}
    assert keywords["response_format"]["type"] == "json_schema"


async def test_complete_is_given_only_what_its_signature_takes() -> None:
    class Narrow:
        async def complete(self, system: str, messages: list[dict]) -> str:
            return CALL

    class Named:
        given: object = None

        async def complete(self, system: str, messages: list[dict], response_format: object = None) -> str:
            self.given = response_format
            return CALL

    named = Named()
    request = LLMRequest("", [user("go")], TOOLS, LLMSettings(temperature=0.5))
    assert (await ask(as_llm(Narrow()), request))[1].finish == "tool_calls"
    assert (await ask(as_llm(named), request))[1].finish == "tool_calls"
    assert named.given is not None


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"tokens_in": 3, "tokens_out": 4, "cost_usd": 0.01}, Usage(3, 4, cost_microusd=10_000)),
        ({"input_tokens": 3, "output_tokens": 4}, Usage(3, 4, unpriced=1)),
        ({"prompt_tokens": 3, "completion_tokens": 4}, Usage(3, 4, unpriced=1)),
        ({"prompt_tokens": float("nan"), "completion_tokens": -1, "cost_usd": "x"}, Usage(unpriced=1)),
        (None, Usage(unpriced=1)),
        ("many", Usage(unpriced=1)),
    ],
)
async def test_usage_under_its_usual_names(usage: object, expected: Usage) -> None:
    assert (await ask(as_llm(Mine({"text": CALL, "usage": usage}))))[1].usage == expected


async def test_a_finish_reason_counts_and_a_half_reply_without_one_is_malformed() -> None:
    assert (await ask(as_llm(Mine({"text": CALL, "finish_reason": "length"}))))[1].finish == "length"
    half = (await ask(as_llm(Mine({"text": CALL[:-1]}))))[1]
    assert half.malformed
    assert not actions(half)


@pytest.mark.parametrize("reply", [None, 7, {}, {"text": None}, {"message": "x"}])
async def test_a_return_value_that_says_nothing(reply: object) -> None:
    with pytest.raises(MalformedResponse, match=r"complete\(\)"):
        await ask(as_llm(Mine(reply)))


class VendorTimeout(Exception):
    pass


class Overloaded(Exception):
    status_code = 503


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (TimeoutError("slow"), True),
        (ConnectionResetError("gone"), True),
        (OSError("network is down"), True),
        (VendorTimeout("slow"), True),
        (Overloaded("later"), True),
        (ValueError("bug"), False),
        (LLMError("mine", transient=True), True),
    ],
)
async def test_what_complete_raises_becomes_an_llm_error(error: Exception, transient: bool) -> None:
    with pytest.raises(LLMError) as caught:
        await ask(as_llm(Mine(error)))
    assert caught.value.transient is transient
    assert str(error) in str(caught.value)
    assert (caught.value is error) == isinstance(error, LLMError)


async def test_stream_complete_is_preferred_where_it_exists() -> None:
    class Streams(Mine):
        async def stream_complete(self, system: str, messages: list[dict]) -> AsyncIterator[str]:
            for at in range(0, len(CALL), 5):
                yield CALL[at : at + 5]

    mine = Streams(ValueError("not this one"))
    deltas, reply = await ask(as_llm(mine))
    assert deltas == [ReasoningDelta("t")]
    assert reply.parts == (Reasoning("t"), ToolCall("call_1_0", "read_file", '{"path": "a"}'))
    assert reply.usage == Usage(unpriced=1)


async def test_confidence_of_a_plain_text_model() -> None:
    mine = Mine("It is 4.\nConfidence: 70%")
    _, reply = await ask(CompleteLLM(mine), LLMRequest("", [user("2+2")], confidence=True))
    assert (reply.parts, reply.confidence) == ((Text("It is 4."),), 0.7)
    assert "Confidence" in mine.asked[0][0]


def test_as_llm() -> None:
    fake = Fake("")
    assert as_llm(fake) is fake
    assert isinstance(as_llm(Mine("")), TextReActLLM)
    for wrong in (object(), None, "gpt", Mine):
        with pytest.raises(ConfigError, match="llm="):
            as_llm(wrong)


async def test_a_complete_that_is_not_async_is_named() -> None:
    class Plain:
        def complete(self, system: str, messages: list[dict]) -> str:
            return CALL

    with pytest.raises(LLMError, match="async def"):
        await ask(as_llm(Plain()))


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ('{"complexity": "simple"}', '{"complexity": "simple"}'),
        ('{"answer": "4", "confidence": 0.5}', '{"answer": "4", "confidence": 0.5}'),
        (
            '{"thought": "t", "action": "finish", "answer": "{\\"complexity\\": \\"simple\\"}"}',
            '{"complexity": "simple"}',
        ),
        ("<think>hm</think>{}", "{}"),
        ("in words", "in words"),
    ],
)
async def test_a_reply_to_a_schema_of_the_caller_s_is_no_step(said: str, read: str) -> None:
    llm = TextReActLLM(ScriptedLLM([said]))
    request = LLMRequest("s", [user("u")], response_schema={"type": "object"})
    done = [delta async for delta in llm.stream(request)][-1]
    assert isinstance(done, ResponseDone)
    assert "".join(part.text for part in done.response.parts if isinstance(part, Text)) == read
