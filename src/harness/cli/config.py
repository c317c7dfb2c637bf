"""harness.toml: read, checked against its model, and merged. A wrong file names its line and the nearest right word."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, cast

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from harness.agent import AgentConfig
from harness.budget import GuardrailConfig, Limits
from harness.cli.places import user_folder
from harness.errors import ConfigError
from harness.llm.rate import MOST, RateLimit
from harness.llm.window import LONGEST_S
from harness.records import Site
from harness.registry import nearest
from harness.toml_text import line_of, parse_toml, read_text

PROJECT_FILE = "harness.toml"
USER_FILE = "config.toml"


class Strict(BaseModel):
    """A table of a file: unknown words and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


_Rate = Annotated[int, Field(ge=1, le=MOST)]


class RateTable(Strict):
    """``[llm.rate]``: the arguments of RateLimit."""

    requests_per_minute: _Rate | None = None
    tokens_per_minute: _Rate | None = None
    max_concurrent: _Rate | None = None
    window_s: Annotated[float, Field(gt=0, le=LONGEST_S, allow_inf_nan=False)] | None = None

    def limit(self) -> RateLimit:
        """Return the limit; what is given the same one obeys it together.

        Raises:
            ConfigError: a window would hold no call.
        """
        return RateLimit(**self.model_dump(exclude_none=True))


class SiteTable(Strict):
    """``[llm.planner]`` and the like: another model of the same server for one thing a run asks.

    Attributes:
        rate: a limit of its own; without one it shares that of ``[llm.rate]``.
    """

    model: str
    rate: RateTable | None = None


class LLMTable(Strict):
    """The ``[llm]`` table."""

    model: str | None = None
    base_url: str | None = None
    protocol: Literal["native", "text", "responses", "background"] | None = None
    api_key_env: str | None = None
    rate: RateTable | None = None
    classifier: SiteTable | None = None
    router: SiteTable | None = None
    planner: SiteTable | None = None
    synthesiser: SiteTable | None = None
    summariser: SiteTable | None = None

    def sites(self) -> dict[Site, SiteTable]:
        """Return the call sites that have a model of their own."""
        tables: dict[Site, SiteTable | None] = {
            "classifier": self.classifier,
            "router": self.router,
            "planner": self.planner,
            "synthesiser": self.synthesiser,
            "summariser": self.summariser,
        }
        return {site: table for site, table in tables.items() if table is not None}


_Limit = Annotated[int, Field(ge=0)]
_Amount = Annotated[float, Field(ge=0)]


class LimitsTable(Strict):
    """The limits of one agent or one task: ``[agents.NAME.limits]``, or ``limits`` of a ``[[tasks]]``."""

    max_total_cost_usd: _Amount | None = None
    max_input_tokens: _Limit | None = None
    max_output_tokens: _Limit | None = None
    max_llm_calls: _Limit | None = None
    max_tool_calls: _Limit | None = None
    on_unpriced: Literal["allow", "refuse"] | None = None

    def limits(self) -> Limits:
        """Return the limits."""
        return Limits(**self.model_dump(exclude_none=True))


class AgentTable(Strict):
    """One agent: ``[agents.NAME]``, or ``[[agents]]`` with an ``id``. What is not given stays AgentConfig's default."""

    role: str = ""
    prompt: str | None = None
    prompt_file: str | None = None
    tools: list[str] = Field(default_factory=lambda: ["files"])
    delegates: list[str] = Field(default_factory=list[str])
    hitl_tools: list[str] = Field(default_factory=list[str])
    max_steps: Annotated[int, Field(ge=1)] | None = None
    confidence_from_llm: bool | None = None
    working_memory_max_tokens: Annotated[int, Field(ge=1)] | None = None
    checkpoint_every: Annotated[int, Field(ge=0)] | None = None
    max_stale_steps: Annotated[int, Field(ge=1)] | None = None
    max_reply_errors: Annotated[int, Field(ge=0)] | None = None
    max_llm_attempts: Annotated[int, Field(ge=1)] | None = None
    max_parallel_tools: Annotated[int, Field(ge=1)] | None = None
    max_parallel_tasks: Annotated[int, Field(ge=1)] | None = None
    max_result_chars: Annotated[int, Field(ge=100)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    reasoning_effort: str | None = None
    output: str | None = None
    limits: LimitsTable | None = None


class BudgetTable(Strict):
    """The ``[budget]`` table: GuardrailConfig's limits."""

    max_total_cost_usd: _Amount | None = None
    max_wall_time_seconds: _Amount | None = None
    max_input_tokens: _Limit | None = None
    max_output_tokens: _Limit | None = None
    max_llm_calls: _Limit | None = None
    max_tool_calls: _Limit | None = None
    max_replan_count: _Limit | None = None
    on_unpriced: Literal["allow", "refuse"] | None = None
    on_limit: Literal["fail", "ask"] | None = None
    confidence_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    max_parallel_tasks: Annotated[int, Field(ge=1)] | None = None
    max_plan_tasks: Annotated[int, Field(ge=1)] | None = None
    max_delegate_depth: _Limit | None = None

    def limits(self) -> GuardrailConfig:
        """Return the limits, the library's defaults where the table is silent."""
        return GuardrailConfig(**self.model_dump(exclude_none=True))


class FileModel(Strict):
    """A whole file.

    Attributes:
        policy: the file of the rules that say which calls run, are forbidden or asked about.
        approve_plans: whether a plan waits for a person's yes.
        answer_within_s: seconds a question stands before it counts as a no.
    """

    policy: str | None = None
    approve_plans: bool | None = None
    answer_within_s: Annotated[float, Field(gt=0)] | None = None
    llm: LLMTable = Field(default_factory=LLMTable)
    agents: dict[str, AgentTable] = Field(default_factory=dict)
    budget: BudgetTable = Field(default_factory=BudgetTable)


class ConfigFile:
    """One file that was read.

    Attributes:
        path: where it is.
        data: what it says.
        digest: the SHA-256 of its bytes.
    """

    def __init__(self, path: Path, text: str, data: FileModel) -> None:
        self.path = path
        self.text = text
        self.data = data
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def line(self, *keys: str) -> int:
        """Return the line where a key stands."""
        return line_of(self.text, keys)

    def dangers(self) -> list[str]:
        """Say what in the file can run code or send data somewhere."""
        agents = self.data.agents.items()
        found = [f"code {tool!r} (agent {name!r})" for name, agent in agents for tool in agent.tools if ":" in tool]
        found += [f"code {agent.output!r} (agent {name!r})" for name, agent in agents if agent.output]
        if self.data.llm.base_url:
            found.append(f"the server {self.data.llm.base_url!r}")
        if self.data.llm.api_key_env:
            found.append(f"the key in {self.data.llm.api_key_env!r}")
        if self.data.policy:
            found.append(f"the policy {self.data.policy!r}")
        outside = [agent.prompt_file for agent in self.data.agents.values() if agent.prompt_file]
        found.extend(f"the prompt file {file!r}" for file in outside if not _inside(self.path.parent, file))
        return found


def _inside(folder: Path, file: str) -> bool:
    return (folder / file).resolve().is_relative_to(folder.resolve())


def user_file() -> Path:
    """Return where the user's own configuration is."""
    return user_folder() / USER_FILE


def find(config: str | None) -> list[ConfigFile]:
    """Read the user's file and the project's, in the order in which the later wins.

    Args:
        config: the project's file; None takes harness.toml of the current folder, where there is one.

    Raises:
        ConfigError: a file is wrong, or the one named is missing.
    """
    files = find_user()
    if config is not None:
        files.append(read(Path(config).expanduser()))
    elif Path(PROJECT_FILE).is_file():
        files.append(read(Path(PROJECT_FILE).absolute()))
    return files


def find_user() -> list[ConfigFile]:
    """Read the user's file alone, where there is one.

    Raises:
        ConfigError: it is wrong.
    """
    return [read(user_file())] if user_file().is_file() else []


def read(path: Path) -> ConfigFile:
    """Read and check one file.

    Raises:
        ConfigError: it cannot be read or is wrong; the text names file, line and what to write instead.
    """
    return parse(read_text(path, "configuration"), path)


def parse(text: str, path: Path) -> ConfigFile:
    """Check the text of a file.

    Raises:
        ConfigError: it is wrong.
    """
    raw = parse_toml(text, path)
    agents = raw.get("agents")
    if isinstance(agents, list):
        raw["agents"] = _by_id(cast("list[object]", agents), text, path)
    try:
        data = FileModel.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(problem, text, path, _WORDS) for problem in error.errors())) from None
    file = ConfigFile(path, text, data)
    _check_agents(file)
    _check_rates(file)
    return file


def _by_id(agents: Sequence[object], text: str, path: Path) -> dict[str, object]:
    """Turn a list of ``[[agents]]`` tables into a table by id."""
    named: dict[str, object] = {}
    at = f"{path}:{line_of(text, ('agents',))}"
    for agent in agents:
        table = cast("dict[str, object]", agent) if isinstance(agent, dict) else {}
        name = table.get("id")
        if not isinstance(name, str):
            raise ConfigError(f"{at}: each [[agents]] needs an id, as in id = 'reader'")
        if name in named:
            raise ConfigError(f"{at}: agent {name!r} is defined twice")
        named[name] = {key: value for key, value in table.items() if key != "id"}
    return named


Words: TypeAlias = Mapping[tuple[str, ...], type[BaseModel]]
"""The model of each table, for a hint at the nearest word; ``*`` stands for any name or place in a list."""

_WORDS: Words = {
    (): FileModel,
    ("llm",): LLMTable,
    ("llm", "rate"): RateTable,
    ("llm", "*"): SiteTable,
    ("llm", "*", "rate"): RateTable,
    ("agents", "*"): AgentTable,
    ("agents", "*", "limits"): LimitsTable,
    ("budget",): BudgetTable,
}


def explain(problem: ErrorDetails, text: str, path: Path, words: Words) -> str:
    """Turn one problem of pydantic's into a sentence with its line."""
    keys = tuple(str(key) for key in problem["loc"])
    where = f"{path}:{line_of(text, keys)}"
    place = keys[:-1]
    table = f"[[{place[0]}]]" if place and place[-1].isdigit() else f"[{'.'.join(place)}]"
    if problem["type"] == "missing":
        return f"{where}: {table if place else 'the file'} needs {keys[-1]!r}"
    if problem["type"] != "extra_forbidden":
        message = str(problem["msg"])
        named = ".".join(key for key in keys if not key.isdigit())
        return f"{where}: {named}: {message[0].lower()}{message[1:]}, not {problem['input']!r}"
    model = words.get(place) or words.get((*place[:1], "*", *place[2:]))
    known = _known(model) if model else []
    return f"{where}: unknown word {keys[-1]!r}{f' in {table}' if place else ''}{nearest(keys[-1], known)}"


def _known(model: type[BaseModel]) -> list[str]:
    names: list[str] = []
    for name, field in model.model_fields.items():
        alias = field.validation_alias
        names.append(str(alias.choices[0]) if isinstance(alias, AliasChoices) else name)
    return names


def _check_agents(file: ConfigFile) -> None:
    for name, agent in file.data.agents.items():
        at = f"{file.path}:{file.line('agents', name)}"
        try:
            AgentConfig(name)
        except ConfigError as error:
            raise ConfigError(f"{at}: {error}") from None
        if agent.prompt is not None and agent.prompt_file is not None:
            raise ConfigError(f"{at}: agent {name!r} has a prompt and a prompt_file; keep one")


def _check_rates(file: ConfigFile) -> None:
    llm = file.data.llm
    sites = ((("llm", site, "rate"), table.rate) for site, table in llm.sites().items())
    for keys, rate in ((("llm", "rate"), llm.rate), *sites):
        if rate is not None:
            try:
                rate.limit()
            except ConfigError as error:
                raise ConfigError(f"{file.path}:{file.line(*keys)}: {'.'.join(keys)}: {error}") from None


def merged(files: Iterable[ConfigFile]) -> FileModel:
    """Merge files: a later one wins key by key, agents by name. What asks a person in one of them does so in all."""
    llm: dict[str, object] = {}
    rate: dict[str, object] = {}
    budget: dict[str, object] = {}
    agents: dict[str, AgentTable] = {}
    people: dict[str, object] = {}
    for file in files:
        given = file.data.model_dump(include={"policy", "approve_plans", "answer_within_s"}, exclude_none=True)
        if "policy" in given:
            given["policy"] = str(file.path.absolute().parent / given["policy"])
        if people.get("approve_plans"):
            given.pop("approve_plans", None)
        people.update(given)
        rate = {**rate, **(file.data.llm.rate or RateTable()).model_dump(exclude_none=True)}
        llm.update(file.data.llm.model_dump(exclude_none=True, exclude={"rate"}))
        budget.update(file.data.budget.model_dump(exclude_none=True))
        agents.update(file.data.agents)
    if rate:
        llm["rate"] = rate
    return FileModel(llm=LLMTable(**llm), budget=BudgetTable(**budget), agents=agents, **people)  # type: ignore[arg-type]  # dumped from the same models
