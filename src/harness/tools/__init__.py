"""Tools: what a model may call, and how to make one of your own functions."""

from harness.tools.arguments import describe_arguments
from harness.tools.base import (
    DEFAULT_TIMEOUT_S,
    InvalidArguments,
    NotDone,
    ReconcileFunction,
    Reconciles,
    Tool,
    ToolContext,
    ToolOutput,
    ToolSpec,
    Unknown,
)
from harness.tools.delegate import DelegateTool, delegate
from harness.tools.files import file_tools
from harness.tools.function import FunctionTool, as_tool, definition_hash, tool
from harness.tools.process import ProcessOutput, run_process
from harness.tools.threads import run_in_thread

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "DelegateTool",
    "FunctionTool",
    "InvalidArguments",
    "NotDone",
    "ProcessOutput",
    "ReconcileFunction",
    "Reconciles",
    "Tool",
    "ToolContext",
    "ToolOutput",
    "ToolSpec",
    "Unknown",
    "as_tool",
    "definition_hash",
    "delegate",
    "describe_arguments",
    "file_tools",
    "run_in_thread",
    "run_process",
    "tool",
]
