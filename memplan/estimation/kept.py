"""How do the activations that a forward pass keeps grow?  As a formula in the micro-batch b and the length s.

    kept(b, s) = sum over the blocks that are there after the forward pass of    factor x dimensions

Each block has a `Size`; those with the same dimensions are added up, and dimensions that are sums are multiplied out:

    16384 b s  +  16384 b s  +  8 b (s + 1)    ->    32776 b s + 8 b

In a batch without padding the rows are one, so that b is 1 and s its tokens, written t.  The formula is exact but for
the allocator, which rounds each block up to 512 bytes: `Kept.rounding_bytes` bounds what that adds.  It holds for
lengths that lie on the same side of the model's sliding windows; in a batch without padding for several sequences, or
for one, as they get a mask or none.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from memplan.operators.sizes import ALLOCATION_STEP_BYTES, Size
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.estimation.step import StepProgram

    Monomials = dict[tuple[str, ...], int]

SUMS: dict[str, Monomials] = {
    "b*s": {("b", "s"): 1},
    "b*(s-1)": {("b", "s"): 1, ("b",): -1},
    "s-1": {("s",): 1, (): -1},
    "s+1": {("s",): 1, (): 1},
    "s+[b=1]": {("s",): 1, ("[b=1]",): 1},
}
"""Dimensions that are sums or products of others."""

OF_ALL_TOKENS: dict[str, Monomials] = {"n": SUMS["b*(s-1)"]}
"""Where every token has a label."""

OF_ONE_ROW: dict[str, Monomials] = {
    "b": {(): 1},
    "b*s": {("s",): 1},
    "b*(s-1)": {("s",): 1, (): -1},
    "[b=1]": {(): 1},
    "s+[b=1]": {("s",): 1, (): 1},
    "sequences+1": {("sequences",): 1, (): 1},
    "s+128*sequences": {("s",): 1, ("sequences",): 128},
}
"""Where sequences lie end to end."""

POWERS = {1: "", 2: "²", 3: "³"}


class Term(NamedTuple):
    """Bytes that grow alike."""

    factor: int
    dims: tuple[str, ...]
    """Names of dimensions (`memplan.operators.sizes.bind`), one for each power."""

    def text(self, *, is_one_row: bool) -> str:
        """``24·b·s²``."""
        powers = Counter(self.dims)
        names = [f"{symbol(dim, is_one_row=is_one_row)}{POWERS.get(n, f'^{n}')}" for dim, n in powers.items()]
        return "·".join((f"{abs(self.factor):,}", *names))


class Kept(NamedTuple):
    """What the forward pass keeps, as a sum."""

    terms: tuple[Term, ...]
    """Largest first, for the setup it was made of."""
    num_blocks: int
    """Blocks of the allocator in it."""
    is_one_row: bool
    """Whether the sequences of a micro-batch lie end to end."""

    @property
    def rounding_bytes(self) -> int:
        """The most that the allocator's rounding adds."""
        return self.num_blocks * (ALLOCATION_STEP_BYTES - 1)

    @property
    def symbols(self) -> tuple[str, ...]:
        """What stands in the text of the formula: letters, then names in brackets."""
        found = {symbol(dim, is_one_row=self.is_one_row) for term in self.terms for dim in term.dims}
        return tuple(sorted(found, key=lambda one: (len(one) > 1, one)))

    def value(self, env: Mapping[str, Any]) -> Any:
        """Bytes before rounding, for the dimensions in `env`."""
        return sum(Size(term.factor, term.dims).value(env) for term in self.terms)

    def formula(self, most: int | None = None) -> str:
        """``34,560·b·s + 24·b·s²``: all terms, or the `most` largest."""
        text = ""
        for term in self.terms[:most]:
            sign = " - " if term.factor < 0 else " + " if text else ""
            text += f"{sign}{term.text(is_one_row=self.is_one_row)}"
        return text or "0"


def symbol(dim: str, *, is_one_row: bool) -> str:
    """What a dimension is called in the text of a formula: a letter, or a name in brackets."""
    name = dim.replace("s", "t", 1) if is_one_row and (dim == "s" or dim.startswith("s to ")) else dim
    return name if len(name) == 1 or name.startswith("[") else f"[{name}]"


def kept_formula(program: StepProgram, env: Mapping[str, Any], *, supervised: float, is_one_row: bool) -> Kept:
    """The formula of a step.

    Args:
        program: The step.
        env: Dimensions at which terms are compared to order them.
        supervised: Share of the tokens that have a label.
        is_one_row: Whether the sequences of a micro-batch lie end to end.
    """
    blocks: Counter[Size] = Counter()
    for part in program.forward:
        for event in part.segment.events:
            blocks[event.size] += event.sign * len(part.places)
    labelled = OF_ALL_TOKENS if supervised == 1 and not is_one_row else {}
    sums = {**SUMS, **labelled, **(OF_ONE_ROW if is_one_row else {})}
    found: Counter[tuple[str, ...]] = Counter()
    for size, num in blocks.items():
        for dims, factor in multiplied_out(size, sums).items():
            found[dims] += num * factor
    terms = [Term(factor, dims) for dims, factor in found.items() if factor]
    terms.sort(key=lambda term: (-abs(Size(term.factor, term.dims).value(env)), term.dims))
    return Kept(tuple(terms), sum(abs(num) for num in blocks.values()), is_one_row)


def multiplied_out(size: Size, sums: Mapping[str, Monomials]) -> Monomials:
    """A size as a sum of monomials; dimensions that are in `sums` are replaced."""
    found: Monomials = {(): size.factor}
    for dim in size.dims:
        product: Monomials = {}
        for dims, factor in found.items():
            for more, times in sums.get(dim, {(dim,): 1}).items():
                key = tuple(sorted((*dims, *more)))
                product[key] = product.get(key, 0) + factor * times
        found = product
    return found
