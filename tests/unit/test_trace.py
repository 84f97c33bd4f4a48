"""The trace of real modules: small ones whose bytes can be worked out by hand, wrong ones, and what always holds."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from memplan.errors import ConfigError, MemplanError, UsageError
from memplan.operators.sizes import allocated
from memplan.probes import faults
from memplan.probes.attention import choose_kernel
from memplan.probes.autocast import FULL_PRECISION, LOWER_PRECISION, PROMOTE, CudaAutocast
from memplan.probes.events import CATEGORIES, PHASES
from memplan.probes.factories import factory_model, module_model
from memplan.probes.faults import FactoryError, MissingLibraryError, TraceError
from memplan.probes.semantics import cuda_semantics
from memplan.probes.trace import trace_training
from memplan.specs.training import Setup

if TYPE_CHECKING:
    from pathlib import Path

    from memplan.probes.events import Trace

B, S, H = 4, 32, 64
SETUP = Setup(micro_batch_size=B, seq_len=S, precision="fp32", optimizer="sgd")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(H, 4 * H, bias=False)
        self.down = nn.Linear(4 * H, H, bias=False)

    def forward(self, x: Any) -> Any:
        return self.down(torch.relu(self.up(x)))


def rows_of_h(micro_batch_size: int, seq_len: int) -> Any:
    return torch.randn(micro_batch_size, seq_len, H)


def mean(output: Any) -> Any:
    return output.mean()


def run(module: Any, setup: Setup = SETUP, *, inputs: Any = rows_of_h, loss: Any = mean, **options: Any) -> Trace:
    """Trace what `module` makes: a class, or a function."""
    return trace_training(module_model(lambda: (module(), inputs, loss)), setup, **options)


class Returning(nn.Module):
    """A linear layer whose output goes through a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(H, H, bias=False)
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(self.inner(x))


def through(function: Any) -> Any:
    return lambda: Returning(function)


# --- bytes worked out by hand ----------------------------------------------------------------------------------------


def test_an_mlp_keeps_the_output_of_its_relu_and_the_loss() -> None:
    trace = run(Mlp)
    relu, loss = B * S * 4 * H * 4, 4
    assert trace.kept_activation_requested_bytes == relu + loss
    assert trace.kept_activation_bytes == relu + 512
    assert [(e.op, e.shape, e.dtype) for e in trace.kept] == [
        ("aten.relu", (B, S, 4 * H), "fp32"),
        ("aten.mean", (), "fp32"),
    ]
    assert trace.num_parameters == trace.num_trainable_parameters == 8 * H * H


def test_states_of_optimizers() -> None:
    parameters = 2 * 4 * H * H * 4
    blocks = 4 * H * H // 256
    expected = {
        "sgd": 0,
        "sgd-momentum": parameters,
        "adamw": 2 * parameters,
        "adamw-forloop": 2 * parameters,
        "adamw-fused": 2 * parameters + 2 * 512,
        "adamw-8bit": parameters // 2 + 4 * allocated(blocks * 4) + 2 * 1024,
    }
    for optimizer, num_bytes in expected.items():
        trace = run(Mlp, replace(SETUP, optimizer=optimizer))
        assert trace.category_bytes("optimizer_state") == num_bytes, optimizer
        assert trace.category_bytes("parameter") == trace.category_bytes("gradient") == parameters


def test_8bit_states_are_32bit_for_embeddings_and_small_tensors() -> None:
    """Transformers registers embeddings so; bitsandbytes leaves tensors below 4096 elements alone."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(100, H)
            self.small = nn.Linear(H, H - 1)

        def forward(self, input_ids: Any, labels: Any) -> Any:
            return self.small(self.embedding(input_ids)).mean()

    trace = trace_training(module_model(Model), replace(SETUP, optimizer="adamw-8bit"))
    states = {e.op: e.dtype for e in trace.events if e.category == "optimizer_state" and e.module == "embedding.weight"}
    assert states == {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
    assert not [e for e in trace.events if e.dtype == "uint8"]


def test_tied_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(H, H, bias=False)
            self.b = nn.Linear(H, H, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Any) -> Any:
            return self.b(self.a(x))

    trace = run(Tied)
    assert trace.num_parameters == H * H
    assert trace.category_bytes("parameter") == trace.category_bytes("gradient") == H * H * 4


def test_views_and_in_place_operators_make_no_storages() -> None:
    trace = run(through(lambda x: x.view(B * S, H).transpose(0, 1).add_(1)))
    made = [e.op for e in trace.events if e.phase == "forward" and e.step == 1 and e.sign > 0 and e.category != "input"]
    assert made == ["aten.mm", "aten.mean"]


def test_batch_norm_has_buffers_and_keeps_input_and_statistics() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, image: Any) -> Any:
            return torch.relu(self.norm(self.conv(image)))

    trace = run(Net, inputs=lambda b, s: {"image": torch.randn(b, 3, s, s)})
    assert Counter(e.dtype for e in trace.alive_at(trace.spans[0].stop) if e.category == "buffer") == {
        "fp32": 2,
        "int64": 1,
    }
    planes = [e for e in trace.kept if e.shape == (B, 8, S, S)]
    assert [e.op for e in planes] == ["aten.convolution", "aten.relu"]


def test_a_buffer_that_no_operator_made_counts() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(H, H, bias=False)
            self.register_buffer("scale", torch.tensor(3.0))

        def forward(self, x: Any) -> Any:
            return self.inner(x) * self.scale

    assert run(Scaled).category_bytes("buffer") == 512


def test_an_output_of_two_parts_needs_a_loss() -> None:
    def two(x: Any) -> Any:
        return x, x * 2

    trace = run(through(two), loss=lambda output: (output[0] + output[1]).sum())
    assert trace.kept_activation_requested_bytes == 4  # a sum keeps nothing but itself
    with pytest.raises(TraceError, match="a tuple has no loss"):
        run(through(two), loss=None)


@pytest.mark.parametrize("form", ["attribute", "key", "itself"])
def test_where_a_loss_is_found(form: str) -> None:
    class Output:
        def __init__(self, loss: Any) -> None:
            self.loss = loss

    forms = {"attribute": lambda x: Output(x.mean()), "key": lambda x: {"loss": x.mean()}, "itself": lambda x: x.mean()}
    assert run(through(forms[form]), loss=None).kept_activation_requested_bytes == 4


def test_precision_converts_module_and_inputs() -> None:
    trace = run(Mlp, replace(SETUP, precision="bf16"))
    assert {e.dtype for e in trace.events if e.category in {"parameter", "input", "gradient"}} == {"bf16"}
    assert trace.kept_activation_requested_bytes == B * S * 4 * H * 2 + 2


def test_autocast_keeps_copies_of_weights_and_of_the_input() -> None:
    """bf16 copies of the second weight and of the input, and the result of relu; the loss is fp32.

    The input needs no gradient, so that the copy of the first weight goes with the cache.
    """
    trace = run(Mlp, replace(SETUP, precision="bf16-mixed"))
    assert trace.kept_activation_requested_bytes == 2 * (4 * H * H + B * S * H + B * S * 4 * H) + 4
    assert {e.dtype for e in trace.events if e.category == "gradient"} == {"fp32"}


def test_dropout_keeps_one_byte_an_element_and_can_be_overridden() -> None:
    made = lambda: nn.Sequential(nn.Linear(H, H, bias=False), nn.Dropout(0.5))  # noqa: E731
    assert run(made).kept_activation_requested_bytes == B * S * H + 4
    assert run(made, replace(SETUP, dropout=0.0)).kept_activation_requested_bytes == 4


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("checkpointing", "num_hidden", "num_inner"), [("none", 3, 4), ("full", 3, 0), ("every-2", 3, 2), ("every-3", 3, 2)]
)
def test_checkpointed_layers_keep_their_inputs(checkpointing: str, num_hidden: int, num_inner: int) -> None:
    """Between layers hidden states of one H a token, inside a layer one of 4H; the last output goes with the mean."""
    trace = run(Stack, replace(SETUP, activation_checkpointing=checkpointing))
    hidden = B * S * H * 4
    assert trace.kept_activation_requested_bytes == hidden * (num_hidden + 4 * num_inner) + 4
    assert trace.layers == tuple(f"layers.{n}" for n in range(4))
    layer = hidden * (5 if checkpointing in {"none", "every-3"} else 1)
    if checkpointing != "every-2":  # the third layer of four, which every-2 checkpoints
        assert trace.kept_activation_requested_bytes_per_layer == (hidden if checkpointing == "full" else layer)


def test_a_module_without_layers_cannot_be_checkpointed() -> None:
    with pytest.raises(UsageError, match="no list of equal layers"):
        run(Mlp, replace(SETUP, activation_checkpointing="full"))
    with pytest.raises(UsageError, match="Selective"):
        run(Stack, replace(SETUP, activation_checkpointing="selective"))


# --- what always holds -----------------------------------------------------------------------------------------------

TRACES = {
    "mlp": lambda: run(Mlp),
    "stack": lambda: run(Stack, replace(SETUP, activation_checkpointing="full", optimizer="adamw")),
    "accumulation": lambda: run(Stack, replace(SETUP, gradient_accumulation_steps=3, precision="bf16-mixed")),
    "llama": lambda: trace_training(LLAMA, replace(SETUP, precision="bf16", attention="flash", optimizer="adamw")),
    "llama, eager": lambda: trace_training(LLAMA, replace(SETUP, attention="eager", optimizer="adamw-8bit")),
}


@pytest.fixture(scope="module", params=list(TRACES))
def trace(request: pytest.FixtureRequest) -> Trace:
    if request.param.startswith("llama"):
        pytest.importorskip("transformers")
    made: Trace = TRACES[request.param]()
    return made


def test_each_release_matches_an_allocation(trace: Trace) -> None:
    alive: dict[int, Any] = {}
    for event in trace.events:
        assert event.num_bytes > 0
        assert event.category in CATEGORIES
        assert event.phase in PHASES
        if event.sign > 0:
            assert event.key not in alive
            alive[event.key] = event
        else:
            made = alive.pop(event.key)
            assert made.num_bytes == event.num_bytes
            assert made.op == event.op
    assert {event.category for event in alive.values()} <= {"parameter", "buffer", "optimizer_state"}
    assert trace.levels[-1] == sum(allocated(event.num_bytes) for event in alive.values())


def test_spans_cover_the_run_in_order(trace: Trace) -> None:
    assert trace.spans[0].start == 0
    assert trace.spans[-1].stop == len(trace.events)
    assert all(a.stop == b.start for a, b in zip(trace.spans, trace.spans[1:], strict=False))
    for span in trace.spans:
        for event in trace.events[span.start : span.stop]:
            assert (event.phase, event.step, event.micro_step) == span[:3]
    assert trace.num_steps == 2


def test_the_peak_is_the_highest_level_and_its_tables_add_up(trace: Trace) -> None:
    last = next(span.start for span in trace.spans if span.step == 1)
    assert trace.peak_allocated_bytes == max(trace.levels[last - 1 :])
    assert max(trace.phase_peaks().values()) == trace.peak_allocated_bytes
    assert sum(row.num_bytes for row in trace.rows_at_peak) == trace.peak_allocated_bytes
    for by in ("module", "op", "category", "dtype"):
        table = trace.bytes_at_peak(by)
        assert sum(table.values()) == trace.peak_allocated_bytes
        assert list(table.values()) == sorted(table.values(), reverse=True)


def test_every_later_step_is_like_the_second() -> None:
    trace = run(Stack, replace(SETUP, optimizer="adamw"), num_steps=4)
    assert trace.phase_peaks(1) == trace.phase_peaks(2) == trace.phase_peaks(3)
    assert trace.first_step_peak_allocated_bytes <= trace.peak_allocated_bytes


def test_results_that_are_remembered_are_those_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the memory, the same trace."""
    from memplan.probes import results

    known = {name: make() for name, make in TRACES.items() if name in {"stack", "accumulation"}}
    monkeypatch.setattr(results, "kind_of", lambda _: results.PLAIN)
    for name, trace in known.items():
        assert TRACES[name]().events == trace.events


def test_scratch_of_kernels_is_allocated_and_released_at_once() -> None:
    pytest.importorskip("transformers")
    trace = trace_training(LLAMA, replace(SETUP, attention="eager", precision="bf16"))
    scratch = [n for n, event in enumerate(trace.events) if event.op.startswith("scratch of ") and event.sign > 0]
    assert len(scratch) == 2 * 3  # the softmax of each layer, in each step
    for n in scratch:
        assert trace.events[n + 1] == trace.events[n]._replace(sign=-1)
        assert trace.events[n].num_bytes == B * 4 * S * S * 4


def test_selective_checkpointing_keeps_no_scores() -> None:
    pytest.importorskip("transformers")
    setup = replace(SETUP, attention="eager", precision="bf16")
    none, selective = (
        trace_training(LLAMA, replace(setup, activation_checkpointing=how)) for how in ("none", "selective")
    )
    square = B * 4 * S * S
    assert any(e.num_bytes >= square for e in none.kept if e.shape[-2:] == (S, S))
    assert not [e for e in selective.kept if e.shape == (B, 4, S, S)]


def test_answers_about_data_are_assumptions() -> None:
    pytest.importorskip("transformers")
    plain, padded = (trace_training(LLAMA, replace(SETUP, padding=padding)) for padding in (False, True))
    assert ["neither padding nor packed" in text for text in plain.assumptions] == [True]
    assert all("has padding" in text for text in padded.assumptions)
    assert {e.op for e in padded.events if e.category == "input"} > {
        e.op for e in plain.events if e.category == "input"
    }


def test_the_caches_of_one_trace_do_not_leak_into_the_next() -> None:
    assert run(Mlp).events == run(Mlp).events


# --- attention and autocast ------------------------------------------------------------------------------------------


def heads(num: int = 4, length: int = 16, dim: int = 64, dtype: Any = torch.bfloat16) -> Any:
    return torch.empty(2, num, length, dim, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("query", "key", "options", "kernel"),
    [
        (heads(), heads(), {}, "flash"),
        (heads(), heads(2), {}, "flash"),
        (heads(), heads(), {"capability": (7, 5)}, "math"),
        (heads(dtype=torch.float16), heads(dtype=torch.float16), {"capability": (7, 5)}, "efficient"),
        (heads(), heads(), {"mask": heads(1, 16, 16)}, "efficient"),
        (heads(), heads(2), {"mask": heads(1, 16, 16)}, "math"),
        (heads(dtype=torch.float32), heads(dtype=torch.float32), {}, "efficient"),
        (heads(dtype=torch.float32), heads(2, dtype=torch.float32), {}, "math"),
        (heads(dim=320), heads(dim=320), {}, "efficient"),
        (heads(dim=6, dtype=torch.float32), heads(dim=6, dtype=torch.float32), {}, "math"),
        (heads(), heads(length=32), {"is_causal": True}, "efficient"),
        (heads(dim=200), heads(dim=200), {"capability": (8, 9)}, "efficient"),
        (heads(dim=200), heads(dim=200), {"capability": (9, 0)}, "flash"),
        (heads(dim=256), heads(dim=256), {"capability": (12, 0)}, "flash"),
        (heads(dim=256), heads(dim=256), {"capability": (12, 0), "dropout": 0.1}, "efficient"),
    ],
)
def test_the_attention_kernel_that_cuda_chooses(query: Any, key: Any, options: dict[str, Any], kernel: str) -> None:
    options = {"mask": None, "is_causal": False} | options
    mask = options.pop("mask")
    assert choose_kernel(query, key, key, mask, **options) == kernel


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn", "math"])
def test_attention_runs_the_kernel_it_is_told(kernel: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(H, 3 * H)

        def forward(self, x: Any) -> Any:
            q, k, v = (y.view(*x.shape[:2], 4, 16).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            return nn.functional.scaled_dot_product_attention(q, k, v)

    trace = run(Attention, replace(SETUP, precision="bf16"), sdpa_kernel=kernel)
    ops = {e.op for e in trace.kept}
    assert (f"aten._scaled_dot_product_{kernel}_attention" in ops) == (kernel != "math")
    assert any(e.shape == (B, 4, S, S) for e in trace.kept) == (kernel == "math")


def test_autocast_lists_do_not_overlap_and_name_real_functions() -> None:
    lists = [LOWER_PRECISION, FULL_PRECISION, PROMOTE]
    assert sum(map(len, lists)) == len(frozenset().union(*lists))


def test_autocast_regions_inside_the_forward_pass() -> None:
    autocast = CudaAutocast(torch.bfloat16)
    x, w = torch.empty(4, 4, device="meta"), torch.empty(4, 4, device="meta")
    with cuda_semantics(autocast=autocast), autocast.region():
        assert (x @ w).dtype == torch.bfloat16
        assert torch.nn.functional.softmax(x @ w, -1).dtype == torch.float32
        assert torch.exp(x.bfloat16()).dtype == torch.float32
        with autocast.switched(False):
            assert (x @ w).dtype == torch.float32
    assert (x @ w).dtype == torch.float32


# --- factories -------------------------------------------------------------------------------------------------------

FACTORIES = """
import torch
from torch import nn

NOT_A_FUNCTION = 3
MODULE = nn.Linear(2, 2)


class Nested:
    @staticmethod
    def make():
        return nn.Linear(4, 4), lambda b, s: torch.randn(b, s, 4), lambda y: y.sum()


def on_the_cpu():
    with torch.device("cpu"):
        return nn.Linear(4, 4), lambda b, s: torch.randn(b, s, 4, device="cpu"), lambda y: y.sum()


def raises():
    raise ValueError("no weights here")


def moves():
    return nn.Linear(2, 2).cuda()


def nothing():
    return None


def bad_inputs():
    return nn.Linear(2, 2), 5


def inputs_raise():
    return nn.Linear(2, 2), lambda b, s: 1 / 0, None


def inputs_of_no_use():
    return nn.Linear(2, 2), lambda b, s: "text", None
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory."""
    name = "factories_of_the_test"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    (tmp_path / "broken_factory.py").write_text("import a_library_that_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop(name, None)
    return name


def test_a_factory_is_found_in_the_current_directory(factories: str) -> None:
    trace = trace_training(factory_model(f"{factories}:Nested.make"), SETUP)
    assert trace.num_parameters == 20
    assert trace.name == f"{factories}:Nested.make"


def test_what_a_factory_makes_on_the_cpu_is_moved(factories: str) -> None:
    trace = trace_training(factory_model(f"{factories}:on_the_cpu"), SETUP)
    assert trace.category_bytes("parameter") == 2 * 512
    assert trace.category_bytes("input") == B * S * 4 * 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "raises ValueError: no weights here"),
        ("nothing", "returns NoneType, not a module"),
        ("bad_inputs", "returns a int as inputs"),
        ("inputs_raise", "raise ZeroDivisionError"),
        ("inputs_of_no_use", "are a str"),
        ("nohting", "has no 'nohting'. Did you mean nothing"),
        ("NOT_A_FUNCTION", "is a int, not a function"),
        ("MODULE", "is a Linear, not a function"),
    ],
)
def test_a_wrong_factory_is_named_with_its_fault(factories: str, name: str, message: str) -> None:
    with pytest.raises(FactoryError, match=message) as caught:
        trace_training(factory_model(f"{factories}:{name}"), SETUP)
    assert caught.value.cure
    assert caught.value.exit_status == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the module does move")
def test_a_factory_that_moves_to_a_gpu(factories: str) -> None:
    with pytest.raises(FactoryError, match="CUDA") as caught:
        trace_training(factory_model(f"{factories}:moves"), SETUP)
    assert "Leave the device to memplan" in caught.value.cure


@pytest.mark.parametrize(
    ("spec", "message"),
    [("no_such_module:make", "Run memplan where"), ("broken_factory:make", "a_library_that_nobody_has")],
)
def test_a_module_that_cannot_be_imported(factories: str, spec: str, message: str) -> None:
    with pytest.raises(FactoryError, match=message):
        trace_training(factory_model(spec), SETUP)


@pytest.mark.parametrize("spec", ["", "module", "module:", ":make", "a b:c", "../x:make"])
def test_what_names_no_factory_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError):
        factory_model(spec)


# --- modules that cannot be traced -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message", "cure"),
    [
        (lambda x: x * x.sum().item(), "asks for the value of aten.sum", "no numbers"),
        (lambda x: x if (x > 0).all() else -x, "asks for the value of aten.all", "no numbers"),
        (lambda x: x[x > 0], "nonzero", "no numbers"),
        (lambda x: x.cuda(), "CUDA|meta", ""),
        (lambda x: x @ torch.empty(3, 3, device="meta"), "aten.mm", "shapes"),
        (lambda x: x.numpy(), "Error", ""),
        (lambda x: {}["missing"], "KeyError", "on a CPU"),
    ],
)
def test_what_needs_numbers_is_refused_by_operator_and_module(function: Any, message: str, cure: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Returning(function)

        def forward(self, x: Any) -> Any:
            return self.part(x)

    with pytest.raises(TraceError, match=message) as caught:
        run(Outer)
    assert "part" in caught.value.cause
    assert cure in caught.value.cure
    assert caught.value.cure
    assert caught.value.exit_status == 1


def test_an_operator_without_a_meta_kernel_is_named() -> None:
    library = torch.library.Library("memplan_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CPU")
    with pytest.raises(TraceError, match=r"memplan_test\.twice") as caught:
        run(through(torch.ops.memplan_test.twice))
    assert "register_fake" in caught.value.cure


def test_inputs_of_a_wrong_shape_or_name() -> None:
    with pytest.raises(TraceError, match=r"aten\.mm of 'up'"):
        run(Mlp, inputs=lambda b, s: torch.randn(b, s, H + 1))
    with pytest.raises(TraceError, match="unexpected keyword") as caught:
        run(Mlp, inputs=lambda b, s: {"y": torch.randn(b, s, H)})
    assert "forward()" in caught.value.cure


@pytest.mark.parametrize(
    ("function", "loss", "message"),
    [
        (lambda x: x, None, "shape"),
        (lambda x: x.mean().detach(), None, "no parameter that is trained"),
        (lambda x: {"logits": x}, None, "a dict has no loss"),
        (lambda x: x, lambda _: 3.0, "the loss is a float"),
        (lambda x: x, lambda x: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_module_without_a_loss(function: Any, loss: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        run(through(function), loss=loss)


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "fp32", "attention": "flash"},
        {"data_parallel_size": 2},
        {"padding": True},
    ],
)
def test_setups_that_cannot_be_traced(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        run(Mlp, replace(SETUP, **change))


def test_options_that_have_no_meaning() -> None:
    with pytest.raises(UsageError, match="flash"):
        run(Mlp, sdpa_kernel="flsh")
    with pytest.raises(UsageError, match="num_steps"):
        run(Mlp, num_steps=0)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({}, ConfigError),
        ({"model_type": "no_such_type"}, ConfigError),
        ({"model_type": "dpt"}, MemplanError),
        ({**LLAMA, "num_attention_heads": 5, "num_key_value_heads": 5}, MemplanError),
        ({"model_type": "gptj", "n_embd": 64, "n_head": 4, "n_layer": 2}, MemplanError),
    ],
)
def test_configs_that_transformers_refuses(config: dict[str, Any], error: type[Exception]) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(error) as caught:
        trace_training(config, SETUP)
    assert caught.value.cure  # type: ignore[attr-defined]


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingLibraryError, match=r"memplan\[hf\]"):
        trace_training(LLAMA, SETUP)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingLibraryError, match=r"memplan\[torch\]"):
        trace_training(LLAMA, SETUP)


def test_a_fault_of_unknown_place() -> None:
    assert faults.explain(RuntimeError("what is this"), "", "").cause == "RuntimeError: what is this."


def test_a_trace_that_fails_leaves_nothing_behind() -> None:
    call, softmax = nn.Module.__call__, nn.functional.softmax
    with pytest.raises(TraceError):
        run(through(lambda x: x.sum().item()))
    assert nn.Module.__call__ is call
    assert nn.functional.softmax is softmax


def test_events_need_no_torch() -> None:
    code = "import sys, memplan.probes.trace, memplan.probes.events; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
