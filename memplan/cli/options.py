"""The options that `estimate` and `suggest` share: how each is read, and what a wrong one is answered with.

Every value is checked here, under the name of its option; combinations are checked where they are used.  An option of
the documentation that has no formula yet is a fault: nothing that was asked for is left out silently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

from memplan.errors import MemplanError, UsageError, did_you_mean
from memplan.specs.training import ATTENTIONS, LARGEST_COUNT, LOSSES, OPTIMIZERS, PRECISIONS, check_checkpointing
from memplan.units import parse_count, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Kind = click.ParamType[Any]
else:
    Kind = click.ParamType  # before click 8.4 it takes no parameter

FORMATS = ("text", "json", "csv", "markdown")

LONGEST_ECHO = 40
"""Longer values are cut when they are quoted."""


class Options(NamedTuple):
    """What the user gave; None where nothing."""

    model: str | None
    gpu: str | None
    gpus: int | None
    target_batch: int | None
    target_tokens: int | None
    micro_batch: int | None
    accumulation: int | None
    checkpointing: str | None
    seq_len: int | None
    precision: str | None
    optimizer: str | None
    attention: str | None
    loss: str | None
    dropout: float | None
    reserve: str | None
    headroom: float | None
    confidence: float | None
    format: str
    output: str | None
    quiet: bool
    traceback: bool

    def choices(self) -> dict[str, Any]:
        """The arguments of `memplan.api.estimate` and `suggest`, beside the model and the GPU."""
        names = (
            "gpus",
            "target_batch",
            "target_tokens",
            "micro_batch",
            "accumulation",
            "checkpointing",
            "seq_len",
            "precision",
            "optimizer",
            "attention",
            "loss",
            "dropout",
            "reserve",
            "headroom",
        )
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


# -- values ------------------------------------------------------------------------------------------------------------


def flag_of(param: click.Parameter | None) -> str:
    """The name under which the user knows a parameter."""
    return max(param.opts, key=len) if isinstance(param, click.Option) else "MODEL"


def quoted(value: str) -> str:
    """A value to quote in a sentence, cut where it is long."""
    return repr(value if len(value) <= LONGEST_ECHO else f"{value[:LONGEST_ECHO]}...")


class Text(Kind):
    """Any text that is not the next option."""

    name = "text"
    annotation = "str"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The value itself."""
        text = str(value)
        if text.startswith("--"):
            raise UsageError(
                f"{flag_of(param)} has no value: {text} follows it.", f"Say {flag_of(param)} VALUE {text}."
            )
        if not text.strip() or "\0" in text:
            raise UsageError(
                f"The value of {flag_of(param)} is empty.", f"See memplan --help for what {flag_of(param)} takes."
            )
        return text


class Count(Kind):
    """A whole number from 1 to 10^9."""

    name = "count"
    annotation = "int"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        text = str(value).strip()
        digits = text.replace("_", "").lstrip("+")
        range_cure = f"It has to be a whole number from 1 to {LARGEST_COUNT:,}."
        if not (digits.isascii() and digits.removeprefix("-").isdigit()):
            raise UsageError(f"{flag_of(param)} is {quoted(text)}, not a whole number.", range_cure)
        if len(digits) > len(str(LARGEST_COUNT)) or not 1 <= int(digits) <= LARGEST_COUNT:
            raise UsageError(f"{flag_of(param)} is {quoted(text)}.", range_cure)
        return int(digits)


class Tokens(Kind):
    """A number of tokens such as ``4M``."""

    name = "tokens"
    annotation = "int"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        try:
            number = parse_count(str(value))
        except UsageError as fault:
            raise UsageError(f"{flag_of(param)}: {fault.cause}", fault.cure) from None
        if number > LARGEST_COUNT:
            raise UsageError(
                f"{flag_of(param)} is {quoted(str(value))}.", f"It has to be {LARGEST_COUNT:,} at most, such as 4M."
            )
        return number


class ByteSize(Kind):
    """A size with its unit, such as ``1GiB``."""

    name = "size"
    annotation = "str"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, once it is known to be a size."""
        try:
            parse_size(str(value))
        except UsageError as fault:
            raise UsageError(f"{flag_of(param)}: {fault.cause}", fault.cure) from None
        return str(value)


class Fraction(Kind):
    """A number from 0 up to, but not including, a limit; ``%`` may follow a percentage."""

    name = "number"
    annotation = "float"

    def __init__(self, limit: int, *, above_zero: bool = False) -> None:
        self.limit = limit
        self.above_zero = above_zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        text = str(value).strip()
        plain = text.removesuffix("%").strip() if self.limit == 100 else text
        try:
            number = float(plain)
        except ValueError:
            number = float("nan")
        if (number > 0 if self.above_zero else number >= 0) and number < self.limit:
            return number
        start = "above 0" if self.above_zero else "of at least 0"
        raise UsageError(
            f"{flag_of(param)} is {quoted(text)}.", f"It has to be a number {start} and below {self.limit}."
        )


class Name(Kind):
    """One of some names, upper and lower case alike."""

    name = "name"
    annotation = "str"

    def __init__(self, known: Iterable[str], *, later: Sequence[str] = ()) -> None:
        self.known = tuple(known)
        self.later = tuple(later)
        """Names that are documented and have no formula yet."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """All of them."""
        return "|".join(self.known)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it is spelt."""
        name = str(value).strip().lower()
        if name in self.known:
            return name
        known = f"Known: {', '.join(self.known)}."
        if name in self.later:
            raise MemplanError(f"{flag_of(param)} {name} is not modelled yet.", known)
        raise UsageError(
            f"{flag_of(param)} {quoted(str(value))} is not known.", did_you_mean(name, self.known, otherwise=known)
        )

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """The names that begin like this."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in self.known if name.startswith(incomplete.lower())]


class Checkpointing(Name):
    """none, selective, full or every-N."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it is spelt."""
        name = str(value).strip().lower()
        if name.startswith("every-") and len(name) <= LONGEST_ECHO:
            try:
                check_checkpointing(name)
            except UsageError:
                raise UsageError(
                    f"{flag_of(param)} {name!r} is not known.", "N of every-N is a whole number from 1, as in every-2."
                ) from None
            return name
        return super().convert(value, param, ctx)


# -- options -----------------------------------------------------------------------------------------------------------


class Option(click.Option):
    """An option under a heading of the help."""

    def __init__(self, *args: Any, section: str = "Options", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.section = section


class SetupCommand(click.Command):
    """A command whose help lists its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options by heading."""
        by_section: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                by_section.setdefault(getattr(param, "section", "Output"), []).append(record)
        for section, records in by_section.items():
            with formatter.section(section):
                formatter.write_dl(records)


LATER_OPTIMIZERS = ("paged-adamw-8bit", "adafactor", "lion", "lion-8bit")
LATER_LOSSES = ("chunked", "fused")
NOT_MODELLED = (
    "--lora-rank",
    "--lora-targets",
    "--lora-dropout",
    "--quantize",
    "--freeze",
    "--zero-stage",
    "--offload",
)
"""Documented options that have no formula yet."""


def _refuse(ctx: click.Context, param: click.Parameter, value: object) -> None:
    if value is not None:
        _refuse_flag(flag_of(param))


def _refuse_flag(flag: str) -> NoReturn:
    raise MemplanError(
        f"{flag} is not modelled yet.", "Leave it out: memplan would have to answer for another configuration."
    )


def _format(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    """`--json` and `--format` as one value."""
    as_json = ctx.params.pop("as_json", False)
    if as_json and value not in {None, "json"}:
        raise UsageError(f"--json and --format {value} contradict each other.", "Leave one of them out.")
    return "json" if as_json else value or "text"


def _both_targets(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    if value is not None and ctx.params.get("target_batch") is not None:
        raise UsageError(
            "--target-batch and --target-tokens contradict each other: both say how large a step is.",
            "Leave one of them out.",
        )
    return value


def _option(*names: str, section: str, **settings: Any) -> Callable[[Any], Any]:
    return click.option(*names, cls=Option, section=section, **settings)


COUNT, TEXT = Count(), Text()

BATCH, MODEL, CARD, OUTPUT = "The batch", "How it is trained", "The GPU", "Output"

OUTPUT_OPTIONS = (
    _option(
        "--json", "as_json", section=OUTPUT, is_flag=True, is_eager=True, help="One JSON object; bytes are integers."
    ),
    _option("--format", section=OUTPUT, type=Name(FORMATS), callback=_format, help="text is for people."),
    _option(
        "--output",
        "-o",
        section=OUTPUT,
        type=TEXT,
        metavar="FILE",
        help="Write to FILE, whole or not at all; - is stdout.",
    ),
    _option("--quiet", "-q", section=OUTPUT, is_flag=True, help="The result in as few lines as it can be."),
    _option("--traceback", section=OUTPUT, is_flag=True, help="With a fault, show where in the program it arose."),
)

SETUP_OPTIONS = (
    click.argument("model", required=False, type=TEXT, metavar="[MODEL]"),
    _option("--gpu", section=CARD, type=TEXT, help="A card (rtx4090, 2xa100-80gb), a size (24GB, 24GiB) or auto."),
    _option("--gpus", section=CARD, type=COUNT, metavar="N", help="GPUs with different data (1)."),
    _option("--reserve", section=CARD, type=ByteSize(), metavar="SIZE", help="Bytes that others need on the card (0)."),
    _option("--headroom", section=CARD, type=Fraction(100), metavar="PERCENT", help="Share that has to stay free (5)."),
    _option(
        "--confidence",
        section=CARD,
        type=Fraction(1, above_zero=True),
        metavar="P",
        help="Probability that the bound holds; without calibration the bound is the headroom.",
    ),
    _option(
        "--target-batch",
        section=BATCH,
        type=COUNT,
        metavar="N",
        is_eager=True,
        help="Sequences per optimizer step, over all GPUs.",
    ),
    _option(
        "--target-tokens",
        section=BATCH,
        type=Tokens(),
        metavar="N",
        callback=_both_targets,
        help="Tokens per optimizer step, such as 4M.",
    ),
    _option("--micro-batch", section=BATCH, type=COUNT, metavar="N", help="Sequences in one forward pass on one GPU."),
    _option("--accumulation", section=BATCH, type=COUNT, metavar="N", help="Micro-batches per optimizer step."),
    _option(
        "--seq-len", section=BATCH, type=COUNT, metavar="N", help="Tokens per sequence (2048, or what the model has)."
    ),
    _option(
        "--precision", section=MODEL, type=Name(PRECISIONS), help="mixed is fp32 parameters under autocast (bf16)."
    ),
    _option(
        "--optimizer",
        section=MODEL,
        type=Name(OPTIMIZERS, later=LATER_OPTIMIZERS),
        metavar="NAME",
        help=f"{', '.join(OPTIMIZERS)}; adamw is torch's: foreach.",
    ),
    _option(
        "--checkpointing",
        section=MODEL,
        type=Checkpointing(("none", "selective", "full", "every-N")),
        help="Which activations are computed again.",
    ),
    _option("--attention", section=MODEL, type=Name(ATTENTIONS), help="As transformers calls them (sdpa)."),
    _option("--loss", section=MODEL, type=Name(LOSSES, later=LATER_LOSSES), help="All logits at once."),
    _option("--dropout", section=MODEL, type=Fraction(1), metavar="P", help="Instead of all the config has."),
    *(click.option(flag, hidden=True, expose_value=False, callback=_refuse, type=str) for flag in NOT_MODELLED),
    *OUTPUT_OPTIONS,
)


def setup_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """MODEL and the options of a setup."""
    return _with(SETUP_OPTIONS, command)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those that say how an answer is written."""
    return _with(OUTPUT_OPTIONS, command)


def _with(options: Sequence[Callable[[Any], Any]], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command
