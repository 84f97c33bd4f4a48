"""What optimizers that are loops in Python allocate for one parameter, line by line.

Each function follows the code that it names: what is made, which name holds it, when that name is given away.  A loop
ends with whatever its names still hold, and the next parameter begins with it.

=================  ====================================================================================================
adamw_forloop      ``_single_tensor_adam`` of torch/optim/adam.py (2.13)
muon               ``_single_tensor_muon``, ``_zeropower_via_newtonschulz`` of torch/optim/_muon.py (2.13)
adafactor          ``Adafactor.step`` of transformers/optimization.py (5.23), without first moment and relative steps
galore_adamw       ``AdamW.step`` of galore_torch/adamw.py (1.0), in a step that computes its projections anew
apollo_adamw       ``AdamW.step`` of apollo_torch/apollo.py (1.0.3), the same; random projection, scaled by channel
lomo, adalomo      ``fuse_update`` of lomo_optim/lomo.py and adalomo.py (0.1.1), without clipping
=================  ====================================================================================================

Left out: 0-dimensional tensors where more is alive sooner or later, and what cuSOLVER needs for a decomposition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from memplan.memory.frames import Block, Frame, Trained

RANK = 128
"""Of GaLore and APOLLO: the Trainer's default (transformers/trainer_optimizer.py, 5.23)."""


def adamw_forloop(f: Frame, p: Trained) -> None:
    """``denom = (exp_avg_sq.sqrt() / bias_correction).add_(eps)``."""
    root = f.make(p, "square root of exp_avg_sq")
    quotient = f.make(p, "denominator")
    f.drop(root)
    f.bind("denom", quotient)


def muon(f: Frame, p: Trained) -> None:
    """Nesterov's update, then Newton-Schulz iterations in bf16, of which the third is like the second."""
    f.bind("update", f.make(p, "Nesterov's update"))
    short = min(p.shape)
    copied = p.dtype != "bf16"
    f.bind("call.x", f.make(p, "update in bf16", dtype="bf16") if copied else f.held("update"))
    for _ in range(3):
        f.bind("call.gram", f.make(p, "Gram matrix", (short, short), "bf16"))
        f.bind("call.polynomial", f.make(p, "polynomial of the Gram matrix", (short, short), "bf16"))
        f.bind("call.x", f.make(p, "orthogonalised update", dtype="bf16"))
    f.bind("update", f.held("call.x"))
    f.leave("call")


def adafactor(f: Frame, p: Trained) -> None:
    """Gradient and parameter in fp32, the squared gradient, the update from its factors."""
    half = p.dtype != "fp32"
    f.bind("grad", f.make(p, "gradient in fp32", dtype="fp32") if half else None)
    f.bind("parameter", f.make(p, "parameter in fp32", dtype="fp32") if half else None)
    _second_moment(f, p)
    f.drop(f.make(p, "negative update", dtype="fp32"))


def fused_adamw_in_backward(f: Frame, p: Trained, gradient: Block) -> None:
    """One kernel updates in place; then the gradient goes."""
    f.drop(gradient)


def lomo(f: Frame, p: Trained, gradient: Block) -> None:
    """Gradient and parameter in fp32."""
    if p.dtype == "fp32":
        f.drop(gradient)
        return
    wide = f.make(p, "gradient in fp32", dtype="fp32")
    f.drop(gradient)
    f.drop(f.make(p, "parameter in fp32", dtype="fp32"), wide)


def adalomo(f: Frame, p: Trained, gradient: Block) -> None:
    """As Adafactor, with names that go after each parameter."""
    half = p.dtype != "fp32"
    wide = f.make(p, "gradient in fp32", dtype="fp32") if half else gradient
    if half:
        f.drop(gradient)
    _second_moment(f, p)
    f.drop(f.make(p, "parameter in fp32", dtype="fp32") if half else None, wide)
    f.bind("update", None)


def _second_moment(f: Frame, p: Trained) -> None:
    """The squared gradient, and the update from its factors."""
    square = f.make(p, "squared gradient", dtype="fp32")
    added = f.make(p, "squared gradient and epsilon", dtype="fp32")
    f.drop(square)
    f.bind("update", added)
    if len(p.shape) < 2:
        f.bind("update", f.make(p, "update", dtype="fp32"))
        return
    rows, columns = factors(p)
    f.bind("call.rows", f.make(p, "factor of the rows", rows, "fp32"))
    f.bind("call.columns", f.make(p, "factor of the columns", columns, "fp32"))
    update = f.make(p, "update", dtype="fp32")
    f.leave("call")
    f.bind("update", update)


def factors(p: Trained) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the row and the column factor of a second moment: over the last two dimensions."""
    return p.shape[:-1], (*p.shape[:-2], p.shape[-1])


class LowRank(NamedTuple):
    """A matrix and its projection: the longer side is kept (``proj_type="std"``)."""

    tall: bool
    """As many rows as columns, or more: the columns are projected."""
    rank: int
    gradient: tuple[int, int]
    """Shape of the projected gradient and its moments."""
    projection: tuple[int, int]
    short: int


def low_rank(p: Trained, most: int) -> LowRank:
    """`most`: the rank, where nothing limits it."""
    rows, columns = p.shape
    tall = rows >= columns
    gradient = (rows, most) if tall else (most, columns)
    return LowRank(tall, most, gradient, (most, columns) if tall else (rows, most), min(rows, columns))


def of_galore(p: Trained) -> LowRank:
    """A decomposition has no more vectors than the shorter side."""
    return low_rank(p, min(RANK, *p.shape))


def galore_adamw(f: Frame, p: Trained) -> None:
    """AdamW in the space of the projected gradient, and back."""
    f.bind("grad", None)
    if not p.is_matrix:
        _adamw_of_transformers(f, p, p.shape)
        return
    how = of_galore(p)
    _singular_vectors(f, p, how)
    f.bind("grad", f.make(p, "projected gradient", how.gradient))
    _adamw_of_transformers(f, p, how.gradient)
    f.bind("call.full", f.make(p, "update projected back"))
    scaled = f.make(p, "update projected back, scaled")
    f.leave("call")
    f.bind("update", scaled)


def _adamw_of_transformers(f: Frame, p: Trained, shape: tuple[int, ...]) -> None:
    f.bind("denom", f.make(p, "denominator", shape))
    f.bind("update", f.make(p, "normalised update", shape))


def _singular_vectors(f: Frame, p: Trained, how: LowRank) -> None:
    """A new projection: the singular vectors of the gradient in fp32; it takes the place of the old one."""
    rows, columns = p.shape
    half = p.dtype != "fp32"
    if half:
        f.bind("call.matrix", f.make(p, "gradient in fp32", dtype="fp32"))
    f.bind("call.u", f.make(p, "left singular vectors", (rows, how.short), "fp32"))
    f.bind("call.s", f.make(p, "singular values", (how.short,), "fp32"))
    f.bind("call.vh", f.make(p, "right singular vectors", (how.short, columns), "fp32"))
    diagonal = f.make(p, "diagonal of singular values", (how.rank, how.rank), "fp32")
    other = (rows, how.rank) if how.tall else (how.rank, columns)
    f.bind("call.other", f.make(p, "scaled singular vectors", other, "fp32"))
    f.drop(diagonal)
    if half:
        f.bind("call.projection", f.make(p, "new projection", how.projection))
    f.leave("call")


def apollo_adamw(f: Frame, p: Trained) -> None:
    """AdamW in the space of the projected gradient, which says by how much to scale the gradient itself.

    The limiter of its growth is a plain number here: after a new projection there is no growth.
    """
    f.bind("grad", None)
    if not p.is_matrix:
        _adamw_of_transformers(f, p, p.shape)
        return
    how = low_rank(p, RANK)
    _random_projection(f, p, how)
    f.bind("grad", f.make(p, "projected gradient", how.gradient))
    _adamw_of_transformers(f, p, how.gradient)
    channels = (max(p.shape),)
    f.bind("call.norm", f.make(p, "norms of the update", channels))
    norms = f.make(p, "norms of the gradient", channels)
    f.bind("call.sum", f.make(p, "norms of the gradient and epsilon", channels))
    f.drop(norms)
    factor = f.make(p, "factor of each channel", channels)
    f.leave("call")
    f.bind("factor", factor)
    f.bind("scaled", f.make(p, "scaled gradient"))
    f.bind("norm", f.make(p, "norm of the scaled gradient", ()))
    f.bind("scaled", f.make(p, "scaled gradient, limited"))
    f.bind("update", f.held("scaled"))


def _random_projection(f: Frame, p: Trained, how: LowRank) -> None:
    """A new projection: normal numbers in fp32, divided, then cast; it takes the place of the old one."""
    half = p.dtype != "fp32"
    if half:
        f.bind("call.matrix", f.make(p, "gradient in fp32", dtype="fp32"))
    normal = f.make(p, "normal numbers", how.projection, "fp32")
    f.bind("call.projection", f.make(p, "projection in fp32", how.projection, "fp32"))
    f.drop(normal)
    if half:
        f.bind("call.projection", f.make(p, "new projection", how.projection))
    f.leave("call")
