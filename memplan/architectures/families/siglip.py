"""The parameters of SigLIP's vision tower and of the projector that Gemma 3 puts behind it.

Modelled after transformers 5.23, ``SiglipVisionModel`` (models/siglip/modeling_siglip.py) and
``Gemma3MultiModalProjector`` (models/gemma3/modeling_gemma3.py).  Names and shapes only: what they compute on images is
not modelled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.architectures.architecture import Buffer

if TYPE_CHECKING:
    from memplan.architectures.config import Config

    Rows = tuple[tuple[str, tuple[int, ...]], ...]


def vision_parameters(config: Config, text_width: int) -> Rows:
    """Name and shape of every parameter of ``model.vision_tower`` and ``model.multi_modal_projector``."""
    vision = config.part("vision_config")
    vision.choice("model_type", known=("siglip_vision_model",), default="siglip_vision_model")
    width = vision.integer("hidden_size", default=768)
    vision.divided("hidden_size", width, vision.integer("num_attention_heads", default=12))
    rows = list(_embeddings(vision, width))
    inner = vision.integer("intermediate_size", default=3072)
    for number in range(vision.integer("num_hidden_layers", default=12)):
        rows += [(f"encoder.layers.{number}.{name}", shape) for name, shape in _layer(width, inner)]
    rows += _affine("post_layernorm", width)
    if vision.flag("vision_use_head", default=True):
        rows += [(f"head.{name}", shape) for name, shape in _pooling_head(width, inner)]
    return (
        *((f"model.vision_tower.{name}", shape) for name, shape in rows),
        ("model.multi_modal_projector.mm_input_projection_weight", (width, text_width)),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", (width,)),
    )


def vision_buffer(config: Config) -> Buffer:
    """The positions of the patches."""
    patches = _num_patches(config.part("vision_config"))
    return Buffer("model.vision_tower.embeddings.position_ids", (1, patches), "int64")


def _num_patches(vision: Config) -> int:
    num_patches: int = (vision.integer("image_size", default=224) // vision.integer("patch_size", default=16)) ** 2
    return num_patches


def _embeddings(vision: Config, width: int) -> Rows:
    patch = vision.integer("patch_size", default=16)
    channels = vision.integer("num_channels", default=3)
    return (
        ("embeddings.patch_embedding.weight", (width, channels, patch, patch)),
        ("embeddings.patch_embedding.bias", (width,)),
        ("embeddings.position_embedding.weight", (_num_patches(vision), width)),
    )


def _linear(name: str, out: int, width: int) -> Rows:
    return ((f"{name}.weight", (out, width)), (f"{name}.bias", (out,)))


def _affine(name: str, width: int) -> Rows:
    return ((f"{name}.weight", (width,)), (f"{name}.bias", (width,)))


def _layer(width: int, inner: int) -> Rows:
    projections = (f"self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj"))
    return (
        *_affine("layer_norm1", width),
        *(row for name in projections for row in _linear(name, width, width)),
        *_affine("layer_norm2", width),
        *_linear("mlp.fc1", inner, width),
        *_linear("mlp.fc2", width, inner),
    )


def _pooling_head(width: int, inner: int) -> Rows:
    """``SiglipMultiheadAttentionPoolingHead``, with ``torch.nn.MultiheadAttention``'s joint projection."""
    return (
        ("probe", (1, 1, width)),
        ("attention.in_proj_weight", (3 * width, width)),
        ("attention.in_proj_bias", (3 * width,)),
        *_linear("attention.out_proj", width, width),
        *_affine("layernorm", width),
        *_linear("mlp.fc1", inner, width),
        *_linear("mlp.fc2", width, inner),
    )
