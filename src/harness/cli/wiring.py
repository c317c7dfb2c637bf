"""From what the user chose to a runtime: the agent, its tools, the model. Nothing is guessed twice: a run keeps it."""

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
from harness.tools import as_tool, file_tools

if TYPE_CHECKING:
    from harness.cli.config import AgentTable, ConfigFile, FileModel
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
    """A runtime that is ready, and what to say about it."""

    runtime: AgentRuntime
    agent_id: str
    limits: GuardrailConfig
    facts: tuple[str, ...]
    notes: tuple[str, ...] = ()


def wire(choices: Choices, *, trust: bool = False, server_named: bool = True) -> Wired:
    """Build the runtime for what was chosen.

    Args:
        choices: from the command line, or from the run that is resumed.
        trust: the user trusts the project's harness.toml.
        server_named: whether the user names the model now; False where only the run's journal does.

    Raises:
        ConfigError: something chosen does not exist or does not fit.
    """
    if choices.demo:
        return wire_demo(choices)
    from harness.cli import config
    from harness.cli import trust as trusting

    files = config.find(choices.config) if choices.config != "" else config.find_user()
    trusting.check(files, trust=trust)
    project = next((file for file in files if file.path != config.user_file()), None)
    told = config.merged(files)
    agent, tools = _agent_and_tools(choices, told, files)
    endpoint = find_endpoint(choices.llm, choices.model, choices.protocol, told.llm, key_env=choices.api_key_env)
    trusting.check_server(endpoint.base_url, named_here=server_named, trust=trust)
    if endpoint.is_local and agent.llm_settings.temperature is None:
        agent = msgspec.structs.replace(
            agent, llm_settings=msgspec.structs.replace(agent.llm_settings, temperature=0.0)
        )
    limits = _limits(choices, told.budget.limits())
    folder = str(Path(choices.folder or ".").resolve())
    kept = msgspec.structs.replace(
        choices,
        folder=folder,
        llm=endpoint.base_url,
        model=endpoint.model,
        protocol=endpoint.protocol,
        agent=agent.agent_id,
        config=str(project.path.absolute()) if project else "",
        api_key_env=endpoint.key_env,
    )
    runtime = _runtime(make_llm(endpoint), agent, tools, limits, kept)
    facts = (f"agent {agent.agent_id}", f"model {endpoint.describe()}", f"folder {folder}")
    return Wired(runtime, agent.agent_id, limits, facts)


def wire_demo(choices: Choices) -> Wired:
    """Build the runtime of the demonstration: recorded replies, real tools, real files."""
    from harness.cli import demo

    recording = demo.load()
    agent = READER if choices.max_steps is None else msgspec.structs.replace(READER, max_steps=choices.max_steps)
    limits = _limits(choices, GuardrailConfig())
    tools = ToolRegistry(file_tools(demo.FILES))
    runtime = _runtime(demo.RecordedLLM(recording, fast=choices.fast), agent, tools, limits, choices)
    replies = f"the model's replies are a recording of {recording.model}"
    notes = (f"Demonstration: {replies}; the tools run for real, on the files of this folder.",)
    return Wired(runtime, agent.agent_id, limits, (f"agent {agent.agent_id}", f"folder {demo.FILES}"), notes)


def _runtime(
    llm: object, agent: AgentConfig, tools: ToolRegistry, limits: GuardrailConfig, choices: Choices
) -> AgentRuntime:
    # The words, not the interpreter's path: they are shown to people.
    origin = Origin("cli", ("harness", *sys.argv[1:]), str(Path.cwd()), choices.settings())
    return AgentRuntime(
        llm=llm, agents=[agent], tool_registry=tools, guardrail_config=limits, auto_resume=False, origin=origin
    )


def _limits(choices: Choices, limits: GuardrailConfig) -> GuardrailConfig:
    if choices.max_cost is not None:
        limits = msgspec.structs.replace(limits, max_total_cost_usd=choices.max_cost)
    if choices.max_seconds is not None:
        limits = msgspec.structs.replace(limits, max_wall_time_seconds=choices.max_seconds)
    return limits


def _agent_and_tools(choices: Choices, told: FileModel, files: list[ConfigFile]) -> tuple[AgentConfig, ToolRegistry]:
    name = _agent_name(choices.agent, list(told.agents))
    registry = ToolRegistry()
    readers = file_tools(choices.folder or ".")
    by_name = {tool.spec.name: tool for tool in readers}
    for file in files:
        _check_words(file, list(by_name))
    table = told.agents.get(name)
    if table is None:
        agent = READER
        for tool in readers:
            registry.register(tool)
    else:
        file = next(file for file in reversed(files) if name in file.data.agents)
        for word in dict.fromkeys(table.tools):
            wanted = readers if word == FILES_WORD else [by_name.get(word) or _load(word, file, name)]
            for tool in wanted:
                if tool not in readers or tool.spec.name not in registry.all_names():
                    registry.register(tool)
        agent = _agent(name, table, file, tuple(registry.all_names()))
    if choices.max_steps is not None:
        agent = msgspec.structs.replace(agent, max_steps=choices.max_steps)
    return agent, registry


def _agent_name(wanted: str | None, defined: list[str]) -> str:
    if wanted is not None:
        if wanted not in defined and wanted != READER.agent_id:
            raise ConfigError(f"unknown agent {wanted!r}{nearest(wanted, [*defined, READER.agent_id])}")
        return wanted
    if len(defined) > 1:
        raise ConfigError(f"harness.toml defines {len(defined)} agents: choose one with --agent ({', '.join(defined)})")
    return defined[0] if defined else READER.agent_id


def _check_words(file: ConfigFile, known: list[str]) -> None:
    for name, table in file.data.agents.items():
        for word in table.tools:
            if word != FILES_WORD and word not in known and ":" not in word:
                at = f"{file.path}:{file.line('agents', name, 'tools')}"
                hint = nearest(word, [FILES_WORD, *known])
                raise ConfigError(f"{at}: agent {name!r} names an unknown tool {word!r}{hint}; or a 'module:function'")


def _load(word: str, file: ConfigFile, agent: str) -> Tool:
    """Import a tool that a harness.toml names as ``module:function``; modules beside the file are found first."""
    at = f"{file.path}:{file.line('agents', agent, 'tools')}"
    module, _, name = word.partition(":")
    folder = str(file.path.absolute().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: object = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a user's module may do anything when it is imported, SystemExit included
        raise ConfigError(f"{at}: cannot load the tool {word!r}: {type(error).__name__}: {error}") from error
    try:
        return as_tool(found)
    except ConfigError as error:
        raise ConfigError(f"{at}: the tool {word!r}: {error}") from error


def _agent(name: str, table: AgentTable, file: ConfigFile, tools: tuple[str, ...]) -> AgentConfig:
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
    given = table.model_dump(exclude_none=True)
    settings = LLMSettings(**{key: given.pop(key) for key in LLMSettings.__struct_fields__ if key in given})
    for key in ("role", "prompt", "prompt_file", "tools"):
        given.pop(key, None)
    return AgentConfig(name, table.role, prompt, tools, llm_settings=settings, **given)
