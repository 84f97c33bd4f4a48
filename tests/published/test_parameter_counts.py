"""Does the recorded table of parameters hold exactly as many numbers as the real model?

The counts are those of the catalogue's index: models built with transformers 5.23, compared there with the counts that
their publishers' files hold.
"""

from math import prod

import pytest

from memplan.architectures.architecture import record
from memplan.architectures.registry import READER_BY_MODEL_TYPE, read_architecture
from memplan.catalog.models import read_config, read_models
from memplan.operators.tape import Numerics

NOT_MODELLED = frozenset(
    {
        "FluxTransformer2DModel",
        "UNet2DConditionModel",
        "bart",
        "clip",
        "mamba",
        "resnet",
        "rwkv",
        "t5",
        "vit",
        "wav2vec2",
        "whisper",
    }
)
"""Kinds of models of the catalogue that have no description yet.  A line goes when its family comes."""

MODELS = read_models()


def test_every_kind_of_model_is_either_modelled_or_named_as_not():
    kinds = {model.model_type for model in MODELS}
    assert kinds - NOT_MODELLED <= set(READER_BY_MODEL_TYPE), "a family was dropped"
    assert kinds >= NOT_MODELLED, "no model of the catalogue is of this kind"


@pytest.mark.parametrize("model", MODELS, ids=[model.id for model in MODELS])
def test_the_recorded_parameters_are_those_of_the_real_model(model):
    if model.model_type in NOT_MODELLED and model.model_type not in READER_BY_MODEL_TYPE:
        pytest.skip(f"{model.model_type} is not modelled yet")
    values, origin = read_config(model.id)
    architecture = read_architecture(values, origin)
    table = record(architecture, Numerics("bf16"), attention=architecture.attentions[0]).parameters()
    assert sum(prod(row.shape) for row in table) == model.parameters
