"""Errors, decisions and coefficients, worked out by hand."""

from __future__ import annotations

import pytest

from memplan import measuring
from memplan.calibration.accuracy import compare, distinct, errors_of, median, percentile, why_not
from memplan.calibration.bounds import bound
from memplan.calibration.decisions import Question, decide, questions
from memplan.calibration.fit import Rates, TooFewRecordsError, fit, fit_rates, halves
from memplan.calibration.prediction import Prediction
from memplan.specs.measurement import Card
from memplan.specs.values import replace
from memplan.steptime.roofline import Term
from tests.support.records import H200, measurement, steps

GIB = 2**30
TINY = "pythia-14m"


def trial(micro_batch: int = 1, **given):
    return measuring.make_trial(TINY, **{"micro_batch": micro_batch, "seq_len": 128, **given})


def without_a_formula(micro_batch: int):
    """What padding does to BERT is described nowhere."""
    return measuring.make_trial("bert-base-uncased", micro_batch=micro_batch, seq_len=128, padding=True, limit="8GB")


def test_an_error_is_signed_and_below_zero_where_too_little_was_predicted():
    record = measurement(trial(), steps=steps(1000, 2000, 4000), step_times_s=(3.0, 1.0, 2.0))
    found = compare([record], lambda _: Prediction(allocated=900, reserved=2200, process=4000, step_time=1.0))
    assert {point.quantity: point.error for point in found.points} == {
        "allocated": -0.1,
        "reserved": 0.1,
        "process": 0.0,
        "step_time": -0.5,
    }
    allocated = next(one for one in found.errors() if one.quantity == "allocated" and one.group == "all")
    assert allocated.worst_under is not None
    assert allocated.worst_under.error == -0.1
    assert allocated.worst_over is None


def test_the_first_step_is_no_steady_state():
    first = steps(9999, 9999, 9999)[0]
    record = measurement(trial(), steps=(first, *steps(1000, 2000, 3000)[1:]))
    assert (record.peak_allocated_bytes, record.peak_reserved_bytes, record.peak_process_bytes) == (1000, 2000, 3000)


def test_quantiles_take_values_that_were_seen():
    values = [-0.3, -0.1, 0.0, 0.2]
    assert median(values) == -0.05
    assert median(values[:3]) == -0.1
    assert percentile(values, 0.9) == 0.2
    assert percentile(values, 0.5) == -0.1
    assert percentile([0.1 * n for n in range(100)], 0.99) == pytest.approx(9.8)


def test_percentiles_are_of_signed_errors_and_of_their_sizes():
    records = [measurement(trial(n + 1), steps=steps(1000, None, None)) for n in range(10)]
    predicted = {record.id: 1000 + 10 * (n - 5) for n, record in enumerate(records)}
    found = compare(records, lambda record: Prediction(allocated=predicted[record.id]))
    one = errors_of("cuda", "allocated", "all", "all", found.points)
    assert (one.median, one.p90, one.p99) == (pytest.approx(-0.005), 0.03, 0.04)
    assert (one.abs_p90, one.abs_p99) == (0.04, 0.05)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"outcome": "out-of-memory"}, "counts for the decisions"),
        ({"outcome": "timed-out"}, "timed-out"),
        ({"steps": steps(1, 1, 1)[:1]}, "no second step"),
    ],
)
def test_a_record_without_a_steady_state_says_so(given, reason):
    assert reason in why_not(measurement(trial(), **given))


def test_dropout_on_a_cpu_is_not_compared():
    cpu = Card(device="cpu", name="CPU", total_bytes=1)
    gpt2 = measuring.make_trial("gpt2", seq_len=64)
    assert "dropout" in why_not(measurement(gpt2, card=cpu))
    assert not why_not(measurement(measuring.make_trial("gpt2", seq_len=64, dropout=0.0), card=cpu))


def test_a_record_that_the_formula_reproduces_has_no_error():
    record = measurement(trial(4))
    found = compare([record], measuring.prediction_for)
    assert [point.error for point in found.points] == [0.0, 0.0, 0.0]
    assert not found.left_out


def test_a_record_without_a_prediction_is_named():
    record = measurement(without_a_formula(4), steps=steps(1, 1, 1))
    found = compare([record], measuring.prediction_for)
    assert not found.points
    assert found.left_out[0].reason == "What padding adds is not modelled for bert."


# -- decisions ---------------------------------------------------------------------------------------------------------


def question(survivors, failures, target=32):
    example = measurement(trial(limit="8GB"), steps=steps(1, 1, 1))
    return Question(example, target, tuple(survivors), tuple(failures))


@pytest.mark.parametrize(
    ("survivors", "failures", "recommended", "verdict"),
    [
        ([4], [8], 4, "true_maximum"),
        ([4], [8], 2, "one_below"),
        ([4], [8], 1, "further_below"),
        ([4], [8], 8, "too_large"),
        ([4], [8], 16, "too_large"),
        ([4], [], 4, "undecided"),
        ([], [8], 4, "undecided"),
        ([4], [16], 4, "undecided"),
        ([8], [16], 4, "one_below"),
        ([32], [], 32, "true_maximum"),
        ([32], [], 16, "one_below"),
        ([32], [], 8, "further_below"),
        ([], [1], None, "true_maximum"),
        ([1], [2], None, "one_below"),
        ([2], [4], None, "further_below"),
        ([], [2], None, "undecided"),
    ],
)
def test_what_becomes_of_a_recommendation(survivors, failures, recommended, verdict):
    """Of a batch of 32 micro-batches can be 1, 2, 4, 8, 16 and 32."""
    assert decide(question(survivors, failures), recommended).verdict == verdict


def test_trials_that_differ_in_the_micro_batch_alone_are_one_question():
    plan, larger = trial(4, limit="8GB", accumulation=8), trial(8, limit="8GB", accumulation=4)
    other = trial(8, limit="12GB", accumulation=4)
    records = [
        measurement(replace(plan, target_batch=32, role="plan"), steps=steps(1, 1, 1)),
        measurement(replace(larger, target_batch=32, role="larger"), outcome="out-of-memory"),
        measurement(replace(other, target_batch=32, role="plan"), steps=steps(1, 1, 1)),
        measurement(trial(2), steps=steps(1, 1, 1)),
        measurement(replace(plan, target_batch=32), outcome="timed-out"),
    ]
    first, second = questions(records)
    assert (first.survivors, first.failures) == ((4,), (8,))
    assert (second.survivors, second.failures) == ((8,), ())


def test_trials_without_a_formula_are_no_recommendation():
    """That one of two micro-batches failed says nothing about a plan that nobody can make."""
    from memplan.measuring.validating import decisions_of

    records = [
        measurement(without_a_formula(4), steps=steps(1, 1, 1)),
        measurement(without_a_formula(8), outcome="out-of-memory"),
    ]
    assert decisions_of(records) == ()


def test_out_of_memory_while_others_held_the_card_is_no_answer():
    crowded = H200._replace(num_other_processes=1)
    record = measurement(trial(limit="8GB"), outcome="out-of-memory", card=crowded)
    assert record.survived is None
    assert questions([record]) == ()


def test_bytes_that_others_held_make_out_of_memory_no_answer():
    held = H200._replace(num_other_processes=0, other_bytes=50 * GIB)
    assert measurement(trial(limit="8GB"), outcome="out-of-memory", card=held).survived is None
    idle = H200._replace(num_other_processes=0, other_bytes=GIB)
    assert measurement(trial(limit="8GB"), outcome="out-of-memory", card=idle).survived is False


def test_a_run_that_failed_against_the_prediction_is_named():
    fits, too_large = trial(1, limit="8GB"), trial(4096, limit="8GB", seq_len=2048)
    reasons = [
        one.reason
        for one in compare(
            [measurement(one, outcome="out-of-memory") for one in (fits, too_large)], measuring.prediction_for
        ).left_out
    ]
    assert "says that it fits" in reasons[0]
    assert "as predicted" in reasons[1]


def test_a_record_that_answered_two_questions_is_one_run():
    plain = measurement(trial(limit="8GB"))
    again = replace(plain, trial=replace(plain.trial, role="plan", target_batch=8))
    assert plain.id == again.id
    assert distinct([plain, again, plain]) == [again]


# -- what a card teaches -----------------------------------------------------------------------------------------------


def synthetic(num: int, *, context: int, factor: float = 1.0):
    """Records whose process takes `context` beside what was reserved, and all of it `factor` times as much."""
    found = []
    for n in range(num):
        one = trial(1 + n % 16, seq_len=64 * (1 + n % 7), accumulation=1 + n // 112)
        plain = measurement(one)
        reserved = int((plain.peak_reserved_bytes or 0) * factor)
        found.append(replace(plain, steps=steps(plain.peak_allocated_bytes or 0, reserved, reserved + context)))
    return found


def predict_with(record, calibration):
    gpu = measuring.gpu_of(record.card)
    memory = measuring.predict(record.trial, gpu).memory
    context = memory.context_bytes if calibration.context_bytes is None else calibration.context_bytes
    return Prediction(
        allocated=memory.peak_allocated_bytes,
        reserved=memory.peak_reserved_bytes + memory.workspace_bytes,
        process=memory.peak_reserved_bytes + memory.workspace_bytes + context,
    )


def test_the_context_is_learnt_and_then_the_process_is_right():
    records = synthetic(60, context=700_000_000)
    found = fit(records, "h200", predict_with, lambda record: None)
    assert found.context_bytes == 700_000_000
    assert found.num_fitted + len(found.scores) == 60
    assert set(found.scores) == {0.0}
    assert (found.flops_fraction, found.launch_s) == (None, None)


def test_scores_come_from_records_that_gave_no_coefficient():
    records = synthetic(60, context=700_000_000)
    fitted, scored = halves(records)
    assert {one.id for one in fitted}.isdisjoint(one.id for one in scored)
    assert min(len(fitted), len(scored)) >= 20
    shuffled = halves(records[::-1])
    assert {one.id for one in shuffled[0]} == {one.id for one in fitted}


def test_what_the_allocator_holds_beyond_the_prediction_is_in_the_scores():
    found = fit(synthetic(60, context=700_000_000, factor=1.5), "h200", predict_with, lambda record: None)
    assert found.scores[0] > 0
    assert found.regimes[0].name == "free"
    assert found.regimes[0].reserved_over_predicted == pytest.approx(1.5, abs=1e-6)


def test_runs_that_failed_against_the_prediction_widen_the_bound_to_none():
    """7 survivors and as many failures that the prediction says fit: no finite bound for more than half of the runs."""
    records = synthetic(40, context=700_000_000)
    failed = [
        replace(one, outcome="out-of-memory", steps=(), trial=replace(one.trial, limit_bytes=40 * 10**9))
        for one in records
    ]
    found = fit([*records, *failed], "h200", predict_with, lambda record: None)
    assert found.num_exceeded > 0
    assert len(found.all_scores) == len(found.scores) + found.num_exceeded
    bounded = bound(found.all_scores, 0.9)
    assert not bounded.is_attained
    assert bounded.confidence == len(found.scores) / (len(found.all_scores) + 1)


def test_a_failure_outweighs_a_repetition_that_survived():
    records = synthetic(20, context=700_000_000)
    failed = [
        replace(one, outcome="out-of-memory", steps=(), measured_at="2026-11-23T10:00:00Z") for one in records[:10]
    ]
    for order in ([*records, *failed], [*failed, *records]):
        found = fit(order, "h200", predict_with, lambda record: None)
        assert found.num_fitted + len(found.scores) == 10


def test_who_is_scored_is_known_before_the_run():
    """A survivor that was predicted not to fit says nothing about runs that are."""
    records = synthetic(40, context=700_000_000)
    lucky = [replace(one, trial=replace(one.trial, limit_bytes=10**8)) for one in records]
    alone = fit(records, "h200", predict_with, lambda record: None)
    found = fit([*records, *lucky], "h200", predict_with, lambda record: None)
    assert len(found.scores) == len(alone.scores)


def test_a_trial_is_predicted_with_the_allocator_that_it_runs_with():
    """Where the default does not fit and expandable segments would: the trial says which it has."""
    gpu = measuring.gpu_of(H200, 24 * 10**9, "24GB")
    one = measuring.make_trial("qwen2.5-0.5b", micro_batch=6, seq_len=1024, limit="24GB")
    default = measuring.predict(one, gpu).memory
    expandable = measuring.predict(replace(one, alloc_conf="expandable_segments:True"), gpu).memory
    assert default.alloc_conf == ""
    assert expandable.alloc_conf == "expandable_segments:True"
    assert expandable.peak_process_bytes <= 24 * 10**9 < default.peak_process_bytes


def test_repetitions_are_one_run():
    records = synthetic(20, context=700_000_000)
    later = [replace(one, measured_at="2026-12-01T10:00:00Z") for one in records]
    found = fit([*records, *later, *records], "h200", predict_with, lambda record: None)
    assert found.num_fitted + len(found.scores) == 20


def test_one_record_teaches_nothing():
    with pytest.raises(TooFewRecordsError, match="complete measurements: 1;"):
        fit(synthetic(1, context=1), "h200", predict_with, lambda record: None)


def test_rates_are_found_again():
    """Times made of known rates: 45 % of the FLOP/s, 80 % of the bandwidth, 6 us an operator."""
    truth = Rates(0.45, 0.80, 6e-6)
    terms_of, records = {}, []
    for n, record in enumerate(synthetic(40, context=1)):
        scale = 10.0 ** (n % 5 - 6)
        terms = (
            Term(scale, 0.1 * scale, 1 + n % 3),
            Term(0.1 * scale, scale, 1 + n % 4),
            Term(0.0, scale, 2, launches=False),
        )
        seconds = sum(
            t.num
            * max(
                t.computing_s / truth.flops_fraction, t.moving_s / truth.bandwidth_fraction, t.launches * truth.launch_s
            )
            for t in terms
        )
        records.append(replace(record, step_times_s=(seconds,)))
        terms_of[record.id] = terms
    found = fit_rates(records, lambda record: terms_of[record.id])
    assert found.flops_fraction == pytest.approx(0.45, rel=0.01)
    assert found.bandwidth_fraction == pytest.approx(0.80, rel=0.01)
    assert found.launch_s == pytest.approx(6e-6, rel=0.01)


def test_the_terms_of_a_step_add_up_to_its_time():
    gpu = measuring.gpu_of(H200)
    for checkpointing in ("none", "full", "selective", "every-2"):
        one = trial(4, seq_len=512, accumulation=3, checkpointing=checkpointing, precision="bf16-mixed")
        estimator = measuring.estimator_of(one, gpu)
        whole = sum(term.num * max(term.computing_s, term.moving_s) for term in estimator.time_terms(one.setup))
        assert whole == pytest.approx(estimator.step_time(one.setup).total_s, rel=1e-12)


@pytest.mark.slow
def test_a_calibration_of_real_records_times_their_steps(tmp_path, monkeypatch):
    """End to end: records on disk, `calibrate`, and a prediction with what was learnt."""
    from memplan.catalog.calibrations import write_calibration
    from memplan.catalog.measurements import append_measurement

    truth = Rates(0.5, 0.7, 2e-6)
    path = str(tmp_path / "records" / "nvidia-h200.jsonl")
    for record in synthetic(24, context=650_000_000):
        gpu = measuring.gpu_of(record.card)
        slower = replace(
            gpu,
            flops_per_s={d: truth.flops_fraction * rate for d, rate in gpu.flops_per_s.items()},
            memory_bandwidth_bytes_per_s=truth.bandwidth_fraction * gpu.memory_bandwidth_bytes_per_s,
            launch_s=truth.launch_s,
        )
        seconds = measuring.estimator_of(record.trial, slower).step_time(record.trial.setup).total_s
        append_measurement(path, replace(record, step_times_s=(seconds,)))
    (found,) = measuring.calibrate(str(tmp_path / "records"))
    assert found.gpu == "h200"
    assert found.context_bytes == 650_000_000
    monkeypatch.setenv("MEMPLAN_DATA_DIR", str(tmp_path))
    write_calibration(str(tmp_path / "calibration"), found)
    validation = measuring.validate(str(tmp_path / "records"), calibrated=True)
    worst = {
        one.quantity: max(
            abs(one.worst_over.error if one.worst_over else 0), abs(one.worst_under.error if one.worst_under else 0)
        )
        for one in validation.accuracy.errors()
        if one.group == "all"
    }
    assert len(validation.accuracy.left_out) == found.num_fitted, "what a calibration was made of does not prove it"
    assert worst["process"] == 0
    assert worst["step_time"] < 0.02  # the grid's step


def test_no_records_on_a_gpu_is_a_fault_with_a_cure(tmp_path):
    from memplan.errors import MemplanError

    with pytest.raises(MemplanError, match="no measurements on a GPU") as fault:
        measuring.calibrate(str(tmp_path))
    assert "memplan probe" in fault.value.cure


def test_a_capped_card_is_a_smaller_one_with_the_same_rates():
    gpu = measuring.gpu_of(H200, 24 * 10**9, "24GB")
    whole = measuring.gpu_of(H200)
    assert gpu.usable_bytes == 24 * 10**9
    assert gpu.flops_per_s == whole.flops_per_s
    assert (whole.name, gpu.name) == ("h200", "24GB")
