from harness.testing.plugin import fork_servers, kill_sweep, pytest_terminal_summary

__all__ = ["fork_servers", "kill_sweep", "pytest_terminal_summary"]
