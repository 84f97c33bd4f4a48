"""Distillation: the formula against the trace, and the trace against GKDTrainer's own source.

Kept bytes, parameters (the teacher's among them), gradients, optimizer states and the peak are the same to the byte.
What is left out are a number for each layer with a window, which its cache has on the device, and what variables of
gpt-oss's experts hold where no graph does.

    PYTHONPATH=.:/path/to/trl python -m pytest tests/published/test_distillation.py
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone gives it

from memplan.architectures.registry import read_architecture
from memplan.catalog.models import read_config
from memplan.errors import UsageError
from memplan.estimation.estimate import Estimator
from memplan.probes import distillation
from memplan.probes.distillation import BETA, Distillation
from memplan.probes.losses import masked
from memplan.probes.models import transformers_model
from memplan.probes.trace import trace_training
from memplan.specs.adapter import Lora
from memplan.specs.training import Setup
from memplan.specs.values import replace
from tests.published.test_formula_equals_trace import CONFIG_BY_MODEL_TYPE, kernel_to_force
from tests.published.test_preference import LLAMA, QWEN, story
from tests.support.witnesses import Both, compare, walked_to_the_peak

LARGE = LLAMA | {"num_hidden_layers": 5, "hidden_size": 256}
WIDE = LLAMA | {"num_hidden_layers": 2, "intermediate_size": 60_000, "vocab_size": 300}
PAIRS = {"a deeper teacher": (LLAMA, LARGE), "tied, a smaller teacher": (QWEN, LLAMA)}
ADAPTERS = {"full": None, "LoRA": Lora(rank=8)}


def setup_of(**choices: Any) -> Setup:
    """A setup of a student."""
    return Setup(**{"micro_batch_size": 2, "seq_len": 256, "objective": "distillation", "teacher": "teacher"} | choices)


def assert_same(both: Both) -> None:
    """All totals and the peak."""
    assert both.formula == both.trace
    assert both.formula_peak == both.trace_peak


# -- formula and trace -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ADAPTERS)
@pytest.mark.parametrize(("checkpointing", "accumulation"), [("none", 2), ("full", 1)])
@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast", "bf16-mixed"])
@pytest.mark.parametrize("models", PAIRS)
def test_the_formula_is_the_trace(
    models: str, precision: str, checkpointing: str, trained: str, accumulation: int
) -> None:
    """GIVEN a teacher WHEN both run THEN formula and trace have the same bytes, and the same peak."""
    student, teacher = PAIRS[models]
    setup = setup_of(
        precision=precision,
        activation_checkpointing=checkpointing,
        lora=ADAPTERS[trained],
        gradient_accumulation_steps=accumulation,
    )
    assert_same(compare(student, setup, teacher=teacher))


@pytest.mark.parametrize(
    ("precision", "dtype", "attention", "padding"),
    [
        ("bf16-mixed", "bf16", "sdpa", False),
        ("bf16-autocast", "fp32", "eager", False),
        ("bf16", None, "eager", True),
        ("bf16", None, "flash", False),
        ("bf16-mixed", None, "sdpa", True),
        ("fp16", None, "sdpa", False),
        ("fp16-mixed", "fp16", "sdpa", False),
        ("bf16-autocast", "fp16", "sdpa", False),
    ],
)
def test_other_choices(precision: str, dtype: str | None, attention: str, padding: bool) -> None:
    """A teacher in a dtype of its own, attention, masks, and few tokens that have a label."""
    setup = setup_of(
        precision=precision,
        teacher_dtype=dtype,
        attention=attention,
        padding=padding,
        supervised=0.1,
        micro_batch_size=3,
        seq_len=100,
    )
    assert_same(compare(LLAMA, setup, teacher=LARGE))


@pytest.mark.parametrize(
    "how",
    [
        {"activation_checkpointing": "full", "reentrant": True},
        {"activation_checkpointing": "full", "reentrant": True, "lora": Lora(rank=8), "precision": "bf16-mixed"},
        {"activation_checkpointing": "every-2", "reentrant": True, "gradient_accumulation_steps": 2},
        {"activation_checkpointing": "every-2"},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "save-attention"},
        {"activation_checkpointing": "save-attention", "lora": Lora(rank=8), "precision": "bf16-mixed"},
        {"activation_checkpointing": "full", "offload": "activations"},
        {"optimizer": "lomo"},
        {"lora": Lora(rank=8), "quantize": "nf4"},
        {"lora": Lora(rank=8, targets=("q_proj", "lm_head"))},
        {"lora": Lora(rank=8, modules_to_save=("lm_head",))},
    ],
    ids=str,
)
def test_the_student_alone_is_trained_like_this(how: dict[str, Any]) -> None:
    """GIVEN checkpointing, updates in the backward pass or a base of few bits THEN the teacher has none of it."""
    assert_same(compare(LLAMA, setup_of(**how), teacher=LARGE))


@pytest.mark.parametrize(("precision", "size"), list(product(["bf16", "bf16-mixed"], [(1, 700), (16, 64)])), ids=str)
def test_the_teacher_runs_on_top_of_what_the_student_keeps(precision: str, size: tuple[int, int]) -> None:
    """GIVEN a teacher far wider than its vocabulary THEN its forward pass is the peak, of formula and trace."""
    setup = setup_of(micro_batch_size=size[0], seq_len=size[1], precision=precision, optimizer="sgd", lora=Lora(rank=2))
    student = LLAMA | {"vocab_size": 300}
    estimator = Estimator(
        read_architecture(student, "config"), "llama", teacher=read_architecture(WIDE, "teacher", dropout=0.0)
    )
    assert estimator.estimate(setup).peak_instant == "teacher forward"
    assert_same(compare(student, setup, teacher=WIDE))


TOLERANCE_BY_MODEL_TYPE = {"gpt_oss": 0.02}
"""Of the peak; see above."""


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", sorted(set(CONFIG_BY_MODEL_TYPE) - {"gemma3"}))
def test_every_family(model_type: str, attention: str) -> None:
    """The same law for all language models, each its own teacher; of the peak within a thousandth."""
    config = CONFIG_BY_MODEL_TYPE[model_type]
    known = read_architecture(config, "config").attentions
    setup = setup_of(seq_len=64, attention=attention if attention in known else known[0], dropout=0.0)
    try:
        both = compare(config, setup, sdpa_kernel=kernel_to_force(config), teacher=config)
    except UsageError as refused:
        assert "causal" in refused.cause
        return
    assert both.formula == both.trace
    assert abs(both.peak_error) <= TOLERANCE_BY_MODEL_TYPE.get(model_type, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), [("llama-3.2-3b", "llama-3-8b"), ("gpt2", "gpt2-medium")])
def test_real_models(student: str, teacher: str) -> None:
    """At their real sizes."""
    setup = setup_of(micro_batch_size=1, seq_len=1024, dropout=0.0)
    assert_same(compare(read_config(student)[0], setup, teacher=read_config(teacher)[0]))


def test_what_the_trace_refuses() -> None:
    """A missing teacher, and one of other words."""
    with pytest.raises(UsageError, match="needs a teacher"):
        trace_training(LLAMA, setup_of())
    other = replace(transformers_model(LLAMA), teacher=transformers_model(LLAMA | {"vocab_size": 8999}))
    with pytest.raises(UsageError, match="9,000 tokens, and its teacher teacher one of 8,999"):
        trace_training(other, setup_of())


@pytest.mark.parametrize("trained", ADAPTERS)
def test_the_timeline_has_the_height_of_the_closed_form(trained: str) -> None:
    """GIVEN a deeper teacher and two micro-steps THEN the events reach the same peak, and leave nothing over."""
    setup = setup_of(gradient_accumulation_steps=2, lora=ADAPTERS[trained])
    teacher = read_architecture(LARGE, "teacher", dropout=0.0)
    estimator = Estimator(read_architecture(LLAMA, "config"), "llama", teacher=teacher)
    program, sizes = estimator.program(setup), estimator.sizes(setup)
    highest = walked_to_the_peak(program, sizes, 2)
    found = estimator.estimate(setup)
    at_peak = sum(row.bytes_at_peak for row in found.ledger if row.kind not in {"allocator", "workspace", "context"})
    assert at_peak == highest == found.memory.peak_allocated_bytes


# -- TRL's own source --------------------------------------------------------------------------------------------------


def methods_of_trl(names: tuple[str, ...]) -> dict[str, Any]:
    """Methods of GKDTrainer; what no recorder sees is written another way."""
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("trl is not installed")
    path = Path(next(iter(found.submodule_search_locations))) / "experimental/gkd/gkd_trainer.py"
    trainer = next(n for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == "GKDTrainer")
    assert isinstance(trainer, ast.ClassDef)
    methods = [n for n in trainer.body if isinstance(n, ast.FunctionDef) and n.name in names]
    assert len(methods) == len(names)
    for method in methods:
        method.decorator_list = []
    text = "\n\n".join(ast.unparse(method) for method in methods)
    for old, new in (("torch.tensor(beta,", "torch.full((), beta,"), ("jsd[mask]", "masked(jsd, mask, 1.0)")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    scope: dict[str, Any] = {"torch": torch, "F": F, "masked": masked, "empty_cache": lambda: None}
    exec(compile(text, str(path), "exec"), scope)
    return scope


def cpu_model(layers: int) -> Any:
    """A small Llama with numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA | {"vocab_size": 500, "num_hidden_layers": layers})
    return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.mark.parametrize("num_items", [None, 147])
def test_the_trace_does_what_gkd_trainer_does(num_items: int | None) -> None:
    """GIVEN the same models WHEN TRL's ``compute_loss`` and memplan's run THEN bytes and loss are the same."""
    scope = methods_of_trl(("compute_loss", "generalized_jsd_loss"))
    setup = setup_of(micro_batch_size=3, seq_len=50)
    student, teacher = cpu_model(2).train(), cpu_model(4).eval()
    student.config.use_cache = False  # by the Trainer
    theirs, their_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    ours = Distillation(student, teacher, setup)
    assert teacher.config.use_cache
    inputs = ours.make_inputs(setup.micro_batch_size, setup.seq_len)
    trainer = SimpleNamespace(
        teacher_model=their_teacher, beta=BETA, generalized_jsd_loss=scope["generalized_jsd_loss"]
    )
    count = {} if num_items is None else {"num_items": torch.tensor(num_items)}

    def take(given: dict[str, Any]) -> Any:
        return scope["compute_loss"](trainer, theirs, given, num_items_in_batch=count.get("num_items"))

    said = story(take, inputs, [theirs, their_teacher])
    found = story(lambda given: ours.loss(given, contextlib.nullcontext, **count), inputs, [student, teacher])
    assert found == said
    assert said["highest in forward"] > 0


def test_the_divergence_is_that_of_trl() -> None:
    """GIVEN numbers WHEN nothing is masked by a stand-in THEN both give the same loss."""
    scope = methods_of_trl(("generalized_jsd_loss",))
    scope["masked"] = lambda x, mask, _: x[mask]

    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 50), torch.randn(2, 7, 50)
    labels = torch.randint(0, 50, (2, 7))
    labels[:, :3] = -100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "masked", scope["masked"])
        for count in (None, torch.tensor(8)):
            ours = distillation.divergence(student, teacher, labels, count, 1.0)
            theirs = scope["generalized_jsd_loss"](student, teacher, labels, num_items_in_batch=count)
            assert torch.equal(ours, theirs)
