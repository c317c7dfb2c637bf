"""Read a callable's parameters: their names, resolved annotations, defaults, and where the context goes."""

from __future__ import annotations

import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass

from harness.errors import ConfigError
from harness.tools.base import ToolContext

REQUIRED = inspect.Parameter.empty
"""The default of a parameter that has none."""


@dataclass(slots=True, frozen=True)
class Argument:
    """One parameter the model fills in.

    Attributes:
        name: the parameter's name.
        annotation: its type with all metadata; REQUIRED where there is no annotation.
        default: its default; REQUIRED where there is none.
    """

    name: str
    annotation: object
    default: object


@dataclass(slots=True, frozen=True)
class Signature:
    """What a callable takes.

    Attributes:
        arguments: the parameters the model fills in, in order.
        positional: names that can only be passed by position.
        contexts: names that get the ToolContext.
        open: whether it takes any other keyword (``**kwargs``).
    """

    arguments: tuple[Argument, ...]
    positional: tuple[str, ...]
    contexts: tuple[str, ...]
    open: bool


def read_signature(function: Callable[..., object], name: str) -> Signature:
    """Read what a callable takes.

    Args:
        function: a function, method, partial or an object with ``__call__``.
        name: the tool's name, for errors.

    Raises:
        ConfigError: it cannot be read, an annotation does not resolve, or it takes ``*args``.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"tool {name!r}: its parameters cannot be read ({error}); wrap it in a def") from None
    # What a partial binds by keyword stays in its signature as a default; the model must neither see nor change it.
    bound = _bound_names(function)
    arguments: list[Argument] = []
    positional: list[str] = []
    contexts: list[str] = []
    is_open = False
    for parameter in parameters:
        if parameter.name in bound:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise ConfigError(f"tool {name!r} takes *{parameter.name}; arguments go by name: use a list parameter")
        if parameter.kind is parameter.VAR_KEYWORD:
            is_open = True
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(parameter.name)
        annotation = _resolve(function, parameter, name)
        if _is_context(annotation):
            contexts.append(parameter.name)
        else:
            arguments.append(Argument(parameter.name, annotation, parameter.default))
    return Signature(tuple(arguments), tuple(positional), tuple(contexts), is_open)


def _bound_names(function: object) -> frozenset[str]:
    if not isinstance(function, functools.partial):
        return frozenset()
    return frozenset(typing.cast("functools.partial[object]", function).keywords)


def _is_context(annotation: object) -> bool:
    """Whether an annotation is ToolContext, ToolContext[...], or an Optional or Annotated one."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _is_context(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return any(_is_context(member) for member in typing.get_args(annotation))
    return annotation is ToolContext or origin is ToolContext


def _resolve(function: Callable[..., object], parameter: inspect.Parameter, name: str) -> object:
    if parameter.annotation is REQUIRED:
        return REQUIRED
    code_owner = _plain_function(function)
    module_names = getattr(code_owner, "__globals__", {})
    holder = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    # Each parameter by itself: another one's annotation, or the return type's, need not resolve for this one.
    for local_names in ({}, _enclosing_names(code_owner)):
        try:
            return typing.get_type_hints(holder, module_names, local_names, include_extras=True)[parameter.name]
        except NameError:
            continue
        except Exception as error:
            raise _unresolved(name, parameter, error) from None
    raise _unresolved(name, parameter, "its names must be importable from the function's module, outside TYPE_CHECKING")


def _unresolved(name: str, parameter: inspect.Parameter, why: object) -> ConfigError:
    return ConfigError(
        f"tool {name!r}: the annotation {parameter.annotation!r} of {parameter.name!r} cannot be resolved: {why}"
    )


def _plain_function(function: Callable[..., object]) -> object:
    """Return the def behind partials, methods, callable objects and wrappers."""
    found: object = function
    while isinstance(found, functools.partial):
        found = typing.cast("functools.partial[object]", found).func
    if not isinstance(found, (types.FunctionType, types.MethodType, types.BuiltinFunctionType)):
        found = getattr(type(found), "__call__", found)  # noqa: B004 - the def is wanted, not whether it is callable
    found = getattr(found, "__func__", found)
    return inspect.unwrap(found) if callable(found) else found


def _enclosing_names(function: object) -> dict[str, object]:
    """Return the local names of the call the function is being defined in, for types that are defined there too."""
    outer = getattr(function, "__qualname__", "").rpartition(".<locals>.")[0]
    frame = sys._getframe() if outer else None  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - no other way
    while frame is not None:
        if frame.f_code.co_qualname == outer and frame.f_globals is getattr(function, "__globals__", None):
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}
