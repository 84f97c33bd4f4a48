"""`memplan lengths`: every format, text that a tokenizer counts, what is remembered, faults, and 80 columns."""

from __future__ import annotations

import csv
import gzip
import io
import json
from typing import TYPE_CHECKING

import jsonschema
import numpy as np
import pytest

import memplan
from memplan.report.layout import WIDTH
from memplan.report.spread import cumulative, histogram
from tests.cli.test_documents import read_schema, refuse, unlisted
from tests.support.html import Page, faults_of

if TYPE_CHECKING:
    from pathlib import Path

CHATML = (
    "{% for message in messages %}<s>{{ message.role }} {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
COUNTS = [(1500, 300), (100, 50), (2000, 900), (700, 700)]


@pytest.fixture
def counts(tmp_path: Path) -> str:
    """Four records that say their counts."""
    lines = [json.dumps({"num_tokens": tokens, "num_supervised_tokens": part}) for tokens, part in COUNTS]
    (tmp_path / "counts.jsonl").write_text("\n".join(lines) + "\n")
    return "counts.jsonl"


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a tokenizer of words and a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "model"
    folder.mkdir()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "</s>"}))
    return "model"


def document_of(run, command: str) -> dict:
    """The JSON of a run that went well, valid and with no key that the schema does not describe."""
    ran = run(f"{command} --json")
    assert ran.status == 0, ran.err
    document = json.loads(ran.out, parse_constant=refuse)
    rules = read_schema("lengths")
    jsonschema.Draft202012Validator.check_schema(rules)
    jsonschema.Draft202012Validator(rules).validate(document)
    assert unlisted(document, rules, rules) == []
    return document


# -- what it answers ---------------------------------------------------------------------------------------------------


def test_counts_by_hand(run, counts: str) -> None:
    """1,024: 1,500 lose 476 and 2,000 lose 976; the labels of the first stand in its last 300, of the third in 900."""
    document = document_of(run, f"lengths {counts} --max-len 1024,2048 --micro-batch 2 --target-batch 2")
    assert [document[key] for key in ("num_samples", "num_tokens", "num_supervised_tokens")] == [4, 4300, 1950]
    short, whole = document["candidates"]
    assert short["num_truncated"] == 2
    assert short["num_tokens_lost"] == 476 + 976
    assert short["num_supervised_tokens_lost"] == 300 + 900
    assert short["num_without_labels"] == 2
    assert [whole[key] for key in ("num_truncated", "num_tokens_lost", "num_without_labels")] == [0, 0, 0]
    ways = {one["how"]: one for one in short["batching"]}
    assert list(ways) == ["fixed", "longest", "grouped", "padding-free", "bfd"]
    assert (ways["fixed"]["slots_per_micro_batch"], ways["fixed"]["tokens_per_micro_batch"]) == (2048, 2848 / 2)
    assert ways["padding-free"]["slots_per_micro_batch"] == 2848 / 2
    assert (ways["bfd"]["num_rows"], ways["bfd"]["samples_per_row"]) == (3, pytest.approx(4 / 3))
    assert (ways["bfd"]["tokens_per_step"], ways["bfd"]["steps_per_epoch"]) == (pytest.approx(2848 / 3 * 2), 2)
    assert ways["fixed"]["steps_per_epoch"] == 2


def test_a_row_of_axolotl_takes_the_whole_micro_batch(run, counts: str) -> None:
    """Rows of 2 x 1,024: 1,024 + 100, then 1,024 fits no more, 700 does."""
    document = document_of(
        run, f"lengths {counts} --max-len 1024 --micro-batch 2 --target-batch 4 --packing first-fit,wrapped"
    )
    ways = {one["how"]: one for one in document["candidates"][0]["batching"]}
    packed = ways["first-fit"]
    assert (packed["num_rows"], packed["rows_per_micro_batch"], packed["num_slots"]) == (2, 1, 2 * 2048)
    assert packed["efficiency"] == pytest.approx(2848 / 4096)
    assert packed["tokens_per_micro_batch"] == 2848 / 2
    assert (packed["tokens_per_step"], packed["steps_per_epoch"]) == (2848, 1)
    assert ways["wrapped"]["num_tokens"] == 4300
    assert [need["trainer"] for need in document["needs"]] == [
        "TRL 1.16",
        "axolotl 0.19",
        *["LLaMA-Factory (0b3022b)"] * 2,
    ]


def test_without_packing_there_is_nothing_to_keep_apart(run, counts: str) -> None:
    document = document_of(run, f"lengths {counts} --packing ,")
    assert document["needs"] == []
    assert document["global_batch_size"] is None
    assert all(way["steps_per_epoch"] is None for one in document["candidates"] for way in one["batching"])
    assert "apart" not in run(f"lengths {counts} --packing ,").out


def test_text_that_a_tokenizer_counts(run, model: str, tmp_path: Path) -> None:
    """Words and an end-of-sequence token, from files of four kinds in a folder and below it."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "data" / "more").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "one two three"}\n')
    (tmp_path / "data" / "b.csv").write_text("text\none two\n")
    (tmp_path / "data" / "more" / "c.txt").write_text("one\n\ntwo three four five\n")
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "one two three four"}]), tmp_path / "data" / "d.parquet")
    with gzip.open(tmp_path / "data" / "e.jsonl.gz", "wt") as file:
        file.write('{"text": "a b c d e f"}\n')
    document = document_of(run, f"lengths data --tokenizer {model}")
    assert (document["num_files"], document["num_samples"]) == (5, 6)
    assert document["num_tokens"] == document["num_supervised_tokens"] == (3 + 2 + 1 + 4 + 4 + 6) + 6
    assert document_of(run, f"lengths data/*.csv --tokenizer {model}/tokenizer.json")["num_tokens"] == 3
    assert "with an end-of-sequence token" in " ".join(run(f"lengths data --tokenizer {model}").out.split())


def test_chats_and_pairs(run, model: str, tmp_path: Path) -> None:
    """`<s>user a b</s><s>assistant c d</s>`: `<s>user`, `a`, `b</s><s>assistant`, `c`, `d</s>`."""
    chat = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
    (tmp_path / "chats.json").write_text(json.dumps([{"messages": chat}]))
    found = document_of(run, f"lengths chats.json --tokenizer {model}")
    assert (found["layout"], found["has_template"]) == ({"kind": "messages", "fields": ["messages"]}, True)
    assert (found["num_tokens"], found["num_supervised_tokens"]) == (5, 2)
    assert "through its template" in " ".join(run(f"lengths chats.json --tokenizer {model}").out.split())
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"ask": "a b ", "say": "c d e", "id": "x"}) + "\n")
    found = document_of(run, f"lengths pairs.jsonl --tokenizer {model} --field say --prompt-field ask")
    assert (found["num_tokens"], found["num_supervised_tokens"]) == (6, 4)


def test_stdin(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"num_tokens": 3}\n{"num_tokens": 5}\n'))
    document = document_of(run, "lengths -")
    assert (document["num_samples"], document["num_tokens"]) == (2, 8)


# -- what is remembered, and samples -----------------------------------------------------------------------------------


def test_what_was_counted_is_not_counted_again(run, model: str, tmp_path: Path, monkeypatch) -> None:
    """As long as neither the data nor the tokenizer has another content; under another name, too."""
    from memplan.datasets.tokenizer import Tokenizer

    calls = []
    encode = Tokenizer.encode

    def counted(self: Tokenizer, texts: list[str], *, specials: bool) -> list:
        calls.append(len(texts))
        return encode(self, texts, specials=specials)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a b ", "completion": "c"}\n{"prompt": "a ", "completion": "b"}\n')
    first = document_of(run, f"lengths a.jsonl --tokenizer {model}")
    assert calls == [2]
    assert document_of(run, f"lengths a.jsonl --tokenizer {model}") == first
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    assert document_of(run, f"lengths b.jsonl --tokenizer {model}") == {**first, "data": "b.jsonl"}
    assert calls == [2]
    (tmp_path / "b.jsonl").write_text('{"prompt": "a b c ", "completion": "c"}\n')
    assert document_of(run, f"lengths b.jsonl --tokenizer {model}")["num_tokens"] == 5
    assert calls == [2, 1]
    (tmp_path / "model" / "chat_template.jinja").write_text(CHATML)
    document_of(run, f"lengths b.jsonl --tokenizer {model}")
    assert calls == [2, 1, 1]


def test_what_is_damaged_in_the_cache_is_counted_again(run, model: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n')
    first = document_of(run, f"lengths a.jsonl --tokenizer {model}")
    (kept,) = (tmp_path / "cache" / "lengths").iterdir()
    kept.write_bytes(b"no archive")
    assert document_of(run, f"lengths a.jsonl --tokenizer {model}") == first


def test_a_sample(run, counts: str) -> None:
    document = document_of(run, f"lengths {counts} --sample 2")
    assert (document["is_sample"], document["num_samples"]) == (True, 2)
    ran = run(f"lengths {counts} --sample 2")
    assert "drawn at random" in ran.out
    assert "a sample of 2 records" in ran.err
    assert run(f"lengths {counts} --sample 2 --quiet").err == ""
    assert document["num_records"] == len(COUNTS)
    assert f"2 of {document['num_records']} records, drawn at random" in ran.out
    whole = document_of(run, f"lengths {counts} --sample 9")
    assert not whole["is_sample"]
    assert whole["num_records"] == whole["num_samples"]


def test_a_sample_is_remembered_with_all_that_it_is_drawn_from(run, model: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n' * 5)
    first, again = (document_of(run, f"lengths a.jsonl --tokenizer {model} --sample 2") for _ in range(2))
    assert (first["is_sample"], first["num_samples"], first["num_records"]) == (True, 2, 5)
    assert again == first


# -- formats -----------------------------------------------------------------------------------------------------------


def test_text(run, counts: str) -> None:
    """At most 80 columns; the candidates stand beside their bins, and with --quiet tables alone."""
    ran = run(f"lengths {counts} --max-len 1024,2048 --target-batch 4 --packing bfd,bfd-split,wrapped,first-fit,ffd")
    assert (ran.status, ran.err) == (0, "")
    assert max(map(len, ran.out.splitlines())) <= WIDTH
    marked = [line.split()[2] for line in ran.out.splitlines() if line.endswith("  1,024")]
    assert marked == ["1,024"]
    assert "cut      on the right" in ran.out
    for words in ("no label", "padding-free", "first-fit", "What keeps the samples of a packed row apart"):
        assert words in ran.out
    quiet = run(f"lengths {counts} --max-len 1024 --quiet")
    assert "fixed" in quiet.out
    assert "Lengths" not in quiet.out


def test_csv_and_markdown_and_the_library(run, counts: str) -> None:
    command = f"lengths {counts} --max-len 1024,2048 --micro-batch 2 --target-batch 4"
    rows = list(csv.DictReader(io.StringIO(run(f"{command} --format csv").out)))
    assert [row["max_len"] for row in rows] == ["1024", "2048"]
    found = memplan.lengths(counts, max_len=(1024, 2048), micro_batch=2, target_batch=4)
    frame = found.to_pandas()
    assert list(frame.columns) == list(rows[0])
    assert frame["share_truncated"].tolist() == [0.5, 0.0]
    assert frame["steps_per_epoch_bfd"].tolist() == [float(row["steps_per_epoch_bfd"]) for row in rows]
    assert "| max_len | share_truncated |" in run(f"{command} --format markdown").out


def test_the_largest_numbers_fit_80_columns(run, tmp_path: Path) -> None:
    lines = '{"num_tokens": 131072, "num_supervised_tokens": 999}\n' * 999
    (tmp_path / "a.jsonl").write_text(lines)
    ran = run("lengths a.jsonl --max-len 1024,131072,1048576 --micro-batch 64 --target-batch 1024 --packing bfd,ffd")
    assert ran.status == 0
    assert max(map(len, ran.out.splitlines())) <= WIDTH
    assert ".." not in ran.out


def test_the_page_shows_the_document_with_its_numbers_in_tables(run, counts: str, tmp_path: Path) -> None:
    command = f"lengths {counts} --max-len 1024,2048 --micro-batch 2 --target-batch 4 --packing bfd,first-fit"
    ran = run(f"{command} --format html")
    page = Page(ran.out)
    assert faults_of(page) == []
    assert page.document == document_of(run, command)
    assert run(f"{command} --format html -o page.html").status == 0
    assert (tmp_path / "page.html").read_text() == ran.out
    assert "A maximum of 2,048 cuts no record." in page.text("p")
    assert "1,024 cuts 50.0 % of the records, and 61.5 % of the tokens with a label are lost." in page.text("p")
    assert "Share that a maximum leaves whole: 1,024: 50.0 %, 2,048: 100.0 %." in page.text("desc")
    assert "1,024" in page.text("text")
    for cell in ("padding-free", "first-fit", "50.0 %"):
        assert cell in page.text("td")
    run(f"{command} --json -o saved.json")
    assert run("report saved.json -o again.html").status == 0
    assert (tmp_path / "again.html").read_text() == ran.out


def test_a_page_where_everything_is_cut_or_is_a_sample(run, counts: str) -> None:
    page = Page(run(f"lengths {counts} --max-len 64,65,66,67 --sample 3 --format html").out)
    assert faults_of(page) == []
    assert "Every candidate cuts records." in page.text("p")
    assert "That is of a sample." in page.text("p")


def test_pictures_of_the_library(counts: str) -> None:
    found = memplan.lengths(counts, max_len=(1024, 2048))
    figure = found.plot()
    assert "1,024" in [text.get_text() for text in figure.axes[0].texts]
    bars = [patch.get_height() for patch in figure.axes[0].patches]
    assert bars == [one["num"] for one in histogram(found.lengths.tokens, ())]
    shown = found._repr_html_()
    assert "counts.jsonl: 4 records, 4,300 tokens" in shown
    assert "50.0 %" in shown


# -- histogram and curve -----------------------------------------------------------------------------------------------


def test_bins_hold_every_record_once_and_say_what_a_candidate_leaves_whole() -> None:
    """Of 10,000 lengths: bins add up, and the share up to an edge is that of the records up to it."""
    tokens = np.random.default_rng(0).lognormal(6, 1, 10_000).astype(np.int64)
    bins = histogram(tokens, [512, 1024, 10**6])
    assert sum(one["num"] for one in bins) == tokens.size
    for one in bins:
        first = one is bins[0]
        assert one["num"] == ((tokens > one["over"] - first) & (tokens <= one["to"])).sum()
        assert one["share"] == pytest.approx((tokens <= one["to"]).mean())
    assert [one["to"] for one in bins if 512 in one["candidates"]] == [512]
    assert bins[-1]["candidates"] == [10**6]
    assert len(bins) <= 16
    curve = cumulative(tokens, [512, 1024])
    assert {one["num_tokens"]: one["share"] for one in curve}[512] == pytest.approx((tokens <= 512).mean())
    assert [one["num_tokens"] for one in curve] == sorted({one["num_tokens"] for one in curve})
    assert curve[-1]["share"] == 1


@pytest.mark.parametrize("tokens", [[1], [0, 0, 1], [7] * 9, [1, 10**9], list(range(100))])
def test_bins_of_odd_data(tokens: list[int]) -> None:
    bins = histogram(np.array(tokens, np.int64), [3])
    assert sum(one["num"] for one in bins) == len(tokens)
    assert bins[-1]["share"] == 1
    assert bins[-1]["to"] == max(tokens)
    assert sum(3 in one["candidates"] for one in bins) == 1


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        ("nothing.jsonl", 2, "There is no data at 'nothing.jsonl'."),
        ("empty.jsonl", 2, "The data holds no records."),
        ("zero.jsonl", 2, "The data holds no tokens."),
        ("bad.jsonl", 1, "bad.jsonl, line 2 is no JSON: 'no json'."),
        ("more.jsonl", 1, "Record 2 has 3 tokens and 4 with a label."),
        ("mixed.jsonl", 1, "Record 2 has no num_tokens."),
        ("half.jsonl", 1, "Record 1: num_tokens is '1.5', not a whole number."),
        ("good.jsonl --micro-batch 4 --target-batch 6", 2, "A batch of 6 is not made of micro-batches of 4."),
        ("words.jsonl", 1, "The records hold text, and no tokenizer is named."),
        ("two.jsonl", 2, "Which field holds the text?"),
        ("words.jsonl --field txet", 2, "The records have no field 'txet'."),
        ("words.jsonl --tokenizer nowhere", 2, "There is no tokenizer at 'nowhere'."),
        ("good.jsonl --packing bdf", 2, "--packing 'bdf' is not known.\nDid you mean bfd?"),
        ("good.jsonl --truncation up", 2, "up"),
        ("good.jsonl --max-len 0", 2, "--max-len"),
        ("good.jsonl --micro-batch 0", 2, "--micro-batch"),
        ("good.jsonl --sample 0", 2, "--sample"),
        ("", 2, "DATA"),
    ],
)
def test_faults_say_cause_and_cure(run, tmp_path: Path, command: str, status: int, says: str) -> None:
    """Two sentences on stderr, nothing on stdout."""
    files = {
        "empty": "\n",
        "zero": '{"num_tokens": 0}\n',
        "bad": '{"num_tokens": 1}\nno json\n',
        "more": '{"num_tokens": 3, "num_supervised_tokens": 1}\n{"num_tokens": 3, "num_supervised_tokens": 4}\n',
        "mixed": '{"num_tokens": 1}\n{"text": "a"}\n',
        "half": '{"num_tokens": 1.5}\n',
        "words": '{"text": "a"}\n',
        "two": '{"a": "x", "b": "y"}\n',
        "good": '{"num_tokens": 3}\n',
    }
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    ran = run(*["lengths", *command.split()])
    assert (ran.status, ran.out) == (status, "")
    assert says in ran.err
    cause, cure = ran.err.splitlines()
    assert cause.startswith("memplan: ")
    assert cure.endswith((".", "?"))


@pytest.mark.parametrize("line", ['{"num_tokens": 3} 4', '{"num_tokens": 3}{"num_tokens": 4}', '{"num_tokens": 3'])
def test_a_line_is_one_record(run, tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"num_tokens": 1}}\n{line}\n')
    assert "a.jsonl, line 2 is no JSON" in run("lengths a.jsonl").err


def test_spaces_around_a_record_are_none_of_it(run, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('  {"num_tokens": 1}  \r\n\n\t{"num_tokens": "2"}\n')
    assert document_of(run, "lengths a.jsonl")["num_tokens"] == 3
