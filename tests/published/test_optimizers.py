"""The law between formula and library: the states of every optimizer, and what its step allocates, to the byte.

Real steps of torch.optim, transformers, bitsandbytes, schedulefree, galore_torch and apollo_torch, on the meta device
where they run there, else on a CPU.  bitsandbytes' kernels are opaque to a recorder: that they allocate nothing on CUDA
is read off backends/cuda/ops.py, which hands pointers over.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

import torch

from memplan.architectures.registry import read_architecture
from memplan.errors import UsageError
from memplan.estimation.step import Recordings
from memplan.memory.events import Sizes
from memplan.memory.optimizers import LEAST_OFFLOADED, LEAST_PAGED, OPTIMIZER_BY_NAME
from memplan.operators.sizes import allocated, bind
from memplan.probes import optimizers as real
from memplan.probes.optimizers import REAL_ON_META, WITH_NUMBERS
from memplan.probes.stand_ins import states_of, trained
from memplan.probes.trace import trace_training
from memplan.specs.training import IN_BACKWARD, OPTIMIZERS, Setup, library_of
from memplan.steptime.step import TRAFFIC_BY_OPTIMIZER
from tests.support.optimizer_steps import Model, formula, real_steps

if TYPE_CHECKING:
    from memplan.probes.events import Trace

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

NEEDS_CUDA = {"paged-ademamix", "paged-ademamix-8bit", "adamw-offloaded"}
"""On a CPU bitsandbytes pages no other optimizer, but fails at these; torchao asks for a GPU."""


def need_library_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip without the library that an optimizer comes with."""
    library = pytest.importorskip(library_of(name), reason=f"{name} is of {library_of(name)}")
    if library_of(name) == "bitsandbytes":  # its manager knows parameters by id, also when they are gone
        monkeypatch.setattr(library.optim.GlobalOptimManager, "_instance", None)


def test_every_optimizer_has_a_formula_and_a_real_one() -> None:
    implementations = set(OPTIMIZERS.values())
    assert implementations == set(OPTIMIZER_BY_NAME) == set(TRAFFIC_BY_OPTIMIZER)
    assert implementations == set(REAL_ON_META) | set(WITH_NUMBERS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["bf16", *(pytest.param(one, marks=pytest.mark.slow) for one in ("fp32", "fp16"))])
@pytest.mark.parametrize("name", sorted(set(OPTIMIZER_BY_NAME) - NEEDS_CUDA - set(IN_BACKWARD)))
def test_states_and_temporaries_are_those_of_the_library(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_library_of(name, monkeypatch)
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
    need_library_of(name, monkeypatch)
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
    rows = trained(module)
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
    found = states_of(list(rows.values()), name).optimizer_states().rows
    assert on_device == sorted((row.shape, size.factor) for row, size, _ in found if row.tensor != "code books")


class NoStream:
    """A CUDA stream where there is no CUDA: everything has happened."""

    def wait_stream(self, _: object) -> None:
        pass

    def record_event(self) -> NoStream:
        return self

    def synchronize(self) -> None:
        pass


@pytest.mark.filterwarnings("ignore")
def test_what_torchao_keeps_on_the_host_and_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own optimizer, with streams that do nothing and memory that is not pinned."""
    pytest.importorskip("torchao")
    from torchao.optim import cpu_offload

    empty_like = torch.empty_like
    monkeypatch.setattr(cpu_offload, "get_available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())

    def unpinned(x: Any, *, pin_memory: bool = False, **how: Any) -> Any:
        return empty_like(x, **how)

    monkeypatch.setattr(torch, "empty_like", unpinned)
    module = Model().to(torch.bfloat16)
    rows = trained(module)
    assert {p.numel() >= LEAST_OFFLOADED for p in rows} == {True, False}
    optimizer = WITH_NUMBERS["adamw-offloaded"](module)
    for p in module.parameters():
        p.sum().backward()
    assert all(p.grad is not None for p in rows)  # they stay on the device
    optimizer.step()
    on_host = []
    for p, copy in optimizer.param_d2h_map.items():
        state = optimizer.optim_dict[p].state[copy]
        on_host += [copy, copy.grad, state["exp_avg"], state["exp_avg_sq"]]
    on_device = [x for state in optimizer.d_opt.state.values() for x in state.values()]
    states = [state for row in rows.values() for state in OPTIMIZER_BY_NAME["adamw-offloaded"].states(row)]
    for found, expected in ((on_host, True), (on_device, False)):
        assert sorted((tuple(x.shape), x.dtype) for x in found) == sorted(
            (state.shape, DTYPES[state.dtype]) for state in states if state.on_host == expected
        )


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 344,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}
CONFIGS = {
    "llama": LLAMA,
    "qwen2, tied": LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 512, "vocab_size": 1000},
}

SOME = ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "gpt2")]
"""One by default, all in .ci/run."""


def both(model: str, **choices: Any) -> tuple[Any, Any, Trace]:
    """The program of a small model with few tokens, so that the optimizer decides; its peaks; and the trace."""
    setup = Setup(micro_batch_size=1, seq_len=16, **choices)
    program = Recordings(read_architecture(CONFIGS[model], model)).program(setup)
    return program, program.peaks(Sizes(bind(1, 16)), 1), trace_training(CONFIGS[model], setup)


def held_states(trace: Trace) -> int:
    """Allocated bytes of the states that are there after the last step."""
    return sum(e.sign * allocated(e.num_bytes) for e in trace.events if e.category == "optimizer_state")


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", SOME)
@pytest.mark.parametrize("optimizer", sorted(set(OPTIMIZER_BY_NAME) - set(IN_BACKWARD)))
def test_an_optimizer_step_of_a_model_is_that_of_the_trace(optimizer: str, model: str, precision: str) -> None:
    """To the byte; those of torch.optim and transformers are the real ones."""
    program, formula, trace = both(model, optimizer=optimizer, precision=precision)
    assert program.optimizer_states.total(Sizes({})) == held_states(trace)
    assert formula.by_instant["optimizer step"] == trace.phase_peaks()["optimizer"]
    assert formula.peak == trace.peak_allocated_bytes
    assert program.host_bytes == trace.host_bytes


SCALARS = 512
"""LOMO's hooks come one operator earlier or later: a scalar of the backward pass is there, or is not."""


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("model", SOME)
@pytest.mark.parametrize("optimizer", IN_BACKWARD)
def test_an_update_in_the_backward_pass_is_that_of_the_real_hooks(
    optimizer: str, model: str, checkpointing: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LOMO's own hooks on meta tensors; AdaLomo's numbers are given, as it asks for the size of the parameters."""
    if library_of(optimizer) == "lomo_optim":
        pytest.importorskip("lomo_optim")
        import lomo_optim.adalomo

        monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self.to("meta"))
        monkeypatch.setattr(lomo_optim.adalomo, "max", lambda least, _: least, raising=False)
        monkeypatch.setitem(REAL_ON_META, optimizer, WITH_NUMBERS[optimizer])
    program, formula, trace = both(
        model, optimizer=optimizer, precision=precision, activation_checkpointing=checkpointing
    )
    assert program.optimizer_states.total(Sizes({})) == held_states(trace)
    assert abs(formula.peak - trace.peak_allocated_bytes) <= SCALARS
    assert trace.category_bytes("gradient") == 0


@pytest.mark.parametrize("optimizer", IN_BACKWARD)
def test_gradients_that_are_gone_cannot_be_accumulated_or_exchanged(optimizer: str) -> None:
    for choices in ({"gradient_accumulation_steps": 2}, {"data_parallel_size": 2}):
        with pytest.raises(UsageError, match="updates in the backward pass"):
            Setup(optimizer=optimizer, **choices)
