"""What a call cost: integer micro-dollars, or None where nobody knows. An unknown price is never taken for zero."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from typing import TypedDict

from harness.budget import MICRO, Usage
from harness.llm.base import PricesCalls

log = logging.getLogger(__name__)

GATEWAY_HEADERS = ("x-litellm-response-cost", "x-cost-usd", "x-helicone-cost-usd")
"""Response headers in which gateways say what a call cost, in dollars."""


class CallUsage(TypedDict):
    """What a ``cost_fn`` is given of one call."""

    tokens_in: int
    tokens_out: int
    total_tokens: int
    model: str


CostFunction = Callable[[CallUsage], float | None]
"""Takes the usage of one call and returns dollars, or None where it does not know."""


def microusd(value: object) -> int | None:
    """Read an amount of dollars and round it up to whole micro-dollars; None where it is not an amount.

    >>> microusd("0.0123"), microusd(0.0000001), microusd("None"), microusd(-1)
    (12300, 1, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return None
    try:
        amount = Decimal(str(value).strip())
        if not amount.is_finite() or not 0 <= amount < MICRO:
            return None
        return int((amount * MICRO).to_integral_value(ROUND_CEILING))
    except InvalidOperation:
        return None


def header_cost(headers: Mapping[str, str]) -> int | None:
    """Return what a gateway's headers say the call cost."""
    for name in GATEWAY_HEADERS:
        if (cost := microusd(headers.get(name))) is not None:
            return cost
    return None


def asked_cost(cost_fn: CostFunction, usage: CallUsage) -> int | None:
    """Ask a caller's cost function. One that raises or returns no amount is logged and skipped."""
    try:
        dollars = cost_fn(usage)
    except Exception as error:  # a user's function must not lose a reply that is already paid
        log.warning("cost_fn raised %s: %s; trying the price list", type(error).__name__, error)
        return None
    cost = microusd(dollars)
    if cost is None and dollars is not None:
        log.warning("cost_fn returned %r, which is no amount of dollars; trying the price list", dollars)
    return cost


def listed_cost(model: str, base_url: str, tokens: Usage) -> int | None:
    """Look a call up in the offline price list; slow the first time, when the list is loaded.

    Args:
        model: the model that answered.
        base_url: the provider's address; the list knows providers by it.
        tokens: what the call used.
    """
    try:
        import genai_prices
    except ImportError:
        return None
    usage = genai_prices.Usage(
        input_tokens=tokens.input_tokens,
        output_tokens=tokens.output_tokens,
        cache_read_tokens=tokens.cache_read_tokens,
        cache_write_tokens=tokens.cache_write_tokens,
    )
    try:
        return microusd(genai_prices.calc_price(usage, model, provider_api_url=base_url).total_price)
    except (LookupError, ValueError):
        return None


def dearest(llms: Iterable[object], input_tokens: int, output_tokens: int) -> int | None:
    """Price a call by the one of several models that asks most for it; None where the price of one is unknown."""
    dearest = 0
    for llm in llms:
        cost = llm.price(input_tokens, output_tokens) if isinstance(llm, PricesCalls) else None
        if cost is None:
            return None
        dearest = max(dearest, cost)
    return dearest


def whole(value: object) -> int | None:
    """Read a token count a provider reported; None for what is no count: NaN, negative, a text.

    >>> whole(12.0), whole(float("nan")), whole(-1), whole(None)
    (12, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    return min(int(value), 2**53)
