"""What the pages of `memplan report` and `--format html` show beside the answer; imported when a page is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan import api, studies
from memplan.cli.command_line import command_line
from memplan.cli.progress import Progress
from memplan.cli.suggest import cards_of
from memplan.report.document import plan_document
from memplan.report.pages.estimate import render_estimate_page
from memplan.report.study import profile_document, study_document

if TYPE_CHECKING:
    from memplan.cli.values import Options
    from memplan.estimation.estimate import Estimate
    from memplan.planner.plan import Plan
    from memplan.planner.study import Study

    Document = dict[str, Any]


def report_of(found: Study, command: str) -> Document:
    """The document of the page of a plan."""
    return study_document(found, plan_document(found.plan, origin=found.origin, cards=cards_of(found.plan)), command)


def plan_page(plan: Plan, model: api.Model | api.UserModule, options: Options) -> str:
    """The page of a plan that was made for `options`: the one that `memplan report` writes."""
    from memplan.report.pages.plan import render_plan_page

    with Progress(shown=not options.quiet) as progress:
        found = studies.study_of(plan, taught(model, options), notify=progress.say)
        return render_plan_page(report_of(found, command_line("suggest", options)))


def estimate_page(document: Document, found: Estimate, model: api.Model | api.UserModule, options: Options) -> str:
    """The page of an estimate, with its timeline where the model is described."""
    profile = studies.profile_of_estimate(found, taught(model, options))
    return render_estimate_page(document, None if profile is None else profile_document(profile))


def taught(model: api.Model | api.UserModule, options: Options) -> api.Model | api.UserModule:
    """The model with the teacher that `options` name."""
    return api.find_trained(model, options.choices())
