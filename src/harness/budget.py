"""What a run used and what it may use: pure arithmetic. Money is integer micro-dollars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import msgspec

from harness.errors import ConfigError

MICRO = 1_000_000
"""Micro-dollars in a dollar."""

MOST_MICRO = 10**18
"""What a limit on money counts for at the most: no number is beyond arithmetic."""


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


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The limits of one agent or one task. Of None there is no limit; the run's own hold besides.

    Attributes:
        max_total_cost_usd: dollars; None for no limit.
        max_input_tokens: tokens sent, over all calls.
        max_output_tokens: tokens received, over all calls.
        max_llm_calls: language model calls, failed attempts included.
        max_tool_calls: tool calls that were started.
        on_unpriced: whether a call of a model whose price is unknown is sent although money is limited.

    Raises:
        ConfigError: a limit is negative or no number.

    >>> Limits(max_llm_calls=5).max_total_cost_usd is None
    True
    """

    max_total_cost_usd: float | None = None
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    max_llm_calls: int | None = None
    max_tool_calls: int | None = None
    on_unpriced: Literal["allow", "refuse"] = "allow"

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if self.on_unpriced not in ("allow", "refuse"):
            raise ConfigError(f"{kind}.on_unpriced must be 'allow' or 'refuse', not {self.on_unpriced!r}")
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name.startswith("on_") or value is None:  # words say what is done, numbers how much
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"{kind}.{name} must be a number, not {value!r}")
            least = 1 if name in {"max_parallel_tasks", "max_plan_tasks"} else 0
            if not value >= least:
                words = "one" if least else "zero"
                raise ConfigError(f"{kind}.{name} must be {words} or more, not {value!r}")


class GuardrailConfig(Limits, frozen=True, kw_only=True):
    """The limits of a run. They are folded from the journal, so a resumed run keeps what it spent.

    Attributes:
        max_total_cost_usd: dollars; None for no limit.
        max_wall_time_seconds: seconds during which the run was being driven; None for no limit.
        max_input_tokens: tokens sent, over all calls.
        max_output_tokens: tokens received, over all calls.
        max_llm_calls: language model calls, failed attempts included.
        max_tool_calls: tool calls that were started.
        on_limit: what becomes of a run that meets one of the six limits above: it fails, or it asks whether the limit
            is raised. Where it asks, calls that are at work when the time is over are not cut.
        max_replan_count: how often a plan may be replaced.
        on_unpriced: whether a call of a model whose price is unknown is sent although money is limited.
        confidence_threshold: below this a task's answer counts as doubtful.
        max_parallel_tasks: tasks of a plan that are at work at the same time.
        max_plan_tasks: the most tasks a planner may write into one plan.
        max_delegate_depth: how often a delegated piece of work may be delegated on.

    Raises:
        ConfigError: a limit is negative or no number.

    >>> GuardrailConfig(max_llm_calls=5).max_llm_calls
    5
    """

    max_total_cost_usd: float | None = 2.0
    max_wall_time_seconds: float | None = 180
    max_replan_count: int = 2
    confidence_threshold: float = 0.6
    on_limit: Literal["fail", "ask"] = "fail"
    max_parallel_tasks: int = 16
    max_plan_tasks: int = 50
    max_delegate_depth: int = 3

    def __post_init__(self) -> None:
        if self.on_limit not in ("fail", "ask"):
            raise ConfigError(f"GuardrailConfig.on_limit must be 'fail' or 'ask', not {self.on_limit!r}")
        Limits.__post_init__(self)


UNLIMITED = GuardrailConfig(max_total_cost_usd=None, max_wall_time_seconds=None)
"""No limit at all."""


class Spent(msgspec.Struct, gc=False):
    """What a run has used so far. Grown in place by the fold.

    Attributes:
        usage: tokens and money, copied records of a fork left out.
        llm_calls: language model calls that were started.
        tool_calls: tool calls that were started.
        active_s: seconds during which a driver was at work.
        estimated: language model calls that were cut, or reported nothing, and are charged by estimate.
    """

    usage: Usage = Usage()
    llm_calls: int = 0
    tool_calls: int = 0
    active_s: float = 0.0
    estimated: int = 0


class Held(msgspec.Struct, gc=False):
    """The worst case of all calls in flight: nothing is sent that would not fit beside it. Grown in place."""

    input_tokens: int = 0
    output_tokens: int = 0
    cost_microusd: int = 0


class Reservation(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The worst case of one call, held from before it is sent until it has its outcome.

    Attributes:
        input_tokens: tokens to be sent.
        output_tokens: the most that may come back.
        cost_microusd: what that costs; 0 where the price is unknown.

    >>> Reservation(100, 50, 7).as_usage().output_tokens
    50
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cost_microusd: int = 0

    def as_usage(self, *, priced: bool = True) -> Usage:
        """Return it as usage, for a call of which no more is known."""
        return Usage(
            self.input_tokens, self.output_tokens, cost_microusd=self.cost_microusd, unpriced=0 if priced else 1
        )  # fmt: skip


class Account(msgspec.Struct, gc=False):
    """What one agent or one task that has limits of its own has used and holds. Grown in place by the fold."""

    spent: Spent = msgspec.field(default_factory=Spent)
    held: Held = msgspec.field(default_factory=Held)


ASSUMED_OUTPUT_TOKENS = 4096
"""Tokens a reply is taken to have at the most where ``max_output_tokens`` does not say it."""

LEAST_OUTPUT_TOKENS = 256
"""Tokens below which the output limit of a call is not lowered to make it fit."""

MARGIN = 1.2
"""By how much more than estimated a request is taken to have: an estimate is not a count."""

Price: TypeAlias = "Callable[[int, int], int | None]"
"""Takes input and output tokens; returns micro-dollars, or None where the price is unknown."""


def total(usages: Sequence[Usage]) -> Usage:
    """Add up what calls used.

    >>> total([Usage(10, 2), Usage(1, 1)]).output_tokens
    3
    """
    return Usage(*map(sum, zip(*map(msgspec.structs.astuple, usages), strict=True)))


def reserve(
    spent: Spent, held: Held, limits: Limits, *, tokens: int, output: int | None, price: Price | None
) -> Reservation | str:
    """Return the worst case of a call as it fits beside what is spent and held, or why it does not.

    Args:
        spent: what the run, the agent or the task has used.
        held: what its calls in flight may yet use.
        limits: its limits.
        tokens: estimated tokens of the request.
        output: the most tokens the reply may have; None where nothing limits it.
        price: prices a call; None where nobody can.
    """
    if (most := limits.max_llm_calls) is not None and spent.llm_calls >= most:
        return f"max_llm_calls={most} is reached"
    wanted = int(tokens * MARGIN) + 1
    limit = ASSUMED_OUTPUT_TOKENS if output is None else output
    least = max(1, min(LEAST_OUTPUT_TOKENS, limit))
    usage = spent.usage
    if (most := limits.max_input_tokens) is not None and usage.input_tokens + held.input_tokens + wanted > most:
        return f"max_input_tokens={most} leaves no room for a call of {wanted} tokens"
    if (most := limits.max_output_tokens) is not None:
        limit = min(limit, most - usage.output_tokens - held.output_tokens)
        if limit < max(1, min(least, most)):
            return f"max_output_tokens={most} leaves no room for a reply"
    cost = price(wanted, limit) if price is not None else None
    dollars = limits.max_total_cost_usd
    if cost is None:
        if limits.on_unpriced == "refuse" and dollars is not None:
            return "the price of the model is unknown (on_unpriced='refuse')"
        if dollars is not None and usage.cost_microusd >= dollars * MICRO:
            return f"max_total_cost_usd={dollars:g} is spent (${usage.cost_usd:.4f})"
        return Reservation(wanted, limit)
    if dollars is None or price is None:
        return Reservation(wanted, limit, cost)
    room = int(min(dollars * MICRO, MOST_MICRO)) - usage.cost_microusd - held.cost_microusd
    if cost > room:
        limit = _affordable(price, wanted, limit, room)
        if limit < least:
            return f"max_total_cost_usd={dollars:g} leaves no room for a call of up to ${cost / MICRO:.4f}"
        cost = price(wanted, limit) or 0
    return Reservation(wanted, limit, cost)


def _affordable(price: Price, tokens: int, limit: int, room: int) -> int:
    """Return the longest reply that fits into some money, by halving: prices need not grow evenly."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        cost = price(tokens, middle)
        if cost is not None and cost <= room:
            low = middle
        else:
            high = middle - 1
    return low


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
