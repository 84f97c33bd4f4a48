"""An evaluation between the steps: formula against the trace of the real modules, and against the real Trainer."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from memplan.allocator.replay import replay
from memplan.architectures.registry import read_architecture
from memplan.catalog.models import read_config
from memplan.estimation.estimate import Estimator
from memplan.estimation.replaying import replay as replay_program
from memplan.estimation.step import EVALUATION
from memplan.probes.evaluation import kept_outputs
from memplan.probes.recorder import StorageRecorder
from memplan.probes.trace import trace_training
from memplan.specs.adapter import Lora
from memplan.specs.evaluation import Evaluation
from memplan.specs.training import LOSSES, WITHOUT_LOGITS, Setup
from memplan.specs.values import replace
from tests.laws.models import GPT2, LLAMA, QWEN2
from tests.published.test_formula_equals_trace import CONFIG_BY_MODEL_TYPE, EAGER_ONLY

pytestmark = pytest.mark.slow

WORDS, LENGTH = 1000, 128
BERT = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"} | {
    "model_type": "bert",
    "max_position_embeddings": 256,
    "type_vocab_size": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2, tied": QWEN2,
    "gpt2, dropout": GPT2,
    "bert, dropout": BERT,
}
EVALUATIONS = {
    "the loss alone": Evaluation(),
    "one by one": Evaluation(batch=1),
    "logits kept": Evaluation(batch=4, samples=15),
    "moved every second batch": Evaluation(batch=4, samples=23, accumulation=2),
    "moved after every batch": Evaluation(batch=4, samples=12, accumulation=1),
}
LORA = Lora(rank=8, dropout=0.1)


def both(config: dict[str, Any], setup: Setup, *, grouped: bool = False, instant: str = EVALUATION) -> tuple[int, int]:
    """Allocated bytes by the formula and by the trace; `grouped`: fp32 has no fused kernel for it on CUDA."""
    formula = Estimator(read_architecture(config, "config"), "config").peaks(setup).by_instant[instant]
    force = grouped and setup.precision == "fp32" and setup.attention == "sdpa"
    trace = trace_training(config, setup, sdpa_kernel="flash" if force else None)
    return formula, trace.phase_peaks()[instant]


@pytest.mark.parametrize(
    ("model", "precision", "attention", "evaluation", "lora"),
    [
        *product(CONFIGS, ("bf16", "bf16-mixed", "fp32"), ("sdpa", "eager"), EVALUATIONS, (None,)),
        *product(CONFIGS, ("bf16", "bf16-mixed"), ("sdpa",), ("the loss alone", "logits kept"), (LORA,)),
    ],
    ids=lambda value: "lora" if isinstance(value, Lora) else str(value),
)
def test_the_formula_is_the_trace_to_the_byte(
    model: str, precision: str, attention: str, evaluation: str, lora: Lora | None
) -> None:
    setup = Setup(
        micro_batch_size=2,
        seq_len=LENGTH,
        precision=precision,
        attention=attention,
        lora=lora,
        evaluation=EVALUATIONS[evaluation],
    )
    formula, trace = both(CONFIGS[model], setup, grouped=model == "llama")
    assert formula == trace


FAMILIES = [
    (model_type, attention)
    for model_type, attention in product(CONFIG_BY_MODEL_TYPE, ("sdpa", "eager"))
    if attention == "eager" or model_type not in EAGER_ONLY
]


@pytest.mark.parametrize(("model_type", "attention"), FAMILIES)
def test_every_family(model_type: str, attention: str) -> None:
    """Equal to the byte, but for a key-value cache (Gemma 3), which is named in the answer."""
    setup = Setup(micro_batch_size=2, seq_len=LENGTH, attention=attention, evaluation=Evaluation())
    formula, trace = both(CONFIG_BY_MODEL_TYPE[model_type], setup)
    assert (formula == trace) != (model_type == "gemma3"), "mended, if it is equal: take it out of what is named"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapters"])
def test_every_loss(loss: str, lora: Lora | None) -> None:
    """Chunked and tiled count a handful of numbers a token differently: 4 KiB of 7 and of 70 MB."""
    setup = Setup(micro_batch_size=2, seq_len=LENGTH, loss=loss, lora=lora, evaluation=Evaluation())
    formula, trace = both(LLAMA, setup)
    assert formula == pytest.approx(trace, rel=1e-3 if loss in {"chunked", "tiled"} else 0)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss not in WITHOUT_LOGITS])
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_every_loss_that_hands_out_logits(loss: str, precision: str) -> None:
    """Liger's model computes all logits, and its own loss of them, in evaluation mode."""
    kept = EVALUATIONS["logits kept"]
    setup = Setup(micro_batch_size=2, seq_len=LENGTH, loss=loss, precision=precision, evaluation=kept)
    formula, trace = both(LLAMA, setup)
    assert formula == trace


@pytest.mark.parametrize(
    ("model", "setup"),
    [
        ("llama-3-8b", Setup(seq_len=2048)),
        ("qwen2.5-1.5b", Setup(seq_len=2048, precision="bf16-mixed")),
        ("gpt2", Setup(seq_len=1024, attention="eager", precision="fp32")),
        ("bert-large", Setup(seq_len=512, precision="bf16-mixed")),
        ("gemma-2-9b", Setup(seq_len=2048, attention="eager", activation_checkpointing="full")),
        ("mixtral-8x7b", Setup(seq_len=2048, optimizer="sgd", gradient_accumulation_steps=3)),
        ("deepseek-v2-lite", Setup(seq_len=2048)),
        ("modernbert-base", Setup(seq_len=2048)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_real_models_at_real_sizes(model: str, setup: Setup) -> None:
    formula, trace = both(read_config(model)[0], Setup(**{**vars(setup), "evaluation": Evaluation()}))
    assert formula == trace


# -- through the allocator ---------------------------------------------------------------------------------------------


OFF_IN_THE_STEP = {
    ("gpt2", "bf16-mixed", "one by one"),
    ("bert-base", "bf16-mixed", "one by one"),
    *(("gpt2", "bf16", name) for name in EVALUATIONS if name != "logits kept"),
}
"""Where the step alone reserves 1 to 5 % more by the formula than by the trace, which an evaluation does not cover."""


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize(
    ("model", "precision", "attention"),
    [
        ("gpt2", "bf16-mixed", "sdpa"),
        ("gpt2", "bf16", "eager"),
        ("qwen2.5-0.5b", "bf16", "sdpa"),
        ("bert-base", "bf16-mixed", "sdpa"),
    ],
)
def test_reserved_bytes(
    request: pytest.FixtureRequest, model: str, precision: str, attention: str, evaluation: str
) -> None:
    """A step and an evaluation through the allocator: the formula's events against those of the real module.

    One per cent, and a segment of 20 MiB: events a few places earlier or later find other blocks free.
    """
    if (model, precision, evaluation) in OFF_IN_THE_STEP:
        request.applymarker(pytest.mark.xfail(strict=True, reason="the step's own reserved bytes are off"))
    config = read_config(model)[0]
    chosen = EVALUATIONS[evaluation]
    setup = Setup(seq_len=512, precision=precision, attention=attention, evaluation=chosen)
    of = Estimator(read_architecture(config, model), model)
    formula = replay_program(of.program(setup), of.sizes(setup), 1, evaluation=of.evaluation(setup, chosen))
    events = trace_training(config, setup).events
    trace = replay([(event.key, event.num_bytes, event.sign) for event in events])
    assert formula.reserved_bytes == pytest.approx(trace.peak_reserved_bytes, rel=0.01, abs=20 * 2**20)
    assert formula.allocated_bytes == pytest.approx(trace.peak_allocated_bytes, rel=0.01)


def test_reserved_bytes_without_an_evaluation_are_less() -> None:
    """What the cache holds when an evaluation begins does not fit its larger tensors."""
    of = Estimator(read_architecture(read_config("gpt2")[0], "gpt2"), "gpt2")
    setup = Setup(seq_len=512)
    with_evaluation = replace(setup, evaluation=Evaluation())
    plain, evaluated = of.replayed_memory(setup), of.replayed_memory(with_evaluation)
    assert evaluated.peak_reserved_bytes > plain.peak_reserved_bytes
    assert evaluated.peak_reserved_bytes > evaluated.peak_allocated_bytes + 2**20


# -- the real Trainer --------------------------------------------------------------------------------------------------


class _Sequences(torch.utils.data.Dataset):
    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(LENGTH) + i) % WORDS
        return {"input_ids": ids, "labels": ids}


def _highest_of_logits(evaluation: Evaluation, directory: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of all tensors as wide as the vocabulary while the Trainer evaluates; what moves to the host is copied."""
    import transformers
    from transformers import trainer_pt_utils

    monkeypatch.setattr(trainer_pt_utils, "nested_numpify", lambda tensors: np.array(tensors.numpy()))
    config = transformers.AutoConfig.for_model(**LLAMA)
    trainer = transformers.Trainer(
        transformers.AutoModelForCausalLM.from_config(config),
        transformers.TrainingArguments(
            output_dir=directory,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            per_device_eval_batch_size=evaluation.batch,
            eval_accumulation_steps=evaluation.accumulation,
        ),
        eval_dataset=_Sequences(evaluation.samples or 16),
        compute_metrics=(lambda _: {}) if evaluation.samples else None,
    )
    recorder = StorageRecorder({}, {}, has_padding=False, trust=("transformers",), device="cpu")
    with recorder:
        for name, parameter in trainer.model.named_parameters():
            recorder.label(parameter, "parameter", name, "parameter")
        trainer.evaluate()
    live = highest = 0
    for event in recorder.events():
        if len(event.shape) > 1 and event.shape[-1] == WORDS:
            live += event.sign * event.num_bytes
            highest = max(highest, live)
    return highest


@pytest.mark.parametrize(
    ("evaluation", "sequences"),
    [
        (Evaluation(batch=4, samples=23), 2 * 23),
        (Evaluation(batch=4, samples=24), 2 * 24),
        (Evaluation(batch=4, samples=23, accumulation=2), 2 * 8),
        (Evaluation(batch=4, samples=23, accumulation=3), 2 * 12),
        (Evaluation(batch=4), 2 * 4),
    ],
    ids=str,
)
def test_the_trainer_concatenates(
    evaluation: Evaluation, sequences: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits kept are there twice when they are concatenated; else those of a batch, and their log-softmax."""
    found = _highest_of_logits(evaluation, str(tmp_path), monkeypatch)
    assert found == sequences * LENGTH * WORDS * 4


def test_an_encoder_decoder_keeps_the_states_of_its_encoder(tmp_path: Any) -> None:
    """All outputs but the loss are what the Trainer calls logits."""
    import transformers

    config = transformers.T5Config(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    config.decoder_start_token_id, config.use_cache = 0, False
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.arange(2 * LENGTH).reshape(2, LENGTH)
    inputs = {"input_ids": ids, "labels": ids}
    arguments = transformers.TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to=[])
    _, expected, _ = transformers.Trainer(model, arguments).prediction_step(model, dict(inputs), False)
    found = kept_outputs(model, model(**inputs))
    assert [x.shape for x in found] == [x.shape for x in expected] == [(2, LENGTH, WORDS), (2, LENGTH, 32)]
