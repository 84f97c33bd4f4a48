"""The options that `estimate` and `suggest` share, as one table, and how the text of each is read; without click.

Two readers use the table: `memplan.cli.plain` reads ordinary command lines, `memplan.cli.options` makes click's options
of it for all others, for the help and for completion.  Every value is checked here, under the name of its option;
combinations are checked where they are used.  An option of the documentation that has no formula yet is a fault:
nothing that was asked for is left out silently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from memplan.errors import MemplanError, UsageError, did_you_mean
from memplan.specs.adapter import ADAPTER_DTYPES
from memplan.specs.choices import ARGUMENTS, as_names
from memplan.specs.ranks import as_layers, as_ranks
from memplan.specs.training import (
    ATTENTIONS,
    BATCHINGS,
    LARGEST_COUNT,
    LOSSES,
    OBJECTIVES,
    OFFLOADS,
    OPTIMIZERS,
    PRECISIONS,
    QUANTIZATIONS,
    TEACHER_DTYPES,
    check_checkpointing,
)
from memplan.specs.values import NamedTuple
from memplan.units import is_nothing, parse_count, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Reader = Callable[[str, str], Any]

FORMATS = ("text", "json", "csv", "markdown", "html")
CHECKPOINTINGS = ("none", "selective", "save-attention", "full", "every-N")

NOT_MODELLED = ("--zero-stage",)
"""Documented options that have no formula yet."""

OBJECTIVES_NOT_MODELLED = ("kto", "grpo")
"""Objectives that have no formula yet."""

LONGEST_ECHO = 40
"""Longer values are cut when they are quoted."""


class Options(NamedTuple):
    """What the user gave; None where nothing."""

    model: str | None = None
    gpu: str | None = None
    gpus: int | None = None
    target_batch: int | None = None
    target_tokens: int | None = None
    micro_batch: int | None = None
    accumulation: int | None = None
    checkpointing: str | None = None
    seq_len: int | None = None
    precision: str | None = None
    optimizer: str | None = None
    attention: str | None = None
    loss: str | None = None
    objective: str | None = None
    teacher: str | None = None
    teacher_dtype: str | None = None
    label_smoothing: float | None = None
    supervised: float | None = None
    dropout: float | None = None
    padding: bool = False
    batching: str | None = None
    packed_sequences: int | None = None
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] | None = None
    lora_dropout: float | None = None
    lora_dtype: str | None = None
    dora: bool = False
    modules_to_save: tuple[str, ...] | None = None
    lora_layers: tuple[int, ...] | None = None
    lora_ranks: tuple[tuple[str, int], ...] | None = None
    freeze: tuple[str, ...] | None = None
    quantize: str | None = None
    offload: str | None = None
    reentrant: bool = False
    upcast: bool = False
    compile: bool = False
    eval_batch: int | None = None
    eval_samples: int | None = None
    eval_accumulation: int | None = None
    eval_generate: int | None = None
    reserve: str | None = None
    headroom: float | None = None
    confidence: float | None = None
    data: str | None = None
    tokenizer: str | None = None
    field: str | None = None
    prompt_field: str | None = None
    truncation: str | None = None
    max_loss: float | None = None
    sample: int | None = None
    format: str = "text"
    output: str | None = None
    quiet: bool = False
    traceback: bool = False

    def choices(self) -> dict[str, Any]:
        """The arguments of `memplan.api.estimate` and `suggest`, beside the model and the GPU."""
        names = (*ARGUMENTS, "gpus", "target_batch", "target_tokens", "reserve", "headroom", "confidence")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


# -- values: (text, name of the option) -> value -----------------------------------------------------------------------


def quoted(value: str) -> str:
    """A value to quote in a sentence, cut where it is long."""
    return repr(value if len(value) <= LONGEST_ECHO else f"{value[:LONGEST_ECHO]}...")


def read_text(text: str, flag: str) -> str:
    """Any text that is not the next option."""
    if text.startswith("--"):
        raise UsageError(f"{flag} has no value: {text} follows it.", f"Say {flag} VALUE {text}.")
    if not text.strip() or "\0" in text:
        raise UsageError(f"The value of {flag} is empty.", f"See memplan --help for what {flag} takes.")
    return text


def read_count(text: str, flag: str) -> int:
    """A whole number from 1 to 10^9."""
    text = text.strip()
    digits = text.replace("_", "").lstrip("+")
    range_cure = f"It has to be a whole number from 1 to {LARGEST_COUNT:,}."
    if not (digits.isascii() and digits.removeprefix("-").isdigit()):
        raise UsageError(f"{flag} is {quoted(text)}, not a whole number.", range_cure)
    if len(digits) > len(str(LARGEST_COUNT)) or not 1 <= int(digits) <= LARGEST_COUNT:
        raise UsageError(f"{flag} is {quoted(text)}.", range_cure)
    return int(digits)


def read_tokens(text: str, flag: str) -> int:
    """A number of tokens such as ``4M``."""
    try:
        number = parse_count(text)
    except UsageError as fault:
        raise UsageError(f"{flag}: {fault.cause}", fault.cure) from None
    if number > LARGEST_COUNT:
        raise UsageError(f"{flag} is {quoted(text)}.", f"It has to be {LARGEST_COUNT:,} at most, such as 4M.")
    return number


def read_names(text: str, flag: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return as_names(flag, read_text(text, flag))


def read_layers(text: str, flag: str) -> tuple[int, ...]:
    """Numbers of layers."""
    return as_layers(flag, read_text(text, flag))


def read_ranks(text: str, flag: str) -> tuple[tuple[str, int], ...]:
    """Patterns of adapted layers with their ranks."""
    return as_ranks(flag, read_text(text, flag))


def read_size(text: str, flag: str) -> str:
    """A size with its unit, such as ``1GiB``, or nothing, ``0``: the text, once it is known to be one."""
    try:
        if not is_nothing(text):
            parse_size(text)
    except UsageError as fault:
        raise UsageError(f"{flag}: {fault.cause}", fault.cure) from None
    return text


def below(limit: int, *, above_zero: bool = False) -> Reader:
    """Reads a number from 0 up to, but not including, a limit; ``%`` may follow a percentage."""

    def read_fraction(text: str, flag: str) -> float:
        text = text.strip()
        plain = text.removesuffix("%").strip() if limit == 100 else text
        try:
            number = float(plain)
        except ValueError:
            number = float("nan")
        if (number > 0 if above_zero else number >= 0) and number < limit:
            return number
        start = "above 0" if above_zero else "of at least 0"
        raise UsageError(f"{flag} is {quoted(text)}.", f"It has to be a number {start} and below {limit}.")

    return read_fraction


def read_share(text: str, flag: str) -> float:
    """A number above 0 and up to 1."""
    try:
        number = float(text.strip())
    except ValueError:
        number = float("nan")
    if 0 < number <= 1:
        return number
    raise UsageError(f"{flag} is {quoted(text)}.", "It has to be a number above 0 and up to 1.")


def one_of(names: Iterable[str], *, later: Iterable[str] = ()) -> Reader:
    """Reads one of some names, upper and lower case alike; those of `later` are documented and have no formula yet."""
    known = tuple(names)

    def read_name(text: str, flag: str) -> str:
        name = text.strip().lower()
        if name in known:
            return name
        cure = f"Known: {', '.join(known)}."
        if name in later:
            raise MemplanError(f"{flag} {name} is not modelled yet.", cure)
        raise UsageError(f"{flag} {quoted(text)} is not known.", did_you_mean(name, known, otherwise=cure))

    return read_name


_read_known_checkpointing = one_of(CHECKPOINTINGS)


def read_checkpointing(text: str, flag: str) -> str:
    """none, selective, save-attention, full or every-N."""
    name = text.strip().lower()
    if name.startswith("every-") and len(name) <= LONGEST_ECHO:
        try:
            check_checkpointing(name)
        except UsageError:
            cure = "N of every-N is a whole number from 1, as in every-2."
            raise UsageError(f"{flag} {name!r} is not known.", cure) from None
        return name
    return str(_read_known_checkpointing(text, flag))


def refuse(text: str, flag: str) -> NoReturn:
    """The answer to an option that has no formula yet."""
    raise MemplanError(
        f"{flag} is not modelled yet.", "Leave it out: memplan would have to answer for another configuration."
    )


# -- two values together -----------------------------------------------------------------------------------------------


def check_targets(target_batch: int | None, target_tokens: int | None) -> None:
    """Raise `UsageError` where both are given."""
    if target_batch is not None and target_tokens is not None:
        raise UsageError(
            "--target-batch and --target-tokens contradict each other: both say how large a step is.",
            "Leave one of them out.",
        )


def choose_format(as_json: bool, named: str | None) -> str:
    """`--json` and `--format` as one value."""
    if as_json and named not in {None, "json"}:
        raise UsageError(f"--json and --format {named} contradict each other.", "Leave one of them out.")
    return "json" if as_json else named or "text"


# -- the table ---------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """An option."""

    names: tuple[str, ...]
    """The long one first."""
    section: str
    """Heading of the help."""
    help: str
    read: Reader | None = None
    """None: it takes no value and is a bool."""
    metavar: str | None = None
    """What the help calls its value."""
    known: tuple[str, ...] = ()
    """The values that a shell completes."""
    first: bool = False
    """Whether it is read before all others, which are read in the order in which they are given."""
    hidden: bool = False

    @property
    def flag(self) -> str:
        """The name under which the user knows it."""
        return self.names[0]

    @property
    def field(self) -> str:
        """Its field of `Options`; ``json`` goes into ``format``, and what is hidden has none."""
        return self.flag.lstrip("-").replace("-", "_").lower()


def _named(
    flag: str,
    section: str,
    help: str,  # noqa: A002 -- the column's name
    known: Iterable[str],
    *,
    later: Iterable[str] = (),
    metavar: str = "",
) -> Row:
    names = tuple(known)
    return Row((flag,), section, help, one_of(names, later=later), metavar or "|".join(names), names)


BATCH, TRAINING, TRAINED = "The batch", "How it is trained", "What is trained"
EVALUATED = "Evaluation between the steps"
CARD, OUTPUT = "The GPU", "Output"

MODEL = Row(("MODEL",), "", "", read_text, "[MODEL]")
"""The one argument."""

OUTPUT_ROWS = (
    Row(("--json",), OUTPUT, "One JSON object; bytes are integers.", first=True),
    _named("--format", OUTPUT, "text is for people, html is one page for a browser.", FORMATS),
    Row(("--output", "-o"), OUTPUT, "Write to FILE, whole or not at all; - is stdout.", read_text, "FILE"),
    Row(("--quiet", "-q"), OUTPUT, "The result in as few lines as it can be."),
    Row(("--traceback",), OUTPUT, "With a fault, show where in the program it arose."),
)

SETUP_ROWS = (
    Row(("--gpu",), CARD, "A card (rtx4090, 2xa100-80gb), a size (24GB, 24GiB) or auto.", read_text, "TEXT"),
    Row(("--gpus",), CARD, "GPUs with different data (1).", read_count, "N"),
    Row(("--reserve",), CARD, "Bytes that others need on the card (0).", read_size, "SIZE"),
    Row(("--headroom",), CARD, "Share that has to stay free (5).", below(100), "PERCENT"),
    Row(
        ("--confidence",),
        CARD,
        "Probability that the bound holds, by measurements of the card.",
        below(1, above_zero=True),
        "P",
    ),
    Row(("--target-batch",), BATCH, "Sequences per optimizer step, over all GPUs.", read_count, "N", first=True),
    Row(("--target-tokens",), BATCH, "Tokens per optimizer step, such as 4M.", read_tokens, "N"),
    Row(("--micro-batch",), BATCH, "Sequences in one forward pass on one GPU.", read_count, "N"),
    Row(("--accumulation",), BATCH, "Micro-batches per optimizer step.", read_count, "N"),
    Row(("--seq-len",), BATCH, "Tokens per sequence, or packed row (2048, or what the model has).", read_count, "N"),
    Row(("--padding",), BATCH, "Micro-batches hold padding, so that an attention mask is passed."),
    _named("--batching", BATCH, "One a row; end to end (--seq-len is the mean); full rows of several.", BATCHINGS),
    Row(("--packed-sequences",), BATCH, "Sequences in a packed row of --seq-len tokens (2).", read_count, "N"),
    _named("--precision", TRAINING, "mixed is fp32 parameters under autocast (bf16).", PRECISIONS),
    _named(
        "--optimizer",
        TRAINING,
        f"{', '.join(OPTIMIZERS)}; adamw is torch's: foreach.",
        OPTIMIZERS,
        metavar="NAME",
    ),
    Row(
        ("--checkpointing",),
        TRAINING,
        "Which activations are computed again.",
        read_checkpointing,
        "|".join(CHECKPOINTINGS),
        CHECKPOINTINGS,
    ),
    Row(("--reentrant",), TRAINING, "Checkpointing by use_reentrant=True (transformers 4)."),
    _named("--attention", TRAINING, "As transformers calls them (sdpa).", ATTENTIONS),
    _named("--loss", TRAINING, "all logits; TRL up to 1.14, from 1.15; Liger; cut cross-entropy (full).", LOSSES),
    _named(
        "--objective",
        TRAINING,
        f"{', '.join(OBJECTIVES)}; dpo, orpo, reward and contrastive count pairs (lm).",
        OBJECTIVES,
        later=OBJECTIVES_NOT_MODELLED,
        metavar="NAME",
    ),
    Row(("--teacher",), TRAINING, "Model that is distilled, with --objective distillation.", read_text, "MODEL"),
    _named("--teacher-dtype", TRAINING, "In which it is loaded (as the model itself).", TEACHER_DTYPES),
    Row(("--label-smoothing",), TRAINING, "Share spread over all words, label_smoothing_factor (0).", below(1), "P"),
    Row(("--supervised",), TRAINING, "Share of the tokens that have a label (1).", read_share, "P"),
    Row(("--dropout",), TRAINING, "Instead of all the config has.", below(1), "P"),
    Row(("--lora-rank",), TRAINED, "Train adapters of this rank beside frozen weights.", read_count, "R"),
    Row(("--lora-targets",), TRAINED, "Layers that get one, embeddings too (all-linear).", read_names, "NAMES"),
    Row(("--lora-dropout",), TRAINED, "Dropout before them (0).", below(1), "P"),
    _named("--lora-dtype", TRAINED, "fp32, as peft keeps them, or that of the weights (fp32).", ADAPTER_DTYPES),
    Row(("--dora",), TRAINED, "Adapters of magnitude and direction (DoRA)."),
    Row(("--modules-to-save",), TRAINED, "Modules of which a full copy is trained, too.", read_names, "NAMES"),
    Row(("--lora-layers",), TRAINED, "Layers that get adapters, as in 0,16-31 (all).", read_layers, "NUMBERS"),
    Row(("--lora-ranks",), TRAINED, "Ranks of some: down_proj=8,layers.0.*=64.", read_ranks, "NAME=R,..."),
    Row(("--freeze",), TRAINED, "Parameters or modules that are not: model.embed_tokens,...", read_names, "PATTERNS"),
    _named("--quantize", TRAINED, "Store the frozen linear weights in few bits.", QUANTIZATIONS),
    Row(("--upcast",), TRAINED, "What is not quantised in fp32 (prepare_model_for_kbit_training)."),
    _named(
        "--offload",
        TRAINING,
        "What checkpointing keeps waits on the host.",
        OFFLOADS,
        later=("optimizer", "params"),
        metavar="activations",
    ),
    Row(("--compile",), TRAINING, "torch.compile (inductor): a range is told, its upper end is planned with."),
    Row(("--eval-batch",), EVALUATED, "Count one, with so many sequences per forward pass (8).", read_count, "N"),
    Row(("--eval-samples",), EVALUATED, "Keep the logits of so many for metrics (none).", read_count, "N"),
    Row(("--eval-accumulation",), EVALUATED, "Move them to the host after N batches (at the end).", read_count, "N"),
    Row(("--eval-generate",), EVALUATED, "Generate so many tokens behind each sequence (none).", read_count, "N"),
    *(Row((flag,), TRAINING, "", refuse, "TEXT", hidden=True) for flag in NOT_MODELLED),
    *OUTPUT_ROWS,
)
