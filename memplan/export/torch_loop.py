"""A plan as a program: a plain PyTorch loop that carries it out with `memplan.accumulate`.

It loads the model, adapters and optimizer as they were planned with, splits each batch into the planned micro-batches,
and refuses data that would take more.  Whatever the loop cannot do is refused by name.

Nothing of a plan gets into the program but what `memplan.specs.training.Setup` accepts and quoted names: a plan may
come from a file that somebody else wrote.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError
from memplan.export.trainer import DTYPE_NAMES, trainer_arguments
from memplan.export.trainer_code import adapting, loading, model_imports, pretrained
from memplan.specs.choices import choices_of, setup_fields
from memplan.specs.training import OPTIMIZERS, PRECISIONS, SAVE_ATTENTION, Setup, check_count
from memplan.specs.values import NamedTuple, replace
from memplan.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Document = Mapping[str, Any]

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "templates", "loop.py.jinja")
MISFITS = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What reading a plan of another shape raises."""


class Maker(NamedTuple):
    """How an optimizer is made."""

    imported: str
    """Line, empty for those of torch."""
    made: str
    """Call, without the parameters and the learning rate."""
    arguments: str = ""
    skips_embeddings: bool = False
    """Whether states of embeddings stay in 32 bits, as the Trainer has it."""
    has_modes: bool = False
    """Whether it is told when it trains."""


def _bitsandbytes(kind: str, bits: int, *, paged: bool = False) -> Maker:
    arguments = f", optim_bits={bits}{', is_paged=True' if paged else ''}"
    return Maker("import bitsandbytes", f"bitsandbytes.optim.{kind}", arguments, skips_embeddings=bits == 8)


def _schedule_free(kind: str) -> Maker:
    return Maker(f"from schedulefree import {kind}", kind, has_modes=True)


MAKER_BY_OPTIMIZER = {
    "adamw-foreach": Maker("", "torch.optim.AdamW", ", foreach=True"),
    "adamw-fused": Maker("", "torch.optim.AdamW", ", fused=True"),
    "adamw-forloop": Maker("", "torch.optim.AdamW", ", foreach=False"),
    "sgd": Maker("", "torch.optim.SGD", ", foreach=True"),
    "sgd-momentum": Maker("", "torch.optim.SGD", ", momentum=0.9, foreach=True"),
    "rmsprop": Maker("", "torch.optim.RMSprop", ", foreach=True"),
    "adagrad": Maker("", "torch.optim.Adagrad", ", foreach=True"),
    "adafactor": Maker(
        "from transformers.optimization import Adafactor", "Adafactor", ", scale_parameter=False, relative_step=False"
    ),
    "adamw-32bit": _bitsandbytes("AdamW", 32),
    "adamw-8bit": _bitsandbytes("AdamW", 8),
    "paged-adamw": _bitsandbytes("AdamW", 32, paged=True),
    "paged-adamw-8bit": _bitsandbytes("AdamW", 8, paged=True),
    "lion": _bitsandbytes("Lion", 32),
    "lion-8bit": _bitsandbytes("Lion", 8),
    "paged-lion": _bitsandbytes("Lion", 32, paged=True),
    "paged-lion-8bit": _bitsandbytes("Lion", 8, paged=True),
    "rmsprop-32bit": _bitsandbytes("RMSprop", 32),
    "rmsprop-8bit": _bitsandbytes("RMSprop", 8),
    "ademamix": _bitsandbytes("AdEMAMix", 32),
    "ademamix-8bit": _bitsandbytes("AdEMAMix", 8),
    "paged-ademamix": _bitsandbytes("AdEMAMix", 32, paged=True),
    "paged-ademamix-8bit": _bitsandbytes("AdEMAMix", 8, paged=True),
    "schedule-free-adamw": _schedule_free("AdamWScheduleFree"),
    "schedule-free-sgd": _schedule_free("SGDScheduleFree"),
}
"""How `memplan.probes.optimizers` makes them, too; others have an order of their own in the step."""


def torch_loop(plan: Document) -> str:
    """The program of a plan's best configuration.

    Args:
        plan: The plan as plain data.

    Raises:
        MemplanError: nothing fits, the loop cannot do what was planned, or it is no complete plan.
    """
    try:
        return _rendered(plan)
    except MISFITS as fault:
        raise MemplanError(
            f"The plan is not complete ({type(fault).__name__}: {str(fault)[:80]}).",
            "Write it again, with memplan suggest ... --json.",
        ) from fault


def _rendered(plan: Document) -> str:
    best = plan["best"]
    if best is None:
        raise MemplanError("Nothing fits, so there is nothing to run.", "Follow a way out that the plan names first.")
    setup = _setup(best["setup"])
    refused = next(_refusals(plan, setup), None)
    if refused is not None:
        what, cure = refused
        raise MemplanError(f"The loop does not do {what}.", cure)
    trainer = trainer_arguments(replace(setup, evaluation=None, optimizer="adamw"))  # for what it says of loading
    text: str = _template().render(_values({**plan, "trainer": trainer}, setup))
    return text


def _setup(record: Document) -> Setup:
    return Setup(data_parallel_size=record["data_parallel_size"], **setup_fields(choices_of(record)))


def _refusals(plan: Document, setup: Setup) -> Iterator[tuple[str, str]]:
    """What of the plan the loop cannot do, each with a cure."""
    task, loss, optimizer = plan["model"]["task"], setup.loss, OPTIMIZERS[setup.optimizer]
    trained = "Train it in a loop of your own, around memplan.accumulate(loss=..., count=...)."
    if not plan["model"]["attentions"]:
        yield "modules of your own", trained
    if setup.objective != "lm" or task != "causal-lm" or setup.label_smoothing:
        smoothed = "smoothed labels" if setup.label_smoothing else f"the objective {setup.objective} of a {task} model"
        yield smoothed, "Use the trainer that the plan names, or memplan.accumulate(loss=..., count=...)."
    if loss != "full":
        yield f"the loss {loss}, which replaces the model's own", "Plan with --loss full."
    if setup.batching == "packed":
        yield "packing", "Plan with --batching padding-free, or use the trainer that the plan names."
    if setup.compile:
        yield "torch.compile", "Plan without --compile."
    if optimizer not in MAKER_BY_OPTIMIZER:
        yield f"the optimizer {setup.optimizer}", "Plan with another --optimizer."
    if setup.freeze:
        yield "frozen parts", "Plan without --freeze."
    if setup.activation_checkpointing in {"selective", SAVE_ATTENTION}:
        yield f"{setup.activation_checkpointing} checkpointing", "Plan with --checkpointing full."


def _values(plan: Document, setup: Setup) -> dict[str, Any]:
    """What the template shows."""
    best, maker = plan["best"], MAKER_BY_OPTIMIZER[OPTIMIZERS[setup.optimizer]]
    autocast = PRECISIONS[setup.precision][1]
    ranks = setup.data_parallel_size
    settings = f"PYTORCH_ALLOC_CONF={_plain(best['alloc_conf'])} " if best["alloc_conf"] else ""
    started = f"torchrun --nproc-per-node {ranks} train.py" if ranks > 1 else "python train.py"
    return {
        "title": _plain(f"{plan['model']['name']} on {plan['gpu']['label']}: {_split(setup)}."),
        "version": _plain(plan["memplan_version"]),
        "peak": format_bytes(int(best["peak_process_bytes"])),
        "usable": format_bytes(int(plan["gpu"]["usable_bytes"])),
        "launch": f"{settings}{started}",
        "micro": setup.micro_batch_size,
        "steps": setup.gradient_accumulation_steps,
        "ranks": ranks,
        "most": _most(plan, setup),
        "flattened": setup.is_flattened,
        "padded": setup.padding,
        "varies": setup.padding or setup.is_flattened or setup.micro_batch_size == 1,  # samples may differ in length
        "imports": sorted(filter(None, _imports(plan, setup, maker)), key=_module_of),
        "model": [*_dropout(plan, setup), *loading(plan, **_config(setup))],
        "adapters": list(adapting(plan)),
        "checkpointing": list(_checkpointing(setup)),
        "quantised": setup.quantize is not None,
        "optimizer": list(_optimizer(maker)),
        "evaluates": maker.has_modes,
        "autocast": None if autocast is None else DTYPE_NAMES[autocast],
        "scaled": autocast == "fp16",
    }


def _split(setup: Setup) -> str:
    """How the batch comes about."""
    micro, steps, ranks = setup.micro_batch_size, setup.gradient_accumulation_steps, setup.data_parallel_size
    product = f"{micro} x accumulation {steps} x {ranks} GPU{'' if ranks == 1 else 's'}"
    return f"micro-batch {product} = {setup.global_batch_size} sequences a step"


def _most(plan: Document, setup: Setup) -> int:
    """Tokens of a sample, or of a micro-batch that lies in one row."""
    data = plan.get("data")
    most = setup.tokens_per_micro_batch if setup.is_flattened else data["length"]["max_len"] if data else setup.seq_len
    check_count("max_len", most)
    return int(most)


def _imports(plan: Document, setup: Setup, maker: Maker) -> Iterator[str]:
    names = ["AutoConfig"] if setup.dropout is not None else []
    names += ["DataCollatorWithFlattening"] if setup.is_flattened else []
    yield from model_imports(plan, adapts=True, names=names)
    yield "import torch"
    yield maker.imported
    if setup.data_parallel_size > 1:
        yield "import torch.distributed as dist"
        yield "from torch.nn.parallel import DistributedDataParallel"


def _module_of(line: str) -> tuple[bool, str]:
    """In the order of import lists: modules first, then names from modules."""
    return line.startswith("from "), line.split()[1]


def _config(setup: Setup) -> dict[str, str]:
    return {} if setup.dropout is None else {"config": "config"}


def _dropout(plan: Document, setup: Setup) -> Iterator[str]:
    """Every probability of dropout of the config takes the planned value."""
    if setup.dropout is None:
        return
    yield f"config = AutoConfig.from_pretrained({pretrained(plan)!r})"
    yield "of_text = config.get_text_config()"
    yield "for name, value in list(vars(of_text).items()):"
    yield '    if "drop" in name and type(value) in (int, float):'
    yield f"        setattr(of_text, name, {float(setup.dropout)!r})"


def _checkpointing(setup: Setup) -> Iterator[str]:
    mode = setup.activation_checkpointing
    if mode == "none":
        return
    more = f", every_n_layers={int(mode.removeprefix('every-'))}" if mode.startswith("every-") else ""
    more += ", offload=True" if setup.offload else ""
    if more:
        yield "# from transformers 5.23 on"
    enable = "activation" if more else "gradient"
    yield f'model.{enable}_checkpointing_enable({{"use_reentrant": {setup.reentrant}}}{more})'


def _optimizer(maker: Maker) -> Iterator[str]:
    if maker.skips_embeddings:
        yield "for part in model.modules():  # the states of embeddings stay in 32 bits, as in the Trainer"
        yield "    if isinstance(part, torch.nn.Embedding):"
        yield "        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()"
        yield '        manager.register_module_override(part, "weight", {"optim_bits": 32})'
    yield f"optimizer = {maker.made}(trained, lr=options.learning_rate{maker.arguments})"
    if maker.has_modes:
        yield "optimizer.train()"


def _plain(text: str) -> str:
    """Text that cannot end the string it stands in."""
    return "".join(character if character.isprintable() and character not in '"\\' else "?" for character in text)


def _template() -> Any:
    import jinja2

    with open(TEMPLATE, encoding="utf-8") as file:
        made = jinja2.Environment(
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
        )  # the program is text and no page: nothing is escaped
        return made.from_string(file.read())
