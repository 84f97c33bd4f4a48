"""A Hugging Face ``tokenizer.json`` as a counter of tokens, and the chat template beside it.

Special tokens are those that the tokenizer adds by itself; a chat that went through a template gets none beside it, as
in ``apply_chat_template``.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError, UsageError
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from memplan.datasets.layout import Template

FILE, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer(NamedTuple):
    """Counts tokens."""

    path: str
    model: Any
    """A `tokenizers.Tokenizer`."""
    template: Template | None
    """None: there is none beside it."""
    files: tuple[str, ...] = ()
    """All that counts depend on."""

    @property
    def ends_by_itself(self) -> bool:
        """Whether it puts a special token behind every text."""
        with_specials, without = (self.model.encode("a", add_special_tokens=added).ids for added in (True, False))
        return bool(with_specials[-1:] != without[-1:])

    def encode(self, texts: Sequence[str], *, specials: bool) -> list[Any]:
        """Each text as a `tokenizers.Encoding`, on all cores; `specials`: with those that the tokenizer adds itself."""
        return self.model.encode_batch(texts, add_special_tokens=specials)  # type: ignore[no-any-return]


def tokens_of(encoding: Any, first: int, behind: int) -> tuple[int, int]:
    """The tokens that hold letters of a stretch of the text, as (first, first behind them); none: twice behind all.

    Letters that belong to no token (spaces that are left out) are passed over.
    """
    start = _token(encoding, range(first, behind))
    last = None if start is None else _token(encoding, range(behind - 1, first - 1, -1))
    return (len(encoding),) * 2 if start is None or last is None else (start, last + 1)


def _token(encoding: Any, letters: Iterable[int]) -> int | None:
    return next((token for at in letters if (token := encoding.char_to_token(at)) is not None), None)


def read_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a file or of the folder that a model was saved in.

    Raises:
        UsageError: there is no such file.
        MemplanError: it cannot be read, or the library `tokenizers` is not installed.
    """
    path = os.path.expanduser(path)
    file = os.path.join(path, FILE) if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise UsageError(f"There is no tokenizer at {path!r}.", f"Name a {FILE}, or a folder that holds one.")
    try:
        from tokenizers import Tokenizer as Model
    except ImportError:
        cure = "Install it with pip install 'memplan[data]', or give token counts (num_tokens)."
        raise MemplanError("Counting tokens needs tokenizers, which is not installed.", cure) from None
    try:
        model = Model.from_file(file)
    except Exception as fault:  # noqa: BLE001 -- whatever it raises: it has no class of its own
        raise MemplanError(f"{file} is no tokenizer: {fault}.", f"Name a {FILE} of Hugging Face.") from None
    model.no_truncation()
    model.no_padding()
    folder = os.path.dirname(file)
    beside = (os.path.join(folder, name) for name in (CONFIG, TEMPLATE))
    return Tokenizer(file, model, _template(folder), (file, *filter(os.path.isfile, beside)))


def _template(folder: str) -> Template | None:
    """The chat template of the folder, compiled."""
    config = _config(os.path.join(folder, CONFIG))
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((one.get("template") for one in source if one.get("name") == "default"), None)
    own = os.path.join(folder, TEMPLATE)
    if os.path.isfile(own):
        with open(own, encoding="utf-8") as file:
            source = file.read()
    if not isinstance(source, str):
        return None
    from memplan.datasets.chat_template import compiled

    return compiled(source, {name: _special(config.get(name)) for name in SPECIAL})


def _config(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as fault:
        raise MemplanError(f"{path} cannot be read: {fault}.", "Mend it, or take it away.") from None
    return found if isinstance(found, dict) else {}


def _special(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else "" if value is None else str(value)
