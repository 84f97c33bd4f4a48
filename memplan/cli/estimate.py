"""`memplan estimate`: the bytes of one configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan import api
from memplan.cli.output import DOES_NOT_FIT, say, say_bound, say_every, write_answer
from memplan.report.document import estimate_document
from memplan.specs.choices import dropout_of
from memplan.specs.training import LARGEST_COUNT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memplan.cli.values import Options
    from memplan.estimation.estimate import Estimate
    from memplan.planner.plan import Plan
    from memplan.report.ansi import Line


def answer(options: Options) -> int:
    """Print the bytes of the configuration; the exit status."""
    say_bound(options)
    if options.headroom is not None and options.gpu is None:
        say("--headroom has no effect without --gpu", quiet=options.quiet)
    dropout, objective = dropout_of(options.choices()), options.objective or "lm"
    model = api.find_model(options.model, dropout=dropout, objective=objective)
    if isinstance(model, api.UserModule):
        from memplan.cli.progress import Progress

        with Progress(shown=not options.quiet) as progress:
            found, way_out = _ask(model._replace(notify=progress.say), options)
    else:
        say_every(options.checkpointing, len(model.architecture.layers), quiet=options.quiet)
        found, way_out = _ask(model, options)
    target = api.find_target(found.setup, options.target_batch, options.target_tokens)
    document = estimate_document(found, origin=model.origin, target=target, plan=way_out)

    def lines() -> Sequence[Line]:
        from memplan.report.estimate import render_estimate

        return render_estimate(document, quiet=options.quiet)

    def page() -> str:
        from memplan.cli.pages import estimate_page

        return estimate_page(document, found, model, options)

    write_answer(
        document,
        format=options.format,
        output=options.output,
        quiet=options.quiet,
        lines=lines,
        records=found.records,
        page=page,
    )
    return DOES_NOT_FIT if found.fits is False else 0


def _ask(model: api.Model | api.UserModule, options: Options) -> tuple[Estimate, Plan | None]:
    """The bytes, and where they are too many a way out."""
    found = api.estimate(model, gpu=options.gpu, **options.choices())
    return found, _plan(model, options, found)


def _plan(model: api.Model | api.UserModule, options: Options, found: Estimate) -> Plan | None:
    """Where it does not fit: what reaches the same batch on the same card."""
    if found.fits is not False or options.gpu is None or found.setup.global_batch_size > LARGEST_COUNT:
        return None
    free = ("micro_batch", "accumulation", "checkpointing", "target_batch", "target_tokens")
    fixed = {name: value for name, value in options.choices().items() if name not in free}
    return api.suggest(model, gpu=options.gpu, target_batch=found.setup.global_batch_size, **fixed)
