"""Tokens generated behind a batch of prompts, by transformers' own ``generate``.

accelerate wraps the ``forward`` of the prepared model: each pass has a region of autocast of its own, and hands its
outputs out in fp32 (``prepare_model`` in accelerate/accelerator.py).  ``generate`` of peft's model calls the model
inside, whose passes therefore run without autocast (``PeftModelForCausalLM.generate``).
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any
from unittest import mock

from memplan.errors import UsageError
from memplan.probes.faults import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from memplan.probes.training import TrainingRun


def generate(run: TrainingRun, inputs: Any, new_tokens: int) -> torch.Tensor:
    """Prompts and what follows them: (batch, length + `new_tokens`), greedily.

    Raises:
        UsageError: the model cannot generate.
    """
    if not getattr(run.model, "can_generate", bool)():
        raise UsageError(f"{type(run.model).__name__} does not generate.", "Leave --eval-generate out.")
    prompts = {name: x for name, x in inputs.items() if name != "labels"}
    length = prompts["input_ids"].shape[1] + new_tokens
    with _stopping_at(length), _as_prepared(run):
        tokens: torch.Tensor = run.model.generate(
            **prompts, max_new_tokens=new_tokens, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
        )
    return tokens


@contextlib.contextmanager
def _as_prepared(run: TrainingRun) -> Iterator[None]:
    """Each forward pass of the model in autocast, where the run has it."""
    if run.autocast is None:
        yield
        return
    autocast, plain = run.autocast, run.model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with autocast():
            outputs = plain(*args, **kwargs)
        return run.handed_out(outputs)

    run.model.forward = forward
    try:
        yield
    finally:
        del run.model.forward


@contextlib.contextmanager
def _stopping_at(length: int) -> Iterator[None]:
    """Whether all sequences have ended is a question about their tokens, which a trace does not have."""
    require("transformers")
    from transformers.generation import utils

    class AtLength(utils.StopCheck):  # type: ignore[misc]  # a class of a library without types
        def __call__(self, unfinished_sequences: torch.Tensor, tokens: torch.Tensor, length_so_far: int) -> bool:
            return length_so_far >= length

    with mock.patch.object(utils, "StopCheck", AtLength):
        yield
