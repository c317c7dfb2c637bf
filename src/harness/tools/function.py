"""Make a tool of anything that can be called: a typed function, a method, an object with ``execute``."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import CoroutineType
from typing import Any, NamedTuple, TypeVar, cast, get_args, overload

import msgspec

from harness.errors import ConfigError
from harness.messages import JSON
from harness.records import Effect
from harness.tools.arguments import BadJSON, check, parse_object, refuse
from harness.tools.base import (
    DEFAULT_TIMEOUT_S,
    NotDone,
    ReconcileFunction,
    Tool,
    ToolContext,
    ToolOutput,
    ToolSpec,
    Unknown,
)
from harness.tools.output import encodable, to_output
from harness.tools.signature import Signature, read_signature
from harness.tools.threads import as_tool_error, run_in_thread

Function = Callable[..., object]
Schema = Mapping[str, JSON]
T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What the model providers accept as the name of a function."""


@dataclass(slots=True, frozen=True)
class _Options:
    """What ``@tool`` was given, checked.

    Attributes:
        schema: a JSON schema of the arguments; without one it is read from the parameters.
        takes_any: whether ``**kwargs`` is accepted.
        workspace: the absolute path of the folder it works in; empty for none.
        untrusted: whether what it returns comes from outside.
    """

    name: str | None = None
    description: str | None = None
    effect: Effect = "once"
    timeout_s: float = DEFAULT_TIMEOUT_S
    reconcile: ReconcileFunction | None = None
    schema: Schema | None = None
    takes_any: bool = False
    workspace: str | os.PathLike[str] = ""
    untrusted: bool = False

    def __post_init__(self) -> None:
        name = self.name
        # Checked although they are typed: who misspells an effect learns it here, not in the middle of a run.
        timeout_s, description, effect = cast("tuple[object, ...]", (self.timeout_s, self.description, self.effect))
        if name is not None and not (isinstance(cast("object", name), str) and _NAME.fullmatch(name)):
            raise ConfigError(f"a tool's name must be 1 to 64 letters, digits, '_' or '-', not {name!r}: give name=")
        if description is not None and not isinstance(description, str):
            raise ConfigError(f"tool {name!r}: description must be a string, not {description!r}")
        if effect not in get_args(Effect):
            raise ConfigError(f"tool {name!r}: effect must be 'read', 'idempotent' or 'once', not {effect!r}")
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < math.inf:
            raise ConfigError(f"tool {name!r}: timeout_s must be a number of seconds above 0, not {timeout_s!r}")
        if self.reconcile is not None and not callable(self.reconcile):
            raise ConfigError(f"tool {name!r}: reconcile must be a function of the key, not {self.reconcile!r}")
        workspace, untrusted = cast("tuple[object, ...]", (self.workspace, self.untrusted))
        is_path = isinstance(workspace, (str, os.PathLike))
        if not is_path or not (workspace == "" or Path(self.workspace).is_absolute()):
            raise ConfigError(f"tool {name!r}: workspace must be the absolute path of a folder, not {workspace!r}")
        if not isinstance(untrusted, bool):
            raise ConfigError(f"tool {name!r}: untrusted must be True or False, not {untrusted!r}")


class FunctionTool:
    """A tool made of a callable by ``@tool`` or ``as_tool``. The callable itself stays at ``function``.

    A plain function runs on a daemon thread, a coroutine function on the event loop.

    >>> @tool(effect="read")
    ... def add(a: int, b: int = 1) -> int:
    ...     "Add two numbers."
    ...     return a + b
    >>> add.validate('{"a": 2}')
    {'a': 2, 'b': 1}
    """

    def __init__(self, function: Function, options: _Options) -> None:
        options = replace(options, name=_name(function) if options.name is None else options.name)
        name = cast("str", options.name)
        _check_callable(function, name)
        signature = read_signature(function, name)
        if signature.open and not options.takes_any:
            raise ConfigError(f"tool {name!r} takes **kwargs; a model must know the names: declare them as parameters")
        arguments = _arguments(function, signature, name, options.schema)
        description = arguments.description if options.description is None else options.description
        self.function = function
        self.spec = ToolSpec(
            name,
            encodable(description),
            arguments.schema,
            options.effect,
            float(options.timeout_s),
            options.reconcile is not None,
            workspace=os.fspath(options.workspace),
            untrusted=options.untrusted,
        )
        self._options = options
        self._signature = signature
        self._validate = arguments.validate
        self._is_async = _is_async(function)
        self._is_plain = not signature.contexts and not signature.positional

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.spec.name!r} ({self.spec.effect})>"

    def __get__(self, instance: object, owner: type | None = None) -> FunctionTool:
        """Bind to an instance, so that a method can be decorated."""
        bind = getattr(self.function, "__get__", None)
        return self if instance is None or bind is None else type(self)(bind(instance, owner), self._options)

    def validate(self, arguments: str, /) -> Mapping[str, object]:
        """Parse and check the arguments a model wrote (JSON text).

        Raises:
            InvalidArguments: they do not fit; all errors at once, with what is accepted.
        """
        try:
            value = parse_object(arguments)
        except BadJSON as error:
            raise refuse(self.spec, [str(error)]) from None
        found = self._validate(arguments, value)
        if isinstance(found, list):
            raise refuse(self.spec, found)
        return found

    def __call__(
        self, args: Mapping[str, object], context: ToolContext[object], /
    ) -> CoroutineType[Any, Any, ToolOutput]:
        """Call the function. Its exceptions pass; what would end the loop (SystemExit) becomes a ToolError."""
        if self._is_plain:
            return _finish(self.function, self._is_async, to_output, (), args)
        named = {**args, **dict.fromkeys(self._signature.contexts, context)}
        positional = [named.pop(name) for name in self._signature.positional if name in named]
        return _finish(self.function, self._is_async, to_output, positional, named)


class ReconcilingTool(FunctionTool):
    """A FunctionTool with a ``reconcile``: it can find out what became of a call whose outcome was lost.

    >>> @tool(reconcile=lambda key: NotDone())
    ... def pay(cents: int, context: ToolContext) -> str:
    ...     return bank.pay(cents, key=context.idempotency_key)
    >>> pay.spec.reconciles
    True
    """

    async def reconcile(
        self, args: Mapping[str, object], context: ToolContext[object], /
    ) -> ToolOutput | NotDone | Unknown:
        """Ask the reconcile function what became of the call with this context's idempotency key."""
        function = cast("ReconcileFunction", self._options.reconcile)
        return await _finish(function, _is_async(function), _to_reconciled, (context.idempotency_key,), {})


@overload
def tool(function: Function, /) -> FunctionTool: ...
@overload
def tool(
    *,
    effect: Effect = "once",
    timeout_s: float = DEFAULT_TIMEOUT_S,
    name: str | None = None,
    reconcile: ReconcileFunction | None = None,
    description: str | None = None,
    workspace: str | os.PathLike[str] = "",
    untrusted: bool = False,
) -> Callable[[Function], FunctionTool]: ...
def tool(
    function: Function | None = None,
    /,
    *,
    effect: Effect = "once",
    timeout_s: float = DEFAULT_TIMEOUT_S,
    name: str | None = None,
    reconcile: ReconcileFunction | None = None,
    description: str | None = None,
    workspace: str | os.PathLike[str] = "",
    untrusted: bool = False,
) -> FunctionTool | Callable[[Function], FunctionTool]:
    """Make a typed function a tool, with or without options.

    The schema comes from the parameters, their texts from the docstring or from ``Annotated[..., "text"]``. A
    parameter of type ToolContext is filled in by the harness and hidden from the model.

    Args:
        function: the function, when used without options.
        effect: what running it twice would mean: ``read`` nothing, ``idempotent`` nothing with the same idempotency
            key, ``once`` a second effect.
        timeout_s: seconds one call may take.
        name: the tool's name; by default the function's.
        reconcile: a function of the idempotency key that says what became of a lost call: its result, NotDone or
            Unknown.
        description: what the tool does, for the model; by default the docstring.
        workspace: the absolute path of the folder it works in: what a policy calls ``workspace``, and what an approval
            of its calls is bound to. The tool has to hold to it by itself.
        untrusted: what it returns comes from outside (a web page, a mail) and may have been written to lead a model
            astray. An agent that has read it is ``tainted`` to a policy from then on.

    Raises:
        ConfigError: an option is out of range, or the parameters cannot be shown to a model.

    >>> @tool(effect="read")
    ... async def weather(city: str) -> str:
    ...     "Tell the weather of a city."
    ...     return f"sunny in {city}"
    >>> weather.spec.schema["required"]
    ['city']
    """
    options = _Options(
        name, description, effect, timeout_s, reconcile, workspace=workspace, untrusted=untrusted
    )  # fmt: skip
    return partial(_make, options=options) if function is None else _make(function, options)


def as_tool(thing: object) -> Tool:
    """Make a tool of whatever can be one.

    Args:
        thing: a Tool (returned as it is), a typed function or method, or an object with ``name`` and
            ``async execute(**kwargs)``. Of the object these are used too, where it has them: ``description``,
            ``schema`` or ``parameters`` (a JSON schema), ``effect``, ``timeout_s``, ``reconcile`` and ``untrusted``.

    Raises:
        ConfigError: it is none of these.

    >>> def now() -> str:
    ...     return "12:00"
    >>> as_tool(now).spec.name
    'now'
    """
    if isinstance(thing, type):
        raise ConfigError(f"a tool is an instance, not a class: pass an instance of {thing.__qualname__!r}")
    if isinstance(thing, Tool):
        return thing
    execute = getattr(thing, "execute", None)
    if isinstance(getattr(thing, "name", None), str) and callable(execute):
        return _from_object(thing, execute)
    if callable(thing):
        return _make(thing, _Options())
    raise ConfigError(
        f"{thing!r} is not a tool: pass a typed function, an object with 'name' and 'async execute(**kwargs)', "
        "or an object with 'spec', 'validate' and 'async __call__' (harness.tools.Tool)"
    )


def definition_hash(spec: ToolSpec) -> str:
    """Digest what a tool is: its name, description, schema and effect.

    >>> definition_hash(ToolSpec("now", "", {})) == definition_hash(ToolSpec("now", "", {}, timeout_s=1))
    True
    """
    parts = [spec.name, spec.description, spec.schema, spec.effect]
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:16]


def _make(function: Function, options: _Options) -> FunctionTool:
    if isinstance(function, FunctionTool):
        raise ConfigError(f"{function!r} is a tool already; give its options where it is made")
    return (FunctionTool if options.reconcile is None else ReconcilingTool)(function, options)


def _from_object(thing: object, execute: Function) -> FunctionTool:
    """Make a tool of an object with ``name`` and ``execute``, and whatever else of a tool it has."""
    given = {
        key: getattr(thing, key) for key in ("effect", "timeout_s", "reconcile", "untrusted") if hasattr(thing, key)
    }
    schema = getattr(thing, "schema", None) or getattr(thing, "parameters", None)
    name: str = getattr(thing, "name", "")
    if schema is not None and not (isinstance(schema, Mapping) and _is_object_schema(cast("Schema", schema))):
        raise ConfigError(f"tool {name!r}: its schema must be a JSON schema of type 'object', not {schema!r}")
    description = getattr(thing, "description", None) or inspect.getdoc(execute) or inspect.getdoc(type(thing))
    return _make(execute, _Options(name, description, **given, schema=cast("Schema", schema), takes_any=True))


def _is_object_schema(schema: Schema) -> bool:
    return schema.get("type", "object") == "object"


def _name(function: Function) -> str:
    while isinstance(function, partial):
        function = cast("partial[object]", function).func
    return getattr(function, "__name__", type(function).__name__)


def _check_callable(function: Function, name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"a tool's name must be 1 to 64 letters, digits, '_' or '-', not {name!r}: give name=")
    if not callable(function) or isinstance(function, type):
        raise ConfigError(f"tool {name!r} must be a function or an object that can be called, not {function!r}")
    if any(inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one) for one in _callables(function)):
        raise ConfigError(f"tool {name!r} yields; a tool has one result: return a list, or use context.progress")


def _is_async(function: Function) -> bool:
    return any(inspect.iscoroutinefunction(one) for one in _callables(function))


def _callables(function: Function) -> tuple[object, object]:
    """Return the function and, for an object that can be called, the method that is."""
    return function, getattr(function, "__call__", None)  # noqa: B004 - it is looked at, not only looked for


class _Arguments(NamedTuple):
    """What a tool takes: its docstring's prose, its schema, and ``validate(text, parsed)``: keywords or problems."""

    description: str
    schema: Schema
    validate: Callable[[str, dict[str, JSON]], Mapping[str, object] | list[str]]


def _arguments(function: Function, signature: Signature, name: str, schema: Schema | None) -> _Arguments:
    doc = inspect.getdoc(function if hasattr(function, "__name__") else _behind(function)) or ""
    if schema is None and signature.open and not signature.arguments:
        schema = {"type": "object", "properties": {}}
    if schema is not None:
        return _Arguments(doc, schema, partial(_check_schema, schema))
    from harness.tools import typed  # here, because it loads pydantic, which importing harness.tools must not

    description, texts = typed.read_docstring(doc)
    shape = typed.build(signature, name, texts)

    def validate(text: str, value: dict[str, JSON]) -> Mapping[str, object] | list[str]:
        try:
            return shape.validate(text if value else "{}")
        except Exception as error:  # a validator of the user's own may raise anything
            return typed.problems(error)

    return _Arguments(description, shape.schema, validate)


def _check_schema(schema: Schema, _text: str, value: dict[str, JSON]) -> Mapping[str, object] | list[str]:
    return check(value, schema) or cast("dict[str, object]", value)


def _behind(function: Function) -> object:
    """Return what carries the docstring: the function behind a partial, or a callable object's class."""
    while isinstance(function, partial):
        function = cast("partial[object]", function).func
    return function


async def _finish(
    function: Function,
    is_async: bool,
    convert: Callable[[object], T],
    positional: Sequence[object],
    named: Mapping[str, object],
) -> T:
    """Call a function where it belongs and convert its result."""
    try:
        if is_async:
            return convert(await cast("Awaitable[object]", function(*positional, **named)))
        done = await run_in_thread(partial(_call, function, convert, positional, named))
        return convert(await done.awaitable) if isinstance(done, _Pending) else done
    except Exception:
        raise
    except BaseException as error:
        if _is_for_us(error):
            raise
        raise as_tool_error(error) from error


class _Pending(NamedTuple):
    """A plain function returned something to await; that belongs on the event loop."""

    awaitable: Awaitable[object]


def _call(
    function: Function, convert: Callable[[object], T], positional: Sequence[object], named: Mapping[str, object]
) -> T | _Pending:
    result = function(*positional, **named)
    return _Pending(result) if inspect.isawaitable(result) else convert(result)


def _is_for_us(error: BaseException) -> bool:
    """Tell a cancellation of our task, or the closing of our coroutine, from an exception the tool made up."""
    if not isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return False
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs any more: this coroutine is being closed
        return True
    if isinstance(error, GeneratorExit):
        return task is None
    return task is not None and task.cancelling() > 0


def _to_reconciled(result: object) -> ToolOutput | NotDone | Unknown:
    return result if isinstance(result, (NotDone, Unknown)) else to_output(result)
