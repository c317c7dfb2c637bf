from harness.testing.plugin import fork_servers, kill_sweep, pytest_terminal_summary, say_at_end

__all__ = ["fork_servers", "kill_sweep", "pytest_terminal_summary", "say_at_end"]
