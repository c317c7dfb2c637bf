"""People in the loop: what may happen without asking, and who is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.hitl.policy import Context, Policy, Rule, Verdict, decide, explain
    from harness.hitl.policy_file import load_policy

__all__ = ["Context", "Policy", "Rule", "Verdict", "decide", "explain", "load_policy"]


def __getattr__(name: str) -> object:
    # A program without a policy does not pay for one.
    if name == "load_policy":
        from harness.hitl.policy_file import load_policy

        return load_policy
    if name in __all__:
        from harness.hitl import policy

        return getattr(policy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
