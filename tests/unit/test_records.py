"""Records on disk: what is written is read, what cannot be read is passed over, nothing that was kept is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.catalog.measurements import LONGEST_LINE, append_measurement, file_of, read_measurements
from memplan.errors import MemplanError
from memplan.specs.adapter import Lora
from memplan.specs.measurement import OUTCOMES, Card, Measurement, PhaseBytes, StepRecord, Trial, identity
from memplan.specs.records import measurement_record, parse_measurement
from memplan.specs.training import ATTENTIONS, IN_BACKWARD, OPTIMIZERS, PRECISIONS, Setup
from memplan.specs.values import replace

CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "rope_parameters": {"factor": 8.0}}
CARD = Card(device="cuda", name="NVIDIA H200", total_bytes=150_000_000_000, compute_capability="9.0", driver="575.1")
PHASE = PhaseBytes("forward", 1024, 2048, 2**21, 2**22, None)
TRIAL = Trial(model="tiny", config=CONFIG, setup=Setup(lora=Lora(rank=8)), limit_bytes=8 * 10**9, limit="8GB")


def measurement(message: str = "", **changes) -> Measurement:
    """A good record that is told from others by its message."""
    given = {
        "trial": TRIAL,
        "outcome": "done",
        "measured_at": "2026-11-22T10:00:00Z",
        "card": CARD,
        "versions": {"torch": "2.13.0"},
        "parameter_bytes": 1024,
        "steps": (StepRecord(0, (PHASE,), 0, 0), StepRecord(1, (PHASE,), 0, 0)),
        "step_times_s": (0.25, 0.5),
        "wall_s": 1.5,
    }
    return Measurement(**{**given, "message": message, **changes})


# ------------------------------------------------------------------------------------------------- record, JSON, record

names = st.text(min_size=1, max_size=12)
counts = st.integers(0, 2**60)
perhaps = st.none() | counts
seconds = st.floats(1e-9, 1e9)
probabilities = st.floats(0, 1, exclude_max=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
adapters = st.builds(
    Lora,
    rank=st.integers(1, 2**16),
    targets=st.lists(names.filter(str.strip), min_size=1, max_size=3).map(tuple),
    dropout=probabilities,
)
setups = st.builds(
    Setup,
    micro_batch_size=st.integers(1, 10**9),
    gradient_accumulation_steps=st.integers(1, 64),
    data_parallel_size=st.integers(1, 8),
    seq_len=st.integers(1, 10**6),
    precision=st.sampled_from(sorted(PRECISIONS)),
    optimizer=st.sampled_from(sorted(set(OPTIMIZERS) - set(IN_BACKWARD))),
    activation_checkpointing=st.sampled_from(["none", "selective", "full", "every-2", "every-13"]),
    attention=st.sampled_from(ATTENTIONS),
    dropout=st.none() | probabilities,
    padding=st.booleans(),
    lora=st.none() | adapters,
) | st.builds(
    Setup,
    batching=st.just("packed"),
    packed_sequences=st.none() | st.integers(2, 10**9),
)
trials = st.builds(
    Trial,
    model=names,
    config=st.dictionaries(st.text(max_size=8), json_values, max_size=3),
    setup=setups,
    limit_bytes=st.none() | st.integers(1, 2**60),
    limit=st.text(max_size=8),
    target_batch=st.none() | st.integers(1, 10**6),
    role=st.sampled_from(["", "plan", "larger"]),
)
cuda_cards = st.builds(
    Card,
    device=st.just("cuda"),
    name=names,
    total_bytes=st.integers(1, 2**60),
    compute_capability=st.sampled_from(["", "8.0", "9.0"]),
    driver=st.sampled_from(["", "575.57.08"]),
    clocks=st.dictionaries(st.sampled_from(["sm", "memory", "sm_loaded"]), st.integers(0, 5000)),
    num_other_processes=perhaps,
    other_bytes=perhaps,
)
cpu_cards = st.builds(Card, device=st.just("cpu"), name=st.just("CPU"), total_bytes=st.integers(1, 2**60))


def steps(read):
    """Steps whose reserved and process bytes are `read`; none where the trial died before the first."""
    phases = st.builds(
        PhaseBytes,
        name=st.sampled_from(["forward", "backward", "clip", "optimizer", "zero_grad"]),
        allocated_bytes=counts,
        peak_allocated_bytes=counts,
        reserved_bytes=read,
        peak_reserved_bytes=read,
        process_bytes=read,
    )
    step = st.builds(
        StepRecord,
        number=st.integers(0, 9),
        phases=st.lists(phases, max_size=3).map(tuple),
        num_alloc_retries=st.integers(0, 99),
        num_ooms=st.integers(0, 99),
    )
    return st.lists(step, max_size=3).map(tuple)


def measurements(cards, read):
    return st.builds(
        Measurement,
        trial=trials,
        outcome=st.sampled_from(OUTCOMES),
        message=st.text(max_size=20),
        phase=st.sampled_from(["", "building the model", "forward of step 0, micro-step 1"]),
        rank=st.integers(0, 7),
        measured_at=st.just("2026-11-22T10:00:00Z"),
        card=cards,
        versions=st.dictionaries(names, names, max_size=3),
        num_parameters=perhaps,
        num_trainable_parameters=perhaps,
        parameter_bytes=perhaps,
        gradient_bytes=perhaps,
        optimizer_state_bytes=perhaps,
        kept_activation_bytes=perhaps,
        context_bytes=read,
        workspace_bytes=read,
        process_basis=st.sampled_from(["", "nvml", "device"]),
        steps=steps(read),
        step_times_s=st.lists(seconds, max_size=7).map(tuple),
        wall_s=st.none() | seconds,
    )


plausible = measurements(cuda_cards, perhaps) | measurements(cpu_cards, st.none())


@given(plausible)
def test_a_record_becomes_json_and_the_same_record_again(written):
    """Down to the type of every number, so that whoever reads it computes what its writer would."""
    text = json.dumps(measurement_record(written), allow_nan=False)
    read = parse_measurement(json.loads(text))
    assert read == written
    assert repr(read) == repr(written)
    assert (identity(read), read.id) == (identity(written), written.id)


@given(st.lists(plausible, max_size=4))
def test_a_file_holds_what_was_appended_in_its_order(tmp_path_factory, written):
    path = str(tmp_path_factory.mktemp("records") / "new" / "card.jsonl")
    for one in written:
        append_measurement(path, one)
    assert read_measurements(path) == (tuple(written), ())


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_outcome_can_be_kept(tmp_path, outcome):
    path = str(tmp_path / "card.jsonl")
    append_measurement(path, measurement(outcome=outcome))
    assert [one.outcome for one in read_measurements(path).measurements] == [outcome]


def test_what_a_later_minor_version_adds_is_left_alone():
    record = measurement_record(measurement())
    record |= {"mood": "sunny"}
    record["card"]["colour"] = "black"
    record["steps"][0]["phases"][0]["watts"] = 300
    record["trial"]["setup"]["fsdp"] = "off"
    assert parse_measurement(record) == measurement()


def test_files_of_a_folder_are_read_by_name_and_others_left_alone(tmp_path):
    for name, message in (("b.jsonl", "second"), ("a.jsonl", "first"), ("notes.txt", "never")):
        append_measurement(str(tmp_path / name), measurement(message))
    assert [one.message for one in read_measurements(str(tmp_path)).measurements] == ["first", "second"]
    assert read_measurements(str(tmp_path / "nowhere")) == ((), ())


@pytest.mark.parametrize(
    ("card", "file"),
    [("NVIDIA H200", "nvidia-h200.jsonl"), ("GeForce  RTX 4060 Ti/../x", "geforce-rtx-4060-ti-x.jsonl")],
)
def test_a_card_has_a_file_of_its_own(card, file):
    assert file_of(card) == file


# ------------------------------------------------------------------------------------------------------- foreign lines

GOOD = measurement_record(measurement())


def changed(path: str, value: object) -> bytes:
    """The good record with another value at a dotted path."""
    record = json.loads(json.dumps(GOOD))
    at = record
    *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in keys:
        at = at[key]
    at[last] = value
    return json.dumps(record).encode()


def without(path: str) -> bytes:
    """The good record without a key."""
    record = json.loads(json.dumps(GOOD))
    at = record
    *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in keys:
        at = at[key]
    del at[last]
    return json.dumps(record).encode()


def read_between(tmp_path, line: bytes):
    """What a file holds in which a line stands between two good ones."""
    path = tmp_path / "card.jsonl"
    append_measurement(str(path), measurement("before"))
    with path.open("ab") as file:
        file.write(line + b"\n")
    append_measurement(str(path), measurement("after"))
    return path, read_measurements(str(path))


def assert_passed_over(tmp_path, line: bytes):
    path, found = read_between(tmp_path, line)
    assert [one.message for one in found.measurements] == ["before", "after"]
    assert [(bad.path, bad.number) for bad in found.bad_lines] == [(str(path), 2)]
    assert found.bad_lines[0].reason
    assert "\n" not in found.bad_lines[0].reason


NO_RECORDS = {
    "not JSON": b"hello",
    "cut off": json.dumps(GOOD).encode()[:300],
    "two at once": json.dumps(GOOD).encode() * 2,
    "a list": b"[1, 2]",
    "a number": b"12",
    "null": b"null",
    "a text": b'"measurement"',
    "an empty object": b"{}",
    "another kind": changed("kind", "plan"),
    "no kind": without("kind"),
    "a later schema": changed("schema_version", 2),
    "a schema in words": changed("schema_version", "1"),
    "no schema": without("schema_version"),
    "binary garbage": bytes(n for n in range(256) if n != 10),
    "zeros": bytes(4096),
    "nested too deep": b"[" * 100_000,
    "a config nested too deep": changed("trial.config", {"a": "@"}).replace(b'"@"', b"[" * 50_000 + b"]" * 50_000),
    "huge": b'{"kind": "' + b"x" * (LONGEST_LINE + 1) + b'"}',
    "a huge number": changed("rank", 0).replace(b'"rank": 0', b'"rank": ' + b"9" * 6000),
}


@pytest.mark.parametrize("name", NO_RECORDS)
def test_a_line_that_is_no_record_is_reported_and_passed_over(tmp_path, name):
    assert_passed_over(tmp_path, NO_RECORDS[name])


@pytest.mark.parametrize(
    "path",
    [
        *("outcome", "measured_at", "trial", "card", "versions", "steps", "step_times_s"),
        *("trial.model", "trial.config", "trial.setup", "card.device", "card.name", "card.total_bytes"),
        *("steps.0.number", "steps.0.phases", "steps.0.num_ooms", "steps.0.num_alloc_retries"),
        *("steps.0.phases.0.name", "steps.0.phases.0.allocated_bytes", "steps.0.phases.0.process_bytes"),
        *("trial.setup.lora.rank", "trial.setup.lora.targets"),
    ],
)
def test_a_record_without_a_key_that_is_needed_is_foreign(tmp_path, path):
    assert_passed_over(tmp_path, without(path))


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        # bytes
        *[("parameter_bytes", value) for value in (-1, 1.5, "12", True, NAN, INFINITY, [], {})],
        *[("context_bytes", value) for value in (-1, "12")],
        *[("steps.0.phases.0.peak_allocated_bytes", value) for value in (-1, 0.5, "12", False, NAN)],
        *[("steps.0.phases.0.reserved_bytes", value) for value in (-1, "12")],
        *[("steps.0.number", value) for value in (-1, "0", None, True)],
        *[("trial.limit_bytes", value) for value in (-1, 0, "8GB", [8])],
        # texts, lists, objects
        ("outcome", "fine"),
        ("outcome", None),
        ("measured_at", ""),
        ("measured_at", 2026),
        ("versions", ["torch"]),
        ("versions", {"torch": 2}),
        ("steps", 3),
        ("steps", [3]),
        ("steps.0.phases", ["forward"]),
        ("card", "NVIDIA H200"),
        ("card", None),
        ("trial", []),
        ("trial", "tiny"),
        ("trial.model", 5),
        ("trial.config", None),
        ("trial.config", "llama"),
        ("trial.setup", []),
        # a setup that the package itself would refuse
        ("trial.setup.seq_len", 0),
        ("trial.setup.micro_batch_size", "4"),
        ("trial.setup.precision", "fp7"),
        ("trial.setup.attention", ["sdpa"]),
        ("trial.setup.activation_checkpointing", []),
        ("trial.setup.dropout", NAN),
        ("trial.setup.lora", 8),
        ("trial.setup.lora.rank", 0),
        ("trial.setup.lora.targets", 5),
        # seconds
        *[("step_times_s", [0.5, value]) for value in (0, -0.5, NAN, INFINITY, "soon", None)],
    ],
)
def test_a_record_with_a_wrong_value_is_foreign(tmp_path, path, value):
    assert_passed_over(tmp_path, changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        # Once: nothing looks at these fields; whoever computes with them later ends in a traceback or in nonsense.
        *[("num_parameters", value) for value in (-1, "12", 1.5, True)],
        *[("rank", value) for value in (-1, "0", None)],
        *[("wall_s", value) for value in (NAN, "soon", -1)],
        *[("card.total_bytes", value) for value in (-1, "141GB", None, NAN)],
        ("card.device", 5),
        ("card.name", None),
        ("card.clocks", [1]),
        ("card.compute_capability", 9.0),
        ("card.num_other_processes", "two"),
        ("message", 5),
        ("phase", []),
        ("process_basis", {}),
        ("trial.limit", 24),
        ("trial.limit_bytes", NAN),
        ("trial.limit_bytes", 1.5),
        ("trial.target_batch", "32"),
        ("trial.role", 5),
        ("trial.config", []),
        ("trial.setup.padding", "yes"),
        ("trial.setup.lora.targets", "q_proj"),
        ("steps.0.phases.0.name", 5),
        ("steps.0.phases.0.peak_allocated_bytes", None),
        ("schema_version", True),
        ("schema_version", -3),
    ],
)
def test_a_record_with_a_field_of_the_wrong_type_is_foreign(tmp_path, path, value):
    assert_passed_over(tmp_path, changed(path, value))


def test_a_time_beyond_all_floats_is_foreign(tmp_path):
    """Once: float() of such a number is an OverflowError, which is no ValueError; no line of the folder is read."""
    assert_passed_over(tmp_path, changed("step_times_s", [10**400]))


def test_empty_lines_are_nothing_and_lines_are_counted_with_them(tmp_path):
    path = tmp_path / "card.jsonl"
    path.write_bytes(b"\n  \r\nhello\n\n" + json.dumps(GOOD).encode())
    found = read_measurements(str(path))
    assert found.measurements == (measurement(),)
    assert [bad.number for bad in found.bad_lines] == [3]


def test_what_cannot_be_read_at_all_is_a_fault(tmp_path, monkeypatch):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(MemplanError, match=r"folder\.jsonl is no regular file") as fault:
        read_measurements(str(tmp_path))
    assert fault.value.cure
    # Once: the folder is listed outside of the `try`, so that this is a PermissionError with a traceback.
    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(MemplanError, match="cannot be read"):
        read_measurements(str(tmp_path))


def denied(*_, **__):
    raise PermissionError(13, "Permission denied")


# ----------------------------------------------------------------------------------------------------------- appending


def test_a_line_that_was_cut_off_is_ended_first(tmp_path):
    """A process died within a write; its half line is lost, and nothing else."""
    path = tmp_path / "card.jsonl"
    append_measurement(str(path), measurement("before"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:200])
    append_measurement(str(path), measurement("after"))
    found = read_measurements(str(path))
    assert [one.message for one in found.measurements] == ["before", "after"]
    assert [bad.number for bad in found.bad_lines] == [2]
    assert path.read_bytes().count(b"\n") == 3


def test_what_is_appended_is_one_line_even_if_texts_have_several(tmp_path):
    path = tmp_path / "card.jsonl"
    written = measurement("a\nb\r\u2028c\x00é")
    append_measurement(str(path), written)
    assert path.read_bytes().count(b"\n") == 1
    assert read_measurements(str(path)).measurements == (written,)


def test_what_is_appended_can_be_read(tmp_path):
    """Or it is refused.

    Once: a config.json may have 4 MiB (`MAX_CONFIG_BYTES`), a line that is read 1 MiB; larger ones are written all the
    same, reported as foreign ever after, and measured anew every time.
    """
    path = str(tmp_path / "card.jsonl")
    labels = {"id2label": {str(n): "x" * 100 for n in range(11_000)}}
    written = measurement(trial=replace(TRIAL, config={**CONFIG, **labels}))
    try:
        append_measurement(path, written)
    except MemplanError:
        return
    assert read_measurements(path).measurements == (written,)


def test_a_number_that_json_does_not_have_is_a_fault(tmp_path):
    """Once: json.dumps raises a ValueError outside of the `try`."""
    path = tmp_path / "card.jsonl"
    with pytest.raises(MemplanError):
        append_measurement(str(path), measurement(wall_s=NAN))
    assert not path.exists()


APPENDER = """
import sys
from memplan.catalog.measurements import append_measurement
from memplan.specs.measurement import Card, Measurement, Trial
from memplan.specs.training import Setup

path, name = sys.argv[1:]
card = Card(device="cpu", name="CPU", total_bytes=1)
trial = Trial(model="tiny", config={"filler": name * 30_000}, setup=Setup())
sys.stdin.readline()
for n in range(25):
    when = "2026-11-22T10:00:00Z"
    found = Measurement(trial=trial, outcome="done", message=f"{name}{n}", measured_at=when, card=card)
    append_measurement(path, found)
"""


def test_processes_that_append_at_the_same_time_lose_and_mix_no_line(tmp_path):
    """Four of them, 25 lines of 30 kB each: more than one page and one pipe take at once."""
    path = tmp_path / "cpu.jsonl"
    path.write_bytes(b'{"cut')
    writers = [
        subprocess.Popen([sys.executable, "-c", APPENDER, str(path), name], stdin=subprocess.PIPE) for name in "abcd"
    ]
    for writer in writers:
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
    assert [writer.returncode for writer in writers] == [0, 0, 0, 0]
    found = read_measurements(str(path))
    assert [bad.number for bad in found.bad_lines] == [1]
    messages = [one.message for one in found.measurements]
    for name in "abcd":
        assert [message for message in messages if message[0] == name] == [f"{name}{n}" for n in range(25)]


def full(descriptor: int, content: bytes) -> int:
    raise OSError(28, "No space left on device")


def half(descriptor: int, content: bytes) -> int:
    return WRITE(descriptor, content[: len(content) // 2])


def half_then_full(descriptor: int, content: bytes) -> int:
    half(descriptor, content)
    raise OSError(28, "No space left on device")


WRITE = os.write


@pytest.mark.parametrize("write", [full, half, half_then_full])
@pytest.mark.parametrize("rest", [b"", b'{"cut off'])
def test_a_full_disk_is_a_fault_and_leaves_the_file_as_it_was(tmp_path, monkeypatch, write, rest):
    path = tmp_path / "card.jsonl"
    append_measurement(str(path), measurement("before"))
    with path.open("ab") as file:
        file.write(rest)
    before = path.read_bytes()
    monkeypatch.setattr(os, "write", write)
    with pytest.raises(MemplanError, match="No space left on device") as fault:
        append_measurement(str(path), measurement("lost"))
    assert str(path) in fault.value.cause
    assert "--records" in fault.value.cure
    assert path.read_bytes() == before
    monkeypatch.undo()
    append_measurement(str(path), measurement("after"))
    assert [one.message for one in read_measurements(str(path)).measurements] == ["before", "after"]


def test_a_disk_that_fails_to_keep_what_was_written_is_a_fault(tmp_path, monkeypatch):
    path = tmp_path / "card.jsonl"
    append_measurement(str(path), measurement("before"))
    before = path.read_bytes()

    def fsync(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(MemplanError, match="Input/output error"):
        append_measurement(str(path), measurement("lost"))
    assert path.read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_the_device_that_is_always_full_is_a_fault():
    with pytest.raises(MemplanError, match="No space left on device"):
        append_measurement("/dev/full", measurement())


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path, monkeypatch):
    """A file stands where a folder should; the folder cannot be made; the file cannot be opened."""
    (tmp_path / "file").write_text("")
    with pytest.raises(MemplanError, match="could not be written"):
        append_measurement(str(tmp_path / "file" / "card.jsonl"), measurement())
    monkeypatch.setattr(os, "makedirs", denied)
    with pytest.raises(MemplanError, match="Permission denied"):
        append_measurement(str(tmp_path / "folder" / "card.jsonl"), measurement())
    monkeypatch.undo()
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(MemplanError, match="Permission denied"):
        append_measurement(str(tmp_path / "card.jsonl"), measurement())
    assert os.listdir(tmp_path) == ["file"]


def test_what_memplan_comes_with_and_what_the_user_has_measured_are_read(tmp_path, monkeypatch):
    from memplan.catalog import measurements as disk

    shipped, own = tmp_path / "shipped" / "measurements", tmp_path / "own" / "measurements"
    for folder in (shipped, own):
        append_measurement(str(folder / "cpu.jsonl"), measurement())
    monkeypatch.setattr(disk, "profile_path", lambda *parts: str(tmp_path.joinpath("shipped", *parts)))
    monkeypatch.setattr(disk, "PACKAGE_FOLDER", str(tmp_path / "installed" / "memplan"))
    found = disk.read_all_measurements({"MEMPLAN_DATA_DIR": str(tmp_path / "own")})
    assert found.measurements == (measurement(), measurement())
