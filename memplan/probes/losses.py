"""Losses that never hold all logits, as far as memory is concerned: the allocations of the libraries on a CUDA device.

On the meta device Triton has nothing to run: where a library calls a kernel that works in place, nothing is called
here.  What is left are the tensors that the library's Python makes around its kernels, in its order and under its
variables.  Compiled functions of a few numbers a token count as one kernel.

How many labels are ignored is a share that is given (`Head.supervised`), as there are no labels to look at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone gives it
from torch.utils.checkpoint import checkpoint

from memplan.errors import UsageError
from memplan.operators.sizes import MILLION

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.probes.autocast import CudaAutocast

    Loss = Callable[..., dict[str, Any]]

IGNORED = -100

CHUNK_TOKENS = 256
"""``_CHUNKED_LM_HEAD_CHUNK_SIZE`` of TRL 1.14."""
TILE_TOKENS, TILE_WORDS = 4096, 32768
"""``TOKEN_CHUNK_SIZE`` and ``_CHUNKED_LOGPROB_CHUNK_SIZE`` of TRL 1.16."""


class Head(NamedTuple):
    """The output layer of the model."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    scaled: bool
    """Whether the logits are multiplied by a number."""
    autocast: CudaAutocast | None
    supervised: float = 1.0
    """Share of the tokens that have a label: the meta device has none to look at."""
    unlabelled: int = 0
    """Tokens that are asked for a next one and begin another sequence: they have none, and are no part of the share."""

    def num_supervised(self, tokens: int) -> int:
        """Of so many tokens, those that have a label."""
        return num_supervised(tokens - self.unlabelled, self.supervised)

    @property
    def lower(self) -> torch.dtype | None:
        """What autocast computes products in, None where it is off."""
        return self.autocast.dtype if self.autocast is not None and self.autocast.enabled else None


def num_supervised(tokens: int, supervised: float) -> int:
    """Of so many tokens, those that have a label, which are a share of them."""
    return -(-tokens * round(supervised * MILLION) // MILLION)


# -- chunked -----------------------------------------------------------------------------------------------------------


def chunked(hidden_states: torch.Tensor, head: Head, labels: torch.Tensor, num_items: Any) -> dict[str, Any]:
    """256 tokens at a time, each chunk under checkpointing; with the sums that TRL reports."""
    hidden = hidden_states[..., :-1, :].reshape(-1, hidden_states.size(-1))
    labels = labels[..., 1:].reshape(-1)
    valid = labels != IGNORED
    num_valid = valid.sum()
    num_padded = (num_valid / CHUNK_TOKENS).ceil().clamp(min=1).to(torch.int64) * CHUNK_TOKENS
    correct, entropy = (hidden.new_zeros((), dtype=torch.float32) for _ in range(2))
    order = valid.to(torch.int8).argsort(descending=True, stable=True)
    hidden, labels = hidden[order], labels[order]
    loss = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, max(head.num_supervised(hidden.size(0)), 1), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        sums = checkpoint(
            _chunk, hidden[part], head, head.weight, labels[part], use_reentrant=False, **_again(head.autocast)
        )
        loss, correct, entropy = loss + sums[0], correct + sums[1], entropy + sums[2]
    loss = loss / num_items
    del num_padded
    return {"loss": loss, "correct": correct, "entropy": entropy, "num_valid": num_valid}


def _chunk(hidden: torch.Tensor, head: Head, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    logits = (hidden @ weight.to(hidden.dtype).t()).float()
    if head.bias is not None:
        logits = logits + head.bias.float()
    if head.scaled:
        logits = logits * 0.5
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    log_p = F.log_softmax(logits, dim=-1)
    loss = F.nll_loss(log_p, labels, ignore_index=IGNORED, reduction="sum")
    valid = labels != IGNORED
    correct = ((logits.argmax(dim=-1) == labels) & valid).sum().float()
    entropy = (-(log_p.exp() * log_p).sum(dim=-1) * valid).sum()
    return loss, correct, entropy


def _again(autocast: CudaAutocast | None) -> dict[str, Any]:
    from memplan.probes.checkpointing import _kwargs

    return {name: value for name, value in _kwargs(autocast).items() if name == "context_fn"}


# -- fused -------------------------------------------------------------------------------------------------------------


def fused(hidden_states: torch.Tensor, head: Head, labels: torch.Tensor, num_items: Any) -> dict[str, Any]:
    """Liger's: the gradients of hidden states and weight are there when the forward pass ends."""
    padded = F.pad(labels, (0, 1), value=IGNORED)
    shifted = padded[..., 1:].contiguous().view(-1)
    hidden = hidden_states.view(-1, hidden_states.size(-1))
    loss = _Fused.apply(hidden, head.weight, shifted, head.bias, head.lower)  # type: ignore[no-untyped-call]
    return {"loss": loss if num_items is None else loss / num_items}


class _Fused(torch.autograd.Function):
    """``LigerFusedLinearCrossEntropyFunction`` with ``accum_dtype=None``, on compute capability 8.0 or more."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, target: Any, bias: Any, lower: Any) -> torch.Tensor:
        if bias is not None:
            raise UsageError("Liger's fused loss of an output layer with a bias is not traced.", "Use --loss full.")
        tokens, width = hidden.shape
        vocab = weight.shape[0]
        chunk = min(_next_power_of_two(-(-tokens // -(-vocab // width))), tokens)
        into_place = hidden.dtype == weight.dtype and lower in {None, hidden.dtype}
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if weight.requires_grad and hidden.requires_grad else None
        losses = torch.zeros(tokens, dtype=torch.float32, device=hidden.device)
        mask = target != IGNORED
        mask.sum()
        buffer = hidden.new_empty((chunk, vocab)) if into_place else None
        for start in range(0, tokens, chunk):
            part = hidden[start : start + chunk]
            logits = part @ weight.t() if buffer is None else buffer[: part.shape[0]]
            if buffer is None:
                grad_hidden[start : start + chunk] = logits @ weight
            if grad_weight is not None:
                _add_product(grad_weight, logits, part)
            del logits, part
        del buffer
        loss = losses.sum()
        ctx.save_for_backward(grad_hidden.detach(), None if grad_weight is None else grad_weight.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        one = torch.ones((), device=grads[0].device)
        del one
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden, grad_weight, None, None, None


def _add_product(grad_weight: torch.Tensor, grad_logits: torch.Tensor, hidden: torch.Tensor) -> None:
    """``grad_weight += grad_logits.T @ hidden``: in place with half-precision factors, else by way of the product."""
    if grad_logits.dtype == torch.float32:
        grad_weight += torch.mm(grad_logits.t(), hidden).float()
    else:
        hidden = hidden.to(grad_logits.dtype)


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


# -- tiled -------------------------------------------------------------------------------------------------------------


def tiled(hidden_states: torch.Tensor, head: Head, labels: torch.Tensor, num_items: Any) -> dict[str, Any]:
    """TRL's: log-probabilities and entropy of every label, and whether it is the likeliest."""
    numbers = tiled_numbers(hidden_states, head, labels, ("entropy", "best"))
    mask, log_probs = numbers["mask"], numbers["log_probs"]
    loss = -log_probs
    loss = loss.sum() / torch.as_tensor(mask.sum() if num_items is None else num_items).clamp(min=1)
    return {"loss": loss, **numbers}


def tiled_numbers(
    hidden_states: torch.Tensor, head: Head, labels: torch.Tensor, reported: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """Log-probabilities of the labels (b, s-1), what else is `reported` of each, and where there is a label."""
    hidden_states, labels = hidden_states[:, :-1], labels[:, 1:]
    mask = labels != IGNORED
    numbers = _Tiled.apply(  # type: ignore[no-untyped-call]
        _masked(hidden_states, mask, head), head.weight, head.bias, _masked(labels, mask, head), head.lower, reported
    )
    return {**dict(zip(("log_probs", *reported), _scattered(numbers, mask), strict=True)), "mask": mask}


def _scattered(numbers: tuple[torch.Tensor, ...], mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.new_zeros(mask.shape).masked_scatter(mask, x) for x in numbers)


def _masked(x: torch.Tensor, mask: torch.Tensor, head: Head) -> torch.Tensor:
    """``x[mask]``."""
    return masked(x, mask, head.supervised)


def masked(x: torch.Tensor, mask: torch.Tensor, supervised: float) -> torch.Tensor:
    """``x[mask]`` of a mask over labels, of which `supervised` is the share that counts."""
    return _Masked.apply(x, mask, num_supervised(mask.numel(), supervised))  # type: ignore[no-untyped-call,no-any-return]


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor, num: int) -> torch.Tensor:
        ctx.save_for_backward(mask)
        ctx.shape = x.shape
        return x.new_empty((num, *x.shape[mask.dim() :]))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        zeros = grads[0].new_zeros(ctx.shape)
        values = grads[0].contiguous()  # index_put_with_sort_kernel's
        del values
        return zeros, None, None


class _Tiled(torch.autograd.Function):
    """``ChunkedLogProbFunction`` on CUDA, asked for log-probabilities and what is reported besides."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, lower: Any, reported: Any) -> Any:
        ctx.set_materialize_grads(False)
        dtype = lower or hidden.dtype
        num, vocab = hidden.shape[0], weight.shape[0]
        running = [torch.zeros((num,), device=hidden.device) for _ in range(7)]
        buffer = torch.empty((min(num, TILE_TOKENS), TILE_WORDS), device=hidden.device, dtype=dtype)
        for token in range(0, num, TILE_TOKENS):
            part = hidden[token : token + TILE_TOKENS].to(dtype)
            for start in range(0, vocab, TILE_WORDS):
                weight[start : start + TILE_WORDS].to(dtype)
                if bias is not None:
                    bias[start : start + TILE_WORDS].to(dtype)
        del part
        log_z = running[0] + torch.log(running[1])
        log_probs = running[6] - log_z
        made = {}
        if "entropy" in reported:
            made["entropy"] = log_z - running[2] / running[1]
        if "mean" in reported:
            made["mean"] = running[4] / vocab
        if "best" in reported:
            made["best"] = (running[6] >= running[0]) & (running[6] > running[5])
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, made.get("entropy", log_z))
        ctx.dtype = dtype
        ctx.mark_non_differentiable(*(x for name, x in made.items() if name != "entropy"))
        del buffer
        return log_probs, *(made[name] for name in reported)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, bias, _targets, _log_z, _entropy = ctx.saved_tensors
        device, dtype = hidden.device, ctx.dtype
        needs = ctx.needs_input_grad[:3]
        inputs = (hidden, weight, bias)
        totals = [torch.zeros(x.shape, device=device) if need else None for x, need in zip(inputs, needs, strict=True)]
        buffer = torch.empty((min(hidden.shape[0], TILE_TOKENS), TILE_WORDS), device=device, dtype=dtype)
        for token in range(0, hidden.shape[0], TILE_TOKENS):
            part = hidden[token : token + TILE_TOKENS].to(dtype)
            for start in range(0, weight.shape[0], TILE_WORDS):
                words = weight[start : start + TILE_WORDS].to(dtype)
                if dtype == torch.float32:  # no kernel adds a product of fp32 to fp32 in another way: both as they are
                    part.float(), words.float()
        made = tuple(None if total is None else total.to(x.dtype) for total, x in zip(totals, inputs, strict=True))
        del buffer, part, words
        return *made, None, None, None


# -- cut ---------------------------------------------------------------------------------------------------------------


def cut(hidden_states: torch.Tensor, head: Head, labels: torch.Tensor, num_items: Any) -> dict[str, Any]:
    """Cut cross-entropy: two numbers a token and one a word are kept."""
    if head.bias is not None:
        raise UsageError("Cut cross-entropy 25.1.1 takes no bias of the output layer.", "Use --loss full or chunked.")
    hidden = hidden_states.to(head.weight.dtype)
    if hidden.dtype == torch.float32:
        raise UsageError("Cut cross-entropy takes hidden states in half precision alone.", "Use --precision bf16.")
    num = head.num_supervised(labels[..., 1:].numel())
    pairs = torch.empty((num, 2), dtype=torch.int64, device=hidden.device)  # (targets != -100).nonzero()
    pairs = pairs.to(torch.int32)
    valids = pairs.sum(1)
    del pairs
    loss = _Cut.apply(hidden.flatten(0, -2), head.weight, labels.flatten(), valids)  # type: ignore[no-untyped-call]
    return {"loss": loss if num_items is None else loss / num_items}


class _Cut(torch.autograd.Function):
    """``LinearCrossEntropyFunction`` with a threshold for gradients, as by default."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any, valids: Any) -> torch.Tensor:
        num, device = valids.shape[0], hidden.device
        log_sum = torch.zeros((num,), device=device)
        locks = torch.zeros((-(-num // 128),), dtype=torch.int32, device=device)
        average = torch.zeros((weight.shape[0],), device=device)
        del locks
        nll = torch.zeros((num,), device=device)
        loss = nll.sum()
        ctx.save_for_backward(hidden, weight, log_sum, targets, valids, average)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, _log_sum, _targets, valids, average = ctx.saved_tensors
        order = average.new_empty(average.shape, dtype=torch.int64)
        order = order.to(torch.int32)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=hidden.dtype) if ctx.needs_input_grad[1] else None
        num_locks = -(-weight.shape[1] // 64)
        locks = [
            hidden.new_zeros((-(-rows // num_locks), num_locks), dtype=torch.int32)
            for rows in (valids.shape[0], weight.shape[0])
        ]
        del locks, order
        return grad_hidden, grad_weight, None, None


LOSS_BY_NAME: dict[str, Loss] = {"chunked": chunked, "tiled": tiled, "fused": fused, "cut": cut}
"""The losses of `memplan.specs.training.LOSSES` beside the model's own."""
