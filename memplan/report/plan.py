"""A plan as text: the plan first, then the next ones, what was refused, the levers, what was assumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.export.trainer import (
    CONFIG_BY_OBJECTIVE,
    CONFIG_OF_TRAINER,
    OF_TRANSFORMERS,
    OPTIM_BY_OPTIMIZER,
    has_loss,
    saves_attention,
)
from memplan.report.ansi import Line
from memplan.report.layout import bar, plural, wrap
from memplan.report.text import (
    LABEL_WIDTH,
    SEQUENCE,
    STAR,
    assumption_lines,
    calibration_lines,
    choices,
    compiled_lines,
    equation,
    exactly,
    gib,
    gpu_lines,
    lint_lines,
    may_fit,
    model_lines,
    paragraph,
    signed,
    signed_seconds,
    split_of,
    table,
    title,
    unit_of,
    unmodelled_lines,
    usable,
    vouched,
)
from memplan.specs.training import SAVE_ATTENTION
from memplan.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Document = dict[str, Any]

BAR_CELLS = 24
MANY_A_SECOND = 100
MOST_LEVERS = 8
MOST_REFUSED = 2
REAL_SAVING = 0.01
"""Share of the usable bytes; a plan that frees less beside a faster one is not shown."""


def render_plan(plan: Document, *, quiet: bool = False) -> list[Line]:
    """The text of a plan document; `quiet`: the verdict alone."""
    verdict = _best if plan["best"] else _nothing_fits
    if quiet:
        return [*_length(plan), *list(verdict(plan))[1:]]
    return [
        *_asked(plan),
        *verdict(plan),
        *_warning(plan),
        *_data(plan),
        *_alternatives(plan),
        *_rejections(plan),
        *lint_lines(plan["lints"]),
        *assumption_lines(plan["assumptions"]),
        *_levers(plan),
        *unmodelled_lines(plan["unmodelled"], briefly=True),
    ]


def _length(plan: Document) -> Iterator[Line]:
    """Where the data is cut, where there is some: it is part of the plan."""
    if plan["data"]:
        from memplan.report.feed_words import length_lines

        yield from length_lines(plan["data"])


def _asked(plan: Document) -> Iterator[Line]:
    target = plan["target"]
    setup = (plan["best"] or plan["nearest"])["setup"]
    yield from model_lines(plan["model"])
    yield from gpu_lines(plan["gpu"], num=setup["data_parallel_size"], precision=setup["precision"])
    yield from calibration_lines(plan["calibration"])
    unit = unit_of(setup, plan["model"]["unit"])
    length = f" of {_length_of(target, setup, unit)} = {plural(target['tokens_per_step'], 'token')}"
    batch = plural(target["global_batch_size"], unit)
    if plan["data"]:
        length = f" of at most {plural(target['seq_len'], 'token')}"
    yield from paragraph("target", f"{batch}{'' if plan['model']['unit'] != SEQUENCE else length} per step")
    if target["rounding"]:
        yield from paragraph("", f"{target['rounding']}.")
    if target["coarseness"]:
        yield from paragraph("", f"{target['coarseness']}.")
    if plan["data"]:
        from memplan.report.feed_words import data_lines

        yield from data_lines(plan["data"])
    yield from paragraph("setup", choices(setup))


def _data(plan: Document) -> Iterator[Line]:
    """What else could be made of the data."""
    if plan["data"]:
        from memplan.report.feed_words import risk_lines, way_lines

        yield from way_lines(plan["data"])
        yield from risk_lines(plan["data"], plan["best"])


def _length_of(target: Document, setup: Document, unit: str) -> str:
    length = plural(target["seq_len"], "token") + (" on average" if setup["batching"] == "padding-free" else "")
    return f"2 x {length}" if unit == "pair" else length


# -- it fits -----------------------------------------------------------------------------------------------------------


def _best(plan: Document) -> Iterator[Line]:
    best = plan["best"]
    setup = best["setup"]
    yield from title("The plan", "good")
    yield from (Line(line, "title") for line in wrap(equation_of(plan, setup), first="  "))
    yield from paragraph("keeps", kept_words(setup["activation_checkpointing"]))
    yield from paragraph("memory", _memory(plan, best))
    yield from compiled_lines(plan["compiled"])
    yield from paragraph("free", _free(plan, best))
    if best["alloc_conf"]:
        text = f"export PYTORCH_ALLOC_CONF={best['alloc_conf']} (without it the allocator fragments too much)"
        yield from paragraph("needs", text)
    yield from paragraph("time", time_words(plan, best))
    yield from paragraph("Trainer", trainer_line(plan))


def equation_of(plan: Document, setup: Document) -> str:
    """How the batch comes about; of data the tokens are the most that it can have."""
    text = equation(setup, plan["model"]["unit"])
    return "{} <= {}".format(*text.rsplit(" = ", 1)) if plan.get("data") else text


def kept_words(mode: str) -> str:
    """What a choice of checkpointing keeps."""
    meanings = {
        "none": "all activations",
        "save-attention": "the input of each layer and the result of its attention; all else is computed again",
        "selective": "all activations but those of attention, which is computed again",
        "full": "the input of each layer, which is computed again in the backward pass",
    }
    some = f"one layer in {mode[6:]} is computed again in the backward pass, of the others all is kept"
    return f"{meanings.get(mode, some)} (checkpointing {mode})"


def _memory(plan: Document, best: Document) -> str:
    whole = plan["gpu"]["usable_bytes"]
    peak = best["peak_process_bytes"]
    return (
        f"{format_bytes(peak)} of {format_bytes(whole)} {bar(peak / whole, BAR_CELLS)} "
        f"at its highest: {plan['peak_instant']}"
    )


def _free(plan: Document, best: Document) -> str:
    budget = plan["budget"]
    text = f"{format_bytes(best['headroom_bytes'])} beyond {margin_words(plan, best)}"
    said = vouched(plan["confidence"])
    text += f": {said}" if said else ""
    return f"{text} and {format_bytes(budget['reserve_bytes'])} reserved" if budget["reserve_bytes"] else text


def margin_words(plan: Document, best: Document) -> str:
    """Headroom and bound, of which one is there at least."""
    budget = plan["budget"]
    ratio = budget["bound_ratio"]
    parts = []
    if ratio:
        above = best["upper_bound_bytes"] - best["peak_process_bytes"]
        above -= budget["margin_bytes"] + budget["reserve_bytes"]
        parts.append(f"a bound {100 * ratio:.1f} % above the prediction ({format_bytes(above)})")
    if budget["margin_bytes"] or not ratio:
        parts.append(f"{budget['headroom_percent']:g} % headroom ({format_bytes(budget['margin_bytes'])})")
    return " and ".join(parts)


def is_timed(plan: Document, best: Document) -> bool:
    """Whether times are at a speed that was measured, and no lower bounds."""
    calibration = plan["calibration"]
    return calibration is not None and bool(calibration["is_timed"]) and not best["setup"]["compile"]


def time_words(plan: Document, best: Document) -> str:
    """How long a step takes, and where that is from."""
    gpu, source, unit = plan["gpu"], plan["speed_source"], plan["model"]["unit"]
    rates = source if source == gpu["label"] else f"{source}, as those of {gpu['name']} are not known"
    if is_timed(plan, best):
        return (
            f"about {format_seconds(best['step_time_s'])} per step, {_rate(best, unit)}, at the speed that was measured"
        )
    return (
        f"at least {format_seconds(best['step_time_s'])} per step, at most {_rate(best, unit)}: "
        f"a lower bound, at the rates of {rates}"
    )


def trainer_line(plan: Document) -> str:
    """How a trainer is told the plan, or why none can be; empty where nothing fits."""
    if plan["best"] is None:
        return ""
    return _trainer(plan["trainer"], plan["model"]) if plan["trainer"] else _no_trainer(plan["best"]["setup"])


def _trainer(trainer: Document, model: Document) -> str:
    config = trainer["config"]
    of_trl = () if config in OF_TRANSFORMERS else ("activation_checkpointing", "disable_dropout", "lmbda")
    always = ("bf16", *of_trl)
    shown = {k: v for k, v in trainer["arguments"].items() if v or k in always}
    made = f"{config}({_arguments(shown)})"
    made += f" of {trainer['versions']}" if trainer["versions"] else ""
    dropout = "" if trainer["dropout"] is None else f"every dropout of its config at {trainer['dropout']:g}, "
    if not model["attentions"]:  # nothing of transformers: how it is loaded is the user's
        return f"module.to(torch.{trainer['dtype']}), {dropout}{made}"
    attention = trainer["attn_implementation"]
    default = "sdpa" if "sdpa" in model["attentions"] else "eager"
    asked = "" if attention == default else f", attn_implementation={attention!r}"
    if config == "RewardConfig":
        asked += ", num_labels=1"
    if trainer["quantization"]:
        asked += f", quantization_config=BitsAndBytesConfig({_arguments(trainer['quantization'])})"
    loaded = f"from_pretrained(..., dtype={trainer['dtype']!r}{asked}), {dropout}"
    prepared = "prepare_model_for_kbit_training(model), " if trainer["upcast"] else ""
    return f"{loaded}{prepared}{_adapters(trainer)}{made}"


def _adapters(trainer: Document) -> str:
    if not trainer["lora"]:
        return ""
    adapters = f"LoraConfig({_arguments(trainer['lora'])})"
    return (
        f"get_peft_model(..., {adapters}, autocast_adapter_dtype=False), "
        if trainer["adapters_as_base"]
        else f"{adapters}, "
    )


def _arguments(given: Document) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in given.items())


def _no_trainer(setup: Document) -> str:
    """What of a setup no argument of the Trainer asks for."""
    missing = [] if setup["optimizer"] in OPTIM_BY_OPTIMIZER else [f"the optimizer {setup['optimizer']}"]
    mode = setup["activation_checkpointing"]
    if mode == "selective" or (mode == SAVE_ATTENTION and not saves_attention(setup["loss"], setup["objective"])):
        missing.append("selective checkpointing" if mode == "selective" else f"{mode} beside {setup['loss']} logits")
    if not has_loss(setup["loss"], setup["objective"]):
        missing.append(f"the loss {setup['loss']}")
    if setup["freeze"]:
        missing.append("frozen parts")
    config = CONFIG_BY_OBJECTIVE.get(setup["objective"], CONFIG_OF_TRAINER)
    if not missing:
        return "TRL's trainers generate nothing in an evaluation: it takes a training loop of one's own"
    return f"{config} has no key for {' and '.join(missing)}: it takes a training loop of one's own"


def roomier(plan: Document) -> list[Document]:
    """Of the alternatives those that free something worth having beside the one above them."""
    shown, above = [], plan["best"]
    for one in plan["alternatives"]:
        if one["headroom_bytes"] - above["headroom_bytes"] >= REAL_SAVING * plan["gpu"]["usable_bytes"]:
            shown.append(one)
            above = one
    return shown


def _rate(candidate: Document, unit: str) -> str:
    return f"{_examples_per_s(candidate)} {_counted(unit)}/s"


def _counted(unit: str) -> str:
    return "tokens" if unit == SEQUENCE else f"{unit}s"


def _examples_per_s(candidate: Document) -> str:
    """Tokens a second, or images: these have a length of one."""
    rate = candidate["tokens_per_s"]
    return f"{rate:,.0f}" if rate >= MANY_A_SECOND else f"{rate:.1f}"


def _alternatives(plan: Document) -> Iterator[Line]:
    alternatives, unit = roomier(plan), plan["model"]["unit"]
    if not alternatives:
        return
    slower = all(one["step_time_s"] > plan["best"]["step_time_s"] for one in alternatives)
    yield from title("Slower, with more room" if slower else "With more room")
    rows = [
        (
            "micro",
            "accum.",
            "checkpointing",
            "peak GiB",
            "spare GiB",
            "step >=",
            f"{_counted(unit)}/s <=",
        )
    ]
    rows += [
        (
            f"{one['setup']['micro_batch_size']:,}",
            f"{one['setup']['gradient_accumulation_steps']:,}",
            one["setup"]["activation_checkpointing"],
            gib(one["peak_process_bytes"]),
            gib(one["headroom_bytes"]),
            format_seconds(one["step_time_s"]),
            _examples_per_s(one),
        )
        for one in alternatives
    ]
    yield from table(rows, left=(2,))


def _rejections(plan: Document) -> Iterator[Line]:
    rejections = plan["rejections"][:MOST_REFUSED]
    if not rejections or not plan["best"]:
        return
    yield from title("Refused")
    for one in rejections:
        setup = one["setup"]
        text = (
            f"{split_of(setup)}, checkpointing {setup['activation_checkpointing']}: takes "
            f"{format_bytes(one['peak_process_bytes'])}, short by {exactly(one['short_by_bytes'])}"
        )
        yield from (Line(line) for line in wrap(text, first="  ", rest="    "))


def _warning(plan: Document) -> Iterator[Line]:
    """Where accumulation is longer than usual."""
    if plan.get("long_accumulation"):
        from memplan.report.long_accumulation import shorter_rows, why_words

        yield from paragraph("warning", f"{why_words(plan)} Fewer with")
        rows = shorter_rows(plan)
        width = max(len(change) for change, _ in rows)
        for change, price in rows:
            yield Line(f"  {'':<{LABEL_WIDTH}}  {change:<{width}}  {price}")


# -- it does not -------------------------------------------------------------------------------------------------------


def _nothing_fits(plan: Document) -> Iterator[Line]:
    nearest, budget = plan["nearest"], plan["budget"]
    setup = nearest["setup"]
    missing = f"{exactly(-nearest['headroom_bytes'])} are missing"
    unsure = may_fit(plan["compiled"], plan["gpu"])
    said = "Nothing is sure to fit: at the upper end" if unsure else "Nothing fits:"
    yield from title(f"{said} {missing}", "bad")
    yield from paragraph("smallest", f"{split_of(setup)}, checkpointing {setup['activation_checkpointing']}")
    margins = margin_words(plan, nearest)
    if budget["reserve_bytes"]:
        margins += f" and {format_bytes(budget['reserve_bytes'])} reserved"
    yield from paragraph(
        "needs",
        f"{format_bytes(nearest['peak_process_bytes'])} at its highest ({plan['peak_instant']}), and {margins}; "
        f"usable are {format_bytes(plan['gpu']['usable_bytes'])}",
    )
    yield from compiled_lines(plan["compiled"])
    cards = [f"{card['name']} ({usable(card)})" for card in plan["cards"]]
    text = ", ".join(cards) or "no card of the catalogue; sharding over several GPUs is not modelled yet"
    yield from paragraph("held by", text)
    if any(card["is_from_nvidia_smi"] for card in plan["cards"]):
        yield from paragraph("", STAR)
    yield from way_lines(plan["ways_out"], plan)


def way_lines(ways: Sequence[Document], answer: Document) -> Iterator[Line]:
    """What would make it fit, as options to add to the command."""
    yield from title("Ways out, cheapest first: add these options" if ways else "Ways out")
    if not ways:
        yield from (Line(line) for line in wrap(_no_way(answer), first="  "))
    for way in ways:
        update = "stays the same" if way["same_update"] else "changes"
        price = (
            f"takes {format_bytes(way['peak_process_bytes'])}, at least {format_seconds(way['step_time_s'])} "
            f"per step; the update {update}"
        )
        yield from (Line(line, "title") for line in wrap(way["options"], first="  "))
        yield from (Line(line) for line in wrap(price, first="      "))


def _no_way(answer: Document) -> str:
    """Why none is named: none is enough, or none was looked for."""
    if answer["kind"] == "trace":
        return "a trace looks for none: memplan suggest finds a configuration that fits"
    if answer["model"]["model_type"] == "traced":
        return "no smaller micro-batch is enough; other changes to a module of your own are not priced"
    return "no combination of up to three single changes is enough"


# -- levers ------------------------------------------------------------------------------------------------------------


def _levers(plan: Document) -> Iterator[Line]:
    levers = [lever for lever in plan["levers"] if plan["best"] or lever["delta_bytes"] < 0][:MOST_LEVERS]
    if not levers:
        return
    of = "the plan" if plan["best"] else "the smallest configuration"
    yield from title(f"Levers: single changes to {of}")
    rows = [("option", "tensors", "step time", "the update")]
    rows += [
        (
            lever["flag"],
            signed(lever["delta_bytes"]) if lever["delta_bytes"] else "the same",
            signed_seconds(lever["delta_step_time_s"]),
            "stays the same" if lever["same_update"] else "changes",
        )
        for lever in levers
    ]
    yield from table(rows, left=(0, 3))
    for lever in levers:
        if lever["price"]:
            text = f"{lever['flag']}: {lever['price']}"
            yield from (Line(line) for line in wrap(text, first="  ", rest="    "))
