"""``python -m harness``: the ``harness`` command, where its folder is on no path."""

from harness.cli import main

main()
