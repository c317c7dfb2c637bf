"""People in the loop: who is asked, and what they can answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.approval import Approve, ApproveForSession, Decision, Edit, Reject, Steer
from harness.hitl.base import ApprovalRequest, Approver, ApproverChain, CallbackApprover

if TYPE_CHECKING:
    from harness.hitl.console import ConsoleApprover

__all__ = [
    "ApprovalRequest",
    "Approve",
    "ApproveForSession",
    "Approver",
    "ApproverChain",
    "CallbackApprover",
    "ConsoleApprover",
    "Decision",
    "Edit",
    "Reject",
    "Steer",
]


def __getattr__(name: str) -> object:
    # Who asks nobody at a terminal does not pay for it, and needs none.
    if name == "ConsoleApprover":
        from harness.hitl.console import ConsoleApprover

        return ConsoleApprover
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
