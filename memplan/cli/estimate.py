"""`memplan estimate`: the bytes of one configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from memplan import api
from memplan.cli.options import Options, SetupCommand, setup_options
from memplan.cli.output import say, write_answer
from memplan.report.document import estimate_document
from memplan.report.estimate import render_estimate
from memplan.specs.training import LARGEST_COUNT

if TYPE_CHECKING:
    from memplan.estimation.estimate import Estimate
    from memplan.planner.plan import Plan

DOES_NOT_FIT = 3
NO_BOUND = "--confidence: nothing is calibrated yet; the bound is the headroom, not a statistical one"


@click.command(cls=SetupCommand, short_help="the bytes of one configuration")
@setup_options
def estimate(**given: Any) -> int:
    """Show the bytes of one configuration: three totals, by kind, by instant, row by row.

    MODEL is a name that `memplan models` lists, a config.json, a folder holding one, or a hub id. What is not given
    takes its default: micro-batch 1, accumulation 1, no checkpointing.
    """
    options = Options(**given)
    if options.confidence is not None:
        say(NO_BOUND, quiet=options.quiet)
    model = api.find_model(options.model, dropout=options.dropout)
    answer = api.estimate(model, gpu=options.gpu, **options.choices())
    target = api.find_target(answer.setup, options.target_batch, options.target_tokens)
    way_out = _plan(model, options, answer)
    document = estimate_document(answer, origin=model.origin, target=target, plan=way_out)
    write_answer(
        document,
        format=options.format,
        output=options.output,
        quiet=options.quiet,
        lines=lambda: render_estimate(document, quiet=options.quiet),
        records=answer.records,
    )
    return DOES_NOT_FIT if answer.fits is False else 0


def _plan(model: api.Model, options: Options, answer: Estimate) -> Plan | None:
    """Where it does not fit: what reaches the same batch on the same card."""
    if answer.fits is not False or options.gpu is None or answer.setup.global_batch_size > LARGEST_COUNT:
        return None
    free = ("micro_batch", "accumulation", "checkpointing", "target_batch", "target_tokens")
    fixed = {name: value for name, value in options.choices().items() if name not in free}
    return api.suggest(model, gpu=options.gpu, target_batch=answer.setup.global_batch_size, **fixed)
