"""Helpers for testing agents, tools and stores: public, documented, meant for your own test-suite too."""

from harness.testing.scripted import RecordingTool, Reply, ScriptedLLM, call

__all__ = ["RecordingTool", "Reply", "ScriptedLLM", "call"]
