"""Typed parameters to a JSON schema and a validator. The only module of the tools that loads pydantic."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Annotated, Any, NotRequired, cast, get_args, get_origin

from docstring_parser import ParseError, parse
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails
from typing_extensions import TypedDict

from harness.errors import ConfigError
from harness.messages import JSON
from harness.tools.arguments import shown, why
from harness.tools.signature import REQUIRED, Argument, Signature


@dataclass(slots=True, frozen=True)
class Typed:
    """What the types of a callable's parameters amount to.

    Attributes:
        schema: the JSON schema of its arguments.
        validate: takes the JSON text of the arguments and returns them converted.
    """

    schema: dict[str, JSON]
    validate: Callable[[str], dict[str, object]]


def build(signature: Signature, name: str, descriptions: Mapping[str, str]) -> Typed:
    """Build schema and validator of a callable's parameters.

    Args:
        signature: the callable's parameters.
        name: the tool's name, for errors.
        descriptions: what each parameter is for, from the docstring; the annotation's own text goes before.

    Raises:
        ConfigError: a type cannot be validated or has no JSON schema.
    """
    fields = {argument.name: _field(argument, descriptions.get(argument.name)) for argument in signature.arguments}
    # A TypedDict and not a model: any parameter name will do, and validation yields the keywords of the call itself.
    shape: Any = TypedDict(name, fields)  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType, reportUnknownVariableType] - the fields are known only now
    extra = "allow" if signature.open else "forbid"
    shape.__pydantic_config__ = ConfigDict(extra=extra, allow_inf_nan=False)
    try:
        adapter: TypeAdapter[dict[str, object]] = TypeAdapter(shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a default without a JSON form is left out of the schema, which is right
            schema = adapter.json_schema(schema_generator=_Untitled)
    except Exception as error:  # a user's type may raise anything while it is looked at
        raise ConfigError(
            f"tool {name!r}: its parameters ({', '.join(fields)}) cannot be described to a model: {error}"
        ) from error
    schema.pop("title", None)
    schema.pop("description", None)
    schema.setdefault("properties", {})
    return Typed(cast("dict[str, JSON]", schema), adapter.validator.validate_json)


def build_output(output: object, whose: str) -> tuple[dict[str, JSON], Callable[[str], object]]:
    """Build schema and validator of an answer's type.

    Args:
        output: the type.
        whose: names it in an error.

    Raises:
        ConfigError: it cannot be validated or has no JSON schema.
    """
    kind: Any = output  # whether it is a type is what is found out
    try:
        if isinstance(output, FunctionType):  # pydantic would call it with the answer
            raise TypeError("it is a function")
        adapter: TypeAdapter[object] = TypeAdapter(kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above
            schema = adapter.json_schema(schema_generator=_Untitled)
        validate = adapter.validator.validate_json
    except Exception as error:  # a user's type may raise anything while it is looked at
        raise ConfigError(
            f"{whose} must be a type that pydantic can validate (a pydantic model, a dataclass, a TypedDict ...), not "
            f"{output!r}: {error}"
        ) from error
    return cast("dict[str, JSON]", schema), validate


def problems(error: Exception) -> list[str]:
    """List what is wrong with the arguments, a line each."""
    if not isinstance(error, ValidationError):
        return [why(error)]
    return [_problem(details) for details in error.errors(include_url=False, include_context=False)]


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    r"""Split a docstring (Google, NumPy or reST) into its prose and what it says of each parameter.

    Examples are left out: a small model copies them.

    >>> read_docstring("Add.\n\nArgs:\n    a: the first number.")
    ('Add.', {'a': 'the first number.'})
    """
    try:
        parsed = parse(text)
    except ParseError:
        return text.strip(), {}
    prose = "\n\n".join(part for part in (parsed.short_description, parsed.long_description) if part)
    paragraphs = [paragraph for paragraph in prose.split("\n\n") if not paragraph.lstrip().startswith(">>>")]
    return "\n\n".join(paragraphs), {
        param.arg_name.lstrip("*"): " ".join(param.description.split()) for param in parsed.params if param.description
    }


class _Untitled(GenerateJsonSchema):
    """JSON schemas without a title for each field: it only repeats the name, and every word costs tokens."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _field(argument: Argument, described: str | None) -> object:
    """Make the TypedDict field of a parameter: type, description and default."""
    annotation = Any if argument.annotation is REQUIRED else argument.annotation
    default = argument.default
    if isinstance(default, FieldInfo):  # the form `limit: int = Field(3, description="...")`
        annotation, default = Annotated[annotation, default], REQUIRED
    metadata = list(get_args(annotation)[1:]) if get_origin(annotation) is Annotated else []
    infos = [item for item in metadata if isinstance(item, FieldInfo)]
    text = next((item for item in metadata if isinstance(item, str)), described)
    if text and not any(info.description for info in infos):
        annotation = Annotated[annotation, Field(description=text)]
    if default is not REQUIRED:
        annotation = Annotated[annotation, Field(default=default)]
    is_required = default is REQUIRED and all(info.is_required() for info in infos)
    return annotation if is_required else NotRequired[annotation]


def _problem(details: ErrorDetails) -> str:
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in details["loc"]).lstrip(".")
    where = where if len(where) <= 120 else f"{where[:117]}..."
    match details["type"]:
        case "missing":
            text = "missing"
        case "extra_forbidden" | "unexpected_keyword_argument":
            text = "not accepted"
        case _:
            text = f"{details['msg']}, not {shown(details['input'])}"
    return f"{where}: {text}" if where else text
