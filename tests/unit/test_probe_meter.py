"""What a device says, phase by phase: the meter, a card through fakes of torch.cuda and of the driver, the CPU."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from memplan.operators.sizes import allocated
from memplan.probes.nvml import Nvml, visible_card
from memplan.specs.measurement import DONE, Card, Measurement, PhaseBytes, StepRecord, Trial
from memplan.specs.training import Setup

torch = pytest.importorskip("torch")

from memplan.probes.devices import CpuDevice, CudaDevice, DeviceError, Reading, watching  # noqa: E402 -- needs torch
from memplan.probes.meter import PhaseMeter, Unwatched  # noqa: E402
from memplan.probes.steps import history, run_trial  # noqa: E402

MIB = 2**20
GB = 10**9

# ----------------------------------------------------------------------------------------------------------- the meter


class Scripted:
    """A device whose readings are known in advance."""

    type = "cuda"

    def __init__(self, *readings, process=()):
        self.readings = list(readings)
        self.processes = list(process)

    def read(self):
        reading = self.readings.pop(0)
        return reading if isinstance(reading, Reading) else Reading(*reading)

    def process_bytes(self):
        return self.processes.pop(0) if self.processes else None


def test_peaks_are_merged_over_micro_steps_and_levels_are_the_last():
    """Two micro-steps: forward, what it kept, backward, each twice; then the update."""
    device = Scripted(
        (100, 100, 200, 200),  # before
        (110, 120, 200, 200),  # end of the inputs, which are part of the forward pass
        (150, 170, 200, 200),  # kept by the first forward pass
        (150, 150, 200, 200),  # its end
        (130, 190, 240, 250),  # backward
        (175, 180, 240, 240),  # kept by the second
        (175, 176, 240, 240),
        (131, 185, 220, 245),  # backward
        (160, 210, 260, 260),  # optimizer
    )
    meter = PhaseMeter(device)
    meter.begin_step()
    meter.enter("forward", 1, -1)
    for micro_step in (0, 1):
        meter.enter("forward", 1, micro_step)
        assert meter.position == f"forward of step 1, micro-step {micro_step}"
        meter.mark_kept()
        meter.enter("backward", 1, micro_step)
    meter.enter("optimizer", 1, -1)
    assert meter.position == "optimizer of step 1"
    meter.close()
    assert device.readings == []
    assert meter.step(1) == StepRecord(
        1,
        (
            PhaseBytes("forward", 175, 180, 240, 240, None),
            PhaseBytes("backward", 131, 190, 220, 250, None),
            PhaseBytes("optimizer", 160, 210, 260, 260, None),
        ),
        0,
        0,
    )
    assert meter.kept_activation_bytes == 175 - 130


def test_kept_bytes_are_those_since_the_inputs_were_there():
    device = Scripted((1000, 1000), (1064, 1064), (1500, 1600))
    meter = PhaseMeter(device)
    meter.enter("forward", 0, -1)
    meter.enter("forward", 0, 0)
    meter.mark_kept()
    assert meter.kept_activation_bytes == 1500 - 1064


def test_steps_are_kept_apart_and_the_steady_ones_begin_with_the_second():
    """What happens between two steps belongs to neither."""
    readings = []
    for peak in (900, 500, 600):
        readings += [(100, 5000), (100, peak, 1000, peak + 1000)]
    meter = PhaseMeter(Scripted(*readings))
    for number in range(3):
        meter.enter("forward", number, 0)
        meter.close()
    steps = tuple(meter.step(number) for number in range(3))
    assert [step.most("peak_allocated_bytes") for step in steps] == [900, 500, 600]
    found = Measurement(
        trial=Trial(model="tiny", setup=Setup()),
        outcome=DONE,
        measured_at="now",
        card=Card(device="cuda", name="card", total_bytes=1),
        steps=steps,
    )
    assert [step.number for step in found.steady] == [1, 2]
    assert (found.peak_allocated_bytes, found.peak_reserved_bytes, found.peak_process_bytes) == (600, 1600, None)


def test_a_step_that_was_not_reached_has_no_phases():
    meter = PhaseMeter(Scripted())
    assert meter.step(2) == StepRecord(2, (), 0, 0)
    assert meter.position == "before the first step"


def test_process_bytes_are_the_most_where_they_are_known():
    """Nobody says at the first reading; of the phase that is never answered it stays unknown."""
    meter = PhaseMeter(Scripted(*[(1, 1)] * 5, process=[None, 700, 600, None]))
    for micro_step in (0, 1, 2):
        meter.enter("forward", 0, micro_step)
    meter.enter("backward", 0, 2)
    meter.close()
    assert [phase.process_bytes for phase in meter.step(0).phases] == [700, None]
    assert meter.step(0).most("process_bytes") == 700


def test_retries_and_failures_of_the_allocator_are_those_of_the_last_reading():
    meter = PhaseMeter(Scripted(Reading(1, 1, 1, 1, 0, 0), Reading(1, 1, 1, 1, 3, 1)))
    meter.enter("forward", 0, 0)
    meter.close()
    assert (meter.step(0).num_alloc_retries, meter.step(0).num_ooms) == (3, 1)


def test_each_storage_is_held_once_and_as_the_allocator_rounds_it():
    """A view of a gradient is no second one; the next step begins with none."""
    meter = PhaseMeter(Scripted())
    gradient, state = torch.zeros(100), torch.zeros(1000)
    for tensor in (gradient, gradient[:50], gradient.view(10, 10)):
        meter.label(tensor, "gradient", "weight", "gradient")
    meter.label(state, "optimizer_state", "weight", "exp_avg")
    meter.label(torch.zeros(0), "optimizer_state", "weight", "empty")
    assert (meter.held_bytes("gradient"), meter.held_bytes("optimizer_state")) == (512, 4096)
    meter.begin_step()
    assert (meter.held_bytes("gradient"), meter.held_bytes("nothing")) == (0, 0)


def test_who_does_not_watch_takes_no_notice():
    witness = Unwatched()
    witness.begin_step()
    witness.enter("forward", 0, 0)
    witness.mark_kept()
    witness.label(torch.zeros(1), "gradient", "", "")


# ------------------------------------------------------------------------------------------------------------- the CPU


def test_a_cpu_counts_the_storages_that_are_alive_and_the_most_that_were():
    device = CpuDevice(has_padding=False)
    assert device.open(None).device == "cpu"
    with watching(device):
        kept = torch.zeros(256)  # 1024 bytes
        device.settle()
        assert device.read() == Reading(1024, 1024)
        for_a_moment = torch.zeros(1025)  # 4100 bytes, rounded to 4608
        view = kept[1:]
        del for_a_moment
        assert device.read() == Reading(1024, 1024 + 4608)
        assert device.read() == Reading(1024, 1024)
        del kept
        assert device.read() == Reading(1024, 1024)
        del view
        assert device.read() == Reading(0, 1024)
        device.hidden_bytes = 512
        more = torch.zeros(512)
        assert device.read() == Reading(2048 - 512, 2048 - 512)
        del more
    assert (device.process_bytes(), device.context_bytes, device.workspace_bytes()) == (None, None, None)


def test_a_cpu_has_no_limit_and_runs_out_of_no_cards_memory():
    with pytest.raises(DeviceError) as fault:
        CpuDevice(has_padding=False).open(8 * GB)
    assert "--limit" in fault.value.cure
    assert not CpuDevice(has_padding=False).is_out_of_memory(RuntimeError("CUDA out of memory"))


# -------------------------------------------------------------------------------------------------------------- a card


class FakeCuda:
    """torch.cuda of a card with `total` bytes, of which `used` are taken once there is a context."""

    def __init__(self, total=100 * GB, used=2 * GB, error=None):
        self.total, self.used, self.error = total, used, error
        self.reserved = 0
        self.fractions = []
        self.calls = []
        self.stats = {}

    def set_device(self, index):
        if self.error is not None:
            raise self.error
        self.calls.append(("set_device", index))

    def mem_get_info(self, index):
        return self.total - self.used, self.total

    def get_device_properties(self, index):
        return SimpleNamespace(name="NVIDIA H200", total_memory=self.total, major=9, minor=0)

    def set_per_process_memory_fraction(self, fraction, index):
        self.fractions.append(fraction)

    def memory_reserved(self, index):
        return self.reserved

    def memory_stats(self, index):
        return self.stats

    def reset_peak_memory_stats(self, index):
        self.calls.append(("reset_peak_memory_stats", index))

    def synchronize(self):
        self.calls.append(("synchronize",))

    def empty_cache(self):
        self.calls.append(("empty_cache",))

    @property
    def allowed(self):
        """Bytes that the allocator may take, as CUDACachingAllocator works them out."""
        return int(self.fractions[-1] * self.total)


class FakeNvml:
    """The driver: what is used at each question, who is on the card, what it charges to this process."""

    def __init__(self, used=(0,), processes=None, own=None):
        self.used, self.others, self.own = list(used), processes, own

    def used_bytes(self):
        return self.used.pop(0) if len(self.used) > 1 else self.used[0]

    def processes(self):
        return self.others

    def own_bytes(self, *, alone):
        return self.own

    def driver(self):
        return "575.57.08"

    def clocks(self):
        return {"sm": 1980}


def test_the_context_is_what_the_driver_charges_to_this_process():
    device = CudaDevice(1, FakeNvml(used=(3 * GB, 4 * GB), processes={7: 3 * GB}, own=600), cuda=FakeCuda())
    card = device.open(None)
    assert (device.process_basis, device.context_bytes) == ("nvml", 600)
    assert card == Card(
        device="cuda",
        name="NVIDIA H200",
        total_bytes=100 * GB,
        compute_capability="9.0",
        driver="575.57.08",
        clocks={"sm": 1980},
        num_other_processes=1,
        other_bytes=3 * GB,
    )


def test_else_what_the_card_has_less_since_before():
    """The driver lists no process: a container."""
    device = CudaDevice(0, FakeNvml(used=(3 * GB, 3 * GB + 500, 3 * GB + 900)), cuda=FakeCuda())
    card = device.open(None)
    assert (device.process_basis, device.context_bytes) == ("device", 500)
    assert (card.num_other_processes, card.other_bytes) == (None, 3 * GB)
    assert device.process_bytes() == 900


def test_what_others_give_back_makes_no_negative_context():
    device = CudaDevice(0, FakeNvml(used=(3 * GB, 2 * GB)), cuda=FakeCuda())
    device.open(None)
    assert device.context_bytes == 0


@pytest.mark.parametrize("nvml", [None, FakeNvml(used=(None,))])
def test_else_nobody_knows(nvml):
    device = CudaDevice(0, nvml, cuda=FakeCuda())
    card = device.open(None)
    assert (device.process_basis, device.context_bytes, device.process_bytes()) == ("", None, None)
    assert (card.num_other_processes, card.other_bytes) == (None, None)
    device.tighten()


def test_other_processes_are_counted():
    device = CudaDevice(0, FakeNvml(used=(0,), processes={1: None, 2: 5}, own=600), cuda=FakeCuda())
    assert device.open(None).num_other_processes == 2


def test_without_a_limit_nothing_is_capped():
    cuda = FakeCuda()
    device = CudaDevice(0, FakeNvml(own=600 * MIB), cuda=cuda)
    device.open(None)
    device.tighten()
    assert cuda.fractions == []


@pytest.mark.parametrize("total", [100 * GB, 150_110_011_392, 25_769_803_776])
def test_the_allocator_gets_the_limit_less_the_context(total):
    """As good as floats are: PyTorch multiplies the fraction by the total again."""
    cuda = FakeCuda(total=total)
    CudaDevice(0, FakeNvml(own=600 * MIB), cuda=cuda).open(24 * GB)
    assert abs(cuda.allowed - (24 * GB - 600 * MIB)) <= 1


def test_where_nobody_says_what_the_context_takes_all_that_is_taken_of_the_card_counts():
    """2 GB of 100 are taken once the context is there."""
    cuda = FakeCuda()
    CudaDevice(0, None, cuda=cuda).open(24 * GB)
    assert cuda.fractions == [0.22]


def test_after_a_step_the_kernels_that_were_loaded_are_taken_off_too():
    """600 MiB of context at first, 700 beside 5 GB of tensors later."""
    cuda = FakeCuda()
    nvml = FakeNvml(own=600 * MIB)
    device = CudaDevice(0, nvml, cuda=cuda)
    device.open(24 * GB)
    cuda.reserved, nvml.own = 5 * GB, 5 * GB + 700 * MIB
    device.tighten()
    assert abs(cuda.allowed - (24 * GB - 700 * MIB)) <= 1


def test_a_tightened_limit_holds_for_what_was_taken_before_it():
    """The first step took all that it could get, then kernels were found to take 200 MiB beside it: over the limit.

    Once: the fraction stops further cudaMallocs alone.  A second step that needs no further segment is done, and the
    trial has survived on a card that it does not fit on.
    """
    cuda = FakeCuda()
    nvml = FakeNvml(own=600 * MIB)
    device = CudaDevice(0, nvml, cuda=cuda)
    device.open(24 * GB)
    cuda.reserved = 24 * GB - 600 * MIB
    nvml.own = cuda.reserved + 800 * MIB
    device.tighten()
    assert ("empty_cache",) in cuda.calls


@pytest.mark.parametrize(
    ("limit", "says", "cure"), [(101 * GB, "more than the card has", "smaller"), (600 * MIB, "CUDA context", "larger")]
)
def test_a_limit_that_cannot_be_is_refused(limit, says, cure):
    cuda = FakeCuda()
    with pytest.raises(DeviceError, match=says) as fault:
        CudaDevice(0, FakeNvml(own=600 * MIB), cuda=cuda).open(limit)
    assert cure in fault.value.cure
    assert f"{limit:,}" in fault.value.cause
    assert cuda.fractions == []


def test_the_whole_card_is_a_limit():
    cuda = FakeCuda()
    CudaDevice(0, None, cuda=cuda).open(100 * GB)
    assert cuda.fractions == [0.98]


def test_a_limit_that_others_leave_no_room_for_is_refused():
    """A card of 100 GB of which 10 are free says nothing about one of 24."""
    cuda = FakeCuda(used=90 * GB)
    with pytest.raises(DeviceError, match="are free") as fault:
        CudaDevice(0, FakeNvml(own=600 * MIB), cuda=cuda).open(24 * GB)
    assert "End what else is on the card" in fault.value.cure


def test_a_card_that_cannot_be_used_is_a_fault_in_one_line():
    error = RuntimeError("Found no NVIDIA driver.\n  Please check\n\n" + "x" * 1000)
    with pytest.raises(DeviceError) as fault:
        CudaDevice(0, None, cuda=FakeCuda(error=error)).open(None)
    assert "Found no NVIDIA driver. Please check" in fault.value.cause
    assert "\n" not in fault.value.cause
    assert len(fault.value.cause) < 400
    assert "nvidia-smi" in fault.value.cure


def test_a_reading_is_the_allocators_own_and_begins_the_peaks_anew():
    cuda = FakeCuda()
    device = CudaDevice(2, None, cuda=cuda)
    assert device.read() == Reading(0, 0, 0, 0, 0, 0)
    cuda.stats = {
        "allocated_bytes.all.current": 1,
        "allocated_bytes.all.peak": 2,
        "reserved_bytes.all.current": 3,
        "reserved_bytes.all.peak": 4,
        "num_alloc_retries": 5,
        "num_ooms": 6,
        "requested_bytes.all.peak": 7,
    }
    assert device.read() == Reading(1, 2, 3, 4, 5, 6)
    assert cuda.calls == [("reset_peak_memory_stats", 2)] * 2


def test_settling_gives_back_the_cache_and_begins_the_peaks_anew():
    cuda = FakeCuda()
    CudaDevice(0, None, cuda=cuda).settle()
    assert [call[0] for call in cuda.calls] == ["synchronize", "empty_cache", "reset_peak_memory_stats"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_running_out_of_memory_is_told_by_torch_or_by_a_library(error):
    assert CudaDevice(0, None, cuda=FakeCuda()).is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        ValueError("out of memory"),
        MemoryError("out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_no_answer_about_the_memory(error):
    assert not CudaDevice(0, None, cuda=FakeCuda()).is_out_of_memory(error)


# ----------------------------------------------------------------------------------------------- the steps, on fakes

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
TINY = Trial(model="tiny", config=LLAMA, setup=Setup(micro_batch_size=1, seq_len=16, precision="fp32"))


class CardOnCpu(CpuDevice):
    """Tensors on the CPU, errors as on a card."""

    is_out_of_memory = CudaDevice.is_out_of_memory


def reports_of(trial=TINY, **given):
    reports = []
    run_trial(trial, CardOnCpu(has_padding=False), reports.append, **given)
    return reports


def test_a_model_that_does_not_fit_is_out_of_memory_and_no_wrong_config(monkeypatch):
    """Once: `models._build` makes a TraceError of every error in `from_config`, which is the end of a failed trial."""
    transformers = pytest.importorskip("transformers")

    def from_config(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", from_config)
    end = reports_of()[-1]
    assert (end["end"], end["phase"]) == ("out-of-memory", "building the model")


def test_a_step_that_does_not_fit_says_where(monkeypatch):
    pytest.importorskip("transformers")

    def step(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    *before, end = reports_of()
    assert end == {
        "end": "out-of-memory",
        "message": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "phase": "optimizer of step 0",
    }
    assert any("num_parameters" in report for report in before)
    assert not any("step" in report for report in before)


def test_a_process_that_outgrows_its_limit_beside_the_tensors_is_out_of_memory(monkeypatch):
    """A card of that size would not have held it: kernels are part of what has to fit.

    Once: `tighten` raises a DeviceError, which makes the trial a failure without an answer.
    """
    pytest.importorskip("transformers")
    cuda = FakeCuda()
    nvml = FakeNvml(own=600 * MIB)
    card = CudaDevice(0, nvml, cuda=cuda)
    card.open(700 * MIB)
    nvml.own = 800 * MIB
    monkeypatch.setattr(CardOnCpu, "tighten", lambda _: card.tighten())
    assert reports_of()[-1]["end"] == "out-of-memory"


def test_a_snapshot_that_cannot_be_written_hides_no_out_of_memory(monkeypatch):
    """Once: the error of the dump, raised in a `finally`, takes the place of the one that the trial ended with."""
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda *_, **__: None)

    def dump(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(memory, "_dump_snapshot", dump)
    with pytest.raises(torch.OutOfMemoryError), history("/nowhere/snapshot.pickle", SimpleNamespace(type="cuda")):
        raise torch.OutOfMemoryError("CUDA out of memory")


# ----------------------------------------------------------------------------------------------------------- the driver


class NvmlError(Exception):
    pass


class FakePynvml:
    """pynvml; what it lacks raises its own error."""

    NVMLError = NvmlError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, processes=None, used=None, driver=None, clocks=None):
        self._processes, self._used, self._driver, self._clocks = processes, used, driver, clocks or {}

    def _known(self, value):
        if value is None:
            raise NvmlError("Not Supported")
        return value

    def nvmlSystemGetDriverVersion(self):  # noqa: N802 -- the library's name
        return self._known(self._driver)

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return SimpleNamespace(used=self._known(self._used))

    def nvmlDeviceGetComputeRunningProcesses(self, handle):  # noqa: N802
        found = self._known(self._processes)
        return [SimpleNamespace(pid=pid, usedGpuMemory=num_bytes) for pid, num_bytes in found.items()]

    def nvmlDeviceGetClockInfo(self, handle, kind):  # noqa: N802
        return self._known(self._clocks.get(kind))


def test_a_driver_that_answers_nothing_knows_nothing():
    nvml = Nvml(FakePynvml(), "card")
    assert (nvml.driver(), nvml.used_bytes(), nvml.processes(), nvml.own_bytes(alone=True)) == (None, None, None, None)
    assert nvml.clocks() == {}


def test_a_driver_that_answers_is_believed():
    """Its version is bytes in older libraries; a clock that it does not know is left out."""
    library = FakePynvml(processes={10: 5, 11: 6}, used=2**40, driver=b"535.1", clocks={1: 1980})
    nvml = Nvml(library, "card")
    assert (nvml.driver(), nvml.used_bytes(), nvml.processes()) == ("535.1", 2**40, {10: 5, 11: 6})
    assert nvml.clocks() == {"sm": 1980}
    assert Nvml(FakePynvml(driver="575.57"), "card").driver() == "575.57"


@pytest.mark.parametrize(
    ("processes", "alone", "own"),
    [
        ({}, True, None),
        ({4711: 700}, True, 700),  # the only one on the card, under the number that the host gives it
        ({4711: 700}, False, None),  # perhaps that of somebody who was there before
        ({4711: 700, 4712: 800}, True, None),
        ({1: 700, 4711: 800}, False, 700),
        ({1: None}, True, None),  # MIG, or a driver that does not say
        ({4711: None}, True, None),
    ],
)
def test_a_process_is_found_by_its_number_or_as_the_only_one(monkeypatch, processes, alone, own):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert Nvml(FakePynvml(processes=processes), "card").own_bytes(alone=alone) == own


@pytest.mark.parametrize("before", [{4711: 40 * GB}, {4711: None}, None])
def test_somebody_elses_process_is_not_taken_for_this_one(before):
    """One was on the card before, and it is still the only one that the driver lists: it lists this one late, or never.

    Where nobody knew who was there before, nobody knows whose the one process is, either.
    """
    library = FakePynvml(processes=before, used=40 * GB + 600 * MIB)
    cuda = FakeCuda()
    device = CudaDevice(0, Nvml(library, "card"), cuda=cuda)

    def properties(index):
        library._processes = {4711: 40 * GB}
        return FakeCuda.get_device_properties(cuda, index)

    cuda.get_device_properties = properties
    device.open(None)
    assert (device.context_bytes, device.process_basis) == (0, "device")


@pytest.mark.parametrize(
    ("position", "visible", "card"),
    [
        (0, None, 0),
        (3, None, 3),
        (0, "", 0),
        (0, "2", 2),
        (1, "3,1", 1),
        (1, " 3 , 1 ", 1),
        (0, "GPU-1234-abcd", "GPU-1234-abcd"),
        (1, "0,GPU-1234", "GPU-1234"),
        (0, "MIG-1234", "MIG-1234"),
        (2, "0,1", 2),
    ],
)
def test_the_card_that_cuda_shows_is_the_one_that_the_driver_is_asked_about(position, visible, card):
    assert visible_card(position, visible) == card


def test_sizes_in_these_tests_are_as_the_allocator_rounds_them():
    assert [allocated(num_bytes) for num_bytes in (0, 1, 400, 1024, 4100)] == [0, 512, 512, 1024, 4608]
