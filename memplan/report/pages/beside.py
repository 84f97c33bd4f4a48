"""What stands beside a plan on its page: maps of what fits, growth, the frontier, the schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.planner.frontier import MOST_SPLITS
from memplan.report import growth as words
from memplan.report.charts import growth as growing
from memplan.report.charts.drawing import PAGE
from memplan.report.charts.frontier import label_of
from memplan.report.charts.maps import cell_text, is_plan
from memplan.report.charts.named import chart_of, has_chart
from memplan.report.charts.plans import REST
from memplan.report.charts.schedule import equation_of, said_of, samples_text
from memplan.specs.training import divisors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Document = dict[str, Any]

WORD_BY_VERDICT = {"fits": "fits", "tight": "tight", "oom": "out of memory"}


def beside_values(document: Mapping[str, Any]) -> Document:
    """What the templates of these sections ask for; None where there is no such section."""
    return {
        "maps": _maps(document) if document["maps"] else None,
        "growth": _growth(document) if document["growth"] else None,
        "frontier": _frontier(document) if has_chart(document, "frontier") else None,
        "schedule": _schedule(document) if document["schedule"] else None,
    }


def _maps(document: Mapping[str, Any]) -> Document:
    plan = (document["plan"]["best"] or document["plan"]["nearest"])["setup"]
    return {
        "tables": [_map(one, plan) for one in document["maps"]],
        "has_tight": any(point["verdict"] == "tight" for one in document["maps"] for point in one["points"]),
        "accumulation": document["maps"][0]["gradient_accumulation_steps"],
        "leaves_out_evaluation": plan["evaluation"] is not None,
    }


def _map(one: Mapping[str, Any], plan: Mapping[str, Any]) -> Document:
    num = len(one["seq_lens"])
    return {
        "checkpointing": one["activation_checkpointing"],
        "seq_lens": one["seq_lens"],
        "rows": [
            {
                "micro_batch_size": batch,
                "cells": [
                    {
                        "text": cell_text(point)[:-1].strip(),
                        "symbol": cell_text(point)[-1],
                        "verdict": point["verdict"],
                        "word": WORD_BY_VERDICT[point["verdict"]],
                        "is_plan": is_plan(one, row, column, plan),
                    }
                    for column, point in enumerate(one["points"][row * num : (row + 1) * num])
                ],
            }
            for row, batch in enumerate(one["micro_batch_sizes"])
        ],
    }


def _growth(document: Mapping[str, Any]) -> Document:
    growth = document["growth"]
    kept = growth["kept"]
    headline = words.headline(kept)
    shown = [symbol for symbol in kept["symbols"] if len(symbol) == 1 or symbol in headline]
    axes = (
        ("length", "Against the length", "tokens per sequence", growth["by_length"], growth["seq_len"]),
        ("micro-batch", "Against the micro-batch", "micro-batch", growth["by_micro_batch"], growth["micro_batch_size"]),
    )
    return {
        "headline": headline,
        "symbols": words.meanings(growth, shown),
        "other_symbols": words.meanings(growth, [one for one in kept["symbols"] if one not in shown]),
        "rounding": words.rounding(growth),
        "take_over": words.take_over(growth),
        "formula": kept["formula"],
        "terms": kept["terms"],
        "axes": [
            {
                "heading": heading,
                "axis": axis,
                "chart": chart_of(document, name, PAGE),
                "own": own,
                **_growth_table(points),
            }
            for name, heading, axis, points, own in axes
            if len(points) > 1
        ],
    }


def _growth_table(points: Sequence[Mapping[str, Any]]) -> Document:
    kinds = growing.kinds_of(points)
    rows = [(point["size"], growing.bytes_of(point, kinds)) for point in points]
    return {"kinds": [*kinds, REST], "rows": [(size, numbers, sum(numbers)) for size, numbers in rows]}


def _frontier(document: Mapping[str, Any]) -> Document:
    points = document["frontier"]
    setup = (document["plan"]["best"] or document["plan"]["nearest"])["setup"]
    there = {one["micro_batch_size"] for one in points}
    all_of_them = divisors(setup["global_batch_size"] // setup["data_parallel_size"])
    return {
        "chart": chart_of(document, "frontier", PAGE),
        "rows": [(one, label_of(one)) for one in points],
        "is_complete": len(there) < MOST_SPLITS or len(there) == len(all_of_them),
    }


def _schedule(document: Mapping[str, Any]) -> Document:
    step = document["schedule"]
    by_place = {(one["micro_step"], one["gpu"]): samples_text(one, step) for one in step["shares"]}
    return {
        "chart": chart_of(document, "schedule", PAGE),
        "said": said_of(step),
        "equation": equation_of(step),
        "gpus": step["gpus"],
        "rows": [(micro, [by_place[micro, gpu] for gpu in step["gpus"]]) for micro in step["micro_steps"]],
        "is_condensed": len(step["gpus"]) < step["num_gpus"] or len(step["micro_steps"]) < step["num_micro_steps"],
    }
