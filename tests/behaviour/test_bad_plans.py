"""What a planner may write: nothing of it crashes a run, holds it up or spoils its journal."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from harness import (
    AgentConfig,
    AgentRuntime,
    ConfigError,
    Failed,
    FileCheckpointStore,
    Finished,
    MemoryCheckpointStore,
    Plan,
    PlanError,
    RunResult,
    SQLiteCheckpointStore,
    Task,
)
from harness.fold import fold
from harness.keys import join_key
from harness.llm.base import LLMRequest, LLMResponse
from harness.messages import Text
from harness.records import Planned, decode, encode
from harness.testing import ScriptedLLM

GOOD = '{"tasks": [{"id": "t", "agent_id": "a", "instruction": "Do it."}], "rationale": "so"}'
BROUGHT = '{"answer": "It is done."}'
MAX_ASKS = 4
LONGEST_ERROR = 20_000


def tasks(*changes: dict[str, object]) -> str:
    """Write a plan of one task for each change of a good one."""
    good = {"id": "t", "agent_id": "a", "instruction": "Do it."}
    return json.dumps({"tasks": [good | {"id": f"t{n}"} | change for n, change in enumerate(changes)]})


def not_json() -> Iterator[str]:
    yield from ("", " ", "\n", "null", "true", "7", '"tasks"', "[]", "{}", "{", "}", "[", "{]", "{'tasks': []}", "\x00")
    yield from (
        "I would first look around.",
        "```json\n```",
        "```\n[]\n```",
        "<plan/>",
        "tasks:\n- id: t",
        "\ufeff" + GOOD,
    )
    yield from (GOOD + GOOD, GOOD + " and so on", "Here it is: " + GOOD, GOOD[:-1], GOOD[1:], GOOD.replace('"', "'"))
    yield from ("[" * 100_000, '{"a":' * 100_000, '{"tasks":' + "[" * 50_000, '{"tasks":[{"depends_on":' + "[" * 50_000)
    yield from ("x" * 2_000_000, '{"tasks": "' + "y" * 2_000_000 + '"}', '"' + "é" * 1_000_000, "\u202e" * 1000)
    yield from ('{"tasks": [{"id": "\\ud800"}]}', '{"tasks": ["\\u0000"]}', '{"\\u0000": 1}')


def wrong_types() -> Iterator[str]:
    values: list[object] = [None, True, 1, -1, 1.5, "t", [], {}, [[]], [None], [{}], ["t"], {"id": "t"}]
    for value in values:
        if value != []:
            yield json.dumps({"tasks": value})
    for field in ("id", "agent_id", "instruction", "depends_on", "on_failure", "max_retries"):
        for value in values:
            if _is_wrong(field, value):
                yield tasks({field: value})
    yield from (json.dumps([{"id": "t"}]), json.dumps({"plan": json.loads(GOOD)}), json.dumps({"tasks": GOOD}))
    yield from ('{"tasks": NaN}', '{"tasks": [{"max_retries": NaN}]}', '{"tasks": [{"max_retries": Infinity}]}')
    yield tasks({"max_retries": "NUMBER"}).replace('"NUMBER"', "1e400")
    yield from ('{"tasks": [], "tasks": 5}', GOOD.replace("{", '{"tasks": 5, ', 1))
    yield GOOD.replace('"so"', "7")


def _is_wrong(field: str, value: object) -> bool:
    if field in ("id", "instruction"):
        return not isinstance(value, str)
    if field == "depends_on":
        return value != []
    return not (field == "max_retries" and value == 1 and value is not True)


def wrong_shapes() -> Iterator[str]:
    yield '{"tasks": []}'
    yield tasks({"depends_on": ["t0"]})
    yield tasks({"depends_on": ["t1"]}, {"depends_on": ["t0"]})
    yield tasks(*({"depends_on": [f"t{(n + 1) % 40}"]} for n in range(40)))
    yield tasks({"depends_on": ["t1"]}, {"depends_on": ["t2"]}, {"depends_on": ["t1"]})
    yield tasks({"id": "x"}, {"id": "x"})
    yield tasks({"id": "x"}, {"id": "x"}, {"depends_on": ["x"]})
    yield tasks({"depends_on": ["nowhere"]})
    yield tasks({"depends_on": [f"n{n}" for n in range(1000)]})
    for agent in ("", "nobody", "A", "a ", " a", "a/b", "a:b", "coordinator", "a\n", "x" * 100_000):
        yield tasks({"agent_id": agent})
    for bad in ("", "\n", "\t", "a\nb", "\x00", "\x1b[31m", "\u2028", "\u200f", "\x7f", "x" * 65, "x" * 1_000_000):
        yield tasks({"id": bad})
    for text in ("", " ", "\n\t ", "\u2003"):
        yield tasks({"instruction": text})
    for way in ("", "RETRY", "retry ", "ignore", "x" * 100_000):
        yield tasks({"on_failure": way})
    yield from (tasks({"max_retries": -1}), tasks({"max_retries": 11}), tasks({"max_retries": 10**30}))
    yield tasks({"max_retries": -(10**30)})
    yield tasks(*({} for _ in range(51)))
    yield tasks(*({} for _ in range(10_000)))
    yield tasks(*({"agent_id": f"nobody{n}", "depends_on": [f"gone{n}"], "id": ""} for n in range(10_000)))
    yield tasks(*({"agent_id": "nobody" * 500, "depends_on": ["gone" * 500]} for _ in range(400)))


def torn(count: int, seed: int = 7) -> Iterator[str]:
    """Good plans with a piece cut out, turned round or changed for another."""
    chance = random.Random(seed)
    while count:
        plan = tasks({}, {"depends_on": ["t0"]}, {"depends_on": ["t0", "t1"], "on_failure": "skip"})
        for _ in range(chance.randint(1, 4)):
            start = chance.randrange(len(plan))
            end = min(len(plan), start + chance.randint(1, 12))
            plan = plan[:start] + chance.choice(["", plan[start:end][::-1], '"', "{", ",", "\\", "null"]) + plan[end:]
        try:
            msgspec.json.decode(plan)
        except (msgspec.MsgspecError, UnicodeError):
            count -= 1
            yield plan


BAD = [*not_json(), *wrong_types(), *wrong_shapes()]
BAD += torn(200 - len(BAD))


def runtime(plan: Callable[[LLMRequest], str], store: object) -> tuple[AgentRuntime, ScriptedLLM]:
    planner = ScriptedLLM(plan)
    made = AgentRuntime(
        llm=ScriptedLLM(["done"]),
        llm_by_site={"planner": planner, "synthesiser": ScriptedLLM([BROUGHT])},
        agents=[AgentConfig("a"), AgentConfig("b")],
        checkpoint_store=store,  # type: ignore[arg-type]
    )
    return made, planner


def check_journal(result: RunResult) -> None:
    records = [entry.record for entry in result.trace]
    assert decode(encode(records)) == records
    for length in (1, len(records) // 2, len(records)):
        fold(result.run_id, result.trace[:length])


def name(plan: str) -> str:
    return f"{len(plan)}-{plan[:24]!r}".encode("ascii", "replace").decode()


def test_there_are_two_hundred_of_them() -> None:
    assert len({*BAD}) >= 195


@pytest.mark.parametrize("plan", BAD, ids=name)
async def test_a_planner_that_only_writes_bad_plans_fails_the_run(plan: str) -> None:
    made, planner = runtime(lambda _: plan, MemoryCheckpointStore())
    begun = time.monotonic()
    async with made.run_stream("Do it.") as events:
        shown = [event async for event in events]
    assert time.monotonic() - begun < 5
    result = events.result
    assert isinstance(result, Failed), result
    assert result.reason == "plan"
    assert "no plan that can be carried out" in result.error
    assert len(result.error) < LONGEST_ERROR
    assert len(planner.requests) == MAX_ASKS
    assert len(planner.requests[1].messages[-1].text) < LONGEST_ERROR, "what is wrong is said in a bounded space"
    assert shown[-1].type.value == "ERROR"
    check_journal(result)


@pytest.mark.parametrize("plan", BAD[::4], ids=name)
@pytest.mark.parametrize("kind", ["sqlite", "file"])
async def test_a_planner_that_then_writes_a_good_one_is_listened_to(plan: str, kind: str, tmp_path: Path) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db") if kind == "sqlite" else FileCheckpointStore(tmp_path)
    made, planner = runtime(lambda request: GOOD if len(request.messages) > 3 else plan, store)
    result = await made.run("Do it.", run_id="r")
    assert isinstance(result, Finished), result.error
    assert result.answer == "It is done."
    assert len(planner.requests) == 3
    assert "cannot be used" in planner.requests[1].messages[-1].text
    check_journal(result)
    again = [entry.record async for entry in store.read("r")]
    assert again == [entry.record for entry in result.trace]
    await store.close()


async def test_what_is_wrong_is_named_all_at_once() -> None:
    bad = tasks({"id": ""}, {"agent_id": "nobody", "instruction": " "}, {"depends_on": ["gone"], "max_retries": 10**9})
    made, planner = runtime(lambda _: bad, MemoryCheckpointStore())
    result = await made.run("Do it.")
    for word in ("1 to 64", "'nobody'", "no instruction", "'gone'", "max_retries", "a, b"):
        assert word in result.error
        assert word in planner.requests[1].messages[-1].text


async def test_a_failed_plan_is_asked_for_again_by_a_resume() -> None:
    store = MemoryCheckpointStore()
    made, _ = runtime(lambda _: "no", store)
    assert isinstance(await made.run("Do it.", run_id="r"), Failed)
    made, planner = runtime(lambda _: GOOD, store)
    result = await made.resume("r")
    assert isinstance(result, Finished)
    assert len(planner.requests) == 1


@pytest.mark.parametrize("plan", BAD[1::4], ids=name)
async def test_a_replan_that_is_no_plan_leaves_the_plan_as_it_is(plan: str) -> None:
    if plan == '{"tasks": []}':
        pytest.skip("as a replan that is a good one")
    refused = LLMResponse((Text("no"),), "content_filter")
    planner = ScriptedLLM(lambda _: plan)
    made = AgentRuntime(
        llm=ScriptedLLM(lambda request: refused if request.messages[0].text == "Fail." else "done"),
        llm_by_site={"planner": planner, "synthesiser": ScriptedLLM([BROUGHT])},
        agents=[AgentConfig("a")],
        checkpoint_store=MemoryCheckpointStore(),
    )
    tasks_by_hand = (Task("ok", "a", "Do."), Task("t", "a", "Fail."), Task("u", "a", "Then.", ("t",)))
    result = await made.run_plan(Plan(tasks_by_hand))
    assert isinstance(result, Finished), result.error
    assert {id_: task.status for id_, task in result.task_results.items()} == {
        "ok": "done", "t": "failed", "u": "skipped"
    }  # fmt: skip
    assert len(planner.requests) == MAX_ASKS
    check_journal(result)


@pytest.mark.parametrize(
    "odd",
    [
        tasks({"id": "a/b"}, {"id": "../../x", "depends_on": ["a/b"]}),
        tasks({"id": "a:b"}, {"id": "%2F", "depends_on": ["a:b"]}, {"id": "a%3Ab"}),
        tasks({"id": "."}, {"id": "1/2.3"}, {"id": "delegate"}, {"id": "delegate/1.0/a"}),
        tasks({"id": "'; DROP TABLE runs; --"}, {"id": "é漢字😀"}, {"id": "x" * 64}),
        tasks({"depends_on": ["t1", "t1"]}, {}),
        tasks({"unknown": [1, {"deep": None}]}),
        tasks({"instruction": "\x00\x1b[31m\u202e" + "z" * 100_000}),
        tasks({"instruction": "Do it.\ufffe\U0010ffff"}),
        tasks({"max_retries": 10, "on_failure": "retry"}),
        f"```json\n{GOOD}\n```",
        f"\n\n  {GOOD}  \n",
        '{"tasks": [{"id": "x", "id": "t", "agent_id": "b", "agent_id": "a", "instruction": "Do."}]}',
    ],
    ids=name,
)
@pytest.mark.parametrize("kind", ["sqlite", "file"])
async def test_odd_plans_that_can_be_carried_out_are(odd: str, kind: str, tmp_path: Path) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db") if kind == "sqlite" else FileCheckpointStore(tmp_path / "runs")
    made, planner = runtime(lambda _: odd, store)
    async with made.run_stream("Do it.", run_id="r") as events:
        shown = [event async for event in events]
    assert isinstance(events.result, Finished), events.result
    assert len(planner.requests) == 1
    assert all(task.status == "done" for task in events.result.task_results.values())
    assert msgspec.json.encode([dict(event.payload) for event in shown])
    [planned] = [entry.record for entry in events.result.trace if isinstance(entry.record, Planned)]
    for task in planned.tasks:
        assert (await made.resume(join_key("r", task.id, task.agent_id))).answer == "done"
    check_journal(events.result)
    assert [entry.record async for entry in store.read("r")] == [entry.record for entry in events.result.trace]
    await store.close()


def test_untyped_callers_are_told_what_is_wrong() -> None:
    for wrong in (["a"], [Task("a", "x", 5)], [Task("b", "x", "do", depends_on="a"), Task("a", "x", "do")]):  # type: ignore[arg-type]
        with pytest.raises(PlanError):
            Plan(wrong)  # type: ignore[arg-type]


async def test_untyped_goals_plans_and_keys_are_told_what_is_wrong() -> None:
    runtime = AgentRuntime(llm=ScriptedLLM(["x"]), agents=[AgentConfig("x")], checkpoint_store=MemoryCheckpointStore())
    for call in (
        lambda: runtime.dispatch(None),  # type: ignore[arg-type]
        lambda: runtime.run_plan([Task("a", "x", "do")]),  # type: ignore[arg-type]
        lambda: runtime.resume(None),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError):
            await call()
