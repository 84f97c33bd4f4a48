"""Programs from traces: any size without tracing again, files of them, and what a trace of many micro-steps is."""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from memplan.catalog.programs import FOLDER, RememberedPrograms
from memplan.errors import MemplanError
from memplan.estimation.traced import as_values, digest, fit_program, from_values, points_for, traced_at
from memplan.estimation.traced_estimator import TracedEstimator
from memplan.probes import answers
from memplan.probes.answers import estimate_of, pattern, with_micro_steps
from memplan.probes.factories import module_model
from memplan.probes.trace import trace_training
from memplan.specs.training import Setup
from memplan.specs.values import replace

SETUP = Setup(gradient_accumulation_steps=2, seq_len=16, precision="bf16", optimizer="adamw")
H = 48


class Attention(nn.Module):
    """A layer whose scores are quadratic in the length."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H, 3 * H)
        self.out = nn.Linear(H, H)

    def forward(self, x: Any) -> Any:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = torch.softmax(q @ k.transpose(1, 2), dim=-1)
        return x + self.out(scores @ v)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, H)
        self.layers = nn.ModuleList(Attention() for _ in range(3))
        self.head = nn.Linear(H, 100)

    def forward(self, input_ids: Any, labels: Any) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Windowed(Model):
    def forward(self, input_ids: Any, labels: Any) -> Any:
        return (
            super().forward(input_ids[:, :32], labels[:, :32])
            if input_ids.shape[1] > 32
            else super().forward(input_ids, labels)
        )


class Branching(Model):
    def forward(self, input_ids: Any, labels: Any) -> Any:
        loss = super().forward(input_ids, labels)
        return loss * 2 if input_ids.shape[1] > 32 else loss


class Fused(Attention):
    """The same by a fused kernel, with as many numbers a head as it takes."""

    def forward(self, x: Any) -> Any:
        q, k, v = (y.unflatten(-1, (3, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Attentive(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Fused() for _ in range(3))


def traced(module: Any = Model, **sizes: Any) -> Any:
    return trace_training(module_model(module), replace(SETUP, **sizes))


def run(b: int, s: int, module: Any = Model) -> Any:
    return traced(module, micro_batch_size=b, seq_len=s)


@cache
def program(*, one: bool) -> Any:
    return traced_at(points_for(1 if one else 2, 100), run)


@pytest.mark.parametrize("size", [(1, 20), (1, 200), (2, 33), (5, 64), (7, 130)])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_size_that_was_not_traced(size: tuple[int, int], accumulation: int) -> None:
    """Every instant is what a trace at that size says, byte for byte.

    Without accumulation the loss is not divided, which is one block of 512 bytes less.
    """
    b, s = size
    found = program(one=b == 1).peaks(b, s, accumulation)
    trace = traced(micro_batch_size=b, seq_len=s, gradient_accumulation_steps=accumulation)
    exact = {one.name: one for one in answers.instants_of(trace)}
    slack = 512 if accumulation == 1 else 0
    assert found.peak == pytest.approx(trace.peak_allocated_bytes, abs=slack)
    assert found.kept_activation_bytes == pytest.approx(trace.kept_activation_bytes, abs=slack)
    for name, value in found.by_instant.items():
        assert value == pytest.approx(exact[name].allocated_bytes, abs=slack), name
        assert found.first_step[name] == pytest.approx(exact[name].first_step_allocated_bytes, abs=slack), name


@pytest.mark.parametrize(("b", "s"), [(1, 16), (2, 33), (5, 300)])
def test_flops(b: int, s: int) -> None:
    """Two for each multiplication of the matrices; twice as many for the gradients of both factors."""
    layer = 2 * b * s * 4 * H * H + 2 * 2 * b * s * s * H
    by_hand = 3 * layer + 2 * b * s * H * 100
    fitted = tuple(one.value(b, s) for one in program(one=b == 1).flops)
    assert fitted == run(b, s).flops == (by_hand, 2 * by_hand)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_rows_at_the_peak_add_up(accumulation: int) -> None:
    found = program(one=False)
    rows = found.rows_at_peak(4, 64, accumulation)
    more = (accumulation - 2) * found.input_bytes(4, 64)
    assert sum(num_bytes for _, _, num_bytes in rows) + more == found.peaks(4, 64, accumulation).peak


@pytest.mark.parametrize("module", [Branching, Windowed])
def test_another_path_at_larger_sizes(module: Any) -> None:
    with pytest.raises(MemplanError, match=r"another path|no polynomial"):
        traced_at(points_for(2, 100), lambda b, s: run(b, s, module))


def test_a_program_as_values() -> None:
    """GIVEN a file's text of it, THEN it is the same program."""
    whole = program(one=False)
    again = from_values(json.loads(json.dumps(as_values(whole))))
    assert again.steps == whole.steps
    assert again.polynomials == whole.polynomials
    assert again.peaks(6, 100, 3) == whole.peaks(6, 100, 3)


def test_many_micro_steps_of_a_trace_of_two() -> None:
    """It is what a trace of all of them says, but for the events of the steps left out."""
    setup = {"micro_batch_size": 3, "seq_len": 40}
    extended = with_micro_steps(traced(**setup), 5)
    whole = traced(**setup, gradient_accumulation_steps=5)
    assert extended.setup == whole.setup
    assert extended.phase_peaks() == whole.phase_peaks()
    assert extended.phase_peaks(0) == whole.phase_peaks(0)
    assert extended.kept_activation_bytes == whole.kept_activation_bytes
    assert estimate_of(extended).memory == estimate_of(whole).memory
    assert len(extended.alive_at(len(extended.events))) == len(whole.alive_at(len(whole.events)))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.11.mlp", "model.layers.*.mlp"),
        ("h.3", "h.*"),
        ("layers.0.experts.7.up", "layers.*.experts.7.up"),
        ("0", "0"),
        ("conv2d.weight", "conv2d.weight"),
        ("", ""),
    ],
)
def test_layer_numbers_are_stars(path: str, expected: str) -> None:
    assert pattern(path) == expected


# -- remembered programs -----------------------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    return {"MEMPLAN_CACHE_DIR": str(tmp_path)}


def files_in(environment: dict[str, str]) -> list[str]:
    folder = os.path.join(environment["MEMPLAN_CACHE_DIR"], FOLDER)
    return sorted(os.path.join(folder, name) for name in os.listdir(folder))


def test_programs_are_remembered(environment) -> None:
    whole = program(one=True)
    RememberedPrograms(environment)["a key"] = whole
    again = RememberedPrograms(environment)
    assert "another key" not in again
    assert again["a key"].steps == whole.steps
    assert again["a key"].peaks(1, 77, 2) == whole.peaks(1, 77, 2)
    del again["a key"]
    assert "a key" not in RememberedPrograms(environment)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"format": 1, "key": "a key"}', b"[" * 10**5]
)
def test_a_file_that_holds_something_else(environment, content: bytes) -> None:
    """It is not there."""
    RememberedPrograms(environment)["a key"] = program(one=True)
    (path,) = files_in(environment)
    with open(path, "wb") as file:
        file.write(content)
    assert "a key" not in RememberedPrograms(environment)


def test_a_program_with_broken_steps(environment) -> None:
    RememberedPrograms(environment)["a key"] = program(one=True)
    (path,) = files_in(environment)
    with open(path, encoding="ascii") as file:
        values = json.load(file)
    values["program"]["steps"][0] = [1, 2]
    with open(path, "w", encoding="ascii") as file:
        json.dump(values, file)
    assert "a key" not in RememberedPrograms(environment)


def test_a_folder_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    programs = RememberedPrograms({"MEMPLAN_CACHE_DIR": str(tmp_path)})
    programs["a key"] = program(one=True)
    assert programs["a key"] is program(one=True)


def test_room_is_made(environment, monkeypatch) -> None:
    monkeypatch.setattr("memplan.catalog.programs.MOST_BYTES", 1)
    programs = RememberedPrograms(environment)
    for key in ("a", "b", "c"):
        programs[key] = program(one=True)
    assert len(files_in(environment)) == 1


def test_a_changed_module_is_traced_anew(environment) -> None:
    """GIVEN a program of another module under the same name, THEN it is not used; of the same it is."""

    def estimator(module: Any) -> tuple[TracedEstimator, list[Any]]:
        sizes: list[Any] = []

        def trace(setup: Setup) -> Any:
            sizes.append((setup.micro_batch_size, setup.seq_len))
            return trace_training(module_model(module), setup)

        return TracedEstimator("own", trace, lambda setup: (1, 1), programs=RememberedPrograms(environment)), sizes

    class Wider(Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(H, 101)

    setup = replace(SETUP, micro_batch_size=4, seq_len=100)
    first, sizes = estimator(Model)
    answer = first.memory(setup)
    assert sizes == list(points_for(4, 100))
    again, sizes = estimator(Model)
    assert again.memory(setup) == answer
    assert sizes == [points_for(4, 100)[0]]
    changed, sizes = estimator(Wider)
    assert changed.memory(setup) != answer
    assert sizes == list(points_for(4, 100))


def test_a_digest_names_the_content() -> None:
    assert digest(run(2, 16).events) == digest(run(2, 16).events)
    assert digest(run(2, 16).events) != digest(run(2, 17).events)
    with pytest.raises(MemplanError):
        fit_program({(2, 16): run(2, 16)})


@pytest.mark.parametrize("size", [(1, 1, 432), (2, 100, 512), (4, 419, 431)])
def test_lengths_of_the_traces_stay_below_the_one_that_is_asked_for(size: tuple[int, int, int]) -> None:
    """A module may have no more positions; of long ones each trace lies in another tile of 128."""
    b, short, long = size
    assert max(s for _, s in points_for(b, short)) <= 56
    assert max(s for _, s in points_for(b, long)) <= long
    assert len({-(-s // 128) for _, s in points_for(b, long)}) == 4


@pytest.mark.parametrize("seq_len", [448, 512, 1000, 1024])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_kernels_of_tiles(seq_len: int, micro_batch: int) -> None:
    """GIVEN a module with fused attention, whose backward rounds lengths up to 128, THEN the fit is exact."""
    program = traced_at(points_for(micro_batch, seq_len), lambda b, s: run(b, s, Attentive))
    exact = traced(Attentive, micro_batch_size=micro_batch, seq_len=seq_len, gradient_accumulation_steps=2)
    assert program.peaks(micro_batch, seq_len, 2).peak == exact.peak_allocated_bytes
