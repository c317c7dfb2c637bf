"""The ``harness`` command. Nothing here is imported by the library."""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit with its code."""
    from harness.cli.app import main as run

    run()
