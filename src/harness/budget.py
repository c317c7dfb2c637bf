"""What a run used and what it may use: pure arithmetic. Money is integer micro-dollars."""

from __future__ import annotations

import msgspec

from harness.errors import ConfigError

MICRO = 1_000_000
"""Micro-dollars in a dollar."""


class Usage(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Tokens and money of one or more language model calls.

    Attributes:
        input_tokens: tokens sent, those served from a cache included.
        output_tokens: tokens received, reasoning included.
        cache_read_tokens: the part of the input that was served from the provider's cache.
        cache_write_tokens: the part of the input that was written to it.
        reasoning_tokens: the part of the output that was reasoning.
        cost_microusd: what it cost, in millionths of a dollar; 0 where ``unpriced`` counts the call.
        unpriced: calls whose price is unknown. An unknown price is never taken for zero.

    >>> (Usage(10, 2) + Usage(1, 1)).input_tokens
    11
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    cost_microusd: int = 0
    unpriced: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cache_read_tokens + other.cache_read_tokens,
            self.cache_write_tokens + other.cache_write_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.cost_microusd + other.cost_microusd,
            self.unpriced + other.unpriced,
        )

    @property
    def cost_usd(self) -> float:
        """The cost in dollars."""
        return self.cost_microusd / MICRO


class GuardrailConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a run. They are folded from the journal, so a resumed run keeps what it spent.

    Attributes:
        max_total_cost_usd: dollars; None for no limit.
        max_wall_time_seconds: seconds during which the run was being driven; None for no limit.
        max_input_tokens: tokens sent, over all calls.
        max_output_tokens: tokens received, over all calls.
        max_llm_calls: language model calls, failed attempts included.
        max_tool_calls: tool calls that were started.
        max_replan_count: how often a plan may be replaced.
        confidence_threshold: below this a task's answer counts as doubtful.
        max_parallel_tasks: tasks of a plan that are at work at the same time.
        max_plan_tasks: the most tasks a planner may write into one plan.
        max_delegate_depth: how often a delegated piece of work may be delegated on.

    Raises:
        ConfigError: a limit is negative.

    >>> GuardrailConfig(max_llm_calls=5).max_llm_calls
    5
    """

    max_total_cost_usd: float | None = 2.0
    max_wall_time_seconds: float | None = 180
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    max_llm_calls: int | None = None
    max_tool_calls: int | None = None
    max_replan_count: int = 2
    confidence_threshold: float = 0.6
    max_parallel_tasks: int = 16
    max_plan_tasks: int = 50
    max_delegate_depth: int = 3

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            least = 1 if name in {"max_parallel_tasks", "max_plan_tasks"} else 0
            if value is not None and not value >= least:
                words = "one" if least else "zero"
                raise ConfigError(f"GuardrailConfig.{name} must be {words} or more, not {value!r}")


class Spent(msgspec.Struct, gc=False):
    """What a run has used so far. Grown in place by the fold.

    Attributes:
        usage: tokens and money, copied records of a fork left out.
        llm_calls: language model calls that were started.
        tool_calls: tool calls that were started.
        active_s: seconds during which a driver was at work.
    """

    usage: Usage = Usage()
    llm_calls: int = 0
    tool_calls: int = 0
    active_s: float = 0.0


def exceeded(spent: Spent, limits: GuardrailConfig) -> str | None:
    """Name the first limit that leaves no room for another call, or return None."""
    usage = spent.usage
    if (cost := limits.max_total_cost_usd) is not None and usage.cost_microusd >= cost * MICRO:
        return f"max_total_cost_usd={cost:g} is spent (${usage.cost_usd:.4f})"
    if over := wall_is_over(spent, limits):
        return over
    if (most := limits.max_llm_calls) is not None and spent.llm_calls >= most:
        return f"max_llm_calls={most} is reached"
    if (most := limits.max_input_tokens) is not None and usage.input_tokens >= most:
        return f"max_input_tokens={most} is reached ({usage.input_tokens})"
    if (most := limits.max_output_tokens) is not None and usage.output_tokens >= most:
        return f"max_output_tokens={most} is reached ({usage.output_tokens})"
    return None


def wall_is_over(spent: Spent, limits: GuardrailConfig) -> str | None:
    """Say that the wall-clock limit is over, or return None."""
    wall = limits.max_wall_time_seconds
    if wall is None or spent.active_s < wall:
        return None
    return f"max_wall_time_seconds={wall:g} is over ({spent.active_s:.1f} s)"
