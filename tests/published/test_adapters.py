"""LoRA, DoRA, frozen parts and 4-bit bases: the formula against peft and bitsandbytes themselves.

The modules are theirs, run on the meta device with CUDA's choice of kernels.  Kept bytes, parameters, gradients and
optimizer states have to agree byte for byte in every family; the peaks within 1 % where the model is llama-like, and
within 2 % elsewhere (Python variables of a forward that hold a tensor longer than anything needs it).
"""

from __future__ import annotations

import warnings
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch

from memplan.architectures.registry import read_architecture
from memplan.catalog.models import read_config
from memplan.errors import UsageError
from memplan.estimation.estimate import Estimator
from memplan.estimation.step import Recordings
from memplan.probes.adapters import with_adapters
from memplan.probes.models import transformers_model
from memplan.probes.quantised import quantise
from memplan.probes.trace import trace_training
from memplan.specs.adapter import Lora
from memplan.specs.conversions import PARAMETER_BY_NAME
from memplan.specs.training import Setup
from memplan.specs.values import replace
from tests.published.test_formula_equals_trace import CONFIG_BY_MODEL_TYPE, EAGER_ONLY, kernel_to_force
from tests.support.witnesses import compare

if TYPE_CHECKING:
    from tests.support.witnesses import Both

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "phi3", "olmo2", "granite")
OTHERS = tuple(sorted(set(CONFIG_BY_MODEL_TYPE) - set(LLAMA_LIKE) - {"gemma3"}))

LORAS = {
    "peft's defaults": Lora(rank=8),
    "with dropout": Lora(rank=8, dropout=0.05),
    "in the dtype of the base": Lora(rank=8, dropout=0.05, dtype="base"),
    "on two layers": Lora(rank=8, targets=("q_proj", "v_proj")),
    "with trained embeddings": Lora(rank=8, modules_to_save=("embed_tokens", "lm_head")),
}
DIRECT, LATENT = ("q_proj", "k_proj", "v_proj", "o_proj"), ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
"""Linear layers of attention, and of attention with latent keys and values."""
DORAS = {"DoRA": Lora(rank=8, dora=True), "DoRA with dropout": Lora(rank=8, dropout=0.05, dtype="base", dora=True)}


def agree(both: Both, most: float) -> None:
    """Everything but the peak to the byte, the peak within a share of `most`."""
    assert both.formula == both.trace
    assert abs(both.peak_error) <= most


def run(model_type: str, **choices: Any) -> Both:
    """Both witnesses on a small instance of a family."""
    config = CONFIG_BY_MODEL_TYPE[model_type]
    setup = Setup(micro_batch_size=2, seq_len=128, attention="eager" if model_type in EAGER_ONLY else "sdpa", **choices)
    in_fp32 = setup.precision == "fp32" or setup.upcast
    return compare(config, setup, sdpa_kernel=kernel_to_force(config) if in_fp32 else None)


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast"])
def test_adapters_of_a_llama(lora: Lora, checkpointing: str, precision: str) -> None:
    """GIVEN peft's adapters on a Llama WHEN a step runs THEN formula and trace keep the same bytes."""
    agree(run("llama", lora=lora, activation_checkpointing=checkpointing, precision=precision), 0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "precision", "checkpointing", "lora"),
    list(product(LLAMA_LIKE, ("bf16", "bf16-autocast", "bf16-mixed", "fp32"), ("none", "full"), list(LORAS)[:3])),
)
def test_adapters_of_llama_like_families(model_type: str, precision: str, checkpointing: str, lora: str) -> None:
    """The same law for all of them, in all precisions, with accumulation."""
    both = run(
        model_type,
        lora=LORAS[lora],
        precision=precision,
        activation_checkpointing=checkpointing,
        gradient_accumulation_steps=2,
    )
    agree(both, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "precision", "checkpointing", "lora"),
    list(product(OTHERS, ("bf16", "bf16-mixed"), ("none", "full"), list(LORAS)[1:3])),
)
def test_adapters_of_other_families(model_type: str, precision: str, checkpointing: str, lora: str) -> None:
    """Kept bytes are exact there, too; peft has no dropout for the experts that all-linear would reach."""
    chosen = LORAS[lora]
    if model_type in PARAMETER_BY_NAME:
        chosen = replace(chosen, targets=LATENT if model_type.startswith("deepseek") else DIRECT)
    agree(run(model_type, lora=chosen, precision=precision, activation_checkpointing=checkpointing), 0.02)


@pytest.mark.parametrize("lora", DORAS.values(), ids=DORAS)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("quantize", [None, "nf4-double"])
def test_dora(lora: Lora, checkpointing: str, quantize: str | None) -> None:
    """DoRA makes an identity matrix, the update and its norm on the way: temporaries that no other tool counts."""
    if quantize is not None:
        pytest.importorskip("bitsandbytes")
    agree(run("llama", lora=lora, activation_checkpointing=checkpointing, quantize=quantize), 0.01)


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("quantize", ["nf4", "nf4-double"])
def test_qlora_of_a_llama(quantize: str, checkpointing: str, upcast: bool) -> None:
    """GIVEN a base in NF4 WHEN peft's adapters beside it are trained THEN formula and trace agree."""
    pytest.importorskip("bitsandbytes")
    lora = LORAS["in the dtype of the base" if upcast else "peft's defaults"]
    agree(run("llama", lora=lora, activation_checkpointing=checkpointing, quantize=quantize, upcast=upcast), 0.01)


@pytest.mark.parametrize("dtype", ["fp32", "base"])
@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("copied", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_copies_beside_a_quantised_base(model_type: str, copied: str, upcast: bool, dtype: str) -> None:
    """GIVEN prepare_model_for_kbit_training WHEN a module is copied afterwards THEN the copy is as large: fp32."""
    pytest.importorskip("bitsandbytes")
    lora = Lora(rank=8, dtype=dtype, modules_to_save=(copied,))
    agree(run(model_type, lora=lora, quantize="nf4", upcast=upcast), 0.001)


@pytest.mark.parametrize("upcast", [False, True])
def test_what_peft_makes_of_a_quantised_base(upcast: bool) -> None:
    """The dtypes of adapters and copies on a CPU, where peft casts by itself, are those of the trace."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    setup = Setup(lora=Lora(rank=8, dtype="base", modules_to_save=("lm_head",)), quantize="nf4", upcast=upcast)
    built = []
    for device in ("cpu", "meta"):
        with torch.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = quantise(transformers_model(CONFIG_BY_MODEL_TYPE["llama"]).build(Setup()).module, setup)
            if device == "meta":
                built.append(with_adapters(model, setup))
                continue
            if upcast:
                peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            settings = peft.LoraConfig(r=8, target_modules="all-linear", modules_to_save=["lm_head"])
            built.append(peft.get_peft_model(model, settings, autocast_adapter_dtype=False))
    real, traced = ({name: p.dtype for name, p in model.named_parameters() if p.requires_grad} for model in built)
    assert real == traced
    assert {dtype for name, dtype in real.items() if "lm_head" in name} == {torch.float32 if upcast else torch.bfloat16}


NARROW: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 688,
    "vocab_size": 1000,
}


@pytest.mark.parametrize("quantize", ["nf4", "nf4-double"])
@pytest.mark.parametrize("checkpointing", ["none", "full", "save-attention"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_short_sequences_beside_4_bits(quantize: str, checkpointing: str, precision: str) -> None:
    """GIVEN few tokens THEN a weight made again is the peak; under autocast it is there in fp32 and in bf16."""
    pytest.importorskip("bitsandbytes")
    setup = Setup(
        micro_batch_size=2,
        seq_len=64,
        lora=Lora(rank=8),
        quantize=quantize,
        activation_checkpointing=checkpointing,
        precision=precision,
    )
    agree(compare(NARROW, setup), 0)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "checkpointing",
    ["none", "full", *(pytest.param(one, marks=pytest.mark.slow) for one in ("every-2", "save-attention"))],
)
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_a_base_in_int8(precision: str, checkpointing: str, dora: bool) -> None:
    """GIVEN layers that hold on to their inputs THEN formula and trace agree to the byte, whatever checkpointing."""
    pytest.importorskip("bitsandbytes")
    both = run(
        "llama",
        lora=Lora(rank=8, dora=dora),
        quantize="int8",
        activation_checkpointing=checkpointing,
        precision=precision,
        gradient_accumulation_steps=2,
    )
    agree(both, 0)


@pytest.mark.parametrize("checkpointing", ["none", "full", "save-attention"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_int8_layers_hold_is_there_when_embeddings_are_updated(checkpointing: str, attention: str) -> None:
    """GIVEN updates in the backward pass, the last of a large table, THEN the inputs of all layers stand beside it.

    The loss itself, a block of 512 bytes, is counted to the end.
    """
    pytest.importorskip("bitsandbytes")
    setup = Setup(
        micro_batch_size=2,
        seq_len=128,
        lora=Lora(rank=8, modules_to_save=("embed_tokens",)),
        quantize="int8",
        optimizer="adalomo",
        precision="bf16-mixed",
        loss="tiled",
        activation_checkpointing=checkpointing,
        attention=attention,
    )
    both = compare(NARROW | {"vocab_size": 30_000, "tie_word_embeddings": True}, setup)
    assert both.formula == both.trace
    assert both.formula_peak - both.trace_peak == 512


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "precision", "checkpointing", "upcast"),
    list(product(LLAMA_LIKE, ("bf16", "bf16-autocast", "bf16-mixed"), ("none", "full"), (False, True))),
)
def test_qlora_of_llama_like_families(model_type: str, precision: str, checkpointing: str, upcast: bool) -> None:
    """The same law for all of them."""
    pytest.importorskip("bitsandbytes")
    both = run(
        model_type,
        lora=LORAS["with dropout"],
        precision=precision,
        activation_checkpointing=checkpointing,
        quantize="nf4-double",
        upcast=upcast,
    )
    agree(both, 0.01)


EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "position_embeddings")
HEADS = ("lm_head", "decoder")
NAMES_BY_MODEL_TYPE = {
    "llama": {"embed_tokens", "lm_head", "q_proj"},
    "gemma": {"embed_tokens", "lm_head", "q_proj"},
    "bert": {"word_embeddings", "position_embeddings", "decoder", "query"},
    "gpt2": {"wte", "lm_head", "c_attn"},
}


@pytest.mark.parametrize("targets", [EMBEDDINGS, HEADS, (*EMBEDDINGS, *HEADS, "q_proj", "query", "c_attn")])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    ("model_type", "precision"),
    [("llama", "bf16"), ("llama", "bf16-autocast"), ("gemma", "bf16"), ("bert", "bf16"), ("gpt2", "bf16")],
)
def test_embeddings_and_heads(model_type: str, precision: str, checkpointing: str, targets: tuple[str, ...]) -> None:
    """GIVEN adapters beside embeddings and output layers, tied ones, too THEN formula and trace agree, to the byte.

    Of GPT-2 with one beside its head alone, where no layer keeps anything, what its variables hold is not counted.
    """
    if (model_type, targets) == ("gpt2", HEADS):
        pytest.skip("1.5 hidden states are missing from the peak")
    known = tuple(name for name in targets if name in NAMES_BY_MODEL_TYPE[model_type])
    lora = Lora(rank=8, targets=known, dropout=0.1)
    agree(run(model_type, lora=lora, activation_checkpointing=checkpointing, precision=precision), 0)


@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast"])
def test_the_gradient_of_an_embedding(precision: str) -> None:
    """GIVEN a rank at which it makes the peak THEN it is there twice, because it is computed as a transpose."""
    both = run(
        "llama", lora=Lora(rank=2048, targets=("embed_tokens",)), activation_checkpointing="full", precision=precision
    )
    agree(both, 0)


ONLY = ("q_proj", "down_proj", "qkv_proj")
SOME = {
    "some layers": {"targets": ONLY, "layers": (1,)},
    "ranks": {"targets": (*ONLY, "embed_tokens"), "ranks": (("down_proj", 32), ("embed_tokens", 3))},
    "ranks of a layer": {"ranks": ((r"layers\.0\..*", 24), ("(o|qkv)_proj", 2))},
    "both": {"targets": ONLY, "layers": (0,), "ranks": (("mlp.down_proj", 64),), "dropout": 0.1},
}
"""Fields of `Lora` beside the rank, of models of three layers."""


def in_some(model_type: str, some: str, **choices: Any) -> Lora:
    """`SOME` of them, without names that the model has not."""
    fields = SOME[some]
    names = {"phi3": ("qkv_proj", "down_proj")}.get(model_type, ("q_proj", "down_proj"))
    kept = tuple(name for name in fields.get("targets", ()) if name not in ONLY or name in names)
    return Lora(**{"rank": 8, **fields, **({"targets": kept} if kept else {}), **choices})


@pytest.mark.parametrize("some", SOME)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    ("model_type", "choices"),
    [
        ("llama", {"precision": "bf16"}),
        ("llama", {"precision": "bf16-autocast"}),
        ("llama", {"quantize": "nf4"}),
        ("phi3", {"precision": "bf16"}),
        ("gemma", {"precision": "bf16"}),
    ],
)
def test_some_layers_and_ranks(model_type: str, choices: dict[str, str], checkpointing: str, some: str) -> None:
    """GIVEN layers_to_transform and rank_pattern THEN layers differ in what they keep, and formula and trace agree."""
    if "quantize" in choices:
        pytest.importorskip("bitsandbytes")
    lora = in_some(model_type, some)
    agree(run(model_type, lora=lora, activation_checkpointing=checkpointing, **choices), 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "precision", "dora", "some"),
    list(product(LLAMA_LIKE, ("bf16", "bf16-mixed", "fp32"), (False, True), SOME)),
)
def test_some_layers_and_ranks_of_all(model_type: str, precision: str, dora: bool, some: str) -> None:
    """The same of all families like Llama, and of DoRA."""
    fields = {"targets": ("q_proj", "down_proj"), "ranks": (("down_proj", 32),)} if dora and some == "ranks" else {}
    if model_type == "phi3" and fields:
        fields["targets"] = ("qkv_proj", "down_proj")
    agree(run(model_type, lora=in_some(model_type, some, dora=dora, **fields), precision=precision), 0.01)


ENDS = [
    *product(("llama", "qwen3", "gemma", "olmo2"), ("norm",)),
    ("llama", "s.1.input_layernorm"),
    ("phi3", "norm"),
    ("gpt2", "_1"),
    ("gpt2", "f"),
    ("bert", "Norm"),
    ("bert", "word_embeddings"),
    ("bert", "bert.embeddings"),
]
"""Families, and how paths of some of their modules end."""


@pytest.mark.parametrize(("model_type", "end"), ENDS)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast"])
def test_copies_of_all_that_ends_so(model_type: str, end: str, checkpointing: str, precision: str) -> None:
    """GIVEN modules_to_save WHEN a path ends so, with or without a dot before it, THEN the module is copied."""
    lora = Lora(rank=8, modules_to_save=(end,))
    agree(run(model_type, lora=lora, activation_checkpointing=checkpointing, precision=precision), 0.01)


@pytest.mark.parametrize(
    ("model_type", "ends"),
    [
        *product(("llama",), [("proj",), ("lp",), ("rs.1.mlp",), ("layers",), ("l",), ("mlp", "gate_proj")]),
        ("bert", ("embeddings",)),
        ("bert", ("layer",)),
        ("qwen3_moe", ("xperts",)),
    ],
)
def test_copies_that_cannot_be(model_type: str, ends: tuple[str, ...]) -> None:
    """What peft fails on, or copies with its adapters, or twice, is refused by both."""
    setup, config = Setup(seq_len=64, lora=Lora(rank=8, modules_to_save=ends)), CONFIG_BY_MODEL_TYPE[model_type]
    with pytest.raises(UsageError):
        Recordings(read_architecture(config, "config")).program(setup)
    with pytest.raises(UsageError):
        trace_training(transformers_model(config), setup)


LAST = {
    "adapters of the last layer": {"lora": Lora(rank=8, targets=("q_proj", "v_proj"), layers=(2,))},
    "adapters of the queries of one": {"lora": Lora(rank=8, targets=("q_proj",), layers=(1,), dropout=0.1)},
    "adapters behind the last attention": {"lora": Lora(rank=8, targets=("down_proj",), layers=(2,))},
    "the last layer trained": {"freeze": ("model.embed_tokens", "model.layers.[01]")},
}
"""Fields of setups in which nothing has a gradient before the second or third layer."""


@pytest.mark.parametrize("trained", LAST)
@pytest.mark.parametrize("checkpointing", ["selective", "full", "save-attention", "every-2"])
@pytest.mark.parametrize(
    ("precision", "attention"), [("bf16", "sdpa"), ("bf16-autocast", "sdpa"), ("bf16", "eager"), ("bf16", "flash")]
)
def test_checkpointing_of_what_has_no_gradient(
    precision: str, attention: str, checkpointing: str, trained: str
) -> None:
    """GIVEN layers without a gradient WHEN they are checkpointed THEN their inputs are kept for nobody."""
    fields: dict[str, Any] = LAST[trained]
    setup = Setup(
        micro_batch_size=2,
        seq_len=128,
        precision=precision,
        attention=attention,
        activation_checkpointing=checkpointing,
        **fields,
    )
    both = compare(CONFIG_BY_MODEL_TYPE["llama"], setup)
    if (attention, checkpointing, trained) == ("eager", "selective", "adapters of the queries of one"):
        queries = 2 * 128 * 128 * 2  # once more at the backward of the softmax: SHORT_OF_QUERIES in test_selective.py
        both = both._replace(formula_peak=both.formula_peak + queries)
    agree(both, 0.001)


@pytest.mark.parametrize("pattern", ["model.embed_tokens", "model.layers.[01]", "*norm*", "lm_head.weight"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_frozen_parts(pattern: str, checkpointing: str) -> None:
    """GIVEN parts that are frozen THEN what they would have kept is not kept, and the rest is."""
    agree(run("llama", freeze=(pattern,), activation_checkpointing=checkpointing), 0.01)


def test_what_bitsandbytes_stores() -> None:
    """GIVEN a weight in NF4 on the CPU THEN its tensors are those of the formula: shapes, dtypes, bytes."""
    torch = pytest.importorskip("torch")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from memplan.operators.quantised import stored_4bit
    from memplan.probes.quantised import constants

    for double, (out_features, in_features) in product((False, True), ((896, 4864), (33, 7))):
        layer = bitsandbytes.nn.Linear4bit(in_features, out_features, bias=False, quant_type="nf4")
        layer.weight.compress_statistics = double
        layer = layer.to(torch.bfloat16).to("cpu")
        held = [layer.weight, *(tensor for _, tensor in constants(layer.weight))]
        found = sorted((tuple(x.shape), str(x.dtype).replace("torch.", "")) for x in held)
        names = {"fp32": "float32", "uint8": "uint8"}
        said = stored_4bit(out_features * in_features, double=double)
        assert sorted((one.shape, names[one.dtype]) for one in said) == found


# -- published figures -------------------------------------------------------------------------------------------------

PER_TOKEN = [
    ("llama-3-8b", Lora(rank=16, targets=("q_proj", "v_proj"), dtype="base"), 147_656),
    ("llama-3-8b", Lora(rank=16, targets=("q_proj", "v_proj"), dtype="base", dropout=0.05), 172_232),
    ("llama-3-8b", Lora(rank=16, dtype="base"), 184_680),
    ("llama-3-8b", Lora(rank=16, dtype="base", dropout=0.05), 295_272),
    ("llama-3-8b", Lora(rank=16), 295_496),
    ("llama-3-8b", Lora(rank=16, dropout=0.05), 451_144),
    ("qwen2.5-0.5b", Lora(rank=16, targets=("q_proj", "v_proj"), dtype="base"), 42_368),
    ("qwen2.5-0.5b", Lora(rank=16, targets=("q_proj", "v_proj"), dtype="base", dropout=0.05), 47_744),
    ("qwen2.5-0.5b", Lora(rank=16, dtype="base"), 54_048),
    ("qwen2.5-0.5b", Lora(rank=16, dtype="base", dropout=0.05), 81_696),
    ("qwen2.5-0.5b", Lora(rank=16), 81_920),
    ("qwen2.5-0.5b", Lora(rank=16, dropout=0.05), 122_880),
]
"""Bytes that one layer keeps a token, by a trace of peft on the CPU (torch 2.13, transformers 5.23, peft 0.21).

There dropout is written out and keeps a mask in the dtype of its input; CUDA's fused kernel, which the formula is of,
keeps one byte an element (aten/src/ATen/native/Dropout.cpp, ``is_fused_kernel_acceptable``).
"""

WIDTHS = {"llama-3-8b": (4096, 14336), "qwen2.5-0.5b": (896, 4864)}
"""Inputs of a layer's linear modules: six of the hidden width, one of the feed-forward's."""


@pytest.mark.parametrize(("model", "lora", "on_cpu"), PER_TOKEN)
def test_bytes_per_token_of_a_layer(model: str, lora: Lora, on_cpu: int) -> None:
    """The masks of dropout apart, one byte an element in place of two or four, the figures agree to the byte."""
    values, name = read_config(model)
    tokens = 512
    estimator = Estimator(read_architecture(values, name), name)
    setup = Setup(seq_len=tokens, lora=lora)
    sizes, program = estimator.sizes(setup), estimator.program(setup)
    kept = program.peaks(sizes, 1).kept_activation_bytes_per_layer
    hidden, wide = WIDTHS[model]
    masked = (2 * hidden if len(lora.targets) == 2 else 6 * hidden + wide) if lora.dropout else 0
    bytes_of_cpu_mask = 4 if lora.dtype == "fp32" else 2
    assert kept == tokens * (on_cpu - masked * (bytes_of_cpu_mask - 1))


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"lora": Lora(rank=8, targets=("nowhere",))}, "--lora-targets nowhere: the model has nothing"),
        ({"freeze": ("*",)}, "Nothing is left to train"),
        ({"lora": Lora(rank=8, targets=("embed_tokens",), dora=True)}, "DoRA beside an embedding is not modelled"),
    ],
)
def test_recipes_that_train_nothing(choices: dict[str, Any], said: str) -> None:
    """They are usage errors of both witnesses."""
    config = CONFIG_BY_MODEL_TYPE["llama"]
    with pytest.raises(UsageError, match=said):
        Estimator(read_architecture(config, "config"), "llama").memory(Setup(seq_len=64, **choices))


def test_a_quantised_base_needs_adapters() -> None:
    """Nobody trains packed weights."""
    with pytest.raises(UsageError, match="cannot be trained itself"):
        Setup(quantize="nf4")
    with pytest.raises(UsageError, match="unquantised"):
        Setup(upcast=True)
