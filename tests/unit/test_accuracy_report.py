"""Predicted against measured, shown: text, the README's table, the page and its schema say what the document says."""

from __future__ import annotations

import copy
import json
import os
import re
from html.parser import HTMLParser

import jsonschema
import pytest

import memplan.report
from memplan.report.accuracy import accuracy_markdown, percent, render_accuracy, size, verdict
from memplan.report.pages.accuracy import render_accuracy_page

GIB = 2**30
HOSTILE = "</script><img src=x onerror=alert(1)>|`a`\\ $x_{1}$ \x1b[2J\n&amp; \ud800 <!-- \u202e"
NO_GPU = "No measurement of our own on a GPU exists yet, so how accurate memplan is on a GPU is not known."
VOID = {"meta", "path", "use", "br", "img"}


# -- documents ---------------------------------------------------------------------------------------------------------


def errors(device: str, quantity: str, *, group: str = "all", value: str = "all", **changes: object) -> dict:
    row = {
        "device": device,
        "quantity": quantity,
        "group": group,
        "value": value,
        "num": 4,
        "median": -0.004,
        "p90": 0.016,
        "p99": 0.021,
        "abs_p90": 0.021,
        "abs_p99": 0.034,
        "worst_over": 0.021,
        "worst_over_id": "0123456789abcdef",
        "worst_under": -0.034,
        "worst_under_id": "fedcba9876543210",
    }
    return row | changes


def point(device: str, quantity: str, error: float, **changes: object) -> dict:
    measured = 0.25 if quantity == "step_time" else 20.0 * GIB
    row = {
        "id": "0123456789abcdef",
        "device": device,
        "gpu": "NVIDIA H200" if device == "cuda" else "cpu",
        "model": "gpt2",
        "model_type": "gpt2",
        "words": "bf16, adamw, micro 2, 1,024 tokens",
        "quantity": quantity,
        "measured": measured,
        "predicted": measured * (1 + error),
        "error": error,
    }
    return row | changes


def comparison(number: int, error: float, **changes: object) -> dict:
    row = {
        "id": f"M{number:04}",
        "source": "fms-acceleration benchmarks",
        "source_ref": "foundation-model-stack/fms-acceleration@876e2ed6fc:scripts/benchmarks/refs/a100_80gb.csv",
        "date": "2024-10-02",
        "model": "ibm/PowerLM-3b",
        "gpu": "a100-80gb",
        "quantity": "process",
        "comparison": "value",
        "measured": 50 * GIB,
        "predicted": round(50 * GIB * (1 + error)),
        "error": error,
        "explained_error": None,
        "unknown": ["allocator settings", "CUDA context of the card"],
        "explanation": "",
    }
    return row | changes


def empty() -> dict:
    return {
        "schema_version": 1,
        "kind": "accuracy",
        "memplan_version": "0.1.0",
        "witness": "formula",
        "measured": {
            "num_records": 0,
            "num_compared": 0,
            "num_on_gpus": 0,
            "first": None,
            "last": None,
            "cards": [],
            "stacks": [],
        },
        "bad_lines": [],
        "errors": [],
        "decisions": dict.fromkeys(("num", "true_maximum", "one_below", "further_below", "too_large", "undecided"), 0)
        | {"cases": []},
        "points": [],
        "left_out": [],
        "published": {"num_rows": 0, "last": None, "compared": [], "not_answered": []},
    }


def cpu_only() -> dict:
    """Two tensors' worth of truth: one exact, one 0.03 % too little."""
    exact = dict.fromkeys(("median", "p90", "p99", "abs_p90"), 0.0)
    exact |= {"abs_p99": 0.0003, "worst_over": None, "worst_over_id": None}
    return empty() | {
        "measured": {
            "num_records": 3,
            "num_compared": 2,
            "num_on_gpus": 0,
            "first": "2026-11-20T10:00:00Z",
            "last": "2026-11-22T10:00:00Z",
            "cards": ["AMD EPYC 9575F"],
            "stacks": ["torch 2.9.1, transformers 5.23.0"],
        },
        "bad_lines": [{"path": "records.jsonl", "number": 7, "reason": "is no JSON"}],
        "errors": [
            errors("cpu", "allocated", num=2, worst_under=-0.0003, **exact),
            errors("cpu", "allocated", group="model_type", value="gpt2", num=2, worst_under=-0.0003, **exact),
            errors("cpu", "allocated", group="lora", value="r8", num=0, **exact),
        ],
        "points": [point("cpu", "allocated", 0.0), point("cpu", "allocated", -0.0003)],
        "left_out": [{"reason": "it ran out of memory", "num": 1, "ids": ["aaaabbbbccccdddd"]}],
    }


def full() -> dict:
    """On a GPU, on a CPU, plans put to the test, and what others published."""
    cpu = cpu_only()
    return cpu | {
        "errors": [
            *(errors("cuda", quantity) for quantity in ("allocated", "reserved", "process")),
            errors("cuda", "step_time", median=-0.31, abs_p90=0.7, abs_p99=0.9, worst_under=-0.9, worst_over=12.5),
            errors("cuda", "process", group="gpu", value="NVIDIA GeForce RTX 4090 Laptop GPU"),
            *cpu["errors"],
        ],
        "points": [
            *(point("cuda", quantity, 0.021) for quantity in ("allocated", "reserved", "process")),
            point("cuda", "process", -0.034, measured=0.0),
            point("cuda", "step_time", -0.9),
            *cpu["points"],
        ],
        "decisions": {
            "num": 4,
            "true_maximum": 2,
            "one_below": 0,
            "further_below": 0,
            "too_large": 1,
            "undecided": 1,
            "cases": [
                {
                    "trial": "t1",
                    "recommended": 4,
                    "largest_survivor": 4,
                    "smallest_failure": 5,
                    "verdict": "true_maximum",
                },
                {
                    "trial": "t2",
                    "recommended": 8,
                    "largest_survivor": None,
                    "smallest_failure": 8,
                    "verdict": "too_large",
                },
                {
                    "trial": "t3",
                    "recommended": None,
                    "largest_survivor": None,
                    "smallest_failure": 1,
                    "verdict": "undecided",
                },
            ],
        },
        "published": {
            "num_rows": 520,
            "last": "2026-10",
            "compared": [
                comparison(579, -0.126, explained_error=-0.004, explanation="fp32 log-probabilities"),
                comparison(581, 0.004, quantity="allocated"),
                comparison(583, -0.4, comparison="floor"),
                comparison(585, 0.05, comparison="floor", source="another", source_ref="elsewhere", date=""),
            ],
            "not_answered": [
                {"reason": "LoRA is not modelled yet", "num": 105},
                {"reason": "sharded over GPUs (FSDP)", "num": 63},
            ],
        },
    }


def hostile() -> dict:
    """Every text from outside is an attack."""
    document = full()
    for rows, keys in (
        (document["points"], ("id", "gpu", "model", "model_type", "words")),
        (document["published"]["compared"], ("id", "source", "source_ref", "date", "model", "gpu", "explanation")),
        (document["published"]["not_answered"], ("reason",)),
        (document["left_out"], ("reason",)),
        (document["bad_lines"], ("path", "reason")),
        (document["decisions"]["cases"], ("trial",)),
        (document["errors"], ("value", "worst_over_id", "worst_under_id")),
    ):
        for row in rows:
            row.update(dict.fromkeys(keys, HOSTILE))
    for row in document["published"]["compared"]:
        row["unknown"] = [HOSTILE]
    document["left_out"][0]["ids"] = [HOSTILE]
    document["measured"] |= {"cards": [HOSTILE], "stacks": [HOSTILE]}
    return document


DOCUMENTS = {"empty": empty, "cpu": cpu_only, "full": full, "hostile": hostile}


@pytest.fixture(params=DOCUMENTS)
def document(request: pytest.FixtureRequest) -> dict:
    return DOCUMENTS[request.param]()


def text_of(document: dict, *, quiet: bool = False) -> str:
    return "\n".join(line.text for line in render_accuracy(document, quiet=quiet))


def flat(text: str) -> str:
    return " ".join(text.split())


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "text"),
    [(0.0, "exact"), (-0.0, "exact"), (0.0003, "+0.03 %"), (-0.126, "-12.6 %"), (12.5, "+1,250 %"), (None, "-")],
)
def test_percent(error: float | None, text: str) -> None:
    """Exact is zero and nothing else; the sign is always there."""
    assert percent(error) == text


def test_nothing_tiny_is_called_exact() -> None:
    assert (percent(1e-9), size(1e-9)) == ("+0.00 %", "0.00 %")


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quiet", [False, True])
def test_text_has_80_columns_and_no_controls(document: dict, quiet: bool) -> None:
    for line in render_accuracy(document, quiet=quiet):
        assert len(line.text) <= 80
        assert all(letter.isprintable() for letter in line.text)


@pytest.mark.parametrize("make", [empty, cpu_only])
def test_first_of_all_that_no_gpu_was_measured(make) -> None:
    """GIVEN no measurement on a GPU, THEN the first lines say so, in every form, quiet or not."""
    document = make()
    assert verdict(document)[0] == NO_GPU
    for quiet in (False, True):
        assert flat(text_of(document, quiet=quiet)).startswith(NO_GPU)
    assert NO_GPU in accuracy_markdown(document).splitlines()[0]
    assert NO_GPU in re.findall(r"<p>(.*?)</p>", render_accuracy_page(document))[0]


def test_with_a_gpu_the_process_comes_first() -> None:
    assert flat(text_of(full())).startswith(
        "On GPUs, 4 measurements: bytes of the whole process -0.4 % at the median, 90 % of them within 2.1 %; "
        "worst 3.4 % too little and 2.1 % too much."
    )


def test_bytes_on_a_cpu_are_called_what_they_are() -> None:
    for text in (text_of(cpu_only()), render_accuracy_page(cpu_only())):
        assert "ytes of tensors of real training steps on a CPU" in text
    assert "| CPU, tensors of real training steps | allocated | 2 | exact |" in accuracy_markdown(cpu_only())


def test_text_of_everything() -> None:
    text = text_of(full())
    for line in (
        "             n   median     p90     p99  worst over  worst under",
        "  process    4   -0.4 %   2.1 %   3.4 %      +2.1 %       -3.4 %",
        "  step time  4  -31.0 %  70.0 %  90.0 %    +1,250 %      -90.0 %",
        "    named 8; the largest that ran -, the smallest that did not 8: too large",
        "    named -; the largest that ran -, the smallest that did not 1: undecided",
        "  ibm/PowerLM-3b  a100-80gb  process       50.00    43.70       -12.6 %  -0.4 %",
        "  ibm/PowerLM-3b  a100-80gb  process       50.00    52.50  above +5.0 %",
        "    105  LoRA is not modelled yet",
    ):
        assert line in text.splitlines(), line
    assert "2 named the largest micro-batch that ran, 1 ran out of memory, 1 undecided." in flat(text)
    assert "-12.6 % to +0.4 %, -6.1 % at the median; lower bounds: 2, 1 above what was measured." in flat(text)
    assert "records.jsonl, line 7: is no JSON" in text


def test_upper_bounds_and_cards_that_are_not_stated() -> None:
    """A bound holds, or is said to be on the wrong side."""
    document = full()
    document["published"]["compared"] = [
        comparison(171, 0.117, comparison="ceiling"),
        comparison(119, -0.02, comparison="ceiling"),
        comparison(1078, -0.005, gpu=""),
    ]
    text = text_of(document)
    assert "upper bounds: 2, 1 below what was measured." in flat(text)
    found = [line.split("  ")[1:] for line in text.splitlines() if "PowerLM" in line]
    assert [[cell.strip() for cell in line if cell][-1] for line in found] == ["bound holds", "below -2.0 %", "-0.5 %"]
    assert "| ibm/PowerLM-3b | not stated | process |" in accuracy_markdown(document)
    page = render_accuracy_page(document)
    assert "<td>ibm/PowerLM-3b</td><td>not stated</td>" in page
    assert "below -2.0 %" in page


def test_groups_without_a_measurement_are_not_shown() -> None:
    text = text_of(full())
    assert "By card" in text
    assert "By adapter" not in text
    assert "By adapter" not in render_accuracy_page(full())


def test_quiet_is_the_verdict_and_the_errors() -> None:
    text = text_of(full(), quiet=True)
    assert "worst under" in text
    for heading in ("By card", "PowerLM", "fedcba9876543210", "EPYC"):
        assert heading not in text


# -- the README's table ------------------------------------------------------------------------------------------------


def test_markdown() -> None:
    lines = accuracy_markdown(full()).splitlines()
    assert lines[0] == "Predicted against measured (newest record of 2026-11-22; newest published number of 2026-10)."
    assert "| GPU | process | 4 | -0.4 % | 2.1 % | 3.4 % | +2.1 % | -3.4 % |" in lines
    published = "| ibm/PowerLM-3b | a100-80gb | process | 50.00 GiB | 43.70 GiB | -12.6 % | -0.4 % |"
    assert published in lines
    assert lines[-1] == (
        "1 record left out, mostly: it ran out of memory; "
        "168 published numbers not answered, mostly: LoRA is not modelled yet."
    )


def test_markdown_says_what_is_not_measured() -> None:
    last = accuracy_markdown(cpu_only()).splitlines()[-1]
    assert last.startswith("Not measured on a GPU: allocated (bytes of tensors), reserved (")


def test_markdown_is_not_broken_by_names() -> None:
    """A table row has the cells of its header, and no HTML or link comes from outside."""
    text = accuracy_markdown(hostile())
    assert not set("<>`$\x1b") & set(text)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {9, 8}


# -- the page ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Reads a page; every element must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text_by_tag: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text_by_tag[self.open[-1]] = self.text_by_tag.get(self.open[-1], "") + data


def test_page_is_well_formed_and_whole(document: dict) -> None:
    """No other file, no script that runs, no handler, one heading, ids that are there once and are found."""
    page = Page(render_accuracy_page(document))
    assert not {"img", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert page.tags.count("h1") == page.tags.count("script") == 1
    assert ("script", "type", "application/json") in page.attributes
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in {"src", "srcset", "action"}]
    targets = [value for _, name, value in page.attributes if name in {"href", "xlink:href"}]
    targets += ["#" + found for _, _, value in page.attributes for found in re.findall(r"url\(#?([^)]*)\)", value)]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {target.removeprefix("#") for target in targets} <= set(ids)
    labels = [one for _, name, value in page.attributes if name == "aria-labelledby" for one in value.split()]
    assert set(labels) <= set(ids)
    assert "http" not in page.text_by_tag["style"]


def test_page_forbids_everything_else() -> None:
    policy = "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
    assert ("meta", "content", policy) in Page(render_accuracy_page(full())).attributes


def test_page_holds_the_document(document: dict) -> None:
    assert json.loads(Page(render_accuracy_page(document)).text_by_tag["script"]) == document


def test_page_is_the_same_for_the_same_document(document: dict) -> None:
    """Twice the same bytes, whatever was drawn before and however matplotlib is set up."""
    import matplotlib

    first = render_accuracy_page(document)
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 22, "lines.linewidth": 9}):
        assert render_accuracy_page(copy.deepcopy(document)) == first
    assert first.encode("utf-8")


def test_names_are_shown_as_they_are() -> None:
    page = Page(render_accuracy_page(hostile()))
    assert HOSTILE.replace("\ud800", "?") in page.text_by_tag["td"]


def test_every_chart_says_what_it_shows() -> None:
    """Three kinds of bytes, seconds, and the errors: five drawings with a conclusion, in the colours of the page."""
    text = render_accuracy_page(full())
    charts = re.findall(r'<svg class="chart".*?</svg>', text, flags=re.DOTALL)
    assert len(charts) == 5
    for chart in charts:
        assert 'role="img"' in chart
        assert re.search(r"<desc [^>]*>\d+ point.*errors from", chart)
        assert not re.search(r"#0a00|font-family|<metadata", chart)
    assert "4 points measured on a GPU" not in charts[2]  # one was measured as nothing, which no logarithm shows
    assert "1 point measured on a GPU, errors from +2.1 % to +2.1 %" in charts[2]


def test_order_of_the_page() -> None:
    headings = re.findall(r"<h[12][^>]*>(.*?)</h", render_accuracy_page(full()))
    assert headings == [
        "How accurate is memplan?",
        "Errors",
        "Predicted against measured",
        "By group",
        "Decisions",
        "What others published",
        "Measured and left out",
        "Versions and sources",
    ]


def test_notes_that_repeat_are_said_once() -> None:
    text = render_accuracy_page(full())
    assert (
        text.count("Not stated: <bdi>allocator settings; CUDA context of the card</bdi>.") == 3
    )  # two notes, and one elsewhere
    assert text.count("Difference: <bdi>fp32 log-probabilities</bdi>.") == 1


def test_size_of_a_large_page() -> None:
    """GIVEN 520 published rows, all compared, and 200 points, THEN the page has at most 500 KB."""
    document = full()
    kinds = ("allocated", "reserved", "process", "step_time")
    document["points"] = [
        point(
            "cuda", kinds[n % 4], 0.0002 * (n - 100), id=f"{n:016x}", measured=(n + 1) * (0.01 if n % 4 == 3 else GIB)
        )
        for n in range(200)
    ]
    document["published"]["compared"] = [
        comparison(n, 0.001 * (n - 260), quantity=kinds[n % 3], measured=(n + 5) * 123_456_789) for n in range(520)
    ]
    assert len(render_accuracy_page(document).encode()) <= 500_000


# -- the schema --------------------------------------------------------------------------------------------------------


def read_schema() -> dict:
    folder = os.path.join(os.path.dirname(memplan.report.__file__), "schemas")
    with open(os.path.join(folder, "accuracy.schema.json"), encoding="utf-8") as file:
        return json.load(file)


def test_schema(document: dict) -> None:
    schema = read_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)


def test_schema_describes_every_key() -> None:
    """Each object of the schema has the keys of the document, all of them required."""
    document, schema = full(), read_schema()
    parts = {
        "measured": document["measured"],
        "bad_line": document["bad_lines"][0],
        "errors": document["errors"][0],
        "decisions": document["decisions"],
        "case": document["decisions"]["cases"][0],
        "point": document["points"][0],
        "left_out": document["left_out"][0],
        "published": document["published"],
        "comparison": document["published"]["compared"][0],
        "not_answered": document["published"]["not_answered"][0],
    }
    assert set(schema["$defs"]) == set(parts)
    for rules, part in [(schema, document), *((schema["$defs"][name], part) for name, part in parts.items())]:
        assert list(rules["properties"]) == rules["required"] == list(part)


@pytest.mark.parametrize(
    ("path", "value"),
    [(("witness",), "guess"), (("errors", 0, "device"), "tpu"), (("published", "compared", 0, "comparison"), "about")],
)
def test_schema_refuses(path: tuple, value: str) -> None:
    document = full()
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, read_schema())
