"""`memplan suggest`: the fastest configuration that fits and keeps the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan import api
from memplan.cli.data_rows import counted_of
from memplan.cli.output import DOES_NOT_FIT, say, say_bound, say_every, write_answer
from memplan.errors import UsageError
from memplan.report.document import plan_document
from memplan.report.plan import render_plan
from memplan.specs.choices import dropout_of

if TYPE_CHECKING:
    from memplan.cli.values import Options
    from memplan.planner.plan import Plan


def answer(options: Options) -> int:
    """Print the plan; the exit status."""
    gpu = check_plannable(options)
    say_bound(options)
    dropout, objective = dropout_of(options.choices()), options.objective or "lm"
    model = api.find_model(options.model, dropout=dropout, objective=objective)
    if isinstance(model, api.Model):
        say_every(options.checkpointing, len(model.architecture.layers), quiet=options.quiet)
    if isinstance(model, api.Model) and options.data is None:
        plan = api.suggest(model, gpu=gpu, **options.choices())
    else:
        plan = _waited_for(model, gpu, options)
    document = plan_document(plan, origin=model.origin, cards=cards_of(plan))
    write_answer(
        document,
        format=options.format,
        output=options.output,
        quiet=options.quiet,
        lines=lambda: render_plan(document, quiet=options.quiet),
        records=plan.records,
        page=lambda: _page(plan, model, options),
    )
    if plan.best is None and options.format in {"csv", "markdown"}:
        say("nothing fits, so the table is empty; see --format text or --json", quiet=options.quiet)
    return DOES_NOT_FIT if plan.best is None else 0


def _waited_for(model: api.Model | api.UserModule, gpu: str, options: Options) -> Plan:
    """A plan that takes long: traces are made, or data is read."""
    from memplan.cli.progress import Progress

    with Progress(shown=not options.quiet) as progress:
        if isinstance(model, api.UserModule):
            model = model._replace(notify=progress.say)
        if options.data is None:
            return api.suggest(model, gpu=gpu, **options.choices())
        from memplan.feeding import suggest_for_data

        told = {**counted_of(options), "max_loss": options.max_loss}
        return suggest_for_data(options.data, model, gpu=gpu, notify=progress.say, **told, **options.choices())


def _page(plan: Plan, model: api.Model | api.UserModule, options: Options) -> str:
    from memplan.cli.pages import plan_page

    return plan_page(plan, model, options)


def check_plannable(options: Options) -> str:
    """The GPU to plan for.

    Raises:
        UsageError: it, or a target, is missing.
    """
    if options.gpu is None:
        raise UsageError("A plan needs a GPU: --gpu is missing.", "Say --gpu rtx4090, --gpu 24GB or --gpu auto.")
    if options.target_batch is None and options.target_tokens is None:
        raise UsageError(
            "A plan needs a target: --target-batch or --target-tokens is missing.", "Say for example --target-batch 32."
        )
    return options.gpu


def cards_of(plan: Plan) -> list[dict[str, Any]]:
    """Where nothing fits: the cards that would hold the nearest."""
    if plan.nearest is None:
        return []
    from memplan.catalog.gpus import read_gpus
    from memplan.report.cards import cards_that_hold

    return cards_that_hold(plan.nearest, plan.goal, read_gpus().values())
