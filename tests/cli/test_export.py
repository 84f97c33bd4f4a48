"""`memplan export --to torch`: the program is what was planned, and trains as the whole batch would."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn
from torch.nn import functional

from memplan.errors import MemplanError
from memplan.export.torch_loop import MAKER_BY_OPTIMIZER, torch_loop
from memplan.probes.optimizers import real_optimizer
from memplan.specs.training import OPTIMIZERS, library_of
from tests.cli.test_documents import read_schema

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SETUPS = (
    "",
    "--gpus 2 --target-batch 8",
    "--padding --precision bf16-mixed",
    "--precision fp16-mixed --optimizer sgd-momentum",
    "--batching padding-free --attention flash",
    "--checkpointing every-2 --offload activations",
    "--checkpointing full --reentrant",
    "--lora-rank 8 --lora-dtype base --dropout 0.1",
    "--lora-rank 8 --quantize nf4 --upcast --optimizer paged-adamw-8bit",
    "--optimizer adafactor",
    "--optimizer adamw-forloop --eval-batch 4",
    "--optimizer schedule-free-adamw --alloc",
)


@pytest.fixture
def planned(run, tmp_path: Path):
    """Makes the file of a plan for a model of two layers, and reads it."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def plan(options: str) -> dict[str, Any]:
        batch = "" if "--target-batch" in options else "--target-batch 6 "
        ran = run(f"suggest config.json --gpu 24GB --seq-len 16 {batch}{options} --json --output plan.json")
        assert ran.status == 0, ran.err
        found: dict[str, Any] = json.loads((tmp_path / "plan.json").read_text())
        return found

    return plan


def constants_of(text: str) -> dict[str, Any]:
    """Names in capitals and their numbers."""
    lines = [one for one in ast.parse(text).body if isinstance(one, ast.Assign)]
    return {one.targets[0].id: one.value.value for one in lines if isinstance(one.value, ast.Constant)}


@pytest.mark.parametrize("options", SETUPS)
def test_the_program_splits_the_batch_as_planned(planned, options: str) -> None:
    plan = planned(options.replace(" --alloc", ""))
    if "--alloc" in options:
        plan["best"]["alloc_conf"] = "expandable_segments:True"
    text, setup = torch_loop(plan), plan["best"]["setup"]
    compile(text, "train.py", "exec")
    found = constants_of(text)
    assert found["MICRO_BATCH"] == setup["micro_batch_size"]
    assert found["ACCUMULATION"] == setup["gradient_accumulation_steps"]
    assert found["RANKS"] == setup["data_parallel_size"]
    most = setup["micro_batch_size"] * 16 if setup["batching"] == "padding-free" else 16
    assert found.get("MOST_TOKENS", found.get("TOKENS")) == most
    assert ("--nproc-per-node 2" in text) == ("--gpus 2" in options)
    assert ("GradScaler" in text) == ("fp16-mixed" in options)
    assert ("torch.autocast" in text) == ("-mixed" in options)
    assert ("PYTORCH_ALLOC_CONF=expandable_segments:True" in text) == ("--alloc" in options)
    assert max(map(len, text.splitlines())) <= 120
    assert text.endswith("\n") and not text.endswith("\n\n")


@pytest.mark.parametrize("name", MAKER_BY_OPTIMIZER)
def test_optimizers_are_made_as_they_are_measured(name: str) -> None:
    pytest.importorskip(library_of(name))
    maker = MAKER_BY_OPTIMIZER[name]
    module = nn.Linear(8, 8)
    names = {"torch": torch, "trained": list(module.parameters())}
    exec(maker.imported, names)
    made = eval(f"{maker.made}(trained, lr=1e-4{maker.arguments})", names)
    wanted = real_optimizer(module, name)
    assert type(made) is type(wanted)
    assert made.defaults == wanted.defaults
    assert getattr(made, "is_paged", None) == getattr(wanted, "is_paged", None)
    assert vars(getattr(made, "args", object)) == vars(getattr(wanted, "args", object))


def test_every_optimizer_that_is_left_out_steps_in_its_own_way() -> None:
    left_out = {"adamw-offloaded", "muon", "galore-adamw", "apollo-adamw", "adamw-in-backward", "lomo", "adalomo"}
    assert set(OPTIMIZERS.values()) - set(MAKER_BY_OPTIMIZER) == left_out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--loss tiled", "the loss tiled"),
        ("--batching packed --attention flash", "packing"),
        ("--compile", "torch.compile"),
        ("--optimizer galore-adamw", "the optimizer galore-adamw"),
        ("--checkpointing selective --attention eager", "selective checkpointing"),
        ("--freeze model.embed_tokens", "frozen parts"),
        ("--label-smoothing 0.1", "smoothed labels"),
        ("--objective dpo", "the objective dpo"),
    ],
)
def test_what_the_loop_cannot_do_is_refused_by_name(planned, run, options: str, said: str) -> None:
    planned(options)
    ran = run("export plan.json --to torch")
    assert ran.status == 1
    assert f"The loop does not do {said}" in ran.err
    assert not ran.out


def test_a_plan_of_somebody_else_gets_no_code_into_the_program(planned) -> None:
    plan = planned("--lora-rank 8 --dropout 0.1")
    evil = 'x"""\nimport os\nos.system("true")\n"""'
    plan["model"]["name"] = plan["gpu"]["label"] = plan["memplan_version"] = evil
    plan["best"]["alloc_conf"] = evil
    plan["trainer"] = {"dtype": evil, "lora": {evil: 1}, "arguments": {evil: 1}}
    plan["best"]["setup"]["lora"]["targets"] = ["a'); import os; ('"]
    tree = ast.parse(torch_loop(plan))
    imported = {alias.name for one in ast.walk(tree) if isinstance(one, ast.Import) for alias in one.names}
    assert imported == {"argparse", "json", "torch", "memplan"}
    assert [type(one).__name__ for one in tree.body[:2]] == ["Expr", "Import"]
    plan["best"]["setup"]["micro_batch_size"] = "1\nimport os"
    with pytest.raises(MemplanError):
        torch_loop(plan)


def test_a_plan_where_nothing_fits_is_not_exported(run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    run("suggest config.json --gpu 0.5GB --target-batch 2 --json --output none.json")
    ran = run("export none.json --to torch")
    assert ran.status == 1
    assert "Nothing fits" in ran.err


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("export", 2, "Missing argument"),
        ("export plan.json", 2, "--to is missing"),
        ("export plan.json --to axolotl", 2, "not known"),
        ("export there-is-none.json --to torch", 1, "There is no file"),
        ("export config.json --to torch", 1, "no answer of memplan"),
    ],
)
def test_faults(planned, run, command: str, status: int, said: str) -> None:
    planned("")
    ran = run(command)
    assert ran.status == status
    assert said in ran.err


def test_a_file_of_another_answer_is_refused(planned, run) -> None:
    planned("")
    run("estimate config.json --json --output estimate.json")
    ran = run("export estimate.json --to torch")
    assert ran.status == 1
    assert "kind estimate" in ran.err


def test_single_rows_may_differ_in_length(planned) -> None:
    """There is nothing to pad; several rows of the plan have no mask, and so one length."""
    assert "lengths[-1] > MOST_TOKENS" in torch_loop(planned("--micro-batch 1"))
    assert "lengths[0] == lengths[-1] == TOKENS" in torch_loop(planned("--micro-batch 2"))


def test_data_is_cut_where_the_plan_cuts_it(run, planned, tmp_path: Path) -> None:
    """Not at the length of the worst micro-batch."""
    lengths = [{"num_tokens": n} for n in (3, 5, 9, 30)]
    (tmp_path / "counts.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lengths))
    rows = torch_loop(planned("--target-batch 4 --micro-batch 2 --data counts.jsonl"))
    assert constants_of(rows)["MOST_TOKENS"] == 16 and "attention_mask" in rows
    flat = planned("--target-batch 4 --micro-batch 2 --data counts.jsonl --batching padding-free")
    assert constants_of(torch_loop(flat))["MOST_TOKENS"] == 2 * 13  # 16 + 9, evenly


def test_json_and_a_file_hold_the_program(planned, run, tmp_path: Path) -> None:
    text = torch_loop(planned(""))
    document = json.loads(run("export plan.json --to torch --json").out)
    jsonschema.Draft202012Validator(read_schema("export")).validate(document)
    assert document["text"] == text
    ran = run("export plan.json --to torch --output train.py")
    assert ran.status == 0
    assert (tmp_path / "train.py").read_text() == text
    assert run("export plan.json --to torch").out == text


# -- it runs -----------------------------------------------------------------------------------------------------------


def samples_of(num: int, *, ragged: bool) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for at in range(num):
        length = 16 - (3 * at) % 11 if ragged else 16
        ids = torch.randint(61, (length,), generator=generator).tolist()
        silent = (5 * at) % (length - 2)
        found.append({"input_ids": ids, "labels": [-100] * silent + ids[silent:]})
    return found


def whole_batches(model: Any, batches: list[list[dict[str, list[int]]]], rate: float) -> None:
    """SGD on the mean over all tokens of each batch, one sample after the other, clipped to a norm of 1."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for batch in batches:
        total, num = torch.zeros(()), 0
        for one in batch:
            ids, labels = (torch.tensor([one[name]]) for name in ("input_ids", "labels"))
            logits = model(input_ids=ids).logits[0, :-1]
            total = total + functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
            num += int((labels[0, 1:] != -100).sum())
        (total / num).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(("options", "ranks"), [("", 1), ("--padding", 1), ("--padding --checkpointing full", 2)])
def test_the_program_trains_as_the_whole_batch_would(run, tmp_path: Path, options: str, ranks: int) -> None:
    """Fourteen samples in batches of six: two whole steps and a short one; the reference never sees a micro-batch."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).float()
    model.save_pretrained(tmp_path / "model")
    before = weights(model)
    samples = samples_of(14, ragged="--padding" in options)
    (tmp_path / "tokens.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in samples))
    split = f"--gpus {ranks} --micro-batch 1 --target-batch 6 --seq-len 16 --precision fp32 --optimizer sgd"
    assert run(f"suggest model --gpu 24GB {split} {options} --json --output plan.json").status == 0
    assert run("export plan.json --to torch --output train.py").status == 0
    started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    rate = ["--learning-rate", "0.5", "--device", "cpu"]
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run(
        [sys.executable, *started, "train.py", "tokens.jsonl", "trained", *rate],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert [line.split(":")[0] for line in ran.stdout.splitlines()] == ["step 1", "step 2", "step 3"]
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0)).tolist()
    order.sort(key=lambda at: -len(samples[at]["input_ids"]))  # the longest first
    rest = [order.pop() for _ in order[6:]]
    order += [rest[at] for at in torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    batches = [[samples[at] for at in order[start : start + 6]] for start in (0, 6, 12)]
    whole_batches(model, batches, 0.5)
    trained = weights(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "trained"))
    wanted = weights(model)
    assert (trained - wanted).norm() < 1e-5 * (wanted - before).norm()


@pytest.mark.slow
def test_the_program_refuses_data_that_takes_more(run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    run("suggest config.json --gpu 24GB --target-batch 6 --seq-len 8 --padding --json --output plan.json")
    run("export plan.json --to torch --output train.py")
    (tmp_path / "tokens.jsonl").write_text(json.dumps(samples_of(1, ragged=False)[0]) + "\n")
    ran = subprocess.run(
        [sys.executable, "train.py", "tokens.jsonl", "out", "--learning-rate", "1", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "a sample has 16 tokens, planned are 8" in ran.stderr
