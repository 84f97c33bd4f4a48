"""Every page as Chromium shows it: nothing is cut, overlaps, is too small or too pale, at any width and in both themes.

Nor does a page ask for anything but itself, and it says the same without JavaScript and on paper.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import memplan
from memplan import api, studies
from memplan.report.document import plan_document
from memplan.report.lengths import lengths_document
from memplan.report.pages.answers import page_of
from memplan.report.pages.plan import render_plan_page
from memplan.report.study import study_document
from memplan.sequences.analysis import STRATEGIES
from tests.support.pages import opened

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
WIDTHS = (360, 800, 1600)
HOSTILE = (
    "</script></style><script>alert(1)</script><img src=http://127.0.0.1/x onerror=alert(2)>\"'><b onfocus=alert(3) "
    f"autofocus tabindex=0>$x_{{1}}$ {{{{ 7 * 7 }}}} &amp; \u202e {'long' * 40}"
)
FACTORY = """
from torch import nn, randn

def rows(micro_batch_size, seq_len):
    return randn(micro_batch_size, seq_len, 256)

def make():
    return nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)), rows, lambda output: output.mean()
"""


def plan_of(model: str, gpu: str, **choices: Any) -> dict[str, Any]:
    found = studies.study(model, gpu=gpu, **choices)
    plan = plan_document(found.plan, origin=found.origin)
    return study_document(found, plan, f"memplan suggest {model} --gpu {gpu}")


def fits(_: Path) -> str:
    return render_plan_page(plan_of("llama-3.1-8b", "h100", target_batch=32, seq_len=4096, optimizer="adamw-8bit"))


def does_not_fit(_: Path) -> str:
    return render_plan_page(plan_of("llama-3.1-8b", "rtx4090", target_batch=32, seq_len=4096))


def of_a_hostile_name(_: Path) -> str:
    document = plan_of("gpt2", "24GB", target_batch=32, seq_len=512)
    document["command"] = document["plan"]["model"]["name"] = document["plan"]["gpu"]["label"] = HOSTILE
    for one in document["plan"]["assumptions"]:
        one["what"] = one["value"] = one["why"] = HOSTILE
    return render_plan_page(json.loads(json.dumps(document)))


def traced(folder: Path) -> str:
    pytest.importorskip("torch")
    (folder / "modules.py").write_text(FACTORY, encoding="utf-8")
    words = "report modules:make --gpu 24GB --target-batch 8 --seq-len 64 --optimizer adamw --output page.html"
    here = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder)))}
    command = [sys.executable, "-m", "memplan", *words.split()]
    subprocess.run(command, cwd=folder, env=here, check=True, capture_output=True)
    return (folder / "page.html").read_text(encoding="utf-8")


def accuracy(_: Path) -> str:
    return (ROOT / "reports" / "accuracy.html").read_text(encoding="utf-8")


def lengths(folder: Path) -> str:
    """Of a data set with a hostile name, with candidates that lie close together and one beyond the longest."""
    data = folder / "a$_{1}$<b>.jsonl"
    data.write_text("".join(json.dumps({"num_tokens": 1 + n * n % 30011}) + "\n" for n in range(3000)))
    found = memplan.lengths(
        data, max_len=(900, 1024, 1100, 1200, 8192, 65536), micro_batch=4, target_batch=32, packing=tuple(STRATEGIES)
    )
    return page_of(lengths_document(found))


def of_data(folder: Path) -> str:
    """A plan for a sample of such data, with a maximum close to other candidates."""
    data = folder / "a$_{1}$<b>.jsonl"
    rows = ({"num_tokens": 1 + n * n % 30011, "num_supervised_tokens": n % 2} for n in range(3000))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"gpu": "rtx4090", "target_batch": 8, "seq_len": 16_500}
    plan = memplan.suggest_for_data(data, "qwen2.5-0.5b", sample=1000, **given)
    found = studies.study_of(plan, api.find_model("qwen2.5-0.5b"))
    command = f"memplan suggest qwen2.5-0.5b --gpu rtx4090 --target-batch 8 --data {data.name!r}"
    return render_plan_page(study_document(found, plan_document(plan, origin=found.origin), command))


PAGES: dict[str, Callable[[Path], str]] = {
    one.__name__: one for one in (fits, does_not_fit, of_a_hostile_name, of_data, traced, accuracy, lengths)
}


@pytest.fixture(scope="session")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a page, made when it is first asked for."""
    made: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder / "page.html"
            made[name].write_text(PAGES[name](folder), encoding="utf-8")
        return made[name]

    return path


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no-scripts"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_on_a_screen(browser, path_of, name: str, width: int, scripts: bool) -> None:
    """As it is opened, and with everything unfolded; light and dark."""
    with opened(browser, path_of(name), width=width, scripts=scripts) as view:
        assert view.findings() == []
        view.unfold()
        assert view.findings() == []
        view.darken()
        assert view.findings() == []
        assert view.noise == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_on_paper(browser, path_of, name: str) -> None:
    """Nothing sticks out, nothing is there that only a screen can use."""
    with opened(browser, path_of(name), dark=True) as view:
        view.print_out()
        assert view.findings() == []
        assert not [one for one in view.page.query_selector_all(".screen") if one.is_visible()]
        assert view.page.pdf(format="A4").startswith(b"%PDF-")
        assert view.noise == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_by_the_rules_of_axe(browser, path_of, name: str) -> None:
    """The rules of WCAG that a program can check, by the library that accessibility auditors use."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with opened(browser, path_of(name), dark=True) as view:
        view.unfold()
        found = axe.run(view.page).response
        assert found["passes"]
        said = [(one["id"], one["help"], [node["target"] for node in one["nodes"]]) for one in found["violations"]]
        assert said == []


def test_paper_is_white(browser, path_of) -> None:
    """Also for those who read the dark page."""
    with opened(browser, path_of("fits"), dark=True) as view:
        assert background(view) != "rgb(255, 255, 255)"
        view.print_out()
        assert background(view) == "rgb(255, 255, 255)"


def background(view) -> str:
    return view.page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_the_same_is_said_without_javascript(browser, path_of) -> None:
    """All that is not for screens alone."""
    said = []
    for scripts in (True, False):
        with opened(browser, path_of("fits"), scripts=scripts) as view:
            view.page.evaluate("document.querySelectorAll('.screen').forEach(one => one.remove())")
            said.append(view.page.inner_text("body"))
    assert "It fits" in said[0]
    assert said[0] == said[1]


def test_a_hostile_name_is_shown_as_it_is(browser, path_of) -> None:
    with opened(browser, path_of("of_a_hostile_name")) as view:
        assert "<script>alert(1)</script><img src=http://127.0.0.1/x onerror=alert(2)>" in view.page.inner_text("h1")
        assert "{{ 7 * 7 }}" in view.page.title()
