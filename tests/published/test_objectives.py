"""Rewards, odds ratios and smoothed labels: the formula against the trace, and the trace against the libraries.

Kept bytes, parameters, gradients and optimizer states are the same to the byte, and so are the peaks of these models.

    PYTHONPATH=.:/path/to/trl python -m pytest tests/published/test_objectives.py
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
from collections import defaultdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from memplan.architectures.classifiers import SEQUENCE_CLASSIFIERS
from memplan.architectures.registry import read_architecture
from memplan.catalog.models import read_config
from memplan.errors import UsageError
from memplan.estimation.estimate import Estimator
from memplan.estimation.step import EVALUATION
from memplan.probes import preference
from memplan.probes.odds import Odds
from memplan.probes.preference import BETA
from memplan.probes.recorder import StorageRecorder
from memplan.probes.rewards import Rewards
from memplan.probes.smoothing import find_smoother
from memplan.probes.trace import trace_training
from memplan.probes.training import accepts_num_items
from memplan.specs.adapter import Lora
from memplan.specs.evaluation import Evaluation
from memplan.specs.training import Setup
from tests.published.test_adapters import LLAMA_LIKE
from tests.published.test_formula_equals_trace import CONFIG_BY_MODEL_TYPE, EAGER_ONLY, kernel_to_force
from tests.published.test_losses_of_libraries import Kernel, source_of
from tests.published.test_preference import LLAMA, QWEN, story
from tests.support.witnesses import compare, walked_to_the_peak

if TYPE_CHECKING:
    from collections.abc import Callable

GPT2 = {"model_type": "gpt2", "n_layer": 3, "n_head": 4, "n_embd": 128, "vocab_size": 9000, "n_positions": 1024}
CONFIGS = {"llama": LLAMA, "qwen2, tied": QWEN, "gpt2": GPT2}
CHOICES: dict[str, dict[str, Any]] = {
    "reward": {"objective": "reward", "dropout": 0.0},
    "orpo": {"objective": "orpo", "dropout": 0.0},
    "smoothed": {"label_smoothing": 0.1},
}
WITHOUT_ROUNDING = 1e-4
"""Of peaks: numbers of a few bytes that variables hold."""


def setup_of(name: str, **choices: Any) -> Setup:
    """One of the three, small."""
    return Setup(**{"micro_batch_size": 3, "seq_len": 128} | CHOICES[name] | choices)


def agree(config: dict[str, Any], setup: Setup, tolerance: float = WITHOUT_ROUNDING) -> None:
    """Both witnesses on one setup."""
    both = compare(config, setup, sdpa_kernel=kernel_to_force(config) if "layer_types" in config else None)
    assert both.formula == both.trace
    assert abs(both.peak_error) <= tolerance


# -- formula and trace -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast", "bf16-mixed"])
@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("name", CHOICES)
def test_the_formula_is_the_trace(name: str, model: str, precision: str, checkpointing: str) -> None:
    """GIVEN two micro-batches a step THEN both witnesses have the same bytes, kept and at the peak."""
    setup = setup_of(name, precision=precision, activation_checkpointing=checkpointing, gradient_accumulation_steps=2)
    agree(CONFIGS[model], setup)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("name", CHOICES)
def test_a_single_sequence_or_pair(name: str, model: str, precision: str) -> None:
    """Of one sequence ``contiguous()`` of a slice is no copy, and keeps the whole."""
    agree(CONFIGS[model], setup_of(name, micro_batch_size=1, precision=precision))
    agree(CONFIGS[model], setup_of(name, micro_batch_size=2, precision=precision))


@pytest.mark.parametrize("name", ["orpo", "smoothed"])
@pytest.mark.parametrize(("precision", "checkpointing"), list(product(["bf16", "bf16-mixed"], ["none", "full"])))
def test_adapters(name: str, precision: str, checkpointing: str) -> None:
    """The same law beside frozen weights; the ids of pairs are kept by no embedding then."""
    setup = setup_of(name, precision=precision, activation_checkpointing=checkpointing, lora=Lora(rank=8))
    agree(LLAMA, setup, tolerance=1e-3)


@pytest.mark.parametrize("name", CHOICES)
def test_padded_and_eager(name: str) -> None:
    """A mask beside the ids."""
    for attention in ("sdpa", "eager"):
        agree(LLAMA, setup_of(name, padding=True, attention=attention), tolerance=1e-2)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
@pytest.mark.parametrize("samples", [None, 15])
def test_an_evaluation_smooths_labels_too(precision: str, samples: int | None) -> None:
    """GIVEN smoothed labels THEN the loss of an evaluation is that of training, and it still returns its logits."""
    setup = setup_of("smoothed", precision=precision, evaluation=Evaluation(batch=4, samples=samples))
    formula = Estimator(read_architecture(LLAMA, "config"), "llama").peaks(setup).by_instant[EVALUATION]
    assert formula == trace_training(LLAMA, setup).phase_peaks()["evaluation"]


T5 = {"model_type": "t5", "vocab_size": 500, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
HEADS = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_attention_heads"), 4)
WHISPER = {"model_type": "whisper", "vocab_size": 500, "d_model": 64, "pad_token_id": 0, **HEADS}
WAV2VEC2 = {"model_type": "wav2vec2", "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1, **HEADS}


def test_an_encoder_decoder_is_given_the_ids_of_its_decoder(tmp_path: Path) -> None:
    """GIVEN smoothed labels THEN the loss is the Trainer's, and the trace has ids of the decoder among its inputs."""
    import transformers

    special = {"decoder_start_token_id": 0, "pad_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, **special)).eval()
    setup = setup_of("smoothed", seq_len=16)
    smoother = find_smoother(model, setup)
    assert smoother is not None
    ids = torch.arange(32).reshape(2, 16)
    inputs = smoother.inputs({"input_ids": ids, "labels": ids + 1})
    shifted = torch.cat([torch.zeros(2, 1, dtype=torch.int64), ids[:, :-1] + 1], dim=1)
    assert torch.equal(inputs["decoder_input_ids"], shifted)
    arguments = transformers.TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    expected = transformers.Trainer(model, arguments).compute_loss(model, dict(inputs))
    outputs = model(input_ids=ids, decoder_input_ids=inputs["decoder_input_ids"])
    assert torch.equal(smoother.loss(outputs, inputs["labels"], None), expected)

    trace = trace_training(T5 | special, setup)
    found = {event.op for event in trace.events if event.category == "input"}
    assert found == {"input_ids", "labels", "decoder_input_ids", "num_items_in_batch"} - (
        set() if accepts_num_items(model) else {"num_items_in_batch"}
    )


@pytest.mark.parametrize(("config", "said"), [(WHISPER, "needs labels for its decoder"), (WAV2VEC2, "without labels")])
def test_what_smoothing_leaves_without_labels_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        trace_training(config, setup_of("smoothed", micro_batch_size=1, seq_len=8))


@pytest.mark.parametrize("name", CHOICES)
def test_the_timeline_has_the_height_of_the_closed_form(name: str) -> None:
    """GIVEN two micro-steps THEN the events one by one reach the same peak, and leave nothing over."""
    setup = setup_of(name, precision="bf16-mixed", gradient_accumulation_steps=2)
    estimator = Estimator(read_architecture(LLAMA, "config"), "llama")
    program, sizes = estimator.program(setup), estimator.sizes(setup)
    walked_to_the_peak(program, sizes, 2)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(CONFIG_BY_MODEL_TYPE) - {"gemma3"}))
@pytest.mark.parametrize("name", CHOICES)
def test_every_family(name: str, model_type: str) -> None:
    """The same law for all language models; rewards for all that have such a head."""
    config = CONFIG_BY_MODEL_TYPE[model_type]
    attention = "eager" if model_type in EAGER_ONLY or name != "reward" else "sdpa"
    setup = setup_of(name, attention=attention, dropout=0.0)
    try:
        both = compare(config, setup, sdpa_kernel=kernel_to_force(config))
    except UsageError as refused:
        assert name != "reward" or model_type not in SEQUENCE_CLASSIFIERS
        assert "causal" in refused.cause or "not modelled" in refused.cause
        return
    assert both.formula == both.trace
    assert abs(both.peak_error) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("model_type", LLAMA_LIKE)
def test_adapters_of_families(model_type: str) -> None:
    """Odds of models with adapters."""
    agree(CONFIG_BY_MODEL_TYPE[model_type], setup_of("orpo", attention="eager", lora=Lora(rank=8)), tolerance=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("model", "size"), [("llama-3-8b", (1, 2048)), ("qwen2.5-1.5b", (4, 1024))])
def test_real_models_at_real_sizes(model: str, size: tuple[int, int], name: str) -> None:
    """All logits of a large vocabulary, in mixed precision and with checkpointing."""
    config, _ = read_config(model)
    for precision, checkpointing in (("bf16", "none"), ("bf16-mixed", "full")):
        choices = {"precision": precision, "activation_checkpointing": checkpointing}
        agree(config, setup_of(name, micro_batch_size=size[0], seq_len=size[1], **choices))


# -- the libraries' own source -----------------------------------------------------------------------------------------


def cpu_model(auto_class: str) -> Any:
    """A small Llama with numbers."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA | {"vocab_size": 500, "num_labels": 1, "pad_token_id": 0})
    return getattr(transformers, auto_class).from_config(config, dtype=torch.bfloat16).train()


def methods_of_trl(file: str, trainer: str, scope: dict[str, Any], **changes: str) -> None:
    """The methods of a trainer in TRL as functions, with CUDA's log-sigmoid."""
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("trl is not installed")
    path = Path(next(iter(found.submodule_search_locations))) / file
    if not path.exists():
        pytest.skip(f"this trl has no {file}")
    parts = [n for n in ast.parse(path.read_text()).body if getattr(n, "name", "") in {trainer, "log1mexp"}]
    kept: list[ast.stmt] = [n for n in parts if isinstance(n, ast.FunctionDef)]
    names = {"compute_loss", "get_batch_loss_metrics", "concatenated_forward", "concatenated_inputs"}
    names |= {"odds_ratio_loss", "get_batch_logps"}
    for node in parts:
        if isinstance(node, ast.ClassDef):
            kept += [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name in names]
    text = "\n".join(ast.unparse(node) for node in kept)
    text = text.replace("@staticmethod\n", "")
    for old, new in {"nn.functional.logsigmoid": "log_sigmoid", "F.logsigmoid": "log_sigmoid", **changes}.items():
        text = text.replace(old, new)
    scope |= {"torch": torch, "nn": torch.nn, "log_sigmoid": preference.log_sigmoid, "F": torch.nn.functional}
    exec(compile(f"from __future__ import annotations\n{text}", str(path), "exec"), scope)


def as_is(x: Any) -> Any:
    """One GPU gathers nothing."""
    return x


ACCELERATOR = SimpleNamespace(device="cpu", gather=as_is, gather_for_metrics=as_is)


def rewards_of_trl() -> Callable[..., Any]:
    """``RewardTrainer.compute_loss``."""
    scope: dict[str, Any] = {}
    methods_of_trl("trainer/reward_trainer.py", "RewardTrainer", scope)

    def loss(model: Any, given: dict[str, Any]) -> Any:
        trainer = SimpleNamespace(
            model=model,
            accelerator=ACCELERATOR,
            args=SimpleNamespace(center_rewards_coefficient=None),
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
        )
        return scope["compute_loss"](trainer, model, dict(given))

    return loss


def odds_of_trl() -> Callable[..., Any]:
    """``ORPOTrainer.get_batch_loss_metrics`` with the Triton kernel that it takes on CUDA."""
    scope: dict[str, Any] = {"_forward_kernel": Kernel(), "_backward_kernel": Kernel(), "_BLOCK_SIZE": 1024}
    scope |= {"torch": torch, "triton": SimpleNamespace(cdiv=lambda a, b: -(-a // b))}
    names = ("_layout", "_LogProbEntropyFunction", "selective_log_softmax_and_entropy")
    source_of("trl", "kernels/logprob_entropy.py", names, scope)
    scope |= {"_fused_logprob_entropy": scope["selective_log_softmax_and_entropy"], "is_triton_available": lambda: True}
    scope |= {"_supports_trl_loss_kernel": lambda *_: True, "is_torch_xla_available": lambda: False}
    source_of("trl", "trainer/utils.py", ("selective_log_softmax",), scope)
    source_of("trl", "experimental/utils.py", ("pad_to_length",), scope)
    methods_of_trl("experimental/orpo/orpo_trainer.py", "ORPOTrainer", scope)

    def loss(model: Any, given: dict[str, Any]) -> Any:
        trainer = SimpleNamespace(
            accelerator=ACCELERATOR, is_encoder_decoder=False, padding_value=0, aux_loss_enabled=False, beta=BETA
        )
        for name in ("concatenated_forward", "odds_ratio_loss"):
            setattr(trainer, name, scope[name].__get__(trainer))
        for name in ("concatenated_inputs", "get_batch_logps"):
            setattr(trainer, name, scope[name])
        return scope["get_batch_loss_metrics"](trainer, model, given)[0]

    return loss


@pytest.mark.parametrize(
    ("theirs", "objective", "auto_class", "name"),
    [
        (rewards_of_trl, Rewards, "AutoModelForSequenceClassification", "reward"),
        (odds_of_trl, Odds, "AutoModelForCausalLM", "orpo"),
    ],
    ids=["reward", "orpo"],
)
@pytest.mark.parametrize("pairs", [1, 3])
def test_the_trace_does_what_the_trainer_does(
    theirs: Any, objective: Any, auto_class: str, name: str, pairs: int
) -> None:
    """GIVEN the same model WHEN TRL's own loss and memplan's are taken THEN they have the same high points."""
    take = theirs()
    model = cpu_model(auto_class)
    other = copy.deepcopy(model)
    ours = objective(model, setup_of(name, micro_batch_size=pairs, seq_len=50))
    inputs = ours.make_inputs(pairs, 50)
    found = story(lambda given: ours.loss(given, contextlib.nullcontext), inputs, [model])
    said = story(lambda given: take(other, given), inputs, [other])
    assert found == said


# -- gradients that meet -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uses", "in_place"),
    [
        (lambda y: (y[:, :-1].exp(), y[:, 1:].sin()), True),
        (lambda y: (y.exp(), y.sin()), True),
        (lambda y: (y.view(-1, 8).exp(), y.view(-1, 8).sin()), False),
    ],
    ids=["slices", "the same", "views"],
)
def test_gradients_that_meet_are_added_in_place(uses: Any, in_place: bool) -> None:
    """GIVEN two uses of a tensor WHEN a mode looks on THEN their gradients meet as they do without it."""
    from torch.profiler import ProfilerActivity, profile

    def loss_of(device: str) -> Any:
        weight = torch.ones(8, 8, device=device, requires_grad=True)
        first, second = uses((torch.ones(4, 6, 8, device=device) * weight[0]).relu())
        return first.sum() + second.sum()

    loss = loss_of("cpu")
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        loss.backward()
    adds = [event.name for event in seen.events() if event.name in {"aten::add", "aten::add_"}]
    assert (adds == ["aten::add_"]) == in_place
    recorder = StorageRecorder({}, {}, has_padding=False, trust=())
    with recorder:
        loss = loss_of("meta")
        recorder.enter("backward", 0, 0)
        loss.backward()
    made = [event.op for event in recorder.events() if event.phase == "backward" and event.sign > 0]
    assert ("aten.add.Tensor" not in made) == in_place
