"""Between which bounds does ``torch.compile`` put the memory of a step?

The compiler fuses operators and decides what of the forward pass is kept for the backward pass, and what is computed
again (torch 2.13, torch/_functorch/partitioners.py: ``min_cut_rematerialization_partition``).

upper end   what autograd keeps of the same model without the compiler.  The partitioner looks for few bytes that the
            backward pass can do with, and what autograd keeps is near one choice among those.  That is no proof: bytes
            are weighed by their distance from the backward pass (``get_node_weight``), and it cuts a graph of
            decomposed operators.  No traced family keeps more (tests/published/test_compiled.py).  Two things are
            the compiler's own: transformers passes a mask (`Setup.passes_mask`), and a compiled backward pass hands out
            its gradients at its end, so that those of a later micro-step are all there beside those they are added to.
lower end   what no choice can do without.  Products are never computed again (``compute_intensive_ops``), nor is what
            a product of the backward pass has to read in memory (``ban_recompute_materialized_backward``).  Kept are
            thus the inputs of matrix products and attention kernels where the backward reads them, and results of
            products that other operators keep.  Layers that are checkpointed keep what goes in.

Left out of the lower end are temporaries altogether, but not what the loop of an evaluation keeps of the batches; of
the upper end what `UNMODELLED` names.  What has a number for every pair of tokens does not count: in place of attention
that is written out inductor may put a fused kernel (fx_passes/fuse_attention.py), and the masks of all layers are
computed once where they are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.allocator.rounding import SMALL_SEGMENT_BYTES, round_up
from memplan.estimation.step import CLIP, OPTIMIZER
from memplan.memory.events import maximum
from memplan.operators.tape import PRODUCTS
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from memplan.architectures.architecture import Piece
    from memplan.estimation.estimate import Memory
    from memplan.estimation.step import StepProgram
    from memplan.memory.events import Sizes
    from memplan.memory.lifetimes import PieceLifetimes
    from memplan.operators.sizes import Size

NOT_COMPILED = frozenset({CLIP, OPTIMIZER})
"""Instants that are as they are without the compiler."""

OF_THE_FORWARD = frozenset({"activation", "hidden"})
"""Roles of storages that a forward pass makes."""

UNMODELLED = (
    ("inductor's order of operators and reuse of buffers", "no kernel is generated: the range is no promise for them"),
    ("tensors that inductor pads", "it may round strides and products of odd sizes up (comprehensive_padding, pad_mm)"),
    ("CUDA graphs, autotuning", "mode reduce-overhead keeps pools of its own, max-autotune tries kernels on the card"),
    ("compiling itself, and compiling again", "memory of the first steps, and of graphs for other lengths"),
)
"""(what, why) of what compiling brings and nobody counts here."""

NOT_PROVEN = (
    "the partitioner's heuristics",
    "that it keeps no more than autograd is seen in traces of all families, not proven; memplan trace --compile looks",
)
"""The same of the formula's range alone."""


class Range(NamedTuple):
    """Bytes between two bounds."""

    low: int
    high: int


class Compiled(NamedTuple):
    """What a step takes under ``torch.compile``."""

    kept_activation_bytes: Range
    peak_allocated_bytes: Range
    peak_process_bytes: Range
    is_traced: bool = False
    """Whether what is kept was read off the compiler's own partition of the module's graph."""


def least_kept(program: StepProgram, sizes: Sizes) -> Any:
    """Bytes that a compiled forward pass keeps at least, for one size or on arrays."""
    layout = program.layout
    pieces = [(layout.stem, "none"), *zip(layout.layers, layout.modes, strict=True), (layout.head, "none")]
    known: dict[tuple[int, str], Any] = {}
    whole: Any = 0
    for lifetimes, mode in pieces:
        key = (id(lifetimes.piece), mode)
        if key not in known:
            known[key] = sum(sizes[size] for size in _needed(lifetimes, mode))
        whole = whole + known[key]
    return whole


def least(program: StepProgram, sizes: Sizes, instants: Mapping[str, Any], accumulation: int) -> tuple[Any, Any]:
    """Bytes that a compiled step keeps at least, and those allocated at its peak at least; see `least_peak`."""
    kept = least_kept(program, sizes)
    low = least_peak(
        sum(tensors.total(sizes) for tensors in program.resident(accumulation, with_states=True)),
        program.gradients.total(sizes),
        kept,
        instants,
        accumulates=accumulation > 1,
    )
    return kept, low


def least_peak(resident: Any, gradients: Any, kept: Any, instants: Mapping[str, Any], *, accumulates: bool) -> Any:
    """Allocated bytes at the peak at least: after the forward pass, after the backward pass, or later.

    Args:
        resident: Bytes of what is there all the time.
        gradients: Bytes of all gradients.
        kept: Bytes that a compiled forward pass keeps.
        instants: Peaks of the instants without the compiler; clip and update are not compiled.
        accumulates: Whether there are gradients of an earlier micro-step.
    """
    highest = maximum(kept, gradients) + resident + (gradients if accumulates else 0)
    for name, value in instants.items():
        if name in NOT_COMPILED:
            highest = maximum(highest, value)
    return highest


def range_of(kept: Range, low: int, memory: Memory, *, is_traced: bool = False) -> Compiled:
    """A range from the bytes `kept` and the `low` peak that comes of them; `memory` is the upper end."""
    reserved = round_up(low, SMALL_SEGMENT_BYTES)
    return Compiled(
        kept,
        Range(low, memory.peak_allocated_bytes),
        Range(reserved + memory.context_bytes + memory.workspace_bytes, memory.peak_process_bytes),
        is_traced,
    )


def _needed(lifetimes: PieceLifetimes, mode: str) -> Iterator[Size]:
    """Sizes of what a piece has to keep; what it hands on is the next one's."""
    piece = lifetimes.piece
    for number in _input_of(piece) if mode == "full" else _read_by_products(piece):
        storage = piece.tape.storages[number]
        counted = storage.role in OF_THE_FORWARD and not storage.cached and number != piece.output.storage
        if counted and not _is_of_pairs(storage.size):
            yield storage.size


def _input_of(piece: Piece) -> set[int]:
    return set() if piece.hidden is None else {piece.hidden.storage}


def _read_by_products(piece: Piece) -> set[int]:
    """Storages that products of the backward pass read, and results of products that other operators keep."""
    made: set[int] = set()
    found: set[int] = set()
    for op in piece.tape.ops:
        is_product = op.name in PRODUCTS
        found |= {x.storage for x in op.keeps if is_product or x.storage in made}
        if is_product:
            made |= {x.storage for x in op.outputs}
    return found


def _is_of_pairs(size: Size) -> bool:
    """Whether it has a number for every pair of tokens."""
    return sum("s" in dim for dim in size.dims) > 1
