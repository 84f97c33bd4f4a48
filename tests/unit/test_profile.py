"""The profile of a run: its highest point, its parts, and that thinning loses neither."""

from __future__ import annotations

import pytest

import memplan
from memplan import api, studies
from memplan.estimation import profile as profiles
from memplan.estimation.profile import profile
from memplan.estimation.timeline import Moment, timeline
from memplan.memory.events import Row
from memplan.specs.training import Setup


def moment(instant: str, num: int, *, kind: str = "activation", sign: int = 1) -> Moment:
    return Moment(instant, (), num, sign, Row("layer", "x", kind, (), "bf16"))


def test_worked_by_hand() -> None:
    found = profile(
        [
            moment("load", 10, kind="parameter"),
            moment("forward", 5),
            moment("loss", 7),
            moment("loss", 7, sign=-1),
            moment("optimizer step", 3, kind="temporary"),
            moment("optimizer step", 3, kind="temporary", sign=-1),
            moment("forward", 2),
        ]
    )
    assert [(one.at, one.total) for one in found.points] == [
        (0, 10),
        (1, 15),
        (2, 22),
        (3, 15),
        (4, 18),
        (5, 15),
        (6, 17),
    ]
    assert [(part.at, part.name, part.step) for part in found.parts] == [
        (0, "load", 0),
        (1, "forward", 0),
        (2, "loss", 0),
        (4, "optimizer step", 0),
        (6, "forward", 1),
    ]
    assert (found.summit.at, found.summit.instant, found.summit.step, found.summit.num_bytes) == (2, "loss", 0, 22)


def test_nothing_has_no_profile() -> None:
    with pytest.raises(ValueError, match="no profile"):
        profile([])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("model", ["gpt2", "qwen2.5-0.5b"])
def test_the_highest_point_is_the_peak_of_the_estimate(model: str, accumulation: int) -> None:
    """In the second step; it is among the points that are left."""
    found = api.find_model(model, dropout=0.0)
    setup = Setup(micro_batch_size=2, seq_len=256, gradient_accumulation_steps=accumulation)
    estimator = api.estimator_of(found, None)
    run = profile(timeline(estimator.program(setup), estimator.sizes(setup), accumulation))
    assert len(run.points) <= 2 * profiles.MOST_POINTS
    peak = estimator.memory(setup).peak_allocated_bytes
    first, second = ([one for one in run.points if inside(run, one.at) == step] for step in (0, 1))
    assert max(one.total for one in second) == peak
    estimate = memplan.estimate(model, micro_batch=2, seq_len=256, accumulation=accumulation, dropout=0.0)
    assert max(one.total for one in first) == max(one.first_step_allocated_bytes for one in estimate.instants)
    assert run.summit.num_bytes == max(one.total for one in run.points)


def inside(run: profiles.Profile, at: int) -> int:
    return [part.step for part in run.parts if part.at <= at][-1]


def test_a_study_finds_what_was_measured() -> None:
    """The same model and setup as in a record: its phases stand beside the prediction."""
    asked = {"micro_batch": 2, "seq_len": 64, "precision": "fp32", "optimizer": "adamw-fused", "dropout": 0.0}
    found = studies.study("smollm2-135m", gpu="24GB", target_batch=2, checkpointing="none", **asked)
    (record,) = found.measured
    assert record.trial.setup == found.setup
    assert record.peak_allocated_bytes == found.plan.best.memory.peak_allocated_bytes
    other = studies.study("smollm2-135m", gpu="24GB", target_batch=2, checkpointing="full", **asked)
    assert not other.measured
