"""Names to things: agents and tools, and the digests a run keeps of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import msgspec

from harness.agent import AgentConfig
from harness.errors import ConfigError, nearest
from harness.llm.base import LLM
from harness.records import Fingerprints
from harness.tools import as_tool, definition_hash
from harness.tools.answer import AnswerForm
from harness.tools.base import Tool, ToolSpec


class AgentRegistry:
    """The agents of a runtime, by id.

    >>> AgentRegistry().register(AgentConfig("reader")).all_ids()
    ['reader']
    """

    def __init__(self, agents: Iterable[AgentConfig] = ()) -> None:
        self._agents: dict[str, AgentConfig] = {}
        for agent in agents:
            self.register(agent)

    def register(self, agent: AgentConfig) -> AgentRegistry:
        """Add an agent and return the registry.

        Raises:
            ConfigError: the id is taken, or this is no AgentConfig.
        """
        if not isinstance(agent, AgentConfig):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may be untyped
            raise ConfigError(f"an agent must be an AgentConfig, not {type(agent).__name__}")
        if agent.agent_id in self._agents:
            raise ConfigError(f"agent {agent.agent_id!r} is registered twice")
        self._agents[agent.agent_id] = agent
        return self

    def get(self, agent_id: str) -> AgentConfig:
        """Return an agent.

        Raises:
            ConfigError: there is none with this id; the text names the nearest.
        """
        if not isinstance(agent_id, str):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may be untyped
            raise ConfigError(f"an agent is named by its id, a text, not {agent_id!r}")
        if agent_id not in self._agents:
            raise ConfigError(f"unknown agent {agent_id!r}{nearest(agent_id, self._agents)}")
        return self._agents[agent_id]

    def all_ids(self) -> list[str]:
        """Return the ids in the order of registration."""
        return list(self._agents)


class ToolRegistry:
    """The tools of a runtime, by name. Typed functions and objects with ``name`` and ``execute`` are wrapped.

    >>> def add(a: int, b: int) -> int:
    ...     "Add two numbers."
    ...     return a + b
    >>> ToolRegistry().register(add).all_names()
    ['add']
    """

    def __init__(self, tools: Iterable[object] = ()) -> None:
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            self.register(tool)

    def register(self, tool: object) -> ToolRegistry:
        """Add a tool and return the registry.

        Raises:
            ConfigError: the name is taken, or no tool can be made of the object.
        """
        wrapped = as_tool(tool)
        name = wrapped.spec.name
        if name in self._tools:
            raise ConfigError(f"tool {name!r} is registered twice")
        if name == "finish":
            raise ConfigError("a tool cannot be called 'finish': that word ends a run in the text protocol")
        self._tools[name] = wrapped
        return self

    def get(self, name: str) -> Tool:
        """Return a tool.

        Raises:
            ConfigError: there is none with this name; the text names the nearest.
        """
        if name not in self._tools:
            raise ConfigError(f"unknown tool {name!r}{nearest(name, self._tools)}")
        return self._tools[name]

    def all_names(self) -> list[str]:
        """Return the names in the order of registration."""
        return list(self._tools)

    def of_agent(self, agent: AgentConfig) -> dict[str, Tool]:
        """Return the tools an agent may call, by name.

        Raises:
            ConfigError: ``allowed_tools`` names a tool that is not registered.
        """
        if agent.allowed_tools is None:  # an agent that may call everything does not thereby give work to itself
            return {name: tool for name, tool in self._tools.items() if tool.spec.delegate_to != agent.agent_id}
        for name in agent.allowed_tools:
            if name not in self._tools:
                raise ConfigError(
                    f"agent {agent.agent_id!r} allows an unknown tool {name!r}{nearest(name, self._tools)}"
                )
        return {name: self._tools[name] for name in agent.allowed_tools}


def _digest(*parts: object) -> str:
    data = msgspec.json.encode(parts, order="deterministic", enc_hook=repr)
    return hashlib.sha256(data).hexdigest()[:16]


_NOT_SETTINGS = frozenset({"agent_id", "system_prompt", "llm", "token_counter", "limits", "output"})


def fingerprints(
    agent: AgentConfig, specs: Mapping[str, ToolSpec], llm: LLM, form: AnswerForm | None = None
) -> Fingerprints:
    """Digest what a run is configured with. A type of answers counts by its schema, as the tool they are given by."""
    # Only what differs from the defaults, so that a setting a later release adds changes no digest.
    defaults = AgentConfig(agent.agent_id)
    settings = [
        (name, value)
        for name in agent.__struct_fields__
        if name not in _NOT_SETTINGS and (value := getattr(agent, name)) != getattr(defaults, name)
    ]
    return Fingerprints(
        agent=_digest(settings),
        prompt=_digest(agent.system_prompt),
        llm=f"{llm.provider}:{llm.name}",
        tools={spec.name: definition_hash(spec) for spec in (*specs.values(), *([form.tool] if form else []))},
    )


def differences_of_agents(old: Mapping[str, Fingerprints], new: Mapping[str, Fingerprints]) -> tuple[str, ...]:
    """Say in words what differs between two teams of agents."""
    changes: list[str] = []
    for agent_id in sorted(old.keys() | new.keys()):
        if agent_id not in new:
            changes.append(f"agent {agent_id!r} is gone")
        elif agent_id not in old:
            changes.append(f"agent {agent_id!r} is new")
        else:
            changes += [f"agent {agent_id!r}: {change}" for change in differences(old[agent_id], new[agent_id])]
    return tuple(changes)


def differences(old: Fingerprints, new: Fingerprints) -> tuple[str, ...]:
    """Say in words what differs between two configurations."""
    changes: list[str] = []
    if old.agent != new.agent:
        changes.append("the agent's settings")
    if old.prompt != new.prompt:
        changes.append("the system prompt")
    if old.llm != new.llm:
        changes.append(f"the llm ({old.llm} -> {new.llm})")
    for name in sorted(old.tools.keys() | new.tools.keys()):
        if name not in new.tools:
            changes.append(f"tool {name!r} is gone")
        elif name not in old.tools:
            changes.append(f"tool {name!r} is new")
        elif old.tools[name] != new.tools[name]:
            changes.append(f"tool {name!r} is defined differently")
    return tuple(changes)
