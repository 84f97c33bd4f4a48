"""What a cold start imports: planning needs none of the heavy libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memplan.catalog.gpus import read_index
from memplan.catalog.models import find_default_model
from memplan.catalog.profiles import cut_profile, parse_toml, profile_path

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "pandas", "matplotlib", "numpy", "rich", "jinja2", "tomli"}
UNNEEDED = {"pathlib", "urllib.request", "http.client", "tempfile", "subprocess", "difflib", "csv", "asyncio", "email"}
CLICKLESS = {"click", "dataclasses", "inspect", "argparse", "optparse", "textwrap", "locale", "gettext", "shutil"}
CLICKLESS |= {"uuid", "datetime", "threading", "platform", "ast", "weakref", "tomllib", "tomli", "string"}
"""What an ordinary command line does without, on top."""

SCRIPT = """
import sys
before = set(sys.modules)
from memplan.cli.main import main
main(sys.argv[1:])
print(*sorted(set(sys.modules) - before), sep="\\n", file=sys.stderr)
"""


def modules_of(command: str) -> set[str]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    args = [sys.executable, "-S", "-c", SCRIPT, *command.split()]
    site = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), site])
    done = subprocess.run(args, capture_output=True, text=True, env=env, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "command",
    [
        "--version",
        "--help",
        "estimate llama-3-8b",
        "suggest --gpu 24GB --target-batch 32",
        "suggest --gpu h200 --target-batch 8 --json",
    ],
)
def test_nothing_heavy(command: str) -> None:
    loaded = modules_of(command)
    tops = {name.partition(".")[0] for name in loaded}
    assert tops & (HEAVY - ({"tomli"} if sys.version_info < (3, 11) else set())) == set()
    assert loaded & UNNEEDED == set()


@pytest.mark.parametrize(
    "command",
    [
        "estimate llama-3-8b",
        "estimate gpt2 --micro-batch 2 --json",
        "suggest --gpu 24GB --target-batch 32",
        "suggest gpt2 --gpu=rtx4090 --target-tokens 64k -q",
    ],
)
def test_an_ordinary_command_line_is_read_without_click(command: str) -> None:
    assert modules_of(command) & (UNNEEDED | CLICKLESS) == set()


@pytest.mark.parametrize("command", ["sweep gpt2 --gpu 24GB", "sweep gpt2 --seq-len 64 --format csv"])
def test_a_sweep_needs_arrays_and_nothing_else_that_is_heavy(command: str) -> None:
    assert {name.partition(".")[0] for name in modules_of(command)} & (HEAVY - {"tomli"}) == {"numpy"}


def test_the_help_of_a_sweep_needs_no_arrays() -> None:
    assert "numpy" not in modules_of("sweep --help")


def test_a_command_imports_only_itself() -> None:
    loaded = modules_of("gpus --quiet")
    assert "memplan.cli.gpus" in loaded
    assert not {"memplan.cli.suggest", "memplan.api", "memplan.planner.search", "memplan.estimation.estimate"} & loaded


@pytest.mark.parametrize("file", sorted(os.listdir(profile_path("gpus"))))
def test_a_profile_that_is_cut_is_what_a_parser_reads(file: str) -> None:
    """Every profile has the form that needs no parser, but for the index, which has its own."""
    with open(profile_path("gpus", file), "rb") as profile:
        content = profile.read()
    if file == "index.toml":
        assert read_index() == parse_toml(content)
    else:
        assert cut_profile(content.decode()) == parse_toml(content)


@pytest.mark.parametrize(
    "text",
    [
        "a = 1 # b",
        "a=1",
        "a = true",
        "a = 0x1",
        "a = -1",
        "a = 1_000\na = 2",
        "[a]\n[a]",
        "[a.b]",
        "[[a]]",
        " a = 1",
        "a = '1'",
        'a = "1',
        'a = "1" "2"',
        "a = { b = 1 }",
        'a = """b"""',
        'a = """\nb\\tc"""',
        'a = """\nb',
        'a = { value = 1, source = "b", c = 2 }',
        'a = [\n"b"\n]',
        'a = [\n"b",',
        "a",
    ],
)
def test_what_is_written_otherwise_is_parsed(text: str) -> None:
    with pytest.raises(ValueError):  # json's, float's or our own: a parser has to look
        cut_profile(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('[tool.memplan]\nmodel = "gpt2"', "gpt2"),
        ('[ tool . "memplan" ]\nmodel = "gpt2"', "gpt2"),
        ('tool.memplan.model = "gpt2"', "gpt2"),
        ('[tool]\nmemplan.model = "gpt2"', "gpt2"),
        ('[tool]\n"memplan" = { model = "gpt2" }', "gpt2"),
        ('tool = { memplan = { model = "gpt2" } }', "gpt2"),
        ('[project.scripts]\nmemplan = "memplan.cli.main:main" # a model', "Qwen/Qwen2.5-1.5B"),
    ],
)
def test_the_model_of_a_project_however_it_is_spelt(tmp_path, text: str, name: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    assert find_default_model()[0] == name
