"""Delegation: an agent as a tool of another. The work runs in a scope of its own, in the same run and journal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from harness.agent import AgentConfig
from harness.errors import ConfigError, InternalError
from harness.messages import JSON
from harness.tools.arguments import BadJSON, check, parse_object, refuse
from harness.tools.base import ToolContext, ToolSpec


class DelegateTool:
    """A tool whose call is a piece of work for another agent; made by ``delegate``.

    That agent sees the task and nothing else: it has a fresh working memory, its own prompt, tools and limits. Its
    answer is the call's result. A run that is killed meanwhile goes on inside of it.

    Attributes:
        spec: what the delegating model is told.
        agent: the agent, where one was given and not only its id.

    >>> delegate(AgentConfig("writer", "writes summaries")).spec.name
    'delegate_to_writer'
    """

    def __init__(self, spec: ToolSpec, agent: AgentConfig | None) -> None:
        self.spec = spec
        self.agent = agent

    def __repr__(self) -> str:
        return f"<DelegateTool {self.spec.name!r} to {self.spec.delegate_to!r}>"

    def validate(self, arguments: str, /) -> Mapping[str, object]:
        """Parse and check the arguments a model wrote (JSON text).

        Raises:
            InvalidArguments: they are not one object with a ``task``.
        """
        try:
            value = parse_object(arguments)
        except BadJSON as error:
            raise refuse(self.spec, [str(error)]) from None
        problems = check(value, self.spec.schema)
        if not problems and not str(value["task"]).strip():
            problems = ["task: it must say what is to be done"]
        if problems:
            raise refuse(self.spec, problems)
        return value

    async def __call__(self, args: Mapping[str, object], context: ToolContext[object], /) -> NoReturn:
        """Refuse: the strategy opens a scope for the work instead of calling the tool."""
        raise InternalError(f"{self.spec.name!r} was called as a function; it is work for {self.spec.delegate_to!r}")


def delegate(agent: AgentConfig | str, *, name: str = "", description: str = "") -> DelegateTool:
    """Make an agent a tool of others.

    Args:
        agent: the agent, or the id of one that is registered. An AgentConfig is registered together with the tool.
        name: the tool's name; ``delegate_to_<agent id>`` where it is left out.
        description: what the delegating model is told; the agent's role where it is left out.

    Raises:
        ConfigError: it is neither.

    >>> delegate("writer", description="Writes a summary of what it is told.").spec.delegate_to
    'writer'
    """
    if not isinstance(agent, (AgentConfig, str)) or not agent:  # pyright: ignore[reportUnnecessaryIsInstance] - callers may be untyped
        raise ConfigError(f"delegate() takes an AgentConfig or the id of an agent, not {agent!r}")
    agent_id = agent if isinstance(agent, str) else agent.agent_id
    role = agent.role if isinstance(agent, AgentConfig) else ""
    told = description or (f"Give work to the agent {agent_id!r}: {role}." if role else f"Give work to {agent_id!r}.")
    spec = ToolSpec(
        name or "delegate_to_" + "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in agent_id),
        f"{told} It knows only what you write into the task, and returns its answer.",
        _SCHEMA,
        effect="idempotent",
        delegate_to=agent_id,
    )
    return DelegateTool(spec, None if isinstance(agent, str) else agent)


_TASK: dict[str, JSON] = {
    "type": "string",
    "description": "What is to be done, complete: everything the agent needs to know.",
}

_SCHEMA: dict[str, JSON] = {
    "type": "object",
    "properties": {"task": _TASK},
    "required": ["task"],
    "additionalProperties": False,
}
