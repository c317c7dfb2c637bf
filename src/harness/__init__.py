"""react-agent-harness: durable agents. Wire tools, agents and a model once; run any goal; lose nothing.

Names are resolved on first use, so that importing the package is quick and loads nothing optional.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.agent import AgentConfig, LLMSettings
    from harness.budget import GuardrailConfig, Limits, Usage
    from harness.checkpoint import (
        CheckpointStore,
        FileCheckpointStore,
        MemoryCheckpointStore,
        RunQuery,
        RunSummary,
        SQLiteCheckpointStore,
    )
    from harness.errors import (
        CassetteMismatch,
        CheckpointConflict,
        CheckpointCorrupt,
        CheckpointError,
        ConfigChanged,
        ConfigError,
        HarnessError,
        InternalError,
        LLMError,
        LLMHTTPError,
        LLMRefused,
        LLMUnavailable,
        MalformedResponse,
        MissingExtra,
        OwnershipLost,
        PlanError,
        RecordTooNew,
        RunIdTaken,
        RunNotFound,
        RunStopped,
        StoreBusy,
        ToolError,
    )
    from harness.events import BusEvent, Event, EventType
    from harness.host import maybe_resume_key
    from harness.llm.anthropic import AnthropicLLM
    from harness.llm.base import LLM
    from harness.llm.breaker import CircuitBreaker
    from harness.llm.fallback import FallbackLLM
    from harness.llm.governed import GovernedLLM
    from harness.llm.openai import OpenAILLM
    from harness.llm.rate import RateLimit
    from harness.llm.responses import OpenAIResponsesLLM
    from harness.llm.routing import RoutingLLM
    from harness.messages import Image, Message
    from harness.plan import Plan, Task
    from harness.records import Entry, TaskResult
    from harness.registry import AgentRegistry, ToolRegistry
    from harness.replay import Replay
    from harness.result import Cancelled, Failed, Finished, Parked, RunResult
    from harness.run_stream import RunStream
    from harness.runtime import AgentRuntime
    from harness.tools import delegate, file_tools, tool
    from harness.tools.base import NotDone, Tool, ToolContext, ToolOutput, Unknown

_HOME = {
    "harness.agent": ("AgentConfig", "LLMSettings"),
    "harness.budget": ("GuardrailConfig", "Limits", "Usage"),
    "harness.checkpoint": (
        "CheckpointStore",
        "FileCheckpointStore",
        "MemoryCheckpointStore",
        "RunQuery",
        "RunSummary",
        "SQLiteCheckpointStore",
    ),
    "harness.errors": (
        "CassetteMismatch",
        "CheckpointConflict",
        "CheckpointCorrupt",
        "CheckpointError",
        "ConfigChanged",
        "ConfigError",
        "HarnessError",
        "InternalError",
        "LLMError",
        "LLMHTTPError",
        "LLMRefused",
        "LLMUnavailable",
        "MalformedResponse",
        "MissingExtra",
        "OwnershipLost",
        "PlanError",
        "RecordTooNew",
        "RunIdTaken",
        "RunNotFound",
        "RunStopped",
        "StoreBusy",
        "ToolError",
    ),
    "harness.events": ("BusEvent", "Event", "EventType"),
    "harness.host": ("maybe_resume_key",),
    "harness.llm.anthropic": ("AnthropicLLM",),
    "harness.llm.base": ("LLM",),
    "harness.llm.breaker": ("CircuitBreaker",),
    "harness.llm.fallback": ("FallbackLLM",),
    "harness.llm.governed": ("GovernedLLM",),
    "harness.llm.openai": ("OpenAILLM",),
    "harness.llm.rate": ("RateLimit",),
    "harness.llm.responses": ("OpenAIResponsesLLM",),
    "harness.llm.routing": ("RoutingLLM",),
    "harness.messages": ("Image", "Message"),
    "harness.plan": ("Plan", "Task"),
    "harness.records": ("Entry", "TaskResult"),
    "harness.registry": ("AgentRegistry", "ToolRegistry"),
    "harness.replay": ("Replay",),
    "harness.result": ("Cancelled", "Failed", "Finished", "Parked", "RunResult"),
    "harness.run_stream": ("RunStream",),
    "harness.runtime": ("AgentRuntime",),
    "harness.tools": ("delegate", "file_tools", "tool"),
    "harness.tools.base": ("NotDone", "Tool", "ToolContext", "ToolOutput", "Unknown"),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "LLM",
    "AgentConfig",
    "AgentRegistry",
    "AgentRuntime",
    "AnthropicLLM",
    "BusEvent",
    "Cancelled",
    "CassetteMismatch",
    "CheckpointConflict",
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointStore",
    "CircuitBreaker",
    "ConfigChanged",
    "ConfigError",
    "Entry",
    "Event",
    "EventType",
    "Failed",
    "FallbackLLM",
    "FileCheckpointStore",
    "Finished",
    "GovernedLLM",
    "GuardrailConfig",
    "HarnessError",
    "Image",
    "InternalError",
    "LLMError",
    "LLMHTTPError",
    "LLMRefused",
    "LLMSettings",
    "LLMUnavailable",
    "Limits",
    "MalformedResponse",
    "MemoryCheckpointStore",
    "Message",
    "MissingExtra",
    "NotDone",
    "OpenAILLM",
    "OpenAIResponsesLLM",
    "OwnershipLost",
    "Parked",
    "Plan",
    "PlanError",
    "RateLimit",
    "RecordTooNew",
    "Replay",
    "RoutingLLM",
    "RunIdTaken",
    "RunNotFound",
    "RunQuery",
    "RunResult",
    "RunStopped",
    "RunStream",
    "RunSummary",
    "SQLiteCheckpointStore",
    "StoreBusy",
    "Task",
    "TaskResult",
    "Tool",
    "ToolContext",
    "ToolError",
    "ToolOutput",
    "ToolRegistry",
    "Unknown",
    "Usage",
    "delegate",
    "file_tools",
    "maybe_resume_key",
    "tool",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
