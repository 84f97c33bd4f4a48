"""What does each optimizer remember of a parameter, and what does its step need for a moment?

One row a kind of optimizer in `OPTIMIZER_BY_NAME`; the names are implementations (the values of
`memplan.specs.training.OPTIMIZERS`).

=======================  ==========================================  ==================================================
optimizer                states of a parameter of n numbers          temporaries of the step
=======================  ==========================================  ==================================================
adamw-foreach            2n in its dtype                             n of all parameters at once (a square root)
adamw-fused              2n in its dtype, 1 fp32                     none
adamw-forloop            2n in its dtype                             loop: 2n, n of the one before
sgd                      none                                        none
sgd-momentum             n in its dtype                              none
rmsprop                  n in its dtype                              n of all parameters at once
adagrad                  n in its dtype, from the start              2n of all parameters at once
muon                     n in its dtype; what is no matrix of a      loop: Newton-Schulz in bf16; then as AdamW
                         layer: AdamW
schedule-free-adamw      2n in its dtype                             n of all parameters at once
schedule-free-sgd        n in its dtype                              none
adafactor                rows + columns in fp32 (a vector: n), 1     loop: 4n in fp32 (of fp32 parameters 2n), n of the
                         fp32                                        one before
adamw-8bit, lion-8bit    2n, n, n, 3n bytes and an fp32 a block of   none
rmsprop-8bit,            256; below 4,096 numbers and for
ademamix-8bit            embeddings fp32
adamw-32bit, lion,       2n, n, n, 3n in fp32                        none
rmsprop-32bit, ademamix
paged-...                the same; from 100,000 numbers on in the    none
                         host's memory
adamw-offloaded          below 4,096 numbers as adamw-fused; else a  none
                         copy, a gradient and 2n in the host's memory
galore-adamw             of a matrix 2 of rank 128 and a projection  loop: singular vectors in fp32
apollo-adamw             of a matrix 2 of rank 128 and a projection  loop: 2n
adamw-in-backward        as adamw-fused                              none, and no gradients but the one at hand
lomo                     none                                        n and n in fp32 (of fp32 parameters none)
adalomo                  rows + columns in fp32 (a vector: n)        as adafactor, one parameter after the other
=======================  ==========================================  ==================================================

Sources: torch/optim (2.13); transformers/optimization.py, trainer.py, trainer_optimizer.py (5.23); bitsandbytes/optim
(0.50.2), whose CUDA kernels allocate nothing (backends/cuda/ops.py); torchao/optim/cpu_offload.py (0.18), which leaves
gradients on the device; schedulefree 1.4.1; galore_torch 1.0; apollo_torch 1.0.3; lomo_optim 0.1.1.  Weight decay as
the Trainer has it by default, 0: with another, SGD, RMSprop and Adagrad (foreach) also hold a copy of all gradients.
All parameters are one group; the Trainer's two make the temporaries of norms and biases, which are small, come later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.memory import loops
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from memplan.memory.frames import Block, Frame, Trained

    Select = Callable[[Sequence[Trained]], Sequence[Trained]]
    Rule = Callable[[Trained], Iterable["State"]]

BLOCK = 256
"""Numbers that share a constant in bitsandbytes' 8-bit states."""

LEAST_8BIT = 4096
"""Numbers of the smallest tensor that bitsandbytes keeps in 8 bits (``min_8bit_size``)."""

LEAST_OFFLOADED = 4096
"""Numbers of the smallest tensor that torchao's CPUOffloadOptimizer updates on the host (``minimal_size``)."""

LEAST_PAGED = 100_000
"""Numbers of the smallest tensor whose states bitsandbytes pages (``Optimizer8bit.get_state_buffer``)."""

CODE_BOOK = (256,)
"""Shape of what each of 256 codes stands for, in fp32."""

ADAMW_SOURCE = "torch.optim.AdamW: zeros_like(parameter)"
FUSED_STEP_SOURCE = "torch.optim.AdamW(fused=True): the number of steps, on the device"
FOREACH_SOURCE = "torch/optim/adam.py: _multi_tensor_adam, _foreach_sqrt of all second moments"
CODE_SOURCE = "bitsandbytes.optim, Optimizer8bit.fill_qmap: what each of 256 codes stands for"


class State(NamedTuple):
    """A tensor that an optimizer remembers of a parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str
    on_host: bool = False
    """Whether it lies in unified or in the host's memory, outside what the caching allocator hands out."""


class Phase(NamedTuple):
    """A part of an optimizer's step: all parameters together, or a loop over them."""

    select: Select
    """The parameters it updates, in their order."""
    source: str
    together: tuple[str, ...] = ()
    """Copies of every parameter that are alive at once."""
    loop: Callable[[Frame, Trained], None] | None = None
    """What is made for one parameter after the other."""


class InBackward(NamedTuple):
    """An update in the backward pass, of each parameter as soon as its gradient is there."""

    loop: Callable[[Frame, Trained, Block], None]
    """What is made for one parameter, and when its gradient goes."""
    source: str
    waits: bool = False
    """Whether it comes with the next gradient."""


class Optimizer(NamedTuple):
    """What there is to know about the memory of one."""

    states: Rule
    phases: tuple[Phase, ...] = ()
    num_code_books: int = 0
    """Code books on the device as soon as some state has 8 bits."""
    from_start: bool = False
    """Whether its states are made with the optimizer, not in its first step."""
    in_backward: InBackward | None = None
    """How it updates in the backward pass; None: after it."""


# -- states ------------------------------------------------------------------------------------------------------------


def _like(*names: str, source: str) -> Rule:
    """Tensors of the shape and dtype of the parameter."""

    def states(p: Trained) -> Iterable[State]:
        return (State(name, p.shape, p.dtype, source) for name in names)

    return states


_adamw = _like("exp_avg", "exp_avg_sq", source=ADAMW_SOURCE)


def _nothing(_: Trained) -> Iterable[State]:
    return ()


def _adamw_fused(p: Trained) -> Iterable[State]:
    return (*_adamw(p), State("step", (), "fp32", FUSED_STEP_SOURCE))


def _adamw_offloaded(p: Trained) -> Iterable[State]:
    """The step counts of what is on the host are not counted: 4 bytes a tensor."""
    if _product(p.shape) < LEAST_OFFLOADED:
        return _adamw_fused(p)
    names = ("parameter on the host", "gradient on the host", "exp_avg", "exp_avg_sq")
    source = "torchao.optim.CPUOffloadOptimizer: pinned, of torch.optim.AdamW(fused=True) on the host"
    return (State(name, p.shape, p.dtype, source, on_host=True) for name in names)


def _muon(p: Trained) -> Iterable[State]:
    if not _takes_muon(p):
        return _adamw(p)
    return (State("momentum_buffer", p.shape, p.dtype, "torch.optim.Muon: zeros_like(gradient)"),)


def _takes_muon(p: Trained) -> bool:
    """Muon is for the matrices of the layers; embedding, head, norms and biases get AdamW (torch's own advice)."""
    return p.in_layers and len(p.shape) == 2


def _adafactor(p: Trained) -> Iterable[State]:
    source = "transformers.Adafactor: fp32, whatever the parameter"
    if len(p.shape) < 2:
        yield State("exp_avg_sq", p.shape, "fp32", source)
    else:
        rows, columns = loops.factors(p)
        yield State("exp_avg_sq_row", rows, "fp32", source)
        yield State("exp_avg_sq_col", columns, "fp32", source)
    yield State("RMS", (), "fp32", "transformers.Adafactor: the root mean square of the parameter")


def _adalomo(p: Trained) -> Iterable[State]:
    source = "lomo_optim.AdaLomo: fp32, when it is made"
    if len(p.shape) < 2:
        return (State("exp_avg_sq", p.shape, "fp32", source),)
    rows, columns = p.shape[:2]
    return (State("exp_avg_sq_row", (rows,), "fp32", source), State("exp_avg_sq_col", (columns,), "fp32", source))


def _low_rank(p: Trained, how: loops.LowRank, projection: tuple[int, int], source: str) -> Iterable[State]:
    yield State("exp_avg", how.gradient, p.dtype, f"{source}: of the projected gradient")
    yield State("exp_avg_sq", how.gradient, p.dtype, f"{source}: of the projected gradient")
    yield State("projection", projection, p.dtype, f"{source}: rank {loops.RANK}, the Trainer's default")


def _galore(p: Trained) -> Iterable[State]:
    """Of fp32 parameters the projection is a view of all singular vectors, so that all of them stay."""
    if not p.is_matrix:
        return _adamw(p)
    how = loops.of_galore(p)
    projection = how.projection if p.dtype != "fp32" else (how.short, how.short)
    return _low_rank(p, how, projection, "galore_torch.GaLoreAdamW")


def _apollo(p: Trained) -> Iterable[State]:
    if not p.is_matrix:
        yield from _adamw(p)
        return
    how = loops.low_rank(p, loops.RANK)
    yield from _low_rank(p, how, how.projection, "apollo_torch.APOLLOAdamW")
    yield State("norm of the scaled gradient", (), p.dtype, "apollo_torch.APOLLOAdamW: limits its growth")


def _bitsandbytes(what: str, moments: dict[str, int], *, bits: int = 32, paged: bool = False) -> Rule:
    """`moments`: for each state how many numbers a parameter has in it."""
    source = f"bitsandbytes.optim.{what}"

    def states(p: Trained) -> Iterable[State]:
        elements = _product(p.shape)
        small = elements < LEAST_8BIT or p.of_embedding
        wide = bits == 32 or small
        on_host = paged and elements >= LEAST_PAGED
        held = "32 bits below 4,096 elements and for embeddings" if bits == 8 and wide else f"{bits} bits a number"
        held += ", in unified memory" if on_host else ""
        for name, copies in moments.items():
            shape = p.shape if copies == 1 else (copies, *p.shape)
            yield State(name, shape, "fp32" if wide else "uint8", f"{source}: {held}", on_host)
            if not wide:
                blocks = -(-elements // BLOCK)
                shape = (blocks,) if copies == 1 else (copies, blocks)
                yield State(f"absmax of {name}", shape, "fp32", f"{source}: an fp32 for each block of 256")

    return states


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for dim in shape:
        product *= dim
    return product


# -- phases ------------------------------------------------------------------------------------------------------------


def _all(parameters: Sequence[Trained]) -> Sequence[Trained]:
    return parameters


def _matrices_last(parameters: Sequence[Trained]) -> Sequence[Trained]:
    """As the Trainer groups them for GaLore and APOLLO."""
    return sorted(parameters, key=lambda p: p.is_matrix)


def _for_muon(parameters: Sequence[Trained]) -> Sequence[Trained]:
    return [p for p in parameters if _takes_muon(p)]


def _not_for_muon(parameters: Sequence[Trained]) -> Sequence[Trained]:
    return [p for p in parameters if not _takes_muon(p)]


ROOT = "square root of exp_avg_sq"
_GALORE = "galore_torch/adamw.py: a step that computes its projections anew, every 200th"
_APOLLO = "apollo_torch/apollo.py: a step that draws its projections anew, every 200th"


def _paged_and_not() -> dict[str, Optimizer]:
    """Those of bitsandbytes: of 32 and 8 bits, on the device and paged, as far as the Trainer has them."""
    found = {}
    adam, lion = {"exp_avg": 1, "exp_avg_sq": 1}, {"exp_avg": 1}
    rmsprop, ademamix = {"square_avg": 1}, {"exp_avgs": 2, "exp_avg_sq": 1}
    for name, what, moments in (("adamw", "AdamW", adam), ("lion", "Lion", lion), ("ademamix", "AdEMAMix", ademamix)):
        for prefix, paged in (("", False), ("paged-", True)):
            found[f"{prefix}{name}"] = Optimizer(_bitsandbytes(what, moments, paged=paged))
            states = _bitsandbytes(f"{what}8bit" if not paged else f"Paged{what}8bit", moments, bits=8, paged=paged)
            found[f"{prefix}{name}-8bit"] = Optimizer(states, num_code_books=len(moments))
    found["adamw-32bit"] = found.pop("adamw")  # torch's has that name
    found["rmsprop-32bit"] = Optimizer(_bitsandbytes("RMSprop", rmsprop))
    found["rmsprop-8bit"] = Optimizer(_bitsandbytes("RMSprop8bit", rmsprop, bits=8), num_code_books=1)
    return found


OPTIMIZER_BY_NAME = {
    "adamw-foreach": Optimizer(_adamw, (Phase(_all, FOREACH_SOURCE, together=(ROOT,)),)),
    "adamw-fused": Optimizer(_adamw_fused),
    "adamw-offloaded": Optimizer(_adamw_offloaded),
    "adamw-forloop": Optimizer(
        _adamw, (Phase(_all, "torch/optim/adam.py: _single_tensor_adam", loop=loops.adamw_forloop),)
    ),
    "sgd": Optimizer(_nothing),
    "sgd-momentum": Optimizer(_like("momentum_buffer", source="torch.optim.SGD: a clone of the gradient")),
    "rmsprop": Optimizer(
        _like("square_avg", source="torch.optim.RMSprop: zeros_like(parameter)"),
        (Phase(_all, "torch/optim/rmsprop.py: _multi_tensor_rmsprop", together=("square root of square_avg",)),),
    ),
    "adagrad": Optimizer(
        _like("sum", source="torch.optim.Adagrad: full_like(parameter), when it is made"),
        (Phase(_all, "torch/optim/adagrad.py: _multi_tensor_adagrad", together=("square root of sum", "numerator")),),
        from_start=True,
    ),
    "muon": Optimizer(
        _muon,
        (
            Phase(_for_muon, "torch/optim/_muon.py: Newton-Schulz", loop=loops.muon),
            Phase(_not_for_muon, FOREACH_SOURCE, together=(ROOT,)),
        ),
    ),
    "schedule-free-adamw": Optimizer(
        _like("z", "exp_avg_sq", source="schedulefree.AdamWScheduleFree: like the parameter"),
        (Phase(_all, "schedulefree/adamw_schedulefree.py: _foreach_div", together=("denominator",)),),
    ),
    "schedule-free-sgd": Optimizer(_like("z", source="schedulefree.SGDScheduleFree: a clone of the parameter")),
    "adafactor": Optimizer(
        _adafactor, (Phase(_all, "transformers/optimization.py: Adafactor.step", loop=loops.adafactor),)
    ),
    "galore-adamw": Optimizer(_galore, (Phase(_matrices_last, _GALORE, loop=loops.galore_adamw),)),
    "apollo-adamw": Optimizer(_apollo, (Phase(_matrices_last, _APOLLO, loop=loops.apollo_adamw),)),
    **_paged_and_not(),
    "adamw-in-backward": Optimizer(
        _adamw_fused,
        in_backward=InBackward(
            loops.fused_adamw_in_backward,
            "torch.optim.AdamW(fused=True) of one parameter in register_post_accumulate_grad_hook",
        ),
    ),
    "lomo": Optimizer(_nothing, in_backward=InBackward(loops.lomo, "lomo_optim/lomo.py: fuse_update", waits=True)),
    "adalomo": Optimizer(
        _adalomo,
        from_start=True,
        in_backward=InBackward(loops.adalomo, "lomo_optim/adalomo.py: fuse_update", waits=True),
    ),
}
"""Implementations by name."""
