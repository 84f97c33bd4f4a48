"""Reserved and process bytes that others measured, against the replay of the run through the caching allocator.

Allocated bytes of these runs agree within 0.03 % (test_full_finetuning); what is between them and the process is
fragmentation, 1.7 to 13 GiB here, which no sum of tensors shows.  The tolerance is 5 % down and 1 % up: the runs are of
transformers 4.45 (another loss head, other temporaries) and of lengths that vary below the longest, both of which move
where holes are left.
"""

from __future__ import annotations

from typing import Any

import pytest

from memplan import api
from memplan.architectures.registry import read_architecture
from memplan.estimation.estimate import Estimator
from memplan.specs.training import Setup

MIB = 2**20
POWERLM_3B: dict[str, Any] = {
    "model_type": "granite",
    "hidden_size": 2304,
    "num_hidden_layers": 40,
    "num_attention_heads": 36,
    "num_key_value_heads": 36,
    "intermediate_size": 9216,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}


@pytest.mark.parametrize(("micro_batch_size", "measured_mib"), [(4, 47_683), (8, 52_927)])
def test_process_bytes_of_powerlm(micro_batch_size: int, measured_mib: int) -> None:
    """PowerLM-3B, 4,096 tokens, checkpointing, A100 80GB: nvidia-smi's peak (fms-acceleration, M0579, M0581)."""
    estimator = Estimator(read_architecture(POWERLM_3B, "PowerLM-3b"), "PowerLM-3b")
    setup = Setup(micro_batch_size=micro_batch_size, seq_len=4096, activation_checkpointing="full", attention="flash")
    memory = estimator.replayed_memory(setup)
    assert -0.05 < memory.peak_process_bytes / (measured_mib * MIB) - 1 < 0.01
    # Without the replay the smaller run would be a quarter too low.
    assert memory.peak_allocated_bytes < memory.peak_reserved_bytes


@pytest.mark.parametrize("measured_bytes", [37_241_225_216, 38_549_848_064, 38_868_615_168])
def test_reserved_bytes_of_llama_3b(measured_bytes: int) -> None:
    """Llama-3.2-3B, 4 x up to 768 tokens, padded, L40S: reserved bytes (PEFT's comparison, M0202, M0164 and M0106).

    The estimate is of batches that are all as long as the longest; the runs' lengths vary, and each run differs from
    the next by more than it differs from the estimate.
    """
    found = api.find_model("llama-3.2-3b")
    memory = Estimator(found.architecture, found.name).replayed_memory(
        Setup(micro_batch_size=4, seq_len=768, padding=True)
    )
    assert -0.05 < memory.peak_reserved_bytes / measured_bytes - 1 < 0.025
