"""The grid around a plan: every number is that of the estimator, in the tables and in the page that holds them."""

from __future__ import annotations

import base64
import json
import random
import re
import shlex
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from memplan import MemplanError, api, studies
from memplan.cli.main import main
from memplan.planner.goal import Goal, Target
from memplan.planner.search import Search
from memplan.planner.what_if import what_if
from memplan.report.document import plan_document
from memplan.report.pages.plan import render_plan_page
from memplan.report.study import study_document
from memplan.report.what_if import OVER_BY_TABLE, controls, estimate_command, what_if_document
from memplan.specs.adapter import Lora
from memplan.specs.training import Setup
from memplan.specs.values import replace
from tests.laws.models import LLAMA

if TYPE_CHECKING:
    from memplan.estimation.estimate import Estimator
    from memplan.planner.what_if import WhatIf

MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 512}
GPT2 = {"model_type": "gpt2", "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 1024, "vocab_size": 1000}
MOST_BYTES_OF_A_PAGE = 130_000

ASKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (LLAMA, {}),
    "of three sequences, accumulated over three GPUs": (
        LLAMA,
        {"micro_batch": 3, "accumulation": 5, "gpus": 3, "checkpointing": "every-2"},
    ),
    "windows": (MISTRAL, {"seq_len": 500, "attention": "eager"}),
    "end to end": (MISTRAL, {"batching": "padding-free", "seq_len": 256}),
    "packed": (LLAMA, {"batching": "packed", "packed_sequences": 3}),
    "masked": (GPT2, {"padding": True, "precision": "fp16-mixed", "optimizer": "adafactor"}),
    "dropout": (GPT2, {"dropout": 0.1, "checkpointing": "save-attention"}),
    "updates in the backward pass": (LLAMA, {"optimizer": "adamw-in-backward"}),
    "QLoRA": (LLAMA, {"lora_rank": 12, "lora_dropout": 0.1, "quantize": "nf4", "upcast": True}),
    "DoRA": (LLAMA, {"lora_rank": 8, "dora": True, "lora_targets": "q_proj,v_proj"}),
    "frozen": (LLAMA, {"freeze": "embed_tokens", "optimizer": "lion-8bit"}),
    "preference": (LLAMA, {"objective": "dpo"}),
    "preference of adapters": (LLAMA, {"objective": "dpo", "lora_rank": 8}),
    "odds": (LLAMA, {"objective": "orpo"}),
    "offloaded": (LLAMA, {"checkpointing": "full", "offload": "activations"}),
    "reentrant": (LLAMA, {"checkpointing": "full", "reentrant": True}),
    "half of it supervised": (LLAMA, {"supervised": 0.5, "loss": "fused"}),
    "chunked": (LLAMA, {"loss": "chunked", "seq_len": 64}),
    "evaluated": (LLAMA, {"eval_batch": 16, "checkpointing": "full"}),
    "evaluated with metrics": (MISTRAL, {"eval_batch": 4, "eval_samples": 50, "seq_len": 512}),
    "evaluated by generation": (LLAMA, {"eval_batch": 8, "eval_samples": 20, "eval_generate": 64, "seq_len": 128}),
    "evaluated end to end": (LLAMA, {"eval_batch": 16, "batching": "padding-free"}),
}


@cache
def asked(name: str) -> tuple[Estimator, Setup, WhatIf]:
    config, choices = ASKED[name]
    choices = dict(choices)
    gpu, gpus = api.find_gpu("h100", choices.pop("gpus", None))
    model = api.Model(api.read_architecture(config, "tiny", dropout=choices.get("dropout")), "tiny", config, "a test")
    estimator = api.estimator_of(model, gpu, remembers=False)
    setup = api.make_setup(model, gpus, choices)
    found = what_if(estimator, goal_of(setup), setup)
    assert found is not None
    return estimator, setup, found


def goal_of(setup: Setup) -> Goal:
    return Goal(setup=setup, target=Target(setup.global_batch_size), usable_bytes=80 * 2**30, reserve_bytes=2**28)


def at(found: WhatIf, place: dict[str, int]) -> Setup:
    """The setup of some positions on the axes."""
    fields: dict[str, Any] = {name: getattr(found.axes, name)[i] for name, i in place.items()}
    rank, own = fields.pop("lora_rank"), found.setup.lora
    lora = None if rank is None else Lora(rank=rank) if own is None else replace(own, rank=rank)
    return replace(found.setup, lora=lora, **fields)


def places(found: WhatIf, num: int) -> list[dict[str, int]]:
    """Some places, anywhere in the grid."""
    draw = random.Random(7)
    return [{name: draw.randrange(len(values)) for name, values in found.axes._asdict().items()} for _ in range(num)]


def value(found: WhatIf, table: str, place: dict[str, int]) -> Any:
    where = dict(place)
    where["several_steps"] = int(found.axes.gradient_accumulation_steps[place["gradient_accumulation_steps"]] > 1)
    where["several_gpus"] = int(found.axes.data_parallel_size[place["data_parallel_size"]] > 1)
    where["in_backward"] = int(found.in_backward[place["optimizer"]])
    return getattr(found, table)[tuple(where[name] for name in OVER_BY_TABLE[table])]


def peak_of(found: WhatIf, place: dict[str, int], steps: int) -> int:
    """As memplan.planner.what_if says it."""
    of = {name: int(value(found, name, place)) for name in OVER_BY_TABLE if name.endswith("_bytes")}
    return of["resident_bytes"] + steps * of["input_bytes"] + max(of["passes_bytes"], of["end_bytes"])


# -- the numbers -------------------------------------------------------------------------------------------------------


SOME = sorted(ASKED)[::4]
"""Those that are asked by default; the others where the slow tests are."""
ALL = [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in ASKED]


@pytest.mark.parametrize("name", ALL)
def test_every_place_is_what_the_estimator_says(name: str) -> None:
    """Bytes exactly, seconds but for the rounding of sums, refusals word by word."""
    estimator, _, found = asked(name)
    num_answered = 0
    for place in places(found, 70):
        refused = value(found, "refused", place)
        if refused:
            with pytest.raises(MemplanError) as error:
                estimator.memory(_checked(estimator, at(found, place)))
            assert str(error.value) == found.reasons[refused - 1]
            continue
        setup = _checked(estimator, at(found, place))
        steps = setup.gradient_accumulation_steps
        assert peak_of(found, place, steps) == estimator.memory(setup).peak_allocated_bytes, setup
        program, sizes = estimator.program(setup), estimator.sizes(setup)
        assert value(found, "parameter_bytes", place) == program.parameter_bytes(sizes)
        assert value(found, "gradient_bytes", place) == program.gradients.total(sizes)
        assert value(found, "optimizer_state_bytes", place) == program.optimizer_states.total(sizes)
        seconds = steps * value(found, "pass_s", place) + (steps - 1) * value(found, "added_s", place)
        step_time = estimator.step_time(setup)
        assert step_time is not None
        assert seconds + value(found, "update_s", place) == pytest.approx(step_time.total_s, rel=1e-12)
        num_answered += 1
    assert num_answered > 20


def _checked(estimator: Estimator, setup: Setup) -> Setup:
    estimator.check(setup)
    return setup


@pytest.mark.parametrize("name", ALL)
def test_accumulation_between_and_beyond_the_marks(name: str) -> None:
    """Two and more micro-steps differ by their inputs alone."""
    estimator, _, found = asked(name)
    several = len(found.axes.gradient_accumulation_steps) - 1
    for anywhere in places(found, 12):
        place = {**anywhere, "gradient_accumulation_steps": several}
        if not value(found, "refused", place):
            setup = replace(at(found, place), gradient_accumulation_steps=1001)
            assert peak_of(found, place, 1001) == estimator.memory(setup).peak_allocated_bytes


@pytest.mark.parametrize("name", ALL)
def test_it_fits_as_a_candidate_of_the_plan_does(name: str) -> None:
    """A process within the budget is one whose upper bound, headroom and reserve included, is usable."""
    estimator, setup, found = asked(name)
    goal = goal_of(setup)
    for least in (goal.usable_bytes, found.budget_bytes, found.budget_bytes + 1):
        assert (least <= found.budget_bytes) == (goal.margin.upper_bound(least) <= goal.usable_bytes)
    candidate = Search(estimator, goal).candidate(setup)
    memory = candidate.memory
    assert found.beside_bytes == memory.peak_process_bytes - memory.peak_reserved_bytes
    assert candidate.fits == (memory.peak_process_bytes <= found.budget_bytes)


@pytest.mark.parametrize("name", ALL)
def test_the_plan_is_in_its_grid(name: str) -> None:
    _, setup, found = asked(name)
    own = what_if_document(found, "memplan suggest tiny --gpu h100")["own"]
    assert at(found, own) == setup
    for name_of in ("micro_batch_size", "seq_len", "gradient_accumulation_steps", "data_parallel_size"):
        values = getattr(found.axes, name_of)
        assert list(values) == sorted(set(values))


def test_what_is_refused_says_why() -> None:
    _, _, found = asked("updates in the backward pass")
    assert any("no gradients are left to accumulate" in reason for reason in found.reasons)
    _, _, found = asked("QLoRA")
    assert any("A quantised model cannot be trained itself." in reason for reason in found.reasons)


def test_an_evaluation_is_the_peak_somewhere() -> None:
    """The grid of a run that is evaluated lies above that of the same run without, and not everywhere."""
    _, setup, found = asked("evaluated")
    estimator, plain = asked("plain")[0], replace(setup, evaluation=None)
    without = what_if(estimator, goal_of(plain), plain)
    assert without is not None
    more = found.passes_bytes - without.passes_bytes
    assert more.min() == 0
    assert more.max() > 0


def test_no_grid_under_a_compiler_where_the_peak_is_a_range() -> None:
    gpu, _ = api.find_gpu("h100", None)
    model = api.find_model("gpt2")
    assert isinstance(model, api.Model)
    setup = api.make_setup(model, 1, {"compile": True})
    assert what_if(api.estimator_of(model, gpu, remembers=False), goal_of(setup), setup) is None


# -- the page ----------------------------------------------------------------------------------------------------------


COMMANDS = (
    "memplan suggest gpt2 --gpu 2xrtx4090 --target-batch 64 --seq-len 512 --reserve 1GiB",
    "memplan suggest gpt2 --gpu h100 --target-batch 32 --lora-rank 8 --lora-dropout 0.1 --lora-targets c_attn --dora",
)


@cache
def page_of(command: str) -> str:
    words = shlex.split(command)[2:]
    choices: dict[str, Any] = {}
    flags = iter(words[1:])
    for flag in flags:
        choices[flag.lstrip("-").replace("-", "_")] = True if flag == "--dora" else _value(next(flags))
    found = studies.study(words[0], **choices)
    plan = plan_document(found.plan, origin=found.origin)
    return render_plan_page(study_document(found, plan, command))


def _value(text: str) -> Any:
    return int(text) if text.isdigit() else float(text) if text.replace(".", "").isdigit() else text


def grid_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="document">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    grid: dict[str, Any] = json.loads(found[1])["what_if"]
    return grid


def decoded(grid: dict[str, Any], name: str, where: dict[str, int]) -> float:
    """One number, as the script reads it."""
    table = grid["tables"][name]
    values = np.frombuffer(base64.b64decode(table["data"]), f"<{table['type']}")
    shape = [grid["sizes"][axis] for axis in table["over"]]
    return table["unit"] * values.reshape(shape)[tuple(where[axis] for axis in table["over"])].item()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_numbers_in_the_page_are_those_of_memplan_estimate(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line that the page shows answers with the bytes that the page has."""
    grid = grid_of(page_of(command))
    draw, num_answered = random.Random(3), 0
    for _ in range(12):
        place = {axis: draw.randrange(len(values)) for axis, values in grid["axes"].items()}
        chosen = {axis: values[place[axis]] for axis, values in grid["axes"].items()}
        steps, gpus = chosen["gradient_accumulation_steps"], chosen["data_parallel_size"]
        where = {**place, "several_steps": int(steps > 1), "several_gpus": int(gpus > 1), "in_backward": 0}
        assert not decoded(grid, "refused", where)
        prefix = grid["commands"][int(chosen["lora_rank"] is not None)]
        words = [f"{flag} {chosen[axis]}" for axis, flag in grid["flags"].items() if chosen[axis] is not None]
        status = main([*shlex.split(prefix)[1:], *" ".join(words).split(), "--json", "--quiet"])
        answer = json.loads(capsys.readouterr().out)
        of = {name: decoded(grid, name, where) for name in OVER_BY_TABLE}
        assert status in {0, 3}
        peak = of["resident_bytes"] + steps * of["input_bytes"] + max(of["passes_bytes"], of["end_bytes"])
        assert peak == answer["peak_allocated_bytes"]
        seconds = steps * of["pass_s"] + (steps - 1) * of["added_s"] + of["update_s"]
        assert seconds == pytest.approx(answer["step_time_s"], rel=1e-6)
        num_answered += 1
    assert num_answered == 12


def test_the_tables_hold_what_was_found() -> None:
    _, _, found = asked("plain")
    document = what_if_document(found, "memplan suggest tiny --gpu h100")
    for name, over in OVER_BY_TABLE.items():
        table, values = document["tables"][name], getattr(found, name)
        assert table["over"] == list(over)
        raw = np.frombuffer(base64.b64decode(table["data"]), f"<{table['type']}").astype(np.float64) * table["unit"]
        exact = not name.endswith("_s")
        np.testing.assert_allclose(raw.reshape(values.shape), values, rtol=0 if exact else 1e-7)


def test_more_bytes_than_32_bits_of_blocks_count() -> None:
    _, _, found = asked("plain")
    huge = replace(found, passes_bytes=found.passes_bytes * 10**6)
    table = what_if_document(huge, "memplan suggest tiny --gpu h100")["tables"]["passes_bytes"]
    assert table["type"] == "f8"
    raw = np.frombuffer(base64.b64decode(table["data"]), "<f8") * table["unit"]
    assert raw.tolist() == huge.passes_bytes.ravel().tolist()


@pytest.mark.parametrize(
    ("command", "with_adapters", "expected"),
    [
        ("memplan suggest gpt2 --gpu 2xh100 --target-batch 32", False, "memplan estimate gpt2 --gpu h100"),
        (
            "memplan suggest 'a b' --gpu '4 x 24GB' --gpus 4 --target-tokens 4M --padding",
            True,
            "memplan estimate 'a b' --gpu 24GB --padding",
        ),
        (
            "memplan suggest gpt2 --gpu h100 --lora-rank 8 --dora --lora-targets q --reserve 1GiB",
            False,
            "memplan estimate gpt2 --gpu h100 --reserve 1GiB",
        ),
        (
            "memplan suggest gpt2 --gpu h100 --lora-rank 8 --dora --lora-targets q",
            True,
            "memplan estimate gpt2 --gpu h100 --dora --lora-targets q",
        ),
    ],
)
def test_the_command_line_without_what_is_chosen(command: str, with_adapters: bool, expected: str) -> None:
    assert estimate_command(command, Setup(), with_adapters=with_adapters) == expected


@pytest.mark.parametrize(
    ("setup", "given", "expected"),
    [
        (Setup(padding=True, supervised=0.25), "", " --padding --supervised 0.25"),
        (Setup(padding=True), "--padding", " --padding"),
        (Setup(supervised=0.25), "--supervised 0.25", " --supervised 0.25"),
        (
            Setup(batching="packed", packed_sequences=7),
            "--batching packed",
            " --batching packed --packed-sequences 7",
        ),
    ],
)
def test_in_place_of_data_stands_what_it_says(setup: Setup, given: str, expected: str) -> None:
    of_data = "--data d --tokenizer t --field f --prompt-field p --truncation left --max-loss 1 --sample 9"
    command = f"memplan suggest gpt2 --gpu t4 --target-batch 8 {given} {of_data}"
    assert estimate_command(command, setup, with_adapters=True) == f"memplan estimate gpt2 --gpu t4{expected}"


def test_its_script_is_small_and_the_one_that_the_policy_allows() -> None:
    page = page_of(COMMANDS[0])
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in page
    assert len(scripts[0].encode()) <= 5 * 1024
    assert len(json.dumps(grid_of(page))) <= MOST_BYTES_OF_A_PAGE


def test_the_same_question_gives_the_same_page() -> None:
    assert page_of.__wrapped__(COMMANDS[0]) == page_of(COMMANDS[0])


def test_a_page_without_a_grid_has_no_script() -> None:
    found = studies.study("gpt2", gpu="h100", target_batch=8, compile=True)
    plan = plan_document(found.plan, origin=found.origin)
    page = render_plan_page(study_document(replace(found, what_if=None), plan, "memplan suggest gpt2 --gpu h100"))
    assert found.what_if is None
    assert "<script>" not in page
    assert "What if" not in page


def test_what_has_one_value_is_no_control() -> None:
    _, _, found = asked("plain")
    document = what_if_document(found, "memplan suggest tiny --gpu h100")
    document["axes"]["seq_len"], document["own"]["seq_len"] = [512], 0
    assert "seq_len" not in {one.name for one in controls(document)}
    assert "micro_batch_size" in {one.name for one in controls(document)}
