"""Models that read images among words: a trace keeps what a run with numbers keeps."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from memplan.probes.inputs import token_inputs
from memplan.probes.models import model_of
from memplan.probes.trace import trace_training
from memplan.probes.vision_language import VISION_LANGUAGE, image_and_words
from memplan.specs.training import Setup

WORDS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"image_size": 56, "patch_size": 14}
IMAGE_TOKEN = 999
MROPE = {"type": "mrope", "mrope_section": [2, 3, 3]}


def qwen(name: str, vision: dict[str, Any]) -> dict[str, Any]:
    """A small Qwen-VL."""
    words = {"model_type": f"{name}_text", "vocab_size": 1000, "num_key_value_heads": 2, "rope_scaling": MROPE}
    return {
        "model_type": name,
        "text_config": {**WORDS, **words},
        "vision_config": {"model_type": name, "depth": 2, "num_heads": 2, "patch_size": 14, **vision},
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": 998,
        "vision_start_token_id": 997,
        "vision_end_token_id": 996,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "vocab_size": 1000, **WORDS},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **EYES, **IMAGE},
        "image_token_index": IMAGE_TOKEN,
    },
    "paligemma": {
        "model_type": "paligemma",
        "text_config": {"model_type": "gemma", "vocab_size": 1000, "num_key_value_heads": 1, "head_dim": 16, **WORDS},
        "vision_config": {"model_type": "siglip_vision_model", "projection_dim": 64, **EYES, **IMAGE},
        "projection_dim": 64,
        "hidden_size": 64,
        "image_token_index": IMAGE_TOKEN,
    },
    "qwen2_vl": qwen("qwen2_vl", {"embed_dim": 32, "hidden_size": 64}),
    "qwen2_5_vl": qwen(
        "qwen2_5_vl",
        {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
    ),
}


class Saved:
    """A tensor that autograd keeps, as long as it does: LLaVA throws the last layer of its eyes away."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


SETUP = Setup(precision="fp32", dropout=0.0, attention="eager", micro_batch_size=2, seq_len=64)


@pytest.mark.parametrize("name", CONFIGS)
def test_kept_bytes_are_those_of_autograd(name: str) -> None:
    """GIVEN a small model on the CPU, with images, WHEN its saved tensors are counted THEN the trace keeps as much."""
    built = model_of(CONFIGS[name]).build(SETUP)
    model: Any = built.module.train()
    inputs = built.make_inputs(SETUP.micro_batch_size, SETUP.seq_len)
    model.config.image_token_id = IMAGE_TOKEN
    images = inputs["pixel_values"].shape[0]
    places = 16 if images == SETUP.micro_batch_size else SETUP.seq_len  # tokens of an image
    inputs["input_ids"][:] = 5
    inputs["input_ids"][:, :places] = IMAGE_TOKEN
    saved: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(x: Any) -> Saved:
        one = Saved(x.detach())  # with its graph an output would hold itself
        saved.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        loss = model(**inputs).loss  # all else that it returns is let go, as the Trainer does
    assert loss.requires_grad
    there = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), *inputs.values())}
    storages = [one.tensor.untyped_storage() for one in saved if one.tensor.dtype.is_floating_point]
    kept = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in there}
    trace = trace_training(CONFIGS[name], SETUP)
    found = sum(event.num_bytes for event in trace.kept if event.dtype.startswith("fp"))
    assert found == pytest.approx(sum(kept.values()), rel=0.001)


def test_every_kind_is_tried() -> None:
    """Qwen3-VL is shaped like Qwen2-VL and takes the same inputs."""
    assert {*CONFIGS, "qwen3_vl"} == set(VISION_LANGUAGE)


def test_images_are_said() -> None:
    """What the trace took for images stands in its answer."""
    trace = trace_training(CONFIGS["llava"], SETUP)
    assert "inputs: one image of 56 x 56 pixels a sequence, 16 of its tokens" in trace.assumptions


def test_patches_make_every_token_one_of_an_image() -> None:
    """Four patches a token, each of 3 x 2 x 14 x 14 numbers."""
    with torch.device("meta"):
        model: Any = model_of(CONFIGS["qwen2_vl"]).build(SETUP).module
    make, _ = image_and_words(model.config, token_inputs(1000), torch.float32)
    assert make(3, 40)["pixel_values"].shape == (3 * 40 * 4, 3 * 2 * 14 * 14)
