"""Attention, by implementation.

===========  ========================================================================================================
``eager``    written out: scores, their fp32 softmax and the probabilities in the model's dtype are materialised;
             keeps 6 bytes a score in half precision, 4 in fp32 (there the cast is no copy)
``sdpa``     torch.nn.functional.scaled_dot_product_attention with a fused kernel: keeps q, k, v, the output and the
             log-sum-exp of each row, nothing quadratic
``flash``    the same kernel called as such: keeps two more blocks, the seed and the offset of its random numbers
``math``     what scaled_dot_product_attention falls back to where no fused kernel takes q, k, v and the mask
===========  ========================================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.elementwise import add, add_into, dropout, keeps_result, mul, neg, promoted, scale
from memplan.operators.layout import cat, copy, repeat_heads, take
from memplan.operators.products import matmul
from memplan.operators.sizes import BYTES_PER_ELEMENT, Dim, Shape, Size, count, num_bytes
from memplan.operators.tape import ATTENTION_KERNEL, Gradient, Tape, Tensor, elements

if TYPE_CHECKING:
    from collections.abc import Iterator


def softmax(t: Tape, x: Tensor, *, dtype: str | None = None) -> Tensor:
    """``F.softmax``: keeps its result; its backward holds gradient times result (SoftMax.cu) beside the new gradient.

    With `dtype` fp32 an fp16 input is converted inside the kernel, a bf16 one by a copy first.
    """
    if dtype is None:
        dtype = x.dtype if t.numerics.autocast is None else "fp32"
    source = x if x.dtype == "fp16" else t.cast(x, dtype)
    return t.op(
        "softmax",
        (source,),
        x.shape,
        dtype=dtype,
        keeps_output=True,
        gradients=[Gradient(source, scratch=(num_bytes(x.shape, dtype),))],
        flops=elements(x).times(5),
        reason="the derivative of softmax needs its result",
    )


def rotary(t: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * cos + rotate_half(x) * sin`` for x of (b, heads, s, head_dim): keeps only the shared tables."""
    half = (*x.shape[:-1], _half(x.shape[-1]))
    turned = mul(t, x, cos)
    first, second = take(t, x, half), take(t, x, half)
    rotated = cat(t, (neg(t, second), first), x.shape)
    return add(t, turned, mul(t, rotated, sin))


def _half(dim: Dim) -> int:
    assert isinstance(dim, int)
    return dim // 2


def eager(
    t: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    p: float = 0.0,
    scaled: bool = True,
    softmax_dtype: str | None = "fp32",
    softcap: bool = False,
    weights_dtype: str | None = None,
    returned: bool = False,
) -> Tensor:
    """Attention written out, as ``eager_attention_forward`` of transformers: (b, heads, s, d) to (b, s, heads, d).

    `scaled`: the scores are multiplied by a number (a copy); `softmax_dtype`: None keeps the dtype of the scores;
    `weights_dtype`: None casts the probabilities to that of q;
    `softcap`: the scores are bent by ``c * tanh(scores / c)`` (Gemma 2); `returned`: the layer returns the
    probabilities to the model.
    """
    b, heads, s, head_dim = q.shape
    with t.recomputable("attention", q, k, v):
        k, v = (
            repeat_heads(t, k, heads, _ratio(heads, k.shape[1])),
            repeat_heads(t, v, heads, _ratio(heads, v.shape[1])),
        )
        variables = (k, v)
        batched = slices_batched(t, q, k, v)
        scores = matmul(t, next(batched), next(batched), (b, heads, s, t.keys), head_dim)
        if scaled:
            scores = scale(t, scores)
        if softcap:
            scores = softcapped(t, scores)
        if mask is not None:
            scores = add(t, scores, mask)
        weights = t.cast(softmax(t, scores, dtype=softmax_dtype), weights_dtype or q.dtype)
        if softmax_dtype is not None:  # one statement, to the end of which the variable holds the scores
            t.keep_alive(scores)
        weights = dropout(t, weights, p)
        t.hold_in_piece(weights)
        if returned:
            t.hold_into_next(weights)
            t.also_returns(weights)
        out = matmul(t, weights, next(batched), (b, heads, s, v.shape[-1]), t.keys)
        t.keep_alive(*variables)
    return copy(t, out, (b, s, heads, v.shape[-1]))


def softcapped(t: Tape, x: Tensor) -> Tensor:
    """``c * tanh(x / c)``: keeps the tanh."""
    return scale(t, keeps_result(t, "tanh", scale(t, x)))


def slices_batched(t: Tape, *parts: Tensor) -> Iterator[Tensor]:
    """`parts` with a copy of each slice of a larger tensor: ``matmul`` needs batch and heads in one dimension.

    Each copy is made when it is asked for.

    So has a single head that is shown for every head.  A micro-batch of one needs no copy and keeps the larger tensor
    (counted here as the copies and a rest of it), or the single head; a model with one head needs none either.  Where
    sequences lie end to end there is but one row.
    """
    if t.batch.flattened or all(part.shape[1] == 1 for part in parts):
        yield from parts
        return
    slices = [x for x in parts if x.bytes.factor < t.storages[x.storage].size.factor]
    for part in parts:
        whole = t.storages[part.storage].size.factor
        rest = whole - len(slices) * part.bytes.factor
        if part.bytes.factor > whole:
            yield _copy_keeping(t, part, whole, nothing_for_one=True)
        elif part not in slices:
            yield part
        elif part is slices[-1] and rest > 0:
            yield _copy_keeping(t, part, rest)
        else:
            yield copy(t, part)


def _copy_keeping(t: Tape, x: Tensor, num: int, *, nothing_for_one: bool = False) -> Tensor:
    """A copy of `x` that for a micro-batch of one keeps `num` bytes a token besides, or instead (`nothing_for_one`)."""
    kept: Shape = ("[b=1]", "s", num // BYTES_PER_ELEMENT[x.dtype])
    extra = [("what it shows", kept, x.dtype)]
    out = t.op("clone", (x,), x.shape, gradients=[Gradient(x, alias=True)], extra_outputs=extra)
    if nothing_for_one:
        storage = t.storages[out.storage]
        size = Size(storage.size.factor, (*storage.size.dims, "[b>1]"))
        t.storages[out.storage] = storage._replace(size=size)
    return out


def _ratio(heads: Dim, kv_heads: Dim) -> int:
    assert isinstance(heads, int)
    assert isinstance(kv_heads, int)
    return heads // kv_heads


def fused(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, p: float = 0.0, by_head: bool = False
) -> Tensor:
    """scaled_dot_product_attention, with the kernel that CUDA chooses: (b, heads, s, d) to (b, s, heads, d).

    The backward of the fused ones (mha_bwd in aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp) needs
    for a moment the gradient of q accumulated in fp32, one fp32 number a row and, where keys and values have fewer
    heads, their gradients for every query head before they are summed.

    The flash kernel lays its output out like q (``empty_like`` in flash_api.cpp): where q lies head by head, as after
    ``cat`` or a reshape that copies (`by_head`), the caller's ``transpose(1, 2).contiguous()`` is a copy.  It is given
    heads padded to a multiple of 8 (pad_last_dim in attention.cpp), whose output is cut by a view and copied likewise.

    The memory-efficient kernel rounds its log-sum-exp up to 32 rows.
    """
    with t.recomputable("attention", q, k, v):
        return _fused(t, q, k, v, mask, p=p, by_head=by_head)


def _fused(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, p: float = 0.0, by_head: bool = False
) -> Tensor:
    q, k, v = t.autocast(q), t.autocast(k), t.autocast(v)
    kernel = _kernel(t, q, k, v, mask)
    b, heads, s, head_dim = q.shape
    if kernel == "math":
        return math(t, q, k, v, mask, p=p, by_head=by_head)
    padding = -_whole(head_dim) % HEAD_DIM_STEP if kernel == "flash" else 0
    if padding:
        q, k, v = (t.op("pad", (x,), (*x.shape[:-1], _whole(x.shape[-1]) + padding)) for x in (q, k, v))
    rows: Dim = "s to 32" if kernel == "efficient" and s == "s" else s
    unpadded = None
    if mask is not None and mask.dtype == "bool":
        unpadded, mask = _kernel_mask(t, mask, q.dtype)
    extra: list[tuple[str, tuple[Dim, ...], str]] = [("logsumexp", (b, heads, rows), "fp32")]
    if t.attention == "flash":
        extra += [("seed", (2,), "int64"), ("offset", (1,), "int64")]
    keeps = [q, k, v]
    inputs = [q, k, v]
    if mask is not None:
        keeps.append(mask)
        inputs.append(mask)
    scratch = _flash_scratch(t, q, k) if kernel == "flash" else _efficient_scratch(q)
    if padding:  # the gradient of the cut is no transpose of what the kernel wants
        scratch.append(num_bytes(q.shape, q.dtype))
    out = t.op(
        ATTENTION_KERNEL,
        inputs,
        (b, s, heads, v.shape[-1]),
        keeps=keeps,
        keeps_output=True,
        extra_outputs=extra,
        backward_scratch=scratch,
        flops=count((b, heads, s, _attended(t, s), head_dim)).times(4),
        reason="a fused attention kernel recomputes the scores from q, k, v, its output and the log-sum-exp",
    )
    if unpadded is not None:
        t.keep_alive(unpadded)
    if padding:
        out = take(t, out, (b, s, heads, head_dim))
    return copy(t, out) if padding or (by_head and kernel != "efficient") else out


def _attended(t: Tape, s: Dim) -> Dim:
    """Scores that the kernel computes for each query: of its own sequence, where it is told where that ends."""
    if t.generating:
        return t.keys
    return "s/sequences" if t.batch.flattened and t.attention == "flash" else s


def _flash_scratch(t: Tape, q: Tensor, k: Tensor) -> list[Size]:
    """What the flash kernel's backward allocates for itself: rows in steps of 128, heads of 32 (64 from 128 on)."""
    b, heads, s, head_dim = q.shape
    rows: Dim = "s to 128" if s == "s" else s
    if (
        t.batch.flattened and t.attention == "flash"
    ):  # mha_varlen_bwd, for the ends of sequences: 128 rows more for each
        rows = "s+128*sequences"
    step = 32 if _whole(head_dim) <= 128 else 64
    width = -(-_whole(head_dim) // step) * step
    expanded = [num_bytes(q.shape, q.dtype)] * 2 if heads != k.shape[1] else []
    return [num_bytes((b, heads, rows, width), "fp32"), num_bytes((b, heads, rows), "fp32"), *expanded]


def _efficient_scratch(q: Tensor) -> list[Size]:
    """The same of the memory-efficient kernel (attention_backward.cu): one operand in fp32 and a number a row."""
    return [num_bytes(q.shape, "fp32"), num_bytes(q.shape[:-1], "fp32")]


HEAD_DIM_STEP = 8
"""The flash kernel's heads are multiples of this; so are the memory-efficient kernel's in half precision."""

MOST_OF_FLASH = 256
"""The longest head that the flash kernel takes."""


def _whole(dim: Dim) -> int:
    assert isinstance(dim, int)
    return dim


def _kernel(t: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """``flash``, ``efficient`` or ``math``, as CUDA chooses (select_sdp_backend in sdp_utils.cpp).

    Flash takes half precision without a mask; the memory-efficient kernel takes masks and fp32, but no grouped heads,
    and only heads whose rows are aligned to 16 bytes; the rest is computed by one product after the other.  Grouped
    heads in fp32 count as flash nevertheless (see `Estimator.unmodelled`), but not while tokens are generated.
    """
    head_dim, value_dim = _whole(q.shape[-1]), _whole(v.shape[-1])
    half = q.dtype != "fp32"
    if t.attention == "flash" or (half and mask is None and head_dim == value_dim and head_dim <= MOST_OF_FLASH):
        return "flash"
    grouped = q.shape[1] != k.shape[1]
    step = HEAD_DIM_STEP if half else HEAD_DIM_STEP // 2
    if head_dim % step or value_dim % step or (grouped and half):
        return "math"
    if grouped:
        return "math" if t.generating else "flash"
    return "efficient"


def math(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, p: float = 0.0, by_head: bool = False
) -> Tensor:
    """What runs where no fused kernel will (_scaled_dot_product_attention_math in attention.cpp), in fp32.

    q and k are each scaled by the root of the factor, the mask is added to the scores in place, and the probabilities
    are kept in fp32; q, k and v in fp32 are copied for the products where they do not lie head by head (`by_head`; keys
    and values that a reshape has repeated do).  `_safe_softmax` looks for rows that are masked out entirely: its
    forward pass needs the probabilities twice, and a boolean for each.
    """
    b, heads, s, head_dim = q.shape
    kept_dtype, given = q.dtype, (q, k, v)
    if mask is None:
        mask = t.op("causal mask", (), ("s", "l[prefill]" if t.generating else "s"), dtype=q.dtype)
    elif mask.dtype == "bool":
        mask = t.op("additive mask", (mask,), ("b", 1, "s", t.keys), dtype=q.dtype)
    repeated = ("slice", "repeat_kv")
    lies_by_head = [by_head, by_head or _made_by(t, k) in repeated, _made_by(t, v) in repeated]
    q, k, v = (t.cast(x, "fp32") for x in (q, k, v))
    ratio = _ratio(heads, k.shape[1])
    scaled_q = scale(t, q)
    k_for_all, v_for_all = repeat_heads(t, k, heads, ratio), repeat_heads(t, v, heads, ratio)
    scaled_k = scale(t, k_for_all)
    left = scaled_q if lies_by_head[0] else copy(t, scaled_q)
    right = scaled_k if lies_by_head[1] or ratio > 1 else copy(t, scaled_k)
    scores = matmul(t, left, right, (b, heads, s, t.keys), head_dim, autocast=False)
    t.keep_alive(scaled_k)
    scores = add_into(t, scores, mask)
    bytes_of_scores = num_bytes(scores.shape, "fp32")
    weights = t.op(
        "safe softmax",
        (scores,),
        scores.shape,
        keeps_output=True,
        scratch=(bytes_of_scores, num_bytes(scores.shape, "bool")),
        gradients=[Gradient(scores, scratch=(bytes_of_scores,))],
        flops=elements(scores).times(5),
        reason="the derivative of softmax needs its result",
    )
    weights = dropout(t, weights, p)
    values = v_for_all if lies_by_head[2] or ratio > 1 else copy(t, v_for_all)
    out = matmul(t, weights, values, (b, heads, s, v.shape[-1]), t.keys, autocast=False)
    out = t.cast(out, kept_dtype)
    t.op("to", (weights,), weights.shape, dtype=kept_dtype, gradients=())
    t.keep_alive(*given, q, k, v, scaled_q, k_for_all, v_for_all, mask)
    return copy(t, out, (b, s, heads, v.shape[-1]))


def _made_by(t: Tape, x: Tensor) -> str:
    """Name of the last operator that gave `x`, views aside."""
    return next((op.name for op in reversed(t.ops) if any(y.number == x.number for y in op.outputs)), "")


def _kernel_mask(t: Tape, mask: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """A boolean mask as 0 and minus infinity, and what the memory-efficient kernel is given: rows of 16 n elements.

    Every layer makes its own; the first, empty where it is the second, is a variable of scaled_dot_product_attention
    (convert_boolean_attn_mask and preprocess_mask in aten/src/ATen/native/transformers/attention.cpp).
    """
    unpadded = t.op("additive mask", (mask,), ("b", 1, "s", f"{t.keys}[not 16s]"), dtype=dtype)
    return unpadded, t.op("pad", (unpadded, mask), ("b", 1, "s", f"{t.keys} to 16"), gradients=(), dtype=dtype)


def behind_cached(t: Tape, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values behind those that the cache has (``DynamicLayer.update`` in transformers/cache_utils.py).

    ``torch.cat`` makes new tensors, the first time, too, in the dtype of the keys; of a layer with a window both are
    there before the old ones go (``DynamicSlidingWindowLayer``), and what the cache keeps is a view of all it was given
    last.
    """
    together, before = [], []
    if t.window is not None:  # its number, on the device (``_sliding_window_tensor``)
        t.external("window", ("[decoding]",), "int64", role="cache")
        t.in_cache.append(t.op("window", (), ("[prefill]",), dtype="int64"))
    for name, x in (("keys", k), ("values", v)):
        b, num, _, head_dim = x.shape
        dtype = promoted(k.dtype, x.dtype)
        old = t.external(f"cached {name}", (b, num, t.keys_before, head_dim), dtype, role="cache")
        together.append(t.op("cat (cache)", (old, x), (b, num, t.keys, head_dim), dtype=dtype))
        before.append(old)
    if t.window is not None:
        t.keep_alive(*before)
    t.keep_alive(k, v)
    t.in_cache += together
    return together[0], together[1]


def attention(
    t: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    p: float = 0.0,
    scaled: bool = True,
    softmax_dtype: str | None = "fp32",
    by_head: bool = False,
    softcap: bool = False,
    weights_dtype: str | None = None,
    returned: bool = False,
    caches: bool = True,
) -> Tensor:
    """Attention as the tape's implementation runs it: (b, heads, s, d) to (b, s, heads, d).

    `scaled`, `softmax_dtype`, `softcap` and `returned` matter to the eager implementation only (see `eager`), `by_head`
    to the fused kernel.  No form of scaled_dot_product_attention bends scores: where one is asked for, what runs is
    eager (transformers' own fallback).  `caches`: False where the model has put something else into its cache.
    """
    if t.generating:
        k, v = behind_cached(t, k, v)
    elif caches:
        k, v = cached(t, k, v)
    t.hold_in_module(q, k, v)
    if t.attention == "eager" or (softcap and t.attention == "sdpa"):
        return eager(
            t,
            q,
            k,
            v,
            mask,
            p=p,
            scaled=scaled,
            softmax_dtype=softmax_dtype,
            softcap=softcap,
            weights_dtype=weights_dtype,
            returned=returned,
        )
    with t.recomputable("attention", q, k, v):
        if mask is not None:
            k = repeat_heads(t, k, q.shape[1], _ratio(q.shape[1], k.shape[1]))
            v = repeat_heads(t, v, q.shape[1], _ratio(q.shape[1], v.shape[1]))
        if t.attention == "flash" and v.shape[-1] != q.shape[-1]:
            out = _fused_as_long_as(t, q, k, v, p=p)
        else:
            out = _fused(t, q, k, v, mask, p=p, by_head=by_head)
        t.keep_alive(k, v)
    return out


def cached(t: Tape, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as an empty cache gives them back: copies that it holds (``DynamicLayer.update``).

    ``DynamicCache`` of transformers 5.23 (cache_utils.py) puts them together with nothing by ``torch.cat``, where
    nothing has the dtype of the keys; one with a window shows its last tokens alone, and holds all.
    """
    if not t.caches:
        return k, v
    copies = t.cached(k, k.dtype), t.cached(v, promoted(k.dtype, v.dtype))
    t.keep_alive(k, v)
    return copies


def _fused_as_long_as(t: Tape, q: Tensor, k: Tensor, v: Tensor, *, p: float) -> Tensor:
    """The flash kernel with values padded to the length of queries and its output cut (flash_attention_forward)."""
    padded = t.op("pad", (v,), (*v.shape[:-1], q.shape[-1]))
    out = _fused(t, q, k, padded, None, p=p)
    return copy(t, take(t, out, (*out.shape[:-1], v.shape[-1])))
