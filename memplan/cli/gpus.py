"""`memplan gpus`: the cards that are known."""

from __future__ import annotations

import click

from memplan.catalog.gpus import read_gpus
from memplan.cli.options import SetupCommand, output_options
from memplan.cli.output import write_answer
from memplan.report.ansi import Line
from memplan.report.catalogue import render_gpus
from memplan.report.document import gpus_document


@click.command(cls=SetupCommand, short_help="the GPUs that are known")
@output_options
def gpus(format: str, output: str | None, quiet: bool, traceback: bool) -> int:  # noqa: A002 -- the option's name
    """List the GPUs of the catalogue, smallest first; any other can be given as a size such as 24GB.

    Usable is what torch sees of the card; with a star what nvidia-smi shows, where that is not known.
    """
    cards = sorted(read_gpus().values(), key=lambda card: (card.usable_bytes, card.name))
    document = gpus_document(cards)
    rows = document["gpus"]
    plain = ("name", "label", "total_bytes", "usable_bytes", "context_bytes", "memory_bandwidth_bytes_per_s")
    write_answer(
        document,
        format=format,
        output=output,
        quiet=quiet,
        lines=lambda: [Line(row["name"]) for row in rows] if quiet else render_gpus(rows),
        records=lambda: [
            {name: row[name] for name in plain}
            | {
                f"{dtype}_flops_per_s": row["flops_per_s"].get(dtype)
                for dtype in ("fp32", "tf32", "bf16", "fp16", "fp8")
            }
            for row in rows
        ],
    )
    return 0
