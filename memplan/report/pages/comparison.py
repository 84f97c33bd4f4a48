"""Some plans side by side, as one page: the verdicts, the numbers, where they differ, what changes would do to each.

Left out: what the document does not hold; each plan has a page of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.charts.compare import WHOLE, comparison
from memplan.report.charts.drawing import PAGE
from memplan.report.feed_words import data_words, epoch_words, length_words
from memplan.report.pages.page import render
from memplan.report.pages.tables import Table
from memplan.report.plan import equation_of, is_timed
from memplan.report.text import choices, signed, split_of
from memplan.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Document = dict[str, Any]

COUNTED = ("micro_batch_size", "gradient_accumulation_steps", "data_parallel_size", "activation_checkpointing")
"""Of a setup, what the first table says."""
DERIVED = ("global_batch_size", "tokens_per_micro_batch", "tokens_per_step")


def render_comparison_page(document: Document) -> str:
    """The page of a comparison document."""
    sides = document["sides"]
    names = [f"{number}. {side['name']}" for number, side in enumerate(sides, 1)]
    shown = [side["plan"]["best"] or side["plan"]["nearest"] for side in sides]
    usable = [side["plan"]["gpu"]["usable_bytes"] for side in sides]
    parts = [side["by_kind"] or {WHOLE: one["peak_process_bytes"]} for side, one in zip(sides, shown, strict=True)]
    return render(
        "comparison.html.jinja",
        document=document,
        names=names,
        verdict=_verdict(sides, names),
        fits=any(side["plan"]["fits"] for side in sides),
        overview=Table("The plans", ("what", *names), _overview(sides, shown), range(1, len(sides) + 1)),
        chart=comparison(names, parts, usable, PAGE),
        parts=Table("Memory at the peak by kind", ("kind", *names), _kinds(parts)),
        differing=_table("Where the setups differ", names, _differing(shown)),
        common=choices(shown[0]["setup"]),
        levers=_table("Single changes that all have", names, _levers(sides)),
    )


def _table(label: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table | None:
    return Table(label, ("what", *names), rows, range(1, len(names) + 1)) if rows else None


def _verdict(sides: Sequence[Document], names: Sequence[str]) -> list[str]:
    """How many fit, and which of them is the fastest."""
    fitting = [(side["plan"], name) for side, name in zip(sides, names, strict=True) if side["plan"]["fits"]]
    if not fitting:
        return [f"None of the {len(sides)} plans fits"]
    if len(fitting) == 1:
        return [f"1 of {len(sides)} plans fits: {fitting[0][1]}"]
    said = f"{f'All {len(sides)}' if len(fitting) == len(sides) else f'{len(fitting)} of {len(sides)}'} plans fit"
    plan, name = max(fitting, key=lambda pair: float(pair[0]["best"]["tokens_per_s"]))
    return [said, f"Most tokens per second: {name}, {_rate(plan, plan['best'])}."]


def _rate(plan: Document, shown: Document) -> str:
    return f"{'about' if is_timed(plan, shown) else 'at most'} {shown['tokens_per_s']:,.0f}"


def _time(plan: Document, shown: Document) -> str:
    return f"{'about' if is_timed(plan, shown) else 'at least'} {format_seconds(shown['step_time_s'])}"


def _overview(sides: Sequence[Document], shown: Sequence[Document]) -> list[tuple[str, ...]]:
    plans = [side["plan"] for side in sides]
    pairs = list(zip(plans, shown, strict=True))
    return [
        ("verdict", *("+ fits" if plan["fits"] else "x does not fit" for plan in plans)),
        ("model", *(f"{plan['model']['name']}, {format_count(plan['model']['num_parameters'])}" for plan in plans)),
        ("GPU", *(plan["gpu"]["label"] for plan in plans)),
        ("plan", *(split_of(one["setup"]) for one in shown)),
        ("batch", *(_batch(plan, one) for plan, one in pairs)),
        *_of_data([plan.get("data") for plan in plans]),
        ("checkpointing", *(one["setup"]["activation_checkpointing"] for one in shown)),
        ("peak of the process", *(_share(plan, one) for plan, one in pairs)),
        ("usable", *(format_bytes(plan["gpu"]["usable_bytes"]) for plan in plans)),
        ("with the margin", *(format_bytes(one["upper_bound_bytes"]) for one in shown)),
        ("left beyond it", *(_left(one["headroom_bytes"]) for one in shown)),
        ("time of a step", *(_time(plan, one) for plan, one in pairs)),
        ("tokens per second", *(_rate(plan, one) for plan, one in pairs)),
    ]


def _batch(plan: Document, shown: Document) -> str:
    setup = shown["setup"]
    return equation_of(plan, setup).removeprefix(f"{split_of(setup)} = ").removesuffix(" per step")


def _of_data(data: Sequence[Document | None]) -> list[tuple[str, ...]]:
    """What the data of the plans is, where one has some."""
    if not any(data):
        return []
    words: tuple[tuple[str, Callable[[Document], str]], ...] = (
        ("data", data_words),
        ("maximum length", length_words),
        ("an epoch", epoch_words),
    )
    return [(label, *("none" if one is None else said(one) for one in data)) for label, said in words]


def _share(plan: Document, shown: Document) -> str:
    peak, usable = shown["peak_process_bytes"], plan["gpu"]["usable_bytes"]
    return f"{format_bytes(peak)} ({100 * peak / usable:.0f} %)"


def _left(num_bytes: int) -> str:
    return format_bytes(num_bytes) if num_bytes >= 0 else f"{format_bytes(-num_bytes)} are missing"


def _kinds(parts: Sequence[Mapping[str, int]]) -> list[tuple[str, ...]]:
    kinds = dict.fromkeys(kind for part in parts for kind in part)
    return [(kind.replace("_", " "), *(format_bytes(part.get(kind, 0)) for part in parts)) for kind in kinds]


def _differing(shown: Sequence[Document]) -> list[tuple[str, ...]]:
    """What is trained differently, beside what the first table says."""
    setups = [one["setup"] for one in shown]
    keys = [key for key in setups[0] if key not in (*COUNTED, *DERIVED)]
    return [
        (key.replace("_", " "), *(_written(setup.get(key)) for setup in setups))
        for key in keys
        if any(setup.get(key) != setups[0][key] for setup in setups)
    ]


def _written(value: Any) -> str:
    if value is None or value is False or value == []:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_written(one)}" for name, one in value.items() if one)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "yes" if value is True else f"{value:,}" if isinstance(value, int) else str(value)


def _levers(sides: Sequence[Document]) -> list[tuple[str, ...]]:
    """The changes that all plans price, with what each frees or takes."""
    priced = [{lever["flag"]: lever["delta_bytes"] for lever in side["plan"]["levers"]} for side in sides]
    common = [flag for flag in priced[0] if all(flag in one for one in priced)]
    return [(flag, *(signed(one[flag]) for one in priced)) for flag in common]
