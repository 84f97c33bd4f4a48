"""Encoders against the reference trace: BERT, RoBERTa, XLM-RoBERTa, ModernBERT, DeBERTa v2.

Source of the expected numbers: the real models of transformers 5.23 on the meta device, every storage followed.  Kept
bytes have to agree exactly.  Peaks may differ by 0.1 %: one block of 512 bytes on these small models, and for DeBERTa
the gradient of the relative embeddings, which its description leaves out.
"""

import pytest

from memplan.architectures.registry import read_architecture
from memplan.estimation.step import Recordings
from memplan.specs.training import Setup
from tests.support.compare import differences, resized, run_both

pytestmark = pytest.mark.slow

BERT = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "type_vocab_size": 2,
    "vocab_size": 1000,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": 0,
}
ROBERTA = {**BERT, "model_type": "roberta", "max_position_embeddings": 130, "type_vocab_size": 1, "pad_token_id": 1}
XLM_ROBERTA = {**ROBERTA, "model_type": "xlm-roberta"}
DEBERTA = {
    **BERT,
    "model_type": "deberta-v2",
    "architectures": ["DebertaV2ForMaskedLM"],
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "position_buckets": 8,
    "relative_attention": True,
    "share_att_key": True,
    "type_vocab_size": 0,
}
MODERNBERT = {
    "model_type": "modernbert",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "global_attn_every_n_layers": 3,
    "local_attention": 64,
    "hidden_activation": "gelu",
    "pad_token_id": 0,
    "attention_dropout": 0.1,
    "mlp_dropout": 0.1,
    "embedding_dropout": 0.1,
}

PEAK_TOLERANCE = 0.001

SETUPS = [
    ("bf16", "none", 2, None),
    ("bf16", "full", 1, None),
    ("bf16", "none", 1, 0.0),
    ("fp32", "none", 2, 0.0),
    ("fp32", "full", 2, None),
    ("bf16-mixed", "none", 1, None),
    ("bf16-mixed", "full", 2, None),
]
"""Precision, checkpointing, micro-batch, dropout (None: as configured)."""


def agree(config, *, seq_len=64, dropout=None, **setup):
    pair = run_both(resized(config, dropout=dropout), auto_class="AutoModelForMaskedLM", seq_len=seq_len, **setup)
    ours, real = pair.formula, pair.reference
    assert ours.kept_activation_bytes == real.kept_allocated_bytes, differences(pair)
    assert ours.peak == pytest.approx(real.peak_allocated_bytes, rel=PEAK_TOLERANCE)
    assert pair.formula_first.peak == pytest.approx(real.first_step_peak_allocated_bytes, rel=PEAK_TOLERANCE)


@pytest.mark.parametrize(("precision", "checkpointing", "batch", "dropout"), SETUPS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [BERT, ROBERTA, MODERNBERT], ids=lambda config: config["model_type"])
def test_encoders(config, attention, precision, checkpointing, batch, dropout):
    agree(
        config,
        attention=attention,
        precision=precision,
        activation_checkpointing=checkpointing,
        micro_batch_size=batch,
        dropout=dropout,
    )


@pytest.mark.parametrize(("precision", "checkpointing", "batch", "dropout"), SETUPS)
def test_deberta_has_one_implementation_of_attention(precision, checkpointing, batch, dropout):
    agree(
        DEBERTA,
        attention="eager",
        precision=precision,
        activation_checkpointing=checkpointing,
        micro_batch_size=batch,
        dropout=dropout,
    )


def test_deberta_with_projections_of_its_own_for_positions():
    agree({**DEBERTA, "share_att_key": False}, attention="eager", precision="bf16", micro_batch_size=2)


def test_deberta_that_adds_positions_and_types_to_its_input():
    changes = {"position_biased_input": True, "type_vocab_size": 2, "pos_att_type": ["c2p"]}
    agree({**DEBERTA, **changes}, attention="eager", precision="bf16", micro_batch_size=2)


def test_xlm_roberta_is_roberta():
    agree(XLM_ROBERTA, precision="bf16", attention="sdpa", micro_batch_size=2)


@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=lambda config: config["model_type"])
def test_a_decoder_of_its_own_has_a_bias_of_its_own(config):
    untied = {**config, "tie_word_embeddings": False}
    agree(untied, precision="bf16", attention="sdpa", micro_batch_size=2)
    names = {
        row.name for row in Recordings(read_architecture(untied, "config")).recording(Setup(seq_len=64)).parameters()
    }
    assert sum(name.endswith("decoder.bias") for name in names) == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sequence_shorter_than_half_a_window_needs_no_mask(attention):
    agree(MODERNBERT, precision="bf16", attention=attention, micro_batch_size=2, seq_len=31)
    agree(MODERNBERT, precision="bf16", attention=attention, micro_batch_size=2, seq_len=32)


def test_modernbert_with_biases():
    changes = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)
    agree({**MODERNBERT, **changes}, precision="bf16", attention="sdpa", micro_batch_size=2)


def test_an_odd_length():
    agree(BERT, precision="bf16", attention="sdpa", micro_batch_size=3, seq_len=77)
