"""From what the user chose to a runtime: agents, tools, models. Nothing is guessed twice: a run keeps it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from harness.agent import AgentConfig, LLMSettings
from harness.budget import GuardrailConfig
from harness.cli.choices import Choices
from harness.cli.endpoint import find_endpoint, make_llm
from harness.errors import ConfigError
from harness.records import Origin
from harness.registry import ToolRegistry, nearest
from harness.runtime import AgentRuntime
from harness.tools import as_tool, delegate, file_tools

if TYPE_CHECKING:
    from harness.cli.config import AgentTable, ConfigFile, FileModel
    from harness.hitl.base import Approver
    from harness.llm.base import LLM
    from harness.llm.rate import RateLimit
    from harness.tools.base import Tool

FILES_WORD = "files"
"""What a harness.toml calls all the file tools together."""

PROMPT = (
    "Answer the question about the files of one folder. Call list_files first: only the paths it lists exist. "
    "Then read or search the files that matter. Rely on nothing but what you have read there, and say which files it "
    "comes from. If the files do not hold the answer, say so."
)

READER = AgentConfig(
    "reader",
    "answers questions about the files of a folder",
    PROMPT,
    ("list_files", "read_file", "search_files"),
    max_steps=15,
    llm_settings=LLMSettings(),
)
"""The agent of ``harness run`` where no harness.toml defines another."""


class Wired(NamedTuple):
    """A runtime that is ready, and what to say about it.

    Attributes:
        agent_id: the agent that runs it; empty where the run itself finds out who works.
        origin: what its runs keep, so that a resume can build it again.
    """

    runtime: AgentRuntime
    agent_id: str
    limits: GuardrailConfig
    origin: Origin
    facts: tuple[str, ...]
    notes: tuple[str, ...] = ()


def wire(
    choices: Choices, *, trust: bool = False, server_named: bool = True, approver: Approver | None = None
) -> Wired:
    """Build the runtime for what was chosen.

    Args:
        choices: from the command line, or from the run that is resumed.
        trust: the user trusts the project's harness.toml.
        server_named: whether the user names the model now; False where only the run's journal does.
        approver: who is asked about calls that wait for a person; None where nobody is here, and the run parks.

    Raises:
        ConfigError: something chosen does not exist or does not fit.
    """
    if choices.demo:
        return wire_demo(choices)
    from harness.cli import config
    from harness.cli import trust as trusting
    from harness.hitl import load_policy

    files = config.find(choices.config) if choices.config != "" else config.find_user()
    trusting.check(files, trust=trust)
    project = next((file for file in files if file.path != config.user_file()), None)
    told = config.merged(files)
    crew = _Crew(choices, told, files)
    chosen = _chosen(choices, list(told.agents))
    crew.add(chosen)
    crew.ask(tuple(choices.ask.split(",")) if choices.ask else ())
    agent_id = "" if choices.team or len(chosen) > 1 else chosen[0]
    endpoint = find_endpoint(choices.llm, choices.model, choices.protocol, told.llm, key_env=choices.api_key_env)
    trusting.check_server(endpoint.base_url, named_here=server_named, trust=trust)
    agents = [_decided(agent) for agent in crew.agents] if endpoint.is_local else crew.agents
    limits = _limits(choices, told.budget.limits())
    folder = str(Path(choices.folder or ".").resolve())
    kept = msgspec.structs.replace(
        choices,
        folder=folder,
        llm=endpoint.base_url,
        model=endpoint.named,
        protocol=endpoint.protocol,
        agent=agent_id or None,
        team=not agent_id,
        config=str(project.path.absolute()) if project else "",
        api_key_env=endpoint.key_env,
    )
    origin = _origin(kept)
    rate = None if told.llm.rate is None else told.llm.rate.limit()
    runtime = AgentRuntime(
        llm=_governed(make_llm(endpoint), rate),
        llm_by_site={
            site: _governed(make_llm(endpoint.with_model(table.model)), table.rate.limit() if table.rate else rate)
            for site, table in told.llm.sites().items()
        },
        agents=agents,
        tool_registry=crew.tools,
        guardrail_config=limits,
        approver=approver,
        policy=None if told.policy is None else load_policy(told.policy),
        approve_plans=bool(told.approve_plans),
        answer_within_s=told.answer_within_s,
        auto_resume=False,
        origin=origin,
    )
    who = f"agent {agent_id}" if agent_id else f"agents {', '.join(agent.agent_id for agent in agents)}"
    return Wired(runtime, agent_id, limits, origin, (who, f"model {endpoint.describe()}", f"folder {folder}"))


def _governed(llm: LLM, rate: RateLimit | None) -> LLM:
    if rate is None:
        return llm
    from harness.llm.governed import GovernedLLM

    return GovernedLLM(llm, rate)


def wire_demo(choices: Choices) -> Wired:
    """Build the runtime of the demonstration: recorded replies, real tools, real files."""
    from harness.cli import demo

    recording = demo.load()
    agent = READER if choices.max_steps is None else msgspec.structs.replace(READER, max_steps=choices.max_steps)
    limits = _limits(choices, GuardrailConfig())
    tools = ToolRegistry(file_tools(demo.FILES))
    origin = _origin(choices)
    runtime = AgentRuntime(
        llm=demo.RecordedLLM(recording, fast=choices.fast),
        agents=[agent],
        tool_registry=tools,
        guardrail_config=limits,
        auto_resume=False,
        origin=origin,
    )
    replies = f"the model's replies are a recording of {recording.model}"
    notes = (f"Demonstration: {replies}; the tools run for real, on the files of this folder.",)
    facts = (f"agent {agent.agent_id}", f"folder {demo.FILES}")
    return Wired(runtime, agent.agent_id, limits, origin, facts, notes)


def _origin(choices: Choices) -> Origin:
    folder = str(Path.cwd())
    try:
        folder.encode()
    except UnicodeEncodeError:
        text = "the name of the working directory is not UTF-8 and cannot be written down: go to another one"
        raise ConfigError(text) from None
    # The words, not the interpreter's path: they are shown to people.
    return Origin("cli", ("harness", *sys.argv[1:]), folder, choices.settings())


def _decided(agent: AgentConfig) -> AgentConfig:
    """Take the chance out of a small local model, where the user has not said how much of it there is to be."""
    if agent.llm_settings.temperature is not None:
        return agent
    return msgspec.structs.replace(agent, llm_settings=msgspec.structs.replace(agent.llm_settings, temperature=0.0))


def _limits(choices: Choices, limits: GuardrailConfig) -> GuardrailConfig:
    if choices.max_cost is not None:
        limits = msgspec.structs.replace(limits, max_total_cost_usd=choices.max_cost)
    if choices.max_seconds is not None:
        limits = msgspec.structs.replace(limits, max_wall_time_seconds=choices.max_seconds)
    return limits


def _chosen(choices: Choices, defined: list[str]) -> list[str]:
    """Return the agents the run may give work to: the one that was named, or all there are."""
    wanted = choices.agent
    if wanted is None:
        return defined or [READER.agent_id]
    if wanted not in defined and wanted != READER.agent_id:
        raise ConfigError(f"unknown agent {wanted!r}{nearest(wanted, [*defined, READER.agent_id])}")
    return [wanted]


class _Crew:
    """Builds the agents of the configuration files, and the tools they share.

    Attributes:
        agents: those that were added, and those they may delegate to.
        tools: what any of them may call.
    """

    def __init__(self, choices: Choices, told: FileModel, files: list[ConfigFile]) -> None:
        self.agents: list[AgentConfig] = []
        self.tools = ToolRegistry()
        self._max_steps = choices.max_steps
        self._told = told
        self._files = files
        self._readers = file_tools(choices.folder or ".")
        self._by_name = {tool.spec.name: tool for tool in self._readers}
        self._loaded: dict[tuple[Path, str], Tool] = {}
        self._delegates: dict[str, Tool] = {}
        for file in files:
            _check_words(file, list(self._by_name))

    def add(self, names: list[str]) -> None:
        """Add agents, with those they delegate to."""
        waiting = [*names]
        while waiting:
            name = waiting.pop(0)
            if all(agent.agent_id != name for agent in self.agents):
                agent = self._agent(name)
                if self._max_steps is not None:
                    agent = msgspec.structs.replace(agent, max_steps=self._max_steps)
                self.agents.append(agent)
                others = [self.tools.get(tool).spec.delegate_to for tool in agent.allowed_tools or ()]
                waiting += [other for other in others if other in self._told.agents]

    def ask(self, names: tuple[str, ...]) -> None:
        """Have tools ask before they run, of every agent that has them.

        Raises:
            ConfigError: no agent has such a tool.
        """
        for name in names:
            having = [agent for agent in self.agents if name in (agent.allowed_tools or ())]
            if not having:
                raise ConfigError(
                    f"--ask {name}: no agent at work has such a tool{nearest(name, self.tools.all_names())}"
                )
        self.agents = [
            msgspec.structs.replace(agent, hitl_tools=tuple(dict.fromkeys((*agent.hitl_tools, *asked))))
            if (asked := [name for name in names if name in (agent.allowed_tools or ())])
            else agent
            for agent in self.agents
        ]

    def _agent(self, name: str) -> AgentConfig:
        table = self._told.agents.get(name)
        if table is None:
            for tool in self._readers:
                self._register(tool)
            return READER
        file = next(file for file in reversed(self._files) if name in file.data.agents)
        tools = tuple(self._tools_of(name, table, file))
        return _agent(name, table, file, tools, self._asked_of(name, table, file, tools))

    def _asked_of(self, name: str, table: AgentTable, file: ConfigFile, tools: tuple[str, ...]) -> tuple[str, ...]:
        """Return the tools of an agent that ask before they run, by the names a model calls them by."""
        asked: list[str] = []
        for word in table.hitl_tools:
            loaded = self._loaded.get((file.path.absolute().parent, word))
            names = [tool.spec.name for tool in self._readers] if word == FILES_WORD else [word]
            names = [loaded.spec.name] if loaded is not None else names
            if not set(names) <= set(tools):
                at = f"{file.path}:{file.line('agents', name, 'hitl_tools')}"
                raise ConfigError(
                    f"{at}: hitl_tools of agent {name!r} names {word!r}, which is no tool of it{nearest(word, tools)}"
                )
            asked += names
        return tuple(dict.fromkeys(asked))

    def _tools_of(self, name: str, table: AgentTable, file: ConfigFile) -> list[str]:
        """Register an agent's tools and return their names."""
        names: list[str] = []
        for word in dict.fromkeys(table.tools):
            at = f"{file.path}:{file.line('agents', name, 'tools')}"
            for tool in (
                self._readers if word == FILES_WORD else [self._by_name.get(word) or self._load(word, file, at)]
            ):
                if not self._register(tool):
                    raise ConfigError(f"{at}: the tool {word!r}: another tool is named {tool.spec.name!r} already")
                names.append(tool.spec.name)
        at = f"{file.path}:{file.line('agents', name, 'delegates')}"
        names += [self._delegate(other, at) for other in table.delegates]
        return list(dict.fromkeys(names))

    def _delegate(self, other: str, at: str) -> str:
        """Register the tool that gives work to an agent and return its name."""
        defined = self._told.agents
        if other not in defined:
            raise ConfigError(f"{at}: it delegates to an unknown agent {other!r}{nearest(other, defined)}")
        made = self._delegates.get(other)
        if made is None:
            # The config is made for its role alone; the agent itself is built with its tools, once, by ``add``.
            made = self._delegates[other] = delegate(AgentConfig(other, defined[other].role))
        if not self._register(made):
            raise ConfigError(f"{at}: another tool is named {made.spec.name!r} already")
        return made.spec.name

    def _register(self, tool: Tool) -> bool:
        """Register a tool that any number of agents may share; False where another has its name."""
        if tool.spec.name not in self.tools.all_names():
            self.tools.register(tool)
        return self.tools.get(tool.spec.name) is tool

    def _load(self, word: str, file: ConfigFile, at: str) -> Tool:
        key = file.path.absolute().parent, word
        if key not in self._loaded:
            self._loaded[key] = _load(word, key[0], at)
        return self._loaded[key]


def _check_words(file: ConfigFile, known: list[str]) -> None:
    for name, table in file.data.agents.items():
        for word in table.tools:
            if word != FILES_WORD and word not in known and ":" not in word:
                at = f"{file.path}:{file.line('agents', name, 'tools')}"
                hint = nearest(word, [FILES_WORD, *known])
                raise ConfigError(f"{at}: agent {name!r} names an unknown tool {word!r}{hint}; or a 'module:function'")


def _load(word: str, folder: Path, at: str) -> Tool:
    """Import a tool that a harness.toml names as ``module:function``."""
    found = _import(word, folder, f"{at}: cannot load the tool")
    try:
        return as_tool(found)
    except ConfigError as error:
        raise ConfigError(f"{at}: the tool {word!r}: {error}") from error


def _import(word: str, folder: Path, what: str) -> object:
    """Import what a harness.toml names as ``module:name``; modules beside the file are found first."""
    module, _, name = word.partition(":")
    if not (module and name):
        raise ConfigError(f"{what} {word!r}: it must be written 'module:name'")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        found: object = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a user's module may do anything when it is imported, SystemExit included
        raise ConfigError(f"{what} {word!r}: {type(error).__name__}: {error}") from error
    return found


def _agent(
    name: str, table: AgentTable, file: ConfigFile, tools: tuple[str, ...], asked: tuple[str, ...]
) -> AgentConfig:
    prompt = table.prompt
    if table.prompt_file is not None:
        path = file.path.parent / table.prompt_file
        try:
            prompt = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            at = f"{file.path}:{file.line('agents', name, 'prompt_file')}"
            raise ConfigError(f"{at}: cannot read the prompt file {str(path)!r}: {error}") from None
    if prompt is None:
        prompt = PROMPT if set(READER.allowed_tools or ()) & set(tools) else ""
    given = table.model_dump(exclude_none=True, exclude={"limits", "output"})
    if table.limits is not None:
        given["limits"] = table.limits.limits()
    if table.output is not None:
        at = f"{file.path}:{file.line('agents', name, 'output')}"
        given["output"] = _import(table.output, file.path.absolute().parent, f"{at}: cannot load the output")
    settings = LLMSettings(**{key: given.pop(key) for key in LLMSettings.__struct_fields__ if key in given})
    for key in ("role", "prompt", "prompt_file", "tools", "delegates", "hitl_tools"):
        given.pop(key, None)
    return AgentConfig(name, table.role, prompt, tools, hitl_tools=asked, llm_settings=settings, **given)
