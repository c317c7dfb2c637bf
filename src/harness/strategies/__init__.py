"""Strategies: pure functions that decide what a run does next."""
