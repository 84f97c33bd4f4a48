"""The data of a plan as text: what it loses, what each way to make batches takes, what to do about the longest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.planner.feed import GROUPED, PACKED, PADDED, PADDING_FREE, SMALLER
from memplan.report.ansi import Line
from memplan.report.layout import plural, wrap
from memplan.report.lengths import quantile_words, records_words
from memplan.report.text import gib, paragraph, table, title
from memplan.sequences.maximum import GIVEN, LONGEST, LOSS, POSITIONS
from memplan.units import format_count, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    Document = dict[str, Any]

CUT_WORDS = {
    "right": "the first tokens stay",
    "left": "the last tokens stay",
    "middle": "the first and the last half stay",
    "drop": "longer ones are left out",
}
"""What is left of a sequence that is too long."""

WAY_WORDS = {
    PADDED: "each row to the longest of its micro-batch, in random order",
    SMALLER: "the same in smaller micro-batches: fewer rows, less padding",
    GROUPED: "rows of about the same length together (train_sampling_strategy='group_by_length' of transformers 5.23, "
    "which puts the longest first); batches are no longer drawn at random alone",
    PADDING_FREE: "the same records end to end in one row (padding_free=True of TRL 1.16)",
    PACKED: "rows that are filled first (packing=True of TRL 1.16, bfd), so that the records of a step vary in number",
}

COLUMNS = "* the plan. Padding: of a batch, on average. Tokens: of the data, in a step. Steps: in an epoch."
FIRST = (
    "Put the longest batch first: what does not fit then fails at the start, not hours later. Optimizer states are "
    "there from the second step on, so give it to the first two"
)
FIRST_GROUPED = "group_by_length begins with the longest"
ALWAYS_FULL = "Packed rows are as good as full in every step: no batch is much larger than another"


def percent(share: float) -> str:
    """A share; something is never shown as nothing, nor less than all as all."""
    value = 100 * share
    if 0 < value < 0.05:
        return "<0.1 %"
    return ">99.9 %" if 99.95 <= value < 100 else f"{value:.1f} %"


def data_lines(data: Document) -> Iterator[Line]:
    """What the data is, and where it is cut."""
    for label, text in data_facts(data):
        yield from paragraph(label, text)


def length_lines(data: Document) -> Iterator[Line]:
    """The maximum length alone."""
    for label, text in data_facts(data):
        if label == "length":
            yield from paragraph(label, text)


def data_facts(data: Document) -> Iterator[tuple[str, str]]:
    """The same as labels and texts."""
    tokens = format_count(data["num_tokens"])
    yield "data", f"{data['name']}: {records_words(data)}, {tokens} tokens, {quantile_words(data)}"
    if data["is_sample"]:
        yield "sample", sample_words(data)
    yield "length", f"{data['length']['max_len']:,}{_why(data)}: {loss_words(data)}"
    yield "", step_words(data)


def data_words(data: Document) -> str:
    """What the data is, beside that of other plans."""
    counted = "as the records say" if data["tokenizer"] is None else f"counted by {data['tokenizer']}"
    return f"{data['name']}: {records_words(data)}, {format_count(data['num_tokens'])} tokens, {counted}"


def length_words(data: Document) -> str:
    """The maximum length and the records that it cuts, likewise."""
    return f"{data['length']['max_len']:,}, {percent(data['length']['share_truncated'])} of the records are cut"


def epoch_words(data: Document) -> str:
    """How long an epoch is, likewise; of a plan that does not fit, the steps alone."""
    plan = next((way for way in data["ways"] if way["is_plan"]), None)
    if plan is None or plan["plan"] is None:
        return "not known"
    steps = plural(plan["steps_per_epoch"], "step")
    return f"{steps}, at least {format_seconds(plan['epoch_time_s'])}" if plan["fits"] else steps


def sample_words(data: Document) -> str:
    """What a sample stands for, and what holds for the rest as well."""
    text = (
        "Shares, tokens and times are estimates from the sample; steps of an epoch are those of all records. What is "
        f"said of memory holds for the rest too, if it is cut at {data['length']['max_len']:,}"
    )
    return f"{text}: all of its tokens may have a label." if data["supervised"] is not None else f"{text}."


def _why(data: Document) -> str:
    return {
        GIVEN: ", as was asked for",
        LONGEST: f", the longest record{' of the sample' if data['is_sample'] else ''}",
        POSITIONS: ", as many as the model has positions for",
        LOSS: "",
    }[data["why"]]


def loss_words(data: Document) -> str:
    """What the maximum length costs, and what the next shorter would."""
    loss, shorter = data["length"], data["shorter"]
    if not loss["num_truncated"]:
        text = "nothing is cut" if not data["is_sample"] else f"none of the sample is cut, {_others(data)}"
    else:
        of_labels = "" if data["num_supervised_tokens"] == data["num_tokens"] else _of_labels(loss)
        text = (
            f"{percent(loss['share_truncated'])} of the records are cut ({CUT_WORDS[data['truncation']]}), "
            f"{percent(loss['share_tokens_lost'])} of the tokens are lost{of_labels}"
        )
        if loss["num_without_labels"]:
            text += f"; {plural(loss['num_without_labels'], 'record')}{_of_sample(data)} without a label left"
    if shorter is not None:
        text += (
            f". {shorter['max_len']:,} would lose {100 * shorter['share_supervised_lost']:.3g} % of the labels, above "
            f"--max-loss {100 * data['max_loss']:g}"
        )
    return f"{text}."


def _others(data: Document) -> str:
    """What the data may have that a sample has not."""
    return f"of all records {percent(data['unseen'])} at most are longer (95 % sure)"


def _of_sample(data: Document) -> str:
    return " of the sample" if data["is_sample"] else ""


def _of_labels(loss: Document) -> str:
    return f", {percent(loss['share_supervised_lost'])} of those with a label"


def step_words(data: Document) -> str:
    """How large an optimizer step is."""
    samples = data["samples_per_step"]
    number = f"{samples:,.0f}" if abs(samples - round(samples)) < 0.05 else f"{samples:,.1f}"
    asked = "" if data["target_tokens"] is None else f" ({data['target_tokens']:,} were asked for)"
    return f"A step takes {number} records, {data['tokens_per_step']:,.0f} tokens on average{asked}."


def candidate_rows(data: Document) -> list[tuple[str, ...]]:
    """What each maximum length loses, the names of the columns first."""
    rows: list[tuple[str, ...]] = [("maximum", "records cut", "tokens lost", "labels lost", "records without a label")]
    for one in data["candidates"]:
        shares = (one["share_truncated"], one["share_tokens_lost"], one["share_supervised_lost"])
        rows.append((f"{one['max_len']:,}", *map(percent, shares), f"{one['num_without_labels']:,}"))
    return rows


def way_lines(data: Document) -> Iterator[Line]:
    """The ways to make batches beside each other, and what each is; nothing where none of them fits."""
    if not any(way["fits"] for way in data["ways"]):
        return
    yield from title("Batches of this data, each on its worst micro-batch")
    yield from table(way_rows(data))
    yield from (Line(line, "faint") for line in wrap(COLUMNS, first="  "))
    for label, text in way_facts(data):
        yield from (Line(line) for line in wrap(f"{label}: {text}", first="  ", rest="    "))


def way_rows(data: Document) -> list[tuple[str, ...]]:
    """A table: its head, and a row a way."""
    rows: list[tuple[str, ...]] = [("batches", "micro", "accum.", "peak GiB", "padding", "tokens", "steps", "epoch >=")]
    for way in data["ways"]:
        if way["plan"] is None:
            continue
        plan, setup = way["plan"], way["plan"]["setup"]
        rows.append(
            (
                f"{way['how']}{' *' if way['is_plan'] else ''}",
                f"{setup['micro_batch_size']:,}",
                f"{setup['gradient_accumulation_steps']:,}",
                gib(plan["peak_process_bytes"]),
                percent(way["padding"]),
                f"{way['tokens_per_step']:,.0f}",
                f"{way['steps_per_epoch']:,}",
                format_seconds(way["epoch_time_s"]) if way["fits"] else "too large",
            )
        )
    return rows


def way_facts(data: Document) -> Iterator[tuple[str, str]]:
    """What each way is, what asks for it and what it brings; those that cannot be had with the reason."""
    plan = next((way for way in data["ways"] if way["is_plan"]), None)
    for way in data["ways"]:
        if way["refused"]:
            yield way["how"], f"not here: {way['refused'].rstrip('.')}"
            continue
        text = WAY_WORDS[way["how"]]
        if way["options"]:
            text += f"; {way['options']}"
        yield f"{way['how']}{' *' if way['is_plan'] else ''}", f"{text}{_gain(way, plan)}{_needs(way)}"


def _gain(way: Document, plan: Document | None) -> str:
    if way["is_plan"]:
        return ""
    if plan is None or not (way["fits"] and plan["fits"]):
        return ""
    less = 1 - way["epoch_time_s"] / plan["epoch_time_s"]
    if not less:
        return "; an epoch takes as long as the plan's"
    return f"; an epoch takes {percent(abs(less))} {'less' if less > 0 else 'more'} than the plan's"


def _needs(way: Document) -> str:
    """What keeps the sequences of a row apart."""
    setup = way["plan"]["setup"]
    if setup["batching"] == "rows":
        return ""
    if setup["attention"] == "flash":
        return "; flash attention of variable length keeps them apart"
    return f"; with {setup['attention']} a mask of the whole row does (TRL, made for flash attention, warns)"


def risk_facts(data: Document, best: Document | None) -> Iterator[tuple[str, str]]:
    """What to do about the longest batch, and what comes of it if nothing is cut."""
    if best is None:
        return
    plan = next((way for way in data["ways"] if way["is_plan"]), None)
    if plan is not None:
        yield (
            "epoch",
            f"{plural(plan['steps_per_epoch'], 'step')}, at least {format_seconds(plan['epoch_time_s'])}: the time of "
            "a step above is that of the longest records.",
        )
    if (data["length"]["num_truncated"] or data["is_sample"]) and best["setup"]["batching"] == "rows":
        most = data["length"]["max_len"]
        yield "cut", f"By SFTConfig(max_length={most}), or where text becomes tokens: TrainingArguments cut nothing."
    found = data["uncut"]
    if found is not None:
        yield "uncut", f"{uncut_words(data, best['setup'])}."
    if best["setup"]["batching"] == "packed":
        yield "order", f"{ALWAYS_FULL}."
    else:
        yield "order", f"{FIRST}; {FIRST_GROUPED}."
    if not data["knows_padding"] and best["setup"]["batching"] == "rows":
        yield "mask", "What the mask of padded batches adds is not known for this model: it is left out."


def uncut_words(data: Document, setup: Document) -> str:
    """How likely an epoch is that runs out of memory where nothing cuts the sequences."""
    found = data["uncut"]
    if setup["batching"] == "rows":
        num = "no record" if not found["num_longer"] else plural(found["num_longer"], "record")
        what = f"rows of up to {plural(found['fits'], 'token')} fit, and {num}{_of_sample(data)} "
        what += "is longer" if found["num_longer"] <= 1 else "are longer"
    else:
        what = f"{plural(found['fits'], 'token')} fit in a micro-batch"
        what += "" if found["chance"] is not None else f", and {_none_of(setup['micro_batch_size'])}"
    if found["chance"] is None:
        chance = f"not known: {_others(data)}"
    else:
        chance = chance_words(found, drawn_from=" from the sample" if data["is_sample"] else "")
    return f"If nothing cuts the records: {what}; the chance to exceed the budget in an epoch is {chance}"


def _none_of(micro_batch: int) -> str:
    if micro_batch == 1:
        return "no record of the sample has more"
    return f"no {micro_batch:,} records of the sample have more together"


def chance_words(found: Document, drawn_from: str = "") -> str:
    """A probability with how it is known; `drawn_from`: a sample, which lacks the longest, as likely as not."""
    chance, drawn = found["chance"], found["num_epochs_drawn"]
    if drawn:
        num = round(chance * drawn)
        of_all = f"of {drawn:,} epochs that were drawn{drawn_from} did (seed 0)"
        more = "; records that it lacks may add to it" if drawn_from and num < drawn else ""
        if not num:
            return f"small: none {of_all}, so below {percent(3 / drawn)} (95 %){more}"
        return f"about {percent(chance)}: {num:,} {of_all}{more}"
    if chance in (0.0, 1.0):
        return "1: every record comes once" if chance else "0"
    return f"at least {percent(chance)} (the rest: they all come in the last, smaller micro-batch)"


def risk_lines(data: Document, best: Document | None) -> Iterator[Line]:
    """The same as lines."""
    for label, text in risk_facts(data, best):
        yield from paragraph(label, text)
