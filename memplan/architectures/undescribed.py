"""What does the config of a model say that memplan has no description of, and that a trace answers for?

Which sequences it takes: up to how many positions, how long where nobody says, or none at all (images).  transformers
or diffusers build the model itself; see `memplan.probes.models`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

NO_LENGTH = 1
"""The length of what is no sequence: an image."""

MOST_USUAL = 1024
"""No length that nobody asked for is longer."""

POSITIONS = ("max_position_embeddings", "n_positions", "max_positions")
"""Keys under which configs say how many positions a model has."""


class Kind(NamedTuple):
    """A kind of models."""

    name: str
    limit: str | None = None
    """Key of the most positions it has."""
    usual: str | int | None = None
    """Key of the usual length, or the length itself; None: the limit."""
    unit: str = "sequence"
    """What a micro-batch counts."""
    has_words: bool = False
    """Whether its loss is that of a language model, next or masked words, which other kernels can take over."""
    loops: bool = False
    """Whether PyTorch runs it token by token, where its own kernels are not installed."""


OWN = Kind("a module of its own")

KIND_BY_MODEL_TYPE = {
    "t5": Kind("an encoder-decoder", usual="n_positions"),
    "bart": Kind("an encoder-decoder", limit="max_position_embeddings"),
    "whisper": Kind("a speech model", limit="max_target_positions"),
    "wav2vec2": Kind("a speech model", usual=499),  # frames: ten seconds of 16,000 samples
    "vit": Kind("a vision model", usual=NO_LENGTH, unit="image"),
    "resnet": Kind("a vision model", usual=NO_LENGTH, unit="image"),
    "clip": Kind("a vision and text model", usual=NO_LENGTH, unit="pair"),
    "siglip": Kind("a vision and text model", usual=NO_LENGTH, unit="pair"),
    **dict.fromkeys(
        ("llava", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"), Kind("a vision-language model", usual=MOST_USUAL)
    ),
    "mamba": Kind("a state-space model", usual=MOST_USUAL, loops=True, has_words=True),
    "rwkv": Kind("a recurrent model", usual=MOST_USUAL, loops=True, has_words=True),
    "UNet2DConditionModel": Kind("a network of a diffusion model", usual=NO_LENGTH, unit="image"),
    "FluxTransformer2DModel": Kind("a network of a diffusion model", usual=NO_LENGTH, unit="image"),
}
"""By ``model_type``, or by diffusers' ``_class_name``."""

DIFFUSERS = ("UNet2DConditionModel", "FluxTransformer2DModel")
"""What diffusers builds."""


def type_of(values: Mapping[str, Any]) -> str:
    """``model_type``, or diffusers' ``_class_name``; empty where a config has neither."""
    named = values.get("model_type") or values.get("_class_name")
    return named if isinstance(named, str) else ""


def kind_of(values: Mapping[str, Any]) -> Kind:
    """What is known of a model with this config."""
    limit = next((name for name in POSITIONS if isinstance(values.get(name), int)), None)
    return KIND_BY_MODEL_TYPE.get(type_of(values), Kind("a model without a description", limit=limit, has_words=True))


def most_positions(values: Mapping[str, Any]) -> int | None:
    """The longest sequence that the model has positions for; None where nobody says."""
    limit = kind_of(values).limit
    found = values.get(limit) if limit else None
    return found if isinstance(found, int) and found > 0 else None


def usual_length(values: Mapping[str, Any]) -> int:
    """The length to take where nobody gives one."""
    kind = kind_of(values)
    found = kind.usual if isinstance(kind.usual, int) else values.get(kind.usual or kind.limit or "")
    return min(found, MOST_USUAL) if isinstance(found, int) and found > 0 else MOST_USUAL
