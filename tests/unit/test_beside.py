"""What stands beside a plan: the map, the frontier, the schedule."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from memplan import api, studies
from memplan.planner.maps import doublings
from memplan.planner.schedule import condensed, samples_of, schedule
from memplan.planner.study import Study
from memplan.report.beside import maps_document, schedule_document
from memplan.report.charts.frontier import frontier as draw_frontier
from memplan.report.charts.maps import cell_text, cells, is_plan
from memplan.report.charts.schedule import equation_of, said_of, samples_text
from memplan.report.document import plan_document
from memplan.report.pages.plan import render_plan_page
from memplan.report.study import study_document
from memplan.specs.training import Setup


@cache
def studied() -> Study:
    return studies.study("gpt2", gpu="12GB", target_batch=48, precision="fp32")


def document() -> dict[str, Any]:
    found = studied()
    return study_document(found, plan_document(found.plan), "memplan suggest")


# -- the map -----------------------------------------------------------------------------------------------------------


def test_each_cell_is_what_a_single_estimate_says() -> None:
    """Bytes are the least; what is marked as out of memory does not fit as estimated, what fits does."""
    found = studied()
    own, *others = found.maps
    assert own.grid.setup.activation_checkpointing == found.setup.activation_checkpointing
    assert {one.grid.setup.activation_checkpointing for one in others} <= {"none", "every-2", "full"}
    for record in own.records():
        if record["verdict"] not in {"oom", "fits"}:
            continue
        alone = api.estimate(
            "gpt2",
            gpu="12GB",
            precision="fp32",
            micro_batch=record["micro_batch_size"],
            seq_len=record["seq_len"],
            accumulation=found.setup.gradient_accumulation_steps,
            checkpointing=found.setup.activation_checkpointing,
        )
        assert alone.fits is (record["verdict"] == "fits")
        assert record["peak_process_bytes"] <= alone.memory.peak_process_bytes


def test_one_cell_is_the_plan() -> None:
    found = document()
    setup = found["plan"]["best"]["setup"]
    own = [point for one in found["maps"] for row, column, point in cells(one) if is_plan(one, row, column, setup)]
    assert len(own) == 1
    assert cell_text(own[0])[-1] in "+~"


@pytest.mark.parametrize(
    ("size", "least", "found"),
    [
        (1, 1, [1, 2, 4, 8, 16]),
        (4, 1, [1, 2, 4, 8, 16]),
        (8, 1, [2, 4, 8, 16, 32]),
        (6, 1, [3, 6, 12, 24, 48]),
        (7, 1, [7, 14, 28, 56, 112]),
        (2048, 128, [512, 1024, 2048, 4096, 8192]),
        (200, 128, [200, 400, 800, 1600, 3200]),
    ],
)
def test_doublings(size: int, least: int, found: list[int]) -> None:
    assert doublings(size, least) == found


def test_a_map_is_made_of_training_steps_alone() -> None:
    """An evaluation between the steps is left out, where the plan has one."""
    found = studies.study("gpt2", gpu="24GB", target_batch=8, eval_batch=4)
    assert found.setup.evaluation is not None
    assert all(one.grid.setup.evaluation is None for one in found.maps)


# -- the frontier ------------------------------------------------------------------------------------------------------


def test_the_frontier_holds_every_split_and_mode_once() -> None:
    found = studied()
    goal = found.plan.goal
    setups = [point.candidate.setup for point in found.frontier]
    assert len(setups) == len(set(setups)) == len(list(goal.splits())) * len(goal.modes())
    assert {setup.global_batch_size for setup in setups} == {48}
    assert [point.candidate.setup for point in found.frontier if point.is_plan] == [found.setup]


def test_nothing_beats_what_is_on_the_line() -> None:
    """Neither in both; and what is off it is beaten or equalled by something on it."""

    def worth(point: Any) -> tuple[float, int]:
        return float(f"{point.candidate.step_time.total_s:.9g}"), point.candidate.memory.peak_process_bytes

    points = studied().frontier
    line = [worth(point) for point in points if point.is_undominated]
    assert 1 < len(line) < len(points)
    for point in points:
        time, memory = worth(point)
        beaten = any(t <= time and m <= memory and (t, m) != (time, memory) for t, m in line)
        assert not (point.is_undominated and beaten)
        assert point.is_undominated or any(t <= time and m <= memory for t, m in line)


def test_what_is_far_beyond_the_card_is_counted_and_not_drawn() -> None:
    points = document()["frontier"]
    usable = document()["plan"]["gpu"]["usable_bytes"]
    huge = {**points[0], "peak_process_bytes": 100 * usable, "fits": False, "is_plan": False}
    chart = draw_frontier([huge, *points], usable)
    far = 1 + sum(one["peak_process_bytes"] > 1.6 * usable for one in points)
    assert f"{far} that take far more" in chart.conclusion
    assert chart.figure.axes[0].get_ylim()[1] < 2 * usable / 2**30


# -- the schedule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "steps", "micro"), [(1, 1, 1), (1, 3, 2), (2, 2, 4), (3, 4, 1)])
def test_each_sample_of_a_step_is_worked_on_once(gpus: int, steps: int, micro: int) -> None:
    found = [n for gpu in range(gpus) for m in range(steps) for n in samples_of(gpu, m, gpus, micro)]
    assert sorted(found) == list(range(gpus * steps * micro))


@pytest.mark.parametrize(("gpus", "steps", "micro"), [(2, 2, 4), (3, 4, 1), (4, 1, 2)])
def test_samples_go_where_torch_sends_them(gpus: int, steps: int, micro: int) -> None:
    """A DataLoader with a DistributedSampler, for three optimizer steps' worth of samples."""
    data = pytest.importorskip("torch.utils.data")
    samples = range(3 * gpus * steps * micro)
    for gpu in range(gpus):
        sampler = data.DistributedSampler(samples, num_replicas=gpus, rank=gpu, shuffle=False)
        batches = list(data.DataLoader(samples, batch_size=micro, sampler=sampler))
        for number in range(steps):
            assert batches[number].tolist() == list(samples_of(gpu, number, gpus, micro))


def test_the_trainer_gives_the_same_samples_to_a_step() -> None:
    """Accelerate deals out whole micro-batches; all GPUs together have the same samples."""
    loader = pytest.importorskip("accelerate.data_loader")
    data = pytest.importorskip("torch.utils.data")
    gpus, steps, micro = 2, 3, 4
    num = gpus * steps * micro
    dealt: list[int] = []
    for gpu in range(gpus):
        batches = data.BatchSampler(data.SequentialSampler(range(2 * num)), micro, drop_last=False)
        shard = list(loader.BatchSamplerShard(batches, gpus, gpu))
        assert shard[1] == [micro * (gpus + gpu) + i for i in range(micro)]
        dealt += [sample for batch in shard[:steps] for sample in batch]
    assert sorted(dealt) == list(range(num))


def test_a_long_schedule_is_condensed() -> None:
    assert condensed(4, 4) == (0, 1, 2, 3)
    assert condensed(5, 4) == (0, 1, 4)
    found = schedule(Setup(micro_batch_size=4, gradient_accumulation_steps=32, data_parallel_size=8))
    assert (found.gpus, found.micro_steps, found.global_batch_size) == ((0, 1, 7), (0, 1, 31), 1024)
    step = schedule_document(found)
    assert equation_of(step) == "4 in a micro-batch x 32 micro-steps x 8 GPUs = 1,024"
    assert samples_text(step["shares"][0], step) == "0, 8 … 24"
    assert step["shares"][-1]["last"] == 1023
    assert "in the last micro-step alone" in said_of(step)


def test_a_single_gpu_averages_nothing() -> None:
    step = schedule_document(schedule(Setup(micro_batch_size=2, gradient_accumulation_steps=2)))
    assert [samples_text(one, step) for one in step["shares"]] == ["0, 1", "2, 3"]
    assert "average" not in said_of(step)


def test_the_document_is_plain_data() -> None:
    import json

    found = document()
    assert json.loads(json.dumps(found)) == found
    assert [one["activation_checkpointing"] for one in maps_document(studied().maps)] == [
        one["activation_checkpointing"] for one in found["maps"]
    ]


def test_a_page_of_a_model_known_from_traces_has_what_is_known() -> None:
    """Neither map nor growth nor frontier; the schedule is known all the same."""
    known = studied()
    bare = Study(plan=known.plan, origin=known.origin, accuracy=known.accuracy)
    page = render_plan_page(study_document(bare, plan_document(bare.plan), "memplan suggest"))
    assert "One optimizer step" in page
    for heading in ("What else fits", "How memory grows", "Memory against time"):
        assert heading not in page


def test_a_compiled_plan_says_which_end_is_drawn() -> None:
    found = studies.study("gpt2", gpu="24GB", target_batch=8, compile=True)
    document = study_document(found, plan_document(found.plan), "memplan suggest")
    assert render_plan_page(document).count("at the upper end of the range under torch.compile") == 2
