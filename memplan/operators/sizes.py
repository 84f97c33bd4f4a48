"""How large is a tensor, for any micro-batch and sequence length at once?

A shape is a tuple of dimensions; a dimension is a number or the name of one that is not known yet: ``"b"`` the
micro-batch, ``"s"`` the sequence length, ``"s+1"`` one more.  A `Size` is a number times such names, so that one
description of a model answers one configuration (exact Python ints) or a grid of them (NumPy arrays).

Losses that go chunk by chunk need dimensions worked out from others; their names say how: ``"min(n, 256)"`` is `n` but
at most 256 (`at_most`), ``"pow2(b*s / 16)"`` a sixteenth of ``b*s``, rounded up to a whole number and then to a power
of two (`power_of_two`).

CUDA's caching allocator hands out blocks in steps of 512 bytes (kMinBlockSize in c10/core/AllocatorConfig.h), and
``torch.cuda.memory_allocated`` counts the rounded blocks: `allocated` does the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

Dim = int | str
Shape = tuple[Dim, ...]

BYTES_PER_ELEMENT = {
    "fp32": 4,
    "bf16": 2,
    "fp16": 2,
    "int64": 8,
    "int32": 4,
    "bool": 1,
    "uint8": 1,
    "int8": 1,
}
"""Bytes of one element by dtype name."""

ALLOCATION_STEP_BYTES = 512
"""Smallest block of the CUDA caching allocator; every allocation is rounded up to a multiple of it."""


class Size(NamedTuple):
    """`factor` times the product of the named `dims`; bytes or FLOPs, by context."""

    factor: int
    dims: tuple[str, ...] = ()

    def value(self, env: Mapping[str, Any]) -> Any:
        """The number, for the dimensions in `env` (ints, or integer arrays that broadcast)."""
        product: Any = self.factor
        for dim in self.dims:
            product = product * env[dim]
        return product

    def times(self, factor: int) -> Size:
        """The same, `factor` times over."""
        return Size(self.factor * factor, self.dims)

    def formula(self) -> str:
        """As text: ``8192*b*s``."""
        return "*".join((str(self.factor), *self.dims))


def count(shape: Shape) -> Size:
    """Number of elements of `shape`."""
    factor, dims = 1, []
    for dim in shape:
        if isinstance(dim, int):
            factor *= dim
        else:
            dims.append(dim)
    return Size(factor, tuple(sorted(dims)))


@lru_cache(maxsize=4096)  # the layers of a model have few shapes, and each is asked for again and again
def num_bytes(shape: Shape, dtype: str) -> Size:
    """Bytes of a dense tensor."""
    return count(shape).times(BYTES_PER_ELEMENT[dtype])


def allocated(num: Any) -> Any:
    """Bytes that the allocator hands out for a request of `num` bytes (int or array)."""
    return -(-num // ALLOCATION_STEP_BYTES) * ALLOCATION_STEP_BYTES


MILLION = 10**6


def at_most(dim: str, most: int) -> str:
    """The dimension that is `dim` but never more than `most`."""
    return f"min({dim}, {most})"


def power_of_two(dim: str, share: int) -> str:
    """The dimension ``next_power_of_2(ceil(dim / share))``, but never more than `dim` itself."""
    return f"pow2({dim} / {share})"


def more_than(dim: str, number: int) -> str:
    """The dimension that is 1 where `dim` is more than `number`, else 0."""
    return f"more({dim}, {number})"


class Dimensions(dict[str, Any]):
    """Dimensions by name; those whose name says how they are worked out from another are worked out when asked for."""

    def __missing__(self, name: str) -> Any:
        function, _, rest = name.partition("(")
        dim, separator, number = rest.removesuffix(")").rpartition(DERIVED.get(function, ", "))
        if function not in DERIVED or not separator:
            raise KeyError(name)
        value = self[name] = _derived(function, self[dim], int(number))
        return value


def _derived(function: str, dim: Any, number: int) -> Any:
    if function == "more":
        return (dim > number) * 1
    limit = number if function == "min" else _next_power_of_two(-(-dim // number))
    return dim - (dim - limit) * (dim > limit)  # the smaller of both, of ints and of arrays


DERIVED = {"min": ", ", "more": ", ", "pow2": " / "}
"""Functions in the names of dimensions, and what stands between dimension and number."""


def _next_power_of_two(number: Any) -> Any:
    """The smallest power of two that is not below `number` (from 1 on)."""
    number = number - 1
    for shift in (1, 2, 4, 8, 16, 32):
        number = number | (number >> shift)
    return number + 1


def bind(micro_batch_size: Any, seq_len: Any, supervised: float = 1.0) -> dict[str, Any]:
    """The dimensions that descriptions may name, for one configuration or for arrays of them.

    ``b*s`` are all tokens; ``b*(s-1)`` those that have a next one; ``n`` those whose next one has a label, of which
    `supervised` is the share (counted in millionths).

    ``s+[b=1]`` is one longer for a micro-batch of one, where PyTorch's ``contiguous()`` of a slice copies nothing and
    keeps the whole; ``[b=1]`` is 1 there and else 0.  ``s to 16``, ``s to 32`` and ``s to 128`` are rounded up to
    such a multiple; ``s[not 16s]`` is nothing where the length already is one.  ``b/2`` are pairs of sequences, and
    ``[b=2]`` is 1 where there is a single one.
    """
    to_16 = -(-seq_len // 16) * 16
    pairs = micro_batch_size * (seq_len - 1)
    dimensions = {
        "b": micro_batch_size,
        "s": seq_len,
        "b*s": micro_batch_size * seq_len,
        "b*(s-1)": pairs,
        "n": -(-pairs * round(supervised * MILLION) // MILLION),
        "b/2": micro_batch_size // 2,
        "s-1": seq_len - 1,
        "s+1": seq_len + 1,
        "s+[b=1]": seq_len + (micro_batch_size == 1),
        "[b=1]": (micro_batch_size == 1) * 1,
        "[b>1]": (micro_batch_size > 1) * 1,
        "[b=2]": (micro_batch_size == 2) * 1,
        "[b>2]": (micro_batch_size > 2) * 1,
        "s to 16": to_16,
        "s to 32": -(-seq_len // 32) * 32,
        "s to 128": -(-seq_len // 128) * 128,
        "s[not 16s]": seq_len * (to_16 != seq_len),
    }
    return Dimensions(dimensions)


def bind_flattened(num_tokens: Any, num_sequences: Any, supervised: float = 1.0) -> dict[str, Any]:
    """The same for one row of `num_tokens` in which `num_sequences` lie end to end.

    The first token of each is nobody's next one.  ``sequences`` is their number, ``sequences+1`` that of their ends
    with the start, ``s/sequences`` their mean length, ``s+128*sequences`` what is the row with 128 more for each.
    """
    pairs = num_tokens - num_sequences
    return Dimensions(
        {
            **bind(1, num_tokens),
            "n": -(-pairs * round(supervised * MILLION) // MILLION),
            "sequences": num_sequences,
            "sequences+1": num_sequences + 1,
            "s/sequences": -(-num_tokens // num_sequences),
            "s+128*sequences": num_tokens + 128 * num_sequences,
        }
    )
