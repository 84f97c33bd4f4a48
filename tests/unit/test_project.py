"""The promises of the repository itself: what the README says is what is run, pinned and shipped."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import memplan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
RUN_COMMAND = (
    "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt . "
    "&& .venv/bin/memplan suggest --gpu 24GB --target-batch 32"
)
TEST_COMMAND = (
    "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[dev]' && .venv/bin/python -m pytest"
)


def read(path: str) -> str:
    return (REPOSITORY / path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads(read("pyproject.toml"))["project"]


@pytest.mark.parametrize(("name", "command"), [("run-command", RUN_COMMAND), ("test-command", TEST_COMMAND)])
def test_readme_holds_the_command_that_ci_runs(name: str, command: str) -> None:
    """The README has each command once, in a marked block, and .ci/run takes it from there."""
    blocks = re.findall(rf"^<!-- {name} -->\n```sh\n(.*?)\n```$", read("README.md"), flags=re.MULTILINE | re.DOTALL)
    assert blocks == [command]
    assert f"readme_command {name}" in read(".ci/run")


def test_both_commands_are_on_the_first_screen() -> None:
    first_screen = read("README.md").splitlines()[:60]
    assert RUN_COMMAND in first_screen
    assert TEST_COMMAND in first_screen


def test_the_facade_has_the_version_of_the_package(project: dict) -> None:
    version = getattr(memplan, "__version__", None)
    if version is None:
        pytest.skip("the facade states no version")
    assert version == project["version"]


def test_planning_needs_no_torch(project: dict) -> None:
    """PyTorch and Hugging Face are extras: they never come with the package itself."""
    names = {re.split(r"[<>=;\s\[]", requirement, maxsplit=1)[0] for requirement in project["dependencies"]}
    assert names == {"click", "jinja2", "matplotlib", "numpy", "pandas", "rich", "tomli"}
    assert {"torch", "hf", "dev"} <= project["optional-dependencies"].keys()


def test_constraints_pin_every_requirement(project: dict) -> None:
    """Every requirement of the project has an exact pin; torch is 2.13.0 on every interpreter."""
    pins = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r'[a-z0-9-]+==[0-9.]+(; python_version (<|>=) "3\.11")?', pin) for pin in pins)
    assert [pin for pin in pins if pin.startswith("torch==")] == ["torch==2.13.0"]
    requirements = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    required = {re.split(r"[<>=;\s]", requirement, maxsplit=1)[0] for requirement in requirements}
    assert required <= {pin.partition("==")[0] for pin in pins}


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(memplan.__file__).parent / "py.typed").is_file()
