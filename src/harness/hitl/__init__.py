"""People in the loop: who is asked, and what they can answer."""

from harness.approval import Approve, ApproveForSession, Decision, Edit, Reject, Steer
from harness.hitl.base import ApprovalRequest, Approver, ApproverChain, CallbackApprover

__all__ = [
    "ApprovalRequest",
    "Approve",
    "ApproveForSession",
    "Approver",
    "ApproverChain",
    "CallbackApprover",
    "Decision",
    "Edit",
    "Reject",
    "Steer",
]
