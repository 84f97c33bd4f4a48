"""`memplan.accumulate` leaves the gradient of the whole batch; `GradientNoise` finds a noise scale that is known."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import memplan
from memplan.accumulation.losses import causal_lm_loss, count_labels, count_next_tokens, mean_loss
from memplan.accumulation.noise import GradientNoise
from memplan.accumulation.splitting import split
from memplan.errors import MemplanError, UsageError
from memplan.probes.devices import CpuDevice, watching
from memplan.probes.models import transformers_model
from memplan.probes.steps import run_trial
from memplan.specs.measurement import Trial
from memplan.specs.training import Setup
from tests.support.language_models import Tiny, gradient, ragged, relative, whole_gradient
from tests.support.ranks import on_ranks

SAME = 1e-5
"""Relative error of fp32 sums in another order; naive averaging is off by 0.03 and more on these batches."""


def micro(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    return list(split(batch, size))


def naive(model: nn.Module, micro_batches: list[dict[str, torch.Tensor]]) -> None:
    for one in micro_batches:
        total, num = causal_lm_loss(model, one)
        (total / num / len(micro_batches)).backward()


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 4])
def test_the_gradient_is_that_of_the_whole_batch(num_micro_batches: int, size: int) -> None:
    model, batch = Tiny(), ragged(num_micro_batches * size, 12, seed=num_micro_batches)
    wanted = whole_gradient(model, batch)
    step = memplan.accumulate(model, batch, micro_batch_size=size)
    assert relative(gradient(model), wanted) < SAME
    assert step.num_micro_batches == num_micro_batches
    assert step.num_tokens == int((batch["labels"][:, 1:] != -100).sum())
    if num_micro_batches > 1:  # and the test can fail: naive averaging is another update
        model.zero_grad()
        naive(model, micro(batch, size))
        assert relative(gradient(model), wanted) > 1000 * SAME


def test_a_short_last_window() -> None:
    """Seven samples in micro-batches of three: three, three and one."""
    model, batch = Tiny(), ragged(7, 9)
    wanted = whole_gradient(model, batch)
    assert memplan.accumulate(model, batch, micro_batch_size=3).num_micro_batches == 3
    assert relative(gradient(model), wanted) < SAME


def test_the_loss_is_the_mean_over_all_tokens() -> None:
    model, batch = Tiny(), ragged(6, 9)
    total, num = causal_lm_loss(model, batch)
    step = memplan.accumulate(model, batch, micro_batch_size=2)
    assert float(step.loss) == pytest.approx(float(total.detach() / num), rel=1e-6)
    assert not step.loss.requires_grad


def test_ready_micro_batches_of_different_lengths() -> None:
    """As a loader makes them that pads each to its own longest sequence."""
    model, first, second = Tiny(), ragged(2, 5, seed=1), ragged(3, 11, seed=2)
    (a, n), (b, m) = causal_lm_loss(model, first), causal_lm_loss(model, second)
    ((a + b) / (n + m)).backward()
    wanted = gradient(model)
    model.zero_grad()
    memplan.accumulate(model, [first, second])
    assert relative(gradient(model), wanted) < SAME


def test_samples_are_collated() -> None:
    model, batch = Tiny(), ragged(5, 8)
    samples = [{name: value[n] for name, value in batch.items()} for n in range(5)]
    wanted = whole_gradient(model, batch)
    memplan.accumulate(model, samples, micro_batch_size=2)
    assert relative(gradient(model), wanted) < SAME
    model.zero_grad()
    lengths = []

    def collate(some: list[Any]) -> Any:
        lengths.append(len(some))
        return torch.utils.data.default_collate(some)

    memplan.accumulate(model, samples, micro_batch_size=3, collate=collate)
    assert lengths == [3, 2]
    assert relative(gradient(model), wanted) < SAME


def test_a_batch_without_labelled_tokens_gives_zeros_and_says_so() -> None:
    model, batch = Tiny(), ragged(4, 6)
    batch["labels"][:] = -100
    step = memplan.accumulate(model, batch, micro_batch_size=2, max_grad_norm=1.0)
    assert step.num_tokens == 0
    assert float(gradient(model).abs().max()) == 0


def test_a_micro_batch_without_labelled_tokens_changes_nothing() -> None:
    model, batch = Tiny(), ragged(4, 6)
    batch["labels"][:2] = -100
    wanted = whole_gradient(model, batch)
    memplan.accumulate(model, batch, micro_batch_size=2)
    assert relative(gradient(model), wanted) < SAME


def test_it_is_clipped_once_behind_the_last_micro_step() -> None:
    model, batch = Tiny(), ragged(6, 9)
    wanted = whole_gradient(model, batch)
    limit = 0.1 * float(wanted.norm())
    step = memplan.accumulate(model, batch, micro_batch_size=2, max_grad_norm=limit)
    assert float(step.grad_norm) == pytest.approx(float(wanted.norm()), rel=SAME)
    assert relative(gradient(model), 0.1 * wanted) < SAME
    assert memplan.accumulate(model, batch).grad_norm is None


def test_a_scaler_is_taken_out_before_the_clip() -> None:
    model, batch = Tiny(), ragged(6, 9)
    wanted = whole_gradient(model, batch)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    limit = 0.5 * float(wanted.norm())
    step = memplan.accumulate(model, batch, micro_batch_size=2, max_grad_norm=limit, scaler=scaler, optimizer=optimizer)
    assert float(step.grad_norm) == pytest.approx(float(wanted.norm()), rel=SAME)
    assert relative(gradient(model), 0.5 * wanted) < SAME
    scaler.step(optimizer)
    scaler.update()
    with pytest.raises(UsageError, match="optimizer="):
        memplan.accumulate(model, batch, scaler=scaler)


def test_any_module_and_loss() -> None:
    """A classifier: a tuple of tensors, one loss a sample."""
    model = nn.Linear(5, 3)
    inputs, classes = torch.randn(7, 5), torch.randint(3, (7,))
    nn.functional.cross_entropy(model(inputs), classes).backward()
    wanted = gradient(model)
    model.zero_grad()

    def loss(module: nn.Module, some: Any) -> tuple[torch.Tensor, int]:
        return nn.functional.cross_entropy(module(some[0]), some[1], reduction="sum"), len(some[0])

    step = memplan.accumulate(model, (inputs, classes), micro_batch_size=2, loss=loss, count=lambda some: len(some[0]))
    assert step.num_tokens == 7
    assert relative(gradient(model), wanted) < SAME


def test_a_model_that_returns_a_mean() -> None:
    class Mean(Tiny):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
            logits = super().forward(input_ids).logits
            return SimpleNamespace(
                loss=nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            )

    batch = ragged(6, 9)
    wanted = whole_gradient(Tiny(), batch)
    model = Mean()
    memplan.accumulate(model, batch, micro_batch_size=3, loss=mean_loss())
    assert relative(gradient(model), wanted) < SAME
    with pytest.raises(MemplanError, match="were counted before"):
        memplan.accumulate(model, batch, micro_batch_size=3, loss=mean_loss(count_labels))


def test_what_is_counted() -> None:
    batch = {"labels": torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 9]])}
    assert int(count_next_tokens(batch)) == 3  # the first 5 has nothing before it
    assert int(count_labels(batch)) == 4
    assert int(count_next_tokens(batch | {"shift_labels": torch.tensor([[7, 8, -100]])})) == 2


def test_shift_labels_are_taken_as_they_are() -> None:
    """Padding-free collators shift themselves; the model predicts from every position."""
    model, batch = Tiny(), ragged(4, 8)
    wanted = whole_gradient(model, batch)
    gap = torch.full((4, 1), -100)
    given = {"input_ids": batch["input_ids"], "shift_labels": torch.cat([batch["labels"][:, 1:], gap], 1)}
    memplan.accumulate(model, given, micro_batch_size=2)
    assert relative(gradient(model), wanted) < SAME


@pytest.mark.parametrize(
    ("batch", "size", "words"),
    [
        ({"a": torch.zeros(4, 2), "labels": torch.zeros(3, 2)}, 2, "not of one number of samples"),
        ({"input_ids": torch.zeros(2, 2)}, 1, "no 'labels'"),
        (ragged(2, 4), 0, "micro_batch_size is 0"),
        ([], None, "without a micro-batch"),
        ("text", 1, "not of one number"),
    ],
)
def test_batches_that_cannot_be_split(batch: Any, size: int | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        memplan.accumulate(Tiny(), batch, micro_batch_size=size)


def test_what_is_no_tensor_of_samples_goes_into_each() -> None:
    parts = split({"x": torch.arange(5), "flag": True, "scale": torch.tensor(2.0)}, 2)
    assert [part["x"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert all(part["flag"] is True and float(part["scale"]) == 2 for part in parts)
    assert [len(part) for part in split(torch.zeros(5, 2), 3)] == [3, 2]


def test_the_loop_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Two epochs' worth of one batch and a short one; the loss falls."""
    code = textwrap.dedent(memplan.accumulate.__doc__.partition("\n\n")[2].partition("\n\n")[0])
    assert "for batch in loader" in code
    batch = ragged(40, 9)
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    given = {
        "memplan": memplan,
        "DataLoader": torch.utils.data.DataLoader,
        "data": 6 * [{name: value[n] for name, value in batch.items()} for n in range(40)],
        "collate": torch.utils.data.default_collate,
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    }
    exec(code, given)
    losses = [float(line.split()[1].rstrip(",")) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == -(-6 * 40 // 32)
    assert losses[-1] < losses[0]


def test_importing_it_needs_no_torch() -> None:
    script = "import sys, memplan; memplan.accumulate, memplan.GradientNoise; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


# -- ranks -------------------------------------------------------------------------------------------------------------

SHARES = (((6, 6), 2), ((6, 3), 2), ((5, 1), 1), ((4, 4), 4))
"""Samples of two ranks, and how many a micro-batch has: other numbers of tokens, of samples, of micro-batches."""


class Untied(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.embed.weight.detach().clone() * 0.7)


def rows(batch: dict[str, torch.Tensor], start: int, num: int) -> dict[str, torch.Tensor]:
    return {name: value[start : start + num] for name, value in batch.items()}


def counting(traffic: list[int]) -> Any:
    """A communication hook that averages, as the default one does, and keeps count."""

    def hook(_, bucket):  # without annotations: DistributedDataParallel reads them
        traffic.append(1)
        tensor = bucket.buffer().div_(torch.distributed.get_world_size())
        work = torch.distributed.all_reduce(tensor, async_op=True).get_future()
        return work.then(lambda done: done.value()[0])

    return hook


def replicated(rank: int, sizes: tuple[int, int], micro_size: int) -> dict[str, Any]:
    batch = ragged(sum(sizes), 9, seed=3)
    wanted = whole_gradient(Tiny(), batch)
    model, noise, traffic = DistributedDataParallel(Tiny()), GradientNoise(decay=0), []
    model.register_comm_hook(None, counting(traffic))
    mine = rows(batch, sum(sizes[:rank]), sizes[rank])
    step = memplan.accumulate(model, mine, micro_batch_size=micro_size, noise=noise)
    return {
        "error": relative(gradient(model), wanted),
        "tokens": step.num_tokens,
        "loss": float(step.loss),
        "syncs": len(traffic),
        "noise": (noise.gradient_square, noise.trace),
    }


def sharded(rank: int) -> float:
    """FSDP2: two ranks with 2 and 4 samples, two micro-batches each."""
    from torch.distributed.fsdp import fully_shard

    batch = ragged(6, 9, seed=4)
    expected = whole_gradient(Untied(), batch)
    model = fully_shard(Untied())
    mine = rows(batch, 2 * rank, 2 + 2 * rank)
    step = memplan.accumulate(model, mine, micro_batch_size=1 + rank, max_grad_norm=1e9)
    found = torch.cat([one.grad.full_tensor().flatten() for one in model.parameters()])
    return max(relative(found, expected), abs(float(step.grad_norm / expected.norm()) - 1))


def refusals(rank: int) -> list[str]:
    from torch.distributed.fsdp import fully_shard

    uneven = ragged(3 - rank, 5)
    given = (
        (Tiny(), ragged(2, 5), None),
        (DistributedDataParallel(Tiny()), [ragged(2, 5)] if rank else [], None),
        (fully_shard(Untied()), uneven, 1),
    )
    return [refusal(*one) for one in given]


def refusal(model: nn.Module, batch: Any, size: int | None) -> str:
    with pytest.raises(UsageError) as fault:
        memplan.accumulate(model, batch, micro_batch_size=size)
    return str(fault.value)


def on_two(rank: int) -> dict[str, Any]:
    return {
        "replicated": [replicated(rank, *one) for one in SHARES],
        "sharded": sharded(rank),
        "refusals": refusals(rank),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What two ranks found; started once, for the seconds that it takes."""
    return on_ranks(on_two, 2)


@pytest.mark.parametrize("case", range(len(SHARES)))
def test_two_ranks(ranks: list[dict[str, Any]], case: int) -> None:
    """Every token weighs the same, and gradients meet once."""
    sizes, micro_size = SHARES[case]
    batch = ragged(sum(sizes), 9, seed=3)
    total, num = causal_lm_loss(Tiny(), batch)
    noise = GradientNoise(decay=0)
    parts = [one for at in range(2) for one in micro(rows(batch, sum(sizes[:at]), sizes[at]), micro_size)]
    memplan.accumulate(Tiny(), parts, noise=noise)
    for rank in ranks:
        found = rank["replicated"][case]
        assert found["error"] < SAME
        assert found["tokens"] == int(num)
        assert found["loss"] == pytest.approx(float(total.detach() / num), rel=1e-6)
        assert found["syncs"] == 1
        assert found["noise"] == pytest.approx((noise.gradient_square, noise.trace), rel=1e-4)


def test_sharded_parameters(ranks: list[dict[str, Any]]) -> None:
    assert max(rank["sharded"] for rank in ranks) < SAME


def test_ranks_that_cannot_share_a_step_say_so_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        plain, empty, uneven = rank["refusals"]
        assert "nothing averages the gradients of Tiny" in plain
        assert "a rank without a micro-batch" in empty
        assert "Some ranks have 2 micro-batches and others 3" in uneven


# -- noise -------------------------------------------------------------------------------------------------------------


class Mean(nn.Module):
    """Loss (w - x)^2 / 2 of a sample x: the gradient at w is w - mean(x), its covariance that of x."""

    def __init__(self, at: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(at)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((self.w - x) ** 2).sum(1) / 2


def summed(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    return model(x).sum(), len(x)


@pytest.mark.parametrize(("deviation", "helps"), [(1.0, False), (6.0, True)])
def test_a_known_noise_scale(deviation: float, helps: bool) -> None:
    """Samples x ~ N(0, s^2 I) in 10 dimensions, w of length 2: |G|^2 = 4, tr(S) = 10 s^2, so B_simple = 2.5 s^2."""
    generator = torch.Generator().manual_seed(0)
    at = torch.full((10,), 2 / 10**0.5)
    model, noise = Mean(at), GradientNoise(decay=0.999)
    for _ in range(600):
        sizes = torch.randint(1, 8, (6,), generator=generator).tolist()
        parts = [deviation * torch.randn(size, 10, generator=generator) for size in sizes]
        model.zero_grad()
        memplan.accumulate(model, parts, loss=summed, count=len, noise=noise)
    assert noise.scale_tokens == pytest.approx(2.5 * deviation**2, rel=0.1)  # 3 standard errors of the seed's draw
    assert noise.helps() is helps
    assert noise.progress(2.5 * deviation**2) == pytest.approx(0.5, abs=0.03)
    assert ("would still help" in noise.says()) is helps


def test_the_estimates_by_hand() -> None:
    """|G|^2 = 3 and tr(S) = 8: batches of 2 and 8 have |G_B|^2 of 7 and 4 on average."""
    noise = GradientNoise(decay=0.5)
    for _ in range(12):
        noise.update(7.0, 2, 4.0, 8)
    assert (noise.gradient_square, noise.trace) == pytest.approx((3.0, 8.0))
    assert noise.scale_tokens == pytest.approx(8 / 3)
    assert noise.helps() is False
    assert noise.progress(8) == pytest.approx(0.75)


def test_noise_is_measured_under_a_scaler_and_before_the_clip() -> None:
    model, batch = Tiny(), ragged(6, 9)
    plain, scaled = GradientNoise(), GradientNoise()
    memplan.accumulate(model, batch, micro_batch_size=2, noise=plain)
    model.zero_grad()
    memplan.accumulate(
        model,
        batch,
        micro_batch_size=2,
        noise=scaled,
        max_grad_norm=1e-3,
        scaler=torch.amp.GradScaler("cpu", init_scale=1024.0),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    assert (scaled.gradient_square, scaled.trace) == pytest.approx((plain.gradient_square, plain.trace), rel=1e-4)


def test_squares_are_those_of_each_micro_batch() -> None:
    """Against gradients of each micro-batch taken by themselves; tied weights are seen as one."""
    model, batch = Tiny(), ragged(6, 9)
    sizes, squares = [], []
    for one in micro(batch, 2):
        squares.append(float(whole_gradient(model, one).norm() ** 2))
        sizes.append(int(count_next_tokens(one)))
    large = sum(sizes)
    mean = sum(n * square for n, square in zip(sizes, squares, strict=True)) / large
    wanted = GradientNoise()
    wanted.update(mean, large / 3, float(whole_gradient(model, batch).norm() ** 2), large)
    found = GradientNoise()
    memplan.accumulate(model, batch, micro_batch_size=2, noise=found)
    assert (found.gradient_square, found.trace) == pytest.approx((wanted.gradient_square, wanted.trace), rel=1e-4)


def test_what_is_not_known_is_said() -> None:
    noise = GradientNoise()
    assert noise.scale_tokens is None
    assert "not known yet" in noise.says()
    noise.update(1.0, 2, 5.0, 8)  # by chance the larger batch has the larger gradient: no noise to be seen
    assert noise.scale_tokens is None
    assert noise.helps() is None
    with pytest.raises(UsageError):
        noise.update(1.0, 8, 1.0, 8)
    with pytest.raises(UsageError):
        GradientNoise(decay=1)


# -- what it takes -----------------------------------------------------------------------------------------------------

SMALL_LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "tie_word_embeddings": False,
}


def peak_of_a_loop(setup: Setup) -> int:
    """Allocated bytes at the highest point of the third step of a loop around `memplan.accumulate`, on the CPU."""
    device = CpuDevice(has_padding=False)
    device.open(None)

    def loss(model: nn.Module, one: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=setup.precision == "bf16-mixed"):
            return causal_lm_loss(model, one)

    with watching(device):
        model = transformers_model(SMALL_LLAMA).build(setup).module.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
        device.settle()
        for _ in range(3):
            ids = torch.randint(2000, (setup.global_batch_size, setup.seq_len))
            memplan.accumulate(
                model,
                {"input_ids": ids, "labels": ids},
                micro_batch_size=setup.micro_batch_size,
                loss=loss,
                max_grad_norm=1.0,
            )
            optimizer.step()
            optimizer.zero_grad()
            del ids
            peak = device.read().peak_allocated
    counters = 512 * sum(1 for _ in model.parameters())  # of AdamW's steps: on the host where the model is on a GPU
    return int(peak) - counters


def peak_of_the_trainer(setup: Setup) -> int:
    found: list[dict[str, Any]] = []
    run_trial(Trial(model="small", config=SMALL_LLAMA, setup=setup), CpuDevice(has_padding=False), found.append)
    steps = [one["step"] for one in found if "step" in one]
    return max(phase["peak_allocated_bytes"] for phase in steps[-1]["phases"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize(("micro_batch_size", "steps"), [(1, 1), (2, 3)])
def test_a_step_takes_what_was_planned_for_the_trainer(precision: str, micro_batch_size: int, steps: int) -> None:
    """Never more, and less by no more than what a step has besides: the ids of all micro-batches, shifted labels."""
    setup = Setup(
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=steps,
        seq_len=128,
        precision=precision,
        attention="eager",
    )
    loop, trainer = peak_of_a_loop(setup), peak_of_the_trainer(setup)
    assert 0.995 * trainer < loop <= trainer
