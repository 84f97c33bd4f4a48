"""Memory snapshots: read safely, translated, compared, and written.

The snapshots are built by hand after the structure that torch.cuda.memory._snapshot documents (PyTorch 2.13): without
a CUDA device there is no recorded one.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
from typing import TYPE_CHECKING, Any

import pytest

from memplan.allocator.replay import replay
from memplan.allocator.settings import AllocatorSettings
from memplan.catalog.pickles import load_plain
from memplan.catalog.snapshots import Frame, compare_reserved, read_snapshot, write_snapshot
from memplan.errors import ConfigError, MemplanError, UsageError
from memplan.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

BASE = 0x7F12_3400_0000
FRAMES = [{"filename": "train.py", "line": 12, "name": "forward"}]


def entry(action: str, address: int, size: int, **more: Any) -> dict[str, Any]:
    """One entry of a device's trace."""
    return {
        "action": action,
        "addr": address,
        "size": size,
        "stream": 0,
        "time_us": 1_700_000_000_000_000,
        "compile_context": "N/A",
        "user_metadata": "",
        "pool_id": (0, 0),
        "frames": FRAMES,
        **more,
    }


def segment(address: int, blocks: list[tuple[int, int, str]], **more: Any) -> dict[str, Any]:
    """A segment with (bytes, requested bytes, state) of its blocks."""
    total = sum(size for size, _, _ in blocks)
    return {
        "device": 0,
        "address": address,
        "total_size": total,
        "allocated_size": sum(size for size, _, state in blocks if state == "active_allocated"),
        "active_size": sum(size for size, _, state in blocks if state != "inactive"),
        "requested_size": sum(asked for _, asked, state in blocks if state != "inactive"),
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": FRAMES,
        "blocks": [{"size": s, "requested_size": r, "state": t, "frames": FRAMES} for s, r, t in blocks],
        **more,
    }


def snapshot() -> dict[str, Any]:
    """Two tensors from before the recording (one freed in it), one of 30 MiB that comes and goes, one that stays.

    Reserved: 2 x 20 MiB before, 30 MiB more, which are given back: 70 at the highest, 40 at the end.
    """
    first, second, third = BASE, BASE + 20 * MIB, BASE + 40 * MIB
    return {
        "segments": [
            segment(first, [(20 * MIB, 20 * MIB, "active_allocated")]),
            segment(second, [(4 * MIB, 4 * MIB - 100, "active_allocated"), (16 * MIB, 0, "inactive")]),
        ],
        "device_traces": [
            [
                entry("segment_alloc", third, 30 * MIB),
                entry("alloc", third, 30 * MIB),
                entry("free_requested", second, 20 * MIB),
                entry("free_completed", second, 20 * MIB),
                entry("free_requested", third, 30 * MIB),
                entry("snapshot", 0, 0),
                entry("free_completed", third, 30 * MIB),
                entry("segment_free", third, 30 * MIB),
                {"action": "oom", "device_free": 5, "size": 99, "stream": 0, "frames": []},
                entry("alloc", second, 4 * MIB - 100),
            ],
            [],
        ],
        "external_annotations": [],
        "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False", "max_split_size": -1},
    }


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_snapshot_is_read(tmp_path: Path, protocol: int) -> None:
    (device,) = read_snapshot(write(tmp_path / "s.pickle", snapshot(), protocol))
    assert (device.device, device.num_segments, device.num_ooms, device.num_prior_tensors) == (0, 2, 1, 2)
    assert (device.reserved_bytes, device.peak_reserved_bytes) == (40 * MIB, 70 * MIB)
    assert (device.allocated_bytes, device.active_bytes) == (24 * MIB, 24 * MIB)
    assert device.requested_bytes == 24 * MIB - 100
    assert device.settings == AllocatorSettings()
    third, second = (BASE + 40 * MIB, 1), (BASE + 20 * MIB, -1)
    assert [(event.key, event.num_bytes, event.sign) for event in device.events] == [
        ((BASE, -1), 20 * MIB, 1),
        (second, 20 * MIB, 1),
        (third, 30 * MIB, 1),
        (second, 20 * MIB, -1),
        (third, 30 * MIB, 0),
        (third, 30 * MIB, -1),
        ((BASE + 20 * MIB, 9), 4 * MIB - 100, 1),
    ]


def test_recorded_and_simulated_reserved_bytes(tmp_path: Path) -> None:
    (device,) = read_snapshot(write(tmp_path / "s.pickle", snapshot()))
    assert compare_reserved(device) == (70 * MIB, 70 * MIB)
    assert compare_reserved(device).relative_error == 0.0
    assert compare_reserved(device, AllocatorSettings(expandable_segments=True)).simulated_bytes == 80 * MIB
    assert replay(device.events).end.active == 24 * MIB


def test_segments_alone_are_a_snapshot_too(tmp_path: Path) -> None:
    """torch.cuda.memory_snapshot() is the list of segments; those of another device count as its own."""
    segments = snapshot()["segments"]
    segments[1]["device"] = 3
    devices = read_snapshot(write(tmp_path / "s.pickle", segments))
    assert [(device.device, device.reserved_bytes) for device in devices] == [(0, 20 * MIB), (3, 20 * MIB)]


def test_private_pools_are_counted(tmp_path: Path) -> None:
    content = snapshot()
    content["device_traces"][0][1]["pool_id"] = (0, 1)
    (device,) = read_snapshot(write(tmp_path / "s.pickle", content))
    assert device.num_private_pool_events == 1


# ----------------------------------------------------------------------------------------------------------- bad files


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    content = snapshot() | {"extra": Evil(tmp_path / "owned")}
    path = write(tmp_path / "s.pickle", content, protocol)
    with pytest.raises(ConfigError) as fault:
        read_snapshot(path)
    assert fault.value.cure
    assert not (tmp_path / "owned").exists()
    pickle.loads(path.read_bytes())  # it is malicious indeed
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'echo owned'\ntR.",  # GLOBAL, REDUCE
        b"\x8c\x02os\x8c\x06system\x93\x8c\x04echo\x85R.",  # STACK_GLOBAL
        b"(S'echo owned'\nios\nsystem\n.",  # INST
        b"}(\x8c\x01acos\nsystem\nu.",
        b"P0\n.",  # PERSID
        b"K\x00Q.",  # BINPERSID
        b"\x82\x01.",  # EXT1
        b"}}b.",  # BUILD
        b"\x8f.",  # a set
        b"\x97.",  # NEXT_BUFFER
        b")" + b"\x85" * 100_000 + b".",  # tuples in tuples: their hash would overflow the stack
        b"(" * 1000 + b".",  # containers in containers
        b"Nr\xff\xff\xff\xff.",  # a memo of 32 GiB
        b"\xff.",  # no instruction
    ],
)
def test_instructions_beyond_plain_values_are_refused(program: bytes) -> None:
    with pytest.raises(ConfigError):
        load_plain(b"\x80\x04" + program, source="s.pickle", cure="Write it again.")


def test_the_second_lock_holds_alone() -> None:
    """The unpickler knows no name, should an instruction ever slip through."""
    import io

    from memplan.catalog.pickles import _PlainUnpickler

    for data in (pickle.dumps(os.mkdir), b"\x80\x04K\x00Q."):
        with pytest.raises(pickle.UnpicklingError):
            _PlainUnpickler(io.BytesIO(data)).load()


def test_every_truncation_is_a_fault(tmp_path: Path) -> None:
    data = pickle.dumps(snapshot(), protocol=4)
    path = tmp_path / "s.pickle"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ConfigError):
            read_snapshot(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 a zip file",
        b"{'segments': []}",
        b"\x80\x04.",  # nothing to return
        b"\x80\x04u.",  # a mark that is not there
        b"\x80\x04h\x05.",  # a memo that is empty
        b"\x80\x04]K\x01K\x02s.",  # a pair into a list
        b"\x80\x04}(]K\x01u.",  # a key that has no hash
        b"\x80\x04\x8c\x02\xff\xfe.",  # no UTF-8
        b"\x80\x04X" + struct.pack("<I", 2**32 - 1) + b"short",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"short",
        b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"N.",
    ],
)
def test_damaged_files_are_faults(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "s.pickle"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as fault:
        read_snapshot(path)
    assert "s.pickle" in str(fault.value)
    assert fault.value.cure


@pytest.mark.parametrize(
    "content",
    [
        None,
        7,
        {},
        {"segments": 3},
        {"segments": [3]},
        {"segments": [{}]},
        {"segments": [{"address": -1, "total_size": 5}]},
        {"segments": [{"address": 2**70, "total_size": 5}]},
        {"segments": [{"address": True, "total_size": 5}]},
        {"segments": [{"address": 1, "total_size": 5, "blocks": {}}]},
        {"segments": [{"address": 1, "total_size": 5, "blocks": [{"size": 5, "state": "odd"}]}]},
        {"segments": [{"address": 1, "total_size": 5, "blocks": [{"size": 5, "state": ["inactive"]}]}]},
        {"segments": [], "device_traces": {}},
        {"segments": [], "device_traces": [["alloc"]]},
        {"segments": [], "device_traces": [[{"action": "alloc", "addr": 1}]]},
        {"segments": [], "device_traces": [[{"action": "alloc", "addr": 1.0, "size": 1}]]},
        {"segments": [], "device_traces": [[{"action": "alloc", "addr": 1, "size": 1}] * 2]},
    ],
)
def test_foreign_pickles_are_faults(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ConfigError, match="memory snapshot") as fault:
        read_snapshot(write(tmp_path / "s.pickle", content))
    assert "_dump_snapshot" in fault.value.cure


def test_a_long_memo_is_read() -> None:
    """Protocols 2 and 3 number what they remember, beyond 255 in four bytes."""
    content = [{"a": [n, str(n)], "b": (n, -n)} for n in range(500)]
    for protocol in (2, 3, 4, 5):
        assert load_plain(pickle.dumps(content, protocol), source="s", cure="") == content


def test_shared_references_are_not_multiplied(tmp_path: Path) -> None:
    """Ten to the thirtieth strings as shared lists of lists, in a field that nobody reads."""
    bomb: Any = ["x"] * 10
    for _ in range(29):
        bomb = [bomb] * 10
    (device,) = read_snapshot(write(tmp_path / "s.pickle", snapshot() | {"bomb": bomb}))
    assert device.num_segments == 2


def test_entries_that_are_read_are_not_multiplied_either(tmp_path: Path) -> None:
    """Six thousand times the same segment with six thousand times the same block: some 24 KB."""
    blocks = [{"size": 1, "state": "inactive"}] * 6000
    content = {"segments": [{"device": 0, "total_size": 1, "address": 0, "blocks": blocks}] * 6000}
    with pytest.raises(ConfigError, match="over and over"):
        read_snapshot(write(tmp_path / "s.pickle", content))


def test_a_long_run_of_plain_values_is_read() -> None:
    content = [{"a": i} for i in range(5000)] + [{} for _ in range(50_000)]
    assert load_plain(pickle.dumps(content), source="s", cure="") == content


def test_earlier_tensors_keep_their_stream(tmp_path: Path) -> None:
    """Nobody reuses memory of another stream: one segment each."""
    segments = [
        segment(n << 30, [(512, 512, "active_allocated"), (2 * MIB - 512, 0, "inactive")], stream=n) for n in (0, 7)
    ]
    (device,) = read_snapshot(write(tmp_path / "s.pickle", {"segments": segments, "device_traces": []}))
    assert [event.stream for event in device.events] == [0, 7]
    assert compare_reserved(device) == (4 * MIB, 4 * MIB)


def test_files_that_are_missing_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(MemplanError, match="cannot be read"):
        read_snapshot(tmp_path / "missing.pickle")
    with pytest.raises(MemplanError, match="cannot be read"):
        read_snapshot(tmp_path)
    path = write(tmp_path / "s.pickle", snapshot())
    with pytest.raises(MemplanError, match=r"more than 1,000 bytes.*max_entries"):
        read_snapshot(path, max_bytes=1000)


# ------------------------------------------------------------------------------------------------------------- writing

EVENTS = [
    (("layers.0", "query"), 30 * MIB, 1),
    (("layers.0", "key"), 5 * MIB, 1),
    (("layers.0", "query"), 30 * MIB, 0),
    (("layers.1", "query"), 700, 1, 5),
    (("layers.0", "query"), 30 * MIB, -1),
    (("layers.0", "key"), 5 * MIB, -1),
    (("head", "logits"), 64 * MIB, 1),
]

VIEWER_CODES = set("ehJKM}]\x95\x8aj(\x94\x80u\x8c.\x86a\x89qX)\x88NGt\x85\x87rlds")
"""Instructions that the viewer's own reader of pickles knows (torch/utils/viz/MemoryViz.js, unpickle)."""


def describe(key: Any) -> tuple[Frame, ...]:
    return (Frame(name=key[1], filename=key[0]), Frame(name="step", filename="train"))


@pytest.mark.parametrize("expandable", [False, True])
def test_what_is_written_is_read_again(tmp_path: Path, expandable: bool) -> None:
    settings = AllocatorSettings(expandable_segments=expandable)
    run = replay(EVENTS, settings, capacity_bytes=90 * MIB, record=True)
    path = tmp_path / "out.pickle"
    write_snapshot(path, run, describe=describe, alloc_conf=f"expandable_segments:{expandable}")
    assert os.listdir(tmp_path) == ["out.pickle"]
    (device,) = read_snapshot(path)
    assert device.settings == settings
    assert (device.reserved_bytes, device.peak_reserved_bytes) == (run.end.reserved, run.peak_reserved_bytes)
    assert (device.allocated_bytes, device.requested_bytes) == (run.end.allocated, run.end.requested)
    assert [event[1:] for event in device.events] == [(event[1], event[2], (*event, 0)[3]) for event in EVENTS]
    assert device.num_prior_tensors == 0


def test_frames_name_module_and_tensor(tmp_path: Path) -> None:
    path = tmp_path / "out.pickle"
    write_snapshot(path, replay(EVENTS, record=True), describe=describe)
    content = load_plain(path.read_bytes(), source="out", cure="")
    alloc = next(entry for entry in content["device_traces"][0] if entry["action"] == "alloc")
    assert alloc["frames"] == [
        {"filename": "layers.0", "line": 0, "name": "query"},
        {"filename": "train", "line": 0, "name": "step"},
    ]
    assert [entry["action"] for entry in content["device_traces"][0]][:4] == [
        "segment_alloc",
        "alloc",
        "segment_alloc",
        "alloc",
    ]


def test_the_viewer_knows_every_instruction(tmp_path: Path) -> None:
    path = tmp_path / "out.pickle"
    many = [(n, 512 * n + 1, 1) for n in range(3000)]
    write_snapshot(path, replay(many, record=True))
    assert {code.code for code, _, _ in pickletools.genops(path.read_bytes())} <= VIEWER_CODES


def test_an_out_of_memory_is_written(tmp_path: Path) -> None:
    path = tmp_path / "out.pickle"
    write_snapshot(path, replay(EVENTS, capacity_bytes=60 * MIB, record=True))
    (device,) = read_snapshot(path)
    assert device.num_ooms == 1


@pytest.mark.parametrize("expandable", [False, True])
def test_pytorch_reads_what_is_written(tmp_path: Path, expandable: bool) -> None:
    """PyTorch's own command-line readers add the segments up and tell the trace, where it is installed."""
    viewer = pytest.importorskip("torch.cuda._memory_viz")
    path = tmp_path / "out.pickle"
    run = replay(EVENTS, AllocatorSettings(expandable_segments=expandable), capacity_bytes=100 * MIB, record=True)
    write_snapshot(path, run, describe=describe)
    content = pickle.loads(path.read_bytes())
    assert f"total_reserved: {run.end.reserved / MIB:.1f}MiB" in viewer.segsum(content)
    assert f"{len(run.actions)} entries" in viewer.trace(content)
    assert "query" in viewer.segments(content, format_flamegraph=lambda lines: lines)


def test_a_replay_without_actions_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="record=True"):
        write_snapshot(tmp_path / "out.pickle", replay(EVENTS))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "out.pickle").mkdir()
    with pytest.raises(MemplanError, match="cannot be written"):
        write_snapshot(tmp_path / "out.pickle", replay(EVENTS, record=True))
    assert os.listdir(tmp_path) == ["out.pickle"]
    with pytest.raises(MemplanError, match="cannot be written"):
        write_snapshot(tmp_path / "missing" / "out.pickle", replay(EVENTS, record=True))
