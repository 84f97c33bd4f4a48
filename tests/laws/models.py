"""Small models of every family kind that matters to the laws, and setups to draw from."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from memplan.architectures.registry import read_architecture
from memplan.estimation.dimensions import dimensions
from memplan.estimation.step import Recordings
from memplan.memory.events import Sizes
from memplan.specs.adapter import Lora
from memplan.specs.training import IN_BACKWARD, OPTIMIZERS, QUANTIZATIONS, Setup
from memplan.specs.values import replace

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 200,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 6}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 96,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 4096,
    "vocab_size": 1000,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4}
CONFIGS = {"llama": LLAMA, "qwen2": QWEN2, "gpt2": GPT2, "mixtral": MIXTRAL}

RECORDINGS = {name: Recordings(read_architecture(config, name)) for name, config in CONFIGS.items()}

models = st.sampled_from(sorted(CONFIGS))
choices = {
    "micro_batch_size": st.integers(1, 9),
    "seq_len": st.integers(1, 700),
    "precision": st.sampled_from(["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed"]),
    "attention": st.sampled_from(["eager", "sdpa", "flash"]),
}
checkpointings = {
    "activation_checkpointing": st.sampled_from(["none", "selective", "save-attention", "full", "every-2", "every-3"])
}
reentrant = {"activation_checkpointing": st.sampled_from(["full", "every-2"]), "reentrant": st.just(True)}


def _any(**settings: Any) -> st.SearchStrategy[Setup]:
    settings = choices | settings
    return st.builds(Setup, **settings, **checkpointings) | st.builds(Setup, **settings, **reentrant)


setups = _any(
    gradient_accumulation_steps=st.integers(1, 4),
    data_parallel_size=st.sampled_from([1, 2]),
    optimizer=st.sampled_from(sorted(set(OPTIMIZERS) - set(IN_BACKWARD))),
)
"""Those whose gradients can be accumulated and exchanged."""
flattened = _any(
    gradient_accumulation_steps=st.integers(1, 4),
    batching=st.sampled_from(["padding-free", "packed"]),
    micro_batch_size=st.integers(2, 9),
    seq_len=st.integers(2, 700),
)
"""Several sequences end to end in one row."""
all_setups = setups | flattened | _any(optimizer=st.sampled_from(IN_BACKWARD))

_adapted = _any(
    gradient_accumulation_steps=st.integers(1, 3),
    optimizer=st.sampled_from(["adamw", "sgd"]),
    quantize=st.sampled_from([None, *QUANTIZATIONS]),
    lora=st.builds(
        Lora,
        rank=st.integers(1, 64),
        dropout=st.sampled_from([0.0, 0.1]),
        dtype=st.sampled_from(["fp32", "base"]),
        dora=st.booleans(),
    ),
    loss=st.sampled_from(["full", "tiled"]),
)


def _of_attention(model: str, setup: Setup) -> tuple[str, Setup]:
    """Of a mixture adapters beside attention alone: peft has none for its experts that could be dropped or bent."""
    assert setup.lora is not None
    if model != "mixtral":
        return model, setup
    return model, replace(setup, lora=replace(setup.lora, targets=("q_proj", "v_proj", "o_proj")))


adapted = st.builds(_of_attention, models, _adapted)
"""A model and a setup with adapters, most of them beside a base that is quantised."""


def peaks(model: str, setup: Setup, *, first_step: bool = False) -> Any:
    """The closed-form peaks of a setup."""
    program = RECORDINGS[model].program(setup)
    sizes = Sizes(dimensions(setup))
    return program.peaks(sizes, setup.gradient_accumulation_steps, first_step=first_step)
