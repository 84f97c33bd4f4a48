"""Preference optimisation: the formula against the trace, and the trace against DPOTrainer's own source.

Kept bytes, parameters (a reference model's among them), gradients and optimizer states are the same to the byte; the
peaks, and the high point of the forward pass, in which the reference runs, too, within a thousandth: what is left out
are Python variables that hold a number a token.

    PYTHONPATH=.:/path/to/trl python -m pytest tests/published/test_preference.py
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
import warnings
from collections import defaultdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from memplan.architectures.registry import read_architecture
from memplan.catalog.models import read_config
from memplan.errors import UsageError
from memplan.estimation.estimate import Estimator
from memplan.estimation.step import Recordings
from memplan.memory.events import Sizes
from memplan.operators.sizes import bind
from memplan.probes import losses, preference
from memplan.probes.heads import head_of
from memplan.probes.losses import Head
from memplan.probes.preference import REPORTED, Preference, add_fused_head
from memplan.probes.recorder import StorageRecorder
from memplan.probes.trace import trace_training
from memplan.specs.adapter import Lora
from memplan.specs.training import Setup
from tests.published.test_adapters import LLAMA_LIKE
from tests.published.test_formula_equals_trace import CONFIG_BY_MODEL_TYPE, kernel_to_force
from tests.published.test_losses_of_libraries import Kernel, source_of
from tests.support.witnesses import compare, walked_to_the_peak

if TYPE_CHECKING:
    from memplan.probes.events import Trace

TOLERANCE = 1e-3
"""Of peaks."""

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "hidden_size": 128,
    "vocab_size": 9000,
    "max_position_embeddings": 4096,
}
QWEN = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}
ADAPTERS = {"full": None, "LoRA": Lora(rank=8)}


def setup_of(objective: str, **choices: Any) -> Setup:
    """A setup of pairs."""
    return Setup(**{"micro_batch_size": 2, "seq_len": 256, "loss": "tiled", "objective": objective, **choices})


# -- formula and trace -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["dpo", "dpo-precomputed"])
@pytest.mark.parametrize("trained", ADAPTERS)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast", "bf16-mixed"])
@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen2 tied"])
def test_the_formula_is_the_trace(
    config: dict[str, Any], precision: str, checkpointing: str, trained: str, objective: str
) -> None:
    """GIVEN pairs of sequences WHEN policy and reference run THEN formula and trace have the same bytes."""
    setup = setup_of(objective, precision=precision, activation_checkpointing=checkpointing, lora=ADAPTERS[trained])
    both = compare(config, setup)
    assert both.formula == both.trace
    assert abs(both.peak_error) <= TOLERANCE


def forward_heights(config: dict[str, Any], setup: Setup) -> tuple[int, int]:
    """The high point of the forward pass of the last step: by the formula, by the trace."""
    program = Recordings(read_architecture(config, "config")).program(setup)
    sizes = Sizes(bind(setup.sequences_per_micro_batch, setup.seq_len, setup.supervised))
    live = sum(tensors.total(sizes) for tensors in program.resident(1, with_states=True))
    highest = live
    for part in program.forward:
        run = sizes.extent(part.segment).repeated(len(part.places))
        highest, live = max(highest, live + run.peak), live + run.net
    return highest, _height(trace_training(config, setup), "forward")


def _height(trace: Trace, phase: str) -> int:
    last = max(event.step for event in trace.events)
    heights = zip(trace.events, trace.levels, strict=True)
    return max(level for event, level in heights if event.step == last and event.phase == phase)


@pytest.mark.parametrize(
    ("config", "precision", "checkpointing", "trained", "size"),
    list(product([LLAMA, QWEN], ["bf16", "bf16-mixed"], ["none", "full"], ADAPTERS, [(1, 700), (16, 64)])),
    ids=str,
)
def test_the_reference_runs_on_top_of_what_the_policy_keeps(
    config: dict[str, Any], precision: str, checkpointing: str, trained: str, size: tuple[int, int]
) -> None:
    """A tenth of the tokens has a label: both agree on the high point of the forward pass, the reference's."""
    setup = setup_of(
        "dpo",
        micro_batch_size=size[0],
        seq_len=size[1],
        supervised=0.1,
        precision=precision,
        activation_checkpointing=checkpointing,
        lora=ADAPTERS[trained],
    )
    formula, trace = forward_heights(config, setup)
    assert formula == pytest.approx(trace, rel=TOLERANCE)


@pytest.mark.parametrize("quantize", ["nf4", "nf4-double"])
def test_qlora(quantize: str) -> None:
    """The reference of a quantised model is the same one without its adapters."""
    pytest.importorskip("bitsandbytes")
    for checkpointing in ("none", "full"):
        lora = Lora(rank=8, dtype="base")
        both = compare(LLAMA, setup_of("dpo", lora=lora, quantize=quantize, activation_checkpointing=checkpointing))
        assert both.formula == both.trace
        assert abs(both.peak_error) <= TOLERANCE


@pytest.mark.parametrize("trained", ADAPTERS)
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_reentrant_checkpointing_comes_back_after_the_reference(
    precision: str, trained: str, accumulation: int
) -> None:
    """GIVEN use_reentrant=True WHEN the reference has run THEN the policy is checkpointed as it was before."""
    setup = setup_of(
        "dpo",
        precision=precision,
        activation_checkpointing="full",
        reentrant=True,
        gradient_accumulation_steps=accumulation,
        lora=ADAPTERS[trained],
    )
    both = compare(LLAMA, setup)
    assert both.formula == both.trace
    assert abs(both.peak_error) <= TOLERANCE


@pytest.mark.parametrize("trained", ADAPTERS)
@pytest.mark.parametrize("choices", [{"offload": "activations"}, {"activation_checkpointing": "every-2"}], ids=str)
def test_what_does_not_come_back_after_the_reference(choices: dict[str, Any], trained: str) -> None:
    """Offloading and every-N get lost with a reference, and are the same as ever where there is none."""
    choices = {"activation_checkpointing": "full", "lora": ADAPTERS[trained], **choices}
    with pytest.raises(UsageError, match="after the reference"):
        setup_of("dpo", **choices)
    both = compare(LLAMA, setup_of("dpo-precomputed", **choices))
    assert both.formula == both.trace
    assert abs(both.peak_error) <= TOLERANCE


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("lost", [{"offload": True}, {"every_n_layers": 2}], ids=str)
def test_why_it_does_not_come_back(lost: dict[str, Any], reentrant: bool) -> None:
    """What TRL's ``disable_gradient_checkpointing`` does to a model: all arguments go to torch.utils.checkpoint."""
    model = cpu_model(adapters=False)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    model.activation_checkpointing_enable({"use_reentrant": reentrant}, every_n_layers=lost.get("every_n_layers", 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_disable()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant, **lost})
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    with contextlib.ExitStack() as stack:
        if reentrant:
            stack.enter_context(pytest.raises(ValueError, match="Unexpected keyword arguments"))
        stack.enter_context(mock.patch("transformers.modeling_utils.save_on_cpu", side_effect=AssertionError))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


FAMILIES = [
    *((model_type, "full") for model_type in sorted(set(CONFIG_BY_MODEL_TYPE) - {"gemma3"})),
    *((model_type, "LoRA") for model_type in LLAMA_LIKE),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "trained"), FAMILIES)
def test_every_family(model_type: str, trained: str) -> None:
    """The same law for all language models; peft's adapters of experts and images are left to other tests."""
    config = CONFIG_BY_MODEL_TYPE[model_type]
    setup = setup_of("dpo", seq_len=128, attention="eager", lora=ADAPTERS[trained], dropout=0.0)
    try:
        both = compare(config, setup, sdpa_kernel=kernel_to_force(config))
    except UsageError as refused:
        assert "causal" in refused.cause
        return
    assert both.formula == both.trace
    assert abs(both.peak_error) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("trained", ADAPTERS)
@pytest.mark.parametrize(("model", "size"), [("llama-3-8b", (1, 2048)), ("qwen2.5-1.5b", (4, 1024))])
def test_real_models_at_real_sizes(model: str, size: tuple[int, int], trained: str) -> None:
    config, _ = read_config(model)
    setup = setup_of("dpo", micro_batch_size=size[0], seq_len=size[1], lora=ADAPTERS[trained])
    both = compare(config, setup)
    assert both.formula == both.trace
    assert abs(both.peak_error) <= TOLERANCE


@pytest.mark.parametrize("trained", ADAPTERS)
def test_the_timeline_has_the_height_of_the_closed_form(trained: str) -> None:
    """GIVEN two micro-steps with a reference THEN the events one by one reach the same peak, and leave nothing over."""
    setup = setup_of("dpo", gradient_accumulation_steps=2, lora=ADAPTERS[trained])
    estimator = Estimator(read_architecture(LLAMA, "config"), "llama")
    program, sizes = estimator.program(setup), estimator.sizes(setup)
    highest = walked_to_the_peak(program, sizes, 2)
    found = estimator.estimate(setup)
    at_peak = sum(row.bytes_at_peak for row in found.ledger if row.kind not in {"allocator", "workspace", "context"})
    assert at_peak == highest == found.memory.peak_allocated_bytes


# -- TRL's own source --------------------------------------------------------------------------------------------------


def trl_scope() -> dict[str, Any]:
    """Names in TRL's source, with kernels that do nothing and without what a card would be asked."""
    scope: dict[str, Any] = {"torch": torch, "math": __import__("math"), "_use_triton": lambda _: True}
    scope |= {name: Kernel() for name in ("_forward_kernel", "_backward_kernel")}
    scope |= {"TOKEN_CHUNK_SIZE": 4096, "_BLOCK_SIZE": 1024, "_CHUNKED_LOGPROB_CHUNK_SIZE": 32768}
    scope |= {"OPTIONAL_OUTPUTS": ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")}
    scope |= {"triton": SimpleNamespace(cdiv=lambda a, b: -(-a // b)), "_addmm_fp32": lambda *_: None}
    source_of(
        "trl",
        "kernels/chunked_logprob.py",
        ("ChunkedLogProbFunction",),
        scope,
        **{"from ..trainer.utils import maybe_gather_lm_head_ctx": "import contextlib"},
        **{"maybe_gather_lm_head_ctx(weight, bias)": "contextlib.nullcontext()"},
    )
    scope |= {name: __import__(name) for name in ("functools", "types", "transformers", "contextlib")}
    scope |= vars(__import__("dataclasses")) | vars(__import__("transformers.utils", fromlist=["ModelOutput"]))
    scope |= {"Version": __import__("packaging.version", fromlist=["Version"]).Version, "DTensor": ()}
    scope |= {"_ChunkedLogProbFunction": scope["ChunkedLogProbFunction"], "nullcontext": contextlib.nullcontext}
    scope |= {"maybe_gather_lm_head_ctx": lambda *_: contextlib.nullcontext()}
    scope |= {"masked": lambda x, mask: losses._masked(x, mask, Head(None, None, None, False, None))}  # type: ignore[arg-type]
    source_of(
        "trl",
        "trainer/utils.py",
        ("FusedCausalLMOutput", "add_fused_lm_head"),
        scope,
        **{"hidden_states[mask]": "masked(hidden_states, mask)", "labels[mask]": "masked(labels, mask)"},
    )
    return scope


def compute_loss_of_trl() -> Any:
    """``DPOTrainer._compute_loss``, with CUDA's log-sigmoid."""
    scope = trl_scope()
    found = importlib.util.find_spec("trl")
    assert found is not None
    assert found.submodule_search_locations
    path = Path(next(iter(found.submodule_search_locations))) / "trainer/dpo_trainer.py"
    trainer = next(n for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == "DPOTrainer")
    assert isinstance(trainer, ast.ClassDef)
    method = next(n for n in trainer.body if getattr(n, "name", "") == "_compute_loss")
    text = ast.unparse(method).replace("F.logsigmoid", "log_sigmoid")
    scope |= {"is_peft_model": lambda model: hasattr(model, "peft_config"), "log_sigmoid": preference.log_sigmoid}
    scope |= {"disable_gradient_checkpointing": lambda *_: contextlib.nullcontext(), "use_adapter": without_adapters}
    exec(compile(f"from __future__ import annotations\n{text}", str(path), "exec"), scope)
    return scope


def without_adapters(model: Any, adapter_name: str | None) -> Any:
    """TRL's ``use_adapter(model, None)``."""
    assert adapter_name is None
    return model.disable_adapter()


def cpu_model(*, adapters: bool) -> Any:
    """A small Llama with numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA | {"vocab_size": 500})
    model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    if not adapters:
        return model
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))


def story(take: Any, inputs: dict[str, Any], models: list[Any]) -> dict[str, int]:
    """Bytes at the high points of a forward and a backward pass, and at their ends."""
    recorder = StorageRecorder({}, {}, has_padding=False, trust=("transformers",), device="cpu")
    with recorder:
        for given in (*inputs.values(), *(p for model in models for p in (*model.parameters(), *model.buffers()))):
            recorder.label(given, "input", "", "")
        recorder.enter("forward", 0, 0)
        loss = take(inputs)
        recorder.enter("backward", 0, 0)
        loss.backward()
        del loss
    heights: dict[str, int] = {}
    live = 0
    for span in recorder.spans()[1:]:
        highest = live
        for event in recorder.events()[span.start : span.stop]:
            live += event.sign * event.num_bytes
            highest = max(highest, live)
        heights |= {f"highest in {span.phase}": highest, f"after {span.phase}": live}
    return heights


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("objective", ["dpo", "dpo-precomputed"])
def test_the_trace_does_what_dpo_trainer_does(objective: str, adapters: bool) -> None:
    """GIVEN the same model WHEN TRL's ``_compute_loss`` and memplan's run THEN they have the same high points."""
    scope = compute_loss_of_trl()
    has_reference = objective == "dpo"
    setup = setup_of(objective, micro_batch_size=3, seq_len=50, lora=Lora(rank=8) if adapters else None)
    policy = cpu_model(adapters=adapters)
    reference = copy.deepcopy(policy).eval() if has_reference and not adapters else None
    theirs, their_reference = copy.deepcopy(policy), copy.deepcopy(reference)
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    scope["add_fused_lm_head"](theirs.get_base_model() if adapters else theirs, outputs=outputs)
    if their_reference is not None:
        scope["add_fused_lm_head"](their_reference)
        add_fused_head(reference, setup, None, ())
    add_fused_head(policy, setup, None, REPORTED)
    ours = Preference(policy, reference, setup, None)
    inputs = ours.make_inputs(setup.micro_batch_size, setup.seq_len)

    def as_is(x: Any) -> Any:
        return x

    trainer = SimpleNamespace(
        model=theirs,
        ref_model=their_reference,
        accelerator=SimpleNamespace(device="cpu", unwrap_model=as_is, gather_for_metrics=as_is, gather=as_is),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        ld_alpha=None,
        precompute_ref_logps=not has_reference,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=preference.BETA,
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    said = story(
        lambda given: scope["_compute_loss"](trainer, theirs, given, False), inputs, [theirs, their_reference or theirs]
    )
    found = story(lambda given: ours.loss(given, contextlib.nullcontext), inputs, [policy, reference or policy])
    assert head_of(theirs.get_base_model() if adapters else theirs, None, 1.0).weight.shape == (500, 128)
    assert found == said
