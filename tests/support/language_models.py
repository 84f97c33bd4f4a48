"""A causal language model of a few hundred parameters, and batches of ragged labels for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

VOCABULARY, WIDTH = 17, 6


class Output(NamedTuple):
    logits: torch.Tensor


class Tiny(nn.Module):
    """Embedding, causal mean over what came before, a layer, logits; called as models of transformers are."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight  # tied, as most small models are
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)

    def forward(self, input_ids: torch.Tensor) -> Output:
        hidden = self.embed(input_ids)
        seen = torch.arange(1, hidden.shape[1] + 1).view(1, -1, 1)
        hidden = torch.tanh(self.layer(hidden.cumsum(1) / seen)) + hidden
        return Output(self.head(hidden))


def ragged(num: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """`num` sequences, of which the last 1 to `length` tokens have a label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (num, length), generator=generator)
    labels = ids.clone()
    for row in labels:
        supervised = int(torch.randint(1, length + 1, (), generator=generator))
        row[: length - supervised] = -100
    return {"input_ids": ids, "labels": labels}


def whole_gradient(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the mean loss over all tokens of the batch, in one forward pass; torch's own mean."""
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"]).logits
    functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    found = gradient(model)
    model.zero_grad()
    return found


def gradient(model: nn.Module) -> torch.Tensor:
    """All gradients as one vector."""
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.requires_grad])


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """L2 norm of the difference by that of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())
