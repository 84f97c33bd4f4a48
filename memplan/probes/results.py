"""What does an operator return, without running it again for shapes that it was seen with?

A meta kernel works out shapes in Python, at some 0.2 ms an operator; a training step asks the same question for every
layer, and twice for every step.  The answer is remembered for operators that neither change nor alias their arguments,
under everything that a shape can depend on: sizes, strides and dtypes of tensors, and all arguments that are no tensors
(of floating-point numbers the type).  In-place foreach operators change numbers only, of which there are none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

PLAIN, PURE, NOTHING = range(3)
"""Run it; remember what it returns; it does nothing to shapes."""


def kind_of(func: Any) -> int:
    """How to treat an operator, by its schema."""
    schema = func._schema
    if schema.name.startswith("aten::_foreach_") and schema.name.endswith("_"):
        return NOTHING
    if schema.is_mutable or not schema.name.startswith("aten::"):
        return PLAIN
    aliases = any(x.alias_info for x in (*schema.arguments, *schema.returns))
    return PLAIN if aliases else PURE


class Operator:
    """An operator and its results on meta tensors."""

    __slots__ = ("_count", "_known", "func", "kind", "name")

    def __init__(self, func: Any) -> None:
        self.func = func
        self.name = str(func).removesuffix(".default")
        self.kind = kind_of(func)
        self._known: dict[Any, Any] = {}
        self._count = flop_registry.get(func.overloadpacket)

    def run(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result."""
        if self.kind == PURE:
            return self._remembered(args, kwargs)
        if self.kind == NOTHING and args[0][0].is_meta:
            return None
        return self.func(*args, **kwargs)

    def flops(self, args: Any, kwargs: dict[str, Any], result: Any) -> int:
        """FLOPs of this call, by PyTorch's own counter: products of matrices, convolutions, attention; 0 of others."""
        return 0 if self._count is None else int(self._count(*args, **kwargs, out_val=result))

    def _remembered(self, args: Any, kwargs: dict[str, Any]) -> Any:
        key: list[Any] = []
        try:
            on_meta = _describe(args, key)
            for name, value in kwargs.items():
                key.append(name)
                on_meta = _describe_one(value, key) or on_meta
            question = tuple(key)
            known = self._known.get(question) if on_meta else None
        except (_Unclear, TypeError):
            return self.func(*args, **kwargs)
        if known is not None:
            return _make(known)
        result = self.func(*args, **kwargs)
        if on_meta:
            recipe = _recipe(result, args, kwargs)
            if recipe is None:
                self.kind = PLAIN
            else:
                self._known[question] = recipe
        return result


class _Unclear(Exception):  # noqa: N818 - it never leaves this module
    """Something whose influence on shapes is not known, such as a tensor that is not on the meta device."""


def _describe(values: Any, key: list[Any]) -> bool:
    on_meta = False
    for value in values:
        on_meta = _describe_one(value, key) or on_meta
    return on_meta


def _describe_one(value: Any, key: list[Any]) -> bool:
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            raise _Unclear
        key += (value.shape, value.stride(), value.dtype)
        return True
    if isinstance(value, (list, tuple)):
        key += (len(value), "[")
        return _describe(value, key)
    key.append(type(value))
    if not isinstance(value, float):
        key.append(value)
    return False


def _make(known: Any) -> Any:
    kind, parts = known
    made = [
        torch.empty_strided(shape, stride, dtype=dtype, device="meta") if dtype is not None else shape
        for shape, stride, dtype in parts
    ]
    return made[0] if kind is None else kind(made)


def _recipe(result: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """How to make the result anew; None where it is not made of dense storages of its own."""
    one = isinstance(result, torch.Tensor)
    if not one and type(result) not in (tuple, list):
        return None
    parts: list[Any] = []
    taken = {id(x) for x in (*_storages(args), *_storages(kwargs.values()))}
    for value in [result] if one else result:
        if not isinstance(value, torch.Tensor):
            parts.append((value, None, None))
            continue
        storage = value.untyped_storage()
        dense = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
        if not value.is_meta or id(storage) in taken or storage.nbytes() != dense * value.element_size():
            return None
        taken.add(id(storage))
        parts.append((value.shape, value.stride(), value.dtype))
    return None if one else type(result), tuple(parts)


def _storages(values: Any) -> list[Any]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value.untyped_storage())
        elif isinstance(value, (list, tuple)):
            found += _storages(value)
    return found
