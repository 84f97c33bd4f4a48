"""The law of ``torch.compile``: what the compiler's own partition keeps lies within the range that the formula gives.

The partition is that of ``min_cut_rematerialization_partition`` on the module of transformers (see
`memplan.probes.compiled`); the range knows nothing of it.
"""

from __future__ import annotations

from itertools import product

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from memplan.architectures.registry import read_architecture
from memplan.estimation.compiled import least_kept
from memplan.estimation.step import Recordings
from memplan.memory.events import Sizes
from memplan.operators.sizes import allocated, bind
from memplan.probes.compiled import compiled_activations
from memplan.specs.adapter import Lora
from memplan.specs.training import Setup
from memplan.specs.values import replace
from tests.published.test_formula_equals_trace import CONFIG_BY_MODEL_TYPE, EAGER_ONLY

pytestmark = pytest.mark.slow

MICRO_BATCH_SIZE, SEQ_LEN = 2, 128

UNMODELLED_MASK = {"bert", "roberta", "xlm-roberta"}
"""Under scaled_dot_product_attention these get a mask that is not modelled, and are refused."""

CASES = [
    (family, attention, precision)
    for family in CONFIG_BY_MODEL_TYPE
    for attention, precision in product(("sdpa", "eager"), ("bf16", "bf16-mixed"))
    if attention == "eager" or family not in EAGER_ONLY | UNMODELLED_MASK
]


def setup_of(attention: str, precision: str) -> Setup:
    return Setup(
        micro_batch_size=MICRO_BATCH_SIZE, seq_len=SEQ_LEN, attention=attention, precision=precision, compile=True
    )


def kept_by_the_compiler(family: str, setup: Setup, *, sdpa_kernel: str | None = None) -> int:
    saved = compiled_activations(CONFIG_BY_MODEL_TYPE[family], setup, sdpa_kernel=sdpa_kernel)
    return sum(allocated(one.num_bytes) for one in saved)


def bounds(family: str, setup: Setup) -> tuple[int, int]:
    program = Recordings(read_architecture(CONFIG_BY_MODEL_TYPE[family], "config")).program(setup)
    sizes = Sizes(bind(setup.micro_batch_size, setup.seq_len))
    return least_kept(program, sizes), program.peaks(sizes, 1).kept_activation_bytes


@pytest.mark.parametrize(("family", "attention", "precision"), CASES, ids=str)
def test_what_the_compiler_keeps_lies_within_the_range(family: str, attention: str, precision: str) -> None:
    setup = setup_of(attention, precision)
    low, high = bounds(family, setup)
    assert low <= kept_by_the_compiler(family, setup) <= high


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "setup",
    [
        setup_of("eager", "fp32"),
        setup_of("sdpa", "fp16-mixed"),
        replace(setup_of("sdpa", "bf16"), padding=True),
        replace(setup_of("sdpa", "bf16"), dropout=0.0),
        replace(setup_of("sdpa", "bf16"), micro_batch_size=3, seq_len=200),
        replace(setup_of("sdpa", "bf16"), seq_len=512),
    ],
    ids=["fp32", "fp16-mixed", "padded", "without dropout", "3 x 200", "masks that outweigh all else"],
)
def test_other_choices_lie_within_it_too(family: str, setup: Setup) -> None:
    low, high = bounds(family, setup)
    assert low <= kept_by_the_compiler(family, setup) <= high


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_adapters_lie_within_it_too(dropout: float) -> None:
    setup = replace(setup_of("sdpa", "bf16"), lora=Lora(rank=8, dropout=dropout))
    low, high = bounds("llama", setup)
    assert low <= kept_by_the_compiler("llama", setup) <= high


def test_the_upper_end_is_a_step_with_a_mask() -> None:
    """It is what autograd keeps, with the mask that compiling brings."""
    setup = setup_of("sdpa", "bf16")
    _, high = bounds("llama", setup)
    _, padded = bounds("llama", replace(setup, compile=False, padding=True))
    assert high == padded > kept_by_the_compiler("llama", setup)
