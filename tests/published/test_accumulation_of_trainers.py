"""The rows of `profiles/trainers/accumulation.toml` on transformers, checked against its Trainer: one real step of it.

A step of SGD with a learning rate of 1 moves every weight by its gradient.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("accelerate")

import memplan
from memplan.accumulation.losses import causal_lm_loss, count_next_tokens
from memplan.catalog.trainers import find_trainers
from tests.support.language_models import gradient, relative

pytestmark = pytest.mark.slow

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
SAME = 1e-5
"""Relative; the difference of weights of order 0.02 loses a digit of the gradient, which is of order 1."""


def make(model_type: str = "llama", **given: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **LLAMA, **given)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def samples(num: int) -> list[dict[str, Any]]:
    """Sequences of 12 tokens, the first n of which are a prompt, n from 0 to 10."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for n in range(num):
        ids = torch.randint(50, (12,), generator=generator)
        labels = ids.clone()
        labels[: (7 * n) % 11] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def step_of_trainer(model: Any, rows: list[dict[str, Any]], accumulation: int, folder: Any) -> tuple[Any, list[Any]]:
    """(the gradient of one step, the micro-batches in the order in which they came)."""
    before = torch.cat([one.detach().double().flatten() for one in model.parameters()])
    micro_batches = []

    def collate(some: list[dict[str, Any]]) -> dict[str, Any]:
        micro_batches.append({name: torch.stack([one[name] for one in some]) for name in some[0]})
        return dict(micro_batches[-1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=len(rows) // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
    after = torch.cat([one.detach().double().flatten() for one in model.parameters()])
    return (before - after).float(), micro_batches[:accumulation]


def test_the_trainer_weighs_tokens_alike(tmp_path: Any) -> None:
    """As memplan.accumulate does, and the mean over all tokens."""
    row = find_trainers()[0].row
    assert (row.trainer, row.tokens) == ("transformers Trainer", "same")
    found, micro_batches = step_of_trainer(make(), samples(8), 4, tmp_path)
    model = make()
    memplan.accumulate(model, micro_batches)
    assert relative(found, gradient(model)) < SAME
    model.zero_grad()
    for one in micro_batches:
        (model(**one).loss / 4).backward()
    assert relative(found, gradient(model)) > 0.05


def test_the_trainer_averages_micro_batches_of_models_that_take_no_keywords(tmp_path: Any) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()

        def forward(self, input_ids: Any, labels: Any) -> dict[str, Any]:
            return {"loss": self.inner(input_ids=input_ids, labels=labels).loss}

    found, micro_batches = step_of_trainer(Plain(), samples(8), 4, tmp_path)
    model = make()
    for one in micro_batches:
        (model(**one).loss / 4).backward()
    assert relative(found, gradient(model)) < SAME


MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}


def test_the_trainer_adds_the_balance_loss_of_every_micro_batch(tmp_path: Any) -> None:
    """K times as strong as in one batch: the model adds it to a loss that is not divided by K any more."""
    found, micro_batches = step_of_trainer(make("mixtral", **MIXTURE), samples(8), 4, tmp_path)
    total = sum(int(count_next_tokens(one)) for one in micro_batches)

    def expected(share: float) -> Any:
        model = make("mixtral", **MIXTURE)
        for one in micro_batches:
            output = model(**one)
            own = output.loss - 0.5 * output.aux_loss
            (own * int(count_next_tokens(one)) / total + share * 0.5 * output.aux_loss).backward()
        return gradient(model)

    assert relative(found, expected(1.0)) < SAME
    assert relative(found, expected(1 / 4)) > 100 * SAME


def test_the_loss_of_memplan_is_that_of_transformers() -> None:
    """Of a decoder and of a mixture with its balance loss, on one micro-batch."""
    batch = {name: torch.stack([one[name] for one in samples(4)]) for name in ("input_ids", "labels")}
    for model in (make(), make("mixtral", **MIXTURE)):
        total, num = causal_lm_loss(model, batch)
        assert float((total / num).detach()) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-6)
