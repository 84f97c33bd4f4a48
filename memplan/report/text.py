"""What the texts of all answers share: whom it is about, what was assumed, what is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.ansi import Line
from memplan.report.layout import columns, plural, wrap
from memplan.specs.ranks import in_ranges
from memplan.specs.training import PAIRED, PRECISIONS
from memplan.units import GIB, format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    Document = dict[str, Any]

LABEL_WIDTH = 9
"""Columns of the words to the left of a paragraph."""


MANY_GIB = 10**5
"""From here on a cell of a column of GiB says a larger unit."""

HEAD_BY_TASK = {"masked-lm": ", with the head for masked tokens", "features": ", without a head"}
"""What is said of heads that predict no next token."""

SEQUENCE = "sequence"
"""What a micro-batch counts; others (images) have no length."""

STAR = "* nvidia-smi's total; what torch sees is not known for this card, mostly 0.25 to 0.75 GiB less"


def paragraph(label: str, text: str) -> Iterator[Line]:
    """`text`, with a word to its left."""
    for line in wrap(text, first=f"  {label:<{LABEL_WIDTH}}"):
        yield Line(line)


def paragraphs(facts: Iterable[tuple[str, str]]) -> Iterator[Line]:
    """Words and what they are about, each as a paragraph."""
    for label, text in facts:
        yield from paragraph(label, text)


def title(text: str, style: str = "title") -> Iterator[Line]:
    """A heading after an empty line."""
    yield Line("")
    yield from (Line(line, style) for line in wrap(text, rest="  "))


def table(
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (0,),
    shrink: int = 0,
    shrink_too: int | None = None,
    keep_end: bool = False,
    faint_header: bool = True,
) -> Iterator[Line]:
    """Aligned columns, the first row being their names."""
    for n, line in enumerate(columns(rows, left=left, shrink=shrink, shrink_too=shrink_too, keep_end=keep_end)):
        yield Line(line, "faint" if n == 0 and faint_header else "")


# -- quantities --------------------------------------------------------------------------------------------------------


def gib(num_bytes: int) -> str:
    """A number for a column that is headed GiB; with a unit of its own where nobody has so many."""
    number = num_bytes / GIB
    return f"{number:,.2f}" if number < MANY_GIB else format_bytes(num_bytes)


def signed(num_bytes: int) -> str:
    """A change: ``+1.64 GiB``."""
    return f"{'+' if num_bytes > 0 else ''}{format_bytes(num_bytes)}"


def signed_seconds(seconds: float) -> str:
    """A change: ``+1.64 s``."""
    return f"{'+' if seconds > 0 else ''}{format_seconds(seconds)}"


def exactly(num_bytes: int) -> str:
    """``8.81 GiB (9,459,996,385 bytes)``."""
    return f"{format_bytes(num_bytes)} ({num_bytes:,} bytes)"


def split_of(setup: Document) -> str:
    """``micro 4 x accumulation 8 x 1 GPU``."""
    return (
        f"micro {setup['micro_batch_size']:,} x accumulation {setup['gradient_accumulation_steps']:,} x "
        f"{plural(setup['data_parallel_size'], 'GPU')}"
    )


def equation(setup: Document, unit: str = SEQUENCE) -> str:
    """``micro 4 x accumulation 8 x 1 GPU = 32 sequences = 65,536 tokens per step``; of images without tokens."""
    tokens = f" = {plural(setup['tokens_per_step'], 'token')}" if unit == SEQUENCE else ""
    return f"{split_of(setup)} = {plural(setup['global_batch_size'], unit_of(setup, unit))}{tokens} per step"


def unit_of(setup: Document, unit: str = SEQUENCE) -> str:
    """What a micro-batch counts: ``unit`` is what the model reads one of, a pair what the objective compares."""
    if setup["batching"] == "packed":
        return "packed row"
    return "pair" if setup["objective"] in PAIRED else unit


# -- whom it is about --------------------------------------------------------------------------------------------------


def model_lines(model: Document) -> Iterator[Line]:
    """The model, and why it is this one where nobody named it."""
    return paragraphs(model_facts(model))


def model_facts(model: Document) -> Iterator[tuple[str, str]]:
    """The same as labels and texts."""
    text = f"{model['name']} ({model['model_type']}), {format_count(model['num_parameters'])} parameters"
    trained = model["num_trainable_parameters"]
    if trained < model["num_parameters"]:
        text += f", {format_count(trained)} of them trained"
    text += HEAD_BY_TASK.get(model["task"], "")
    yield "model", text
    if model["origin"] not in {"", "as asked for"}:
        yield "", f"None was named: {_reason(model['origin'])}."


def _reason(origin: str) -> str:
    return f"this is {origin}" if origin.startswith("the ") else f"this is the one in {origin}"


def usable(gpu: Document) -> str:
    """Its usable bytes, with a star where torch sees fewer."""
    return f"{'* ' if gpu['is_from_nvidia_smi'] else ''}{format_bytes(gpu['usable_bytes'])}"


def gpu_lines(gpu: Document, *, num: int = 1, precision: str) -> Iterator[Line]:
    """The card, how many bytes of it are planned with, and whether it is made for the precision."""
    return paragraphs(gpu_facts(gpu, num=num, precision=precision))


def gpu_facts(gpu: Document, *, num: int = 1, precision: str) -> Iterator[tuple[str, str]]:
    """The same as labels and texts."""
    name = gpu["name"] if gpu["name"] == gpu["label"] else f"{gpu['name']} ({gpu['label']})"
    each = " each" if num > 1 else ""
    text = f"{name}: {usable(gpu)} usable{each}, {gpu['usable_basis']}"
    yield "GPU", f"{num:,} x {text}" if num > 1 else text
    if gpu["name"] == gpu["label"] and gpu["notes"]:
        yield "", gpu["notes"]
    slow = [dtype for dtype in PRECISIONS[precision] if dtype in gpu["unsupported_dtypes"]]
    if slow:
        yield "", f"It has no fast units for {slow[-1]}: say --precision fp16-mixed."


def choices(setup: Document) -> str:
    """How it is trained, in one line."""
    parts = [setup["precision"], setup["optimizer"], f"{setup['attention']} attention", f"{setup['loss']} loss"]
    if setup["objective"] != "lm":
        of = f" of {setup['teacher']}" if setup["teacher"] else ""
        of += f" in {setup['teacher_dtype']}" if setup["teacher_dtype"] else ""
        parts.append(f"trained for {setup['objective']}{of}")
    if setup["label_smoothing"]:
        parts.append(f"labels smoothed by {setup['label_smoothing']:g}")
    if setup["supervised"] < 1:
        parts.append(f"{100 * setup['supervised']:g} % of the tokens have a label")
    if setup["dropout"] is not None:
        parts.append(f"dropout {setup['dropout']:g}")
    if setup["padding"]:
        parts.append("padded batches")
    if setup["compile"]:
        parts.append("torch.compile")
    if setup["batching"] == "padding-free":
        parts.append("padding-free batches")
    if setup["batching"] == "packed":
        parts.append(f"{setup['packed_sequences']} sequences in a packed row")
    if setup["evaluation"]:
        parts.append(_evaluated(setup["evaluation"]))
    return ", ".join([*parts, *recipe_words(setup)])


def compiled_lines(compiled: Document | None) -> Iterator[Line]:
    """The range under torch.compile, and where its ends come from."""
    return paragraphs(compiled_facts(compiled))


def compiled_facts(compiled: Document | None) -> Iterator[tuple[str, str]]:
    """The same as labels and texts."""
    if compiled is None:
        return
    allocated, process, kept = (
        f"{gib(compiled[name]['low'])} to {gib(compiled[name]['high'])} GiB"
        for name in ("peak_allocated_bytes", "peak_process_bytes", "kept_activation_bytes")
    )
    if compiled["is_traced"]:
        kept = f"{gib(compiled['kept_activation_bytes']['high'])} GiB kept, by the compiler's own partition"
        ends = "from there to the peak without the compiler"
    else:
        kept = f"{kept} kept"
        ends = "from what products need to what is kept without the compiler"
    yield "compiled", f"peak {process} ({allocated} allocated; {kept}): {ends}, which is planned with"


def may_fit(compiled: Document | None, gpu: Document) -> bool:
    """Whether the lower end of a range fits on a card where the upper one does not."""
    return compiled is not None and bool(compiled["peak_process_bytes"]["low"] <= gpu["usable_bytes"])


def _evaluated(evaluation: Document) -> str:
    words = f"evaluation in batches of {evaluation['batch']}"
    if evaluation["samples"] is not None:
        words += f", the logits of {evaluation['samples']:,} sequences kept"
        if evaluation["accumulation"] is not None:
            number = evaluation["accumulation"]
            words += f" and moved to the host {'batch by batch' if number == 1 else f'every {number:,} batches'}"
    return words


def recipe_words(setup: Document) -> list[str]:
    """What is trained, and how the rest is stored, where that is not all as it was loaded."""
    parts = []
    lora = setup["lora"]
    if lora is not None:
        kind = "DoRA" if lora["dora"] else "LoRA"
        dtype = "fp32" if lora["dtype"] == "fp32" else "the base's dtype"
        parts.append(f"{kind} of rank {lora['rank']} in {dtype} on {', '.join(lora['targets'])}")
        parts += [f"of layers {in_ranges(lora['layers'])} alone"] if lora["layers"] else []
        parts += [f"rank {rank} on {name}" for name, rank in lora["ranks"].items()]
        parts += [f"adapter dropout {lora['dropout']:g}"] if lora["dropout"] else []
        parts += [f"copies of {', '.join(lora['modules_to_save'])} trained"] if lora["modules_to_save"] else []
    parts += [f"a base in {setup['quantize']}"] if setup["quantize"] else []
    parts += [f"{setup['offload']} offloaded"] if setup["offload"] else []
    parts += ["reentrant checkpointing"] if setup["reentrant"] else []
    parts += ["the rest of it in fp32"] if setup["upcast"] else []
    parts += [f"{', '.join(setup['freeze'])} frozen"] if setup["freeze"] else []
    return parts


def calibration_lines(calibration: Document | None) -> Iterator[Line]:
    """Which measurements the prediction stands on."""
    return paragraphs(calibration_facts(calibration))


def calibration_facts(calibration: Document | None) -> Iterator[tuple[str, str]]:
    """The same as labels and texts."""
    yield "", calibration_words(calibration)


def calibration_words(calibration: Document | None) -> str:
    """The same in one line."""
    if calibration is None:
        return "no calibration was used: nothing was measured on this card"
    num = plural(calibration["num_records"], "measurement")
    return f"calibrated by {num} on {calibration['name']}, up to {calibration['last'][:10]}"


def vouched(confidence: float) -> str:
    """How far measurements vouch for a bound; empty where they do not."""
    return f"at least {int(1000 * confidence) / 10:g} % of comparable runs stay under it" if confidence else ""


# -- what stands behind it ---------------------------------------------------------------------------------------------


def assumption_lines(assumptions: Iterable[Document]) -> Iterator[Line]:
    """What was taken for granted, and by how much the peak would change otherwise."""
    assumptions = list(assumptions)
    if not assumptions:
        return
    yield from title("Assumed (in brackets: how the peak would change otherwise)")
    for assumption in assumptions:
        effect = ""
        if assumption["effect_bytes"] is not None and assumption["otherwise"]:
            effect = f" [{assumption['otherwise']}: {_change(assumption['effect_bytes'])}]"
        for line in wrap(f"{assumption['value']}{effect}", first=f"  {assumption['what']:<18}"):
            yield Line(line)


def lint_lines(lints: Iterable[Document]) -> Iterator[Line]:
    """What is worth knowing before the run, with who makes it so."""
    lints = list(lints)
    if not lints:
        return
    yield from title("Worth knowing")
    for lint in lints:
        effect = "" if not lint["effect_bytes"] else f" [{signed(lint['effect_bytes'])}]"
        for line in wrap(f"{lint['what']}: {lint['says']}{effect} ({lint['source']})", first="  - "):
            yield Line(line)


def _change(num_bytes: int) -> str:
    return signed(num_bytes) if num_bytes else "no change"


def unmodelled_lines(unmodelled: Sequence[Document], *, briefly: bool = False) -> Iterator[Line]:
    """What the numbers leave out; `briefly`: without the reasons."""
    yield from title("Not modelled (why: memplan estimate, or --json)" if briefly else "Not modelled")
    if briefly:
        for line in wrap("; ".join(item["what"] for item in unmodelled), first="  "):
            yield Line(line, "faint")
        return
    for item in unmodelled:
        for line in wrap(f"{item['what']}: {item['why']}", first="  - "):
            yield Line(line, "faint")
