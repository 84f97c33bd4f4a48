"""Laws of the memory model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memplan.architectures.registry import read_architecture
from memplan.estimation.dimensions import dimensions
from memplan.estimation.estimate import Estimator
from memplan.estimation.ledger import ledger
from memplan.estimation.replaying import calls
from memplan.estimation.step import EVALUATION, INSTANTS, Recordings
from memplan.estimation.timeline import timeline
from memplan.memory.events import Sizes
from memplan.operators.sizes import allocated
from memplan.specs.adapter import Lora
from memplan.specs.evaluation import Evaluation
from memplan.specs.training import Setup
from tests.laws.models import CONFIGS, RECORDINGS, adapted, all_setups, flattened, models, peaks, setups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LONGEST_HEAD = 16
"""Numbers of a head of the small models."""
ESTIMATORS = {name: Estimator(read_architecture(config, name), name) for name, config in CONFIGS.items()}


def every_run(test: Callable[..., None]) -> Callable[..., None]:
    """Any model under any setup, and with adapters beside a base of few bits."""
    pinned = Setup(seq_len=64, lora=Lora(rank=8), quantize="int8", activation_checkpointing="save-attention")
    test = example(run=("qwen2", replace(pinned, precision="bf16-mixed", gradient_accumulation_steps=2)))(test)
    test = example(run=("llama", replace(pinned, loss="tiled")))(test)
    return settings(max_examples=80)(given(run=st.tuples(models, all_setups) | adapted)(test))


@every_run
def test_the_timeline_reaches_the_closed_form_peaks(run: tuple[str, Setup]) -> None:
    """Unrolled event by event, a run reaches at every instant exactly the formula's peak, in both steps."""
    model, setup = run
    program = RECORDINGS[model].program(setup)
    sizes = Sizes(dimensions(setup))
    accumulation = setup.gradient_accumulation_steps
    live, step, highest = 0, 0, [dict.fromkeys(INSTANTS, 0), dict.fromkeys(INSTANTS, 0)]
    before = ""
    for moment in timeline(program, sizes, accumulation):
        if before == "optimizer step" and moment.instant == "forward":
            step += 1
        before = moment.instant
        for height in (live, live + moment.sign * moment.num_bytes):
            if moment.instant in highest[step]:
                highest[step][moment.instant] = max(highest[step][moment.instant], height)
        live += moment.sign * moment.num_bytes
    assert highest[0] == peaks(model, setup, first_step=True).by_instant
    assert highest[1] == peaks(model, setup).by_instant


@every_run
def test_every_release_names_a_block_that_is_there(run: tuple[str, Setup]) -> None:
    """No block is freed twice or before it exists, no name taken while in use; only the model outlives a step.

    So it is in the timeline, and in the calls by which the allocator is told of it.
    """
    model, setup = run
    program = RECORDINGS[model].program(setup)
    sizes = Sizes(dimensions(setup))
    accumulation = setup.gradient_accumulation_steps
    resident = sum(x.total(sizes) for x in program.resident(0, with_states=True))
    moments = ((moment.key, moment.num_bytes, moment.sign) for moment in timeline(program, sizes, accumulation))
    assert left_over(moments) == resident
    assert left_over(calls(program, sizes, accumulation)) == resident


def left_over(events: Iterable[tuple[Any, int, int]]) -> int:
    """The bytes of what is still there after some (key, bytes, +1 or -1)."""
    alive: dict[Any, int] = {}
    for key, num_bytes, sign in events:
        if sign > 0:
            assert key not in alive, key
            alive[key] = num_bytes
        else:
            assert key in alive, key
            assert num_bytes in {0, alive.pop(key)}, key  # what is taken by itself is freed without its size
    return sum(alive.values())


@given(model=models, setup=all_setups)
def test_the_ledger_adds_up(model: str, setup: Setup) -> None:
    """Rows at the peak add up to the peak; rows of a kind to the total of the kind."""
    program = RECORDINGS[model].program(setup)
    sizes = Sizes(dimensions(setup))
    rows = ledger(program, sizes, setup.gradient_accumulation_steps)
    found = peaks(model, setup)
    assert sum(row.bytes_at_peak for row in rows) == found.peak
    assert all(row.num_bytes >= 0 and row.bytes_at_peak >= 0 for row in rows)
    by_kind: Counter[str] = Counter()
    for row in rows:
        by_kind[row.kind] += row.num_bytes
    assert by_kind["parameter"] == program.parameters.total(sizes)
    assert by_kind["optimizer_state"] == program.optimizer_states.total(sizes)
    assert by_kind["activation"] + by_kind["loss"] == found.kept_activation_bytes


@given(
    model=models,
    setup=setups | flattened.filter(lambda setup: setup.attention != "sdpa"),
    other=st.sampled_from(["micro_batch_size", "seq_len", "gradient_accumulation_steps"]),
)
def test_bytes_never_fall_as_work_grows(model: str, setup: Setup, other: str) -> None:
    """One more sequence, token or micro-step never needs fewer bytes, at any instant.

    Where several sequences share a row and its mask, a row of 16 n tokens needs less than 16 n - 1, for a moment:
    PyTorch pads the rows of a mask in a copy (preprocess_mask in attention.cpp).
    """
    more = replace(setup, **{other: getattr(setup, other) + 1})
    less_peaks, more_peaks = peaks(model, setup).by_instant, peaks(model, more).by_instant
    assert all(more_peaks[name] >= value for name, value in less_peaks.items())


@given(model=models, setup=flattened, more=st.integers(1, 400))
def test_padding_costs_more_than_no_padding(model: str, setup: Setup, more: int) -> None:
    """Rows as long as the longest sequence never keep fewer bytes than one row without padding, with flash attention.

    The mean is at most half the longest, which is more than the rotary tables of a whole row take.
    """
    one = replace(setup, attention="flash", batching="padding-free")
    rows = replace(one, batching="rows", seq_len=2 * one.seq_len + more)
    assert peaks(model, one).kept_activation_bytes <= peaks(model, rows).kept_activation_bytes


@given(model=models, setup=flattened)
def test_more_packed_sequences_never_need_less(model: str, setup: Setup) -> None:
    """The number of sequences in a row moves no kept bytes, and lowers no peak."""
    few = replace(setup, batching="packed", packed_sequences=2)
    many = replace(few, packed_sequences=5)
    less, more = peaks(model, few), peaks(model, many)
    assert less.kept_activation_bytes == more.kept_activation_bytes
    assert less.peak <= more.peak


@given(name=models, setup=all_setups, layers=st.integers(1, 5))
def test_bytes_never_fall_with_more_layers(name: str, setup: Setup, layers: int) -> None:
    """One more layer never needs fewer bytes."""
    key = "n_layer" if name == "gpt2" else "num_hidden_layers"
    totals = []
    for num in (layers, layers + 1):
        program = Recordings(read_architecture(CONFIGS[name] | {key: num}, name)).program(setup)
        sizes = Sizes(dimensions(setup))
        totals.append(program.peaks(sizes, setup.gradient_accumulation_steps).peak)
    assert totals[1] >= totals[0]


@given(model=models, setup=all_setups)
def test_checkpointing_keeps_less(model: str, setup: Setup) -> None:
    """Kept activations: full <= every second layer <= none, full <= all but attention <= none, and selective <= none.

    Under autocast a span around a fused kernel keeps what is cast for it, in fp32, which may be more; and scores of
    sequences shorter than a head are smaller than queries, keys and values in blocks of 512 bytes.
    """
    kept = {
        mode: peaks(model, replace(setup, activation_checkpointing=mode, reentrant=False)).kept_activation_bytes
        for mode in ("none", "selective", "every-2", "save-attention", "full")
    }
    assert kept["full"] <= kept["every-2"] <= kept["none"]
    assert kept["full"] <= kept["save-attention"] <= kept["none"]
    mixed = setup.precision.endswith("-mixed")
    if not mixed or (setup.attention == "eager" and setup.seq_len >= LONGEST_HEAD):
        assert kept["selective"] <= kept["none"]


@given(model=models, setup=all_setups)
def test_reentrant_checkpointing_needs_no_less(model: str, setup: Setup) -> None:
    """It keeps as much of the forward pass, and lets go of nothing earlier in the backward pass.

    Under autocast the other kind runs a layer again when its last product asks for the first tensor: the gradient of
    the layer's output has been cast by then.
    """
    plain = peaks(model, replace(setup, reentrant=False)).by_instant
    mixed = setup.precision.endswith("-mixed")
    cast = (
        allocated((CONFIGS[model].get("hidden_size") or CONFIGS[model]["n_embd"]) * setup.tokens_per_micro_batch * 2)
        if mixed
        else 0
    )
    found = peaks(model, setup).by_instant
    assert all(found[name] + (cast if name == "backward" else 0) >= value for name, value in plain.items())


@given(model=models, setup=all_setups)
def test_the_first_step_never_needs_more(model: str, setup: Setup) -> None:
    """Without optimizer states no instant needs more than with them; at the optimizer step they are equal."""
    first, steady = peaks(model, setup, first_step=True).by_instant, peaks(model, setup).by_instant
    assert all(first[name] <= steady[name] for name in INSTANTS)
    assert first["optimizer step"] == steady["optimizer step"]


@given(model=models, setup=all_setups)
def test_a_grid_gives_what_single_points_give(model: str, setup: Setup) -> None:
    """Arrays of micro-batches and lengths give the very numbers that Python ints give one by one."""
    program = RECORDINGS[model].program(setup)
    batches, lengths = np.array([1, 2, 3, 7]), np.array([1, 64, 65, 300])
    grid = program.peaks(Sizes(dimensions(setup, batches, lengths)), setup.gradient_accumulation_steps)
    for i, (b, s) in enumerate(zip(batches.tolist(), lengths.tolist(), strict=True)):
        one = program.peaks(Sizes(dimensions(setup, b, s)), setup.gradient_accumulation_steps)
        assert int(np.broadcast_to(grid.peak, batches.shape)[i]) == one.peak
        assert int(np.broadcast_to(grid.kept_activation_bytes, batches.shape)[i]) == one.kept_activation_bytes


@given(model=models, setup=setups)
def test_accumulation_beyond_two_costs_only_inputs(model: str, setup: Setup) -> None:
    """Two micro-steps need what sixty-four need, but for the ids and labels of the others."""
    two = peaks(model, replace(setup, gradient_accumulation_steps=2)).peak
    many = peaks(model, replace(setup, gradient_accumulation_steps=64)).peak
    program = RECORDINGS[model].program(setup)
    sizes = Sizes(dimensions(setup))
    inputs = program.inputs(64).total(sizes) - program.inputs(2).total(sizes)
    assert many == two + inputs


@given(model=models, setup=setups, batch=st.integers(1, 16), samples=st.integers(1, 200), window=st.integers(1, 8))
def test_an_evaluation_never_needs_less_for_more(
    model: str, setup: Setup, batch: int, samples: int, window: int
) -> None:
    """More sequences in a batch, or kept, or fewer moves to the host: never fewer bytes; keeping none needs least."""

    def need(**settings: int) -> int:
        asked = replace(setup, evaluation=Evaluation(**settings))
        return ESTIMATORS[model].peaks(asked).by_instant[EVALUATION]

    alone = need(batch=batch)
    assert alone <= need(batch=batch + 1)
    kept = need(batch=batch, samples=samples)
    assert need(batch=min(batch, samples)) <= kept + 512
    assert kept <= need(batch=batch, samples=samples + batch)
    assert need(batch=batch, samples=samples, accumulation=window) <= kept
