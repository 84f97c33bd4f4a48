"""What saving a checkpoint and resuming from one allocate, on real modules with numbers: everything on the CPU.

The recorder sees the tensors of the CPU as if they were the device's; a copy to the host is none here.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
import torch

from memplan.architectures.registry import read_architecture
from memplan.estimation.between import split_bytes
from memplan.estimation.step import Recordings
from memplan.probes.recorder import StorageRecorder
from memplan.specs.training import Setup
from tests.laws.models import GPT2, LLAMA
from tests.published import test_reference_mixtures as mixtures

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow

CONFIGS = {"llama": LLAMA, "gpt2": GPT2, **mixtures.CONFIG_BY_NAME}


def model_of(config: dict[str, Any]) -> Any:
    import transformers

    of_type = transformers.AutoConfig.for_model(**config)
    return transformers.AutoModelForCausalLM.from_config(of_type, dtype=torch.bfloat16)


def highest(known: dict[str, torch.Tensor], action: Callable[[], object]) -> int:
    """Bytes of storages that `action` makes beside those of `known`, at their highest."""
    recorder = StorageRecorder({}, {}, has_padding=False, trust=("transformers", "peft"), device="cpu")
    with recorder:
        for name, tensor in known.items():
            recorder.label(tensor, "parameter", name, "parameter")
        start = len(recorder.events())
        action()
    live = most = 0
    for num_bytes, sign in recorder.raw_events(start):
        live += sign * num_bytes
        most = max(most, live)
    return most


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shard", ["50GB", "300KB"])
def test_saving_copies_slices_of_experts_and_nothing_else(name: str, shard: str, tmp_path: Any) -> None:
    """All of them at once, however small the files are."""
    module, setup = model_of(CONFIGS[name]), Setup(seq_len=64, attention="eager")
    program = Recordings(read_architecture(CONFIGS[name], "config")).program(setup)
    known = dict([*module.named_parameters(), *module.named_buffers()])
    found = highest(known, lambda: module.save_pretrained(tmp_path, max_shard_size=shard))
    assert found == split_bytes(program, setup)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21.2 asks for it
def test_saving_adapters_copies_nothing(tmp_path: Any) -> None:
    import peft

    module = peft.get_peft_model(model_of(LLAMA), peft.LoraConfig(r=8, target_modules="all-linear"))
    known = dict([*module.named_parameters(), *module.named_buffers()])
    assert highest(known, lambda: module.save_pretrained(tmp_path)) == 0


def _trained(module: Any, optimizer: Any) -> Any:
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def _states(optimizer: Any) -> dict[str, torch.Tensor]:
    return {
        f"{n} {name}": value
        for n, state in enumerate(optimizer.state.values())
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def test_saving_states_copies_nothing() -> None:
    """What goes to the host goes one storage after the other: ``torch.save`` asks for nothing on the device."""
    module = model_of(LLAMA)
    optimizer = _trained(module, torch.optim.AdamW(module.parameters()))
    known = dict(module.named_parameters()) | _states(optimizer)
    assert highest(known, lambda: torch.save(optimizer.state_dict(), io.BytesIO())) == 0


def test_states_are_read_once() -> None:
    """On the device of the file they are taken as they are: the second copy is the one that they replace."""
    module = model_of(LLAMA)
    optimizer = _trained(module, torch.optim.AdamW(module.parameters()))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    held = sum(x.untyped_storage().nbytes() for x in _states(optimizer).values())
    fresh = torch.optim.AdamW(module.parameters())
    found = highest(
        dict(module.named_parameters()), lambda: fresh.load_state_dict(torch.load(file, map_location="cpu"))
    )
    assert found == held


def test_bitsandbytes_reads_them_twice() -> None:
    """What ``torch.load`` read and its ``deepcopy``; a boolean comes and goes."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    module = torch.nn.Linear(256, 256)
    optimizer = bitsandbytes.optim.AdamW8bit(module.parameters(), lr=1e-3)
    sizes = {"state1": torch.zeros(256, 256, dtype=torch.uint8), "state2": torch.zeros(256, 256, dtype=torch.uint8)}
    state = {"state": {0: sizes}, "param_groups": optimizer.state_dict()["param_groups"]}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found = highest(
        dict(module.named_parameters()), lambda: optimizer.load_state_dict(torch.load(file, map_location="cpu"))
    )
    assert found - 1 == 2 * 2 * 256 * 256
