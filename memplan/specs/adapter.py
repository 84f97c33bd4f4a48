"""What is trained in place of the weights: low-rank adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import UsageError
from memplan.specs.ranks import check_rank
from memplan.specs.recipe import ALL_LINEAR
from memplan.specs.values import dataclass, replace

if TYPE_CHECKING:
    from collections.abc import Sequence

ADAPTER_DTYPES = ("fp32", "base")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of low rank beside frozen layers (Hu et al., 2021), as peft adds them.

    rsLoRA (Kalajdzievski, 2023) scales by another number and takes the same bytes.
    """

    rank: int
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Names of linear layers and embeddings, or ``all-linear`` alone: all linear ones but the head."""
    dropout: float = 0.0
    """Probability before the first of the two matrices."""
    dtype: str = "fp32"
    """``fp32``, as peft keeps adapters beside half-precision weights (``autocast_adapter_dtype``), or ``base``: that of
    the weights."""
    dora: bool = False
    """Directions and magnitudes apart (DoRA, Liu et al., 2024)."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules of which a full copy is trained."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers that get adapters, ascending; empty: all (``layers_to_transform``)."""
    ranks: tuple[tuple[str, int], ...] = ()
    """(pattern, rank) of what has another rank: regular expressions of a path or the end of it, of which the first that
    fits counts (``rank_pattern``)."""

    def __post_init__(self) -> None:
        for rank in (self.rank, *(rank for _, rank in self.ranks)):
            check_rank(rank)
        check_names("LoRA has no targets.", self.targets, "Name linear layers, as in q_proj,v_proj, or say all-linear.")
        if ALL_LINEAR in self.targets and len(self.targets) > 1:
            raise UsageError(f"{ALL_LINEAR} stands beside other targets.", f"Say {ALL_LINEAR} alone, or names alone.")
        if ALL_LINEAR in self.targets and self.layers:
            raise UsageError(
                f"peft's layers_to_transform does not go with {ALL_LINEAR}.",
                "Name the targets, as in --lora-targets q_proj,v_proj.",
            )
        if self.modules_to_save:
            check_names("modules_to_save has an empty name.", self.modules_to_save, "Name modules, as in embed_tokens.")
        dropout: object = self.dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise UsageError(f"The dropout of LoRA is {self.dropout!r}.", "Give a probability from 0 up to, not 1.")
        if self.dtype not in ADAPTER_DTYPES:
            raise UsageError(f"The dtype of LoRA is {self.dtype!r}.", f"Known: {', '.join(ADAPTER_DTYPES)}.")


CLASSIFIER_HEADS = ("classifier", "score")
"""Names of layers that tell classes apart, of which peft trains a full copy (SEQ_CLS, TOKEN_CLS in peft_model.py)."""


def with_head(lora: Lora) -> Lora:
    """Adapters of a classifier, as ``PeftModelForSequenceClassification`` and ``...TokenClassification`` have them."""
    return replace(lora, modules_to_save=(*lora.modules_to_save, *CLASSIFIER_HEADS))


def check_token_targets(lora: Lora) -> None:
    """Raise `UsageError` where the head of a classifier of tokens would get an adapter.

    ``PeftModelForTokenClassification`` names the head as a module to save after adapters were added, and the two do not
    go together (a TypeError of peft 0.21).
    """
    if lora.targets == (ALL_LINEAR,) or set(lora.targets) & set(CLASSIFIER_HEADS):
        raise UsageError(
            f"{', '.join(lora.targets)} has the head of a classifier of tokens in it, and peft fails on that.",
            "Name the other layers, as in --lora-targets q_proj,v_proj (of BERT: query,value).",
        )


def check_names(fault: str, names: Sequence[object], cure: str) -> None:
    """Raise `UsageError` unless all of `names` are names and there is one."""
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise UsageError(fault, cure)


def lora_record(lora: Lora) -> dict[str, Any]:
    """Adapters as JSON."""
    return {
        "rank": lora.rank,
        "targets": list(lora.targets),
        "dropout": lora.dropout,
        "dtype": lora.dtype,
        "dora": lora.dora,
        "modules_to_save": list(lora.modules_to_save),
        "layers": list(lora.layers),
        "ranks": dict(lora.ranks),
    }
