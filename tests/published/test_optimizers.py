"""The law between formula and library: the states of every optimizer, and what its step allocates, to the byte.

Real steps of torch.optim, transformers, bitsandbytes, schedulefree, galore_torch and apollo_torch, on the meta device
where they run there, else on a CPU.  bitsandbytes' kernels are opaque to a recorder: that they allocate nothing on CUDA
is read off backends/cuda/ops.py, which hands pointers over.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from memplan.memory.optimizers import LEAST_PAGED, OPTIMIZER_BY_NAME
from memplan.probes import optimizers as real
from memplan.probes.optimizers import REAL_ON_META, WITH_NUMBERS
from memplan.specs.training import OPTIMIZERS, library_of
from memplan.steptime.step import TRAFFIC_BY_OPTIMIZER
from tests.support.optimizer_steps import Model, formula, real_steps

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

NEEDS_CUDA = {"paged-ademamix", "paged-ademamix-8bit"}
"""On a CPU bitsandbytes pages no other optimizer, but fails at these."""


def need_library_of(name: str) -> None:
    """Skip without the library that an optimizer comes with."""
    pytest.importorskip(library_of(name), reason=f"{name} is of {library_of(name)}")


def test_every_optimizer_has_a_formula_and_a_real_one() -> None:
    implementations = set(OPTIMIZERS.values())
    assert implementations == set(OPTIMIZER_BY_NAME) == set(TRAFFIC_BY_OPTIMIZER)
    assert implementations == set(REAL_ON_META) | set(WITH_NUMBERS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["bf16", *(pytest.param(one, marks=pytest.mark.slow) for one in ("fp32", "fp16"))])
@pytest.mark.parametrize("name", sorted(set(OPTIMIZER_BY_NAME) - NEEDS_CUDA))
def test_states_and_temporaries_are_those_of_the_library(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_library_of(name)
    monkeypatch.setattr(real, "PROJECTION_GAP", 1)  # the step with the most: that which projects anew
    made: Any = {**REAL_ON_META, **WITH_NUMBERS}[name]
    device = "meta" if name in REAL_ON_META else "cpu"
    seen = real_steps(made, DTYPES[dtype], device)
    assert seen == formula(name, Model().to(DTYPES[dtype]))


@pytest.mark.parametrize("name", sorted(name for name in OPTIMIZER_BY_NAME if name.startswith("paged")))
def test_paged_states_are_those_that_bitsandbytes_asks_unified_memory_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own ``init_state`` for parameters that are not on a CPU; unified memory is a list here."""
    need_library_of(name)
    import bitsandbytes.functional as F  # noqa: N812 -- what bitsandbytes calls it

    paged: list[tuple[tuple[int, ...], str]] = []

    def get_paged(*shape: int, dtype: Any, device: Any) -> Any:
        paged.append((shape, str(dtype).removeprefix("torch.").replace("float32", "fp32")))
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(F, "get_paged", get_paged)
    monkeypatch.setattr(F, "fill", lambda *_: None)
    with torch.device("meta"):
        module = Model().to(torch.bfloat16)
    optimizer = WITH_NUMBERS[name](module)
    optimizer.check_overrides()
    group = optimizer.param_groups[0]
    for number, p in enumerate(group["params"]):
        optimizer.init_state(group, p, 0, number)
    rows = real.trained(module)
    expected = [
        (state.shape, state.dtype)
        for row in rows.values()
        for state in OPTIMIZER_BY_NAME[name].states(row)
        if state.on_host
    ]
    assert paged == expected
    assert {p.numel() >= LEAST_PAGED for p in rows} == {True, False}
    on_device = sorted(
        (tuple(x.shape), x.nbytes)
        for p in rows
        for key, x in optimizer.state[p].items()
        if isinstance(x, torch.Tensor) and x.is_meta and key[:4] != "qmap"
    )
    found = real.states_of(list(rows.values()), name).optimizer_states().rows
    assert on_device == sorted((row.shape, size.factor) for row, size, _ in found if row.tensor != "code books")
