"""Helpers for testing agents, tools and stores: public, documented, meant for your own test-suite too."""

from harness.testing.cassette import CassetteLLM
from harness.testing.crashing import CrashingStore, KillPoints, MeteredLLM, fail_appends
from harness.testing.forkserver import Child, ChildFailed, ForkServer
from harness.testing.scripted import RecordingTool, Reply, ScriptedLLM, call
from harness.testing.sweep import Lab, StoreFactory, SweepReport, Workload, file_store, kill_sweep, sqlite_store

__all__ = [
    "CassetteLLM",
    "Child",
    "ChildFailed",
    "CrashingStore",
    "ForkServer",
    "KillPoints",
    "Lab",
    "MeteredLLM",
    "RecordingTool",
    "Reply",
    "ScriptedLLM",
    "StoreFactory",
    "SweepReport",
    "Workload",
    "call",
    "fail_appends",
    "file_store",
    "kill_sweep",
    "sqlite_store",
]
