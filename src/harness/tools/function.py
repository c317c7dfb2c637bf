"""Make a tool of anything that can be called: a typed function, a method, an object with ``execute``."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar, cast, get_args, overload

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
T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What the model providers accept as the name of a function."""


class FunctionTool:
    """A tool made of a callable. ``@tool`` and ``as_tool`` make it; the callable stays at ``function``.

    Args:
        function: what to call. A plain function runs on a daemon thread, a coroutine function on the event loop.
        name: the tool's name; by default the function's.
        description: what it does, for the model; by default the docstring.
        effect: what running it twice would mean.
        timeout_s: seconds one call may take.
        schema: a JSON schema of the arguments; by default they are read from the function's parameters.
        takes_any: whether ``**kwargs`` is accepted.

    Raises:
        ConfigError: a value is out of range or the function's parameters cannot be shown to a model.

    >>> def add(a: int, b: int = 1) -> int:
    ...     "Add two numbers."
    ...     return a + b
    >>> FunctionTool(add, effect="read").validate('{"a": 2}')
    {'a': 2, 'b': 1}
    """

    def __init__(
        self,
        function: Function,
        *,
        name: str | None = None,
        description: str | None = None,
        effect: Effect = "once",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        schema: Mapping[str, JSON] | None = None,
        takes_any: bool = False,
    ) -> None:
        name = _name(function) if name is None else name
        _check_options(name, description, effect, timeout_s)
        _check_callable(function, name)
        signature = read_signature(function, name)
        if signature.open and not takes_any:
            raise ConfigError(f"tool {name!r} takes **kwargs; a model must know the names: declare them as parameters")
        arguments = _arguments(function, signature, name, schema)
        self.function = function
        self.spec = ToolSpec(
            name,
            encodable(arguments.description if description is None else description),
            arguments.schema,
            effect,
            float(timeout_s),
        )
        self._signature = signature
        self._validate = arguments.validate
        self._is_async = _is_async(function)
        self._is_plain = not signature.contexts and not signature.positional
        self._rebind = partial(
            type(self),
            name=name,
            description=description,
            effect=effect,
            timeout_s=timeout_s,
            schema=schema,
            takes_any=takes_any,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.spec.name!r} ({self.spec.effect})>"

    def __get__(self, instance: object, owner: type | None = None) -> FunctionTool:
        """Bind to an instance, so that a method can be decorated."""
        bind = getattr(self.function, "__get__", None)
        return self if instance is None or bind is None else self._rebind(bind(instance, owner))

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

    async def __call__(self, args: Mapping[str, object], context: ToolContext[object], /) -> ToolOutput:
        """Call the function. Its exceptions pass; what would end the loop (SystemExit) becomes a ToolError."""
        if self._is_plain:
            return await _finish(self.function, self._is_async, to_output, (), args)
        named = {**args, **dict.fromkeys(self._signature.contexts, context)}
        positional = [named.pop(name) for name in self._signature.positional if name in named]
        return await _finish(self.function, self._is_async, to_output, positional, named)


class ReconcilingTool(FunctionTool):
    """A FunctionTool that can find out what became of a call whose outcome was lost.

    Args:
        function: as in FunctionTool, like every other argument.
        reconcile: called with the idempotency key; returns the lost call's result, NotDone or Unknown.

    >>> def pay(cents: int, context: ToolContext) -> str:
    ...     return bank.pay(cents, key=context.idempotency_key)
    >>> ReconcilingTool(pay, reconcile=lambda key: NotDone()).spec.reconciles
    True
    """

    def __init__(
        self,
        function: Function,
        *,
        reconcile: ReconcileFunction,
        name: str | None = None,
        description: str | None = None,
        effect: Effect = "once",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        schema: Mapping[str, JSON] | None = None,
        takes_any: bool = False,
    ) -> None:
        super().__init__(
            function,
            name=name,
            description=description,
            effect=effect,
            timeout_s=timeout_s,
            schema=schema,
            takes_any=takes_any,
        )
        if not callable(reconcile):
            raise ConfigError(
                f"tool {self.spec.name!r}: reconcile must be a function of the key, not {reconcile!r}"
            )
        self.spec = msgspec.structs.replace(self.spec, reconciles=True)
        self._reconcile = reconcile
        self._rebind = partial(self._rebind, reconcile=reconcile)

    async def reconcile(
        self, args: Mapping[str, object], context: ToolContext[object], /
    ) -> ToolOutput | NotDone | Unknown:
        """Ask the reconcile function what became of the call with this context's idempotency key."""
        return await _finish(
            self._reconcile, _is_async(self._reconcile), _to_reconciled, (context.idempotency_key,), {}
        )


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

    Raises:
        ConfigError: an option is out of range, or the parameters cannot be shown to a model.

    >>> @tool(effect="read")
    ... async def weather(city: str) -> str:
    ...     "Tell the weather of a city."
    ...     return f"sunny in {city}"
    >>> weather.spec.schema["required"]
    ['city']
    """
    options = {"name": name, "description": description, "effect": effect, "timeout_s": timeout_s}

    def decorate(target: Function) -> FunctionTool:
        return _make(target, options, reconcile)

    if function is not None:
        return decorate(function)
    _check_options(name or "tool", description, effect, timeout_s)
    return decorate


def as_tool(thing: object) -> Tool:
    """Make a tool of whatever can be one.

    Args:
        thing: a Tool (returned as it is), a typed function or method, or an object with ``name`` and
            ``async execute(**kwargs)``. Of the object these are used too, where it has them: ``description``,
            ``schema`` or ``parameters`` (a JSON schema), ``effect``, ``timeout_s`` and ``reconcile``.

    Raises:
        ConfigError: it is none of these.

    >>> def now() -> str:
    ...     return "12:00"
    >>> as_tool(now).spec.name
    'now'
    """
    if isinstance(thing, type):
        raise ConfigError(f"a tool is an instance, not a class: pass an instance of {thing.__qualname__!r}")
    if isinstance(thing, Tool) and isinstance(thing.spec, ToolSpec):
        return thing
    execute = getattr(thing, "execute", None)
    if isinstance(getattr(thing, "name", None), str) and callable(execute):
        return _from_object(thing, execute)
    if callable(thing):
        return _make(thing, {}, None)
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


def _make(function: Function, options: Mapping[str, object], reconcile: ReconcileFunction | None) -> FunctionTool:
    if isinstance(function, FunctionTool):
        raise ConfigError(f"{function!r} is a tool already; give its options where it is made")
    kind = FunctionTool if reconcile is None else partial(ReconcilingTool, reconcile=reconcile)
    return cast("Callable[..., FunctionTool]", kind)(function, **options)


def _from_object(thing: object, execute: Function) -> FunctionTool:
    name = cast("str", getattr(thing, "name"))
    schema = getattr(thing, "schema", None) or getattr(thing, "parameters", None)
    if schema is not None and not (isinstance(schema, Mapping) and _is_object_schema(cast("Mapping[str, JSON]", schema))):
        raise ConfigError(f"tool {name!r}: its schema must be a JSON schema of type 'object', not {schema!r}")
    options: dict[str, object] = {"name": name, "schema": schema, "takes_any": True}
    options["description"] = getattr(thing, "description", None) or inspect.getdoc(execute) or inspect.getdoc(type(thing))
    for option in ("effect", "timeout_s"):
        if hasattr(thing, option):
            options[option] = getattr(thing, option)
    return _make(execute, options, getattr(thing, "reconcile", None))


def _is_object_schema(schema: Mapping[str, JSON]) -> bool:
    return schema.get("type", "object") == "object"


def _name(function: Function) -> str:
    while isinstance(function, partial):
        function = cast("partial[object]", function).func
    return getattr(function, "__name__", type(function).__name__)


def _check_options(name: object, description: object, effect: object, timeout_s: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"a tool's name must be 1 to 64 letters, digits, '_' or '-', not {name!r}: give name=")
    if description is not None and not isinstance(description, str):
        raise ConfigError(f"tool {name!r}: description must be a string, not {description!r}")
    if effect not in get_args(Effect):
        raise ConfigError(f"tool {name!r}: effect must be 'read', 'idempotent' or 'once', not {effect!r}")
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < math.inf:
        raise ConfigError(f"tool {name!r}: timeout_s must be a number of seconds above 0, not {timeout_s!r}")


def _check_callable(function: Function, name: str) -> None:
    if not callable(function) or isinstance(function, type):
        raise ConfigError(f"tool {name!r} must be a function or an object that can be called, not {function!r}")
    inner = getattr(function, "__call__", function)  # noqa: B004 - an object's own __call__ is looked at as well
    if any(check(one) for one in (function, inner) for check in (inspect.isgeneratorfunction, inspect.isasyncgenfunction)):
        raise ConfigError(f"tool {name!r} yields; a tool has one result: return a list, or use context.progress")


def _is_async(function: Function) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))


class _Arguments(NamedTuple):
    """What a tool takes: its docstring's prose, its schema, and ``validate(text, parsed)``: keywords or problems."""

    description: str
    schema: Mapping[str, JSON]
    validate: Callable[[str, dict[str, JSON]], Mapping[str, object] | list[str]]


def _arguments(
    function: Function, signature: Signature, name: str, schema: Mapping[str, JSON] | None
) -> _Arguments:
    doc = inspect.getdoc(function if hasattr(function, "__name__") else _behind(function)) or ""
    if schema is None and signature.open and not signature.arguments:
        schema = {"type": "object", "properties": {}}
    if schema is not None:
        given = schema  # narrowed for the closure
        return _Arguments(doc, given, lambda _text, value: check(value, given) or cast("Mapping[str, object]", value))
    from harness.tools import typed  # here, because it loads pydantic, which importing harness.tools must not

    description, texts = typed.read_docstring(doc)
    shape = typed.build(signature, name, texts)

    def validate(text: str, value: dict[str, JSON]) -> Mapping[str, object] | list[str]:
        try:
            return shape.validate(text if value else "{}")
        except Exception as error:  # a validator of the user's own may raise anything
            return typed.problems(error)

    return _Arguments(description, shape.schema, validate)


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
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    return isinstance(error, GeneratorExit)


def _to_reconciled(result: object) -> ToolOutput | NotDone | Unknown:
    return result if isinstance(result, (NotDone, Unknown)) else to_output(result)
