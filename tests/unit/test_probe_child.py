"""Trials in processes of their own: whatever becomes of one, it has an outcome, and nothing is left running.

First with small scripts that speak the child's protocol, then with the real child on the CPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from memplan import measuring
from memplan.catalog.measurements import read_measurements
from memplan.probes import launch
from memplan.probes.launch import Launcher, ProbeError
from memplan.specs.adapter import Lora, lora_record
from memplan.specs.measurement import Trial
from memplan.specs.training import Setup, library_of
from memplan.specs.values import replace

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked up in /proc")

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
NUM_PARAMETERS = 2 * 512 * 64 + 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 160 + 2 * 64) + 64
TRIAL = Trial(model="tiny", config=CONFIG, setup=Setup(micro_batch_size=2, seq_len=64))
SOON_S = 5.0
"""Within this time something that is to happen at once has happened, on a machine that is busy."""


def running(session: int) -> list[int]:
    """Processes of a session that have not ended; those that nobody has waited for have."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, of_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(of_session) == session and state not in "ZX":
                    found.append(int(entry.name))
    return found


def wait_until(condition, seconds=SOON_S):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


class StuckError(Exception):
    """What should have ended by itself has not."""


@contextlib.contextmanager
def interrupted(seconds, error):
    """Raise an error in this thread after a while, unless it is done."""

    def interrupt(*_):
        raise error

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------ scripts for a child

PRELUDE = """
import json, os, signal, subprocess, sys, time

def say(**report):
    print(json.dumps(report), flush=True)

number = 0
for line in sys.stdin:
    order = json.loads(line)
    number += 1
"""
CARD = {"device": "cpu", "name": "CPU", "total_bytes": 8}
PHASES = [
    {
        "name": "forward",
        "allocated_bytes": 1,
        "peak_allocated_bytes": 2,
        "reserved_bytes": None,
        "peak_reserved_bytes": None,
        "process_bytes": None,
    }
]
STEP = {"number": 0, "phases": PHASES, "num_alloc_retries": 0, "num_ooms": 0}
BEGIN = f"""
say(versions={{"torch": "2.13"}})
say(card={CARD}, context_bytes=None, process_basis="")
say(num_parameters=7, num_trainable_parameters=7, parameter_bytes=512)
say(step={STEP})
"""
END = 'say(end="done")\nsay(exited=0)'
SLEEP = "time.sleep(60)"


@pytest.fixture
def scripted(tmp_path):
    """Makes a launcher whose child runs some lines for every order; at the end nothing of it may run."""
    launchers = []

    def make(*lines, **given):
        path = tmp_path / f"child{len(launchers)}.py"
        body = "\n".join(lines).strip().replace("\n", "\n    ")
        path.write_text(f"{PRELUDE}    {body}\n")
        launcher = Launcher(device="cpu", **{"time_limit_s": 20.0, "command": (sys.executable, str(path)), **given})
        launchers.append(launcher)
        return launcher

    yield make
    for launcher in launchers:
        launcher.close()


def session_of(launcher):
    return launcher._process.pid


@contextlib.contextmanager
def sessions_seen(monkeypatch):
    """The sessions of all processes that are started."""
    seen, popen = [], subprocess.Popen

    def start(*args, **given):
        process = popen(*args, **given)
        seen.append(process.pid)
        return process

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", start)
        yield seen


def assert_nothing_runs(sessions):
    assert sessions
    for session in sessions:
        assert wait_until(lambda session=session: not running(session)), running(session)


def test_a_trial_that_ends_well_is_what_was_reported(scripted):
    launcher = scripted(
        BEGIN,
        "say(gradient_bytes=512, optimizer_state_bytes=1024, kept_activation_bytes=3)\nsay(timed=[0.5, 0.25, 0.75])",
        'say(clocks={"sm": 1980}, workspace_bytes=None)',
        END,
    )
    found = launcher.measure(TRIAL)
    assert (found.trial, found.outcome, found.message, found.rank) == (TRIAL, "done", "", 0)
    assert (found.num_parameters, found.parameter_bytes, found.gradient_bytes) == (7, 512, 512)
    assert (found.optimizer_state_bytes, found.kept_activation_bytes) == (1024, 3)
    assert [step.number for step in found.steps] == [0]
    assert (found.step_time_s, found.versions) == (0.5, {"torch": "2.13"})
    assert (found.card.name, found.card.total_bytes, found.card.clocks) == ("CPU", 8, {"sm_loaded": 1980})
    assert 0 <= found.wall_s < SOON_S


def test_the_child_is_told_all_that_the_trial_is(scripted):
    launcher = scripted(BEGIN, 'say(end="failed", message=json.dumps(order))\nsay(exited=0)', ranks=(1, 4))
    trial = replace(TRIAL, limit_bytes=8, limit="8B", setup=replace(TRIAL.setup, lora=Lora(rank=4)))
    found = launcher.measure(trial, snapshot="/tmp/x")
    order = json.loads(found.message)
    assert {name: order[name] for name in ("ask", "snapshot", "device", "rank", "world_size")} == {
        "ask": "measure",
        "snapshot": "/tmp/x",
        "device": "cpu",
        "rank": 1,
        "world_size": 4,
    }
    assert order["trial"]["setup"]["lora"] == lora_record(Lora(rank=4))
    assert (order["trial"]["limit_bytes"], found.rank) == (8, 1)


def test_trials_share_the_process_that_has_imported_the_libraries(scripted):
    launcher = scripted(BEGIN, 'say(end="failed", message=f"{os.getpid()} {number}")\nsay(exited=0)')
    first, second = (launcher.measure(TRIAL).message.split() for _ in range(2))
    assert (first[0], second) == (str(session_of(launcher)), [first[0], "2"])


def test_a_trial_that_hangs_is_timed_out_and_gone(scripted, monkeypatch):
    """With all that it started itself."""
    launcher = scripted('subprocess.Popen(["sleep", "60"])', BEGIN, SLEEP, time_limit_s=1.0)
    with sessions_seen(monkeypatch) as sessions:
        begun = time.monotonic()
        found = launcher.measure(TRIAL)
    assert time.monotonic() - begun < 1 + SOON_S
    assert found.outcome == "timed-out"
    assert "1 s" in found.message
    assert [step.number for step in found.steps] == [0]
    assert found.num_parameters == 7
    assert_nothing_runs(sessions)


def test_a_child_that_never_stops_talking_is_timed_out(scripted, monkeypatch):
    """Once: as long as a line is waiting, `queue.get` does not look at the time, and the limit is never reached."""
    launcher = scripted("while True:\n    say(step=0) if False else print('x')", time_limit_s=0.5)
    with sessions_seen(monkeypatch) as sessions, interrupted(3.0, StuckError):
        assert launcher.measure(TRIAL).outcome == "timed-out"
    assert_nothing_runs(sessions)


def test_an_order_that_nobody_reads_is_timed_out(tmp_path, monkeypatch):
    """A config larger than a pipe holds, and a child that hangs before it has begun.

    Once: stdin is written to without any limit of time.
    """
    launcher = Launcher(command=(sys.executable, "-c", "import time; time.sleep(60)"), time_limit_s=0.5)
    trial = replace(TRIAL, config={**CONFIG, "id2label": {str(n): "label" for n in range(10_000)}})
    with launcher, sessions_seen(monkeypatch) as sessions, interrupted(3.0, StuckError):
        assert launcher.measure(trial).outcome == "timed-out"
    assert_nothing_runs(sessions)


@pytest.mark.parametrize("seconds", [30 * 86400.0, float("inf")])
def test_a_trial_may_take_as_long_as_it_takes(scripted, seconds):
    """Once: an OverflowError of `queue.get`."""
    assert scripted(BEGIN, END, time_limit_s=seconds).measure(TRIAL).outcome == "done"


DIES = "sys.stderr.write('first words\\nlast words\\n')\nsys.stderr.flush()\n"
# A fork that died is reported by the process that made it; that process may die as well.
KILLED_FORK = DIES + "say(exited=-9)"
KILLED_CHILD = DIES + "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("end", [KILLED_FORK, KILLED_CHILD])
def test_a_trial_that_is_killed_names_the_signal_and_who_might_have_sent_it(scripted, monkeypatch, end):
    launcher = scripted(BEGIN, end)
    with sessions_seen(monkeypatch) as sessions:
        found = launcher.measure(TRIAL)
    launcher.close()
    assert found.outcome == "killed"
    assert "signal 9" in found.message
    assert "its own memory" in found.message
    assert [step.number for step in found.steps] == [0]
    assert_nothing_runs(sessions)


@pytest.mark.parametrize("signal_name", ["SIGSEGV", "SIGABRT"])
def test_a_library_that_crashes_is_no_lack_of_memory(scripted, signal_name):
    number = getattr(signal, signal_name)
    found = scripted(BEGIN, f"say(exited={-number})").measure(TRIAL)
    assert (found.outcome, "its own memory" in found.message) == ("killed", False)
    assert f"signal {number}" in found.message


# Once: stderr is read by a thread of its own, which nobody waits for before the last line is asked for.
@pytest.mark.parametrize("end", [DIES + "say(exited=1)", DIES + "sys.exit(1)"])
def test_a_trial_that_ends_without_a_word_failed_with_the_last_line_of_stderr(scripted, end):
    found = scripted(BEGIN, end).measure(TRIAL)
    assert (found.outcome, found.phase) == ("failed", "")
    assert "status 1" in found.message
    assert "last words" in found.message
    assert "first words" not in found.message


def test_what_an_earlier_trial_said_is_no_reason_of_a_later_one(scripted):
    """Once: lines of stderr are forgotten with the process alone, which lives on for many trials."""
    launcher = scripted(
        BEGIN, "if number == 1:\n    sys.stderr.write('a warning\\n')", "    sys.stderr.flush()", "say(exited=-9)"
    )
    assert "a warning" in launcher.measure(TRIAL).message
    assert "a warning" not in launcher.measure(TRIAL).message


def test_after_a_death_the_next_trial_has_a_new_process(scripted, tmp_path):
    """Whether it dies within a trial or between two of them."""
    mark = tmp_path / "mark"
    launcher = scripted(
        f"first = not os.path.exists({str(mark)!r})",
        f"open({str(mark)!r}, 'a').close()",
        "if first:",
        "    os.kill(os.getpid(), signal.SIGKILL)",
        BEGIN,
        END,
        "os._exit(0)",
    )
    assert launcher.measure(TRIAL).outcome == "killed"
    assert launcher.measure(TRIAL).outcome == "done"
    assert wait_until(lambda: not running(session_of(launcher)))
    assert launcher.measure(TRIAL).outcome == "done"


def test_where_a_fork_cannot_use_the_card_every_trial_has_a_process_of_its_own(scripted):
    """A library has started CUDA while it was imported."""
    launcher = scripted(
        "if order['fork']:",
        "    say(end='failed', message='Cannot re-initialize CUDA in forked subprocess. To use CUDA with ...')",
        "    say(exited=0)",
        "    continue",
        BEGIN,
        "say(end='done', message=f'{os.getpid()} {number}')",
        "break",
    )
    assert launcher.describe().card.name == "CPU"
    first, second = (launcher.measure(TRIAL) for _ in range(2))
    assert (first.outcome, second.outcome) == ("done", "done")
    assert first.message != second.message
    assert (first.message.split()[1], second.message.split()[1]) == ("1", "1")


GARBAGE = r"""
print("Loading checkpoint shards: 100%")
print(12)
print("null")
print('["end", "failed"]')
print('{"end": "failed"')
sys.stdout.buffer.write(bytes(range(256)) + b"\n")
sys.stdout.buffer.flush()
"""


def test_what_is_no_report_is_left_alone(scripted):
    found = scripted(GARBAGE, BEGIN, GARBAGE, END).measure(TRIAL)
    assert (found.outcome, found.num_parameters) == ("done", 7)


def test_garbage_that_is_nested_too_deep_is_left_alone_too(scripted):
    """Once: a RecursionError is no ValueError."""
    assert scripted("print('[' * 100_000)", BEGIN, END).measure(TRIAL).outcome == "done"


def test_an_interrupt_ends_the_trial_and_its_process(scripted, monkeypatch):
    launcher = scripted('subprocess.Popen(["sleep", "60"])', BEGIN, SLEEP)
    with (
        sessions_seen(monkeypatch) as sessions,
        interrupted(1.0, KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        launcher.measure(TRIAL)
    assert_nothing_runs(sessions)


def test_a_launcher_that_is_closed_leaves_nothing_running(scripted, monkeypatch):
    launcher = scripted('subprocess.Popen(["sleep", "60"])', BEGIN, END)
    with sessions_seen(monkeypatch) as sessions, launcher:
        launcher.measure(TRIAL)
        assert len(running(sessions[0])) == 2
    assert_nothing_runs(sessions)
    launcher.close()


def test_a_device_that_is_not_found_in_time_is_a_fault_that_says_how_long(scripted, monkeypatch):
    """Once: the message has the time limit of trials."""
    monkeypatch.setattr(launch, "DESCRIBE_LIMIT_S", 0.5)
    with pytest.raises(ProbeError) as fault:
        scripted(SLEEP, time_limit_s=600.0).describe()
    assert fault.value.cure
    assert "600" not in fault.value.cause
    assert "0.5 s" in fault.value.cause


def test_an_interpreter_that_does_not_start_is_a_fault_that_says_why(tmp_path):
    command = (sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit('no such module')")
    with Launcher(command=command) as launcher, pytest.raises(ProbeError) as fault:
        launcher.describe()
    assert "no such module" in fault.value.cause
    assert fault.value.cure


# --------------------------------------------------------------------------------------------- the real child, on a CPU

needs_torch = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("torch", "transformers")),
    reason="needs torch and transformers",
)


@pytest.fixture(scope="module")
def cpu():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    with Launcher(device="cpu", time_limit_s=120.0, environment=environment) as launcher:
        launcher.describe()
        yield launcher


@cache
def measured(cpu, trial):
    return cpu.measure(trial)


EQUAL = {
    "fp32, eager": {"precision": "fp32", "attention": "eager"},
    "fp32, sdpa": {"precision": "fp32"},
    "bf16, sdpa": {},
    "bf16-mixed, sdpa": {"precision": "bf16-mixed"},
    "bf16-mixed, eager, full, short": {
        "precision": "bf16-mixed",
        "attention": "eager",
        "activation_checkpointing": "full",
        "micro_batch_size": 1,
        "seq_len": 32,
    },
    "bf16-mixed, eager, full": {
        "precision": "bf16-mixed",
        "attention": "eager",
        "activation_checkpointing": "full",
    },
    "K = 2, fused": {"gradient_accumulation_steps": 2, "optimizer": "adamw-fused"},
    "every-2": {"activation_checkpointing": "every-2"},
    "sgd with momentum": {"optimizer": "sgd-momentum"},
    "padding": {"padding": True},
    "updates in the backward pass": {"optimizer": "adamw-in-backward"},
    **{name: {"optimizer": name} for name in ("rmsprop", "adagrad", "muon", "adafactor", "lion")},
}
PEAK_BELOW = {"bf16-mixed, eager, full": 7_168}
"""The formula's peak is in the backward pass of eager attention, where CUDA's softmax_backward_data holds a product as
large as the scores (`kernels.SCRATCH_BY_OPERATOR`), which a CPU does not: there another instant is the highest."""

LATER = {"fp32, sdpa", "bf16-mixed, eager, full, short", "every-2", "sgd with momentum", "bf16, sdpa", "padding"}
LATER |= {"rmsprop", "adagrad", "muon", "adafactor", "lion"}
"""Left out by default: each takes a second."""


@needs_torch
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LATER else ()) for name in EQUAL]
)
def test_real_steps_take_the_bytes_of_the_formula(cpu, name):
    """To the byte: the CPU counts the tensors that a card would hold, and nothing else."""
    pytest.importorskip(library_of(EQUAL[name].get("optimizer", "adamw")))
    trial = replace(TRIAL, setup=replace(TRIAL.setup, **EQUAL[name]))
    found = measured(cpu, trial)
    formula = measuring.predict(trial, None)
    assert (found.outcome, found.message) == ("done", "")
    assert found.num_parameters == found.num_trainable_parameters == NUM_PARAMETERS
    found_bytes = {
        "parameters": found.parameter_bytes,
        "gradients": found.gradient_bytes,
        "optimizer states": found.optimizer_state_bytes,
        "kept": found.kept_activation_bytes,
        "peak": found.peak_allocated_bytes,
    }
    assert found_bytes == {
        "parameters": formula.parameter_bytes,
        "gradients": formula.gradient_bytes,
        "optimizer states": formula.optimizer_state_bytes,
        "kept": formula.kept_activation_bytes,
        "peak": formula.memory.peak_allocated_bytes - PEAK_BELOW.get(name, 0),
    }


@needs_torch
def test_a_record_of_a_cpu_has_steps_and_times_and_nothing_that_a_card_says(cpu):
    found = measured(cpu, TRIAL)
    assert [step.number for step in found.steps] == [0, 1, 2]
    names = ["forward", "backward", "clip", "optimizer", "zero_grad"]
    assert [[phase.name for phase in step.phases] for step in found.steps] == [names] * 3
    assert found.steps[1] == found.steps[2]._replace(number=1)
    assert 3 <= len(found.step_times_s) <= 7
    assert all(seconds > 0 for seconds in found.step_times_s)
    assert found.wall_s >= sum(found.step_times_s)
    assert (found.peak_reserved_bytes, found.peak_process_bytes, found.context_bytes) == (None, None, None)
    assert (found.process_basis, found.workspace_bytes, found.card.device) == ("", None, "cpu")
    assert {"torch", "python", "transformers", "memplan-probe"} <= set(found.versions)


@pytest.mark.slow
@needs_torch
def test_lora_trains_the_adapters_alone(cpu):
    """Rank 4 beside the seven linear layers of each block: 4 (in + out) parameters each, in fp32 as peft keeps them."""
    pytest.importorskip("peft", reason="adapters are peft's")
    found = measured(cpu, replace(TRIAL, setup=replace(TRIAL.setup, lora=Lora(rank=4))))
    shapes = 2 * [(64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64)]
    trained = sum(4 * (rows + columns) for rows, columns in shapes)
    sizes = [4 * 4 * side for shape in shapes for side in shape]
    num_bytes = sum(-(-size // 512) * 512 for size in sizes)
    assert (found.outcome, found.message) == ("done", "")
    assert found.num_trainable_parameters == trained
    assert found.num_parameters == NUM_PARAMETERS + trained
    assert found.gradient_bytes == num_bytes
    assert found.optimizer_state_bytes == 2 * num_bytes
    assert "peft" in found.versions


@needs_torch
@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no_such_model"},
        {"model_type": "llama; import os"},
        {"model_type": None},
        {"model_type": "bert", "architectures": ["LlamaForCausalLM"], "hidden_size": 65},
        {"num_attention_heads": 5},
        {"hidden_size": "wide"},
        {"vocab_size": -5},
        {"hidden_act": "no_such_function"},
        {"num_hidden_layers": 2.5},
        {"hidden_size": 10**12},
    ],
    ids=str,
)
def test_a_config_that_cannot_be_fails_with_a_message(cpu, changes):
    found = measured(cpu, replace(TRIAL, config={**CONFIG, **changes}))
    assert found.outcome == "failed"
    assert found.message
    assert "exited with status" not in found.message
    assert "\n" not in found.message
    assert found.survived is None


@needs_torch
def test_a_cpu_cannot_be_capped(cpu):
    found = measured(cpu, replace(TRIAL, limit_bytes=8 * 10**9, limit="8GB"))
    assert found.outcome == "failed"
    assert "--limit" in found.message


@needs_torch
def test_optimizer_states_of_a_library_that_is_missing_are_a_failure_that_names_it(cpu):
    if find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    found = measured(cpu, replace(TRIAL, setup=replace(TRIAL.setup, optimizer="adamw-8bit")))
    assert found.outcome == "failed"
    assert "bitsandbytes" in found.message


@needs_torch
def test_without_cuda_a_card_is_a_fault_with_a_cure():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with Launcher(device="cuda") as launcher, pytest.raises(ProbeError) as fault:
        launcher.describe()
    assert "CUDA" in fault.value.cause
    assert fault.value.cure


@needs_torch
def test_an_error_that_nobody_foresaw_is_in_the_message(cpu, monkeypatch):
    """Two ranks, and no MASTER_ADDR to meet at.

    Once: the fork ends with os._exit in a `finally`, before Python prints the traceback; nothing says why it failed.
    """
    monkeypatch.setattr(cpu, "world_size", 2)
    found = cpu.measure(replace(TRIAL, setup=replace(TRIAL.setup, data_parallel_size=2)))
    assert found.outcome == "failed"
    assert "MASTER_ADDR" in found.message


@needs_torch
def test_a_library_that_cannot_be_imported_is_in_the_message(tmp_path):
    (tmp_path / "transformers.py").write_text("raise RuntimeError('built for another torch')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with Launcher(device="cpu", environment=environment) as launcher:
        found = launcher.measure(TRIAL)
    assert found.outcome == "failed"
    assert "built for another torch" in found.message


PARENT = """
import json, sys
from memplan.probes.launch import Launcher
from memplan.specs.records import parse_trial

launcher = Launcher(device="cpu")
launcher._fork = sys.argv[2] == "fork"
start = launcher._start

def start_and_say():
    process = start()
    print(process.pid, flush=True)
    return process

launcher._start = start_and_say
launcher.measure(parse_trial(json.loads(sys.argv[1])))
print("done", flush=True)
"""


@needs_torch
# Once: only a fork looks whether its parent is still there; without one the trial runs on to its end.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fork", "own"])
def test_a_parent_that_is_killed_leaves_nothing_running(kind):
    """No handler runs on SIGKILL: whatever the parent started sees by itself that nobody gives orders any more."""
    trial = {
        "model": "tiny",
        "config": {**CONFIG, "max_position_embeddings": 8192},
        "setup": {"micro_batch_size": 8, "seq_len": 8192, "precision": "fp32"},
    }
    command = [sys.executable, "-c", PARENT, json.dumps(trial), kind]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        session = int(parent.stdout.readline())
        assert wait_until(lambda: trains(session, num_processes=2 if kind == "fork" else 1), 60)
        assert parent.poll() is None
    finally:
        parent.kill()
        rest = parent.communicate(timeout=10)[0]
    try:
        assert rest == ""
        assert wait_until(lambda: not running(session)), running(session)
    finally:
        for pid in running(session):
            os.kill(pid, signal.SIGKILL)


def trains(session, num_processes):
    """Whether the trial has begun: so many processes, one of them with far more memory than libraries take."""
    pids = running(session)
    sizes = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") for pid in pids]
    return len(pids) == num_processes and max(sizes) > 600 * 2**20


@pytest.mark.slow
@needs_torch
def test_two_ranks_of_torchrun_keep_a_record_each_with_the_buckets_of_their_gradients(tmp_path):
    """DistributedDataParallel copies gradients into buckets, which it keeps: as many bytes again as the gradients."""
    model, records = tmp_path / "config.json", tmp_path / "records"
    model.write_text(json.dumps(CONFIG))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "memplan", "probe", str(model), "--device", "cpu", "--records", str(records)]
    setup = ["--micro-batch", "2", "--seq-len", "64", "--precision", "fp32"]
    ran = subprocess.Popen(
        [*torchrun, *program, *setup], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    try:
        said = ran.communicate(timeout=240)[1]
    finally:
        ran.terminate()  # torchrun ends its ranks then; where it is killed they go on
    assert ran.returncode == 0, said
    found = read_measurements(str(records))
    assert found.bad_lines == ()
    assert sorted(one.rank for one in found.measurements) == [0, 1]
    with Launcher(device="cpu") as launcher:
        alone = launcher.measure(Trial(model="tiny", config=CONFIG, setup=replace(TRIAL.setup, precision="fp32")))
    for one in found.measurements:
        assert (one.outcome, one.trial.setup.data_parallel_size) == ("done", 2)
        assert one.gradient_bytes == alone.gradient_bytes
        assert one.kept_activation_bytes == alone.kept_activation_bytes
        buckets = 4 * NUM_PARAMETERS
        assert buckets <= one.peak_allocated_bytes - alone.peak_allocated_bytes <= buckets + 8 * 512
