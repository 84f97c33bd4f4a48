"""What of a model is trained, what is added beside it, and how the rest is stored?

Names are those of modules and parameters in transformers: ``model.layers.0.self_attn.q_proj``.

Sources: peft 0.21, tuners/tuners_utils.py (``check_target_module_exists``, ``_maybe_include_all_linear_layers``),
utils/other.py (``get_pattern_key``, ``ModulesToSaveWrapper``, ``prepare_model_for_kbit_training``); transformers 5.23,
quantizers/quantizer_bnb_4bit.py.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from memplan.errors import UsageError
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from memplan.specs.adapter import Lora

ALL_LINEAR = "all-linear"

LAYER_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")


class Recipe(NamedTuple):
    """What of a model is trained, and how the rest is stored."""

    lora: Lora | None = None
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained."""
    quantize: str | None = None
    """How the weights of linear layers are stored: ``nf4``, ``nf4-double`` or ``int8``; None: in the model's dtype."""
    upcast: bool = False
    """What is not quantised is cast to fp32 (``prepare_model_for_kbit_training``)."""
    input_gradients: bool = False
    """The result of the embedding is made to require a gradient (``enable_input_require_grads``)."""
    parameters: tuple[str, ...] = ()
    """Names of parameters that get adapters without a linear layer (`memplan.specs.conversions`)."""
    spared: tuple[str, ...] = ()
    """Names of linear layers that get none, because their name means one of these parameters."""
    disabled: bool = False
    """Adapters are there and switched off (``disable_adapter``): the model is the one that they were added to."""

    def dtype(self, dtype: str) -> str:
        """The dtype of parameters that are not quantised, where the model is loaded in `dtype`."""
        return "fp32" if self.upcast else dtype

    def trains(self, name: str) -> bool:
        """Whether the model's own parameter `name` gets a gradient."""
        return self.lora is None and self.quantize is None and not any(covers(p, name) for p in self.freeze)

    def trains_adapter(self, name: str) -> bool:
        """Whether the parameter `name` of an adapter gets one."""
        return not any(covers(p, name) for p in self.freeze)

    def copies(self, module: str) -> bool:
        """Whether a trained copy of `module`, or of what it is in, stands beside the original (``modules_to_save``)."""
        return self._has_copy(module) and not self.disabled

    def _has_copy(self, module: str) -> bool:
        return self.lora is not None and any(is_within(name, module) for name in self.lora.modules_to_save)

    def adapts(self, module: str) -> bool:
        """Whether the linear layer `module` gets an adapter."""
        if self.lora is None or self.disabled:
            return False
        if any(f".{name}." in f".{module}." for name in self.lora.modules_to_save):  # here peft minds the dots
            return False
        if any(is_named(name, module) for name in self.spared):
            return False
        if self.lora.targets == (ALL_LINEAR,) or module in self.lora.targets:
            return True  # a whole path stands for itself, whatever its layer
        return any(is_named(name, module) for name in self.lora.targets) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        """Whether the module is in one of the layers that get adapters; what is in none has no number."""
        return self.lora is None or not self.lora.layers or layer_number(module) in self.lora.layers

    def adapts_parameter(self, path: str) -> bool:
        """Whether the parameter, which is no linear layer's, gets one."""
        return not self.disabled and any(is_named(name, path) for name in self.parameters)

    def rank(self, module: str) -> int:
        """The rank of the adapter of `module`; 0 without one."""
        if self.lora is None:
            return 0
        return next((rank for pattern, rank in self.lora.ranks if ends_in(pattern, module)), self.lora.rank)

    def adapts_named(self, module: str) -> bool:
        """The same of an embedding, or the layer that makes the logits: ``all-linear`` leaves them out."""
        return self.lora is not None and self.lora.targets != (ALL_LINEAR,) and self.adapts(module)

    def quantises(self, module: str) -> bool:
        """Whether the weight of the linear layer `module`, which is not the head, is quantised."""
        return self.quantize is not None and not self._has_copy(module)


EVERYTHING = Recipe()
"""All weights are trained as they were loaded."""


def is_named(name: str, module: str) -> bool:
    """Whether `name` is the path of the module or how it ends, from a dot on."""
    return module == name or module.endswith(f".{name}")


def is_within(name: str, module: str) -> bool:
    """Whether the path of the module, or of one that it is part of, ends with `name`: ``norm`` is a ``q_norm``, too.

    So peft finds what is to be copied, and without looking for a dot (utils/other.py, ``_set_trainable``).
    """
    return f"{name}." in f"{module}."


def ends_in(pattern: str, module: str) -> bool:
    """Whether the regular expression `pattern` is the path of the module or its end, from a dot on."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def layer_number(module: str) -> int | None:
    """The number of the layer that the module is in, None outside of all: the first number in its path."""
    found = LAYER_NUMBER.match(module)
    return None if found is None else int(found[1])


def covers(pattern: str, name: str) -> bool:
    """Whether `pattern` (with ``*``, ``?`` and ``[0-9]``) names the parameter, or a module that holds it.

    By its whole path or by the end of it, from a dot on.
    """
    return any(fnmatchcase(f".{name}", tried) for tried in (f"*.{pattern}", f"*.{pattern}.*"))


MOST_NAMED = 12


def check_known(
    option: str, names: Sequence[str], known: Collection[str], means: Callable[[str, str], bool], *, also: str = ""
) -> None:
    """Raise `UsageError` for the first of `names` that means nothing that is `known`: peft and PyTorch say nothing.

    `means`: (name, path) -> whether it does; `also`: a further word that the option takes.
    """
    for name in names:
        if any(means(name, path) for path in known):
            continue
        ends = sorted(
            end for end in {_without_parameter(path).rpartition(".")[2] for path in known} if end.isidentifier()
        )
        shown = ", ".join(
            (*ends[:MOST_NAMED], *(("...",) if len(ends) > MOST_NAMED else ()), *((also,) if also else ()))
        )
        raise UsageError(f"{option} {name}: the model has nothing of its own by this name.", f"Known: {shown}.")


def _without_parameter(path: str) -> str:
    module, _, last = path.rpartition(".")
    return module if last in {"weight", "bias"} and module else path
