"""Adapters of experts and routers: the formula against peft, which puts W + scaling * B A in place of their parameters.

With ``all-linear`` peft adapts them in every model that transformers 5 has stacked the experts of, but for Qwen2-MoE
and gpt-oss.  Everything agrees to the byte, the peaks within 0.02 %.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from memplan.architectures.registry import read_architecture
from memplan.errors import UsageError
from memplan.estimation.step import Recordings
from memplan.probes.trace import trace_training
from memplan.specs.adapter import Lora
from memplan.specs.training import Setup
from tests.published.test_adapters import agree
from tests.published.test_formula_equals_trace import kernel_to_force
from tests.published.test_reference_mixtures import CONFIG_BY_NAME
from tests.support.witnesses import compare

MOST = 2e-4
"""Of the peak: three blocks in a router of DeepSeek-V3 whose parameters are in fp32 under autocast."""

SOME = ("mixtral", "qwen3_moe, every other layer", "deepseek_v2, groups of experts", "qwen2_moe, a dense layer")
QWEN = ("olmoe, clipped", "qwen3_moe, every other layer", "deepseek_v2, queries made directly")


def run(name: str, lora: Lora, **choices: Any) -> Any:
    """Both witnesses on a small mixture."""
    config = CONFIG_BY_NAME[name]
    attention = "eager" if name.startswith("gpt_oss") else "sdpa"
    setup = Setup(micro_batch_size=2, seq_len=128, attention=attention, lora=lora, **choices)
    return compare(config, setup, sdpa_kernel=kernel_to_force(config) if setup.precision == "fp32" else None)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast"])
def test_all_linear(name: str, checkpointing: str, precision: str) -> None:
    """GIVEN all-linear WHEN a step runs THEN the adapted experts are kept whole, and have gradients of that size."""
    agree(run(name, Lora(rank=16), activation_checkpointing=checkpointing, precision=precision), 0)


@pytest.mark.parametrize("name", QWEN)
def test_named_experts(name: str) -> None:
    """A dense layer beside them that has one of their names gets nothing, as with peft; layers are passed over."""
    lora = Lora(rank=4, targets=("o_proj", "gate_proj", "up_proj"), layers=(1,), ranks=(("gate_up_proj", 24),))
    agree(run(name, lora, gradient_accumulation_steps=2), 0)


@pytest.mark.parametrize("name", SOME[:3])
@pytest.mark.parametrize(
    "ranks",
    [
        (("down_proj", 4),),
        (("gate_up_proj", 4),),
        ((r".*\.gate_up_proj", 4),),
        (("gate.weight", 2), (r".*\.gate_up_proj", 4), (r"experts\..*", 3)),
        ((r".*", 4),),
    ],
    ids=str,
)
def test_ranks_of_experts(name: str, ranks: tuple[tuple[str, int], ...]) -> None:
    """GIVEN rank_pattern THEN gate and up have the rank of the first pattern that fits, and else twice that of all.

    peft writes that as a pattern behind the others, or over the one that is written alike.
    """
    agree(run(name, Lora(rank=8, ranks=ranks)), 0)


@pytest.mark.parametrize(("name", "old"), [("mixtral", "w1"), (SOME[1], "gate_proj"), ("olmoe, clipped", "up_proj")])
def test_ranks_of_what_is_no_more(name: str, old: str) -> None:
    """The names of transformers 4 are targets, and patterns of ranks that fit nothing: peft passes over them."""
    setup = Setup(seq_len=16, lora=Lora(rank=8, ranks=((old, 4),)))
    with pytest.raises(UsageError, match=f"--lora-ranks {old}"):
        Recordings(read_architecture(CONFIG_BY_NAME[name], "config")).program(setup)
    with pytest.raises(UsageError, match=f"--lora-ranks {old}"):
        trace_training(CONFIG_BY_NAME[name], setup)


@pytest.mark.parametrize("name", QWEN)
def test_named_routers(name: str) -> None:
    """A router is a matrix of its own."""
    lora = Lora(rank=4, targets=("o_proj", "gate"), dtype="base", ranks=((r"gate\.weight", 7),))
    agree(run(name, lora), 0)


def test_a_base_of_four_bits() -> None:
    """Experts are no linear layers: bitsandbytes leaves them as they are."""
    pytest.importorskip("bitsandbytes")
    agree(run("mixtral", Lora(rank=16), quantize="nf4", activation_checkpointing="full"), 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "checkpointing", "dtype"),
    list(product(CONFIG_BY_NAME, ("bf16", "bf16-autocast", "bf16-mixed", "fp32"), ("none", "full"), ("fp32", "base"))),
)
def test_all_mixtures(name: str, precision: str, checkpointing: str, dtype: str) -> None:
    """All of them, in all precisions."""
    lora = Lora(rank=8, dtype=dtype)
    agree(run(name, lora, precision=precision, activation_checkpointing=checkpointing), MOST)


@pytest.mark.parametrize(
    "lora", [Lora(rank=8, dropout=0.1), Lora(rank=8, dora=True), Lora(rank=8, targets=("w1", "q_proj"))]
)
def test_what_peft_cannot(lora: Lora) -> None:
    """Peft has neither dropout nor DoRA for parameters, nor half of one; formula and trace say so."""
    setup = Setup(seq_len=16, lora=lora)
    with pytest.raises(UsageError):
        Recordings(read_architecture(CONFIG_BY_NAME["mixtral"], "config")).program(setup)
    with pytest.raises(UsageError, match=r"peft .* cannot add these adapters"):
        trace_training(CONFIG_BY_NAME["mixtral"], setup)


def test_a_policy_and_its_reference() -> None:
    """GIVEN DPO THEN the reference runs with the experts as they were."""
    agree(run("mixtral", Lora(rank=16), objective="dpo", loss="tiled"), 0)
