"""What the user chose on the command line, and how a run keeps it for its resume."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from harness.cli.endpoint import Protocol, like, of_anthropic
from harness.errors import ConfigError


class Choices(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the user chose on the command line; None where they said nothing. A run keeps it for its resume.

    Attributes:
        agent: the agent that runs it.
        team: every agent there is may be at work, and the run itself finds out which.
        ask: tools that ask before they run, their names joined by commas.
    """

    folder: str | None = None
    llm: str | None = None
    model: str | None = None
    protocol: Protocol | None = None
    agent: str | None = None
    team: bool = False
    config: str | None = None
    api_key_env: str | None = None
    max_cost: float | None = None
    max_seconds: float | None = None
    max_steps: int | None = None
    demo: bool = False
    fast: bool = False
    ask: str | None = None

    def settings(self) -> dict[str, str]:
        """Return what was chosen as strings."""
        return {name: str(value).lower() if value is True else str(value) for name, value in self._chosen().items()}

    @classmethod
    def of(cls, settings: Mapping[str, str]) -> Choices:
        """Read ``settings`` back; words of another release are left out.

        Raises:
            ConfigError: a value does not fit its word.
        """
        try:
            return msgspec.convert(dict(settings), cls, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"the settings of the run cannot be read: {error}") from None

    def over(self, older: Choices) -> Choices:
        """Return ``older`` with what is chosen here in its place.

        Another server drops the older model, and another provider all that was said of the older one.
        """
        chosen = self._chosen()
        if self.llm is None and self.model is not None and older.model is not None:
            chosen["model"] = like(older.model, self.model)
        elif self.llm is not None and (of_anthropic(self.llm) is None) != (of_anthropic(older.model) is None):
            older = msgspec.structs.replace(older, protocol=None, api_key_env=None)
        if self.llm is not None and self.model is None:
            older = msgspec.structs.replace(older, model=None)
        return msgspec.structs.replace(older, **chosen)

    def _chosen(self) -> dict[str, object]:
        values = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return {name: value for name, value in values if value is not None and value is not False}
