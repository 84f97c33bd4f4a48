"""Which parameters get adapters in place of the linear layers that a model had before its experts were stacked?

In transformers 5 the experts of a layer are two stacked parameters, and routers are no linear layers.  peft takes the
names of transformers 4 for them, and ``all-linear`` for all of them: so a dense layer beside the experts that has one
of these names gets no adapter.  Gate and up, which are one parameter now, get twice the rank, unless a pattern of
ranks fits that parameter by its new name.

Sources: peft 0.21, utils/transformers_weight_conversion.py (``_convert_peft_config_moe``), tuners/lora/layer.py
(``ParamWrapper``); transformers 5.23, conversion_mapping.py (``_MODEL_TO_CONVERSION_PATTERN``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import UsageError
from memplan.specs.recipe import ALL_LINEAR
from memplan.specs.values import replace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.specs.recipe import Recipe

_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_QWEN = {
    "gate": "gate.weight",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}
PARAMETER_BY_NAME: dict[str, Mapping[str, str]] = {
    "mixtral": _MIXTRAL,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "olmoe", "qwen3_moe"), _QWEN),
}
"""Model type -> name in transformers 4 -> name of the parameter that it is in now; Qwen2-MoE and gpt-oss have none."""

FUSED = "gate_up_proj"
"""The parameter that was two."""


def converted(recipe: Recipe, model_type: str) -> Recipe:
    """The recipe as peft reads it for a model of this type.

    Raises:
        UsageError: peft cannot adapt the parameters that are meant.
    """
    names = PARAMETER_BY_NAME.get(model_type, {})
    lora = recipe.lora
    if lora is None or not names:
        return recipe
    everything = lora.targets == (ALL_LINEAR,)
    meant = [old for old in names if everything or any(_ends_with(target, old) for target in lora.targets)]
    if not meant:
        return recipe
    halves = [old for old, new in names.items() if new == FUSED]
    missing = [old for old in halves if old not in meant]
    if 0 < len(missing) < len(halves):
        raise UsageError(
            f"{', '.join(set(halves) - set(missing))} and {', '.join(missing)} are one parameter of the experts.",
            f"Name both in --lora-targets: {','.join(halves)}.",
        )
    if lora.dora or lora.dropout:
        raise UsageError(
            f"peft adapts the experts of {model_type}, too, and has neither DoRA nor dropout for them.",
            "Name layers of the attention alone, as in --lora-targets q_proj,k_proj,v_proj,o_proj.",
        )
    # behind the patterns that are there, or over the one that is written alike: where patterns fit, the first counts
    ranks = lora.ranks if missing else tuple((dict(lora.ranks) | {rf".*\.{FUSED}": 2 * lora.rank}).items())
    parameters = tuple(dict.fromkeys(names[old] for old in meant))
    return recipe._replace(lora=replace(lora, ranks=ranks), parameters=parameters, spared=tuple(names))


def _ends_with(target: str, name: str) -> bool:
    return target == name or target.endswith(f".{name}")
