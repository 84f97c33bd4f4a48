"""What is a traced model trained for, where its own forward pass does not take the loss?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from memplan.probes.distillation import find_teacher
from memplan.probes.heads import language_model
from memplan.probes.odds import Odds
from memplan.probes.preference import REPORTED, Preference, add_fused_head
from memplan.probes.rewards import Rewards
from memplan.specs.training import DISTILLATION, PREFERRED

if TYPE_CHECKING:
    from torch import nn

    from memplan.probes.autocast import CudaAutocast
    from memplan.probes.models import TracedModel
    from memplan.probes.training import Objective
    from memplan.specs.training import Setup


def find_objective(
    model: TracedModel, module: nn.Module, setup: Setup, autocast: CudaAutocast | None
) -> Objective | None:
    """What the module is trained for; None: its own loss.

    Raises:
        UsageError: the module is none of transformers that could be, or its teacher does not fit.
    """
    if setup.objective == "reward":
        return Rewards(module, setup)
    if setup.objective == "orpo":
        language_model(module, "the objective")
        return Odds(module, setup)
    if setup.objective == DISTILLATION:
        return find_teacher(model, module, setup)
    if setup.objective not in PREFERRED:
        return None
    reference = None
    if setup.has_reference and setup.lora is None:
        with torch.device("meta"):
            reference = model.build(setup).module.eval()
        add_fused_head(reference, setup, autocast, ())
    add_fused_head(module, setup, autocast, REPORTED)
    return Preference(module, reference, setup, autocast)
