"""Which knobs of the CUDA caching allocator are set, and what does PYTORCH_ALLOC_CONF say?

    parse_alloc_conf("expandable_segments:True,max_split_size_mb:512")

The syntax is `option:value,option:value`, a value being a token or `[key:value,...]`; white space is ignored; options
that are not named keep their default.  Sizes are MiB, whatever `_mb` suggests.

Source: c10/core/AllocatorConfig.h and .cpp, c10/cuda/CUDAAllocatorConfig.h, PyTorch 2.13; docs/source/notes/cuda.rst.
Stricter than PyTorch, which skips unknown options, takes `40x` for 40 and lets the last of two equal options win:
those are faults here, because they are slips.

Left out: options of pinned host memory and of locking, which move no byte of the device (understood and ignored), and
`backend:cudaMallocAsync`, which is another allocator (refused).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import UsageError
from memplan.specs.values import dataclass
from memplan.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

LARGE_SEGMENT_BYTES = 20 * MIB
"""Default of large_segment_size_ (c10/core/AllocatorConfig.h); kLargeBuffer until PyTorch 2.9."""

MIN_LARGE_ALLOC_BYTES = 10 * MIB
"""kMinLargeAlloc (c10/core/AllocatorConfig.h): a request of this size or more gets a segment of its own."""

NUM_ROUNDUP_INTERVALS = 16
"""kRoundUpPowerOfTwoIntervals (c10/core/AllocatorConfig.cpp): powers of two from 1 MiB up to 64 GiB."""

MAX_DIGITS = 15
"""Longer numbers are slips."""

IGNORED_OPTIONS = frozenset(
    {
        "graph_capture_record_stream_reuse",
        "pinned_free_catch_all",
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
        "throw_on_cudamalloc_oom",
    }
)
"""Options of c10/core/AllocatorConfig.cpp and c10/cuda/CUDAAllocatorConfig.h without influence on what is reserved."""


@dataclass(frozen=True, kw_only=True)
class AllocatorSettings:
    """The options of PYTORCH_ALLOC_CONF that decide what is reserved, at PyTorch's defaults."""

    roundup_power2_divisions: tuple[int, ...] = (0,) * NUM_ROUNDUP_INTERVALS
    """Steps between two powers of two that requests are rounded up to; entry i for requests of 2^i to 2^(i+1) MiB, the
    first also for less and the last also for more; 0 and 1 round to 512 bytes."""

    max_split_size_bytes: int | None = None
    """Cached blocks of this size or more are not split; None: any block may be."""

    max_non_split_rounding_bytes: int = LARGE_SEGMENT_BYTES
    """How much larger than the request a block may be that is not split because of `max_split_size_bytes`."""

    garbage_collection_threshold: float = 0.0
    """Share of the allowed bytes above which old cached segments are freed; 0: never."""

    expandable_segments: bool = False
    """One growing segment for each stream and pool instead of many of fixed size."""

    large_segment_bytes: int = LARGE_SEGMENT_BYTES
    """Segment for requests of 1 to 10 MiB; page of the large pool's expandable segments."""

    memory_fraction: float = 1.0
    """Share of the device that the process may reserve (`per_process_memory_fraction`)."""

    def __post_init__(self) -> None:
        """Raise a `UsageError` where PyTorch would refuse the value."""
        least, cure = self.large_segment_bytes, "PyTorch refuses it too; see notes/cuda.rst, memory management."
        if least <= MIN_LARGE_ALLOC_BYTES:
            raise UsageError("large_segment_size_mb must be more than 10.", cure)
        if self.max_split_size_bytes is not None and self.max_split_size_bytes < least:
            raise UsageError(f"max_split_size_mb must be at least {least / MIB:g}, the size of a large segment.", cure)
        if self.max_non_split_rounding_bytes < LARGE_SEGMENT_BYTES:
            raise UsageError("max_non_split_rounding_mb must be at least 20.", cure)
        if not 0.0 <= self.garbage_collection_threshold < 1.0:
            raise UsageError("garbage_collection_threshold must lie between 0 and 1.", cure)
        if not 0.0 <= self.memory_fraction <= 1.0:
            raise UsageError("per_process_memory_fraction must lie between 0 and 1.", cure)
        if len(self.roundup_power2_divisions) != NUM_ROUNDUP_INTERVALS:
            raise UsageError(f"roundup_power2_divisions needs {NUM_ROUNDUP_INTERVALS} entries.", cure)
        if not all(n == 0 or _is_power_of_2(n) for n in self.roundup_power2_divisions):
            raise UsageError("roundup_power2_divisions must be powers of 2, or 0 to switch the rounding off.", cure)


def parse_alloc_conf(text: str) -> AllocatorSettings:
    """The settings that the text of PYTORCH_ALLOC_CONF asks for.

    Raises:
        UsageError: unknown or repeated option, malformed or forbidden value, another allocator.
    """
    values: dict[str, object] = {}
    seen: set[str] = set()
    for option, value in _split_options("".join(text.split())):
        if option in seen:
            raise UsageError(f"The allocator option {option!r} is given twice.", "Keep one of them.")
        seen.add(option)
        if option == "backend":
            _check_backend(value)
        elif option in PARSER_BY_OPTION:
            field, parse = PARSER_BY_OPTION[option]
            values[field] = parse(option, value)
        elif option not in IGNORED_OPTIONS:
            raise _unknown(option)
    return AllocatorSettings(**values)  # type: ignore[arg-type] # the parsers know the types


def _split_options(text: str) -> list[tuple[str, str]]:
    pairs = []
    for part in _split_outside_brackets(text.removesuffix(",")):
        option, colon, value = part.partition(":")
        if not (option and colon and value):
            raise UsageError(
                f"The allocator option {part!r} is not of the form option:value.",
                "Say for example expandable_segments:True,max_split_size_mb:512.",
            )
        pairs.append((option, value))
    return pairs


def _split_outside_brackets(text: str) -> list[str]:
    parts: list[str] = []
    for piece in text.split(",") if text else ():
        if parts and parts[-1].count("[") > parts[-1].count("]"):
            parts[-1] += "," + piece
        else:
            parts.append(piece)
    return parts


def _parse_mib(option: str, value: str) -> int:
    return _parse_whole(option, value) * MIB


def _parse_whole(option: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= MAX_DIGITS):
        raise UsageError(f"{option} is not a whole number: {value!r}.", f"Say for example {option}:256.")
    return int(value)


def _parse_share(option: str, value: str) -> float:
    digits = value.replace(".", "", 1)
    if not (digits.isascii() and digits.isdigit() and len(digits) <= MAX_DIGITS):
        raise UsageError(f"{option} is not a number between 0 and 1: {value!r}.", f"Say for example {option}:0.8.")
    return float(value)


def _parse_threshold(option: str, value: str) -> float:
    share = _parse_share(option, value)
    if share == 0.0:
        raise UsageError(f"{option} must be more than 0.", "Leave it out to switch garbage collection off.")
    return share


def _parse_bool(option: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise UsageError(f"{option} is neither True nor False: {value!r}.", f"Say {option}:True, with a capital.")
    return value == "True"


def _parse_divisions(option: str, value: str) -> tuple[int, ...]:
    """One number for all sizes, or `[256:1,512:2,>:4]`: by size in MiB, a power of two; `>` for all sizes after it."""
    if not value.startswith("["):
        divisions = _parse_whole(option, value)
        if not _is_power_of_2(divisions):
            raise UsageError(f"{option} is not a power of 2: {value!r}.", f"Say for example {option}:4.")
        return (divisions,) * NUM_ROUNDUP_INTERVALS
    table, last, first = [0] * NUM_ROUNDUP_INTERVALS, 0, True
    for entry in value[1:].removesuffix("]").removesuffix(",").split(",") if value != "[]" else ():
        size, colon, text = entry.partition(":")
        if not (value.endswith("]") and colon):
            raise UsageError(
                f"{option} is not a list of size:divisions: {value!r}.", f"Say {option}:[256:1,512:2,>:4]."
            )
        divisions = _parse_whole(option, text)
        if size == ">":
            table[last + 1 :] = [divisions] * (NUM_ROUNDUP_INTERVALS - last - 1)
            continue
        boundary = _parse_whole(option, size)
        if not _is_power_of_2(boundary):
            raise UsageError(
                f"{option} has a size that is not a power of 2: {size!r}.", "Say sizes such as 256 or 512."
            )
        last = min(boundary.bit_length() - 1, NUM_ROUNDUP_INTERVALS - 1)
        if first:
            table[:last] = [divisions] * last
            first = False
        table[last] = divisions
    return tuple(table)


PARSER_BY_OPTION: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "expandable_segments": ("expandable_segments", _parse_bool),
    "garbage_collection_threshold": ("garbage_collection_threshold", _parse_threshold),
    "large_segment_size_mb": ("large_segment_bytes", _parse_mib),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _parse_mib),
    "max_split_size_mb": ("max_split_size_bytes", _parse_mib),
    "per_process_memory_fraction": ("memory_fraction", _parse_share),
    "roundup_power2_divisions": ("roundup_power2_divisions", _parse_divisions),
}
"""Option -> field of `AllocatorSettings` and the reader of its value."""


def _check_backend(value: str) -> None:
    if value != "native":
        raise UsageError(
            f"The allocator backend {value!r} is not modelled.",
            "Leave `backend` out: memplan simulates the native one.",
        )


def _unknown(option: str) -> UsageError:
    from memplan.errors import did_you_mean

    known = [*PARSER_BY_OPTION, *IGNORED_OPTIONS]
    cure = did_you_mean(option, known, otherwise="The options are listed in PyTorch's notes/cuda.rst.")
    return UsageError(f"{option!r} is not an option of the CUDA allocator.", cure)


def _is_power_of_2(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
