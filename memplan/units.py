"""How quantities are read and written: bytes, counts and seconds.

Inside the package bytes and counts are ints and seconds are floats; a unit is attached only where text comes in or
goes out.  On the way in, `GB` is 10^9 bytes and `GiB` is 2^30, as the SI and IEC 80000-13 have it, and text that does
not say which is refused: for a "24 GB" card the two differ by 1.6 GiB.  On the way out bytes are always 1024-based, and
parameters are counted in thousands (8.03 B).

All arithmetic on the way in is exact: decimals are scaled as ints and rounded down to whole bytes.
"""

from __future__ import annotations

from memplan.errors import UsageError

MIB = 2**20
"""Bytes in a mebibyte."""

GIB = 2**30
"""Bytes in a gibibyte."""

MANY_GIB = 10_000
"""From here on bytes are shown in larger units."""

MAX_SIZE_BYTES = 2**60
"""The largest size that is taken seriously (1 EiB); anything above it is a slip of the keyboard."""

MAX_COUNT = 10**18
"""The largest count that is taken seriously."""

SIZE_UNIT_BY_NAME = {
    "b": ("B", 1, "1"),
    "kb": ("kB", 10**3, "10^3"),
    "mb": ("MB", 10**6, "10^6"),
    "gb": ("GB", 10**9, "10^9"),
    "tb": ("TB", 10**12, "10^12"),
    "kib": ("KiB", 2**10, "2^10"),
    "mib": ("MiB", 2**20, "2^20"),
    "gib": ("GiB", 2**30, "2^30"),
    "tib": ("TiB", 2**40, "2^40"),
}
"""Folded unit -> its proper spelling, its bytes, and its bytes as a power in text."""

BARE_PREFIXES = ("", "k", "m", "g", "t", "ki", "mi", "gi", "ti")
"""What people leave of a unit; refused, because `24` and `24G` are said of both kinds."""

COUNT_UNIT_BY_NAME = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
"""Folded suffix -> decimal multiplier."""

MAX_DIGITS = 30
"""Longer numbers are refused before they are multiplied out."""


LONGEST_ECHO = 40
"""Longer values are cut when they are quoted."""


def parse_size(text: str) -> int:
    """The bytes that a size such as `24GB`, `1.5 GiB` or `512MiB` stands for, rounded down; else a `UsageError`."""
    number, unit = split_size(text)
    size_bytes = _scale(number, SIZE_UNIT_BY_NAME[unit][1])
    if size_bytes == 0:
        cure = "Say a positive size such as 24GB or 512MiB."
        raise UsageError(f"The size {_quoted(text)} is less than one byte.", cure)
    if size_bytes > MAX_SIZE_BYTES:
        raise UsageError(f"The size {_quoted(text)} is more than 2^60 bytes.", "Say a size such as 24GB or 80GiB.")
    return size_bytes


def describe_size(text: str) -> tuple[str, str]:
    """A size in its proper spelling and written out: `24gb` -> ("24GB", "24 x 10^9 bytes").

    Raises:
        UsageError: when `text` is not a size with a unit.
    """
    number, unit = split_size(text)
    spelling, _, power = SIZE_UNIT_BY_NAME[unit]
    return f"{number}{spelling}", f"{number} x {power} bytes"


def split_size(text: str) -> tuple[str, str]:
    """A size as its number and its folded unit, a key of `SIZE_UNIT_BY_NAME`; else a `UsageError`."""
    number, suffix = _split_number(text)
    unit = suffix.lower()
    if number.startswith("-"):
        raise UsageError(f"The size {_quoted(text)} is negative.", "Say a positive size such as 24GB or 512MiB.")
    if not _is_decimal(number):
        raise UsageError(f"{_quoted(text)} is not a size.", _size_cure("24", "g"))
    if len(number) > MAX_DIGITS:
        raise UsageError(f"The size {_quoted(text)} has more than {MAX_DIGITS} digits.", _size_cure("24", "g"))
    if not number.strip("0."):
        raise UsageError(f"The size {_quoted(text)} is zero.", "Say a positive size such as 24GB or 512MiB.")
    if unit in SIZE_UNIT_BY_NAME:
        return number, unit
    if unit in BARE_PREFIXES:
        raise UsageError(
            f"The size {_quoted(text)} does not say whether it counts in powers of 10 or of 2.",
            _size_cure(number, unit.removesuffix("i") or "g"),
        )
    raise UsageError(f"The size {_quoted(text)} has no unit that is known.", _size_cure("24", "g"))


def parse_count(text: str) -> int:
    """The positive whole number that `4M`, `500k`, `1_000_000` or `4000000` stands for; else a `UsageError`.

    Suffixes are decimal and mean the same in either case: k = 10^3, M = 10^6, B = 10^9, T = 10^12.
    """
    cure = "Say a positive whole number such as 4000000, 1_000_000, 500k or 4M."
    number, suffix = _split_number(text)
    plain = number.replace("_", "")
    badly_grouped = number.startswith("_") or number.endswith("_") or "__" in number
    if badly_grouped or not _is_decimal(plain) or suffix.lower() not in COUNT_UNIT_BY_NAME:
        raise UsageError(f"{_quoted(text)} is not a positive whole number.", cure)
    multiplier = COUNT_UNIT_BY_NAME[suffix.lower()]
    if len(plain) > MAX_DIGITS or _scale(plain, multiplier) > MAX_COUNT:
        raise UsageError(f"The count {_quoted(text)} is more than 10^18.", cure)
    fraction = plain.partition(".")[2]
    count = _scale(plain, multiplier)
    if count == 0 or count * 10 ** len(fraction) != _scale(plain.replace(".", ""), multiplier):
        raise UsageError(f"{_quoted(text)} is not a positive whole number.", cure)
    return count


SECONDS_BY_UNIT = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """The seconds that `8m`, `90s`, `1.5h` or `480` stand for; else a `UsageError`."""
    plain = text.strip().lower()
    number = plain.rstrip("abcdefghijklmnopqrstuvwxyz ")
    scale = SECONDS_BY_UNIT.get(plain[len(number) :].strip())
    if scale is not None and number.replace(".", "", 1).isascii() and number.replace(".", "", 1).isdigit():
        seconds = float(number) * scale
        if 0 < seconds <= MAX_DURATION_S:
            return seconds
    raise UsageError(f"{_quoted(text)} is no time to wait.", "Say seconds, minutes or hours, such as 90s, 8m or 1.5h.")


MAX_DURATION_S = 30 * 86400.0
"""Nobody waits longer than a month."""


def format_bytes(num_bytes: int) -> str:
    """Bytes in GiB with two decimals; below 1 GiB or from 10,000 on in another unit with three significant digits.

    >>> format_bytes(25_386_024_960), format_bytes(446_693_376), format_bytes(-1536), format_bytes(512)
    ('23.64 GiB', '426 MiB', '-1.50 KiB', '512 B')
    """
    size = abs(num_bytes)
    sign = "-" if num_bytes < 0 else ""
    if size < 2**10:
        return f"{sign}{size} B"
    for unit, unit_bytes in (("KiB", 2**10), ("MiB", MIB)):
        digits = _three_digits(size / unit_bytes)
        if float(digits) < 1024:
            return f"{sign}{digits} {unit}"
    if size < MANY_GIB * GIB:
        return f"{sign}{size / GIB:,.2f} GiB"
    for unit, power in (("TiB", 40), ("PiB", 50), ("EiB", 60)):
        if size < 1000 << power:
            return f"{sign}{_three_digits(size / (1 << power))} {unit}"
    return f"{sign}{size / (1 << 70):,.1f} ZiB"


def format_count(count: int) -> str:
    """A count in thousands with three significant digits.

    >>> format_count(8_030_261_248), format_count(494_032_768), format_count(151_936), format_count(512)
    ('8.03 B', '494 M', '152 k', '512')
    """
    size = abs(count)
    sign = "-" if count < 0 else ""
    if size < 1000:
        return f"{sign}{size}"
    for unit, multiplier in (("k", 10**3), ("M", 10**6), ("B", 10**9)):
        digits = _three_digits(size / multiplier)
        if float(digits) < 1000:
            return f"{sign}{digits} {unit}"
    return f"{sign}{_three_digits(size / 10**12)} T"


def format_seconds(seconds: float) -> str:
    """Seconds with three significant digits below a minute, then in whole minutes and seconds, hours, days.

    >>> format_seconds(0.0123), format_seconds(1.5), format_seconds(125), format_seconds(4980)
    ('12.3 ms', '1.50 s', '2 min 5 s', '1 h 23 min')
    """
    if str(seconds) in ("inf", "-inf", "nan"):
        return f"{seconds} s"
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    if seconds == 0:
        return "0 s"
    if seconds < 59.95:
        for unit, unit_s in (("us", 1e-6), ("ms", 1e-3)):
            digits = _three_digits(seconds / unit_s)
            if float(digits) < 1000:
                return f"{digits} {unit}"
        return f"{_three_digits(seconds)} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s} s"
    hours, rest_minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {rest_minutes} min"
    days, rest_hours = divmod(round(seconds / 3600), 24)
    return f"{days:,} d {rest_hours} h"


def is_nothing(text: str) -> bool:
    """Whether `text` says zero bytes: ``0``, ``0.0`` or ``0GB``."""
    number, suffix = _split_number(text)
    return _is_decimal(number) and not number.strip("0.") and suffix.lower() in ("", *SIZE_UNIT_BY_NAME)


def _quoted(text: str) -> str:
    """`text` to quote in a sentence, cut where it is long."""
    return repr(text if len(text) <= LONGEST_ECHO else f"{text[:LONGEST_ECHO]}...")


def _split_number(text: str) -> tuple[str, str]:
    """`text` without outer blanks, cut behind its last leading digit, point, underscore or sign."""
    stripped = text.strip()
    cut = 0
    while cut < len(stripped) and stripped[cut] in "+-0123456789._":
        cut += 1
    return stripped[:cut], stripped[cut:].strip()


def _is_decimal(number: str) -> bool:
    """Whether `number` is plain ASCII digits with at most one point among or before them."""
    whole, point, fraction = number.partition(".")
    digits = whole + fraction
    return digits.isascii() and digits.isdigit() and (not point or fraction != "")


def _scale(number: str, multiplier: int) -> int:
    """`number` x `multiplier`, rounded down, without passing through a float."""
    whole, _, fraction = number.partition(".")
    return int(int(whole + fraction) * multiplier // 10 ** len(fraction))


def _size_cure(number: str, prefix: str) -> str:
    """The two sizes that `number` may have meant."""
    power_of_10, power_of_2 = SIZE_UNIT_BY_NAME[f"{prefix}b"], SIZE_UNIT_BY_NAME[f"{prefix}ib"]
    return (
        f"Say {number}{power_of_10[0]} ({number} x {power_of_10[2]} bytes) "
        f"or {number}{power_of_2[0]} ({number} x {power_of_2[2]} bytes)."
    )


def _three_digits(value: float) -> str:
    """`value` >= 1 with three significant digits, never in exponent notation; below 1, with two decimals."""
    for decimals, limit in ((2, 9.995), (1, 99.95)):
        if value < limit:
            return f"{value:.{decimals}f}"
    return f"{value:.0f}"
