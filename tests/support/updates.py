"""Modules and step functions, each built to have one fault, for `memplan same-update`."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from tests.support.language_models import VOCABULARY, Tiny

# -- modules, as factories ---------------------------------------------------------------------------------------------


class WithLoss(Tiny):
    """Returns its mean loss over the next tokens."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = super().forward(input_ids).logits
        return {"loss": functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}

    def make_inputs(self, num: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(VOCABULARY, (num, length))
        return {"input_ids": ids, "labels": ids.clone()}


def language_model() -> nn.Module:
    return WithLoss()


def dies() -> nn.Module:
    os._exit(3)


class Encoder(WithLoss):
    """Predicts each label at its own position."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = Tiny.forward(self, input_ids).logits
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def encoder() -> nn.Module:
    return Encoder()


class Pooled(nn.Module):
    """A classifier of vectors; parts in the middle make the faults."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 3))

    def forward(self, vectors: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.layers(vectors), classes)

    def make_inputs(self, num: int, _: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(num, 6), torch.randint(3, (num,))


def classifier() -> nn.Module:
    return Pooled(nn.LayerNorm(8), nn.Dropout(0.5))


def batch_norm() -> nn.Module:
    return Pooled(nn.BatchNorm1d(8))


class Centred(nn.Module):
    """Statistics of the batch by another name."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden - hidden.mean(0)


def coupled() -> nn.Module:
    return Pooled(Centred())


class Noise(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.dropout(hidden, 0.5)


def random() -> nn.Module:
    return Pooled(Noise())


class Summed(Pooled):
    def forward(self, vectors: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.layers(vectors), classes, reduction="sum")


def summed() -> nn.Module:
    return Summed()


class Contrastive(nn.Module):
    """Each anchor against the positives of its micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Linear(6, 5)

    def forward(self, anchors: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        scores = self.layer(anchors) @ self.layer(positives).T
        return functional.cross_entropy(scores, torch.arange(len(scores)))

    def make_inputs(self, num: int, _: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(num, 6), torch.randn(num, 6)


def contrastive() -> nn.Module:
    return Contrastive()


class Mixture(WithLoss):
    """Two experts, chosen by a router that is told to keep them balanced (the loss of Switch transformers)."""

    def __init__(self, coefficient: float) -> None:
        super().__init__()
        self.router = nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.router_aux_loss_coef = coefficient

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.embed(input_ids)
        shares = self.router(hidden).softmax(-1)
        mixed = sum(shares[..., n, None] * expert(hidden) for n, expert in enumerate(self.experts))
        logits = self.head(torch.tanh(self.layer(mixed)))
        chosen = functional.one_hot(shares.argmax(-1), 2).float().mean((0, 1))
        balance = 2 * (chosen * shares.mean((0, 1))).sum()
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss + self.router_aux_loss_coef * balance}


def mixture() -> nn.Module:
    torch.manual_seed(3)
    return Mixture(0.5)


def mixture_without_balance() -> nn.Module:
    torch.manual_seed(3)
    return Mixture(0.0)


# -- step functions ----------------------------------------------------------------------------------------------------


def num_tokens(micro_batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (micro_batch["labels"][:, 1:] != -100).sum()


def mean_of(model: nn.Module, micro_batch: Any) -> torch.Tensor:
    return model(**micro_batch)["loss"]


def right(model: nn.Module, micro_batches: list[Any], times: float = 1.0) -> None:
    total = sum(map(num_tokens, micro_batches))
    for one in micro_batches:
        (times * mean_of(model, one) * num_tokens(one) / total).backward()


def summed_over_steps(model: nn.Module, micro_batches: list[Any]) -> None:
    """The fix of 2024 in trainers whose models ignored it: K times too large."""
    right(model, micro_batches, len(micro_batches))


def four_times(model: nn.Module, micro_batches: list[Any]) -> None:
    """The short last step, too."""
    right(model, micro_batches, 4)


def divided_twice(model: nn.Module, micro_batches: list[Any]) -> None:
    right(model, micro_batches, 1 / len(micro_batches))


def sum_of_tokens(model: nn.Module, micro_batches: list[Any]) -> None:
    for one in micro_batches:
        (mean_of(model, one) * num_tokens(one)).backward()


def micro_averaged(model: nn.Module, micro_batches: list[Any]) -> None:
    for one in micro_batches:
        (mean_of(model, one) / len(micro_batches)).backward()


def never_divided(model: nn.Module, micro_batches: list[Any]) -> None:
    for one in micro_batches:
        mean_of(model, one).backward()


def fixed_accumulation(model: nn.Module, micro_batches: list[Any]) -> None:
    """Divides by 4 whatever is left of the epoch, as Lightning does."""
    right(model, micro_batches, len(micro_batches) / 4)


def micro_averaged_and_fixed(model: nn.Module, micro_batches: list[Any]) -> None:
    for one in micro_batches:
        (mean_of(model, one) / 4).backward()


def sample_averaged(model: nn.Module, micro_batches: list[Any]) -> None:
    for micro_batch in micro_batches:
        num = len(micro_batch["labels"])
        for at in range(num):
            one = {name: value[at : at + 1] for name, value in micro_batch.items()}
            (mean_of(model, one) / num / len(micro_batches)).backward()


def clipped_each_time(model: nn.Module, micro_batches: list[Any]) -> None:
    total = sum(map(num_tokens, micro_batches))
    for one in micro_batches:
        (mean_of(model, one) * num_tokens(one) / total).backward()
        clip_grad_norm_(model.parameters(), 0.05)


def clipped_by_hand_each_time(model: nn.Module, micro_batches: list[Any]) -> None:
    total = sum(map(num_tokens, micro_batches))
    for one in micro_batches:
        (mean_of(model, one) * num_tokens(one) / total).backward()
        for parameter in model.parameters():
            parameter.grad.clamp_(-0.001, 0.001)


def clipped_once(model: nn.Module, micro_batches: list[Any]) -> None:
    right(model, micro_batches)
    clip_grad_norm_(model.parameters(), 0.05)


def each_parameter_clipped_once(model: nn.Module, micro_batches: list[Any]) -> None:
    right(model, micro_batches)
    for parameter in model.parameters():
        clip_grad_norm_(parameter, 0.01)


def values_clipped_once(model: nn.Module, micro_batches: list[Any]) -> None:
    right(model, micro_batches)
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.001)


def micro_averaged_and_clipped_once(model: nn.Module, micro_batches: list[Any]) -> None:
    micro_averaged(model, micro_batches)
    clip_grad_norm_(model.parameters(), 0.05)


def kept_in(model: nn.Module, micro_batches: list[Any], dtype: torch.dtype) -> None:
    total = sum(map(num_tokens, micro_batches))
    kept = [torch.zeros_like(one, dtype=dtype) for one in model.parameters()]
    for one in micro_batches:
        model.zero_grad()
        (mean_of(model, one) * num_tokens(one) / total).backward()
        kept = [before + one.grad.to(dtype) for before, one in zip(kept, model.parameters(), strict=True)]
    for sum_so_far, parameter in zip(kept, model.parameters(), strict=True):
        parameter.grad = sum_so_far.float()


def kept_in_bf16(model: nn.Module, micro_batches: list[Any]) -> None:
    kept_in(model, micro_batches, torch.bfloat16)


def kept_in_fp16(model: nn.Module, micro_batches: list[Any]) -> None:
    kept_in(model, micro_batches, torch.float16)


def autocast(model: nn.Module, micro_batches: list[Any]) -> None:
    total = sum(map(num_tokens, micro_batches))
    for one in micro_batches:
        with torch.autocast("cpu", torch.bfloat16):
            mean = mean_of(model, one)
        (mean * num_tokens(one) / total).backward()


def shuffled_weights(model: nn.Module, micro_batches: list[Any]) -> None:
    """A fault that nobody has a name for: the first micro-batch counts double."""
    total = sum(map(num_tokens, micro_batches))
    for at, one in enumerate(micro_batches):
        ((1 + (at == 0)) * mean_of(model, one) * num_tokens(one) / total).backward()


def uncompensated(model: nn.Module, micro_batches: list[Any]) -> None:
    """Counts the tokens of all ranks and forgets that DistributedDataParallel averages: 1 / R."""
    total = sum(map(num_tokens, micro_batches))
    torch.distributed.all_reduce(total)
    for one in micro_batches:
        (mean_of(model, one) * num_tokens(one) / total).backward()


def raises(model: nn.Module, micro_batches: list[Any]) -> None:
    raise ValueError("the loader is empty")
