"""`memplan trace`: the bytes of one configuration, from a run of the real module without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from memplan import api
from memplan.cli.options import Option, SetupCommand, Value, setup_options
from memplan.cli.output import DOES_NOT_FIT, say, say_bound, write_answer
from memplan.cli.progress import Progress
from memplan.cli.values import Options, Row, one_of, read_text
from memplan.errors import UsageError
from memplan.report.document import difference_document, estimate_document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memplan.probes.events import Trace, TraceEvent
    from memplan.report.ansi import Line

SECTION = "The trace"
SDPA_KERNELS = ("flash", "efficient", "cudnn", "math")
KERNEL = Row(("--sdpa-kernel",), SECTION, "", one_of(SDPA_KERNELS), "|".join(SDPA_KERNELS), SDPA_KERNELS)
SNAPSHOT = Row(("--snapshot",), SECTION, "", read_text, "FILE")


@click.command(cls=SetupCommand, short_help="the same bytes from the real module, without a GPU")
@setup_options
@click.option("--diff", cls=Option, section=SECTION, is_flag=True, help="Formula against trace, row by row.")
@click.option(
    "--sdpa-kernel",
    cls=Option,
    section=SECTION,
    type=Value(KERNEL),
    metavar=KERNEL.metavar,
    help="Instead of the kernel that CUDA would choose.",
)
@click.option(
    "--snapshot",
    cls=Option,
    section=SECTION,
    type=Value(SNAPSHOT),
    metavar="FILE",
    help="Write the run as a memory snapshot, for pytorch.org/memory_viz.",
)
def trace(diff: bool, sdpa_kernel: str | None, snapshot: str | None, **given: Any) -> int:
    """Show the bytes of one configuration from a run of the real module: no GPU, no numbers, no memory.

    MODEL is what `memplan estimate` takes, any config that transformers can build, or package.module:factory, a
    function of your own that returns a module, (module, inputs) or (module, inputs, loss). It is looked for in the
    current directory, too, and its code is run.
    """
    return answer(Options(**given), diff=diff, sdpa_kernel=sdpa_kernel, snapshot=snapshot)


def answer(options: Options, *, diff: bool = False, sdpa_kernel: str | None = None, snapshot: str | None = None) -> int:
    """Print what the trace says; the exit status."""
    if snapshot == "-":
        raise UsageError("--snapshot writes a pickle, which is not for the screen.", "Name a file.")
    say_bound(options)
    with Progress(shown=not options.quiet) as progress:
        found = api.trace(
            options.model,
            gpu=options.gpu,
            sdpa_kernel=sdpa_kernel,
            diff=diff,
            notify=progress.say,
            **options.choices(),
        )
    if snapshot is not None:
        write_trace_snapshot(snapshot, found.trace, found.estimate.memory.alloc_conf)
        say(f"snapshot written to {snapshot}", quiet=options.quiet)
    if found.difference is not None:
        _write_difference(found, options)
        return 0
    target = api.find_target(found.estimate.setup, options.target_batch, options.target_tokens)
    document = estimate_document(found.estimate, kind="trace", origin=found.origin, target=target)

    def lines() -> Sequence[Line]:
        from memplan.report.estimate import render_estimate

        return render_estimate(document, quiet=options.quiet)

    write_answer(
        document,
        format=options.format,
        output=options.output,
        quiet=options.quiet,
        lines=lines,
        records=found.estimate.records,
    )
    return DOES_NOT_FIT if found.estimate.fits is False else 0


def _write_difference(found: api.Traced, options: Options) -> None:
    assert found.difference is not None
    document = difference_document(found.difference, found.estimate, origin=found.origin)

    def lines() -> Sequence[Line]:
        from memplan.report.difference import render_difference

        return render_difference(document, quiet=options.quiet)

    write_answer(
        document,
        format=options.format,
        output=options.output,
        quiet=options.quiet,
        lines=lines,
        records=lambda: [
            {"number": one["name"], "formula": one["formula"], "trace": one["trace"], "percent": one["percent"]}
            for one in (*document["totals"], *document["instants"])
        ],
    )


def write_trace_snapshot(path: str, trace: Trace, alloc_conf: str) -> None:
    """The traced run as a snapshot for PyTorch's memory viewer: operator and module of every block.

    Raises:
        MemplanError: the file cannot be written.
    """
    from memplan.allocator.replay import replay
    from memplan.allocator.settings import parse_alloc_conf
    from memplan.catalog.snapshots import Frame, write_snapshot
    from memplan.probes.answers import allocator_events

    born: dict[int, TraceEvent] = {event.key: event for event in trace.events if event.sign > 0}

    def describe(key: int) -> tuple[Frame, ...]:
        event = born[key]
        when = f"{event.phase}, step {event.step}" if event.step >= 0 else event.phase
        return Frame(event.op, event.module or trace.name), Frame(event.category, when)

    run = replay(allocator_events(trace), parse_alloc_conf(alloc_conf), record=True)
    write_snapshot(path, run, describe=describe, alloc_conf=alloc_conf)
