"""Many trials: the search for the largest micro-batch, what is known, the time that is left, plans put to the test."""

from __future__ import annotations

import json
import os
from functools import cache
from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan import measuring
from memplan.catalog.measurements import append_measurement, read_measurements
from memplan.errors import MemplanError, UsageError
from memplan.probes.launch import Place
from memplan.probes.session import Budget, Session, largest_that_survives, with_micro_batch
from memplan.specs.adapter import Lora
from memplan.specs.measurement import Card, Measurement, Trial
from memplan.specs.training import LARGEST_COUNT, Setup, divisors
from memplan.specs.values import replace

# ---------------------------------------------------------------------------------------------------------- the search


class Asked:
    """A device on which micro-batches up to `largest` survive; None where the trial in `unanswered` is reached."""

    def __init__(self, largest, unanswered=None):
        self.largest = largest
        self.unanswered = unanswered
        self.batches = []

    def __call__(self, micro_batch_size):
        if len(self.batches) == self.unanswered:
            return None
        self.batches.append(micro_batch_size)
        return micro_batch_size <= self.largest


searches = st.one_of(
    st.tuples(st.integers(0, 40), st.integers(-3, 50), st.integers(1, 40)),
    st.tuples(st.integers(0, 10**10), st.integers(-(10**9), 10**10), st.just(LARGEST_COUNT)),
    st.integers(0, 5000).flatmap(lambda n: st.tuples(st.just(n), st.integers(n - 20, n + 20), st.just(LARGEST_COUNT))),
)


@given(searches)
def test_the_search_finds_the_largest_survivor_and_its_neighbour(search):
    """Whatever the truth, the start and the range.  At a distance d of the start: 2 log2(d + 1) + 3 trials at most."""
    truth, start, most = search
    asked = Asked(truth)
    found = largest_that_survives(asked, start, most)
    expected = min(truth, most)
    assert found.micro_batch_size == (expected or None)
    assert found.complete
    assert found.tried == tuple((b, b <= truth) for b in asked.batches)
    assert len(set(asked.batches)) == len(asked.batches)
    assert all(1 <= b <= most for b in asked.batches)
    assert {b for b in (expected, expected + 1) if 1 <= b <= most} <= set(asked.batches)
    distance = abs(min(max(start, 1), most) - expected)
    assert len(asked.batches) <= 2 * log2(distance + 1) + 3


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_right_prediction_takes_two_trials_and_one_at_the_border(truth, most):
    truth = min(truth, most)
    asked = Asked(truth)
    assert largest_that_survives(asked, truth, most).micro_batch_size == truth
    assert asked.batches == ([truth] if truth == most else [truth, truth + 1])


def test_where_nothing_survives_one_trial_of_one_sequence_says_so():
    asked = Asked(0)
    assert largest_that_survives(asked, 1) == (None, ((1, False),), True)
    assert asked.batches == [1]


@given(searches, st.integers(0, 12))
def test_a_trial_without_an_answer_ends_the_search(search, unanswered):
    """What was known by then is the answer, and it says that there might be more."""
    truth, start, most = search
    whole, asked = Asked(truth), Asked(truth, unanswered)
    largest_that_survives(whole, start, most)
    found = largest_that_survives(asked, start, most)
    assert asked.batches == whole.batches[:unanswered]
    assert found.complete == (len(whole.batches) <= unanswered)
    assert found.tried == tuple((b, b <= truth) for b in asked.batches)
    assert found.micro_batch_size == max((b for b in asked.batches if b <= truth), default=None)


# --------------------------------------------------------------------------------------------------------- the session

CARD = Card(device="cuda", name="NVIDIA H200", total_bytes=150_000_000_000, compute_capability="9.0", driver="575.1")
VERSIONS = {"torch": "2.13.0", "cuda": "12.9", "transformers": "5.23.0", "peft": "0.21.2", "memplan-probe": "1"}
PLACE = Place(CARD, VERSIONS)
TRIAL = Trial(
    model="tiny", config={"model_type": "llama", "hidden_size": 64}, setup=Setup(), limit="8GB", limit_bytes=8
)


class Device:
    """Answers trials in turn, each in `seconds` of a clock that it turns."""

    def __init__(self, *outcomes, seconds=0.0, place=PLACE):
        self.outcomes = list(outcomes)
        self.seconds = seconds
        self.place = place
        self.time = 1000.0
        self.trials = []

    def clock(self):
        return self.time

    def measure(self, trial):
        self.trials.append(trial)
        self.time += self.seconds
        outcome = self.outcomes.pop(0) if self.outcomes else "done"
        card, versions = self.place
        return Measurement(trial=trial, outcome=outcome, measured_at="2026-11-22", card=card, versions=versions)

    def session(self, **given):
        return Session(self.place, self.measure, **given)


def test_a_known_trial_is_not_measured_again():
    device = Device("out-of-memory")
    first = device.session().run(TRIAL)
    later = device.session(known=[first])
    assert later.run(replace(TRIAL)) is first
    assert len(device.trials) == 1
    assert (later.measured, later.seen, later.num_known, later.num_left) == ([], [first], 1, 0)


def test_a_trial_is_measured_once_in_a_session():
    device = Device()
    session = device.session()
    assert session.run(TRIAL) is session.run(TRIAL)
    assert (len(device.trials), session.num_known) == (1, 1)


def test_again_measures_what_is_known():
    device = Device()
    first = device.session().run(TRIAL)
    session = device.session(known=[first], again=True)
    assert session.run(TRIAL) is not first
    assert (len(device.trials), session.num_known) == (2, 0)


def test_what_a_plan_is_for_does_not_make_it_another_trial():
    """Neither what the limit was called."""
    device = Device()
    first = device.session().run(TRIAL)
    session = device.session(known=[first])
    again = session.run(replace(TRIAL, target_batch=32, role="plan", limit="8e9"))
    assert replace(again, trial=TRIAL) == first


OTHER_TRIALS = {
    "model": replace(TRIAL, model="other"),
    "config": replace(TRIAL, config={**TRIAL.config, "hidden_size": 128}),
    "limit": replace(TRIAL, limit_bytes=9),
    "no limit": replace(TRIAL, limit_bytes=None),
    **{
        name: replace(TRIAL, setup=Setup(**{name: value}))
        for name, value in {
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "data_parallel_size": 2,
            "seq_len": 512,
            "precision": "fp32",
            "optimizer": "sgd",
            "activation_checkpointing": "full",
            "attention": "eager",
            "dropout": 0.0,
            "padding": True,
            "lora": Lora(rank=8),
        }.items()
    },
}


@pytest.mark.parametrize("name", OTHER_TRIALS)
def test_another_trial_is_measured(name):
    device = Device()
    first = device.session().run(TRIAL)
    assert device.session(known=[first]).run(OTHER_TRIALS[name]) is not first
    assert len(device.trials) == 2


@pytest.mark.parametrize(
    "place",
    [
        *[Place(CARD, {**VERSIONS, name: "0"}) for name in ("torch", "cuda", "transformers", "memplan-probe")],
        Place(CARD, {name: version for name, version in VERSIONS.items() if name != "cuda"}),
        Place(CARD._replace(name="NVIDIA A100"), VERSIONS),
        Place(CARD._replace(driver="576.0"), VERSIONS),
        Place(CARD._replace(device="cpu"), VERSIONS),
    ],
)
def test_elsewhere_the_same_trial_is_measured_again(place):
    first = Device().session().run(TRIAL)
    device = Device(place=place)
    assert device.session(known=[first]).run(TRIAL) is not first


def test_without_a_limit_the_size_of_the_card_is_part_of_the_trial():
    """Once: one name, two sizes (slices of MIG, ECC switched off) are one place, whose answers are then wrong."""
    whole = replace(TRIAL, limit="", limit_bytes=None)
    first = Device("out-of-memory").session().run(whole)
    device = Device(place=Place(CARD._replace(total_bytes=2 * CARD.total_bytes), VERSIONS))
    assert device.session(known=[first]).run(whole).survived


@pytest.mark.parametrize(
    ("setup", "library"),
    [
        (Setup(lora=Lora(rank=8)), "peft"),
        # Once: bitsandbytes, which makes the states, is in no identity.
        (Setup(optimizer="adamw-8bit"), "bitsandbytes"),
    ],
)
def test_libraries_count_where_they_take_part(setup, library):
    plain, special = TRIAL, replace(TRIAL, setup=setup)
    before = Device(place=Place(CARD, {**VERSIONS, library: "1"}))
    known = [before.session().run(plain), before.session().run(special)]
    device = Device(place=Place(CARD, {**VERSIONS, library: "2"}))
    session = device.session(known=known)
    session.run(plain)
    session.run(special)
    assert device.trials == [special]


@pytest.mark.parametrize("outcome", ["timed-out", "killed", "failed"])
def test_a_failure_is_kept_and_tried_again(outcome):
    """It is no answer: neither to a later session nor to this one."""
    saved = []
    device = Device(outcome, outcome)
    session = device.session(save=saved.append)
    assert session.run(TRIAL).survived is None
    assert session.run(TRIAL).survived is None
    assert session.run(TRIAL).survived is True
    assert [one.outcome for one in saved] == [outcome, outcome, "done"]
    later = Device()
    later.session(known=saved[:2]).run(TRIAL)
    assert len(later.trials) == 1


def test_of_several_records_an_answer_counts_whatever_came_after():
    device = Device("out-of-memory", "failed")
    answer, failure = (device.session().run(TRIAL) for _ in range(2))
    session = device.session(known=[answer, failure])
    assert session.run(TRIAL) is answer


def test_each_measurement_is_saved_at_once():
    saved = []
    device = Device()
    session = device.session(save=saved.append)
    for n in (1, 2, 3):
        session.run(with_micro_batch(TRIAL, n))
        assert [one.trial.setup.micro_batch_size for one in saved] == list(range(1, n + 1))
    session.run(TRIAL)
    assert len(saved) == 3


def test_a_measurement_that_cannot_be_saved_loses_none_of_the_others():
    saved = []

    def save(found):
        if found.trial.setup.micro_batch_size == 2:
            raise MemplanError("The disk is full.")
        saved.append(found)

    session = Device().session(save=save)
    session.run(with_micro_batch(TRIAL, 1))
    with pytest.raises(MemplanError, match="full"):
        session.run(with_micro_batch(TRIAL, 2))
    assert [one.trial.setup.micro_batch_size for one in saved] == [1]
    assert [one.trial.setup.micro_batch_size for one in session.measured] == [1, 2]


def test_who_listens_is_told_what_is_measured_and_not_what_is_known():
    told = []
    session = Device().session(notify=told.append)
    session.run(TRIAL)
    session.run(TRIAL)
    assert told == ["tiny, 1 x 1,024, bf16, at 8GB"]


# ------------------------------------------------------------------------------------------------------------ the time


def test_a_budget_runs_down_and_not_below_nothing():
    device = Device()
    budget = Budget(10, device.clock)
    assert (budget.left_s, budget.is_over) == (10, False)
    device.time += 9.5
    assert (budget.left_s, budget.is_over) == (0.5, False)
    device.time += 0.5
    assert (budget.left_s, budget.is_over) == (0, True)
    device.time += 100
    assert budget.left_s == 0
    assert not Budget(None, device.clock).is_over
    assert Budget(0, device.clock).is_over


def test_nothing_begins_when_the_time_is_over():
    """4 s each, 10 s in all: the third begins at 8 s and may end, the fourth is left; what is known is still said."""
    device = Device(seconds=4)
    session = device.session(budget=Budget(10, device.clock))
    found = [session.run(with_micro_batch(TRIAL, n)) for n in (1, 2, 3, 4, 5)]
    assert [one is None for one in found] == [False, False, False, True, True]
    assert len(device.trials) == 3
    assert session.num_left == 2
    assert session.run(with_micro_batch(TRIAL, 3)) is found[2]


@pytest.mark.parametrize("outcome", ["timed-out", "killed", "failed"])
def test_a_trial_that_the_budget_cuts_off_is_neither_saved_nor_a_failure(outcome):
    saved = []
    device = Device(outcome, seconds=11)
    session = device.session(budget=Budget(10, device.clock), save=saved.append)
    assert session.run(TRIAL) is None
    assert (saved, session.measured, session.seen, session.num_left) == ([], [], [], 1)


@pytest.mark.parametrize("outcome", ["done", "out-of-memory"])
def test_an_answer_counts_even_if_the_time_is_over_with_it(outcome):
    saved = []
    device = Device(outcome, seconds=11)
    session = device.session(budget=Budget(10, device.clock), save=saved.append)
    found = session.run(TRIAL)
    assert (saved, session.measured, session.num_left) == ([found], [found], 0)


def test_a_search_ends_with_the_time_and_says_so():
    device = Device("done", "done", "done", seconds=4)
    session = device.session(budget=Budget(10, device.clock))
    assert session.find_max(TRIAL, 8) == (11, ((8, True), (9, True), (11, True)), False)


def test_a_search_ends_with_a_failure_and_says_so():
    session = Device("out-of-memory", "done", "failed").session()
    assert session.find_max(TRIAL, 8, most=8) == (7, ((8, False), (7, True)), True)
    session = Device("out-of-memory", "failed").session()
    assert session.find_max(TRIAL, 8) == (None, ((8, False),), False)


def test_a_search_goes_on_from_what_is_known():
    device = Device(*["done", "out-of-memory"])
    session = device.session()
    first = session.find_max(TRIAL, 8)
    assert device.session(known=session.measured).find_max(TRIAL, 8) == first
    assert [trial.setup.micro_batch_size for trial in device.trials] == [8, 9]


# ------------------------------------------------------------------------------------------------------ the whole probe

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


@cache
def process_bytes(trial):
    """What the formula says; a capped card of this size."""
    gpu = measuring.gpu_of(CARD, trial.limit_bytes, trial.limit)
    return measuring.predict(trial, gpu).memory.peak_process_bytes


class FakeLauncher:
    """A card on which the formula is right; `worse`: bytes that it leaves out."""

    def __init__(self, card=CARD, worse=0):
        self.card = card
        self.worse = worse
        self.time_limit_s = 0.0
        self.trials = []
        self.is_closed = False

    def describe(self):
        return Place(self.card, VERSIONS)

    def close(self):
        self.is_closed = True

    def survives(self, trial):
        return process_bytes(trial) + self.worse <= trial.limit_bytes

    def measure(self, trial, *, snapshot=None):
        self.trials.append(trial)
        outcome = "done" if self.survives(trial) else "out-of-memory"
        return Measurement(
            trial=trial, outcome=outcome, measured_at="2026-11-22T10:00:00Z", card=self.card, versions=VERSIONS
        )


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return measuring.make_trial(path, limit="8GB", seq_len=1024)


def true_maximum(launcher, trial):
    return max(b for b in range(1, 40) if launcher.survives(with_micro_batch(trial, b)))


def test_where_the_formula_is_right_two_trials_find_the_largest_micro_batch(trial):
    launcher = FakeLauncher()
    truth = true_maximum(launcher, trial)
    with measuring.Probe(launcher=launcher) as probing:
        assert probing.find_max(trial) == (truth, ((truth, True), (truth + 1, False)), True)
    assert launcher.is_closed


@pytest.mark.parametrize("worse", [-(3 * 10**9), 2 * 10**9, 8 * 10**9])
def test_where_the_formula_is_wrong_the_search_finds_the_truth(trial, worse):
    launcher = FakeLauncher(worse=worse)
    survivors = [b for b in range(1, 40) if launcher.survives(with_micro_batch(trial, b))]
    with measuring.Probe(launcher=launcher) as probing:
        found = probing.find_max(trial)
    assert (found.micro_batch_size, found.complete) == (max(survivors, default=None), True)


@pytest.mark.parametrize("target", [1, 8, 30, 32, 33, 96])
def test_the_plan_for_a_batch_is_tested_and_so_is_the_next_larger_micro_batch(trial, target):
    launcher = FakeLauncher()
    with measuring.Probe(launcher=launcher) as probing:
        decision = probing.decide(trial, target)
        best = measuring.plan_of(trial, probing.gpu(trial), target, checkpointing=None)
        setup, conf = best.setup, best.memory.alloc_conf
    tested = launcher.trials[0]
    assert tested == replace(trial, setup=setup, target_batch=target, role="plan", alloc_conf=conf)
    assert tested.setup.global_batch_size == target
    assert (decision.target_batch, decision.plan.trial, decision.plan.outcome) == (target, tested, "done")
    above = [micro for micro in divisors(target) if micro > setup.micro_batch_size]
    assert len(launcher.trials) == 1 + bool(above)
    if not above:
        assert decision.larger is None
        return
    larger = decision.larger.trial
    assert larger.role == "larger"
    assert larger.target_batch == target
    assert larger.setup.micro_batch_size == above[0]
    assert larger.setup.global_batch_size == target
    assert replace(larger.setup, micro_batch_size=1, gradient_accumulation_steps=1) == replace(
        setup, micro_batch_size=1, gradient_accumulation_steps=1
    )
    assert decision.larger.survived == launcher.survives(larger)


def test_a_plan_with_checkpointing_that_was_asked_for_has_it(trial):
    launcher = FakeLauncher()
    with measuring.Probe(launcher=launcher) as probing:
        probing.decide(trial, 64, checkpointing="full")
    assert [one.setup.activation_checkpointing for one in launcher.trials] == ["full", "full"]


def test_where_nothing_fits_nothing_is_measured(trial):
    small = replace(trial, limit_bytes=600_000_000, limit="600MB")
    launcher = FakeLauncher()
    with measuring.Probe(launcher=launcher) as probing:
        assert probing.decide(small, 32) == (32, None, None)
    assert launcher.trials == []


def test_without_time_a_plan_has_no_answer(trial):
    launcher = FakeLauncher()
    with measuring.Probe(launcher=launcher, time_budget_s=0.0) as probing:
        assert probing.decide(trial, 32) == (32, None, None)
        assert probing.session.num_left == 2
    assert launcher.trials == []


def test_what_was_decided_is_in_the_records_with_its_role_and_need_not_be_measured_again(trial, tmp_path):
    records = str(tmp_path / "records")
    with measuring.Probe(launcher=FakeLauncher(), records=records) as probing:
        first = probing.decide(trial, 32)
    found = read_measurements(records)
    assert found.measurements == (first.plan, first.larger)
    assert [(one.trial.role, one.trial.target_batch) for one in found.measurements] == [("plan", 32), ("larger", 32)]
    launcher = FakeLauncher()
    with measuring.Probe(launcher=launcher, records=records) as probing:
        assert probing.decide(trial, 32) == first
        assert probing.session.num_known == 2
    assert launcher.trials == []


def test_a_decision_says_what_was_decided_even_if_its_trials_were_known(trial, tmp_path):
    """Once: roles are those of the record that was found, and this one has none: `role` is not in the identity.

    Whoever looks for decisions in the records (by `role` or `target_batch`) does not find this one.
    """
    records = str(tmp_path / "records")
    with measuring.Probe(launcher=FakeLauncher(), records=records) as probing:
        best = measuring.plan_of(trial, probing.gpu(trial), 32, checkpointing=None)
        setup, conf = best.setup, best.memory.alloc_conf
        probing.run(replace(trial, setup=setup, alloc_conf=conf))
        decision = probing.decide(trial, 32)
    assert (decision.plan.trial.role, decision.plan.trial.target_batch) == ("plan", 32)


def test_the_time_of_a_trial_is_bounded_by_its_limit_and_by_what_is_left(trial):
    launcher = FakeLauncher()
    with measuring.Probe(launcher=launcher, time_limit_s=30.0, time_budget_s=1000.0) as probing:
        probing.run(trial)
    assert launcher.time_limit_s == 30
    with measuring.Probe(launcher=launcher, time_limit_s=30.0, time_budget_s=20.0) as probing:
        probing.run(trial)
    assert 0 < launcher.time_limit_s <= 20


def test_bad_lines_are_reported_and_the_good_ones_count(trial, tmp_path):
    with measuring.Probe(launcher=FakeLauncher(), records=str(tmp_path)) as probing:
        probing.run(trial)
    path = tmp_path / "nvidia-h200.jsonl"
    path.write_bytes(b"{cut\n" + path.read_bytes())
    launcher = FakeLauncher()
    with measuring.Probe(launcher=launcher, records=str(tmp_path)) as probing:
        assert [(bad.path, bad.number) for bad in probing.bad_lines] == [(str(path), 1)]
        probing.run(trial)
    assert launcher.trials == []


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a file that exists and cannot be read, of Linux")
def test_a_probe_whose_records_cannot_be_read_leaves_nothing_running(tmp_path):
    (tmp_path / "nvidia-h200.jsonl").symlink_to("/proc/self/mem")
    launcher = FakeLauncher()
    with pytest.raises(MemplanError, match=r"could be written|cannot be read"):
        measuring.Probe(launcher=launcher, records=str(tmp_path))
    assert launcher.is_closed


def test_ranks_of_one_run_measure_together_whatever_is_known(trial, tmp_path):
    """One that knows the answer would leave the others waiting."""
    both = replace(trial, setup=replace(trial.setup, data_parallel_size=2))
    launcher = FakeLauncher()
    known = launcher.measure(both)
    append_measurement(str(tmp_path / "nvidia-h200.jsonl"), known)
    with measuring.Probe(launcher=launcher, records=str(tmp_path), ranks=(1, 2)) as probing:
        assert probing.run(both) is not known
    assert len(launcher.trials) == 2


def test_a_cpu_has_no_largest_micro_batch_and_no_plan(trial):
    launcher = FakeLauncher(Card(device="cpu", name="CPU", total_bytes=1))
    with measuring.Probe(launcher=launcher, device="cpu") as probing:
        for question in (lambda: probing.find_max(trial), lambda: probing.decide(trial, 32)):
            with pytest.raises(UsageError) as fault:
                question()
            assert fault.value.cure
    assert launcher.trials == []


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, (1, 2)),
        ({"RANK": "1"}, (0, 1)),
        ({"WORLD_SIZE": "4"}, (0, 1)),
    ],
)
def test_torchrun_says_which_rank_this_is(environment, ranks):
    assert measuring.torchrun_ranks(environment) == ranks


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("", "2"), ("one", "2"), ("0", "0"), ("0", "2.0")])
def test_ranks_that_make_no_sense_are_refused(rank, size):
    with pytest.raises(UsageError) as fault:
        measuring.torchrun_ranks({"RANK": rank, "WORLD_SIZE": size})
    assert fault.value.cure
