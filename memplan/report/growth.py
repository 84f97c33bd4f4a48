"""How memory grows, in words: the formula of the kept activations, and what takes over from where on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.layout import plural
from memplan.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Document = dict[str, Any]

SMALL = 0.01
"""Terms below this share are left to the whole formula."""

MEANINGS = {
    "b": "sequences in a micro-batch",
    "s": "tokens in each",
    "t": "tokens in the row, all sequences end to end",
    "n": "tokens that have a label",
    "[sequences]": "sequences in the row",
    "[b/2]": "pairs in a micro-batch",
    "[b=1]": "1 where the micro-batch is one sequence, else 0",
    "[b>1]": "1 where the micro-batch is several sequences, else 0",
    "[b=2]": "1 where the micro-batch is one pair, else 0",
    "[b>2]": "1 where the micro-batch is several pairs, else 0",
    "[s[not 16s]]": "s, or 0 where it is a multiple of 16",
}
"""Symbols that stand in a formula."""


def meaning(symbol: str) -> str:
    """What a symbol of the formula stands for."""
    if symbol in MEANINGS:
        return MEANINGS[symbol]
    name = symbol.strip("[]")
    letter, is_tile, tile = name.partition(" to ")
    if is_tile:
        return f"{letter}, rounded up to a multiple of {tile}"
    if name.startswith("more("):
        return f"1 where {name[5:-1].replace(', ', ' is more than ')}, else 0"
    if name.startswith("min("):
        return f"{name[4:-1].replace(', ', ', but at most ')}"
    if name.startswith("pow2("):
        return f"{name[5:-1]}, rounded up to a power of two"
    return "as it says"


def meanings(growth: Mapping[str, Any], symbols: Sequence[str]) -> list[tuple[str, str]]:
    """(symbol, what it stands for) of some symbols of the formula."""
    found = {symbol: meaning(symbol) for symbol in symbols}
    if "b" in found and growth["kept"]["sequences"] > growth["micro_batch_size"]:
        found["b"] += ", two a pair"
    return list(found.items())


def headline(kept: Mapping[str, Any]) -> str:
    """``3,890,316·b·s bytes``, with as many terms as matter, and how many more there are."""
    large = [term for term in kept["terms"] if abs(term["bytes"]) >= SMALL * kept["bytes"]]
    text = " + ".join(term["text"] for term in large).replace("+ -", "- ") or "0"
    rest = len(kept["terms"]) - len(large)
    return f"{text} bytes, and {plural(rest, 'small term')}" if rest else f"{text} bytes"


def rounding(growth: Mapping[str, Any]) -> str:
    """How far the formula is from the bytes, and why."""
    kept = growth["kept"]
    more = growth["kept_bytes"] - kept["bytes"]
    windows = " and ".join(f"{window:,}" for window in growth["windows"])
    holds = f" It holds on the same side of the model's attention windows ({windows} tokens)." if windows else ""
    return (
        f"That is {kept['bytes']:,} bytes here; PyTorch's allocator rounds each block up to 512 bytes, which adds "
        f"{more:,} ({kept['rounding_bytes']:,} at most).{holds}"
    )


def take_over(growth: Mapping[str, Any]) -> str:
    """From where on the kept activations take more than the model states."""
    micro, length = growth["takes_over"]["micro_batch_size"], growth["takes_over"]["seq_len"]
    states = f"parameters, gradients and optimizer states together ({format_bytes(growth['state_bytes'])})"
    by_micro = "at no micro-batch" if micro is None else f"from micro-batch {micro:,} on"
    by_length = "at no length that the model takes" if length is None else f"from {plural(length, 'token')} on"
    return (
        f"What the forward pass keeps takes more than {states} {by_micro} at {plural(growth['seq_len'], 'token')} per "
        f"sequence, and {by_length} at micro-batch {growth['micro_batch_size']:,}."
    )
