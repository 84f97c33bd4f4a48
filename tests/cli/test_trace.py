"""`memplan trace`, and `estimate` and `suggest` of a module of one's own."""

from __future__ import annotations

import json
import os
import sys

import jsonschema
import pytest

pytest.importorskip("torch")

from memplan.catalog.snapshots import read_snapshot
from memplan.probes import faults
from tests.cli.test_documents import read_schema, refuse, unlisted

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
STARCODER = LLAMA | {"model_type": "starcoder2"}

MODULES = """
import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class OwnLoss(Mlp):
    def make_inputs(self, micro_batch_size, seq_len):
        return {"x": torch.randn(micro_batch_size, seq_len, 64)}

    def forward(self, x):
        return {"loss": super().forward(x).pow(2).mean()}


class Longer(OwnLoss):
    def forward(self, x):
        if x.shape[1] > 300:
            x = torch.tanh(x)
        return super().forward(x)


class MuchLonger(OwnLoss):
    def forward(self, x):
        if x.shape[1] > 500:
            x = torch.sigmoid(torch.cat([torch.tanh(x * self.layers[0].weight[0])] * 8))
        return super().forward(x)


class OnCuda(OwnLoss):
    def forward(self, x):
        return super().forward(x.cuda())


class Narrow(OwnLoss):
    def forward(self, x):
        return super().forward(x[:, :, :32])


class Leaving(OwnLoss):
    def forward(self, x):
        raise SystemExit(3)


class Hoarding(OwnLoss):
    def forward(self, x):
        self.hoard = [*getattr(self, "hoard", []), x * 2]
        return super().forward(x)


def leaves_inside():
    return Leaving(), rows


def rows(micro_batch_size, seq_len):
    return torch.randn(micro_batch_size, seq_len, 64)


def mean(output):
    return output.mean()


def mlp():
    return Mlp(), rows, mean


def raises():
    raise ValueError("no weights here")


def number():
    return 3


def leaves():
    raise SystemExit(0)


def recurrent():
    return nn.LSTM(64, 64), rows, lambda output: output[0].mean()


def ids():
    return Mlp()


def hoarding():
    return Hoarding(), rows


def no_loss():
    return Mlp(), rows


def on_cuda():
    return Mlp().cuda(), rows, mean


own_loss, longer, much_longer, cuda_inside, narrow, made = OwnLoss, Longer, MuchLonger, OnCuda, Narrow, Mlp()
"""

BAD = [
    ("raises", 1, "raises ValueError: no weights here", "Correct the factory"),
    ("number", 1, "returns int, not a module", "Return an nn.Module"),
    ("leaves", 1, "raises SystemExit: 0", "__main__"),
    ("leaves_inside", 1, "SystemExit: 3", "__main__"),
    ("recurrent", 1, "nn.LSTM at the top", "recurrent"),
    ("ids", 1, "input_ids", "return (module, inputs, loss)"),
    ("no_loss", 1, "The module has no loss", "output.loss"),
    ("on_cuda", 1, "CUDA", "Leave the device to memplan"),
    ("cuda_inside", 1, "CUDA", "Leave the device to memplan"),
    ("narrow", 1, "must have same reduction dim", "shapes"),
    ("made", 1, "is a Mlp, not a function", "Name a function"),
    ("mpl", 1, "has no 'mpl'", "Did you mean mlp"),
    ("m-l-p", 2, "does not name a factory", "package.module:factory"),
]


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch) -> None:
    """The current folder holds a module and a config; imports of this test are forgotten."""
    (tmp_path / "own_modules.py").write_text(MODULES)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "own_modules" not in path])
    monkeypatch.delitem(sys.modules, "own_modules", raising=False)
    yield
    sys.modules.pop("own_modules", None)


def check(document: dict, schema: str) -> None:
    rules = read_schema(schema)
    jsonschema.Draft202012Validator(rules).validate(document)
    assert unlisted(document, rules, rules) == []


def parsed(ran) -> dict:
    return json.loads(ran.out, parse_constant=refuse)


def test_a_config_in_the_shape_of_an_estimate(run) -> None:
    """The trace can be subtracted from the estimate: kept bytes are equal, the peak nearly."""
    pytest.importorskip("transformers")
    setup = "config.json --micro-batch 2 --gpu rtx4090 --json"
    estimate, trace = parsed(run(f"estimate {setup}")), parsed(run(f"trace {setup}"))
    check(trace, "estimate")
    assert trace["kind"] == "trace"
    assert trace["setup"] == estimate["setup"]
    for key in ("parameter_bytes", "gradient_bytes", "optimizer_state_bytes", "kept_activation_bytes"):
        assert trace[key] == estimate[key]
    assert trace["kept_activation_bytes_per_layer"] == estimate["kept_activation_bytes_per_layer"]
    assert trace["peak_allocated_bytes"] == pytest.approx(estimate["peak_allocated_bytes"], rel=0.005)
    assert [one["name"] for one in trace["instants"]] == ["forward", "backward", "gradient clip", "optimizer step"]
    assert sum(row["bytes_at_peak"] for row in trace["ledger"]) == trace["peak_process_bytes"]
    assert trace["peak_allocated_bytes"] == max(one["allocated_bytes"] for one in trace["instants"])
    assert trace["fits"] is True


def test_every_format(run) -> None:
    text = run("trace own_modules:mlp --gpu 24GB")
    assert text.status == 0
    for part in ("The peak, at its highest", "Over a step", "It fits", "scaled_dot_product_attention"):
        assert part in text.out
    assert max(map(len, text.out.splitlines())) <= 80
    assert run("trace own_modules:mlp --format csv").out.startswith("module,tensor,kind")
    assert "layers.*" in run("trace own_modules:mlp --format markdown").out
    assert text.err == ""


def test_accumulation_counts_the_inputs_of_all_micro_batches(run) -> None:
    """Beyond two micro-steps nothing is traced again; every further micro-batch is there from the start."""
    two, five = (parsed(run(f"trace own_modules:mlp --accumulation {k} --json")) for k in (2, 5))
    micro_batch = 1024 * 64 * 2
    for one, other in zip(two["instants"], five["instants"], strict=True):
        assert other["allocated_bytes"] - one["allocated_bytes"] == 3 * micro_batch
    assert five["setup"]["global_batch_size"] == 5
    inputs = [row for row in five["ledger"] if row["kind"] == "input"]
    assert sum(row["bytes"] for row in inputs) == 5 * micro_batch


def test_it_does_not_fit(run) -> None:
    ran = run("trace own_modules:mlp --gpu 500MB")
    assert ran.status == 3
    assert "It does not fit" in ran.out
    assert "a trace looks for none: memplan suggest" in ran.out
    assert "are not priced" in " ".join(run("estimate own_modules:mlp --gpu 500MB").out.split())


def test_formula_against_trace(run) -> None:
    """GIVEN a described model, THEN all that it keeps is equal; a kernel that keeps more is named."""
    pytest.importorskip("transformers")
    ran = run("trace config.json --diff")
    assert ran.status == 0
    assert "equal, tensor by tensor" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80
    numbers = parsed(run("trace config.json --diff --json"))
    assert numbers["kept"] == []
    assert [one["name"] for one in numbers["instants"]] == [
        "forward, loss and backward",
        "gradient clip",
        "optimizer step",
    ]
    assert all(abs(one["percent"]) < 2 for one in numbers["instants"])
    other = run("trace config.json --diff --json --sdpa-kernel math")
    document = parsed(other)
    check(document, "trace-diff")
    assert other.status == 0
    assert document["kept"]
    assert {row["witness"] for one in document["kept"] for row in one["rows"]} == {"formula", "trace"}
    assert "Kept by only one" in run("trace config.json --diff --sdpa-kernel math").out


@pytest.mark.slow
def test_what_is_not_described_can_be_traced(run, tmp_path) -> None:
    """GIVEN a family without a description, THEN a trace answers, whoever asks."""
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(STARCODER))
    document = parsed(run("trace config.json --seq-len 16 --json"))
    check(document, "estimate")
    assert document["model"]["model_type"] == "starcoder2"
    estimate = parsed(run("estimate config.json --seq-len 16 --json"))
    check(estimate, "estimate")
    assert estimate["peak_allocated_bytes"] == document["peak_allocated_bytes"]
    assert parsed(run("suggest config.json --seq-len 16 --gpu 24GB --target-batch 4 --json"))["best"]
    assert run("trace config.json --diff").status == 1


def test_a_snapshot(run, tmp_path) -> None:
    """It is read back, and holds the reserved bytes of the answer."""
    ran = run("trace own_modules:own_loss --json --snapshot run.pickle")
    (device,) = read_snapshot(tmp_path / "run.pickle")
    assert device.peak_reserved_bytes == parsed(ran)["peak_reserved_bytes"]
    assert ran.err == "memplan: snapshot written to run.pickle\n"
    content = (tmp_path / "run.pickle").read_bytes()
    assert b"layers.0" in content
    assert b"aten.addmm" in content


@pytest.mark.parametrize(("name", "status", "cause", "cure"), BAD)
def test_a_bad_factory(run, tmp_path, name: str, status: int, cause: str, cure: str) -> None:
    """One sentence of cause, one of cure, and nothing half-written."""
    before = sorted(os.listdir(tmp_path))
    ran = run(f"trace own_modules:{name} --snapshot run.pickle --output answer.txt")
    assert (ran.status, ran.out) == (status, "")
    first, second = ran.err.splitlines()
    assert cause in first
    assert cure in second
    assert [name for name in sorted(os.listdir(tmp_path)) if name != "__pycache__"] == before


@pytest.mark.parametrize(
    ("command", "status", "cause"),
    [
        ("trace not_there:make", 1, "cannot be imported"),
        ("trace own_modules:mlp --diff", 2, "has no formula"),
        ("trace gpt2 --seq-len 99999", 2, "positions for 1024 tokens, not for 99999"),
        ("trace own_modules:mlp --snapshot -", 2, "not for the screen"),
        ("trace own_modules:mlp --gpus 2", 2, "one rank"),
        ("trace own_modules:mlp --padding", 2, "makes its own inputs"),
        ("trace own_modules:mlp --sdpa-kernel flesh", 2, "'flesh' is not known"),
        ("trace own_modules:mlp --snapshot no/such/run.pickle", 1, "cannot be written"),
        ("suggest own_modules:mlp --gpu 2x24GB --target-batch 8", 2, "for one GPU"),
        ("suggest own_modules:longer --gpu 24GB --target-batch 8", 1, "takes another path at micro-batch"),
    ],
)
def test_what_has_no_answer(run, command: str, status: int, cause: str) -> None:
    ran = run(command)
    assert (ran.status, ran.out) == (status, "")
    assert cause in ran.err
    assert len(ran.err.splitlines()) == 2


def test_a_module_that_holds_more_from_step_to_step(run) -> None:
    """Doubled inputs of 4 x 16 x 64 numbers in bf16 are held after each step."""
    document = parsed(run("trace own_modules:hoarding --micro-batch 4 --seq-len 16 --json"))
    (found,) = (one for one in document["assumptions"] if one["what"] == "steps")
    assert f"{4 * 16 * 64 * 2:+,} bytes" in found["value"]
    steady = parsed(run("trace own_modules:mlp --micro-batch 4 --seq-len 16 --json"))
    assert "steps" not in [one["what"] for one in steady["assumptions"]]


def test_a_file_of_that_name_has_priority(run, tmp_path) -> None:
    (tmp_path / "own_modules:mlp").write_text("{}")
    assert "model_type" in run("trace own_modules:mlp").err


def test_without_torch(run, monkeypatch) -> None:
    def missing(library: str) -> None:
        raise ImportError(f"No module named {library!r}")

    monkeypatch.setattr(faults, "import_module", missing)
    for command in ("trace own_modules:mlp", "estimate own_modules:mlp"):
        ran = run(command)
        assert ran.status == 1
        assert "This needs torch" in ran.err
        assert "pip install 'memplan[torch]'" in ran.err


def test_an_estimate_of_a_module(run) -> None:
    """It is the trace's answer under the name of an estimate."""
    estimate, trace = (parsed(run(f"{command} own_modules:own_loss --json")) for command in ("estimate", "trace"))
    check(estimate, "estimate")
    assert (estimate.pop("kind"), trace.pop("kind")) == ("estimate", "trace")
    assert estimate == trace
    assert estimate["setup"]["seq_len"] == 1024
    assert estimate["model"]["model_type"] == "traced"


def test_a_plan_of_a_module(run) -> None:
    """What the plan says of its best configuration is what a direct trace of it says; programs are remembered."""
    command = "suggest own_modules:own_loss --gpu 600MB --target-batch 64 --json"
    ran = run(command)
    plan = parsed(ran)
    check(plan, "plan")
    assert ran.status == 0
    best = plan["best"]
    setup = best["setup"]
    assert setup["micro_batch_size"] > 1
    assert setup["gradient_accumulation_steps"] > 1
    assert setup["activation_checkpointing"] == "none"
    size = f"--micro-batch {setup['micro_batch_size']} --accumulation {setup['gradient_accumulation_steps']}"
    trace = parsed(run(f"trace own_modules:own_loss --gpu 600MB {size} --json"))
    assert trace["peak_allocated_bytes"] == best["peak_allocated_bytes"]
    assert trace["peak_reserved_bytes"] == best["peak_reserved_bytes"]
    assert plan["levers"] == []
    files = os.listdir(os.path.join(os.environ["MEMPLAN_CACHE_DIR"], "programs"))
    assert len(files) == 1
    assert parsed(run(command)) == plan
    assert "The plan" in run(command.removesuffix(" --json")).out


def test_a_plan_that_a_trace_of_its_own_size_contradicts(run) -> None:
    """GIVEN a module that takes more above the sizes that were fitted, THEN the trace's bytes hold."""
    ran = run("suggest own_modules:much_longer --gpu 24GB --target-batch 64 --json")
    plan = parsed(ran)
    check(plan, "plan")
    assert ran.status == 0
    trace = parsed(run("trace own_modules:much_longer --micro-batch 64 --json"))
    assert plan["best"]["setup"]["micro_batch_size"] == 64
    assert plan["best"]["peak_allocated_bytes"] == trace["peak_allocated_bytes"]
    (size,) = [one for one in plan["assumptions"] if one["what"] == "size"]
    assert size["effect_bytes"] < 0
    assert "which is used" in size["value"]
    tight = parsed(run("suggest own_modules:much_longer --gpu 600MB --target-batch 64 --json"))
    assert tight["fits"] is True
    assert tight["best"]["headroom_bytes"] >= 0
    assert "trace of its own size" in tight["rejections"][0]["reason"]


def test_a_plan_that_does_not_fit(run) -> None:
    ran = run("suggest own_modules:own_loss --gpu 530MB --target-batch 2048 --micro-batch 1024")
    assert ran.status == 3
    assert "Nothing fits" in ran.out


def test_what_the_compiler_keeps_is_inside_the_range_of_the_estimate(run) -> None:
    """GIVEN --compile, THEN the trace names bytes kept, and the estimate a range around them."""
    pytest.importorskip("transformers")
    setup = "config.json --micro-batch 2 --gpu rtx4090 --compile --json"
    estimate, trace = parsed(run(f"estimate {setup}")), parsed(run(f"trace {setup}"))
    check(estimate, "estimate")
    check(trace, "estimate")
    assert estimate["setup"]["compile"] is trace["setup"]["compile"] is True
    kept, found = (one["compiled"]["kept_activation_bytes"] for one in (estimate, trace))
    assert kept["low"] <= found["low"] == found["high"] <= kept["high"]
    assert kept["high"] == estimate["kept_activation_bytes"]
    low, traced = (one["compiled"]["peak_allocated_bytes"] for one in (estimate, trace))
    assert low["low"] <= traced["low"]
    assert traced["high"] == pytest.approx(low["high"], rel=0.005)
    assert (estimate["compiled"]["is_traced"], trace["compiled"]["is_traced"]) == (False, True)
    assert any(one["what"] == "graph breaks" for one in trace["unmodelled"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--diff", "compared without a compiler"),
        ("--accumulation 2", "one micro-step is traced"),
        ("--checkpointing full", "checkpointed layers is not traced"),
    ],
)
def test_what_is_not_traced_under_the_compiler(run, options: str, said: str) -> None:
    ran = run(f"trace config.json --compile {options}")
    assert ran.status == 2
    assert said in ran.err


def test_a_module_of_ones_own_is_traced_under_the_compiler_and_not_planned(run) -> None:
    assert parsed(run("estimate own_modules:mlp --compile --json"))["compiled"]["is_traced"]
    ran = run("suggest own_modules:mlp --compile --gpu 24GB --target-batch 8")
    assert ran.status == 2
    assert "ask memplan trace" in ran.err
