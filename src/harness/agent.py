"""AgentConfig: who an agent is and what it may do. Frozen data; tools are named, not held."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from harness.budget import Limits
from harness.errors import ConfigError


class LLMSettings(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How a model is asked.

    Attributes:
        temperature: sampling temperature; None leaves it to the provider.
        max_output_tokens: the most tokens one reply may have; None leaves it to the provider.
        reasoning_effort: for models that reason: ``low``, ``medium``, ``high`` or what the provider names.
        silence_timeout_s: seconds a reply may be silent once it has begun.
        call_timeout_s: seconds one whole call may take.
        first_byte_timeout_s: seconds until it has to begin; None for as long as it may be silent. Models that think
            before they say anything need more. Time in which a call waits for its turn in a RateLimit is not counted.

    >>> LLMSettings(temperature=0).temperature
    0
    """

    temperature: float | None = None
    max_output_tokens: int | None = None
    reasoning_effort: str | None = None
    silence_timeout_s: float = 60.0
    call_timeout_s: float = 600.0
    first_byte_timeout_s: float | None = None

    @property
    def first_byte_s(self) -> float:
        """Seconds until a reply has to begin."""
        return self.silence_timeout_s if self.first_byte_timeout_s is None else self.first_byte_timeout_s


class AgentConfig(msgspec.Struct, frozen=True):
    """An agent: its role, its prompt, the tools it may use and its limits.

    Attributes:
        agent_id: a name without ``:`` or ``/``, unique in its registry.
        role: one line that says what the agent is for; a planner and a router read it.
        system_prompt: the agent's instructions.
        allowed_tools: names of the tools it may call; None means every registered tool.
        max_steps: the most steps (one model request and its tool calls) before the run fails.
            A resumed run gets as many again.
        confidence_from_llm: ask the model how sure it is; False reports 1.0 on success.
        working_memory_max_tokens: estimated tokens of history the model is shown before the oldest
            half is summarised.
        checkpoint_every: steps that may share one durable commit while only the model and ``read`` tools
            are at work; 0 keeps the run in memory.
        max_stale_steps: steps in a row that bring nothing new (the same calls with the same results)
            before the run is stopped. The model is told at half of it.
        max_reply_errors: malformed, empty or cut replies in a row before the run fails.
        max_llm_attempts: attempts at one model call before a transient fault fails the run.
        max_parallel_tools: tool calls of one step that run at the same time.
        max_parallel_tasks: tasks of a plan this agent serves at the same time.
        max_result_chars: characters of a tool result the model is shown; the journal keeps all of it.
        hitl_tools: names of tools whose calls a person must allow.
        llm: the agent's own model; None uses the runtime's.
        llm_settings: temperature and the like.
        token_counter: estimates the tokens of a text; None counts four characters as one.
        limits: what the agent may use in one run, over all its work in it; None limits it no further than the run is.
        output: the type of its answers: a pydantic model, a dataclass, a TypedDict or any other type that pydantic can
            validate. The model is asked for such an answer, and one that does not fit is given back to it. None takes
            any text.

    Raises:
        ConfigError: an id or a number is out of range.

    >>> AgentConfig("reader", "reads files", "Answer from the files.").max_steps
    10
    """

    agent_id: str
    role: str = ""
    system_prompt: str = ""
    allowed_tools: tuple[str, ...] | None = None
    max_steps: int = 10
    confidence_from_llm: bool = True
    working_memory_max_tokens: int = 8000
    checkpoint_every: int = 1
    max_stale_steps: int = 4
    max_reply_errors: int = 3
    max_llm_attempts: int = 4
    max_parallel_tools: int = 16
    max_parallel_tasks: int = 16
    max_result_chars: int = 16_000
    hitl_tools: tuple[str, ...] = ()
    llm: object = None
    llm_settings: LLMSettings = LLMSettings()
    token_counter: Callable[[str], int] | None = None
    limits: Limits | None = None
    output: object = None

    def __post_init__(self) -> None:
        if not self.agent_id or any(c in ":/" or not c.isprintable() for c in self.agent_id):
            raise ConfigError(f"agent_id must be a printable name without ':' and '/', not {self.agent_id!r}")
        if isinstance(self.allowed_tools, str):
            raise ConfigError(f"allowed_tools must be a list of names, not the string {self.allowed_tools!r}")
        if isinstance(self.hitl_tools, str):
            raise ConfigError(f"hitl_tools must be a list of names, not the string {self.hitl_tools!r}")
        msgspec.structs.force_setattr(self, "hitl_tools", tuple(self.hitl_tools))
        if self.allowed_tools is not None:
            msgspec.structs.force_setattr(self, "allowed_tools", tuple(self.allowed_tools))
        if self.limits is not None and type(self.limits) is not Limits:
            raise ConfigError(f"AgentConfig.limits must be Limits(...), not {type(self.limits).__name__}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"AgentConfig.{name} must be a whole number of {least} or more, not {value!r}")


_LEAST = {
    "max_steps": 1,
    "working_memory_max_tokens": 1,
    "checkpoint_every": 0,
    "max_stale_steps": 1,
    "max_reply_errors": 0,
    "max_llm_attempts": 1,
    "max_parallel_tools": 1,
    "max_parallel_tasks": 1,
    "max_result_chars": 100,
}
