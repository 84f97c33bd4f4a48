"""How is a replay written as a memory snapshot, which PyTorch's memory viewer opens?

    write_snapshot("plan.pickle", replay(events, record=True))     # then drop it on pytorch.org/memory_viz

Source: docstring of torch.cuda.memory._snapshot, torch/cuda/_memory_viz.py and torch/utils/viz/MemoryViz.js, PyTorch
2.13.  Time is the number of the action, in place of microseconds.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from typing import TYPE_CHECKING, Any

from memplan.allocator.layout import ACTIVE, PENDING
from memplan.errors import MemplanError, UsageError
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from memplan.allocator.counters import Action
    from memplan.allocator.layout import Segment
    from memplan.allocator.replay import Replay


class Frame(NamedTuple):
    """A line of the stack that the viewer shows for a block."""

    name: str
    """Operator or tensor."""
    filename: str
    """Module."""
    line: int = 0


def write_snapshot(
    path: str | os.PathLike[str],
    run: Replay,
    *,
    describe: Callable[[Any], Iterable[Frame]] | None = None,
    alloc_conf: str = "",
) -> None:
    """Write a replay as a snapshot file for PyTorch's memory viewer; a file that is there is replaced at once.

    Args:
        path: where to.
        run: a replay with `record=True`.
        describe: the stack to show for a tensor, the innermost frame first; its key as text unless given.
        alloc_conf: PYTORCH_ALLOC_CONF that the run was replayed with.
    """
    if run.num_events and not run.actions:
        raise UsageError("The replay kept no actions to write.", "Replay with record=True.")
    frames = _Frames(describe or _by_key)
    content = {
        "segments": [_segment_entry(segment, frames) for segment in run.segments],
        "device_traces": [[_action_entry(n, action, frames) for n, action in enumerate(run.actions)]],
        "external_annotations": [],
        "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": alloc_conf},
    }
    _write_atomically(path, pickle.dumps(content, protocol=4))  # the viewer's own reader knows protocol 4


class _Frames:
    """Stacks of tensors as the viewer wants them; equal frames are one object, which a pickle writes once."""

    def __init__(self, describe: Callable[[Any], Iterable[Frame]]) -> None:
        self.describe = describe
        self.by_frame: dict[Frame, dict[str, Any]] = {}
        self.by_key: dict[Any, list[dict[str, Any]]] = {None: []}

    def of(self, key: Any) -> list[dict[str, Any]]:
        stack = self.by_key.get(key)
        if stack is None:
            stack = self.by_key[key] = [self._entry(frame) for frame in self.describe(key)]
        return stack

    def _entry(self, frame: Frame) -> dict[str, Any]:
        if frame not in self.by_frame:
            self.by_frame[frame] = {"filename": frame.filename, "line": frame.line, "name": frame.name}
        return self.by_frame[frame]


def _by_key(key: Any) -> tuple[Frame, ...]:
    return (Frame(name=str(key), filename="memplan"),)


def _segment_entry(segment: Segment, frames: _Frames) -> dict[str, Any]:
    active = [block for block in segment.blocks if block.state in (ACTIVE, PENDING)]
    return {
        "device": 0,
        "address": segment.address,
        "total_size": segment.num_bytes,
        "allocated_size": segment.bytes_in(ACTIVE),
        "active_size": segment.bytes_in(ACTIVE, PENDING),
        "requested_size": sum(block.requested_bytes for block in active),
        "stream": segment.stream,
        "segment_type": "large" if segment.is_large else "small",
        "segment_pool_id": (0, 0),
        "is_expandable": segment.is_expandable,
        "frames": [],
        "blocks": [
            {
                "address": block.address,
                "size": block.num_bytes,
                "requested_size": block.requested_bytes,
                "state": block.state,
                "frames": frames.of(block.key),
            }
            for block in segment.blocks
        ],
    }


def _action_entry(index: int, action: Action, frames: _Frames) -> dict[str, Any]:
    return {
        "action": action.name,
        "device_free" if action.name == "oom" else "addr": action.address,
        "size": action.num_bytes,
        "stream": action.stream,
        "time_us": index,
        "compile_context": "N/A",
        "user_metadata": "",
        "pool_id": (0, 0),
        "frames": frames.of(action.key),
    }


def _write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Under another name first, so that a reader sees the old file or the new one."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        with open(descriptor, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise MemplanError(f"{name} cannot be written: {error.strerror or error}.", "Check the folder.") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
