"""Answers of a certain form: the type a user names, as a schema for the model and a check of what it gives."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Mapping

from harness.messages import JSON, unfence
from harness.tools.base import ToolSpec

ANSWER_TOOL = "final_answer"

ANSWER, CONFIDENCE = "answer", "confidence"
"""The arguments of the tool by which an answer is given."""

MAX_PROBLEMS = 20
MAX_PROBLEM_CHARS = 500
"""What is wrong with an answer is told in so many problems, each in so many characters."""


class BadAnswer(Exception):
    """An answer has not the form that was asked for.

    Attributes:
        problems: all that is wrong with it.
    """

    def __init__(self, problems: list[str]) -> None:
        more = len(problems) - MAX_PROBLEMS
        shown = [text if len(text) <= MAX_PROBLEM_CHARS else f"{text[:MAX_PROBLEM_CHARS]}..." for text in problems]
        self.problems = [*shown[:MAX_PROBLEMS], *([f"and {more} more problems like these"] if more > 0 else [])]
        super().__init__("; ".join(self.problems))


class AnswerForm:
    """The form an agent's answers must have.

    A model gives such an answer by calling a tool, since that is how models are best at writing JSON, and since it may
    then call other tools before. A model that writes it as text is understood too.

    Args:
        schema: the JSON schema of the answer.
        validate: makes the answer of its JSON text; raises whatever is wrong with it.
        problems: lists what is wrong, from what was raised.
        taken: names of the tools there are.
        confidence: whether the model is to say how sure it is.

    Attributes:
        schema: the JSON schema of the answer.
        tool: the tool by which it is given.
    """

    def __init__(
        self,
        schema: dict[str, JSON],
        validate: Callable[[str], object],
        problems: Callable[[Exception], list[str]],
        *,
        taken: Collection[str] = (),
        confidence: bool = False,
    ) -> None:
        self.schema = schema
        self._validate = validate
        self._problems = problems
        name = ANSWER_TOOL
        while name in taken:
            name += "_"
        self.tool = ToolSpec(name, _TOLD, _arguments(schema, confidence=confidence), effect="read")

    def read(self, text: str) -> object:
        """Make the answer of its JSON text.

        Raises:
            BadAnswer: it has not the form; all that is wrong.
        """
        text = unfence(text)
        inner = _text_inside(text)
        try:
            return self._validate(text)
        except Exception as error:  # a user's own validators may raise anything
            if inner is None:
                raise BadAnswer(self._problems(error)) from None
        try:
            return self._validate(inner)
        except Exception as error:  # as above
            raise BadAnswer(self._problems(error)) from None

    def fitting(self, text: str) -> str | None:
        """Return the JSON of an answer of this form, without what was written around it; None where there is none."""
        text = unfence(text)
        for candidate in filter(None, (text, _text_inside(text))):
            with contextlib.suppress(Exception):  # whatever is wrong with it is told by ``read``
                self._validate(candidate)
                return candidate
        return None


_TOLD = (
    "Give your final answer. Call this when you have all you need, alone and not beside other calls: the work ends "
    "with it. Do not give the answer as text."
)

_SURE: dict[str, JSON] = {
    "type": "number", "minimum": 0, "maximum": 1, "description": "How sure you are of the answer, from 0 to 1.",
}  # fmt: skip


def _arguments(schema: Mapping[str, JSON], *, confidence: bool) -> dict[str, JSON]:
    """Return the schema of the tool's arguments. Definitions stay at the root, where references look for them."""
    answer = dict(schema)
    properties: dict[str, JSON] = {ANSWER: answer}
    if confidence:
        properties[CONFIDENCE] = _SURE
    arguments: dict[str, JSON] = {
        "type": "object",
        "properties": properties,
        "required": list[JSON](properties),
        "additionalProperties": False,
    }
    if (definitions := answer.pop("$defs", None)) is not None:
        arguments["$defs"] = definitions
    return arguments


def has_confidence(tool: ToolSpec) -> bool:
    """Say whether the tool by which an answer is given asks for a confidence."""
    properties = tool.schema.get("properties")
    return isinstance(properties, dict) and CONFIDENCE in properties


def _text_inside(text: str) -> str | None:
    """Return the JSON that a JSON text holds, as weak models write it; None where it is no such text."""
    if not text.startswith('"'):
        return None
    try:
        inner = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return inner if isinstance(inner, str) and (inner := unfence(inner)).startswith(("{", "[")) else None


def answer_form(output: object, whose: str, *, taken: Collection[str] = (), confidence: bool = False) -> AnswerForm:
    """Build the form of a type's answers.

    Args:
        output: the type: a pydantic model, a dataclass, a TypedDict or any other that pydantic validates.
        whose: names it in an error.
        taken: names of the tools there are.
        confidence: whether the model is to say how sure it is.

    Raises:
        ConfigError: the type cannot be validated or has no JSON schema.

    >>> form = answer_form(dict[str, int], "an example")
    >>> form.read('{"a": 1}')
    {'a': 1}
    """
    from harness.tools import typed  # loads pydantic

    schema, validate = typed.build_output(output, whose)
    return AnswerForm(schema, validate, typed.problems, taken=taken, confidence=confidence)
