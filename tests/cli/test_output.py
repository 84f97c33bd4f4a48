"""Where the answer goes: files whole or not at all, pipes, encodings, colours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memplan.cli import output
from memplan.cli.output import encodable
from memplan.errors import MemplanError

REPOSITORY = Path(__file__).resolve().parents[2]
FITS = "suggest gpt2 --gpu 24GB --target-batch 32"


def program(command: str, **environment: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "memplan", *command.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )


def test_a_file_holds_the_answer_and_stdout_nothing(run, tmp_path) -> None:
    ran = run(f"{FITS} --json --output plan.json")
    assert (ran.status, ran.out) == (0, "")
    assert ran.err == "memplan: written to plan.json\n"
    assert json.loads((tmp_path / "plan.json").read_text())["kind"] == "plan"
    assert run(f"{FITS} --json -o plan.json -q").err == ""
    assert run(f"{FITS} --json -o -").out == (tmp_path / "plan.json").read_text()


def test_a_verdict_is_the_exit_status_of_a_file_too(run) -> None:
    assert run("suggest llama-3-8b --gpu 24GB --target-batch 32 -o plan.txt").status == 3


def test_a_failed_write_leaves_the_old_file_and_nothing_else(run, tmp_path, monkeypatch) -> None:
    """GIVEN a disk that is full, THEN the file that was there stays as it was."""
    (tmp_path / "plan.txt").write_text("old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "replace", full)
    ran = run(f"{FITS} -o plan.txt")
    assert ran.status == 1
    assert ran.err.splitlines() == [
        "memplan: plan.txt could not be written: No space left on device.",
        "Give --output a file in a folder that exists and is writable.",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.txt"]
    assert (tmp_path / "plan.txt").read_text() == "old"


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(output.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        output.write_file(str(tmp_path / "plan.txt"), "text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["", "missing/plan.txt", "a\0b"])
def test_what_is_no_file(tmp_path, path: str) -> None:
    """A folder, a file in a folder that is not there, a name that no file can have."""
    with pytest.raises(MemplanError, match="could not be written"):
        output.write_file(os.path.join(tmp_path, path), "text")
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_written_to_and_not_replaced(run) -> None:
    assert run(f"{FITS} -o {os.devnull}").status == 0
    assert not os.path.isfile(os.devnull)


def test_a_link_stays_a_link(tmp_path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    output.write_file(str(tmp_path / "link.txt"), "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_reader_that_goes_is_no_fault() -> None:
    """`memplan ... | head -1`: quiet, and the verdict is the exit status."""
    with program(f"{FITS} --json") as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_behind_stdout() -> None:
    with open("/dev/full", "wb") as full:
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "memplan", *FITS.split()]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=env, check=False)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [
        "memplan: The answer could not be written to stdout: No space left on device.",
        "Write it elsewhere, with --output FILE.",
    ]


def test_a_terminal_without_blocks_gets_ascii() -> None:
    """In ASCII as in UTF-8: the same columns, the same lines."""
    ascii_out, ascii_err = program(FITS, PYTHONIOENCODING="ascii").communicate()
    utf8_out, _ = program(FITS, PYTHONIOENCODING="utf-8").communicate()
    assert ascii_err == b""
    assert ascii_out.isascii()
    assert "█" in utf8_out.decode()
    assert [len(line) for line in ascii_out.decode().splitlines()] == [
        len(line) for line in utf8_out.decode().splitlines()
    ]


def test_what_an_encoding_has_not_is_escaped() -> None:
    assert encodable("█░ é", "utf-8") == "█░ é"
    assert encodable("█░ é", "latin-1") == "#. é"
    assert encodable("█░ é", "ascii") == "#. \\xe9"
    assert encodable("\udc80", "utf-8") == "\\udc80"


def test_colours(run, monkeypatch) -> None:
    """On a pipe there are none; FORCE_COLOR asks for them, NO_COLOR forbids them, a file never has them."""
    plain = run(FITS).out
    assert "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1;32mThe plan\x1b[0m" in run(FITS).out
    assert "\x1b" not in run(f"{FITS} --json").out
    run(f"{FITS} -o plan.txt")
    assert "\x1b" not in Path("plan.txt").read_text(encoding="utf-8")
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(FITS).out == plain
