"""A chat template as transformers runs it: blocks trimmed, in Jinja's sandbox, with a few functions of its own.

Templates come from outside; the sandbox lets them do nothing but make text.
"""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from memplan.errors import MemplanError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jinja2.parser import Parser

    from memplan.datasets.layout import Template


class _Generation(Extension):
    """``{% generation %}`` around what the assistant says: here nothing but what stands inside."""

    tags = {"generation"}  # noqa: RUF012 -- as Jinja asks for it

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compiled(source: str, tokens: Mapping[str, str]) -> Template:
    """A template; `tokens` are the special ones that it may name (``bos_token``).

    Raises:
        MemplanError: it is no template; what is returned raises the same of a chat that it refuses.
    """
    extensions = [loopcontrols, _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _as_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_now)
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as fault:
        raise MemplanError(f"The chat template cannot be read: {fault}.", "Mend it, or take it away.") from None

    def render(messages: list[dict[str, Any]], answers: bool) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=answers, **tokens)
        except (jinja2.TemplateError, TypeError, ValueError) as fault:
            raise MemplanError(f"The chat template refuses a chat: {fault}.", "Mend the chat.") from None

    return render


def _as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    """Some day: templates put that of the run into the first message, and it is as long."""
    return datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc).strftime(form)
