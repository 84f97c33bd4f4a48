"""What is each kind of model trained on, and what is its loss?

=================  ===================================================================================================
token ids          ids and labels of (b, s); an encoder-decoder's targets are as long as its inputs
images             pixels of the size that the config names, one class each
images and texts   the same beside texts of as many tokens as the model has positions for (contrastive)
log-mel frames     as many as the encoder has positions for, and labels of (b, s)
audio samples      as many as make s frames, and a log-probability for each character (the start of CTC)
latents            noise, a timestep and a text for each image; mean squared error of the prediction
=================  ===================================================================================================

Left out: what data collators add that no model needs (attention masks without padding), and CTC's table of paths.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone gives it

from memplan.probes.vision_language import VISION_LANGUAGE, image_and_words
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from memplan.specs.training import Setup

    Maker = Callable[[int, int], dict[str, torch.Tensor]]
    Loss = Callable[[Any], torch.Tensor]

IGNORED = -100
"""The label of a token that has none."""

FLUX_IMAGE_TOKENS = 4096
"""Of 1024 x 1024 pixels: latents of 128 x 128, two by two a token (black-forest-labs/FLUX.1-dev)."""

FLUX_TEXT_TOKENS = 512
STABLE_DIFFUSION_TEXT_TOKENS = 77


NO_WORKSPACES = "cuDNN's workspaces are left out"
SAMPLES = "one audio frame a token of --seq-len; no masks at random (SpecAugment), and CTC's table of paths is left out"


class Inputs(NamedTuple):
    """How a model is called in training."""

    make: Maker
    """(micro-batch, length) -> keyword arguments, on the default device."""
    loss_of: Loss | None = None
    """Output of the model -> loss; None: it has its own."""
    said: tuple[str, ...] = ()
    """What there is to say about them."""


def token_inputs(vocab_size: int) -> Maker:
    """What language models are trained on: int64 ids and labels at random, on the default device."""

    def inputs(micro_batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
        shape = (micro_batch_size, seq_len)
        return {name: _ids(vocab_size, shape) for name in ("input_ids", "labels")}

    return inputs


def _ids(most: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(most, shape, dtype=torch.int64)


def flattened(make: Maker, setup: Setup) -> dict[str, Any]:
    """Sequences end to end in one row, as ``DataCollatorForLanguageModeling(padding_free=True)`` of TRL 1.16 has them.

    They are as equally long as can be, on the default device; longest sequences are numbers of Python.  The first token
    of each is nobody's next one.
    """
    tokens, num = setup.tokens_per_micro_batch, setup.num_sequences
    ends = [tokens * n // num for n in range(num + 1)]
    lengths = [end - start for start, end in pairwise(ends)]
    inputs: dict[str, Any] = make(1, tokens)
    device = inputs["input_ids"].device
    if device.type != "meta":
        inputs["labels"][0, ends[:-1]] = IGNORED

    def placed(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts).to(device)

    with torch.device("cpu"):
        inputs["position_ids"] = placed([torch.arange(n) for n in lengths])[None]
        inputs["seq_idx"] = placed([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])[None]
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            inputs[name] = torch.tensor(ends, dtype=torch.int32).to(device)
    return {**inputs, "max_length_q": max(lengths), "max_length_k": max(lengths)}


def class_inputs(module: Any) -> Inputs:
    """Ids at random, and the first class for each sequence."""
    vocab_size = int(module.config.get_text_config().vocab_size)

    def inputs(micro_batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
        labels = torch.zeros((micro_batch_size,), dtype=torch.int64)
        return {"input_ids": _ids(vocab_size, (micro_batch_size, seq_len)), "labels": labels}

    return Inputs(inputs)


def transformers_inputs(module: Any, dtype: torch.dtype) -> Inputs:
    """What a model of transformers is trained on, by its main input; floating-point inputs in `dtype`."""
    config = module.config
    main = module.main_input_name
    if config.model_type in VISION_LANGUAGE:
        make, said = image_and_words(config, token_inputs(int(config.get_text_config().vocab_size)), dtype)
        return Inputs(make, said=(said,))
    if hasattr(config, "vision_config") and hasattr(config, "projection_dim"):
        length = config.text_config.max_position_embeddings
        said = (
            f"pairs of an image of {_size(config.vision_config)} pixels and a text of {length} tokens, {NO_WORKSPACES}"
        )
        return Inputs(_image_text(config, dtype), said=(said,))
    if main == "pixel_values":
        return Inputs(_images(config, dtype), said=(f"images of {_size(config)} pixels, {NO_WORKSPACES}",))
    if main == "input_features":
        return Inputs(_log_mel(config, dtype), said=(f"{2 * config.max_source_positions:,} log-mel frames a sequence",))
    if main == "input_values":
        return Inputs(_samples(config, dtype), _log_probabilities, said=(SAMPLES,))
    targets = ("targets are as long as inputs",) if config.is_encoder_decoder else ()
    return Inputs(token_inputs(int(config.get_text_config().vocab_size)), said=targets)


def _height_and_width(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", 224)
    return (size[0], size[1]) if isinstance(size, (tuple, list)) else (size, size)


def _size(config: Any) -> str:
    return " x ".join(map(str, _height_and_width(config)))


def _pixels(config: Any, num: int, dtype: torch.dtype) -> torch.Tensor:
    height, width = _height_and_width(config)
    return torch.randn(num, getattr(config, "num_channels", 3), height, width, dtype=dtype)


def _images(config: Any, dtype: torch.dtype) -> Maker:
    def inputs(micro_batch_size: int, _: int) -> dict[str, torch.Tensor]:
        labels = _ids(config.num_labels, (micro_batch_size,))
        return {"pixel_values": _pixels(config, micro_batch_size, dtype), "labels": labels}

    return inputs


def _image_text(config: Any, dtype: torch.dtype) -> Maker:
    text = config.text_config

    def inputs(micro_batch_size: int, _: int) -> dict[str, Any]:
        return {
            "input_ids": _ids(text.vocab_size, (micro_batch_size, text.max_position_embeddings)),
            "pixel_values": _pixels(config.vision_config, micro_batch_size, dtype),
            "return_loss": True,
        }

    return inputs


def _log_mel(config: Any, dtype: torch.dtype) -> Maker:
    frames = 2 * config.max_source_positions  # the first convolutions halve them

    def inputs(micro_batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
        return {
            "input_features": torch.randn(micro_batch_size, config.num_mel_bins, frames, dtype=dtype),
            "labels": _ids(config.vocab_size, (micro_batch_size, seq_len)),
        }

    return inputs


def samples_of(frames: int, kernels: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Samples that a stack of convolutions without padding turns into so many frames."""
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        frames = (frames - 1) * stride + kernel
    return frames


def _samples(config: Any, dtype: torch.dtype) -> Maker:
    def inputs(micro_batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
        num = samples_of(seq_len, tuple(config.conv_kernel), tuple(config.conv_stride))
        return {"input_values": torch.randn(micro_batch_size, num, dtype=dtype)}

    return inputs


def _log_probabilities(output: Any) -> torch.Tensor:
    """``log_softmax(logits, dtype=float32)``, as the CTC loss of transformers begins."""
    return F.log_softmax(output.logits, dim=-1, dtype=torch.float32).sum()


# -- diffusers ---------------------------------------------------------------------------------------------------------


def _mean_squared_error(output: Any) -> torch.Tensor:
    """Against noise, in fp32, as the training scripts of diffusers have it."""
    predicted = output[0]
    return F.mse_loss(predicted.float(), torch.empty_like(predicted).float())


def unet_inputs(config: Any, dtype: torch.dtype) -> Inputs:
    """A UNet: latents of ``sample_size`` squared, a text of 77 tokens; pooled text and sizes where it asks (SDXL)."""

    def inputs(micro_batch_size: int, _: int) -> dict[str, Any]:
        size = config.sample_size
        made: dict[str, Any] = {
            "sample": torch.randn(micro_batch_size, config.in_channels, size, size, dtype=dtype),
            "timestep": _ids(1000, (micro_batch_size,)),
            "encoder_hidden_states": torch.randn(
                micro_batch_size, STABLE_DIFFUSION_TEXT_TOKENS, config.cross_attention_dim, dtype=dtype
            ),
            "return_dict": False,
        }
        if getattr(config, "addition_embed_type", None) == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            made["added_cond_kwargs"] = {
                "text_embeds": torch.randn(micro_batch_size, pooled, dtype=dtype),
                "time_ids": torch.randn(micro_batch_size, 6, dtype=dtype),
            }
        return made

    size = f"latents of {config.sample_size} x {config.sample_size} and a text of {STABLE_DIFFUSION_TEXT_TOKENS} tokens"
    return Inputs(inputs, _mean_squared_error, (f"{size}, {NO_WORKSPACES}",))


def flux_inputs(config: Any, dtype: torch.dtype) -> Inputs:
    """FLUX's: 4,096 image tokens (1024 x 1024 pixels) and a text of 512."""

    def inputs(micro_batch_size: int, _: int) -> dict[str, Any]:
        image, text = FLUX_IMAGE_TOKENS, FLUX_TEXT_TOKENS
        made: dict[str, Any] = {
            "hidden_states": torch.randn(micro_batch_size, image, config.in_channels, dtype=dtype),
            "encoder_hidden_states": torch.randn(micro_batch_size, text, config.joint_attention_dim, dtype=dtype),
            "pooled_projections": torch.randn(micro_batch_size, config.pooled_projection_dim, dtype=dtype),
            "timestep": torch.rand(micro_batch_size, dtype=dtype),
            "img_ids": torch.zeros(image, len(config.axes_dims_rope), dtype=dtype),
            "txt_ids": torch.zeros(text, len(config.axes_dims_rope), dtype=dtype),
            "return_dict": False,
        }
        if config.guidance_embeds:
            made["guidance"] = torch.ones(micro_batch_size, dtype=dtype)
        return made

    said = f"{FLUX_IMAGE_TOKENS:,} image tokens (1024 x 1024 pixels) and a text of {FLUX_TEXT_TOKENS}, {NO_WORKSPACES}"
    return Inputs(inputs, _mean_squared_error, (said,))


DIFFUSERS_INPUTS_BY_CLASS: dict[str, Callable[[Any, torch.dtype], Inputs]] = {
    "UNet2DConditionModel": unet_inputs,
    "FluxTransformer2DModel": flux_inputs,
}
"""diffusers' ``_class_name`` -> what it is trained on."""


def diffusion_network(values: dict[str, Any], dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    """The network of a diffusion model, built by diffusers, and what it is trained on."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    name = values["_class_name"]
    maker = getattr(diffusers, name)
    model: nn.Module = maker.from_config({k: v for k, v in values.items() if not k.startswith("_")}).to(dtype)
    return model, DIFFUSERS_INPUTS_BY_CLASS[name](model.config, dtype)
