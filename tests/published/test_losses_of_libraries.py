"""The losses that stand in for libraries against the libraries' own Python.

memplan traces TRL's, Liger's and Apple's losses with functions of its own (`memplan.probes.losses`), as their kernels
do not run without a GPU.  Where a library's source is found, its functions run here on the CPU, with kernels that do
nothing and with CUDA's choices; both have to come to the same bytes in their high points and at their ends.

    PYTHONPATH=.:/path/to/liger_kernel:/path/to/trl python -m pytest tests/published/test_losses_of_libraries.py
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

pytest.importorskip("torch")

import torch

from memplan.probes import losses
from memplan.probes.losses import Head
from memplan.probes.recorder import StorageRecorder

if TYPE_CHECKING:
    from collections.abc import Callable

WORDS, WIDTH, LENGTH, MICRO_BATCH = 5000, 64, 200, 3


def source_of(package: str, file: str, names: tuple[str, ...], names_in_scope: dict[str, Any], **changes: str) -> Any:
    """Functions and classes of an installed library's file, without importing it; text may be replaced before."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    path = Path(next(iter(found.submodule_search_locations))) / file
    tree = ast.parse(path.read_text())
    parts = [node for node in tree.body if getattr(node, "name", "") in names]
    if len(parts) < len(names):
        pytest.skip(f"this {package} has no {', '.join(names)}")
    text = "\n\n".join(ast.unparse(node) for node in parts)
    for old, new in changes.items():
        text = text.replace(old, new)
    exec(compile(f"from __future__ import annotations\n{text}", str(path), "exec"), names_in_scope)
    return names_in_scope


class Kernel:
    """A Triton kernel that does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


def numbers(dtype: str, *, frozen: bool = False) -> tuple[Any, Any, Any]:
    """Hidden states, the weight of the output layer, labels."""
    kind = getattr(torch, dtype)
    hidden = torch.randn(MICRO_BATCH, LENGTH, WIDTH, dtype=kind, requires_grad=True)
    weight = torch.randn(WORDS, WIDTH, dtype=kind, requires_grad=not frozen)
    return hidden, weight, torch.randint(WORDS, (MICRO_BATCH, LENGTH))


def story(compute: Callable[..., Any], dtype: str, *, frozen: bool = False) -> dict[str, int]:
    """Bytes at the high points of a forward and a backward pass, and at their ends."""
    hidden, weight, labels = numbers(dtype, frozen=frozen)
    num_items = torch.tensor(labels.numel())
    recorder = StorageRecorder({}, {}, has_padding=False, trust=(), device="cpu")
    with recorder:
        for given in (hidden, weight, labels, num_items):
            recorder.label(given, "input", "", "")
        recorder.enter("forward", 0, 0)
        loss = compute(hidden, weight, labels, num_items)
        recorder.enter("backward", 0, 0)
        loss.backward()
        del loss
    heights: dict[str, int] = {}
    live = 0
    for span in recorder.spans()[1:]:
        highest = live
        for event in recorder.events()[span.start : span.stop]:
            live += event.sign * event.num_bytes
            highest = max(highest, live)
        heights |= {f"highest in {span.phase}": highest, f"after {span.phase}": live}
    return heights


def ours(name: str) -> Callable[..., Any]:
    """The loss that memplan traces."""

    def compute(hidden: Any, weight: Any, labels: Any, num_items: Any) -> Any:
        return losses.LOSS_BY_NAME[name](hidden, Head(weight, None, None, False, None), labels, num_items)["loss"]

    return compute


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunked_is_what_trl_does(dtype: str, frozen: bool) -> None:
    scope = {"torch": torch, "F": torch.nn.functional, "maybe_gather_lm_head_ctx": lambda *_: contextlib.nullcontext()}
    source_of("trl", "trainer/sft_trainer.py", ("_chunk", "_chunked_cross_entropy_loss"), scope)

    def compute(hidden: Any, weight: Any, labels: Any, num_items: Any) -> Any:
        function = scope["_chunked_cross_entropy_loss"]
        return function(hidden, weight, losses.CHUNK_TOKENS, labels=labels, num_items_in_batch=num_items)[0]

    assert story(ours("chunked"), dtype, frozen=frozen) == story(compute, dtype, frozen=frozen)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_is_what_liger_does(dtype: str, frozen: bool) -> None:
    triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length())
    scope = {
        "torch": torch,
        "triton": triton,
        "liger_cross_entropy_kernel": Kernel(),
        "element_mul_kernel": Kernel(),
        "is_hip": lambda: False,
        "MAX_FUSED_SIZE": 32768,
        "_CHUNK_MEM_CONST": 1,
        "_ADDMM_SUPPORTS_OUT_DTYPE": True,
        "_can_use_mm_out": lambda hidden, weight: hidden.dtype == weight.dtype,
        "amp_custom_fwd": lambda f: f,
        "amp_custom_bwd": lambda f: f,
    }
    names = ("forward", "backward")
    wanted = tuple(f"fused_linear_cross_entropy_{name}" for name in names)
    source_of(
        "liger_kernel",
        "ops/fused_linear_cross_entropy.py",
        (*wanted, "LigerFusedLinearCrossEntropyFunction"),
        scope,
        **{"== 'cuda'": "== 'cpu'"},
    )

    def compute(hidden: Any, weight: Any, labels: Any, num_items: Any) -> Any:
        padded = torch.nn.functional.pad(labels, (0, 1), value=-100)
        shifted = padded[..., 1:].contiguous()
        apply = scope["LigerFusedLinearCrossEntropyFunction"].apply
        arguments = (None, None, -100, 0.0, 0.0, "sum")
        return apply(hidden.view(-1, WIDTH), weight, shifted.view(-1), *arguments)[0] / num_items

    capability = mock.patch("torch.cuda.get_device_capability", lambda *_: (8, 0))
    with capability, mock.patch("torch.addmm", lambda *_, **__: None):
        assert story(ours("fused"), dtype, frozen=frozen) == story(compute, dtype, frozen=frozen)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_cut_is_what_apple_does(frozen: bool) -> None:
    scope = {"torch": torch, "triton": SimpleNamespace(cdiv=lambda a, b: -(-a // b)), "IGNORE_INDEX": -100}
    for file, names in (
        ("utils.py", ("_build_flat_valids", "_handle_eps", "handle_reduction_none")),
        ("cce_lse_forward.py", ("cce_lse_forward_kernel",)),
        ("indexed_dot.py", ("indexed_neg_dot_forward_kernel",)),
        ("cce_backward.py", ("cce_backward_kernel",)),
        (
            "cce.py",
            ("CCEParams", "LinearCrossEntropyFunction", "linear_cross_entropy_apply", "cce_linear_cross_entropy"),
        ),
    ):
        kernels = ("_cce_lse_forward_kernel", "_indexed_neg_dot_forward_kernel", "_cce_backward_kernel")
        scope |= {name: Kernel() for name in kernels} | vars(typing) | {"dataclass": dataclasses.dataclass}
        scope |= {"add_doc_start": lambda _: lambda f: f, "b_bin_fn": lambda b: b, "LINEAR_CROSS_ENTROPY_DOC": ""}
        scope |= {"sort_logit_avg": lambda x: torch.empty(x.shape, dtype=torch.int64).to(torch.int32)}
        source_of("cut_cross_entropy", file, names, scope)

    def compute(hidden: Any, weight: Any, labels: Any, num_items: Any) -> Any:
        function = scope["cce_linear_cross_entropy"]
        return function(hidden, weight, labels, shift=True, reduction="sum", filter_eps="high") / num_items

    assert story(ours("cut"), "bfloat16", frozen=frozen) == story(compute, "bfloat16", frozen=frozen)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiled_is_what_trl_does(dtype: str, frozen: bool) -> None:
    scope: dict[str, Any] = {"torch": torch, "math": __import__("math"), "_use_triton": lambda _: True}
    scope |= {name: Kernel() for name in ("_forward_kernel", "_backward_kernel")}
    scope |= {"TOKEN_CHUNK_SIZE": 4096, "_BLOCK_SIZE": 1024, "OPTIONAL_OUTPUTS": ("entropy", "is_top1")}
    scope |= {"triton": SimpleNamespace(cdiv=lambda a, b: -(-a // b)), "_addmm_fp32": lambda *_: None}
    source_of(
        "trl",
        "kernels/chunked_logprob.py",
        ("ChunkedLogProbFunction",),
        scope,
        **{"from ..trainer.utils import maybe_gather_lm_head_ctx": "import contextlib"},
        **{"maybe_gather_lm_head_ctx(weight, bias)": "contextlib.nullcontext()"},
    )
    apply = scope["ChunkedLogProbFunction"].apply

    def compute(hidden: Any, weight: Any, labels: Any, num_items: Any) -> Any:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
        mask = labels != -100
        head, settings = Head(weight, None, None, False, None), (1.0, 32768, None, 1.0)
        outputs = ("log_probs", "entropy", "is_top1")
        per_token = apply(
            losses._masked(hidden, mask, head), weight, None, losses._masked(labels, mask, head), *settings, outputs
        )
        per_token = (None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x) for x in per_token)
        log_probs, entropy, _, _, best = per_token
        loss = -log_probs
        return loss.sum() / torch.as_tensor(num_items).clamp(min=1) + 0 * (entropy.detach().sum() + best.sum())

    assert story(ours("tiled"), dtype, frozen=frozen) == story(compute, dtype, frozen=frozen)
