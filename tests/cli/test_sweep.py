"""`memplan sweep` as it is run: formats, words, exit status, bad input."""

from __future__ import annotations

import csv
import json
import sys

import pytest

from memplan.cli.sweep import SWEEP_ROWS
from memplan.cli.values import SETUP_ROWS
from tests.cli.test_faults import assert_two_lines

SMALL = "sweep gpt2 --gpu 24GB --micro-batch 8..24+4 --seq-len 512,1024"


def test_table_document_and_text_agree(run) -> None:
    """All formats hold the same points; the text shows those of a small grid."""
    document = json.loads(run(f"{SMALL} --json").out)
    points = document["points"]
    assert [(one["micro_batch_size"], one["seq_len"]) for one in points] == [
        (batch, length) for batch in (8, 12, 16, 20, 24) for length in (512, 1024)
    ]
    table = list(csv.DictReader(run(f"{SMALL} --format csv").out.splitlines()))
    assert [{key: str(value) for key, value in one.items()} for one in points] == table
    markdown = run(f"{SMALL} --format markdown").out.splitlines()
    assert len(markdown) == 2 + len(points)
    text = run(SMALL).out
    for point in points:
        symbol = {"fits": "+", "tight": "~", "oom": "x"}[point["verdict"]]
        assert f"{point['peak_process_bytes'] / 2**30:.2f} {symbol}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_largest_is_the_last_that_fits(run) -> None:
    document = json.loads(run(f"{SMALL} --json").out)
    for one in document["largest"]:
        fitting = [
            point["micro_batch_size"]
            for point in document["points"]
            if point["seq_len"] == one["seq_len"] and point["verdict"] == "fits"
        ]
        assert max(fitting) == one["micro_batch_size"]


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("sweep gpt2", 0, "say --gpu to see what fits"),
        ("sweep gpt2 --gpu 24GB", 0, "The largest micro-batch that fits"),
        ("sweep llama-3.1-405b --gpu 24GB", 3, "Nothing fits: "),
        ("sweep llama-3.1-405b", 0, "GiB of the process"),
    ],
)
def test_the_exit_status(run, command: str, status: int, said: str) -> None:
    ran = run(command)
    assert ran.status == status
    assert said in ran.out
    assert run(f"{command} --json").status == status


def test_a_sweep_that_only_expandable_segments_save(run) -> None:
    """GIVEN one tight point, THEN the verdict is that of `estimate`, which fits with the same setting."""
    size = "gpt2 --micro-batch 18 --seq-len 1000 --gpu 24GB"
    ran = run(f"sweep {size}")
    assert (ran.status, run(f"estimate {size}").status) == (0, 0)
    assert "20.33 ~" in ran.out
    assert "with expandable segments" in ran.out
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in ran.out


def test_a_sweep_that_nothing_saves(run) -> None:
    """GIVEN one tight point that no setting saves, THEN it does not fit, as for `estimate`."""
    size = "gpt2 --micro-batch 17 --seq-len 1024 --gpu 24GB --headroom 11.6"
    ran = run(f"sweep {size}")
    assert (ran.status, run(f"estimate {size}").status) == (3, 3)
    assert "19.70 ~" in ran.out
    assert "Nothing fits as the allocator cuts its segments" in ran.out


def test_without_a_gpu_there_is_no_verdict(run) -> None:
    document = json.loads(run("sweep gpt2 --json").out)
    assert (document["fits"], document["budget"], document["largest"], document["num_replays"]) == (None, None, [], 0)
    assert {one["verdict"] for one in document["points"]} == {None}
    text = run("sweep gpt2").out
    assert " x out of memory" not in text
    assert run("sweep gpt2 --headroom 3 --reserve 1GiB").err.count("has no effect without --gpu") == 2


def test_a_large_grid_is_shown_in_part(run) -> None:
    """GIVEN 300 x 20 points, THEN the text has 16 micro-batches and 8 lengths, the boundary among them."""
    command = "sweep gpt2 --gpu 8GB --micro-batch 1..300 --seq-len 50..1000+50"
    lines = run(command).out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("16 of 300 micro-batches and 8 of 20 lengths" in line for line in lines)
    document = json.loads(run(f"{command} --json").out)
    assert len(document["points"]) == 6000
    shown = {line.split()[0] for line in lines if line.count(" +") + line.count(" x") + line.count(" ~") == 8}
    assert len(shown) == 16
    assert {"1", "300", str(document["largest"][-1]["micro_batch_size"])} <= shown
    table = run(f"{command} --format csv")
    assert len(table.out.splitlines()) == 6001
    assert "of 20 lengths were replayed" in table.err
    assert run(command).err == run(f"{SMALL} --format csv").err == ""


def test_quiet_is_the_largest_alone(run) -> None:
    ran = run(f"{SMALL} --quiet")
    assert ran.err == ""
    assert ran.out.startswith("The largest micro-batch that fits\n")
    assert len(ran.out.splitlines()) == 4


def test_symbols_and_not_colours(run, monkeypatch) -> None:
    """Without colours the text is the same but for them."""
    plain = run(SMALL).out
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = run(SMALL).out
    assert "\x1b[" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(SMALL).out == plain


def test_parquet(run, tmp_path) -> None:
    pytest.importorskip("pyarrow")
    import pandas as pd

    ran = run(f"{SMALL} --format parquet --output points.parquet")
    assert ran.status == 0
    assert ran.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["points.parquet"]
    frame = pd.read_parquet("points.parquet")
    assert frame.to_dict("records") == json.loads(run(f"{SMALL} --json").out)["points"]


def test_parquet_without_pyarrow(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("memplan.cli.sweep.find_spec", lambda name: None)
    ran = run(f"{SMALL} --format parquet --output points.parquet")
    assert_two_lines(ran, 1, "needs pyarrow, which is not installed", "memplan[parquet]")


@pytest.mark.parametrize(
    ("options", "cause", "cure"),
    [
        ("--micro-batch 64..1", "'64..1' runs backwards", "1..64"),
        ("--micro-batch 0", "--micro-batch is '0'", "from 1 to"),
        ("--micro-batch 1,2,2", "names 2 more than once", "once"),
        ("--seq-len 1..x", "--seq-len is '1..x'", "512..4096+512"),
        ("--seq-len 512..8192x2", "positions for 1024", "--seq-len 1024"),
        ("--micro-batch 1..1000 --seq-len 1..1000", "1,000,000 points", "200,000 at most"),
        ("--target-batch 32", "--target-batch says how large", "memplan suggest"),
        ("--target-tokens 4M", "--target-tokens says how large", "memplan suggest"),
        ("--format parquet", "not for the screen", "--output FILE"),
        ("--format parquet --output -", "not for the screen", "--output FILE"),
        ("--format xml", "--format 'xml'", "markdown, html, parquet"),
        ("--json --format parquet", "--json and --format parquet", "Leave one"),
        ("--micro-batch 1000000000 --accumulation 1000000000", "beyond what 64 bits count", "smaller"),
        ("--lora-targets q_proj", "about adapters", "--lora-rank 16"),
        ("--micro-bach 3", "no option --micro-bach", "--micro-batch"),
    ],
)
def test_usage(run, options: str, cause: str, cure: str) -> None:
    assert_two_lines(run(f"sweep gpt2 {options}"), 2, cause, cure)


def test_a_module_of_ones_own_has_no_sweep(run) -> None:
    assert_two_lines(run("sweep mine:make --gpu 24GB"), 2, "'mine:make' has no formula", "memplan trace")


@pytest.mark.parametrize("flag", ["--zero-stage"])
def test_what_is_not_modelled(run, flag: str) -> None:
    assert_two_lines(run(f"sweep gpt2 {flag} 2"), 1, f"{flag} is not modelled yet", "Leave it out")


def test_it_takes_the_options_of_estimate() -> None:
    """Every option of a setup is one of a sweep, too, but for the targets, which it refuses."""
    assert [row.flag for row in SWEEP_ROWS] == [row.flag for row in SETUP_ROWS]
    hidden = {row.flag for row in SWEEP_ROWS if row.hidden} - {row.flag for row in SETUP_ROWS if row.hidden}
    assert hidden == {"--target-batch", "--target-tokens"}


def test_the_help_says_how_a_range_is_written(run) -> None:
    text = " ".join(run("sweep --help").out.split())
    for spelling in ("1,2,4", "1..64", "1..64x2", "512..4096+512", "parquet", "--lora-rank"):
        assert spelling in text
    assert "--target-batch" not in text


def test_under_the_compiler_the_map_is_of_upper_ends(run) -> None:
    """The document names both ends of every point, the text says which one the map shows."""
    command = "sweep gpt2 --gpu 24GB --micro-batch 1,64 --seq-len 1024 --compile"
    document = json.loads(run(f"{command} --json").out)
    for point in document["points"]:
        assert point["least_kept_activation_bytes"] < point["kept_activation_bytes"]
        assert point["least_peak_process_bytes"] < point["peak_process_bytes"]
    assert [point["verdict"] for point in document["points"]] == ["fits", "oom"]
    text = " ".join(run(command).out.split())
    assert "the map shows the upper ends of ranges" in text
    assert "may run all the same" in text
    assert "least_peak_process_bytes" in run(f"{command} --format csv").out
