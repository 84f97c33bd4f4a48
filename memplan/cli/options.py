"""The options of `memplan.cli.values` as click's: for the help, for completion, and for what is not plain to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from memplan.cli.values import MODEL, OUTPUT_ROWS, SETUP_ROWS, Row, check_targets, choose_format

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Kind = click.ParamType[Any]
else:
    Kind = click.ParamType  # before click 8.4 it takes no parameter


class Value(Kind):
    """What the reader of a row makes of a text."""

    name = "value"

    def __init__(self, row: Row) -> None:
        self.row = row

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value; the reader raises what there is to say against it."""
        assert self.row.read is not None
        return self.row.read(str(value), self.row.flag)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """The names that begin like this."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in self.row.known if name.startswith(incomplete.lower())]


class Option(click.Option):
    """An option under a heading of the help."""

    def __init__(self, *args: Any, section: str = "Options", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.section = section


class SetupCommand(click.Command):
    """A command whose help lists its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options by heading."""
        by_section: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                by_section.setdefault(getattr(param, "section", "Output"), []).append(record)
        for section, records in by_section.items():
            with formatter.section(section):
                formatter.write_dl(records)


def _format(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    return choose_format(ctx.params.pop("json", False), value)


def _target_tokens(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    check_targets(ctx.params.get("target_batch"), value)
    return value


CALLBACKS = {"format": _format, "target_tokens": _target_tokens}
"""Where a value depends on another one."""


def _option(row: Row) -> Callable[[Any], Any]:
    settings: dict[str, Any] = {"is_flag": True} if row.read is None else {"type": Value(row), "metavar": row.metavar}
    return click.option(
        *row.names,
        cls=Option,
        section=row.section,
        help=row.help,
        is_eager=row.first,
        hidden=row.hidden,
        expose_value=not row.hidden,
        callback=CALLBACKS.get(row.field),
        **settings,
    )


def setup_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """MODEL and the options of a setup."""
    return options_of(SETUP_ROWS)(command)


def options_of(rows: Sequence[Row], *, several: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """MODEL, or as many as there are under the name `several`, and the options of a table."""
    count = -1 if several else 1
    model = click.argument(
        MODEL.field, required=False, nargs=count, type=Value(MODEL), metavar=several or MODEL.metavar
    )
    return lambda command: _with([model, *map(_option, rows)], command)


def rows_as_options(rows: Sequence[Row]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of a table, without MODEL."""
    return lambda command: _with([*map(_option, rows)], command)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those that say how an answer is written."""
    return rows_as_options(OUTPUT_ROWS)(command)


def _with(options: Sequence[Callable[[Any], Any]], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command
