"""What an answer about a mixture of experts says."""

from __future__ import annotations

import pytest

import memplan
from memplan.architectures.registry import READER_BY_MODEL_TYPE
from memplan.catalog.models import read_models

MIXTURES = [model.id for model in read_models() if model.model_type in {"mixtral", "olmoe", "deepseek_v3", "gpt_oss"}]


@pytest.mark.parametrize("model", MIXTURES)
def test_uneven_routing_is_spoken_of(model: str) -> None:
    """GIVEN any mixture, THEN the answer says how many rows there are, and where uneven routing would matter."""
    answer = memplan.estimate(model, micro_batch=2, seq_len=16)
    (routing,) = [one for one in answer.assumptions if one.what == "routing"]
    assert "rows a layer, however uneven the routing" in routing.value
    assert [why for what, why in answer.unmodelled if "uneven routing" in why]


def test_rows_are_tokens_times_experts_of_each() -> None:
    """8 of OLMoE's 64 experts: 2 x 16 tokens are 256 rows."""
    answer = memplan.estimate("olmoe-1b-7b", micro_batch=2, seq_len=16)
    (routing,) = [one for one in answer.assumptions if one.what == "routing"]
    assert routing.value.startswith("8 of 64 experts a token: 256 rows")


def test_experts_under_autocast_run_in_fp32() -> None:
    """The grouped product is on none of autocast's lists."""
    mixed = memplan.estimate("olmoe-1b-7b", micro_batch=1, seq_len=16, precision="bf16-mixed")
    assert [one.value for one in mixed.assumptions if one.what == "autocast"] == [
        "the experts run in fp32, the dtype of their weights"
    ]
    plain = memplan.estimate("olmoe-1b-7b", micro_batch=1, seq_len=16)
    assert not [one for one in plain.assumptions if one.what == "autocast"]


@pytest.mark.parametrize(("model", "method"), [("deepseek-v3", "fp8"), ("gpt-oss-120b", "mxfp4")])
def test_quantised_originals_are_counted_dequantised(model: str, method: str) -> None:
    """GIVEN a model that is published in 8 or 4 bits, THEN it is counted in bf16, and that is said."""
    answer = memplan.estimate(model, micro_batch=1, seq_len=16)
    assert f"{method} weights" in dict(answer.unmodelled)
    parameters = sum(row.num_bytes for row in answer.ledger if row.kind == "parameter")
    assert parameters == pytest.approx(2 * answer.model.num_parameters, rel=1e-5)


def test_the_backward_of_a_grouped_product_is_two() -> None:
    """One for the rows and one for the weights, of the chosen experts alone: 8 of 64 with 3 matrices of 1024 x 2048."""
    from memplan.architectures.registry import read_architecture
    from memplan.catalog.models import read_config
    from memplan.estimation.step import Recordings
    from memplan.operators.tape import Tape
    from memplan.specs.training import Setup
    from memplan.steptime.roofline import timed

    recorded = Recordings(read_architecture(*read_config("olmoe-1b-7b"))).recording(
        Setup(micro_batch_size=1, seq_len=8)
    )
    tape: Tape = recorded.kinds[0].tape
    alone = Tape(tape.numerics)
    alone.ops = [op for op in tape.ops if op.name == "grouped_mm"]
    work = timed(alone)
    forward = 2 * 8 * 3 * 1024 * 2048
    assert sum(one.flops.factor for one in work.forward) == forward
    assert sum(one.flops.factor for one in work.backward) == 2 * forward


def test_the_loss_that_balances_is_named() -> None:
    """GIVEN a config that asks for the load-balancing loss, THEN the answer names it as left out."""
    from memplan.architectures.registry import read_architecture
    from memplan.catalog.models import read_config

    values, origin = read_config("mixtral-8x7b")
    assert "the load-balancing loss" not in dict(read_architecture(values, origin).unmodelled)
    asked = read_architecture({**values, "output_router_logits": True}, origin)
    assert "the load-balancing loss" in dict(asked.unmodelled)


def test_every_mixture_of_the_catalogue_has_a_description() -> None:
    """Those with a mixture's name, too."""
    names = {"mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"}
    assert names <= set(READER_BY_MODEL_TYPE)
    assert names <= {model.model_type for model in read_models()}
