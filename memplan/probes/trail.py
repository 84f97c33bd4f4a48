"""Which module is at work?

In the forward pass the call stack tells.  In the backward pass autograd's numbers do: it numbers its nodes in the order
of creation, and whenever the stack changes, the next number is noted, so that a node's number tells which module was
running when it was created.
"""

from __future__ import annotations

import bisect
import contextlib
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator


class ModuleTrail:
    """Names the module at work by its path in the model."""

    def __init__(self) -> None:
        self._failure = (0, "")
        self._names: dict[int, str] = {}
        self._parameters: dict[int, str] = {}
        self._stack: list[str] = [""]
        self._first_numbers: list[int] = []
        self._modules: list[str] = []

    def describe(self, model: nn.Module) -> None:
        """Learn the paths of a model's modules and parameters."""
        self._names = {id(module): name for name, module in model.named_modules()}
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}

    def forget_graph(self) -> None:
        """Forget about the nodes of earlier passes."""
        self._first_numbers.clear()
        self._modules.clear()

    def current(self) -> str:
        """Path of the module at work; in the backward pass, of a parameter whose gradient is accumulated."""
        if len(self._stack) > 1:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        variable = getattr(node, "variable", None)
        if variable is not None:
            return self._parameters.get(id(variable), "")
        index = bisect.bisect_right(self._first_numbers, node._sequence_nr()) - 1
        return self._modules[index] if index >= 0 else ""

    def failed_in(self, error: BaseException) -> str:
        """The innermost module that `error` left."""
        return self._failure[1] if self._failure[0] == id(error) else ""

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Follow the calls of all modules."""
        call, stack, note = nn.Module.__call__, self._stack, self._note

        def followed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            stack.append(self._names.get(id(module), stack[-1]))
            note()
            try:
                return call(module, *args, **kwargs)
            except Exception as error:
                if self._failure[0] != id(error):
                    self._failure = (id(error), stack[-1])
                raise
            finally:
                stack.pop()
                note()

        with mock.patch.object(nn.Module, "__call__", followed):
            yield

    def _note(self) -> None:
        number = torch._C._autograd._get_sequence_nr()
        if self._first_numbers and self._first_numbers[-1] == number:
            self._modules[-1] = self._stack[-1]
            return
        self._first_numbers.append(number)
        self._modules.append(self._stack[-1])
