"""What somebody at a terminal sees: tables in 80 columns, colour, and what is being done while it takes long."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("pty", reason="no pseudo-terminals on this system")

from memplan.cli.progress import Progress
from tests.support.terminal import in_terminal

ROOT = Path(__file__).parents[2]
MEMPLAN = [sys.executable, "-m", "memplan"]
SMALL = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 512, "n_positions": 64}
COLOUR = re.compile(r"\x1b\[[0-9;]+m")

TABLES = (
    "suggest qwen2.5-0.5b --gpu 24GB --target-batch 32",
    "suggest llama-3-8b --gpu 24GB --target-batch 32",
    "estimate qwen2.5-0.5b --gpu 24GB",
    "sweep qwen2.5-0.5b --gpu 24GB --micro-batch 1..64 --seq-len 128..8192+128",
    "gpus",
    "models",
    "lengths counts.jsonl --max-len 1024,2048 --micro-batch 4 --target-batch 64 --packing bfd,wrapped,first-fit",
)
LONG = (
    "sweep qwen2.5-0.5b --gpu 24GB --micro-batch 1..64 --seq-len 128..8192+128",
    "report gpt2 --gpu 24GB --target-batch 8",
    "validate --html -",
    "trace config.json --seq-len 16",
    "estimate modules:make --seq-len 16",
    "suggest modules:make --gpu 24GB --target-batch 8 --seq-len 16",
    "probe config.json --device cpu --seq-len 16 --records -",
    "lengths words.jsonl --tokenizer tokenizer.json",
)
"""Commands that may take more than a second."""
FACTORY = """
from torch import nn, randn

def rows(micro_batch_size, seq_len):
    return randn(micro_batch_size, seq_len, 64)

def make():
    return nn.Linear(64, 64), rows, lambda output: output.mean()
"""


@pytest.fixture
def at_terminal(tmp_path):
    """Run a command line of memplan where stderr is a terminal."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    (tmp_path / "modules.py").write_text(FACTORY, encoding="utf-8")
    lines = [json.dumps({"num_tokens": 7 * n, "num_supervised_tokens": n}) for n in range(1, 500)]
    (tmp_path / "counts.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def run(words: str, **how):
        environment = {"PYTHONPATH": str(ROOT), **how.pop("environment", {})}
        return in_terminal([*MEMPLAN, *words.split()], cwd=tmp_path, environment=environment, **how)

    return run


@pytest.mark.parametrize("words", TABLES)
def test_tables_have_80_columns_on_any_terminal(at_terminal, words: str) -> None:
    """Whoever makes the window narrower or wider gets the same lines: they can be compared and copied."""
    narrow, wide = (
        at_terminal(words, columns=columns, stdout=True, environment={"NO_COLOR": "1"}) for columns in (60, 120)
    )
    assert "\x1b" not in narrow.shown
    assert narrow.shown == wide.shown
    assert max(map(len, wide.screen())) <= 80


@pytest.mark.parametrize("words", TABLES[1:4])
def test_colour_is_for_terminals_and_changes_no_character(at_terminal, words: str) -> None:
    plain, coloured = at_terminal(words).piped, at_terminal(words, stdout=True).shown
    assert "\x1b" not in plain
    assert COLOUR.search(coloured)
    assert COLOUR.sub("", coloured).replace("\r\n", "\n") == plain


@pytest.mark.parametrize(
    ("environment", "stdout", "is_coloured"),
    [
        ({"NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
    ],
)
def test_who_decides_about_colour(at_terminal, environment: dict[str, str], stdout: bool, is_coloured: bool) -> None:
    """NO_COLOR before FORCE_COLOR, and that before the terminal."""
    ran = at_terminal(TABLES[0], stdout=stdout, environment=environment)
    assert bool(COLOUR.search(ran.shown if stdout else ran.piped)) == is_coloured


@pytest.mark.slow
@pytest.mark.parametrize("words", TABLES[1:4])
def test_a_terminal_that_has_ascii_alone(at_terminal, words: str) -> None:
    """Every table as it is elsewhere, bars of other characters."""
    ascii_alone = at_terminal(words, environment={"PYTHONIOENCODING": "ascii"}).piped
    assert ascii_alone.isascii()
    assert ascii_alone == at_terminal(words).piped.translate(str.maketrans("█░", "#."))


def words_and_tokenizer(folder: Path) -> None:
    """Records of text, and what counts their tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(folder / "tokenizer.json"))
    (folder / "words.jsonl").write_text('{"text": "one two three"}\n' * 5000, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("words", LONG)
def test_whoever_waits_sees_what_is_done(at_terminal, tmp_path, words: str) -> None:
    """A line with the time; it goes away, and only words that stay are left."""
    if "modules" in words or "trace" in words or "probe" in words:
        pytest.importorskip("torch")
    if "tokenizer" in words:
        words_and_tokenizer(tmp_path)
    ran = at_terminal(words)
    assert ran.status == 0
    assert re.search(r"\d:\d\d:\d\d", ran.shown)
    assert not re.search(r"\d:\d\d:\d\d", "\n".join(ran.screen()))
    assert all(line.startswith("memplan: ") for line in ran.screen() if line)
    assert ran.shown.rfind("\x1b[?25h") > ran.shown.rfind("\x1b[?25l")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "environment"), [(" --quiet", {}), ("", {"TERM": "dumb"}), ("", {"TERM": "unknown"})]
)
def test_nothing_where_nobody_wants_to_see_it(at_terminal, words: str, environment: dict[str, str]) -> None:
    ran = at_terminal(LONG[0] + words, environment=environment)
    assert (ran.status, ran.shown) == (0, "")


def said(folder: Path, *texts: str, **environment: str):
    """A run of a program that says these texts, each for a while."""
    code = (
        "import time\nfrom memplan.cli.progress import Progress\nwith Progress(shown=True) as progress:\n"
        f"    for text in {texts!r}:\n        progress.say(text)\n        time.sleep(0.3)\n"
    )
    return in_terminal([sys.executable, "-c", code], cwd=folder, environment={"PYTHONPATH": str(ROOT), **environment})


STEPS = ("reading", "1/4 a", "2/4 b", "3/4 c", "4/4 d", "writing")


def test_a_bar_where_the_number_of_steps_is_known(tmp_path) -> None:
    """It grows with what is done: none, 6, 12 and 18 of 24 cells, and there is none where nobody knows."""
    frames = said(tmp_path, *STEPS, PYTHONIOENCODING="ascii", NO_COLOR="1").shown.split("\r")
    lengths = [len(one[1]) for frame in frames if (one := re.search(r"\d/4 \w +(-*) ", frame))]
    assert set(lengths) <= {0, 6, 12, 18}
    assert len(set(lengths)) > 1
    assert lengths == sorted(lengths)
    others = [frame for frame in frames if "reading" in frame or "writing" in frame]
    assert others
    assert not any("--" in frame for frame in others)


def test_a_bar_in_colour_and_in_ascii(tmp_path) -> None:
    coloured = said(tmp_path, *STEPS[:3])
    assert "━" in coloured.shown
    assert COLOUR.search(coloured.shown)
    plain = said(tmp_path, *STEPS[:3], PYTHONIOENCODING="ascii", NO_COLOR="1")
    assert plain.shown.isascii()
    assert not re.search(r"\x1b\[3\d", plain.shown)
    assert not any(coloured.screen() + plain.screen())


@pytest.mark.slow
@pytest.mark.parametrize("columns", [30, 60, 120])
def test_the_line_has_room_on_any_terminal(at_terminal, columns: int) -> None:
    ran = at_terminal("sweep qwen2.5-0.5b --gpu 24GB --micro-batch 1..64 --seq-len 128..8192+512", columns=columns)
    frames = re.split(r"\r|\n", COLOUR.sub("", ran.shown))
    assert max(len(re.sub(r"\x1b\[\??[0-9]*[A-Za-z]", "", frame)) for frame in frames if "0:0" in frame) <= columns
    assert not any(line for line in ran.screen() if "0:0" in line)


def test_a_name_moves_no_cursor(tmp_path) -> None:
    """What is said may hold a name from outside."""
    ran = said(tmp_path, "a \x1b[2J\x1b]0;title\x07 [bold]name[/bold] \r\n")
    assert "a ?[2J?]0;title? [bold]name[/bold] ??" in COLOUR.sub("", ran.shown)
    assert "\x1b[2J" not in ran.shown


def test_a_fault_leaves_a_clean_line(at_terminal) -> None:
    ran = at_terminal("trace modules:nothing")
    assert ran.status == 1
    assert ran.screen()[0].startswith("memplan: ")


def test_nobody_looks() -> None:
    """In tests stderr is a file."""
    with Progress(shown=True) as progress:
        assert progress.say is None
