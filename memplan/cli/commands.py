"""The commands as click knows them: imported for whatever `memplan.cli.plain` leaves to it."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from memplan.cli.data_rows import SUGGEST_ROWS, check_data
from memplan.cli.options import SetupCommand, options_of, setup_options
from memplan.cli.values import Options
from memplan.errors import MemplanError, UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "estimate": "the bytes of one configuration",
    "suggest": "the fastest configuration that fits and keeps the batch",
    "sweep": "a table over micro-batches and lengths, and which of them fit",
    "trace": "the same bytes as estimate, from the real module, without a GPU",
    "probe": "the same bytes and the step time, measured on a GPU",
    "validate": "predicted against measured",
    "same-update": "whether accumulating is the same update as the whole batch",
    "calibrate": "measurements to coefficients and error bounds for a GPU",
    "lengths": "how long the data is, and what each maximum length would cost",
    "report": "a plan as one page, with charts",
    "export": "a plan as what carries it out",
    "models": "the models that are known",
    "gpus": "the GPUs that are known",
}
"""Name -> what it answers; a command that is not in this module is the function of its name in the module of its name.
"""

PLANNED = (
    "check",
    "doctor",
)
"""Commands to come; asking for one is a fault that says so."""


def _imported(command: str) -> Any:
    """The function of a command's module."""
    name = command.replace("-", "_")
    return getattr(import_module(f"memplan.cli.{name}"), name)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order in which they are useful."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, None where there is none."""
        if cmd_name not in COMMANDS:
            return None
        command = self.commands.get(cmd_name) or _imported(cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; an unknown name is answered with near ones."""
        name = args[0]
        if name in PLANNED:
            raise MemplanError(f"memplan {name} is not there yet.", f"This version has {', '.join(COMMANDS)}.")
        if name not in COMMANDS and not name.startswith("-"):
            known = f"The commands are {', '.join(COMMANDS)}."
            raise UsageError(f"There is no command {name!r}.", did_you_mean(name, COMMANDS, otherwise=known))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Their list, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"memplan {sys.modules['memplan'].__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, or it fits; 1 a fault; 2 usage; 3 it does not fit; 130 interrupted.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.pass_context
def memplan(ctx: click.Context) -> None:
    """Say whether a training run fits on a GPU, and plan the fastest that does.

    For example: memplan suggest --gpu 24GB --target-batch 32
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


@memplan.command(cls=SetupCommand, short_help=COMMANDS["estimate"])
@setup_options
def estimate(**given: Any) -> int:
    """Show the bytes of one configuration: three totals, by kind, by instant, row by row.

    MODEL is a name that `memplan models` lists, a config.json, a folder holding one, a hub id, or
    package.module:factory, a function that makes a module (see `memplan trace`). What is not given takes its default:
    micro-batch 1, accumulation 1, no checkpointing.
    """
    from memplan.cli.estimate import answer

    return answer(Options(**given))


@memplan.command(cls=SetupCommand, short_help=COMMANDS["suggest"])
@options_of(SUGGEST_ROWS)
def suggest(**given: Any) -> int:
    """Plan: micro-batch, accumulation steps and checkpointing that reach the batch on this GPU, the fastest first.

    MODEL is a name that `memplan models` lists, a config.json, a folder holding one, a hub id, or
    package.module:factory, a function that makes a module (see `memplan trace`). Micro-batch, accumulation and
    checkpointing are kept where they are given, and else free.

    With --data the maximum length is chosen, where --seq-len does not say it, the plan is made for the worst
    micro-batch that the data can give, and ways to make batches are compared.
    """
    from memplan.cli.suggest import answer

    options = Options(**given)
    check_data(options)
    return answer(options)


def run(given: Sequence[str]) -> int:
    """Let click read the command line and call the command; the exit status.

    Raises:
        MemplanError: of the command, or of click in our words.
        KeyboardInterrupt: it was interrupted.
    """
    try:
        status: Any = memplan.main(list(given), prog_name="memplan", standalone_mode=False)
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as fault:
        kind = UsageError if fault.exit_code == UsageError.exit_status else MemplanError
        raise kind(*_translated(fault, given)) from fault
    return status if isinstance(status, int) else 0


def _translated(fault: click.ClickException, given: Sequence[str]) -> tuple[str, str]:
    """A fault of click as cause and cure."""
    ctx = getattr(fault, "ctx", None)
    command = next((arg for arg in given if arg in COMMANDS), None)
    cure = f"See memplan {command} --help." if command else "See memplan --help."
    option = getattr(fault, "option_name", None)
    if isinstance(fault, click.NoSuchOption) and ctx is not None:
        known = [name for param in ctx.command.params if not getattr(param, "hidden", False) for name in param.opts]
        return f"There is no option {option}.", did_you_mean(str(option), known, otherwise=cure)
    return f"{fault.format_message().rstrip('.')}.", cure
