"""Functions and objects as tools: their schema, their arguments, their results, and where they run."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import datetime
import enum
import functools
import json
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import ConfigError, ToolError
from harness.messages import JSON, Image
from harness.tools import (
    InvalidArguments,
    NotDone,
    Reconciles,
    Tool,
    ToolContext,
    ToolOutput,
    ToolSpec,
    Unknown,
    as_tool,
    definition_hash,
    describe_arguments,
    run_in_thread,
    tool,
)

CONTEXT: ToolContext[object] = ToolContext("run", "0/0", {"user": "ada"})


async def call(thing: object, arguments: str = "{}") -> ToolOutput:
    made = as_tool(thing)
    return await made(made.validate(arguments), CONTEXT)


def refusal(thing: object, arguments: str) -> str:
    with pytest.raises(InvalidArguments) as caught:
        as_tool(thing).validate(arguments)
    return str(caught.value)


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Person(pydantic.BaseModel):
    name: str
    age: int | None = None


class Pair(msgspec.Struct):
    left: int
    right: bytes = b""


# --- importing ------------------------------------------------------------------------------------------------------


def test_importing_the_tools_does_not_load_pydantic() -> None:
    code = (
        "import sys, harness.tools as t\n"
        "heavy = {'pydantic', 'pydantic_core', 'docstring_parser'}\n"
        "assert not heavy & set(sys.modules), sys.modules.keys()\n"
        "t.tool(name='one')(lambda: 1)\n"
        "assert 'pydantic' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- schema ---------------------------------------------------------------------------------------------------------


def test_schema_comes_from_the_signature() -> None:
    @tool
    def find(text: str, limit: int = 10, *, kind: Literal["a", "b"] = "a", color: Color | None = None) -> None:
        """Find things.

        Longer words.

        Args:
            text: what to
                find.
            limit: how many.
        """

    assert find.spec.name == "find"
    assert find.spec.description == "Find things.\n\nLonger words."
    assert find.spec.effect == "once"
    schema = find.spec.schema
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["text"]
    properties = schema["properties"]
    assert isinstance(properties, dict)
    assert properties["text"] == {"type": "string", "description": "what to find."}
    assert properties["limit"] == {"type": "integer", "default": 10, "description": "how many."}
    assert properties["kind"] == {"type": "string", "enum": ["a", "b"], "default": "a"}


@pytest.mark.parametrize(
    "docstring",
    [
        "Say.\n\nArgs:\n    word: what is said.",
        "Say.\n\nParameters\n----------\nword : str\n    what is said.",
        "Say.\n\n:param word: what is said.",
    ],
)
def test_docstring_styles(docstring: str) -> None:
    def say(word: str) -> None: ...

    say.__doc__ = docstring
    spec = as_tool(say).spec
    assert spec.description == "Say."
    assert describe_arguments(spec.schema) == ["- word (string, required): what is said."]


def test_annotated_text_goes_before_the_docstring() -> None:
    def say(
        a: Annotated[int, "plain"],
        b: Annotated[int, pydantic.Field(description="field", ge=3)],
        c: int = pydantic.Field(5, description="default"),
    ) -> None:
        """Say.

        Args:
            a: docstring.
            b: docstring.
            c: docstring.
        """

    assert describe_arguments(as_tool(say).spec.schema) == [
        "- a (integer, required): plain",
        "- b (integer, required): field",
        "- c (integer, optional, default 5): default",
    ]
    assert as_tool(say).validate('{"a": 1, "b": 3}') == {"a": 1, "b": 3, "c": 5}
    assert "b: Input should be greater than or equal to 3, not 2" in refusal(say, '{"a": 1, "b": 2}')


def test_examples_of_a_docstring_are_not_shown_to_the_model() -> None:
    def say(word: str) -> None:
        """Say a word.

        >>> say("folder/")
        """

    assert as_tool(say).spec.description == "Say a word."


async def test_values_arrive_converted() -> None:
    seen: list[object] = []

    def take(
        point: Point, person: Person, color: Color, when: datetime.date, tags: set[str], pair: tuple[int, str]
    ) -> None:
        seen.extend([point, person, color, when, tags, pair])

    await call(
        take,
        '{"point": {"x": 1}, "person": {"name": "Ada"}, "color": "red", "when": "2026-01-02",'
        ' "tags": ["a", "a"], "pair": [1, "b"]}',
    )
    assert seen == [Point(1), Person(name="Ada"), Color.RED, datetime.date(2026, 1, 2), {"a"}, (1, "b")]


async def test_types_of_the_enclosing_function_resolve() -> None:
    @dataclasses.dataclass
    class Local:
        n: int

    @tool
    async def take(value: Local) -> int:
        return value.n

    assert (await call(take, '{"value": {"n": 4}}')).text == "4"


@pytest.mark.parametrize("name", ["schema", "model_config", "json", "_x", "self_", "copy", "class_"])
async def test_any_parameter_name_will_do(name: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def echo({name}: int) -> int: return {name}", scope)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (await call(scope["echo"], f'{{"{name}": 3}}')).text == "3"


async def test_parameters_without_annotation_take_any_json() -> None:
    def echo(value, other=None):  # type: ignore[no-untyped-def]
        return [value, other]

    assert (await call(echo, '{"value": {"a": [1, null]}}')).text == '[{"a":[1,null]},null]'


async def test_the_context_is_injected_by_type_and_hidden() -> None:
    def plain(a: int, context: ToolContext) -> str:  # type: ignore[type-arg]
        return f"{a} {context.run_id}"

    async def typed(ctx: ToolContext[dict[str, str]], a: int = 2) -> str:
        return f"{a} {ctx.deps['user']}"

    def optional(a: int, c: ToolContext[object] | None = None) -> str:
        return f"{a} {c.idempotency_key if c else None}"

    for function, expected in ((plain, "1 run"), (typed, "1 ada"), (optional, f"1 {CONTEXT.idempotency_key}")):
        made = as_tool(function)
        properties = made.spec.schema["properties"]
        assert isinstance(properties, dict)
        assert list(properties) == ["a"]
        assert (await call(made, '{"a": 1}')).text == expected
    assert "c: not accepted" in refusal(optional, '{"a": 1, "c": {"run_id": "x"}}')


def test_what_cannot_be_a_tool_is_refused_when_it_is_made() -> None:
    def star(*values: int) -> None: ...
    def keywords(**values: int) -> None: ...
    def unknown(value: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
    def no_schema(value: Callable[[], int]) -> None: ...
    def generator() -> Iterator[int]:
        yield 1

    class Empty:
        pass

    for thing, text in (
        (star, "takes *values"),
        (keywords, "takes **kwargs"),
        (unknown, "'Nowhere' of 'value' cannot be resolved"),
        (no_schema, "cannot be described to a model"),
        (generator, "yields"),
        (lambda: 1, "'<lambda>'"),
        (Empty(), "async execute(**kwargs)"),
        (Point, "not a class"),
        (3, "is not a tool"),
        (None, "is not a tool"),
    ):
        with pytest.raises(ConfigError) as caught:
            as_tool(thing)
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"effect": "twice"},
        {"effect": None},
        {"timeout_s": 0},
        {"timeout_s": -1},
        {"timeout_s": float("nan")},
        {"timeout_s": float("inf")},
        {"timeout_s": "3"},
        {"timeout_s": True},
        {"name": ""},
        {"name": "a b"},
        {"name": "a" * 65},
        {"name": 3},
        {"description": 3},
        {"reconcile": "no"},
    ],
)
def test_a_bad_option_is_refused_at_decoration(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        tool(**options)


# --- what may be a tool ---------------------------------------------------------------------------------------------


async def test_methods_partials_and_callable_objects() -> None:
    class Counter:
        def __init__(self, start: int) -> None:
            self.start = start

        @tool(effect="read")
        def peek(self, add: int) -> int:
            """Look."""
            return self.start + add

        async def bump(self, by: int = 1) -> int:
            self.start += by
            return self.start

        async def __call__(self, n: int) -> int:
            return self.start * n

    def power(base: int, exponent: int, token: str) -> str:
        return f"{base**exponent} {token}"

    counter = Counter(5)
    assert as_tool(counter.peek).spec.effect == "read"
    assert as_tool(counter.peek).spec.description == "Look."
    assert (await call(counter.peek, '{"add": 2}')).text == "7"
    assert (await call(counter.bump, '{"by": 2}')).text == "7"
    assert (await call(counter, '{"n": 2}')).text == "14"
    bound = as_tool(functools.partial(power, 2, token="secret"))
    assert bound.spec.name == "power"
    assert "secret" not in json.dumps(bound.spec.schema)
    assert "token: not accepted" in refusal(bound, '{"exponent": 3, "token": "stolen"}')
    assert (await call(bound, '{"exponent": 3}')).text == "8 secret"


async def test_wrapped_and_positional_only_functions() -> None:
    def twice(function: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> int:
            return 2 * function(*args, **kwargs)

        return wrapper

    @twice
    def subtract(a: int, b: int = 1, /, *, c: int = 0) -> int:
        return a - b - c

    assert (await call(subtract, '{"c": 1, "a": 5}')).text == "6"


async def test_objects_with_name_and_execute() -> None:
    class Weather:
        """Tells the weather."""

        name = "weather"
        effect = "read"
        timeout_s = 3
        parameters = {  # noqa: RUF012 - as users write it
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "enum": [1, 2]}},
            "required": ["city"],
            "additionalProperties": False,
        }

        async def execute(self, **kwargs: object) -> object:
            return kwargs

    class Free:
        name = "free"
        description = "Anything goes."

        async def execute(self, **kwargs: object) -> object:
            return kwargs

    class Typed:
        name = "typed"

        def execute(self, a: int, context: ToolContext[object]) -> str:
            """Add."""
            return f"{a} {context.call_id}"

    spec = as_tool(Weather()).spec
    assert (spec.name, spec.effect, spec.timeout_s, spec.description) == ("weather", "read", 3.0, "Tells the weather.")
    assert (await call(Weather(), '{"city": "Rome", "days": 2}')).text == '{"city":"Rome","days":2}'
    text = refusal(Weather(), '{"days": 3, "town": "Rome"}')
    assert all(part in text for part in ("city: missing", "days: must be one of 1, 2, not 3", "town: not accepted"))
    assert as_tool(Free()).spec.description == "Anything goes."
    assert (await call(Free(), '{"x": [1]}')).text == '{"x":[1]}'
    assert as_tool(Typed()).spec.description == "Add."
    assert (await call(Typed(), '{"a": 1}')).text == "1 0/0"


def test_an_object_with_a_schema_that_is_none_is_refused() -> None:
    class Odd:
        name = "odd"
        schema = {"type": "array"}  # noqa: RUF012

        async def execute(self, **kwargs: object) -> None: ...

    with pytest.raises(ConfigError, match="JSON schema of type 'object'"):
        as_tool(Odd())


def test_a_tool_passes_through() -> None:
    class Own:
        spec = ToolSpec("own", "", {"type": "object"})

        def validate(self, arguments: str, /) -> dict[str, object]:
            return {}

        async def __call__(self, args: object, context: object, /) -> ToolOutput:
            return ToolOutput("own")

    own = Own()
    assert as_tool(own) is own
    assert isinstance(own, Tool)
    made = tool(name="f")(lambda: 1)
    assert as_tool(made) is made
    with pytest.raises(ConfigError, match="a tool already"):
        tool(made)


# --- arguments ------------------------------------------------------------------------------------------------------


@tool(effect="read")
async def lookup(path: str, depth: int = 2, point: Point | None = None, names: list[str] | None = None) -> str:
    """Look up.

    Args:
        path: where.
    """
    return f"{path} {depth} {point} {names}"


def test_all_errors_come_at_once_with_what_is_accepted() -> None:
    text = refusal(lookup, '{"depth": "deep", "point": {"y": 1, "z": 2}, "nmaes": ["a"], "names": [1]}')
    assert text.splitlines() == [
        "Invalid arguments for tool 'lookup':",
        "- path: missing",
        '- depth: Input should be a valid integer, unable to parse string as an integer, not "deep"',
        "- point.x: missing",
        "- point.z: not accepted",
        "- names[0]: Input should be a valid string, not 1",
        "- nmaes: not accepted",
        "Accepted arguments, as one JSON object:",
        "- path (string, required): where.",
        "- depth (integer, optional, default 2)",
        "- point (object {x: integer, y (optional): integer} or null, optional)",
        "- names (list of string or null, optional)",
    ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ('{"path": NaN}', "not valid JSON"),
        ('{"path": "a", "depth": Infinity}', "not valid JSON"),
        ('{"path": "a", "depth": 1e999}', "not valid JSON"),
        ('{"path": "a"', "not valid JSON"),
        ('{"path": "a"} {"path": "b"}', "not valid JSON"),
        ('{{"path": "a"}}', "not valid JSON"),
        ("{'path': 'a'}", "not valid JSON"),
        ('"{\\"path\\": \\"a\\"}"', "must be one JSON object"),
        ("[]", "must be one JSON object"),
        ("null", "must be one JSON object"),
        ("3", "must be one JSON object"),
        ('{"path": "a", "path": "b"}', '"path" twice'),
        ('{"path": "a", "p\\u0061th": "b"}', '"path" twice'),
        ('{"path": "a", "point": {"x": 1, "x": 2}}', '"x" twice'),
        ('{"path": "a:b", "path": "c"}', '"path" twice'),
        ('{"path": "\ud800"}', "not valid JSON"),
        ('{"path": "\\ud800"}', "not valid JSON"),
        ('{"path": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_text_that_is_not_one_strict_object(arguments: str, problem: str) -> None:
    text = refusal(lookup, arguments)
    assert problem in text
    assert "- path (string, required)" in text
    text.encode()


@pytest.mark.parametrize("arguments", ["", " ", "\n", "{}", " {} "])
async def test_empty_arguments_are_an_empty_object(arguments: str) -> None:
    @tool(effect="read")
    def now() -> str:
        return "12:00"

    assert (await call(now, arguments)).text == "12:00"
    assert "path: missing" in refusal(lookup, arguments)
    assert "It takes no arguments: write {}." in refusal(now, '{"a": 1}')


def test_the_error_text_is_bounded() -> None:
    text = refusal(lookup, json.dumps({"path": "a", "names": list(range(10_000))}))
    assert "and 9980 more" in text
    assert len(text) < 3000
    assert len(refusal(lookup, json.dumps({"x" * 100_000: "y" * 100_000}))) < 1000


def test_a_validator_that_breaks_is_an_argument_error() -> None:
    class Broken(pydantic.BaseModel):
        n: int

        @pydantic.field_validator("n")
        @classmethod
        def fail(cls, n: int) -> int:
            if n == 1:
                raise ValueError("n must not be 1")
            raise RuntimeError("boom")

    def take(value: Broken) -> None: ...

    assert "value.n: Value error, n must not be 1" in refusal(take, '{"value": {"n": 1}}')
    assert "RuntimeError: boom" in refusal(take, '{"value": {"n": 2}}')


class Everything:
    name = "everything"
    schema = {  # noqa: RUF012
        "type": "object",
        "properties": {
            "a": {"type": ["integer", "null"]},
            "b": {"type": "array", "items": {"$ref": "#/$defs/b"}},
            "c": {"anyOf": [{"type": "string"}]},
            "d": {"const": True},
            "e": {"$ref": "#/$defs/nowhere"},
            "f": {"$ref": "#"},
        },
        "required": ["a"],
        "additionalProperties": {"type": "number"},
        "$defs": {"b": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}},
    }

    async def execute(self, **kwargs: object) -> None: ...


JSON_VALUES: st.SearchStrategy[JSON] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["path", "depth", "point", "names", "a", "b", "c", "d", "e", "f", "x"])
JSON_TEXTS = (
    st.dictionaries(NAMES, JSON_VALUES).map(json.dumps)
    | JSON_VALUES.map(json.dumps)
    | st.dictionaries(NAMES, JSON_VALUES).map(lambda value: json.dumps(value, ensure_ascii=False)[:-1])
    | st.text()
    | st.text(alphabet='{}[]":,\\0123eE+-.nulltrefasNI path', max_size=40)
)


@settings(deadline=None, max_examples=200)
@given(text=JSON_TEXTS, thing=st.sampled_from([lookup, as_tool(Everything())]))
def test_any_text_gives_arguments_or_a_refusal(text: str, thing: Tool) -> None:
    try:
        args = thing.validate(text)
    except InvalidArguments as error:
        str(error).encode()
        return
    assert isinstance(args, dict)
    assert all(isinstance(name, str) for name in args)


VALUES: list[tuple[object, st.SearchStrategy[object]]] = [
    (int, st.integers(-(2**63), 2**63)),
    (str, st.text(st.characters(codec="utf-8"))),
    (float, st.floats(allow_nan=False, allow_infinity=False)),
    (bool, st.booleans()),
    (list[int], st.lists(st.integers(0, 9))),
    (dict[str, bool], st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), st.booleans(), max_size=3)),
    (int | None, st.none() | st.integers(0, 9)),
    (Color, st.sampled_from(Color)),
    (Point, st.builds(Point, st.integers(0, 9), st.integers(0, 9))),
    (Person, st.builds(Person, name=st.text(st.characters(codec="utf-8")))),
    (datetime.datetime, st.datetimes()),
    (Literal["a", 1], st.sampled_from(["a", 1])),
]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_typed_signature_round_trips(data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=4))
    names = [f"p{index}" for index in range(len(chosen))]

    scope: dict[str, Any] = {f"T{index}": annotation for index, (annotation, _) in enumerate(chosen)}
    exec(f"def function({', '.join(f'{n}: T{i}' for i, n in enumerate(names))}): ...", scope)
    made = as_tool(scope["function"])
    values = {name: data.draw(strategy) for name, (_, strategy) in zip(names, chosen, strict=True)}
    text = pydantic.TypeAdapter(dict[str, Any]).dump_json(values).decode()
    assert made.validate(text) == values
    assert made.spec.schema["required"] == names


# --- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("plain", "plain"),
        ("", ""),
        (None, "null"),
        (True, "true"),
        (3.5, "3.5"),
        (float("nan"), '"NaN"'),
        ({"a": [1, (2, None)]}, '{"a":[1,[2,null]]}'),
        ({1: "x"}, '{"1":"x"}'),
        (Point(1), '{"x":1,"y":0}'),
        ([Person(name="Ada")], '[{"name":"Ada","age":null}]'),
        (Pair(1, b"\xff"), '{"left":1,"right":"/w=="}'),
        ([{"pair": Pair(2)}], '[{"pair":{"left":2,"right":""}}]'),
        (Color.RED, '"red"'),
        (datetime.date(2026, 1, 2), '"2026-01-02"'),
        (b"bytes", "bytes"),
        (b"\xff", "(1 bytes that are not UTF-8 text, as base64) /w=="),
        ({"data": b"\xff", "when": datetime.date(2026, 1, 2)}, None),
        ("caf\u00e9 \ud800", "café \ufffd"),
        ("\ud83d\ude00", "\U0001f600"),
        ({"\ud800": ["\udfff", Point(3), Color.RED, {4}]}, '{"\ufffd":["\ufffd",{"x":3,"y":0},"red",[4]]}'),
        (ToolOutput("out", (Image("https://x.example/a.png"),)), "out"),
        (ToolOutput("\ud800"), "\ufffd"),
    ],
)
async def test_results_as_text(result: object, text: str | None) -> None:
    async def give() -> object:
        return result

    def give_plainly() -> object:
        return result

    for function in (give, give_plainly):
        output = await call(function)
        assert output.representable, output.text
        assert text is None or output.text == text
        msgspec.json.encode(output)


async def test_images_travel_apart() -> None:
    image = Image("https://x.example/a.png")

    def one() -> Image:
        return image

    def several() -> list[object]:
        return ["before", image, "after", image]

    def mixed() -> list[object]:
        return [{"n": 1}, image]

    assert await call(one) == ToolOutput("(1 image)", (image,))
    assert await call(several) == ToolOutput("before\nafter\n(2 images)", (image, image))
    assert await call(mixed) == ToolOutput('[{"n":1}]\n(1 image)', (image,))


class Hostile:
    def __getattr__(self, name: str) -> object:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


def deep() -> object:
    value: list[object] = []
    for _ in range(10**6):
        value = [value]
    return value


def circular() -> object:
    value: list[object] = []
    value.append(value)
    return value


def half_surrogate_object() -> object:
    return {"\ud800": object()}


@pytest.mark.parametrize(
    "make",
    [
        object,
        Hostile,
        deep,
        circular,
        half_surrogate_object,
        threading.Lock,
        lambda: Point,
        lambda: lambda: 1,
        lambda: ToolOutput(3),  # type: ignore[arg-type]
        lambda: [Image(5)],  # type: ignore[arg-type]
        lambda: (n for n in (1, 2)),
        lambda: Person.model_construct(name=object()),  # type: ignore[arg-type]
    ],
)
async def test_a_result_that_cannot_be_written_is_no_error(make: Callable[[], object]) -> None:
    async def give() -> object:
        return make()

    def give_plainly() -> object:
        return make()

    for function in (give, give_plainly):
        output = await call(function)
        assert not output.representable
        assert output.text.startswith("succeeded, but its result (type ")
        assert len(output.text) < 500
        msgspec.json.encode(output)


# --- running --------------------------------------------------------------------------------------------------------


async def test_plain_functions_run_beside_the_loop_with_the_context_of_the_caller() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("seen")

    def where() -> list[object]:
        return [
            threading.current_thread() is threading.main_thread(),
            threading.current_thread().daemon,
            variable.get(),
        ]

    assert (await call(where)).text == '[false,true,"seen"]'


async def test_blocking_tools_run_side_by_side() -> None:
    barrier = threading.Barrier(8, timeout=5)

    def meet() -> int:
        return barrier.wait()

    outputs = await asyncio.gather(*(call(meet) for _ in range(8)))
    assert sorted(int(output.text) for output in outputs) == list(range(8))


async def test_an_idle_thread_is_used_again() -> None:
    first = await run_in_thread(threading.get_ident)
    for _ in range(100):  # the thread goes idle right after its result is on its way
        if await run_in_thread(threading.get_ident) == first:
            return
    pytest.fail("every call had a thread of its own")


async def test_a_plain_function_may_return_something_to_await() -> None:
    async def later() -> str:
        assert threading.current_thread() is threading.main_thread()
        return "later"

    def start() -> object:
        return later()

    assert (await call(start)).text == "later"


async def test_cancel_abandons_the_thread() -> None:
    release, ended = threading.Event(), threading.Event()

    def hang() -> str:
        release.wait(10)
        ended.set()
        return "nobody hears this"

    task = asyncio.create_task(call(hang))
    await asyncio.sleep(0.01)
    began = time.perf_counter()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.perf_counter() - began < 1
    release.set()
    assert await run_in_thread(lambda: ended.wait(5))
    await asyncio.sleep(0)


def test_a_hanging_tool_does_not_keep_the_process() -> None:
    code = (
        "import asyncio, threading\n"
        "from harness.tools import run_in_thread\n"
        "async def main():\n"
        "    task = asyncio.create_task(run_in_thread(threading.Event().wait))\n"
        "    await asyncio.sleep(0.01)\n"
        "    task.cancel()\n"
        "    await asyncio.gather(task, return_exceptions=True)\n"
        "asyncio.run(main())\n"
        "print('out')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=20, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("out\n", "")


class Odd(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (ValueError("bad"), ValueError, "bad"),
        (ToolError("for the model"), ToolError, "for the model"),
        (SystemExit(3), ToolError, "SystemExit: 3"),
        (KeyboardInterrupt(), ToolError, "KeyboardInterrupt"),
        (GeneratorExit(), ToolError, "GeneratorExit"),
        (asyncio.CancelledError(), ToolError, "CancelledError"),
        (Odd("odd"), ToolError, "Odd: odd"),
        (StopIteration(1), RuntimeError, "StopIteration"),
    ],
)
async def test_exceptions_reach_the_caller_and_never_the_loop(
    error: BaseException, expected: type[Exception], text: str
) -> None:
    async def fail() -> None:
        raise error

    def fail_plainly() -> None:
        raise error

    for function in (fail, fail_plainly):
        with pytest.raises(expected) as caught:
            await call(function)
        assert text in str(caught.value)


async def test_our_own_cancellation_is_not_an_error_of_the_tool() -> None:
    started = asyncio.Event()

    async def wait() -> None:
        started.set()
        await asyncio.sleep(10)

    task = asyncio.create_task(call(wait))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await call(wait)


def test_closing_the_coroutine_of_a_call_is_quiet() -> None:
    async def wait() -> None:
        await asyncio.Future()

    async def start() -> Any:
        coroutine = as_tool(wait)({}, CONTEXT)
        coroutine.send(None)  # type: ignore[attr-defined]
        return coroutine

    coroutine = asyncio.run(start())
    coroutine.close()


# --- reconcile ------------------------------------------------------------------------------------------------------


async def test_reconcile() -> None:
    async def found(key: str) -> object:
        return {"key": key}

    def not_done(key: str) -> object:
        return NotDone()

    def unknown(key: str) -> object:
        return Unknown()

    def quits(key: str) -> object:
        raise SystemExit(1)

    def make(reconcile: Callable[[str], object]) -> Tool:
        @tool(reconcile=reconcile)
        def pay(cents: int) -> str:
            return "paid"

        return pay

    plain = tool(name="plain")(lambda: 1)
    assert not isinstance(plain, Reconciles)
    assert not plain.spec.reconciles
    for function, expected in (
        (found, ToolOutput(f'{{"key":"{CONTEXT.idempotency_key}"}}')),
        (not_done, NotDone()),
        (unknown, Unknown()),
    ):
        made = make(function)
        assert isinstance(made, Reconciles)
        assert made.spec.reconciles
        assert await made.reconcile({"cents": 1}, CONTEXT) == expected
    quitting = make(quits)
    assert isinstance(quitting, Reconciles)
    with pytest.raises(ToolError, match="SystemExit: 1"):
        await quitting.reconcile({"cents": 1}, CONTEXT)


# --- digest ---------------------------------------------------------------------------------------------------------


def test_definition_hash_follows_what_the_tool_is() -> None:
    spec = ToolSpec("a", "b", {"type": "object", "properties": {"x": {}, "y": {}}})
    same = ToolSpec("a", "b", {"properties": {"y": {}, "x": {}}, "type": "object"}, timeout_s=1)
    assert definition_hash(spec) == definition_hash(same) == "ee68e8bfd8b8f0fc"
    changed = [
        msgspec.structs.replace(spec, name="z"),
        msgspec.structs.replace(spec, description="z"),
        msgspec.structs.replace(spec, schema={}),
        msgspec.structs.replace(spec, effect="read"),
    ]
    assert len({definition_hash(each) for each in [spec, *changed]}) == 5
