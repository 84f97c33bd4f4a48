"""What of a record is text, and which of it has a label?

    counts     token counts: ``num_tokens``, and where it is known ``num_supervised_tokens``
    messages   a chat: a list of messages with role and content (``messages``) or from and value (``conversations``);
               what the assistant says has a label
    pair       a prompt and a completion, which has the label
    text       all of it has one

A record becomes one text and the stretches of it that have a label.  An answer of the assistant reaches from where the
chat before it ends, with the words that begin an answer, to where the chat with it ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError, UsageError, did_you_mean
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Record = Mapping[str, Any]
    Template = Callable[[list[dict[str, Any]], bool], str]
    """A chat as text; whether the words that begin an answer follow."""

COUNT, SUPERVISED_COUNT = "num_tokens", "num_supervised_tokens"
MESSAGES = ("messages", "conversations", "conversation")
PAIRS = (
    (("prompt",), "completion"),
    (("instruction", "input"), "output"),
    (("instruction", "input"), "response"),
    (("instruction", "context"), "response"),
    (("prompt",), "response"),
    (("question",), "answer"),
    (("query",), "response"),
)
"""Fields of the prompt, of which all but the first may be missing or empty, and that of the completion."""
TEXTS = ("text", "content", "document")
ROLE_BY_NAME = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Names of speakers in ShareGPT's way -> roles."""
ASSISTANT = "assistant"


class Layout(NamedTuple):
    """Where in a record the text is."""

    kind: str
    """counts, messages, pair or text."""
    fields: tuple[str, ...]
    """The fields it is in; of a pair the completion's is the last."""

    @property
    def words(self) -> str:
        """In a few words."""
        return f"{self.kind}: {', '.join(self.fields)}"


class Text(NamedTuple):
    """A record as text."""

    text: str
    labelled: list[tuple[int, int]]
    """Stretches that have a label, as (first letter, first letter behind them)."""


def find_layout(record: Record, field: str | None = None, prompt: str | None = None) -> Layout:
    """The layout of a data set whose first record this is.

    Args:
        record: Any record of it.
        field: The field with the text, the chat or the completion; None: to be found.
        prompt: The field with the prompt, where `field` is the completion's.

    Raises:
        UsageError: the field is not there, or there is none that memplan knows.
    """
    for name in (field, prompt):
        if name is not None and name not in record:
            raise UsageError(
                f"The records have no field {name!r}.", did_you_mean(name, list(record), otherwise=_has(record))
            )
    if field is not None:
        if prompt is not None:
            return Layout("pair", (prompt, field))
        return Layout("messages" if isinstance(record[field], list) else "text", (field,))
    return _found(record)


def _has(record: Record) -> str:
    return f"They have {', '.join(map(str, record)) or 'none'}."


def _found(record: Record) -> Layout:
    if COUNT in record:
        return Layout("counts", tuple(name for name in (COUNT, SUPERVISED_COUNT) if name in record))
    for name in MESSAGES:
        if isinstance(record.get(name), list):
            return Layout("messages", (name,))
    for prompts, completion in PAIRS:
        if prompts[0] in record and completion in record:
            return Layout("pair", (*(name for name in prompts if name in record), completion))
    for name in TEXTS:
        if isinstance(record.get(name), str):
            return Layout("text", (name,))
    texts = [name for name, value in record.items() if isinstance(value, str)]
    if len(texts) == 1:
        return Layout("text", (texts[0],))
    raise UsageError(
        f"Which field holds the text? The records have {', '.join(map(str, record)) or 'none'}.", "Say --field NAME."
    )


def text_of(record: Record, layout: Layout, template: Template | None) -> Text:
    """A record as text; `template` makes one of a chat, None puts what is said end to end.

    Raises:
        MemplanError: it is laid out otherwise than the first one.
    """
    if layout.kind == "messages":
        return _chat(_messages(record.get(layout.fields[0])), template)
    values = [_text(record, name) for name in layout.fields]
    prompt = "\n".join(value for value in values[:-1] if value)
    whole = prompt + values[-1]
    return Text(whole, [(len(prompt), len(whole))])


def _text(record: Record, name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):  # a prompt or completion as a chat
        return "".join(str(one.get("content") or "") for one in value)
    if not isinstance(value, str):
        raise MemplanError(f"The field {name!r} of a record is no text: {str(value)[:60]!r}.", "Say --field NAME.")
    return value


def _messages(value: Any) -> list[dict[str, Any]]:
    """Messages with role and content."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise MemplanError(f"A chat is no list of messages: {str(value)[:60]!r}.", "Say --field NAME.")
    return [
        one
        if "role" in one
        else {"role": ROLE_BY_NAME.get(one.get("from", ""), one.get("from", "")), "content": one.get("value", "")}
        for one in value
    ]


def _chat(messages: list[dict[str, Any]], template: Template | None) -> Text:
    whole = _rendered(messages, len(messages), template)
    labelled = []
    for at, one in enumerate(messages):
        if one.get("role") == ASSISTANT:
            start, stop = (_shared(_rendered(messages, cut, template), whole) for cut in (at, at + 1))
            labelled.append((start, stop))
    return Text(whole, labelled)


def _shared(beginning: str, whole: str) -> int:
    """How far both are the same: templates leave thoughts of earlier answers out where another one follows."""
    if whole.startswith(beginning):
        return len(beginning)
    return next(at for at, letter in enumerate(beginning) if whole[at : at + 1] != letter)


def _rendered(messages: list[dict[str, Any]], cut: int, template: Template | None) -> str:
    """The first `cut` messages, and what begins the answer of the assistant where one follows."""
    if template is None:
        return "".join(map(_said, messages[:cut]))
    answers = cut < len(messages) and messages[cut].get("role") == ASSISTANT
    return template(messages[:cut], answers)


def _said(message: Mapping[str, Any]) -> str:
    """What a message says; of one in parts those that are text."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def counted(record: Record, layout: Layout, which: str) -> tuple[int, int]:
    """Tokens and tokens with a label of a record that says them itself; `which`: how a fault calls it.

    Raises:
        MemplanError: they are no whole numbers, or more tokens have a label than there are.
    """
    numbers = [_whole(record.get(name), name, which) for name in layout.fields]
    num, supervised = numbers[0], numbers[-1]
    if supervised > num:
        raise MemplanError(f"{which} has {num} tokens and {supervised} with a label.", "Mend the record.")
    return num, supervised


def _whole(value: Any, name: str, which: str) -> int:
    if value is None:
        raise MemplanError(f"{which} has no {name}.", f"Give every record {name}, or none.")
    text = str(value)
    if isinstance(value, bool) or not text.isascii() or not text.isdigit():
        raise MemplanError(f"{which}: {name} is {text[:40]!r}, not a whole number.", "Mend the record.")
    return int(text)
