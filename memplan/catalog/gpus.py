"""Which GPU does the user mean, and what does it offer?

    parse_gpu("rtx4090")       -> (1, GpuSpec)    a card of the catalogue, by id, alias or the driver's name for it
    parse_gpu("2xa100-80gb")   -> (2, GpuSpec)    several of them
    parse_gpu("24GB")          -> (1, GpuSpec)    any card of 24 x 10^9 bytes; its rates are not known
    parse_gpu("auto")          -> (1, GpuSpec)    the first GPU that nvidia-smi lists in this machine

One file a card lies in `profiles/gpus`, and beside them `index.toml` with every card's aliases: naming an id reads one
file, naming an alias reads two, and only `read_gpus` reads them all.

Left out: CUDA_VISIBLE_DEVICES, MIG slices, and GPUs that nvidia-smi does not list (AMD's); these are named or given as
a size.
"""

from __future__ import annotations

import os
from typing import Any

from memplan.catalog.profiles import profile_path, read_profile
from memplan.errors import MemplanError, UsageError, did_you_mean
from memplan.specs.gpu import GpuSpec
from memplan.specs.values import replace
from memplan.units import GIB, MIB, describe_size, parse_size

FOLDER = "gpus"
INDEX_FILE = "index.toml"

BRANDS = ("nvidia", "geforce", "tesla", "amd", "instinct")
"""Words that drivers and people put before a card's name and that tell no two cards apart."""

MAX_NUM_GPUS = 2**20
"""More GPUs than any machine room has: a larger count is a slip."""

SAME_CARD_TOLERANCE = 0.04
"""Relative difference in nvidia-smi's total up to which a card of a catalogued name is that card.

Drivers move the total by up to 1.4 % (A10G, V100); ECC on GDDR6 takes 6.25 %, and then the catalogue's bytes are wrong.
"""

OTHER_SIZE_TOLERANCE = 0.1
"""The same between a card as catalogued and as torch sees it, where ECC may be on or off."""

GPU_CURE = "Say a card that `memplan gpus` lists, such as rtx4090, or a size such as 24GB or 24GiB."


def read_gpus() -> dict[str, GpuSpec]:
    """Every card of the catalogue by id, in alphabetical order."""
    files = os.listdir(profile_path(FOLDER))
    ids = [file.removesuffix(".toml") for file in files if file.endswith(".toml") and file != INDEX_FILE]
    return {name: _read_gpu_file(name) for name in sorted(ids)}


def read_gpu(name: str) -> GpuSpec:
    """The card of the catalogue with this id or alias; else a `UsageError` that offers near names."""
    gpu_id = name.strip().lower()
    if _is_id(gpu_id):
        return _read_gpu_file(gpu_id)
    index = read_index()
    known_id = _id_by_folded_name(index).get(_fold(name))
    if known_id is None:
        raise UsageError(f"No GPU is known by the name {name[:40]!r}.", _near_names(name, index))
    return _read_gpu_file(known_id)


def read_index() -> dict[str, Any]:
    """Aliases, `label_gb` and `usable_bytes` of every card by id.

    Its lines are cut rather than parsed, so that a card given as a size needs no TOML: each is
    ``id = { label_gb = 24, usable_bytes = 25249710080, aliases = ["a", "b"] }``, and a test holds the result equal to
    what a parser reads.
    """
    index: dict[str, Any] = {}
    with open(profile_path(FOLDER, INDEX_FILE), encoding="utf-8") as file:
        for line in file:
            gpu_id, entry, rest = line.partition(" = { label_gb = ")
            if entry:
                sizes, _, aliases = rest.partition(", aliases = ")
                label_gb, _, usable = sizes.partition(", usable_bytes = ")
                index[gpu_id] = {
                    "label_gb": float(label_gb),
                    "usable_bytes": int(usable),
                    "aliases": aliases.split('"')[1::2],
                }
    return index


def parse_gpu(text: str) -> tuple[int, GpuSpec]:
    """How many GPUs of which kind `text` asks for.

    Raises:
        UsageError: when `text` is neither a known card nor a size with a unit, or its count is not a positive integer.
        MemplanError: when `auto` finds no GPU, fewer than asked for, or different ones.
    """
    num_gpus, kind = _split_count(text.strip())
    if kind.lower() == "auto":
        return num_gpus, _read_local_gpu(num_gpus)
    if _looks_like_size(kind):
        index = read_index()
        if _fold(kind) not in _id_by_folded_name(index):
            return num_gpus, _parse_sized_gpu(kind, index)
    return num_gpus, read_gpu(kind)


def _split_count(text: str) -> tuple[int, str]:
    """`2xrtx4090` -> (2, "rtx4090"); without a count, 1 and the text as it is."""
    count, cross, kind = text.replace("X", "x").partition("x")
    count = count.strip()
    if not cross or not count or count.strip("+-.0123456789"):
        return 1, text
    if not (count.isdigit() and len(count) <= len(str(MAX_NUM_GPUS)) and 1 <= int(count) <= MAX_NUM_GPUS):
        raise UsageError(
            f"The number of GPUs in {text[:40]!r} is {count[:40]}.",
            f"Say a whole number from 1 to {MAX_NUM_GPUS}, as in 2xrtx4090.",
        )
    if not kind.strip():
        raise UsageError(f"{text!r} does not say which GPU.", GPU_CURE)
    return int(count), text[len(text) - len(kind) :].strip()


def _read_gpu_file(gpu_id: str) -> GpuSpec:
    """The card whose profile is `<gpu_id>.toml`, its numbers parted from their sources."""
    profile = read_profile(FOLDER, f"{gpu_id}.toml")
    rates: dict[str, Any] = profile.pop("flops_per_s", {})
    profile.pop("missing", None)
    values = {key: entry["value"] if isinstance(entry, dict) else entry for key, entry in profile.items()}
    sources = {key: entry["source"] for key, entry in profile.items() if isinstance(entry, dict)}
    sources |= {f"flops_per_s.{dtype}": entry["source"] for dtype, entry in rates.items()}
    for key in ("aliases", "unsupported_dtypes"):
        values[key] = tuple(values.get(key, ()))
    values["notes"] = values.get("notes", "").strip()
    return GpuSpec(**values, flops_per_s={dtype: entry["value"] for dtype, entry in rates.items()}, sources=sources)


def _is_id(text: str) -> bool:
    """Whether a card of the catalogue has `text` as its id."""
    plain = text.isascii() and text.replace("-", "").isalnum() and f"{text}.toml" != INDEX_FILE
    return plain and os.path.isfile(profile_path(FOLDER, f"{text}.toml"))


def _fold(name: str) -> str:
    """What two spellings of a card have in common: `NVIDIA GeForce RTX 4090` and `rtx-4090` are both `rtx4090`."""
    words = name.lower().replace("-", " ").replace("_", " ").split()
    return "".join(word for word in words if word not in BRANDS)


def _id_by_folded_name(index: dict[str, Any]) -> dict[str, str]:
    """Every folded id and alias -> id."""
    return {_fold(name): gpu_id for gpu_id, card in index.items() for name in (gpu_id, *card["aliases"])}


def _near_names(name: str, index: dict[str, Any]) -> str:
    """The cure for an unknown name: the cards it begins the name of (`a100`), else those spelt alike."""
    folded = _fold(name)
    longer = [gpu_id for gpu_id in index if len(folded) > 1 and _fold(gpu_id).startswith(folded)]
    near = f"Did you mean {' or '.join(longer)}?" if 0 < len(longer) <= 6 else did_you_mean(folded, index, otherwise="")
    return f"{near} Any other card can be given as a size such as 24GB or 24GiB." if near else GPU_CURE


def _looks_like_size(text: str) -> bool:
    """Whether `text` was meant as bytes: a number, then letters at most, and not the number of a card (`2080ti`)."""
    number, suffix = _split_number(text)
    if text[:1] in ("+", "-"):
        return True
    if not number or (suffix and not suffix.isalpha()):
        return False
    return suffix.lower().endswith("b") or len(number.partition(".")[0]) < 4


def _parse_sized_gpu(text: str, index: dict[str, Any]) -> GpuSpec:
    """A card of which nothing but its size is known."""
    try:
        size_bytes = parse_size(text)
    except UsageError as fault:
        number, suffix = _split_number(text)
        cards = _cards_of_size(number, index) if suffix.lower() in ("", "g", "gi") else ""
        raise UsageError(fault.cause, f"{fault.cure} {cards}".strip()) from None
    label, written_out = describe_size(text)
    return GpuSpec(
        name=label,
        label=label,
        label_bytes=size_bytes,
        sources={"label_bytes": f"{written_out} as typed"},
        notes=_cards_of_size(str(size_bytes / 1e9), index, size_bytes),
    )


def _split_number(text: str) -> tuple[str, str]:
    """The digits and points that `text` starts with, and what follows them."""
    rest = text.lstrip("0123456789.")
    return text[: len(text) - len(rest)], rest.strip()


def _cards_of_size(number: str, index: dict[str, Any], least_bytes: int = 0) -> str:
    """Which cards are sold as about `number` GB, those with fewer usable bytes than `least_bytes` apart; or nothing."""
    try:
        size_gb = float(number)
    except ValueError:
        return ""
    names = [gpu_id for gpu_id, card in index.items() if abs(card["label_gb"] - size_gb) <= 0.08 * size_gb]
    enough = [name for name in names if index[name]["usable_bytes"] >= least_bytes]
    fewer = [name for name in names if name not in enough]
    sentences = [f"Cards of about that size: {', '.join(enough)}."] if enough else []
    if fewer:
        sentences.append(f"Sold as about that size, with less than it to use: {', '.join(fewer)}.")
    return " ".join(sentences)


def _read_local_gpu(num_gpus: int) -> GpuSpec:
    """The first `num_gpus` GPUs of this machine, which must be alike."""
    found = _parse_nvidia_smi(_read_nvidia_smi())
    if len(found) < num_gpus:
        raise MemplanError(
            f"{num_gpus} GPUs were asked for and nvidia-smi lists {len(found)} in this machine.",
            "Ask for fewer, or name the card, as in --gpu 2xrtx4090.",
        )
    if len(set(found[:num_gpus])) > 1:
        names = ", ".join(f"{name} ({total_bytes // MIB} MiB)" for name, total_bytes in found[:num_gpus])
        raise MemplanError(
            f"The first {num_gpus} GPUs of this machine differ: {names}.", "Name the smallest, as in --gpu 2xrtx3060."
        )
    name, total_bytes = found[0]
    source = "nvidia-smi, this machine"
    known_id = _find_driver_name(name, total_bytes, read_index())
    card = _read_gpu_file(known_id) if known_id else None
    if card and abs(card.total_bytes - total_bytes) <= SAME_CARD_TOLERANCE * total_bytes:
        return replace(card, physical_bytes=total_bytes, sources={**card.sources, "physical_bytes": source})
    return GpuSpec(
        name=name.lower().replace(" ", "-"), label=name, physical_bytes=total_bytes, sources={"physical_bytes": source}
    )


def find_card(name: str, torch_bytes: int) -> GpuSpec | None:
    """The card of the catalogue that torch calls `name` and sees so many bytes of; None where there is none.

    ECC on GDDR6 takes a sixteenth of a card: up to `OTHER_SIZE_TOLERANCE` it is the same with other bytes.
    """
    known_id = _find_driver_name(name, torch_bytes, read_index())
    card = _read_gpu_file(known_id) if known_id else None
    if card is None or abs(card.usable_bytes - torch_bytes) > OTHER_SIZE_TOLERANCE * torch_bytes:
        return None
    return card


def _find_driver_name(name: str, total_bytes: int, index: dict[str, Any]) -> str | None:
    """The id for the driver's name of a card; several sizes share a name, so the name with the size goes first."""
    id_by_folded_name = _id_by_folded_name(index)
    sized = f"{name} {round(total_bytes / GIB)}GB"
    return id_by_folded_name.get(_fold(sized)) or id_by_folded_name.get(_fold(name))


def _read_nvidia_smi() -> str:
    """What nvidia-smi prints: one line `name, MiB` a GPU."""
    import subprocess  # here, because only `auto` pays for it

    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    cure = "Name the card, as in --gpu rtx4090, or give its size, as in --gpu 24GB."
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        raise MemplanError("No GPU was found in this machine: there is no nvidia-smi on the PATH.", cure) from None
    except (OSError, subprocess.TimeoutExpired) as fault:
        raise MemplanError(f"No GPU was found in this machine: nvidia-smi did not answer ({fault}).", cure) from fault
    if finished.returncode != 0 or not finished.stdout.strip():
        said = " ".join((finished.stdout + finished.stderr).split()) or "it listed none"
        raise MemplanError(f"No GPU was found in this machine: nvidia-smi says {said!r}.", cure)
    return finished.stdout


def _parse_nvidia_smi(text: str) -> list[tuple[str, int]]:
    """Name and total bytes of every GPU in nvidia-smi's table."""
    lines = (line for line in text.splitlines() if line.strip())
    return [_parse_nvidia_smi_line(line) for line in lines]


def _parse_nvidia_smi_line(line: str) -> tuple[str, int]:
    """`NVIDIA L4, 23034` -> ("NVIDIA L4", 23034 MiB); boards that share the CPU's memory say `[N/A]`."""
    name, _, total_mib = line.rpartition(",")
    if not total_mib.strip().isdigit():
        raise MemplanError(
            f"nvidia-smi does not say how much memory this GPU has: {line.strip()!r}.", "Give a size, as in --gpu 24GB."
        )
    return name.strip(), int(total_mib) * MIB
