"""Models that memplan does not describe are answered by a trace of the library's own: sizes, inputs, limits."""

from __future__ import annotations

from importlib import util
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import memplan
from memplan import api
from memplan.architectures.undescribed import KIND_BY_MODEL_TYPE, usual_length
from memplan.catalog.models import read_config, read_models
from memplan.errors import UnknownModelError, UsageError
from memplan.probes.inputs import samples_of
from memplan.probes.models import model_of
from memplan.specs.training import Setup

if TYPE_CHECKING:
    from memplan.catalog.models import KnownModel

UNDESCRIBED = [model for model in read_models() if not model.is_modelled]

HEADS = {
    "google/vit-huge-patch14-224-in21k": 2 * 1280 + 2 - (1280 * 1280 + 1280),
    "facebook/wav2vec2-base": 32 * 768 + 32,
    "facebook/wav2vec2-large": 32 * 1024 + 32,
}
"""Parameters of the trained head (two classes in place of the pooler; 32 characters) beside the catalogue's."""

BART = {
    "model_type": "bart",
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "is_encoder_decoder": True,
}


def test_every_model_of_the_catalogue_is_answered() -> None:
    """By the formula, by a trace, or by one trace at a time; a new kind of models is named."""
    assert {model.model_type for model in UNDESCRIBED} <= set(KIND_BY_MODEL_TYPE)
    assert {model.answered_by for model in read_models()} == {"formula", "trace", "one trace"}


@pytest.mark.parametrize("known", UNDESCRIBED, ids=lambda known: known.id)
def test_the_library_builds_what_the_catalogue_says(known: KnownModel) -> None:
    """GIVEN a config WHEN its library builds it without numbers THEN it has the catalogue's parameters."""
    if known.model_type.endswith("Model"):
        pytest.importorskip("diffusers")
    values, name = read_config(known.id)
    with torch.device("meta"):
        built = model_of(values, name).build(Setup(attention="eager", seq_len=16))
    num = sum(parameter.numel() for parameter in built.module.parameters())
    if known.status.startswith("exact under transformers 4"):
        assert num == known.parameters
    else:
        assert num == known.parameters + HEADS.get(known.id, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["t5-small", "bart-base", "whisper-tiny", "vit-base", "resnet-50", "clip-base", "wav2vec2"]
)
def test_a_step_of_it(name: str) -> None:
    """Parameters in bf16, gradients as large, two moments of AdamW; and it grows with the micro-batch."""
    one, two = (memplan.estimate(name, micro_batch=b) for b in (1, 2))
    num = one.model.num_parameters
    assert one.parameter_bytes == pytest.approx(2 * num, rel=0.01)
    assert one.gradient_bytes == pytest.approx(2 * num, rel=0.02)
    assert one.optimizer_state_bytes == pytest.approx(4 * num, rel=0.02)
    assert one.kept_activation_bytes < two.kept_activation_bytes <= 2 * one.kept_activation_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable-diffusion-v1-5", "sdxl", "flux"])
def test_a_network_of_a_diffusion_model(name: str) -> None:
    """The same with diffusers' networks."""
    pytest.importorskip("diffusers")
    found = memplan.estimate(name)
    assert found.parameter_bytes == pytest.approx(2 * found.model.num_parameters, rel=0.01)


def test_kept_bytes_of_an_encoder_decoder_are_those_of_autograd() -> None:
    """GIVEN a small BART on the CPU WHEN its saved tensors are counted THEN the trace keeps as much."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(**BART, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    config.use_cache = False
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").train()
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    ids = torch.randint(100, (2, 64))
    kept: dict[int, int] = {}

    def pack(x: Any) -> Any:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own and x.dtype.is_floating_point:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(input_ids=ids, labels=ids)
    found = memplan_kept(BART, micro_batch_size=2, seq_len=64)
    assert output.loss.requires_grad
    assert found == pytest.approx(sum(kept.values()), rel=0.02)


def memplan_kept(config: dict[str, Any], **sizes: Any) -> int:
    """Kept bytes by a trace, before rounding."""
    from memplan.probes.trace import trace_training

    trace = trace_training(config, Setup(precision="fp32", dropout=0.0, attention="eager", **sizes))
    return sum(event.num_bytes for event in trace.kept if event.dtype.startswith(("float", "fp", "bf")))


def test_more_positions_than_the_model_has() -> None:
    """A trace without numbers would not notice."""
    with pytest.raises(UsageError, match="positions for 1024"):
        memplan.estimate("bart-base", seq_len=2048)


def test_what_runs_token_by_token_is_refused() -> None:
    """A plan would take many long traces; one trace can be asked for."""
    with pytest.raises(UnknownModelError, match="token by token") as caught:
        memplan.estimate("mamba-130m")
    assert "memplan trace" in caught.value.cure
    found = api.trace("mamba-130m", seq_len=8)
    assert found.estimate.model.num_parameters == 129_135_360


def test_without_the_library_the_refusal_is_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """GIVEN no transformers THEN it is said what would answer."""
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(UnknownModelError, match="encoder-decoder") as caught:
        memplan.estimate("t5-small")
    assert "memplan trace" in caught.value.cure


@pytest.mark.parametrize(
    ("values", "length"),
    [
        ({"model_type": "t5", "n_positions": 512}, 512),
        ({"model_type": "whisper", "max_target_positions": 448}, 448),
        ({"model_type": "vit", "image_size": 224}, 1),
        ({"model_type": "wav2vec2"}, 499),
        ({"model_type": "never_heard_of", "max_position_embeddings": 131072}, 1024),
    ],
)
def test_usual_lengths(values: dict[str, Any], length: int) -> None:
    """By the config's own key, at most 1,024."""
    assert usual_length(values) == length


def test_samples_of_frames() -> None:
    """wav2vec2: 499 frames of ten seconds at 16 kHz, 20 ms apart, the first of 25 ms."""
    kernels, strides = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
    assert samples_of(1, kernels, strides) == 400
    assert samples_of(499, kernels, strides) == 498 * 320 + 400
