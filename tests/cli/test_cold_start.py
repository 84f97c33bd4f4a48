"""What a cold start imports: planning needs none of the heavy libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "pandas", "matplotlib", "numpy", "rich", "jinja2", "tomli"}
UNNEEDED = {"pathlib", "urllib.request", "http.client", "tempfile", "subprocess", "difflib", "csv", "asyncio", "email"}

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


def test_a_command_imports_only_itself() -> None:
    loaded = modules_of("gpus --quiet")
    assert "memplan.cli.gpus" in loaded
    assert not {"memplan.cli.suggest", "memplan.api", "memplan.planner.search", "memplan.estimation.estimate"} & loaded
