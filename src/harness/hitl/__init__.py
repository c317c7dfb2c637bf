"""People in the loop: what may happen without asking, who is asked, and what they can answer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from harness.approval import Approve, ApproveForSession, Decision, Edit, Reject, Steer
from harness.hitl.base import ApprovalRequest, Approver, ApproverChain, CallbackApprover

if TYPE_CHECKING:
    from harness.hitl.console import ConsoleApprover
    from harness.hitl.policy import Context, Policy, Rule, Verdict, decide, explain
    from harness.hitl.policy_file import load_policy

__all__ = [
    "ApprovalRequest",
    "Approve",
    "ApproveForSession",
    "Approver",
    "ApproverChain",
    "CallbackApprover",
    "ConsoleApprover",
    "Context",
    "Decision",
    "Edit",
    "Policy",
    "Reject",
    "Rule",
    "Steer",
    "Verdict",
    "decide",
    "explain",
    "load_policy",
]

# A program without a policy, or without a terminal, does not pay for one.
_LATE = {"ConsoleApprover": "harness.hitl.console", "load_policy": "harness.hitl.policy_file"} | dict.fromkeys(
    ("Context", "Policy", "Rule", "Verdict", "decide", "explain"), "harness.hitl.policy"
)


def __getattr__(name: str) -> object:
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
