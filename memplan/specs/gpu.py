"""What a GPU offers: bytes, FLOP/s, bandwidths, and where each number comes from.

A card has three sizes.  The label on the box is decimal and rounded (24 GB), nvidia-smi shows what the board has after
ECC (24564 MiB on an RTX 4090, 23034 MiB on an L4), and the driver keeps 0.25 to 0.75 GiB of that from CUDA, so that
torch's `total_memory` is smaller again (24080 to 24210 MiB, 22693 MiB).  A plan is made against the last one known.

Left out: the CUDA context, which is charged to the process and not taken off the card, and whatever other processes
and a display hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import MemplanError
from memplan.specs.values import dataclass, field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.specs.calibration import Calibration

FLOPS_DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8")
"""The dtypes a matrix product may be computed in, as datasheets tell them apart."""

SIZE_FIELDS = ("torch_bytes", "physical_bytes", "label_bytes")
"""The sizes of a card, the most telling first."""


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """One GPU as torch sees it: one device, not one board and not one machine."""

    name: str
    """Catalogue id such as `rtx4090`, or the size as typed, such as `24GB`."""

    label: str
    """The name people know it by: `GeForce RTX 4090`."""

    label_bytes: int | None = None
    """Bytes that the label promises: 24 x 10^9 for a "24 GB" card."""

    physical_bytes: int | None = None
    """Bytes that nvidia-smi shows as memory.total."""

    torch_bytes: int | None = None
    """Bytes that `torch.cuda.get_device_properties().total_memory` shows on Linux; the least where drivers differ."""

    context_bytes: int | None = None
    """Bytes of a process's CUDA context, only where somebody measured it on this card."""

    flops_per_s: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Dense peak FLOP/s by dtype, a subset of `FLOPS_DTYPES`: without sparsity, with fp32 accumulation."""

    unsupported_dtypes: tuple[str, ...] = ()
    """Dtypes that the chip has no fast units for, as opposed to those whose rate is merely not known."""

    memory_bandwidth_bytes_per_s: float | None = None
    """Bytes per second between the chip and its own memory."""

    link_bytes_per_s: float | None = None
    """Bytes per second to another GPU of its kind over its fastest link, in one direction."""

    launch_s: float = 0.0
    """Seconds that an operator takes at least, where that was measured."""

    workspace_bytes: int | None = None
    """Bytes of cuBLAS's workspaces, where they were measured."""

    calibration: Calibration | None = field(default_factory=lambda: None, hash=False)
    """The measurements that its rates, context and workspaces come from; None: its datasheet and PyTorch's sources."""

    compute_capability: str | None = None
    """CUDA compute capability such as `8.9`, or AMD's architecture such as `gfx942`."""

    aliases: tuple[str, ...] = ()
    """Further names the catalogue knows it by."""

    sources: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Field name (`torch_bytes`, `flops_per_s.bf16`) -> who says so."""

    notes: str = ""
    """What a reader of the numbers should know: spread over drivers, variants of the same name."""

    def __post_init__(self) -> None:
        known_sizes = [size for size in (self.torch_bytes, self.physical_bytes, self.label_bytes) if size is not None]
        if not known_sizes:
            raise MemplanError(f"GPU {self.name!r} has no size.", f"Give one of {', '.join(SIZE_FIELDS)}.")
        if unknown := sorted({*self.flops_per_s, *self.unsupported_dtypes} - {*FLOPS_DTYPES}):
            raise MemplanError(
                f"GPU {self.name!r} has a rate for {', '.join(unknown)}.", f"The dtypes are {', '.join(FLOPS_DTYPES)}."
            )
        if both := sorted({*self.flops_per_s} & {*self.unsupported_dtypes}):
            raise MemplanError(
                f"GPU {self.name!r} both has a rate for {', '.join(both)} and does not support it.",
                "Drop one of the two.",
            )
        quantities = [
            *known_sizes,
            *self.flops_per_s.values(),
            self.context_bytes,
            self.memory_bandwidth_bytes_per_s,
            self.link_bytes_per_s,
        ]
        if any(quantity is not None and not quantity > 0 for quantity in quantities):
            raise MemplanError(f"GPU {self.name!r} has a number that is not positive.", "Leave out what is not known.")

    @property
    def usable_bytes(self) -> int:
        """Bytes a training process can use, context included: `torch_bytes`, else `physical_bytes`, else the label."""
        for size_bytes in (self.torch_bytes, self.physical_bytes, self.label_bytes):
            if size_bytes is not None:
                return size_bytes
        raise AssertionError("a GpuSpec has at least one size")

    @property
    def is_from_nvidia_smi(self) -> bool:
        """Whether `usable_bytes` is what nvidia-smi shows, because what torch sees is not known."""
        return self.torch_bytes is None and self.physical_bytes is not None

    @property
    def usable_basis(self) -> str:
        """Which size `usable_bytes` is, in words that follow "n bytes usable: "."""
        if self.torch_bytes is not None:
            return "what torch sees as the card's total memory"
        if self.physical_bytes is not None:
            return (
                "the total nvidia-smi shows; what torch sees is not known for this card, mostly 0.25 to 0.75 GiB less"
            )
        return self.sources.get("label_bytes", "the size on the card's label")

    @property
    def total_bytes(self) -> int:
        """Bytes on the board: `physical_bytes`, else `torch_bytes`, else the label."""
        for size_bytes in (self.physical_bytes, self.torch_bytes, self.label_bytes):
            if size_bytes is not None:
                return size_bytes
        raise AssertionError("a GpuSpec has at least one size")
