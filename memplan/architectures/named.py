"""Is there something in a model by every name that a recipe gives?  peft and PyTorch pass over names without a meaning.

Layers of one kind are recorded once; what a name means is looked up in all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import UsageError
from memplan.specs.adapter import CLASSIFIER_HEADS
from memplan.specs.conversions import PARAMETER_BY_NAME
from memplan.specs.ranks import check_adapters, check_copies, check_nested, check_ranks
from memplan.specs.recipe import check_known, covers, is_within
from memplan.specs.training import CLASSIFICATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memplan.architectures.architecture import Recording
    from memplan.specs.recipe import Recipe


def check_names(recording: Recording, recipe: Recipe, objective: str) -> None:
    """Raise `UsageError` where nothing of the model is what the recipe names."""
    asked = list(_asked(recording))

    def known(*questions: str) -> set[str]:
        return {name for question, name, _ in asked if question in questions}

    lora = recipe.lora
    if lora is not None:
        linear = known("adapts", "adapts_named")
        linear |= set(PARAMETER_BY_NAME.get(recording.architecture.model_type, ()))
        if not linear:
            raise UsageError("memplan knows no linear layer of this model.", "Leave --lora-rank out.")
        check_adapters(recipe, lora, linear)
        adapted = list(dict.fromkeys(name for question, name, said in asked if question.startswith("adapts") and said))
        check_ranks(lora, adapted)
        check_copies(lora, adapted, layers=recording.architecture.layer_prefix.partition(".{")[0])
        heads = CLASSIFIER_HEADS if objective in CLASSIFICATIONS else ()  # peft names them all, and a model has one
        copied = [name for name in lora.modules_to_save if name not in heads]
        check_known("--modules-to-save", copied, known("copies"), is_within)
        check_nested(lora, known("copies"))
    check_known("--freeze", recipe.freeze, known("trains", "trains_adapter"), covers)


def _asked(recording: Recording) -> Iterator[tuple[str, str, Any]]:
    """(question, full name, answer) of all that was asked of the recipe, in every layer of the model."""
    pieces = [("", recording.stem), ("", recording.head)]
    prefix = f"{recording.architecture.layer_prefix}."
    pieces += [(prefix.format(place), recording.kinds[number]) for place, number in enumerate(recording.order)]
    for path, piece in pieces:
        for (question, name), said in piece.tape.asked.items():
            yield question, path + name, said
