"""AgentConfig(output=...): an answer that was validated, whichever model gives it and whichever way it writes it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, field_validator
from typing_extensions import TypedDict

from harness import (
    AgentConfig,
    AgentRuntime,
    CheckpointStore,
    ConfigError,
    Failed,
    Finished,
    MemoryCheckpointStore,
    OpenAILLM,
    Plan,
    SQLiteCheckpointStore,
    Task,
    delegate,
    tool,
)
from harness.checkpoint.base import this_process
from harness.events import TaskDone
from harness.llm.base import LLMRequest, LLMResponse
from harness.messages import Reasoning, Text, ToolCall, ToolResult
from harness.records import ConfigDiffers, LLMFinished, Noted, RunFailed, ToolFinished
from harness.testing import CassetteLLM, Reply, ScriptedLLM, call


class City(BaseModel):
    """A city."""

    name: str
    people: Annotated[int, Field(ge=0, description="how many live there")]
    twins: list[City] = []

    @field_validator("name")
    @classmethod
    def is_upper(cls, value: str) -> str:
        if not value[:1].isupper():
            raise ValueError("a city begins with a capital letter")
        return value


@dataclass
class Point:
    x: int
    y: int = 0


class Entry(TypedDict):
    word: str
    count: int


class Wrapped(BaseModel):
    """Has a field of the name that the answer is wrapped in."""

    answer: str
    confidence: float = 0.0


ROME = City(name="Rome", people=3_000_000, twins=[City(name="Paris", people=2_000_000)])


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[CheckpointStore]:
    store = MemoryCheckpointStore() if request.param == "memory" else SQLiteCheckpointStore(tmp_path / "runs.db")
    yield store
    await store.close()


@tool(effect="read")
def look(what: str) -> str:
    """Look something up."""
    return f"{what}: 3000000"


def wire(store: CheckpointStore, llm: object, *agents: AgentConfig, tools: object = (look,)) -> AgentRuntime:
    return AgentRuntime(llm=llm, agents=agents, tools=tools, checkpoint_store=store, auto_resume=False)  # type: ignore[arg-type]


def giving(answer: object, **more: float) -> Reply:
    """Give an answer by the tool for it."""
    value = answer.model_dump(exclude_defaults=True) if isinstance(answer, BaseModel) else answer
    return call("final_answer", **{"answer": value, **more})  # type: ignore[arg-type]


# -- what a type and a model may be ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "value", "written"),
    [
        (City, ROME, ROME.model_dump()),
        (Point, Point(1, 2), {"x": 1, "y": 2}),
        (Entry, {"word": "a", "count": 2}, {"word": "a", "count": 2}),
        (list[Point], [Point(1), Point(2, 3)], [{"x": 1}, {"x": 2, "y": 3}]),
        (City | Point, Point(1), {"x": 1}),
        (int, 7, 7),
        (str, "seven", "seven"),
        (int | None, None, None),
        (Literal["yes", "no"], "yes", "yes"),
        (dict[str, float], {"a": 1.5}, {"a": 1.5}),
        (Wrapped, Wrapped(answer="x"), {"answer": "x"}),
    ],
)
@pytest.mark.parametrize("way", ["tool", "text", "fenced", "wrapped text", "own steps", "own steps in text"])
async def test_every_type_comes_back_as_an_object_from_every_model(
    output: object, value: object, written: object, way: str
) -> None:
    text = json.dumps(written)
    own = [
        json.dumps({"thought": "first", "action": "look", "args": {"what": "Rome"}}),
        json.dumps({"thought": "so", "action": "finish", "answer": written, "confidence": 0.4}),
    ]

    class Own:
        async def complete(self, system: str, messages: list[object]) -> str:
            return own[len(messages) // 2]

    llm = {
        "tool": ScriptedLLM([call("look", what="Rome"), giving(written, confidence=0.4)]),
        "text": ScriptedLLM([call("look", what="Rome"), text]),
        "fenced": ScriptedLLM([call("look", what="Rome"), f"```json\n{text}\n```"]),
        "wrapped text": ScriptedLLM([call("look", what="Rome"), json.dumps({"answer": written, "confidence": 0.4})]),
        "own steps": Own(),
        "own steps in text": ScriptedLLM([call("look", what="Rome"), giving(written)]),
    }[way]
    if way == "own steps in text" and isinstance(written, dict):
        own[1] = json.dumps({"thought": "so", "action": "finish", "answer": text})
        llm = Own()
    result = await wire(MemoryCheckpointStore(), llm, AgentConfig("a", output=output)).run_agent("a", "Which?")
    assert isinstance(result, Finished), result
    assert result.output == value
    assert type(result.output) is type(value)
    assert result["output"] == value
    assert json.loads(result.answer) == written
    assert result.confidence == (0.4 if way in ("tool", "wrapped text", "own steps") else 1.0)
    assert sum(isinstance(entry.record, ToolFinished) for entry in result.trace) == 1, "tools work as ever"


async def test_a_model_is_told_the_schema_and_not_asked_for_a_line_of_confidence(store: CheckpointStore) -> None:
    llm = ScriptedLLM([giving(ROME, confidence=0.8)])
    await wire(store, llm, AgentConfig("a", output=City)).run_agent("a", "Which?")
    request = llm.requests[0]
    given = request.tools[-1]
    assert (request.answer_tool, given.name, request.confidence) == ("final_answer", "final_answer", False)
    assert given.schema["required"] == ["answer", "confidence"]
    assert given.schema["$defs"]["City"]["properties"]["people"]["minimum"] == 0  # type: ignore[index,call-overload]
    sure = ScriptedLLM([giving(ROME)])
    result = await wire(store, sure, AgentConfig("a", output=City, confidence_from_llm=False)).run_agent("a", "Which?")
    assert (sure.requests[0].tools[-1].schema["required"], result.confidence) == (["answer"], 1.0)


async def test_a_tool_of_the_same_name_keeps_it(store: CheckpointStore) -> None:
    @tool(effect="read")
    def final_answer(answer: str) -> str:
        """Some tool."""
        return "not the end"

    llm = ScriptedLLM([call("final_answer", answer="x"), call("final_answer_", answer=7)])
    result = await wire(store, llm, AgentConfig("a", output=int), tools=[final_answer]).run_agent("a", "Which?")
    assert result.output == 7
    assert any(isinstance(p, ToolResult) and p.text == "not the end" for p in llm.requests[1].messages[-1].parts)


async def test_what_is_said_beside_the_answer_is_a_thought_and_the_answer_an_answer(store: CheckpointStore) -> None:
    reply = LLMResponse((Text("Here it is."), giving(7, confidence=0.5)), "tool_calls")  # type: ignore[arg-type]
    llm = ScriptedLLM([reply])
    async with wire(store, llm, AgentConfig("a", output=int)).run_agent_stream("a", "Which?") as stream:
        events = [event async for event in stream]
    assert [event.type.value for event in events] == ["STARTED", "THOUGHT", "TASK_DONE"]
    assert (events[1].payload["thought"], events[1].payload["action"]) == ("Here it is.", "finish")
    assert isinstance(events[2], TaskDone)
    assert (events[2].answer, events[2].confidence) == ("7", 0.5)
    assert stream.result is not None
    assert stream.result.output == 7
    said = next(e.record for e in stream.result.trace if isinstance(e.record, LLMFinished))
    assert [type(part) for part in said.parts] == [Reasoning, Text]


# -- answers that do not fit -------------------------------------------------------------------------------------------


async def test_all_that_is_wrong_is_told_and_the_next_answer_counts(store: CheckpointStore) -> None:
    llm = ScriptedLLM([giving({"name": "rome", "people": -1, "twins": [{"name": "X"}]}), giving(ROME)])
    result = await wire(store, llm, AgentConfig("a", output=City)).run_agent("a", "Which?")
    assert result.output == ROME
    told = llm.requests[1].messages[-1].text
    assert told.startswith("Your answer has not the form that was asked for:\n- ")
    for word in ("a city begins with a capital letter", "people: ", "not -1", "twins[0].people: missing"):
        assert word in told
    assert [message.role for message in llm.requests[1].messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize("most", [0, 1, 3])
async def test_it_is_told_as_often_as_of_other_bad_replies_and_then_the_run_fails(
    store: CheckpointStore, most: int
) -> None:
    llm = ScriptedLLM(lambda _: "It is Rome.")
    agent = AgentConfig("a", output=City, max_reply_errors=most)
    result = await wire(store, llm, agent).run_agent("a", "Which?", run_id="r")
    assert isinstance(result, Failed)
    assert (result.reason, result.output, result.answer) == ("malformed", None, "It is Rome.")
    assert result.error.startswith(f"{most + 1} replies in a row were unusable: the answer has not the form")
    assert "Invalid JSON" in result.error
    assert len(llm.requests) == most + 1
    again = await wire(store, ScriptedLLM(lambda _: giving(ROME)), agent).resume("r")
    assert isinstance(again, Finished), again.error


async def test_malformed_replies_and_answers_that_do_not_fit_share_their_bound(store: CheckpointStore) -> None:
    replies: list[Reply] = ["no", LLMResponse((Text("x"),), "stop", malformed="it is odd"), "no", "no"]
    llm = ScriptedLLM(lambda request: replies[sum(m.role == "assistant" for m in request.messages)])
    result = await wire(store, llm, AgentConfig("a", output=City, max_reply_errors=3)).run_agent("a", "Which?")
    assert (result.success, len(llm.requests)) == (False, 4)


async def test_an_answer_beside_other_calls_ends_nothing(store: CheckpointStore) -> None:
    llm = ScriptedLLM([[giving(ROME), call("look", what="Rome")], giving(ROME)])  # type: ignore[list-item]
    result = await wire(store, llm, AgentConfig("a", output=City)).run_agent("a", "Which?")
    assert result.output == ROME
    notes = [entry.record.text for entry in result.trace if isinstance(entry.record, Noted)]
    assert len(notes) == 1
    assert "it called 'final_answer', which ends the work, beside another call" in notes[0]


async def test_a_validator_that_breaks_is_told_of_and_not_fatal(store: CheckpointStore) -> None:
    class Odd(BaseModel):
        n: int

        @field_validator("n")
        @classmethod
        def check(cls, value: int) -> int:
            if value == 0:
                raise RuntimeError("cannot divide")
            return 6 // value

    llm = ScriptedLLM([giving({"n": 0}), giving({"n": 2})])
    result = await wire(store, llm, AgentConfig("a", output=Odd)).run_agent("a", "Which?")
    assert result.output == Odd.model_construct(n=3)
    assert "cannot divide" in llm.requests[1].messages[-1].text


# -- resumed runs ------------------------------------------------------------------------------------------------------


async def test_a_run_cut_at_any_record_ends_with_the_same_output() -> None:
    script: list[Reply] = [call("look", what="Rome"), "It is Rome.", giving({"name": "rome"}), giving(ROME)]
    agent = AgentConfig("a", output=City)
    whole = await wire(MemoryCheckpointStore(), ScriptedLLM(script), agent).run_agent("a", "Which?")
    assert whole.output == ROME
    for length in range(1, len(whole.trace)):
        store, llm = MemoryCheckpointStore(), ScriptedLLM(script)
        owner = await store.claim("r", this_process())
        await store.append("r", 0, [entry.record for entry in whole.trace[:length]], owner=owner)
        await store.release(owner)
        result = await wire(store, llm, agent).resume("r")
        assert (result.output, result.confidence) == (whole.output, whole.confidence)
        answered = sum(isinstance(entry.record, LLMFinished) for entry in whole.trace[:length])
        assert len(llm.requests) == len(script) - answered, "nothing that was answered is asked again"


async def test_the_output_of_a_finished_run_is_there_in_another_process(tmp_path: Path) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    await wire(store, ScriptedLLM([giving(ROME)]), AgentConfig("a", output=City)).run_agent("a", "Which?", run_id="r")
    assert (await wire(store, ScriptedLLM([]), AgentConfig("a", output=City)).resume("r")).output == ROME
    bare = await wire(store, ScriptedLLM([]), AgentConfig("a")).resume("r")
    assert (bare.output, bare.output_as(City)) == (None, ROME)
    await store.close()
    program = """
        import asyncio, sys
        from dataclasses import dataclass
        from harness import AgentConfig, AgentRuntime, SQLiteCheckpointStore
        from harness.testing import ScriptedLLM

        @dataclass
        class Town:
            name: str
            people: int

        agents = [AgentConfig("a", output=Town)]
        runtime = AgentRuntime(llm=ScriptedLLM([]), agents=agents, checkpoint_store=SQLiteCheckpointStore(sys.argv[1]))
        print(runtime.run_sync(runtime.resume("r")).output)
    """
    words = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "runs.db")]
    done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=True)
    assert done.stdout == "Town(name='Rome', people=3000000)\n"


async def test_an_answer_that_fits_the_type_no_more_says_so(store: CheckpointStore) -> None:
    await wire(store, ScriptedLLM([giving(ROME)]), AgentConfig("a", output=City)).run_agent("a", "Which?", run_id="r")
    result = await wire(store, ScriptedLLM([]), AgentConfig("a", output=Point)).resume("r")
    assert isinstance(result, Finished)
    assert result.output is None
    assert result.error.startswith("the answer does not fit the output type as it is now: ")
    with pytest.raises(ConfigError, match="the answer of run 'r' is no Point: "):
        result.output_as(Point)
    assert result.output_as(City) == ROME


async def test_a_type_counts_by_its_schema_when_a_run_is_resumed(store: CheckpointStore) -> None:
    def made(least: int) -> type[BaseModel]:
        class Answer(BaseModel):
            n: Annotated[int, Field(ge=least)]

        return Answer

    async def changes(first: object, then: object, run_id: str) -> list[tuple[str, ...]]:
        failed = await wire(store, ScriptedLLM([]), AgentConfig("a", output=first)).run_agent("a", "x", run_id=run_id)
        assert isinstance(failed, Failed)
        llm = ScriptedLLM([giving({"n": 5})])
        result = await wire(store, llm, AgentConfig("a", output=then)).resume(run_id)
        return [entry.record.changes for entry in result.trace if isinstance(entry.record, ConfigDiffers)]

    assert await changes(made(1), made(1), "same") == []
    assert await changes(made(1), made(2), "other") == [("tool 'final_answer' is defined differently",)]
    assert await changes(None, made(2), "new") == [("tool 'final_answer' is new",)]


async def test_a_run_s_journal_is_a_cassette_of_it_and_replays_its_output() -> None:
    store, agent = MemoryCheckpointStore(), AgentConfig("a", output=City)
    script = [call("look", what="Rome"), "It is Rome.", giving(ROME, confidence=0.5)]
    first = await wire(store, ScriptedLLM(script), agent).run_agent("a", "Which?", run_id="r")
    cassette = await CassetteLLM.from_run(store, "r")
    again = await wire(MemoryCheckpointStore(), cassette, agent).run_agent("a", "Which?")
    assert (again.output, again.confidence, again.answer) == (ROME, 0.5, first.answer)
    async with wire(store, ScriptedLLM([]), agent).replay_stream("r") as replay:
        assert [event.type.value async for event in replay][-1] == "TASK_DONE"
    assert replay.result is not None
    assert replay.result.output_as(City) == ROME


# -- many agents -------------------------------------------------------------------------------------------------------


async def test_tasks_of_a_plan_have_answers_of_their_agents_types(store: CheckpointStore) -> None:
    def choose(request: LLMRequest) -> Reply:
        if request.response_schema is not None:
            return '{"answer": "Rome it is.", "confidence": 0.9}'
        return giving(ROME) if request.system == "c" else giving({"x": 4})

    agents = AgentConfig("c", "", "c", output=City), AgentConfig("p", "", "p", output=Point)
    plan = Plan([Task("t", "c", "Which?"), Task("u", "p", "Where?", depends_on=("t",))])
    llm = ScriptedLLM(choose)
    result = await wire(store, llm, *agents).run_plan(plan, run_id="r")
    assert isinstance(result, Finished)
    assert (result.answer, result.output) == ("Rome it is.", None)
    assert result.output_as(City, task_id="t") == ROME
    assert result.output_as(Point, task_id="u") == Point(4)
    assert '"name":"Rome"' in next(r for r in llm.requests if r.system == "p").messages[0].text
    with pytest.raises(ConfigError, match="no result of a task 'v'"):
        result.output_as(City, task_id="v")
    one = await wire(store, llm, *agents).resume("r:t:c")
    assert one.output == ROME


async def test_a_delegating_agent_sees_the_json(store: CheckpointStore) -> None:
    llm = ScriptedLLM(
        lambda request: (
            giving(ROME)
            if request.system == "c"
            else (call("delegate_to_c", task="Which?") if len(request.messages) == 1 else giving({"x": 1}))
        )
    )
    agents = AgentConfig("p", "", "p", output=Point), AgentConfig("c", "", "c", ("look",), output=City)
    result = await wire(store, llm, *agents, tools=[look, delegate("c")]).run_agent("p", "Where?")
    assert result.output == Point(1)
    shown = [part.text for m in llm.requests[-1].messages for part in m.parts if isinstance(part, ToolResult)]
    assert [City.model_validate_json(text) for text in shown] == [ROME]


async def test_a_routed_run_has_the_output_of_the_agent_that_was_chosen(store: CheckpointStore) -> None:
    llm = ScriptedLLM(lambda request: '{"agent_id": "c"}' if request.response_schema else giving(ROME))
    runtime = wire(store, llm, AgentConfig("p", output=Point), AgentConfig("c", output=City))
    assert (await runtime.run_routed("Which?")).output == ROME
    assert (await runtime.route("Which?"))[0] == "c"


# -- wrong types -------------------------------------------------------------------------------------------------------


class Plain:
    """Nothing that could be validated."""


@pytest.mark.parametrize("output", [3, "City", Plain, ROME, lambda n: n, Callable[[int], int]])
def test_a_type_that_cannot_be_validated_is_refused_when_it_is_wired(output: object) -> None:
    with pytest.raises(ConfigError, match=r"AgentConfig.output of agent 'a' must be a type that pydantic can validate"):
        wire(MemoryCheckpointStore(), ScriptedLLM([]), AgentConfig("a", output=output))


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@contextmanager
def serving(*deltas: Mapping[str, object]) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """A chat-completions server that gives one delta after the other."""
    asked: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            delta = deltas[len(asked) - 1]
            ended = "tool_calls" if "tool_calls" in delta else "stop"
            chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
                      {"choices": [{"index": 0, "delta": {}, "finish_reason": ended}]}]  # fmt: skip
            body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def calling(name: str, arguments: object) -> dict[str, object]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"tool_calls": [{"index": 0, "id": "c1", "function": function}]}


async def test_openai_native(store: CheckpointStore) -> None:
    wrong = {"answer": {"name": "rome", "people": 1}, "confidence": 0.9}
    right = {"answer": {"name": "Rome", "people": 1}, "confidence": 0.9}
    with serving(calling("look", {"what": "Rome"}), calling("final_answer", wrong), calling("final_answer", right)) as (
        url,
        asked,
    ):
        llm = OpenAILLM("m", base_url=url)
        result = await wire(store, llm, AgentConfig("a", "", "Look.", output=City)).run_agent("a", "Which?")
        await llm.aclose()
    assert (result.output, result.confidence) == (City(name="Rome", people=1), 0.9)
    assert [spec["function"]["name"] for spec in asked[0]["tools"]] == ["look", "final_answer"]  # type: ignore[index,attr-defined]
    assert asked[0]["messages"][0] == {"role": "system", "content": "Look."}  # type: ignore[index]
    assert "response_format" not in asked[0]
    assert "a city begins with a capital letter" in asked[2]["messages"][-1]["content"]  # type: ignore[index]


@pytest.mark.parametrize("tools", [(look,), ()])
async def test_openai_text(store: CheckpointStore, tools: object) -> None:
    steps: list[dict[str, object]] = [
        {"thought": "now", "action": "finish", "answer": {"name": "Rome", "people": -1}, "confidence": 0.7},
        {"thought": "so", "action": "finish", "answer": {"name": "Rome", "people": 1}, "confidence": 0.7},
    ]
    if tools:
        steps.insert(0, {"thought": "first", "action": "look", "args": {"what": "Rome"}})
    with serving(*({"content": json.dumps(step)} for step in steps)) as (url, asked):
        llm = OpenAILLM("m", base_url=url, tool_calls="text")
        result = await wire(store, llm, AgentConfig("a", "", "Look.", output=City), tools=tools).run_agent(
            "a", "Which?"
        )
        await llm.aclose()
    assert (result.output, result.confidence) == (City(name="Rome", people=1), 0.7)
    schema = asked[0]["response_format"]["json_schema"]["schema"]  # type: ignore[index]
    finish = schema["anyOf"][-1]["properties"]
    assert finish["answer"] == {"$ref": "#/$defs/final_answer.City"}
    assert schema["$defs"]["final_answer.City"]["properties"]["twins"]["items"] == finish["answer"]
    assert len(schema["anyOf"]) == 1 + len(tools), "the answer is no tool here"  # type: ignore[arg-type]
    system = asked[0]["messages"][0]["content"]  # type: ignore[index]
    assert "schema of answer: " in system
    assert "final_answer" not in system
    assert "Input should be greater than or equal to 0" in asked[-1]["messages"][-1]["content"]  # type: ignore[index]


def test_the_command_takes_a_type_from_beside_its_file_once_that_is_trusted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from harness.cli import main

    monkeypatch.chdir(tmp_path)
    module = f"types_{tmp_path.name.replace('-', '_')}"
    Path(f"{module}.py").write_text("from dataclasses import dataclass\n\n@dataclass\nclass Town:\n    people: int\n")

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["harness", *words])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    right = calling("final_answer", {"answer": {"people": 3}, "confidence": 1})
    with serving(calling("final_answer", {"answer": {"people": "many"}, "confidence": 1}), right) as (url, asked):
        Path("harness.toml").write_text(f'[agents.a]\ntools = []\noutput = "{module}:Town"\n')
        words = "run", "How many?", "--llm", f"{url}#m", "--protocol", "native"
        code, _, err = command(*words)
        assert (code, f"code '{module}:Town' (agent 'a')" in err) == (2, True), err
        code, out, err = command(*words, "--trust")
        assert code == 0, err
        assert '{"people": 3}' in out
        assert len(asked) == 2
        for word, said in [
            (f"{module}:Towm", "AttributeError"),
            ("no.such.module:Town", "ModuleNotFoundError"),
            ("Town", "it must be written 'module:name'"),
            (f"{module}:dataclass", "AgentConfig.output of agent 'a' must be a type"),
        ]:
            Path("harness.toml").write_text(f'[agents.a]\ntools = []\noutput = "{word}"\n')
            code, _, err = command(*words, "--trust")
            assert (code, said in err) == (2, True), err
            assert "harness.toml:3: cannot load the output" in err or "AgentConfig.output" in err


# -- whatever a model writes -------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["answer", "confidence", "x", "y", "name"]), inner, max_size=3)
    ),
    max_leaves=6,
)
WRITTEN = st.one_of(
    st.builds(json.dumps, JSON),
    st.builds(lambda value: json.dumps(json.dumps(value)), JSON),
    st.text(max_size=20),
    st.just('{"x": 1, "y": 2}'),
    st.just('{"answer": {"x": 1}, "confidence": "90%"}'),
)


def given_as(form: str, text: str) -> Reply:
    made = call("final_answer", answer=text)
    return {"text": text, "tool": made, "arguments": ToolCall(made.id, made.name, text)}[form]


@settings(max_examples=150, deadline=None)
@given(written=st.lists(st.tuples(st.sampled_from(["text", "tool", "arguments"]), WRITTEN), min_size=1, max_size=4))
def test_whatever_a_model_writes_the_output_is_of_the_type_or_the_run_fails(written: list[tuple[str, str]]) -> None:
    replies = [given_as(form, text) for form, text in written]

    def choose(request: LLMRequest) -> Reply:
        steps = sum(message.role == "assistant" for message in request.messages)
        return replies[min(steps, len(replies) - 1)]

    llm = ScriptedLLM(choose)
    agent = AgentConfig("a", output=Point)
    result = asyncio.run(wire(MemoryCheckpointStore(), llm, agent, tools=()).run_agent("a", "Where?"))
    if isinstance(result, Finished):
        assert type(result.output) is Point
        assert result.output_as(Point) == result.output
        assert 0 <= result.confidence <= 1
    else:
        assert isinstance(result.trace[-1].record, RunFailed)
        assert result.trace[-1].record.reason == "malformed"
        assert len(llm.requests) == 4
