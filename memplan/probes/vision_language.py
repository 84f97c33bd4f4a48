"""What is a model trained on that reads images among words?

================================  ====================================================================================
images of one size                one image a sequence, whose tokens are among those of the sequence
(LLaVA, PaliGemma)
patches (Qwen2-VL, 2.5-VL, 3-VL)  as many as make every token of the sequence one of an image: no image is larger
================================  ====================================================================================

Sizes of patches are numbers that a model of transformers reads in Python, so that they stay on the host; on a GPU it
holds a copy.  Positions in three dimensions are given to the model, which would else compute them from the ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Maker = Callable[[int, int], dict[str, torch.Tensor]]

PATCHES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FIXED = ("llava", "paligemma")
VISION_LANGUAGE = (*FIXED, *PATCHES)
"""``model_type`` of what is known here."""

COORDINATES = 3
"""Time, height and width."""


def image_and_words(config: Any, words: Maker, dtype: torch.dtype) -> tuple[Maker, str]:
    """The inputs `words` makes, with images among them; what there is to say about these."""
    if config.model_type in PATCHES:
        return _patches(
            config.vision_config, words, dtype
        ), "every token is one of an image, the most that there can be"
    vision = config.vision_config
    size = vision.image_size
    tokens = (size // vision.patch_size) ** 2

    def inputs(micro_batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
        made = words(micro_batch_size, seq_len)
        made["pixel_values"] = torch.randn(micro_batch_size, vision.num_channels, size, size, dtype=dtype)
        if config.model_type == "paligemma":  # tells the prompt from the answer
            made["token_type_ids"] = torch.zeros(micro_batch_size, seq_len, dtype=torch.int64)
        return made

    return inputs, f"one image of {size} x {size} pixels a sequence, {tokens:,} of its tokens"


def _patches(vision: Any, words: Maker, dtype: torch.dtype) -> Maker:
    """One image of 2 x 2n patches a sequence, of which each square becomes a token."""
    merged = vision.spatial_merge_size
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    def inputs(micro_batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
        made = words(micro_batch_size, seq_len)
        patches = micro_batch_size * seq_len * merged**2
        made["pixel_values"] = torch.randn(patches, numbers, dtype=dtype)
        made["image_grid_thw"] = torch.tensor([[1, merged, merged * seq_len]] * micro_batch_size, device="cpu")
        made["position_ids"] = torch.zeros(COORDINATES, micro_batch_size, seq_len, dtype=torch.int64)
        return made

    return inputs
