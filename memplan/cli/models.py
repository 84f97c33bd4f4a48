"""`memplan models`: the models that are known."""

from __future__ import annotations

from typing import Any

import click

from memplan.catalog.models import read_models
from memplan.cli.options import SetupCommand, output_options
from memplan.cli.output import write_answer
from memplan.report.ansi import Line
from memplan.report.catalogue import render_models
from memplan.report.document import envelope


@click.command(cls=SetupCommand, short_help="the models that are known")
@output_options
def models(format: str, output: str | None, quiet: bool, traceback: bool) -> int:  # noqa: A002 -- the option's name
    """List the models of the catalogue; any other can be given as a config.json or a hub id.

    A dash marks those that a trace of the model answers for, which takes PyTorch and transformers or diffusers; two
    dashes those that are traced one size at a time.
    """
    rows: list[dict[str, Any]] = [
        {
            "id": model.id,
            "aliases": list(model.aliases),
            "model_type": model.model_type,
            "num_parameters": model.parameters,
            "published_parameters": model.published_parameters,
            "is_modelled": model.is_modelled,
            "answered_by": model.answered_by,
            "config_kind": model.config_kind,
            "status": model.status,
            "note": model.note,
        }
        for model in read_models()
    ]
    write_answer(
        {**envelope("models"), "models": rows},
        format=format,
        output=output,
        quiet=quiet,
        lines=lambda: [Line(row["id"]) for row in rows] if quiet else render_models(rows),
        records=lambda: [{**row, "aliases": " ".join(row["aliases"])} for row in rows],
    )
    return 0
