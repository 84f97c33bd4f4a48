"""`--format html` of every command, `memplan report` of files and of several plans: pages that stand alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jsonschema
import pytest
from referencing import Registry, Resource

from memplan.report.pages.answers import PAGE_BY_KIND
from tests.cli.test_documents import read_schema, refuse, unlisted
from tests.cli.test_trace import LLAMA
from tests.support.html import Page, faults_of
from tests.support.records import measurement

LARGEST_PAGE = 500_000
HOSTILE = "<script>alert(1)</script>&\"'</title></style>\udce9"
"""A name from outside, with half of a character at its end."""

COMMANDS = {
    "estimate": "estimate llama-3-8b --gpu h200 --optimizer adamw-8bit",
    "estimate that does not fit": "estimate qwen2.5-1.5b --micro-batch 8 --gpu rtx3090",
    "estimate without a GPU": "estimate gpt2 --compile",
    "sweep": "sweep gpt2 --gpu 24GB --micro-batch 1..8,100,200",
    "sweep of nothing that fits": "sweep llama-3.1-405b --gpu 24GB --seq-len 512",
    "sweep without a GPU": "sweep gpt2 --micro-batch 1..100",
    "models": "models",
    "gpus": "gpus",
    "lengths": "lengths counts.jsonl --max-len 512,1024,65536 --micro-batch 4 --target-batch 32 "
    "--packing bfd,bfd-split,wrapped,first-fit,ffd",
    "accuracy": "validate --records /dev/null",
}
OF_MODULES = {
    "trace": "trace {tiny} --gpu 8GB --seq-len 16",
    "difference": "trace {tiny} --seq-len 16 --diff",
}
MEASURED = {"probe": "probe {tiny} --device cpu --seq-len 16", "probes": "probe --device cpu --matrix grid.toml"}
PLANS = {
    "plan": "suggest gpt2 --gpu t4 --target-batch 32",
    "plan of adapters": "suggest qwen2.5-7b --gpu 2xrtx4090 --target-batch 32 --lora-rank 8 --lora-ranks q_proj=4 "
    "--lora-targets q_proj,v_proj "
    "--lora-layers 0-3 --modules-to-save lm_head --quantize nf4 --reserve 1GiB --eval-batch 2",
    "plan with what is given": "suggest gpt2 --gpu 24GB --target-batch 8 --micro-batch 1 --checkpointing full "
    "--dropout 0",
    "plan that does not fit": "suggest qwen2.5-1.5b --gpu 24GB --target-batch 32 --precision bf16-mixed",
}


@pytest.fixture(autouse=True)
def counts(tmp_path):
    """Records that say how many tokens they have, for `memplan lengths`."""
    lines = (json.dumps({"num_tokens": n * n % 1999, "num_supervised_tokens": n % 7}) for n in range(50, 950))
    (tmp_path / "counts.jsonl").write_text("\n".join(lines))


@pytest.fixture
def tiny(tmp_path):
    """A folder with the config of a small model, under a name that nobody should have chosen."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "grid.toml").write_text(f'[[trial]]\nmodel = "{folder}"\nseq_len = [8, 16]\n')
    return folder


def checked(text: str) -> Page:
    """The page, in which nothing is wrong."""
    page = Page(text)
    assert faults_of(page) == []
    assert len(text.encode()) <= LARGEST_PAGE
    return page


@pytest.mark.parametrize("name", [*COMMANDS, *OF_MODULES])
def test_a_page_shows_the_document_of_json(run, name: str, tmp_path, request) -> None:
    """The JSON in a page is that of --json, the status is the same, and so is the page another time."""
    command = (COMMANDS | OF_MODULES)[name]
    if name in OF_MODULES:
        pytest.importorskip("torch")
        command = command.format(tiny=request.getfixturevalue("tiny"))
    asked = run(f"{command} --json")
    ran = run(f"{command} --format html")
    assert ran.status == asked.status
    page = checked(ran.out)
    assert page.document == json.loads(asked.out)
    assert run(f"{command} --format html --output page.html").status == asked.status
    assert (tmp_path / "page.html").read_bytes() == ran.out.encode()


def without_commands(document: dict) -> dict:
    """What is the same however the command is spelt."""
    left = {key: value for key, value in document.items() if key != "command"}
    return {**left, "what_if": {key: value for key, value in document["what_if"].items() if key != "commands"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_the_page_of_suggest_is_that_of_report(run, name: str, tmp_path) -> None:
    """By whichever command, and from the plan in a file: the same page, but for how the command is spelt."""
    command = PLANS[name]
    asked = run(f"{command} --json --output plan.json")
    ran = run(f"{command} --format html")
    assert ran.status == asked.status
    document = checked(ran.out).document
    assert document["plan"] == json.loads((tmp_path / "plan.json").read_text())
    assert run(command.replace("suggest", "report", 1)).status == asked.status
    assert (tmp_path / "memplan-report.html").read_bytes() == ran.out.encode()

    again = run("report plan.json")
    assert (again.status, again.err) == (asked.status, "memplan: page written to memplan-report.html\n")
    page = checked((tmp_path / "memplan-report.html").read_text())
    command = page.document["command"]
    assert without_commands(page.document) == without_commands(document)
    made = run(*command.split()[1:], "--json")
    assert json.loads(made.out)["best"] == document["plan"]["best"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_pages_of_measurements(run, name: str, tiny, monkeypatch) -> None:
    """A real measurement on the CPU, and a grid of them."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    ran = run(f"{MEASURED[name].format(tiny=tiny)} --format html")
    assert ran.status == 0
    page = checked(ran.out)
    assert page.document["kind"] == name
    assert "It ran" in page.text() or "2 trials measured" in page.text()


def test_the_page_of_calibrations(run, tmp_path) -> None:
    from memplan import measuring
    from memplan.catalog.measurements import append_measurement

    path = tmp_path / "records" / "nvidia-h200.jsonl"
    for n in range(12):
        trial = measuring.make_trial("pythia-14m", micro_batch=1 + n, seq_len=32, optimizer="sgd")
        append_measurement(str(path), measurement(trial))
    command = f"calibrate --records {tmp_path / 'records'} --dry-run"
    asked, ran = run(f"{command} --json"), run(f"{command} --format html")
    assert checked(ran.out).document == json.loads(asked.out)
    assert "NVIDIA H200" in Page(ran.out).text()


@pytest.mark.parametrize(
    "command", ["estimate {} --gpu 8GB", "suggest {} --gpu 8GB --target-batch 4", "sweep {} --gpu 8GB"]
)
def test_names_from_outside_are_text(run, tmp_path, command: str) -> None:
    """What a folder is called is shown as it is, and starts nothing."""
    folder = tmp_path.joinpath(*HOSTILE.split("/"))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    words = [HOSTILE if word == "{}" else word for word in command.split()]
    for arguments in ([*words, "--format", "html"], ["report", *words[1:]]):
        if arguments[0] == "report" and words[0] != "suggest":
            continue
        ran = run(*arguments, "--output", "page.html")
        assert ran.status == 0, ran.err
        page = checked((tmp_path / "page.html").read_bytes().decode("utf-8"))
        shown = HOSTILE.replace("\udce9", "?")
        assert shown in page.text("h1") + page.text("bdi")
        assert len(page.all("script")) == len([one for one in page.all("script") if set(one) <= {"type", "id"}])
        assert "<script>alert" not in (tmp_path / "page.html").read_bytes().decode("utf-8")


def test_names_from_outside_in_charts(run, tmp_path) -> None:
    """Nor do they mean anything to whoever draws: no formula, no pattern, no colour, no part of a drawing."""
    hostile = '$\\frac{$ id="(" #0a0001 1.2345 <b>'
    (tmp_path / hostile).mkdir()
    (tmp_path / hostile / "config.json").write_text(json.dumps(LLAMA))
    ran = run("report", hostile, "gpt2", "--gpu", "8GB", "--target-batch", "4", "--output", "page.html")
    assert ran.status == 0, ran.err
    page = checked((tmp_path / "page.html").read_text())
    assert f"1. {hostile} on 8GB" in page.text("th")
    assert f"{hostile} on"[:12] in page.text("text")
    assert "0a0001 1.2345 <b> on 8GB" in page.text("text") + page.text("desc")


def test_a_page_is_what_it_says_in_any_encoding(tmp_path) -> None:
    """It declares UTF-8, and stdout may be something else: a browser reads the same."""
    pages = []
    for encoding in ("utf-8", "cp1252", "ascii"):
        env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "memplan", "estimate", "gpt2", "--format", "html"]
        done = subprocess.run(command, capture_output=True, env=env, cwd=tmp_path, check=True)
        pages.append(Page(done.stdout.decode("utf-8")))
    assert "\N{LEFT DOUBLE QUOTATION MARK}" in pages[0].text()
    assert pages[0].texts == pages[1].texts == pages[2].texts


@pytest.mark.slow
def test_a_comparison_of_models_and_cards(run, tmp_path) -> None:
    """Every side has the plan that suggest makes, and the page its figures."""
    ran = run("report gpt2 qwen2.5-0.5b --gpu rtx4090,t4 --target-batch 32 -o page.html")
    assert ran.status == 0
    page = checked((tmp_path / "page.html").read_text())
    sides = page.document["sides"]
    assert [side["name"] for side in sides] == [
        "gpt2 on rtx4090",
        "gpt2 on t4",
        "Qwen2.5-0.5B on rtx4090",
        "Qwen2.5-0.5B on t4",
    ]
    for side, (model, gpu) in zip(
        sides, [(m, g) for m in ("gpt2", "qwen2.5-0.5b") for g in ("rtx4090", "t4")], strict=True
    ):
        command = f"suggest {model} --gpu {gpu} --target-batch 32"
        assert side["command"] == f"memplan {command}"
        assert side["plan"] == json.loads(run(f"{command} --json").out)
        assert sum(side["by_kind"].values()) == side["plan"]["best"]["peak_process_bytes"]
        assert f"{side['plan']['best']['tokens_per_s']:,.0f}" in page.text("td")
    assert run("report gpt2 qwen2.5-0.5b --gpu rtx4090,t4 --target-batch 32 -o again.html").status == 0
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "page.html").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ("gpt2 llama-3.1-405b --gpu t4", 0, "1 of 2 plans fits: 1. gpt2 on t4"),
        ("llama-3.1-70b llama-3.1-405b --gpu t4", 3, "None of the 2 plans fits"),
        ("gpt2 --gpu 8GB,rtx4090,2xh100", 0, "All 3 plans fit"),
    ],
)
def test_a_comparison_fits_where_one_does(run, tmp_path, arguments: str, status: int, says: str) -> None:
    assert run(f"report {arguments} --target-batch 32 -o page.html").status == status
    assert says in checked((tmp_path / "page.html").read_text()).text("p")


@pytest.mark.slow
def test_plans_from_files_are_compared(run, tmp_path) -> None:
    """A file without its model has a bar that is not split; the rest is as in the file."""
    run("suggest gpt2 --gpu t4 --target-batch 32 --json --output a.json")
    run("suggest gpt2 --gpu t4 --target-batch 64 --format html --output page.html")
    plan = json.loads((tmp_path / "a.json").read_text())
    plan["model"]["name"] = "./gone"
    (tmp_path / "b.json").write_text(json.dumps(plan))
    (tmp_path / "c.json").write_text(json.dumps(Page((tmp_path / "page.html").read_text()).document))
    ran = run("report a.json b.json c.json gpt2 --gpu t4 --target-batch 16 -o page.html")
    assert ran.status == 0
    assert "b.json: Only what the file says is shown" in ran.err
    page = checked((tmp_path / "page.html").read_text())
    sides = page.document["sides"]
    assert [side["plan"]["target"]["global_batch_size"] for side in sides] == [32, 32, 64, 16]
    assert [side["by_kind"] is None for side in sides] == [False, True, False, False]
    assert sides[0]["notes"] == sides[2]["notes"] == []
    assert "There is no file or folder ./gone" in page.text("p")


@pytest.mark.parametrize("command", [*COMMANDS.values(), "report gpt2 --gpu t4,8GB --target-batch 8"])
def test_an_answer_from_a_file_has_its_page(run, tmp_path, command: str) -> None:
    """The page that is made of the file alone shows the document that is in it."""
    if command.startswith("report"):
        run(f"{command} -o page.html")
        (tmp_path / "answer.json").write_text(json.dumps(Page((tmp_path / "page.html").read_text()).document))
        status = 0
    else:
        status = run(f"{command} --json --output answer.json").status
    assert run("report answer.json --output page.html").status == status
    page = checked((tmp_path / "page.html").read_text())
    assert page.document == json.loads((tmp_path / "answer.json").read_text())


def test_another_version_is_told_with_both_numbers(run, tmp_path) -> None:
    run("suggest gpt2 --gpu t4 --target-batch 32 --json --output plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    peak = plan["best"]["peak_process_bytes"]
    plan["best"]["peak_process_bytes"] = peak - 2**30
    plan["memplan_version"] = "0.0.1"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    ran = run("report plan.json -o page.html")
    now = f"{peak / 2**30:.2f} GiB"
    before = f"{(peak - 2**30) / 2**30:.2f} GiB"
    said = f"(0.0.1) found a peak of {before} where this one"
    for text in (ran.err, checked((tmp_path / "page.html").read_text()).text("p")):
        assert said in text
        assert now in text


def test_a_module_that_a_file_names_is_not_run(run, tmp_path) -> None:
    run("suggest gpt2 --gpu t4 --target-batch 32 --json --output plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('it was run')")
    plan["model"]["name"] = "evil:make"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    ran = run("report plan.json -o page.html")
    assert ran.status == 0
    assert "evil:make is a module that a file names, and is not run for it" in ran.err


def changed(plan: dict, *path: str, value: object) -> str:
    """The plan as JSON with something else at one place."""
    copy = json.loads(json.dumps(plan))
    here = copy
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return json.dumps(copy)


BROKEN = {
    "no JSON": lambda plan: '{"kind": "plan"',
    "no number": lambda plan: changed(plan, "best", "peak_process_bytes", value=float("nan")),
    "too deep": lambda plan: "[" * 100_000,
    "no plan": lambda plan: '{"kind": "plan", "schema_version": 1}',
    "nobody's kind": lambda plan: changed(plan, "kind", value="banana"),
    "a list as kind": lambda plan: changed(plan, "kind", value=["plan"]),
    "a later version": lambda plan: changed(plan, "schema_version", value=2),
    "text for bytes": lambda plan: changed(plan, "gpu", "usable_bytes", value="many"),
    "no budget": lambda plan: changed(plan, "budget", value=None),
    "no GPUs": lambda plan: '{"kind": "gpus", "schema_version": 1, "memplan_version": "1"}',
    "a report of nothing": lambda plan: '{"kind": "report", "schema_version": 1, "memplan_version": "1"}',
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_ends_in_a_cause_and_a_cure(run, tmp_path, kind: str) -> None:
    run("suggest gpt2 --gpu t4 --target-batch 32 --json --output plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "bad.json").write_text(BROKEN[kind](plan))
    for command in ("report bad.json", "report bad.json plan.json"):
        ran = run(f"{command} -o page.html")
        assert ran.status == 1
        cause, cure = ran.err.splitlines()
        assert cause.startswith("memplan: bad.json")
        assert cure.startswith(("Write ", "Name "))
        assert "unexpected" not in ran.err
        assert not os.path.exists("page.html")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ("plan.json --gpu h100", 2, "--gpu and plan.json contradict each other"),
        ("plan.json --padding", 2, "--padding and plan.json contradict each other"),
        ("plan.json gpus.json", 1, "gpus.json holds no plan"),
        ("a b c --gpu t4,8GB,24GB --target-batch 8", 2, "9 plans are too many"),
        ("gpt2 --gpu t4, --target-batch 8", 2, "''"),
        ("gpt2 banana --gpu t4 --target-batch 8", 1, "'banana'"),
        ("gpt2 --gpu t4,8GB", 2, "--target-batch or --target-tokens is missing"),
    ],
)
def test_what_cannot_be_compared(run, arguments: str, status: int, says: str) -> None:
    run("suggest gpt2 --gpu t4 --target-batch 32 --json --output plan.json")
    run("gpus --json --output gpus.json")
    ran = run(f"report {arguments}")
    assert ran.status == status
    assert says in ran.err
    assert len(ran.err.splitlines()) == 2
    assert not os.path.exists("memplan-report.html")


def test_a_config_of_a_model_is_no_answer(run, tiny) -> None:
    assert run("report", str(tiny / "config.json"), *["--gpu", "8GB", "--target-batch", "4"]).status == 0


def test_every_kind_of_document_has_a_page(run) -> None:
    """Kinds are those of the schemas; a plan is shown as a report, and a program is a file by itself."""
    kinds = set()
    for file in os.listdir(
        os.path.join(os.path.dirname(read_schema.__globals__["memplan"].report.__file__), "schemas")
    ):
        kind = read_schema(file.removesuffix(".schema.json"))["properties"]["kind"]
        kinds |= {kind["const"]} if "const" in kind else set(kind["enum"])
    assert kinds - {"plan", "export"} == set(PAGE_BY_KIND)


def schemas(uri: str) -> Resource:
    return Resource.from_contents(read_schema(uri.removesuffix(".schema.json")))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("report", "report gpt2 --gpu t4 --target-batch 32"),
        ("report", "report llama-3-8b --gpu 24GB --target-batch 32"),
        ("comparison", "report gpt2 llama-3-8b --gpu t4,24GB --target-batch 32"),
    ],
)
def test_document_and_schema(run, tmp_path, name: str, command: str) -> None:
    """What is embedded is valid, and has no key that its schema does not describe."""
    run(f"{command} -o page.html")
    document = Page((tmp_path / "page.html").read_text()).document
    json.loads(json.dumps(document), parse_constant=refuse)
    rules = read_schema(name)
    jsonschema.Draft202012Validator.check_schema(rules)
    jsonschema.Draft202012Validator(rules, registry=Registry(retrieve=schemas)).validate(document)
    local = json.loads(
        json.dumps(rules).replace('"$ref": "plan.schema.json"', '"x": 1').replace('"$ref": "estimate', '"x": "')
    )
    assert unlisted(document, local, local) == []
    plan, row = read_schema("plan"), read_schema("estimate")
    for one in document.get("sides", [document]):
        assert unlisted(one["plan"], plan, plan) == []
        assert [
            key for each in one.get("ledger", []) for key in each if key not in row["$defs"]["row"]["properties"]
        ] == []
