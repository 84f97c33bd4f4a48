"""Charts from the library, and what a notebook shows."""

from __future__ import annotations

import copy
import pickle
import re
from collections import Counter
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

import memplan
from memplan import api
from memplan.errors import MemplanError, UsageError
from memplan.report.beside import CHART_NAMES
from memplan.report.charts.drawing import picture_of
from memplan.report.charts.named import CHARTS, chart_of
from memplan.report.pictures import chart, fragment, thinned
from memplan.specs.pictured import Behind
from memplan.specs.values import replace

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.planner.plan import Plan

PLOTS = ("breakdown", "timeline", "map", "length", "micro_batch", "frontier", "levers", "schedule", "lengths")


@cache
def planned() -> Plan:
    return memplan.suggest("gpt2", gpu="12GB", target_batch=8)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Plan]:
    """The plan that has a chart: that of lengths is of data."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(f'{{"num_tokens": {1 + n * n % 1013}}}\n' for n in range(500)))
    of_data = cache(lambda: memplan.suggest_for_data(path, "gpt2", gpu="12GB", target_batch=8, seq_len=600))
    return lambda name: of_data() if name == "lengths" else planned()


def test_every_chart_has_a_name_and_a_method() -> None:
    assert tuple(CHARTS) == CHART_NAMES
    assert {name.replace("-", "_") for name in CHARTS} == set(PLOTS)


@pytest.mark.parametrize("name", PLOTS)
def test_a_plan_draws(drawn, name: str) -> None:
    assert isinstance(getattr(drawn(name), f"plot_{name}")(), Figure)


def test_a_plan_without_data_has_no_lengths() -> None:
    with pytest.raises(MemplanError, match="no lengths chart of this plan: it was made without data"):
        planned().plot_lengths()


@pytest.mark.parametrize("name", CHART_NAMES)
def test_the_same_chart_gives_the_same_bytes(drawn, name: str) -> None:
    assert picture_of(chart(drawn(name), name), "svg") == picture_of(chart(drawn(name), name), "svg")


@pytest.mark.parametrize("name", CHART_NAMES)
def test_no_text_is_cut_and_no_two_overlap(drawn, name: str) -> None:
    """Every text lies within the figure; names of ticks, cells and entries keep apart."""
    figure = chart(drawn(name), name).figure
    FigureCanvasAgg(figure).draw()
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    texts = [text for text in texts if text not in beyond_the_axes(figure)]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert boxes
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        assert -1 <= box.x0 < box.x1 <= width + 1, text
        assert -1 <= box.y0 < box.y1 <= height + 1, text
    for (text, box), (other, beside) in combinations(boxes, 2):
        assert not box.padded(-1).overlaps(beside.padded(-1)), (text, other)


def beyond_the_axes(figure: Figure) -> list[Text]:
    """Names of ticks that are not drawn, as they lie beyond the ends of their axis."""
    found = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
    return found


def test_an_estimate_draws_with_and_without_a_card() -> None:
    for found in (memplan.estimate("gpt2"), memplan.estimate("gpt2", gpu="24GB")):
        assert isinstance(found.plot_breakdown(), Figure)
        assert isinstance(found.plot_timeline(), Figure)


def test_what_is_behind_an_answer_is_no_part_of_it() -> None:
    """Neither of its equality, nor of its hash or what it is shown as."""
    one, other = memplan.estimate("gpt2"), memplan.estimate("gpt2")
    bare = replace(one, behind=Behind())
    assert one == other == bare
    assert hash(one) == hash(other) == hash(bare)
    assert repr(one) == repr(bare)
    assert "behind" not in repr(one)


def test_a_pickled_plan_says_why_it_has_no_timeline() -> None:
    again = pickle.loads(pickle.dumps(planned()))
    assert again == planned()
    assert isinstance(again.plot_breakdown(), Figure)
    assert isinstance(again.plot_schedule(), Figure)
    with pytest.raises(MemplanError, match="no timeline chart of this answer: it was pickled"):
        again.plot_timeline()
    with pytest.raises(MemplanError, match="no map chart of this answer: it was pickled"):
        pickle.loads(pickle.dumps(again)).plot_map()
    assert isinstance(copy.deepcopy(planned()).plot_timeline(), Figure)


def test_an_answer_from_traces_says_why_it_has_no_timeline() -> None:
    with pytest.raises(MemplanError, match="no timeline chart of this answer: memplan has no formula"):
        replace(memplan.estimate("gpt2"), behind=Behind()).plot_timeline()
    with pytest.raises(MemplanError, match="Others: breakdown, schedule"):
        replace(planned(), levers=()).plot_levers()


def test_a_chart_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="no chart 'frontir'"):
        chart_of({}, "frontir")
    document = {"plan": {"levers": []}, "ledger": [1], "maps": []}
    with pytest.raises(MemplanError, match=r"no levers chart of this plan.*Others: breakdown") as fault:
        chart_of(document, "levers")
    assert "no single change" in str(fault.value)
    with pytest.raises(MemplanError, match="only traces"):
        chart_of(document, "map")


def test_a_large_sweep_is_thinned() -> None:
    """The ends stay, and every point is that of its micro-batch and length."""
    one = {
        "micro_batch_sizes": list(range(1, 101)),
        "seq_lens": list(range(10, 60)),
        "points": [(b, s) for b in range(1, 101) for s in range(10, 60)],
    }
    found = thinned(one)
    assert len(found["micro_batch_sizes"]) == 16
    assert len(found["seq_lens"]) == 10
    assert found["points"] == [(b, s) for b in found["micro_batch_sizes"] for s in found["seq_lens"]]
    assert (found["points"][0], found["points"][-1]) == ((1, 10), (100, 59))


def test_a_sweep_draws() -> None:
    assert isinstance(api.sweep("gpt2", micro_batches=(1, 2), seq_lens=(64, 128)).plot(), Figure)
    assert isinstance(api.sweep("gpt2", gpu="24GB", micro_batches=(1,), seq_lens=(64,)).plot(), Figure)


def test_notebooks_show_a_verdict_a_picture_and_a_table() -> None:
    pieces = [
        planned()._repr_html_(),
        memplan.suggest("gpt2", gpu="2GB", target_batch=8)._repr_html_(),
        memplan.estimate("gpt2")._repr_html_(),
        memplan.estimate("gpt2", gpu="24GB")._repr_html_(),
        api.sweep("gpt2", gpu="24GB", micro_batches=(1, 2), seq_lens=(64, 128))._repr_html_(),
    ]
    assert "it fits" in pieces[0]
    assert "nothing fits" in pieces[1]
    for piece in pieces:
        assert "<svg" in piece
        assert "<table>" in piece
        assert "var(--" not in piece
        assert "#0a00" not in piece
        assert len(piece) < 40_000
    ids = Counter(re.findall(r' id="([^"]+)"', "".join(pieces)))
    assert ids
    assert max(ids.values()) == 1


def test_texts_from_outside_are_escaped() -> None:
    found = memplan.estimate("gpt2")
    evil = replace(found, model=found.model._replace(name="<script>alert(1)</script>"))
    assert "<script" not in fragment(evil)
    assert "&lt;script&gt;" in fragment(evil)
