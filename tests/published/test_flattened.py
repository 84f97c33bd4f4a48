"""Sequences end to end in one row: what transformers 5.23 does with them, and what they take, formula against trace."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening
from transformers.masking_utils import find_packed_sequence_indices

from memplan.architectures.flattened import CODE_OF_THEIR_OWN, MASKED_BY_PLACE
from memplan.architectures.registry import read_architecture
from memplan.errors import UsageError
from memplan.estimation.dimensions import dimensions
from memplan.estimation.estimate import Estimator
from memplan.estimation.step import EVALUATION, Recordings
from memplan.memory.events import Sizes
from memplan.probes.inputs import flattened, token_inputs
from memplan.probes.trace import trace_training
from memplan.specs.adapter import Lora
from memplan.specs.evaluation import Evaluation
from memplan.specs.training import Setup
from memplan.specs.values import replace
from tests.published.test_formula_equals_trace import CONFIG_BY_MODEL_TYPE, EAGER_ONLY

PADDING_FREE = Setup(micro_batch_size=3, seq_len=43, batching="padding-free")
PACKED = Setup(micro_batch_size=2, seq_len=64, batching="packed", packed_sequences=5)
ALONE = Setup(micro_batch_size=1, seq_len=128, batching="padding-free")

CAUSAL = sorted(
    model_type
    for model_type, config in CONFIG_BY_MODEL_TYPE.items()
    if read_architecture(config, "config").task == "causal-lm"
)
FAMILIES = [name for name in CAUSAL if name not in MASKED_BY_PLACE | CODE_OF_THEIR_OWN]

PEAK_TOLERANCE = 1e-4
"""Where mixtures of experts and autocast differ in a few bytes; all others agree exactly."""


# -- what transformers does --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setup", [PADDING_FREE, PACKED, ALONE], ids=["padding-free", "packed", "alone"])
def test_inputs_are_those_of_the_collator(setup: Setup) -> None:
    """WHEN transformers' collator flattens as many sequences THEN names, shapes, dtypes and places are the same."""
    made = flattened(token_inputs(100), setup)
    ends = made["cu_seq_lens_q"].tolist()
    ids = made["input_ids"][0].tolist()
    samples = [{"input_ids": ids[a:b]} for a, b in pairwise(ends)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(samples)
    assert {name: _what(x) for name, x in made.items()} == {name: _what(x) for name, x in batch.items()}
    for name in ("position_ids", "seq_idx", "cu_seq_lens_k", "max_length_q"):
        assert torch.equal(torch.as_tensor(made[name]), torch.as_tensor(batch[name]))
    assert torch.equal(made["labels"] == -100, batch["labels"] == -100)
    assert len(samples) == setup.num_sequences
    assert made["input_ids"].shape == (1, setup.tokens_per_micro_batch)


def _what(x: Any) -> Any:
    return (tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("setup", [PADDING_FREE, PACKED, ALONE], ids=["padding-free", "packed", "alone"])
def test_what_a_trace_answers_is_what_numbers_say(setup: Setup) -> None:
    """GIVEN real position ids WHEN transformers looks for sequences THEN it finds several as the setup says."""
    position_ids = flattened(token_inputs(100), setup)["position_ids"]
    found = find_packed_sequence_indices(position_ids)
    assert (found is not None) == setup.has_several_in_a_row
    if found is not None:
        assert int(found[0, -1]) + 1 == setup.num_sequences


@pytest.mark.parametrize("model_type", CAUSAL)
def test_who_keeps_sequences_apart(model_type: str) -> None:
    """WHEN the first sequence changes THEN the logits of the second do so in the models that are refused, only."""
    with torch.device("cpu"):
        torch.manual_seed(0)
        transformers.logging.set_verbosity_error()
        config = AutoConfig.for_model(**CONFIG_BY_MODEL_TYPE[model_type])
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
        middle = config.get_text_config().vocab_size // 2
        ids = torch.randint(middle, (1, 12))
        other = torch.cat([ids[:, :6] + middle, ids[:, 6:]], dim=1)
        places = torch.arange(6).repeat(2)[None]
        with torch.no_grad():
            logits = [model(input_ids=x, position_ids=places, use_cache=False).logits[:, 6:] for x in (ids, other)]
    changed = not torch.allclose(*logits, atol=1e-5)
    assert changed == (model_type in MASKED_BY_PLACE)


# -- formula and trace -------------------------------------------------------------------------------------------------


def compare(config: dict[str, Any], setup: Setup, tolerance: float = PEAK_TOLERANCE) -> None:
    """Kept bytes agree exactly, peaks nearly so."""
    estimator = Estimator(read_architecture(config, "config"), "it")
    estimator.check(setup)
    formula, trace = estimator.peaks(setup), trace_training(config, setup)
    assert formula.kept_activation_bytes == trace.kept_activation_bytes
    assert formula.kept_activation_bytes_per_layer == trace.kept_activation_bytes_per_layer
    assert formula.peak == pytest.approx(trace.peak_allocated_bytes, rel=tolerance)


CASES = [
    (model_type, attention, precision, checkpointing)
    for model_type in FAMILIES
    for attention, (precision, checkpointing) in product(
        ("flash", "sdpa", "eager"), (("bf16", "none"), ("bf16-mixed", "full"))
    )
    if (attention == "eager" or model_type not in EAGER_ONLY)
]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "attention", "precision", "checkpointing"), CASES, ids=str)
def test_every_family(model_type: str, attention: str, precision: str, checkpointing: str) -> None:
    config = CONFIG_BY_MODEL_TYPE[model_type]
    for setup in (PADDING_FREE, PACKED):
        chosen = replace(setup, attention=attention, precision=precision, activation_checkpointing=checkpointing)
        compare(config, chosen)


LLAMA = CONFIG_BY_MODEL_TYPE["llama"]


@pytest.mark.parametrize("attention", ["flash", "sdpa", "eager"])
@pytest.mark.parametrize("setup", [PADDING_FREE, PACKED, ALONE], ids=["padding-free", "packed", "alone"])
def test_llama(setup: Setup, attention: str) -> None:
    compare(LLAMA, replace(setup, attention=attention), 0.0)


def test_a_window() -> None:
    """Mistral's window of fewer tokens than a single sequence has makes a mask; flash attention needs none."""
    for setup in (ALONE, replace(PADDING_FREE, seq_len=200)):
        for attention in ("flash", "sdpa"):
            compare(CONFIG_BY_MODEL_TYPE["mistral"] | {"sliding_window": 64}, replace(setup, attention=attention), 0.0)


OF_LOSSES = 1e-3
"""As in test_losses_equal_trace.py, where rows differ by the same bytes."""


@pytest.mark.parametrize("loss", ["full-kept", "chunked", "tiled", "fused", "cut"])
@pytest.mark.parametrize("supervised", [1.0, 0.3])
def test_losses(loss: str, supervised: float) -> None:
    """The first token of each sequence is nobody's next one: losses that leave tokens out leave these out, too."""
    for setup in (replace(PADDING_FREE, seq_len=300), replace(PACKED, seq_len=512)):
        compare(LLAMA, replace(setup, attention="flash", loss=loss, supervised=supervised), OF_LOSSES)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3},
        {"precision": "fp32", "attention": "eager"},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "full", "optimizer": "adamw-fused"},
        {"lora": Lora(rank=8), "activation_checkpointing": "full"},
        {"dropout": 0.1},
    ],
    ids=str,
)
def test_other_choices(changes: dict[str, Any]) -> None:
    for setup in (PADDING_FREE, PACKED):
        compare(LLAMA, replace(setup, **({"attention": "flash"} | changes)))


@pytest.mark.parametrize("attention", ["flash", "sdpa"])
def test_evaluation(attention: str) -> None:
    """Its batches are flattened, too."""
    setup = replace(PADDING_FREE, attention=attention, evaluation=Evaluation(batch=8))
    formula = Estimator(read_architecture(LLAMA, "config"), "it").peaks(setup)
    peak = max(live for live, phase in _live(trace_training(LLAMA, setup)) if phase == "evaluation")
    assert formula.by_instant[EVALUATION] == pytest.approx(peak, rel=PEAK_TOLERANCE)


def _live(trace: Any) -> Any:
    live = 0
    for event in trace.events:
        live += event.sign * (-(-event.num_bytes // 512) * 512)
        yield live, event.phase


# -- against rows ------------------------------------------------------------------------------------------------------


def kept(setup: Setup) -> int:
    """Bytes kept by Llama."""
    program = Recordings(read_architecture(LLAMA, "config")).program(setup)
    return int(program.peaks(Sizes(dimensions(setup)), 1).kept_activation_bytes)


def test_what_one_row_keeps_more_than_many() -> None:
    """With flash attention: rotary tables for every token, and padded labels less; nothing else."""
    one = Setup(micro_batch_size=4, seq_len=512, batching="padding-free", attention="flash")
    many = replace(one, batching="rows")
    head_dim = LLAMA["hidden_size"] // LLAMA["num_attention_heads"]
    tables = 2 * (4 - 1) * 512 * head_dim * 2
    labels = -(-(4 * 512 + 1) * 8 // 512) * 512 - 4 * 512 * 8
    assert kept(one) - kept(many) == tables + labels


@pytest.mark.parametrize("model_type", [*sorted(MASKED_BY_PLACE), *sorted(CODE_OF_THEIR_OWN), "bert", "roberta"])
def test_refused(model_type: str) -> None:
    """GIVEN a model that would mix sequences up WHEN they are to lie in one row THEN it is refused by name."""
    config = CONFIG_BY_MODEL_TYPE.get(model_type) or LLAMA | {"model_type": model_type}
    estimator = Estimator(read_architecture(config, "config"), model_type)
    for setup in (PADDING_FREE, PACKED):
        with pytest.raises(UsageError, match=model_type):
            estimator.check(replace(setup, attention="eager"))
