"""One optimizer step of several micro-batches, that is the step of the whole batch.

    gradient = sum over ranks and micro-batches of d(L_i) / d(parameters)  /  N,      N = sum of n_i

L_i is the sum of the losses of micro-batch i and n_i their number.  N is known before the first backward pass, so each
backpropagates L_i x R / N, of which ranks that average their gradients make L_i / N (see `memplan.accumulation.ranks`).
Taking the mean of each micro-batch and averaging the means weights a token by mean(n) / n_i instead: see
`memplan.equivalence.weights`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from memplan.accumulation.gradients import Recorder
from memplan.accumulation.losses import causal_lm_loss, count_next_tokens
from memplan.accumulation.ranks import agreed, ranks_of
from memplan.accumulation.splitting import moved, split
from memplan.errors import MemplanError, UsageError
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import nn

    from memplan.accumulation.losses import Count, Loss
    from memplan.accumulation.noise import GradientNoise
    from memplan.accumulation.ranks import Ranks


class Step(NamedTuple):
    """What a step says of itself; the gradients are in the parameters."""

    loss: torch.Tensor
    """Mean over all tokens of all ranks; a detached scalar."""
    num_tokens: int
    """That the loss is the mean over, of all ranks; 0: the gradients are zero, and the update is to be left out."""
    num_micro_batches: int
    """Of this rank."""
    grad_norm: torch.Tensor | None
    """L2 norm of the gradient before it was clipped; None: nothing asked for it."""


def accumulate(
    model: nn.Module,
    batch: Any,
    *,
    micro_batch_size: int | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    loss: Loss = causal_lm_loss,
    count: Count = count_next_tokens,
    max_grad_norm: float | None = None,
    scaler: Any = None,
    optimizer: Any = None,
    group: Any = None,
    noise: GradientNoise | None = None,
) -> Step:
    """Leave in the parameters the gradient of the mean loss over a batch, one micro-batch after the other.

        loader = DataLoader(data, batch_size=4 * 8, collate_fn=collate)  # micro-batch 4 x accumulation 8, on each rank
        for batch in loader:
            step = memplan.accumulate(model, batch, micro_batch_size=4, max_grad_norm=1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            print(f"loss {step.loss:.4f}, gradient {step.grad_norm:.2f}, {step.num_tokens} tokens")

    The last batch of an epoch may be smaller, and ranks may have different numbers of micro-batches: every token has
    the same weight.  Gradients meet once, in the last backward pass, and are clipped once, behind it.  What the
    parameters' gradients held before is kept and added to: call ``optimizer.zero_grad()`` after each step.  They are
    accumulated in the dtype of the parameters.  Under autocast, enter it in the `loss`.  Not for DeepSpeed engines,
    which scale and step themselves.

    Args:
        model: A module; across ranks in DistributedDataParallel or FSDP (`memplan.accumulation.ranks` says which).
        batch: This rank's part of the step: a dict of tensors, a tuple of them or one tensor, a list of samples, or,
            without `micro_batch_size`, a list of micro-batches.
        micro_batch_size: Samples of one forward pass; None: the batch is a list of micro-batches, or is one.
        collate: Makes a micro-batch of a list of samples; None: they are stacked.
        loss: (model, micro-batch) -> (sum of the losses, their number); by default that of causal language models of
            transformers.
        count: Micro-batch -> the same number, before the forward pass; by default labels but the first of a row
            that are not -100.
        max_grad_norm: Clip the gradient to this L2 norm; None: do not.
        scaler: A torch.amp.GradScaler; needs `optimizer`, whose gradients it unscales before they are clipped.
        optimizer: The one that the scaler is used with.
        group: The ranks with different data; None: those of the wrapper, or all.
        noise: Learns from the gradients of the micro-batches: see `GradientNoise`.

    Raises:
        UsageError: the batch cannot be split, or nothing averages the gradients of several ranks.
        MemplanError: `loss` took other tokens than `count` counted, so that the gradient is wrong.
    """
    if scaler is not None and optimizer is None:
        raise UsageError("A scaler unscales the gradients of an optimizer.", "Give optimizer=, too.")
    ranks = ranks_of(model, group)
    device = next(model.parameters()).device
    micro_batches = split(batch, micro_batch_size, collate)
    num_tokens = agreed(ranks, [count(one) for one in micro_batches], device)
    with Recorder(model, scale=scale_of(scaler), enabled=noise is not None) as recorder:
        sums = _backward(model, micro_batches, loss, ranks, num_tokens, scaler, recorder)
    found, taken = ranks.sum(sums).tolist()
    if taken != num_tokens:
        raise MemplanError(
            f"The loss is over {taken:.0f} tokens, and {num_tokens} were counted before: the gradient is off by that.",
            "Give count= and loss= that agree; causal language models predict labels[:, 1:].",
        )
    if scaler is not None:
        scaler.unscale_(optimizer)
    if noise is not None:
        recorder.tell(noise, ranks, num_tokens)
    norm = None if max_grad_norm is None else _clip(model, max_grad_norm)
    return Step(sums.new_tensor(found / max(num_tokens, 1)), num_tokens, len(micro_batches), norm)


def _backward(
    model: nn.Module,
    micro_batches: Sequence[Any],
    loss: Loss,
    ranks: Ranks,
    num_tokens: int,
    scaler: Any,
    recorder: Recorder,
) -> torch.Tensor:
    """All backward passes; (sum of the losses, their number) of this rank, shape (2,), float64."""
    import torch

    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    factor = ranks.num / max(num_tokens, 1)
    for at, micro_batch in enumerate(micro_batches, 1):
        with nullcontext() if at == len(micro_batches) else ranks.unsynchronised():
            total, num = loss(model, moved(micro_batch, device))
            recorder.begin(num)
            share = total * factor
            (share if scaler is None else scaler.scale(share)).backward()
        sums[0] += total.detach().to(device)
        sums[1] += num.to(device) if isinstance(num, torch.Tensor) else num
    return sums


def scale_of(scaler: Any) -> float:
    """What a scaler multiplies losses with; 1 without one."""
    return 1.0 if scaler is None else float(scaler.get_scale())


def _clip(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Clip the gradient once; its norm before."""
    import torch

    own = getattr(model, "clip_grad_norm_", None)  # FSDP1's, over the shards of all ranks
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm) if own is None else own(max_norm)
    whole: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2's
    return whole
