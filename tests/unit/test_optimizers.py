"""What optimizers remember and need for a moment, worked out by hand."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import memplan
from memplan.errors import MemplanError, UsageError
from memplan.export.trainer import OPTIM_BY_OPTIMIZER, trainer_arguments
from memplan.memory.events import Sizes
from memplan.memory.frames import Frame, Trained
from memplan.memory.in_backward import updating
from memplan.memory.model_states import ModelStates
from memplan.memory.optimizers import OPTIMIZER_BY_NAME
from memplan.operators.tape import Parameter
from memplan.planner.levers import EIGHT_BITS_BY_OPTIMIZER, PAGED_BY_OPTIMIZER
from memplan.report.document import estimate_document
from memplan.specs.training import OFFLOADED, OPTIMIZERS, Setup, library_of
from memplan.steptime.step import bytes_of_update

SIZES = Sizes({})


def states(name: str, shape: tuple[int, ...], dtype: str = "bf16", **kind: bool) -> list[tuple[Any, ...]]:
    """(name, shape, dtype) of each state of one parameter."""
    rule = OPTIMIZER_BY_NAME[name].states
    return [(s.name, s.shape, s.dtype) for s in rule(Trained("p", shape, dtype, **kind))]


def model(name: str, *shapes: tuple[int, ...], dtype: str = "bf16") -> ModelStates:
    """Parameters of some shapes, in this order."""
    groups = tuple((Parameter(f"p{n}", shape, True, 0, 0), 1) for n, shape in enumerate(shapes))
    return ModelStates(groups, dtype, name, tuple(range(len(shapes))))


# -- bitsandbytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw-8bit", "paged-adamw-8bit"])
def test_4096_numbers_have_8_bits_and_an_fp32_for_each_256(name: str) -> None:
    assert states(name, (64, 64)) == [
        ("exp_avg", (64, 64), "uint8"),
        ("absmax of exp_avg", (16,), "fp32"),
        ("exp_avg_sq", (64, 64), "uint8"),
        ("absmax of exp_avg_sq", (16,), "fp32"),
    ]
    assert states(name, (17, 241))[1] == ("absmax of exp_avg", (17,), "fp32")  # 4,097 numbers: a block for the last


@pytest.mark.parametrize("kind", [{}, {"of_embedding": True}])
def test_small_tensors_and_embeddings_have_32_bits(kind: dict[str, bool]) -> None:
    shape = (1000, 64) if kind else (4095,)
    assert states("adamw-8bit", shape, **kind) == [("exp_avg", shape, "fp32"), ("exp_avg_sq", shape, "fp32")]


def test_ademamix_has_two_averages_in_one_tensor() -> None:
    assert states("ademamix", (3, 5)) == [("exp_avgs", (2, 3, 5), "fp32"), ("exp_avg_sq", (3, 5), "fp32")]
    assert states("ademamix-8bit", (64, 64))[:2] == [
        ("exp_avgs", (2, 64, 64), "uint8"),
        ("absmax of exp_avgs", (2, 16), "fp32"),
    ]


@pytest.mark.parametrize(("name", "books"), [("adamw-8bit", 2), ("lion-8bit", 1), ("lion", 0)])
def test_code_books_are_there_once_a_state_has_8_bits(name: str, books: int) -> None:
    """Of 256 fp32 numbers each."""
    small = model(name, (4095,)).optimizer_states().total(SIZES)
    large = model(name, (64, 64)).optimizer_states().total(SIZES)
    moments = 2 if name.startswith("adamw") else 1
    assert small == moments * 16_384  # 16,380 in blocks of 512
    assert large == (moments * (4096 + 512) + books * 1024 if books else 16_384)


def test_100_000_numbers_are_paged() -> None:
    """Two moments in 32 bits: 800,000 bytes on the host, and nothing on the device; one number fewer stays there."""
    paged, not_paged = model("paged-adamw", (100_000,)), model("paged-adamw", (99_999,))
    assert (paged.host_state_bytes(), paged.optimizer_states().total(SIZES)) == (800_000, 0)
    assert (not_paged.host_state_bytes(), not_paged.optimizer_states().total(SIZES)) == (0, 2 * 400_384)


def test_constants_of_paged_8_bit_states_stay_on_the_device() -> None:
    """ceil(100,000 / 256) = 391 blocks of 4 bytes: 1,564, in blocks of 512 2,048; two of them, two code books."""
    found = model("paged-adamw-8bit", (100_000,))
    assert found.host_state_bytes() == 200_000
    assert found.optimizer_states().total(SIZES) == 2 * 2048 + 2 * 1024


# -- others ------------------------------------------------------------------------------------------------------------


def test_adafactor_has_rows_and_columns() -> None:
    def of(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [shape for name, shape, _ in states("adafactor", shape) if name != "RMS"]

    assert of((10, 20)) == [(10,), (20,)]
    assert of((4, 10, 20)) == [(4, 10), (4, 20)]
    assert of((7,)) == [(7,)]
    assert {dtype for _, _, dtype in states("adafactor", (10, 20))} == {"fp32"}


def test_muon_is_for_the_matrices_of_layers() -> None:
    momentum = ["momentum_buffer"]
    adamw = ["exp_avg", "exp_avg_sq"]

    def names(shape: tuple[int, ...], **kind: bool) -> list[str]:
        return [name for name, _, _ in states("muon", shape, **kind)]

    assert names((8, 8), in_layers=True) == momentum
    assert names((8,), in_layers=True) == adamw
    assert names((8, 8)) == adamw  # the head
    assert names((8, 8), of_embedding=True) == adamw


def test_galore_projects_the_shorter_side_to_rank_128() -> None:
    tall, wide = (512, 256), (256, 512)
    assert states("galore-adamw", tall) == [
        ("exp_avg", (512, 128), "bf16"),
        ("exp_avg_sq", (512, 128), "bf16"),
        ("projection", (128, 256), "bf16"),
    ]
    assert [shape for _, shape, _ in states("galore-adamw", wide)] == [(128, 512), (128, 512), (256, 128)]
    assert [shape for _, shape, _ in states("galore-adamw", (64, 16))] == [(64, 16), (64, 16), (16, 16)]


def test_of_fp32_parameters_galore_keeps_all_singular_vectors() -> None:
    """The projection is a slice of them, and a slice keeps the whole."""
    assert states("galore-adamw", (512, 256), "fp32")[2] == ("projection", (256, 256), "fp32")


def test_what_is_not_projected_has_full_moments() -> None:
    for shape, kind in (((512,), {}), ((512, 256), {"of_embedding": True})):
        for name in ("galore-adamw", "apollo-adamw"):
            assert [s[1] for s in states(name, shape, **kind)] == [shape, shape]


# -- temporaries -------------------------------------------------------------------------------------------------------


def test_a_loop_holds_the_denominator_of_the_parameter_before() -> None:
    """In fp32: 2 x 4,096; 4,096 + 2 x 2,048; 2,048 + 2 x 3,072 = 8,192 bytes: the first is as high as the second."""
    found = model("adamw-forloop", (1024,), (512,), (768,), dtype="fp32").step_temporaries()
    assert found.total(SIZES) == 8192
    more = model("adamw-forloop", (1024,), (1024,), dtype="fp32").step_temporaries()
    assert more.total(SIZES) == 3 * 4096


@pytest.mark.parametrize(("name", "copies"), [("rmsprop", 1), ("adagrad", 2), ("schedule-free-adamw", 1), ("sgd", 0)])
def test_foreach_makes_copies_of_all_at_once(name: str, copies: int) -> None:
    assert model(name, (1024,), (512,)).step_temporaries().total(SIZES) == copies * (2048 + 1024)


def test_muon_orthogonalises_in_bf16() -> None:
    """512 x 256 in bf16: the update, two of the iterates (262,144 bytes each), two of three squares of 256 x 256."""
    states = model("muon", (512, 256))._replace(in_layers=frozenset({0}))
    assert states.step_temporaries().total(SIZES) == 3 * 262_144 + 2 * 131_072


def test_a_name_that_is_given_away_frees_what_it_had() -> None:
    frame = Frame("a loop")
    p = Trained("p", (128,), "fp32")
    frame.bind("x", frame.make(p, "first"))
    frame.bind("y", frame.held("x"))  # another name for the same
    frame.bind("x", frame.make(p, "second"))
    assert [block.row.tensor for block in frame.highest()] == ["first", "second"]
    frame.bind("y", None)
    frame.bind("call.z", frame.make(p, "third"))
    frame.leave("call")
    assert frame.peak == 2 * 512
    assert [sign for _, sign in frame.events] == [1, 1, -1, 1, -1]


# -- updates in the backward pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["lomo", "adalomo", "adamw-in-backward"])
def test_gradients_are_never_all_there(optimizer: str) -> None:
    """A model that peaks with all its gradients needs them no more."""
    here, usual = (memplan.estimate("llama-3-8b", seq_len=64, optimizer=o) for o in (optimizer, "sgd"))
    assert here.gradient_bytes == 0
    assert here.memory.peak_allocated_bytes - here.optimizer_state_bytes < usual.memory.peak_allocated_bytes
    assert {i.name: i.allocated_bytes for i in here.instants}["optimizer step"] < usual.parameter_bytes * 1.01 + (
        here.optimizer_state_bytes
    )
    assert next(a for a in here.assumptions if a.what == "gradients").value.startswith("each gone once")


def test_an_update_frees_its_gradient() -> None:
    """What a later micro-step frees besides the first is the gradient; it goes, and its update comes and goes."""
    from memplan.memory.events import Event, Row, Segment
    from memplan.operators.sizes import Size

    row = Row("layer.weight", "gradient", "temporary", (1024,), "bf16")
    born, gone = Event(("grad", 0), Size(2048), 1, row), Event(("grad", 0), Size(2048), -1, row)
    how = OPTIMIZER_BY_NAME["lomo"].in_backward
    assert how is not None
    found = updating(Segment("first", (born,)), Segment("later", (born, gone)), how).extent(SIZES)
    assert (found.net, found.peak) == (0, 8192)  # fp32 copies of gradient and parameter, once the bf16 gradient is gone


def test_a_plan_with_updates_in_the_backward_pass_accumulates_nothing() -> None:
    plan = memplan.suggest("qwen2.5-0.5b", gpu="24GB", target_batch=4, seq_len=256, optimizer="lomo")
    assert plan.best is not None
    assert plan.best.setup.gradient_accumulation_steps == 1
    assert plan.best.setup.micro_batch_size == 4
    assert not [lever for lever in plan.levers if lever.flag.startswith("--micro-batch")]


@pytest.mark.parametrize("choices", [{"accumulation": 2}, {"gpus": 2}])
def test_what_needs_gradients_is_refused(choices: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="lomo updates in the backward pass"):
        memplan.estimate("gpt2", optimizer="lomo", **choices)


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_every_optimizer_is_answered_for(optimizer: str) -> None:
    answer = memplan.estimate("gpt2", optimizer=optimizer, gpu="rtx4090", seq_len=128)
    said = {one.what: one for one in answer.assumptions}
    about = "optimizer" if optimizer == OFFLOADED else "optimizer states"
    assert (about in said) == (answer.optimizer_state_bytes + answer.host_bytes > 0)
    assert sum(row.bytes_at_peak for row in answer.ledger if row.module != "process") == (
        answer.memory.peak_allocated_bytes
    )
    assert answer.step_time is not None
    assert answer.step_time.optimizer_s > 0
    assert estimate_document(answer)["host_bytes"] == answer.host_bytes
    assert bool(answer.host_bytes) == (optimizer.startswith("paged") or optimizer == OFFLOADED)


def test_an_optimizer_on_the_host_leaves_weights_and_gradients_on_the_device() -> None:
    """By hand: GPT-2's norms and biases have fewer than 4,096 numbers; all else is on the host four times."""
    answer = memplan.estimate("gpt2", optimizer=OFFLOADED)
    vectors = 12 * (4 * 768 + 2304 + 768 + 3072 + 768) + 2 * 768
    assert answer.host_bytes == 4 * 2 * (124_439_808 - vectors)
    assert answer.gradient_bytes == memplan.estimate("gpt2", optimizer="adamw-fused").gradient_bytes
    assert (
        "the optimizer's step on the host",
        "it takes as long as the host's memory and cores do",
    ) in answer.unmodelled


def test_paged_states_are_said_to_be_on_the_host() -> None:
    answer = memplan.estimate("gpt2", optimizer="paged-adamw")
    states = next(one for one in answer.assumptions if one.what == "optimizer states")
    assert "in unified memory" in states.value
    assert states.effect_bytes == answer.host_bytes > 0
    assert ("the time to move pages", "it depends on how much room the card has left") in answer.unmodelled


@pytest.mark.parametrize("levers", [EIGHT_BITS_BY_OPTIMIZER, PAGED_BY_OPTIMIZER])
def test_levers_lead_to_optimizers_that_take_less(levers: dict[str, str]) -> None:
    for here, there in levers.items():
        before, after = (memplan.estimate("gpt2", optimizer=name).optimizer_state_bytes for name in (here, there))
        assert after < before, (here, there)


def test_a_lever_says_what_it_may_do_to_training() -> None:
    plan = memplan.suggest("gpt2", gpu="24GB", target_batch=8, optimizer="adamw-fused")
    price = {lever.flag: lever.price for lever in plan.levers}
    assert "rounded to 8 bits" in price["--optimizer adamw-8bit"]
    assert "without moments" in price["--optimizer sgd"]


def test_the_trainer_is_told_what_to_project() -> None:
    found = trainer_arguments(Setup(optimizer="galore-adamw"))
    assert found is not None
    assert found["arguments"]["optim_target_modules"] == "all-linear"


def test_names_of_the_trainer_are_its_own() -> None:
    training_args = pytest.importorskip("transformers.training_args")
    known = {one.value for one in training_args.OptimizerNames}
    assert set(OPTIM_BY_OPTIMIZER.values()) <= known
    assert set(OPTIM_BY_OPTIMIZER) <= set(OPTIMIZERS)


@pytest.mark.parametrize(
    ("optimizer", "library"),
    [("adamw", "torch"), ("rmsprop", "torch"), ("rmsprop-32bit", "bitsandbytes"), ("adalomo", "lomo_optim")],
)
def test_optimizers_come_with_a_library(optimizer: str, library: str) -> None:
    assert library_of(optimizer) == library


def test_an_update_moves_what_it_reads_and_writes() -> None:
    """Of 10 numbers in bf16: the clip 3 x 20 bytes, AdamW 8-bit 3 x 20 and 4 bytes a number; LOMO clips nothing."""
    assert bytes_of_update("adamw-8bit", 20, 10) == 60 + 60 + 40
    assert bytes_of_update("lomo", 20, 10) == 60


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from memplan.probes.optimizers import load_library

    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(MemplanError, match="schedulefree"):
        load_library("schedule-free-sgd")
