"""The grouped product and picked rows in a trace: what the meta device would do otherwise."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from memplan.probes.recorder import StorageRecorder  # noqa: E402 - torch may be absent
from memplan.probes.semantics import cuda_semantics  # noqa: E402

META = torch.device("meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_product_in_any_dtype(dtype) -> None:
    """Gradients have the form of what they are gradients of, and are there only where they are asked for."""
    rows = torch.empty(12, 16, dtype=dtype, device=META, requires_grad=True)
    weight = torch.empty(4, 24, 16, dtype=dtype, device=META, requires_grad=True)
    offsets = torch.empty(4, dtype=torch.int32, device=META)
    with cuda_semantics():
        out = F.grouped_mm(rows, weight.transpose(-2, -1), offs=offsets)
        frozen = F.grouped_mm(rows, weight.detach().transpose(-2, -1), offs=offsets)
    assert out.shape == frozen.shape == (12, 24)
    assert out.dtype == dtype
    out.backward(torch.empty_like(out))
    assert rows.grad.shape == rows.shape
    assert weight.grad.shape == weight.shape
    assert weight.grad.is_contiguous()
    rows.grad = weight.grad = None
    frozen.backward(torch.empty_like(frozen))
    assert (rows.grad is not None, weight.grad) == (True, None)


def test_the_gradient_of_picked_rows_is_written_in_place() -> None:
    """GIVEN rows picked out of 40 bytes, THEN their backward makes the gradient once, not zeros and a copy."""
    recorder = StorageRecorder({}, {}, has_padding=False, trust=())
    x = torch.empty(10, device=META, requires_grad=True)
    with recorder:
        y = x[torch.empty(3, dtype=torch.int64, device=META)].sum()
        recorder.enter("backward", 0, 0)
        y.backward()
    made = [event.num_bytes for event in recorder.events() if event.sign > 0 and event.phase == "backward"]
    assert made.count(40) == 1
