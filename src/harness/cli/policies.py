"""The policy a harness.toml names: the one place where the command line gets rules from."""

from __future__ import annotations

from pathlib import Path

from harness.approval import Gate
from harness.errors import ConfigError


def load(path: Path) -> Gate:
    """Return the rules of a file as what a runtime takes for its policy.

    Raises:
        ConfigError: they cannot be had.
    """
    raise ConfigError(f"{path}: this release cannot read a policy: name the tools that ask in hitl_tools")
