"""A Hugging Face ``config.json`` as checked values.

Every access states what is allowed; what is missing, of the wrong type, not finite or absurd is a `ConfigError` that
names the key and the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

LARGEST = 2**31 - 1
"""No dimension of a model may be larger (PyTorch indexes many kernels with 32-bit integers)."""

MOST_LAYERS = 10_000
"""No model may have more layers: the deepest that was published has 1,000."""

NAMES_OF_LAYERS = frozenset({"num_hidden_layers", "n_layer", "n_layers", "num_layers"})

LONGEST_ECHO = 40
"""Longer values are cut when they are quoted."""

_MISSING = object()


def shown(value: Any) -> str:
    """A value to quote in a sentence, cut where it is long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**LONGEST_ECHO else "a number of more digits"
    return text if len(text) <= LONGEST_ECHO else f"{text[:LONGEST_ECHO]}..."


class Config:
    """The values of one config file."""

    def __init__(self, values: Mapping[str, Any], origin: str, *, dropout: float | None = None) -> None:
        self._values = values
        self.dropout = dropout
        """Overrides every dropout probability; None keeps them."""
        self.origin = origin
        """Where it comes from, for messages."""

    def _find(self, names: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for name in names:
            if self._values.get(name) is not None:
                return name, self._values[name]
        if default is _MISSING:
            raise ConfigError(
                f"{self.origin} has no {' or '.join(names)}.",
                "Give a complete config.json as the model was published with.",
            )
        return names[0], default

    def has(self, name: str) -> bool:
        """Whether the key is there and not null."""
        return self._values.get(name) is not None

    def mentions(self, name: str) -> bool:
        """Whether the key is there, be it null."""
        return name in self._values

    def raw(self, name: str) -> Any:
        """The value as it stands (None where absent)."""
        return self._values.get(name)

    def integer(self, *names: str, default: Any = _MISSING, least: int = 1) -> int:
        """A whole number from `least` to 2**31 - 1, under the first of `names` that is there."""
        name, value = self._find(names, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} in {self.origin} is {shown(value)}, not a whole number.", f"Correct {name}.")
        most = MOST_LAYERS if name in NAMES_OF_LAYERS else LARGEST
        if not least <= value <= most:
            raise ConfigError(
                f"{name} in {self.origin} is {shown(value)}.", f"It has to lie between {least} and {most:,}."
            )
        return value

    def optional_integer(self, *names: str, least: int = 1) -> int | None:
        """The same, or None where absent."""
        return self.integer(*names, least=least) if any(self.has(name) for name in names) else None

    def fraction(self, *names: str, default: Any = _MISSING) -> float:
        """A number from 0 to 1 (probabilities, partial rotary factors)."""
        if self.dropout is not None and "drop" in names[0]:
            return self.dropout
        name, value = self._find(names, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ConfigError(f"{name} in {self.origin} is {shown(value)}.", "It has to be a number from 0 to 1.")
        return float(value)

    def flag(self, *names: str, default: Any = _MISSING) -> bool:
        """True or false."""
        name, value = self._find(names, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{name} in {self.origin} is {shown(value)}.", "It has to be true or false.")
        return value

    def text(self, *names: str, default: Any = _MISSING) -> str:
        """A string."""
        name, value = self._find(names, default)
        if not isinstance(value, str):
            raise ConfigError(f"{name} in {self.origin} is {shown(value)}.", "It has to be a string.")
        return value

    def choice(self, *names: str, known: Any, default: Any = _MISSING) -> str:
        """A string that is one of `known`."""
        value = self.text(*names, default=default)
        if value not in known:
            raise ConfigError(
                f"{names[0]} in {self.origin} is {shown(value)}, which is not modelled.",
                f"Known: {', '.join(sorted(known))}.",
            )
        return value

    def part(self, name: str) -> Config:
        """A config inside the config (``text_config``)."""
        value = self._values.get(name)
        if not isinstance(value, dict):
            raise ConfigError(f"{self.origin} has no {name}.", "Give a complete config.json.")
        return Config(value, f"{name} of {self.origin}", dropout=self.dropout)

    def divided(self, name: str, whole: int, by: int) -> int:
        """``whole / by`` where it has to come out even (heads, head_dim)."""
        if whole % by:
            other = "num_key_value_heads" if "head" in name else "the number of heads"
            raise ConfigError(
                f"{name} in {self.origin} is {whole}, which {by} does not divide.", f"Correct {name} or {other}."
            )
        return whole // by

    def paired(self, dim: int, name: str = "head_dim") -> int:
        """`dim` where it is even: rotary positions turn dimensions in pairs."""
        if dim % 2:
            raise ConfigError(
                f"{name} in {self.origin} comes to {dim}, and rotary positions turn dimensions in pairs.",
                f"Correct {name}: it has to be even.",
            )
        return dim
