"""The sliders of a plan's page, moved in Chromium: what the page says is what the estimator says."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from memplan import api, studies
from memplan.report.document import plan_document
from memplan.report.pages.plan import render_plan_page
from memplan.report.study import study_document
from memplan.report.text import signed, signed_seconds
from memplan.specs.adapter import Lora
from memplan.specs.values import replace
from memplan.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memplan.planner.study import Study
    from memplan.planner.what_if import WhatIf
    from memplan.specs.training import Setup

ROOT = Path(__file__).parents[2]
MODEL, GPU = "qwen2.5-0.5b", "rtx4090"
COMMAND = f"memplan suggest {MODEL} --gpu {GPU} --target-batch 24 --precision bf16-mixed"
ROWS = ("parameters", "gradients", "states", "activations", "beside", "tensors", "process", "time", "tokens")


@pytest.fixture(scope="module")
def study() -> Study:
    return studies.study(MODEL, gpu=GPU, target_batch=24, precision="bf16-mixed")


@pytest.fixture(scope="module")
def grid(study: Study) -> WhatIf:
    assert study.what_if is not None
    return study.what_if


@pytest.fixture(scope="module")
def file(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = plan_document(study.plan, origin=study.origin)
    path = tmp_path_factory.mktemp("what-if") / "page.html"
    text = render_plan_page(study_document(study, plan, COMMAND))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    """The page, which has nothing to complain of until the end of the test."""
    said: list[str] = []
    opened = browser.new_page()
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto(file.as_uri())
    yield opened
    opened.close()
    assert said == []


def move(page: Any, **positions: int) -> None:
    """Move sliders, choose names: positions on the axes."""
    for axis, position in positions.items():
        control = page.locator(f"#what-if-{axis}")
        if control.get_attribute("type") == "range":
            control.fill(str(position))
        else:
            control.select_option(str(position))


def text_of(page: Any, name: str) -> str:
    return str(page.locator(f"#what-if-{name}").text_content())


def rows_of(page: Any) -> dict[str, tuple[str, str]]:
    """This, and against the plan."""
    cells = page.locator("#what-if-rows td").all_text_contents()
    return dict(zip(ROWS, zip(cells[::2], cells[1::2], strict=True), strict=True))


def setup_at(grid: WhatIf, positions: dict[str, int]) -> Setup:
    own = {name: value for name, value in vars(grid.setup).items() if name in grid.axes._fields}
    fields = {**own, **{name: getattr(grid.axes, name)[i] for name, i in positions.items() if name != "lora_rank"}}
    rank = grid.axes.lora_rank[positions.get("lora_rank", 0)]
    return replace(grid.setup, lora=None if rank is None else Lora(rank=rank), **fields)


def check(page: Any, study: Study, grid: WhatIf, positions: dict[str, int]) -> None:
    """Everything that is shown against the estimator."""
    model = api.find_model(MODEL)
    assert isinstance(model, api.Model)
    estimator = api.estimator_of(model, study.plan.gpu, api.find_speed(study.plan.gpu), remembers=False)
    setup = setup_at(grid, positions)
    own, found = estimator.memory(grid.setup), estimator.memory(setup)
    step, own_step = estimator.step_time(setup), estimator.step_time(grid.setup)
    assert step is not None
    assert own_step is not None
    rows = rows_of(page)
    tensors, process = found.peak_allocated_bytes, found.peak_process_bytes
    assert rows["tensors"] == (format_bytes(tensors), change(tensors - own.peak_allocated_bytes))
    assert rows["process"] == (format_bytes(process), change(process - own.peak_process_bytes))
    assert rows["beside"][0] == format_bytes(process - tensors)
    program, sizes = estimator.program(setup), estimator.sizes(setup)
    assert rows["parameters"][0] == format_bytes(program.parameter_bytes(sizes))
    assert rows["gradients"][0] == format_bytes(program.gradients.total(sizes))
    assert rows["states"][0] == format_bytes(program.optimizer_states.total(sizes))
    assert rows["time"][0] in either(step.total_s)
    assert rows["time"][1] in ("0", *map(signed_seconds, around(step.total_s - own_step.total_s, step.total_s)))
    assert float(rows["tokens"][0].replace(",", "")) == pytest.approx(setup.tokens_per_step / step.total_s, abs=0.51)
    margin, usable = study.plan.goal.margin, study.plan.gpu.usable_bytes
    free = usable - margin.upper_bound(process)
    end = f"at most {format_bytes(free)} free beyond the margin." if free >= 0 else f"{format_bytes(-free)} too much."
    begin = "✓ Fits at the least:" if free >= 0 else "✗ Does not fit: at least"
    said = f"{begin} {format_bytes(process)} of {format_bytes(usable)}, {end}"
    assert text_of(page, "verdict") == said
    split = (setup.micro_batch_size, setup.gradient_accumulation_steps, setup.data_parallel_size)
    equation = f"{' x '.join(f'{one:,}' for one in split)} = {setup.global_batch_size:,}"
    assert equation in text_of(page, "batch")


def change(num_bytes: int) -> str:
    return signed(num_bytes) if num_bytes else "0"


def around(value: float, scale: float) -> tuple[float, float]:
    """Where a number may lie whose parts are rounded to 32 bits."""
    return value - 1e-6 * scale, value + 1e-6 * scale


def either(seconds: float) -> set[str]:
    return set(map(format_seconds, around(seconds, seconds)))


def test_it_starts_at_the_plan(page: Any, study: Study, grid: WhatIf) -> None:
    check(page, study, grid, {"precision": grid.axes.precision.index("bf16-mixed")})
    assert {more for _, more in rows_of(page).values()} == {"0"}
    assert text_of(page, "batch").endswith(", as at the start.")


AXES = (
    "micro_batch_size",
    "seq_len",
    "gradient_accumulation_steps",
    "data_parallel_size",
    "activation_checkpointing",
    "optimizer",
    "precision",
    "lora_rank",
)


@pytest.mark.parametrize("axis", AXES)
def test_every_position_of_every_control(axis: str, page: Any, study: Study, grid: WhatIf) -> None:
    """Each by itself, with its value beside it where it is a slider."""
    for position, value in enumerate(getattr(grid.axes, axis)):
        move(page, **{axis: position})
        check(page, study, grid, {axis: position})
        shown = "none" if value is None else f"{value:,}" if isinstance(value, int) else value
        control = page.locator(f"#what-if-{axis}")
        if control.get_attribute("type") == "range":
            assert text_of(page, f"{axis}-said") == control.get_attribute("aria-valuetext") == shown
        else:
            assert control.locator("option:checked").text_content() == shown


def test_several_at_once(page: Any, study: Study, grid: WhatIf) -> None:
    draw = random.Random(5)
    for _ in range(25):
        positions = {axis: draw.randrange(len(getattr(grid.axes, axis))) for axis in AXES}
        move(page, **positions)
        check(page, study, grid, positions)


def test_the_command_line_says_the_same(page: Any, grid: WhatIf) -> None:
    """As a user would: copied from the page and run."""
    move(page, micro_batch_size=1, gradient_accumulation_steps=1, lora_rank=2, optimizer=1, precision=0)
    words = shlex.split(text_of(page, "command"))
    assert words[:3] == ["memplan", "estimate", MODEL]
    ran = subprocess.run(
        [sys.executable, "-m", *words, "--json"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    assert rows_of(page)["tensors"][0] == format_bytes(answer["peak_allocated_bytes"])
    assert rows_of(page)["time"][0] in either(answer["step_time_s"])
    assert answer["setup"]["lora"]["rank"] == grid.axes.lora_rank[2]


def test_the_keyboard_moves_it_and_a_button_brings_it_back(page: Any, grid: WhatIf) -> None:
    before = text_of(page, "verdict"), rows_of(page)
    page.locator("#what-if-seq_len").focus()
    page.keyboard.press("ArrowRight")
    length = grid.axes.seq_len[grid.axes.seq_len.index(grid.setup.seq_len) + 1]
    assert text_of(page, "seq_len-said") == f"{length:,}"
    assert (text_of(page, "verdict"), rows_of(page)) != before
    page.get_by_role("button", name="Back to the start").click()
    page.wait_for_function("document.getElementById('what-if-batch').textContent.endsWith(', as at the start.')")
    assert (text_of(page, "verdict"), rows_of(page)) == before
    assert text_of(page, "seq_len-said") == f"{grid.setup.seq_len:,}"


def test_every_control_has_a_name(page: Any) -> None:
    section = page.locator("section[aria-labelledby=what-if]")
    for name in ("micro-batch", "accumulation", "GPUs", "tokens per sequence", "LoRA rank"):
        assert section.get_by_role("slider", name=name, exact=True).count() == 1
    for name in ("checkpointing", "optimizer", "precision"):
        assert section.get_by_role("combobox", name=name, exact=True).count() == 1
    speaking = section.locator("[role=status], output:not([aria-live=off])")  # one voice, not one for each slider
    assert speaking.count() == 1


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_is_cut(width: int, page: Any) -> None:
    """With the longest numbers there are, too."""
    page.set_viewport_size({"width": width, "height": 900})
    move(page, micro_batch_size=5, gradient_accumulation_steps=6, seq_len=5)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wider = "[...document.querySelectorAll('#what-if-all *')].filter(x => x.scrollWidth > x.clientWidth + 1 && "
    wider += "getComputedStyle(x).display != 'inline').map(x => x.outerHTML.slice(0, 80))"
    assert page.evaluate(wider) == []


def test_the_bar_is_as_long_as_the_process(page: Any, study: Study, grid: WhatIf) -> None:
    usable = study.plan.gpu.usable_bytes
    whole = page.locator("#what-if-bar").evaluate("x => x.clientWidth")
    drawn = page.locator("#what-if-pile b").evaluate_all("all => all.reduce((sum, x) => sum + x.offsetWidth, 0)")
    model = api.find_model(MODEL)
    assert isinstance(model, api.Model)
    process = api.estimator_of(model, study.plan.gpu, remembers=False).memory(grid.setup).peak_process_bytes
    assert drawn == pytest.approx(whole * process / usable, abs=3)


def test_without_javascript_a_sentence_stands_in_its_place(browser: Any, file: Path) -> None:
    opened = browser.new_page(java_script_enabled=False)
    opened.goto(file.as_uri())
    section = opened.locator("section[aria-labelledby=what-if]")
    assert "takes JavaScript" in section.inner_text()
    assert not section.locator("form").is_visible()
    opened.close()


def test_what_is_not_possible_says_why(browser: Any, tmp_path: Path) -> None:
    found = studies.study(MODEL, gpu=GPU, target_batch=8, optimizer="adamw-in-backward")
    plan = plan_document(found.plan, origin=found.origin)
    path = tmp_path / "page.html"
    path.write_text(
        render_plan_page(study_document(found, plan, COMMAND)),
        encoding="utf-8",
    )
    opened = browser.new_page()
    opened.goto(path.as_uri())
    assert "at least" in text_of(opened, "verdict")
    move(opened, gradient_accumulation_steps=2)
    assert text_of(opened, "verdict").startswith("Not possible: adamw-in-backward updates in the backward pass")
    assert not opened.locator("#what-if-found").is_visible()
    move(opened, optimizer=0)
    assert opened.locator("#what-if-found").is_visible()
    opened.close()
