"""Which model does the user mean, and what does its config.json say?

    read_config("qwen2.5-1.5b")          the catalogue, by id or alias, upper and lower case alike
    read_config("./my-model")            a folder with a config.json in it, or such a file; files go before names
    read_config("org/some-model")        the hub: its config.json, out of a cache or fetched

The catalogue is `profiles/models`: one config.json a model under the name `org__model.json`, and `index.csv`, one line
a model, plain commas, no quotes, so that a look-up reads lines and parses nothing.

Of a hub id nothing but the config.json is fetched (`HF_ENDPOINT`, with `HF_TOKEN` if set), and kept for the next time.
`HF_HUB_OFFLINE=1` or `MEMPLAN_OFFLINE=1` forbids it.

Left out: hub revisions, and names without an organisation that the catalogue does not know.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any, NoReturn

from memplan.catalog.profiles import parse_toml, profile_path
from memplan.errors import ConfigError, MemplanError, UnknownModelError, UsageError, did_you_mean
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from http.client import HTTPResponse
    from urllib.error import HTTPError

FOLDER = "models"
INDEX_FILE = "index.csv"
CONFIG_FILE = "config.json"

DEFAULT_MODEL = "Qwen/Qwen2.5-1.5B"
"""What is planned for where nobody names a model: with bf16 AdamW it fits a 24 GB card at 1024 and 2048 tokens."""

MAX_CONFIG_BYTES = 4 * 2**20
"""Published configs have some kilobytes; what is larger is another file."""

MAX_DIGITS = 30
"""Longer whole numbers are in no config."""

HUB = "https://huggingface.co"
TIMEOUT_S = 5
"""Longest wait for the hub's next bytes, in seconds."""
DEADLINE_S = 20
"""Longest wait for all of a config, in seconds."""

NAME_CURE = "Name one that `memplan models` lists, a config.json, a folder holding one, or a hub id such as org/model."


FORMULA = "formula"


class KnownModel(NamedTuple):
    """A row of the catalogue."""

    id: str
    aliases: tuple[str, ...]
    """Short names, in lower case."""
    model_type: str
    auto_class: str
    """The transformers class that `parameters` counts."""
    parameters: int
    """Exact number of parameters, tied weights once."""
    published_parameters: int | None
    """What its publisher's files hold, where that is known."""
    config_kind: str
    """``vendored``: from a public repository; ``constructed``: written from its documented dimensions; ``+patched``."""
    status: str
    """How `parameters` and `published_parameters` compare."""
    note: str

    @property
    def file(self) -> str:
        """Name of its config in the catalogue's folder."""
        return f"{self.id.replace('/', '__')}.json"

    @property
    def is_modelled(self) -> bool:
        """Whether a formula answers for it."""
        return self.answered_by == FORMULA

    @property
    def answered_by(self) -> str:
        """``formula``; else ``trace``, or ``one trace`` where PyTorch runs the model token by token."""
        from memplan.architectures.registry import READER_BY_MODEL_TYPE
        from memplan.architectures.undescribed import KIND_BY_MODEL_TYPE

        if self.model_type in READER_BY_MODEL_TYPE:
            return FORMULA
        kind = KIND_BY_MODEL_TYPE.get(self.model_type)
        return "one trace" if kind is not None and kind.loops else "trace"


# -- the catalogue -----------------------------------------------------------------------------------------------------


def read_models() -> list[KnownModel]:
    """Every model of the catalogue, in the order of its index."""
    return [_parse_line(line) for line in _index_lines()]


def find_model(name: str) -> KnownModel | None:
    """The model of the catalogue with this id or alias, None where there is none."""
    wanted = name.strip().lower()
    for line in _index_lines():
        model_id, aliases, _ = line.split(",", 2)
        if wanted == model_id.lower() or wanted in aliases.split():
            return _parse_line(line)
    return None


def _index_lines() -> Iterator[str]:
    with open(profile_path(FOLDER, INDEX_FILE), encoding="utf-8") as file:
        next(file)  # the names of the columns
        yield from (line.rstrip("\n") for line in file)


def _parse_line(line: str) -> KnownModel:
    model_id, aliases, model_type, auto_class, parameters, published, kind, status, note = line.split(",")
    return KnownModel(
        model_id,
        tuple(aliases.split()),
        model_type,
        auto_class,
        int(parameters),
        int(published) if published else None,
        kind,
        status,
        note,
    )


def _near_names(name: str) -> str:
    """The cure for an unknown name."""
    names = [known for line in _index_lines() for known in (line.split(",", 1)[0], *line.split(",", 2)[1].split())]
    return did_you_mean(name, names, otherwise=NAME_CURE)


# -- what MODEL stands for ---------------------------------------------------------------------------------------------


def read_config(text: str) -> tuple[dict[str, Any], str]:
    """The values of the config.json that `text` stands for, and where they come from (an id or a path).

    Raises:
        UsageError: `text` is empty.
        UnknownModelError: nobody knows the name.
        ConfigError: there is such a file, and it is not a model's config.
        MemplanError: there is no such file, or the hub does not answer.
    """
    name = text.strip()
    if not name:
        raise UsageError("The model's name is empty.", NAME_CURE)
    path = os.path.expanduser(name) if name.startswith("~") else name
    if os.path.isdir(path):
        inside = os.path.join(path, CONFIG_FILE)
        if os.path.exists(inside):
            return _read_file(inside), name
    elif os.path.exists(path):
        return _read_file(path), name
    known = find_model(name)
    if known is not None:
        return _read_file(profile_path(FOLDER, known.file)), known.id
    if os.path.isdir(path):
        raise MemplanError(f"The folder {name} holds no {CONFIG_FILE}.", "Name the folder that a model was saved in.")
    if _looks_like_path(name):
        raise MemplanError(f"There is no file or folder {name}.", NAME_CURE)
    if not _is_hub_id(name):
        raise UnknownModelError(f"No model is known by the name {name!r}.", _near_names(name))
    return _read_hub_config(name), name


def _looks_like_path(name: str) -> bool:
    """Whether `name` can only have been meant as a path."""
    return name.startswith((".", "/", "~")) or name.endswith((".json", "/")) or "\\" in name or name.count("/") > 1


def _is_hub_id(name: str) -> bool:
    """``organisation/model`` in the characters that the hub allows."""
    parts = name.split("/")
    return name.isascii() and len(parts) == 2 and all(_is_hub_word(part) for part in parts)


def _is_hub_word(word: str) -> bool:
    """Letters and digits, parted by ``-``, ``.`` or ``_``."""
    return word.strip("-._") == word and word.replace("-", "").replace(".", "").replace("_", "").isalnum()


# -- one file ----------------------------------------------------------------------------------------------------------


def _read_file(path: str) -> dict[str, Any]:
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # opening a pipe or a device may wait for ever
            raise MemplanError(f"{path} is no regular file.", "Give a config.json, or a folder with one.")
        with open(path, "rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as fault:
        raise MemplanError(f"{path} cannot be read: {fault.strerror}.", "Check the path and its permissions.") from None
    return parse_config(content, path)


def parse_config(content: bytes, origin: str) -> dict[str, Any]:
    """The object that a config.json holds; `ConfigError` where it is none."""
    import json

    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"{origin} is larger than {MAX_CONFIG_BYTES >> 20} MiB.", "Give the model's config.json, not its weights."
        )
    cure = "Give the config.json that the model was published with."
    try:
        values = json.loads(content.decode("utf-8-sig"), parse_constant=_refuse, parse_float=_finite, parse_int=_short)
    except UnicodeDecodeError:
        raise ConfigError(f"{origin} is not a text file in UTF-8.", cure) from None
    except json.JSONDecodeError as fault:
        raise ConfigError(
            f"{origin} is not valid JSON: {fault.msg} in line {fault.lineno}, column {fault.colno}.", cure
        ) from None
    except ValueError as fault:
        raise ConfigError(f"{origin} holds a number that no config has: {fault}.", cure) from None
    except RecursionError:
        raise ConfigError(f"{origin} is nested too deeply.", cure) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} holds a JSON {type(values).__name__}, not an object.", cure)
    return values


def _refuse(text: str) -> NoReturn:
    raise ValueError(text if len(text) <= MAX_DIGITS else f"{text[:MAX_DIGITS]}... of {len(text):,} digits")


def _finite(text: str) -> float:
    number = float(text)
    return number if abs(number) != float("inf") else _refuse(text)


def _short(text: str) -> int:
    return int(text) if len(text) <= MAX_DIGITS else _refuse(text)


# -- the hub -----------------------------------------------------------------------------------------------------------


def _read_hub_config(hub_id: str) -> dict[str, Any]:
    in_hub_cache = _hub_cache_file(hub_id, os.environ)
    if in_hub_cache is not None:
        return _read_file(in_hub_cache)
    kept = os.path.join(cache_dir(os.environ), "configs", f"{hub_id.replace('/', '--')}.json")
    if os.path.isfile(kept):
        try:
            return _read_file(kept)
        except MemplanError:
            pass  # fetched again below
    for variable in ("MEMPLAN_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(variable, "").strip().lower() in {"1", "true", "yes", "on"}:
            raise UnknownModelError(
                f"{hub_id} is neither in the catalogue nor in a cache, and {variable} forbids fetching it.",
                _near_names(hub_id),
            )
    content = _fetch(hub_id)
    values = parse_config(content, f"{CONFIG_FILE} of {hub_id}")
    _write(kept, content)
    return values


def cache_dir(environment: Mapping[str, str]) -> str:
    """Where fetched configs are kept: `MEMPLAN_CACHE_DIR`, else `memplan` in the user's cache folder."""
    own = environment.get("MEMPLAN_CACHE_DIR")
    return os.path.expanduser(own) if own else os.path.join(_user_cache_dir(environment), "memplan")


def _user_cache_dir(environment: Mapping[str, str]) -> str:
    return os.path.expanduser(environment.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"))


def _hub_cache_file(hub_id: str, environment: Mapping[str, str]) -> str | None:
    """The config.json in the hub's own cache: of the revision that `main` stands for, else of the newest."""
    home = environment.get("HF_HOME") or os.path.join(_user_cache_dir(environment), "huggingface")
    cache = environment.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    folder = os.path.join(os.path.expanduser(cache), f"models--{hub_id.replace('/', '--')}")
    snapshots = os.path.join(folder, "snapshots")
    try:
        found = [os.path.join(snapshots, revision, CONFIG_FILE) for revision in os.listdir(snapshots)]
        found = sorted((path for path in found if os.path.isfile(path)), key=os.path.getmtime)
    except OSError:
        return None
    try:
        with open(os.path.join(folder, "refs", "main"), encoding="utf-8") as file:
            main = os.path.join(snapshots, file.read(100).strip(), CONFIG_FILE)
    except (OSError, ValueError):
        main = ""
    if main in found:
        return main
    return found[-1] if found else None


def _fetch(hub_id: str) -> bytes:
    """The bytes of the hub's config.json."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise MemplanError(f"HF_ENDPOINT is {endpoint!r}, not an address.", f"Unset it or set it to {HUB}.")
    token = os.environ.get("HF_TOKEN", "").strip()
    try:
        request = Request(f"{endpoint}/{hub_id}/resolve/main/{CONFIG_FILE}", headers={"User-Agent": "memplan"})
        if token:  # unredirected: the token is for this host and no other
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        with urlopen(request, timeout=TIMEOUT_S) as response:
            return _read_within_deadline(response)
    except HTTPError as answer:
        with answer:
            raise _refusal(hub_id, answer, has_token=bool(token)) from None
    except (OSError, HTTPException, ValueError) as fault:  # ValueError: the endpoint is no address
        reason = getattr(fault, "reason", None) or fault
        raise MemplanError(
            f"{hub_id} is not in the catalogue, and {endpoint} could not be asked for its config: {reason}.",
            "Give a path to its config.json, or try again with network.",
        ) from None


def _read_within_deadline(response: HTTPResponse) -> bytes:
    from time import monotonic

    end = monotonic() + DEADLINE_S
    content = bytearray()
    while len(content) <= MAX_CONFIG_BYTES:
        part = response.read1(65536)
        if not part:
            break
        content += part
        if monotonic() > end:
            raise TimeoutError(f"it took longer than {DEADLINE_S} s")
    return bytes(content)


def _refusal(hub_id: str, answer: HTTPError, *, has_token: bool) -> MemplanError:
    """What an HTTP status means; to strangers the hub answers 401 for a model that does not exist, too."""
    if answer.code == 404:
        return UnknownModelError(f"The hub has no {CONFIG_FILE} for {hub_id}.", _near_names(hub_id))
    if answer.code in {401, 403}:
        token = "Check that HF_TOKEN may read it." if has_token else "If it is gated or private, set HF_TOKEN."
        return UnknownModelError(f"{hub_id} is not public on the hub, or not there.", f"{_near_names(hub_id)} {token}")
    return MemplanError(
        f"The hub answered {answer.code} when asked for the config of {hub_id}.",
        "Try again later, or give a path to its config.json.",
    )


def _write(path: str, content: bytes) -> None:
    """All of it or nothing; a cache that cannot be written is none."""
    import contextlib
    import tempfile

    temporary = ""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


# -- the model where none is named -------------------------------------------------------------------------------------


def find_default_model() -> tuple[str, str]:
    """The model to take where none is named, and where that was said.

    ``model =`` in the nearest `memplan.toml`, or in `[tool.memplan]` of the nearest `pyproject.toml`, from the current
    folder upwards; a path is meant relative to that file.
    """
    try:
        folder = os.getcwd()
    except OSError:  # the current folder was deleted
        folder = ""
    while folder:
        for file, tables in (("memplan.toml", ()), ("pyproject.toml", ("tool", "memplan"))):
            path = os.path.join(folder, file)
            name = _read_model_key(path, tables)
            if name is not None:
                return _relative_to(folder, name), path
        above = os.path.dirname(folder)
        folder = above if above != folder else ""
    return DEFAULT_MODEL, "the default model of memplan"


def _read_model_key(path: str, tables: tuple[str, ...]) -> str | None:
    """The value of ``model`` in this file's table, None where there is no such file, table or key."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_CONFIG_BYTES)
    except OSError:
        return None
    if b"model" not in content or (tables and not _may_hold(content, tables)):
        return None
    cure = "Correct the file, or name the model on the command line."
    try:
        table: Any = parse_toml(content)
    except (ValueError, RecursionError) as fault:
        raise MemplanError(f"{path} is not valid TOML: {fault}.", cure) from None
    for key in (*tables, "model"):
        if not isinstance(table, dict) or key not in table:
            return None
        table = table[key]
    if not isinstance(table, str) or not table.strip():
        raise MemplanError(f"model in {path} is {table!r}, not the name of a model.", cure)
    return table.strip()


def _may_hold(content: bytes, tables: tuple[str, ...]) -> bool:
    """Whether a line of a TOML file begins a table within these, however it is spelt; looking is quicker than parsing.

    For ``("tool", "memplan")``: ``[tool.memplan]``, ``tool.memplan.model = ``, ``tool = {``, ``memplan = {`` and
    ``memplan.model = ``, where quotes and blanks make no difference.
    """
    dotted = ".".join(tables).encode()
    starts = (b"[" + dotted, dotted, *(table.encode() + end for table in tables for end in (b"={", b".model")))
    bare = content.translate(None, b" \t\"'")
    return any(line.startswith(starts) for line in bare.splitlines())


def _relative_to(folder: str, name: str) -> str:
    """`name` as a path seen from `folder` where it is one, else as it is."""
    beside = os.path.join(folder, os.path.expanduser(name))
    return beside if os.path.exists(beside) or _looks_like_path(name) else name
