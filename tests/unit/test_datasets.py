"""Data as files: every kind of file and layout, by hand and against Hugging Face's own tokenizers and templates."""

from __future__ import annotations

import gzip
import io
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from memplan.datasets.counting import count
from memplan.datasets.layout import Layout, find_layout, text_of
from memplan.datasets.records import Source, find_sources, read_records
from memplan.datasets.tokenizer import read_tokenizer
from memplan.errors import MemplanError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

tokenizers = pytest.importorskip("tokenizers")

CHATML = (
    "{% for message in messages %}<s>{{ message.role }} {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of words, and a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "</s>"}))
    return folder


def all_of(path: Path) -> list[dict]:
    return list(read_records(find_sources(str(path))))


# -- files -------------------------------------------------------------------------------------------------------------


def test_every_kind_of_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [{"text": "one two"}, {"text": 'three, "four"\nfive'}]
    lines = "".join(json.dumps(one) + "\n" for one in records)
    (tmp_path / "a.jsonl").write_text(lines + "\n")
    (tmp_path / "b.json").write_text(json.dumps(records))
    (tmp_path / "c.json").write_text(json.dumps({"data": records}))
    (tmp_path / "d.json").write_text(lines)
    (tmp_path / "e.csv").write_text('text\none two\n"three, ""four""\nfive"\n')
    (tmp_path / "f.tsv").write_text('text\none two\n"three, ""four""\nfive"\n')
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "g.parquet")
    with gzip.open(tmp_path / "h.jsonl.gz", "wt") as file:
        file.write(lines)
    for path in sorted(tmp_path.iterdir()):
        assert all_of(path) == records, path
    assert len(all_of(tmp_path)) == 16
    assert len(list(read_records(find_sources(str(tmp_path / "*.json"))))) == 6


def test_a_line_of_text_is_a_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\r\n\n  \ntwo three\n")
    assert all_of(tmp_path / "a.txt") == [{"text": "one"}, {"text": "two three"}]


@pytest.mark.parametrize(("text", "first"), [('{"text": "a"}\n', {"text": "a"}), ("\na b\n", {"text": "a b"})])
def test_stdin(monkeypatch: pytest.MonkeyPatch, text: str, first: dict) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert next(read_records([Source("-", "")])) == first


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text":\n', r"a\.jsonl, line 2 is no JSON"),
        ("a.jsonl", b"3\n", "line 1 is no record: '3'"),
        ("a.json", b"3", "holds no list of records"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MemplanError, match=said):
        all_of(tmp_path / name)


def test_no_file_is_named(tmp_path: Path) -> None:
    for data in (str(tmp_path), str(tmp_path / "*.jsonl"), str(tmp_path / "none.csv")):
        with pytest.raises(UsageError, match="no data at"):
            find_sources(data)


# -- layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "kind", "fields"),
    [
        ({"num_tokens": 3, "num_supervised_tokens": 1}, "counts", ("num_tokens", "num_supervised_tokens")),
        ({"id": 1, "num_tokens": 3}, "counts", ("num_tokens",)),
        ({"messages": [], "text": "x"}, "messages", ("messages",)),
        ({"conversations": []}, "messages", ("conversations",)),
        ({"instruction": "a", "input": "", "output": "b"}, "pair", ("instruction", "input", "output")),
        ({"prompt": "a", "completion": "b"}, "pair", ("prompt", "completion")),
        ({"question": "a", "answer": "b"}, "pair", ("question", "answer")),
        ({"id": 3, "text": "a", "source": "b"}, "text", ("text",)),
        ({"id": 3, "story": "a"}, "text", ("story",)),
    ],
)
def test_layouts_are_found(record: dict, kind: str, fields: tuple[str, ...]) -> None:
    assert find_layout(record) == Layout(kind, fields)


def test_fields_can_be_named() -> None:
    record = {"story": "a", "moral": "b", "said": [{"role": "user", "content": "x"}]}
    assert find_layout(record, "moral", "story") == Layout("pair", ("story", "moral"))
    assert find_layout(record, "said").kind == "messages"
    with pytest.raises(UsageError, match="Which field"):
        find_layout({"a": "x", "b": "y"})
    with pytest.raises(UsageError, match="no field 'storry'"):
        find_layout(record, "storry")


def test_answers_have_a_label() -> None:
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "image"}]},
    ]
    found = text_of({"messages": chat}, Layout("messages", ("messages",)), None)
    assert found == ("abc", [(1, 2)])
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert text_of({"c": shared}, Layout("messages", ("c",)), None) == ("ab", [(1, 2)])
    pair = text_of({"i": "a", "x": None, "o": "b"}, Layout("pair", ("i", "x", "o")), None)
    assert pair == ("ab", [(1, 2)])


# -- counting ----------------------------------------------------------------------------------------------------------


def test_counts_that_are_given() -> None:
    found = count(
        [{"num_tokens": 5, "num_supervised_tokens": 2}, {"num_tokens": "7", "num_supervised_tokens": 0}], None
    )
    assert found.lengths.tokens.tolist() == [5, 7]
    assert found.lengths.supervised().tolist() == [2, 0]
    for bad in ({"num_tokens": -1}, {"num_tokens": 1.5}, {"num_tokens": True}, {}):
        with pytest.raises(MemplanError, match="num_tokens"):
            count([{"num_tokens": 5}, bad], None)
    with pytest.raises(MemplanError, match="3 with a label"):
        count([{"num_tokens": 2, "num_supervised_tokens": 3}], None)


def test_pairs_and_chats(words: Path) -> None:
    tokenizer = read_tokenizer(str(words))
    pairs = count([{"prompt": "a b c ", "completion": "d e"}, {"prompt": "", "completion": "a"}], tokenizer)
    assert pairs.lengths.tokens.tolist() == [6, 2]  # with the end of the sequence
    assert pairs.lengths.supervised().tolist() == [3, 2]
    silent = count([{"prompt": "a b", "completion": ""}], tokenizer).lengths
    assert (silent.tokens.tolist(), silent.supervised().tolist()) == ([3], [1])
    said = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
    chats = count([{"messages": said}], tokenizer)
    whole = "<s>user a b</s><s>assistant c</s><s>user d</s>"
    assert chats.lengths.tokens.tolist() == [len(tokenizer.model.encode(whole).ids)]
    assert chats.lengths.supervised().tolist() == [len(tokenizer.model.encode("c</s>").ids)]
    assert chats.has_template


def test_against_transformers(tmp_path: Path) -> None:
    """The same template by transformers' own renderer, its mask of what the assistant says included."""
    transformers = pytest.importorskip("transformers")
    template = (
        "{{ bos_token }}{%- for message in messages %}{% if message.role == 'assistant' %}"
        "<s>assistant {% generation %}{{ message.content | trim }}</s>{% endgeneration %}"
        "{% else %}<s>{{ message.role }} {{ message.content | tojson }}</s>{% endif %}{% if loop.index > 99 %}"
        "{% break %}{% endif %}{%- endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
    )
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    model.train_from_iterator(["user says something and the assistant answers"] * 5, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    chats = [
        [
            {"role": ("user", "assistant")[turn % 2], "content": "somé words " * int(rng.integers(1, 9))}
            for turn in range(int(rng.integers(1, 6)))
        ]
        for _ in range(30)
    ]
    found = count([{"messages": chat} for chat in chats], read_tokenizer(str(tmp_path)))
    for number, chat in enumerate(chats):
        wanted = fast.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert found.lengths.tokens[number] == len(wanted["input_ids"])
        assert found.lengths.supervised()[number] == sum(wanted["assistant_masks"])


def test_templates_run_in_a_sandbox(tmp_path: Path, words: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((words / name).read_text())
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(MemplanError, match="refuses a chat"):
        count([{"messages": [{"role": "user", "content": "a"}]}], read_tokenizer(str(tmp_path)))
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(MemplanError, match="cannot be read"):
        read_tokenizer(str(tmp_path))


def test_a_sample_is_drawn_at_random(words: Path) -> None:
    records = [{"text": "a " * (number % 50)} for number in range(5000)]
    tokenizer = read_tokenizer(str(words))
    whole, some = count(records, tokenizer), count(records, tokenizer, sample=500)
    assert (some.lengths.num_samples, some.num_records, whole.num_records) == (500, 5000, 5000)
    assert some.lengths.tokens.mean() == pytest.approx(whole.lengths.tokens.mean(), rel=0.1)
    assert count(records, tokenizer, sample=500).lengths.tokens.tolist() == some.lengths.tokens.tolist()
    assert count(records[:20], tokenizer, sample=500).lengths.num_samples == 20
    assert count(records[:20], tokenizer, sample=500).num_records == 20


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no records"):
        count([], None)
    with pytest.raises(MemplanError, match="no tokenizer"):
        count([{"text": "a"}], None)
    with pytest.raises(UsageError, match="no tokenizer at"):
        read_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(MemplanError, match="is no tokenizer"):
        read_tokenizer(str(tmp_path))
