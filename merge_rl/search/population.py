"""How many candidates a round has, by the kind of method; wrong numbers are refused."""

from __future__ import annotations

from merge_rl.config import SearchConfig
from merge_rl.errors import ConfigError

DEFAULT_POPULATION = 16


def parallel(config: SearchConfig, *, least: int = 2) -> int:
    """Of a method that draws as many as it is told: the setting, 16 if unset."""
    given = DEFAULT_POPULATION if config.population is None else config.population
    if given < least:
        raise ConfigError(f"expected population >= {least}, got {given} for {config.name}")
    return given


def serial(config: SearchConfig) -> int:
    """Of a method whose next candidate depends on the last one's reward: 1."""
    if config.population not in (None, 1):
        raise ConfigError(
            f"{config.name} evaluates one candidate after the other:"
            f" expected no population or 1, got {config.population}"
        )
    return 1


def planned(config: SearchConfig) -> int:
    """Of a method whose candidates are given: at least 1, and no matter of settings."""
    if config.population is not None:
        raise ConfigError(
            f"{config.name} knows its candidates and how many of them it asks a round:"
            f" expected no population, got {config.population}"
        )
    return 1
