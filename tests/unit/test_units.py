"""Sizes, counts and seconds: what is read, what is refused, what is printed."""

import pytest

from memplan.errors import UsageError
from memplan.units import describe_size, format_bytes, format_count, format_seconds, parse_count, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1B", 1),
        ("3kB", 3_000),
        ("512MB", 512_000_000),
        ("24GB", 24_000_000_000),
        ("2TB", 2_000_000_000_000),
        ("3KiB", 3_072),
        ("512MiB", 536_870_912),
        ("24GiB", 25_769_803_776),
        ("2TiB", 2_199_023_255_552),
        ("24gb", 24_000_000_000),
        ("24gib", 25_769_803_776),
        ("24Gb", 24_000_000_000),
        (" 24 GB ", 24_000_000_000),
        ("024GB", 24_000_000_000),
        ("1048576TiB", 2**60),
    ],
)
def test_a_size_is_a_number_times_a_power_of_10_or_of_2(text, size_bytes):
    """`kB MB GB TB` are 10^3n bytes and `KiB MiB GiB TiB` 2^10n, in either case, up to 2^60 bytes."""
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1.5GiB", 1_610_612_736),  # 3 x 2^29
        (".5GiB", 536_870_912),
        ("23.64GiB", 25_383_256_719),  # 23.64 x 2^30 = 25,383,256,719.36
        ("0.1GB", 100_000_000),
        ("1.0000000000000000001GB", 1_000_000_000),
    ],
)
def test_decimals_are_exact_and_round_down_to_whole_bytes(text, size_bytes):
    """A decimal size is scaled without a float, and never promises a byte more than was said."""
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["24", "24.0", "24G", "24g", "24Gi"])
def test_a_size_without_a_whole_unit_is_refused_with_both_readings(text):
    """`24` and `24G` are said of both kinds of GB, so the user chooses, from sizes that can be pasted."""
    number = text.rstrip("Ggi")
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert repr(text) in caught.value.cause
    assert caught.value.cure == f"Say {number}GB ({number} x 10^9 bytes) or {number}GiB ({number} x 2^30 bytes)."


def test_the_cure_keeps_the_magnitude_that_was_said():
    """`512M` is answered in megabytes, not in gigabytes."""
    with pytest.raises(UsageError) as caught:
        parse_size("512M")
    assert caught.value.cure == "Say 512MB (512 x 10^6 bytes) or 512MiB (512 x 2^20 bytes)."


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("-24GB", "negative"),
        ("-24", "negative"),
        ("0GB", "zero"),
        ("0.00GiB", "zero"),
        ("0", "zero"),
        ("0.0000000001GB", "less than one byte"),
        ("1048577TiB", r"more than 2\^60 bytes"),
        ("9" * 31 + "GB", "digits"),
        ("9" * 31, "digits"),
        ("24bananas", "no unit that is known"),
        ("24PB", "no unit that is known"),
        ("1e9B", "no unit that is known"),
        ("24GB24", "no unit that is known"),
        ("", "not a size"),
        (" ", "not a size"),
        ("GB", "not a size"),
        ("nan", "not a size"),
        ("nanGB", "not a size"),
        ("inf", "not a size"),
        ("infGiB", "not a size"),
        ("banana", "not a size"),
        (".", "not a size"),
        ("1.GB", "not a size"),
        ("1.2.3GB", "not a size"),
        ("+24GB", "not a size"),
        ("1_000MB", "not a size"),
        ("\u0662GB", "not a size"),  # an Arabic digit, which int() would take
        ("\u00b2GB", "not a size"),  # a superscript, which str.isdigit() would take
    ],
)
def test_what_is_no_positive_size_is_a_usage_error(text, why):
    """Every refusal says what is wrong and what to say instead, and ends with exit status 2."""
    with pytest.raises(UsageError, match=why) as caught:
        parse_size(text)
    assert caught.value.exit_status == 2
    assert caught.value.cure.startswith("Say ")


def test_a_size_can_be_written_out():
    """The answer shows how a typed size was understood, in proper spelling."""
    assert describe_size("24gb") == ("24GB", "24 x 10^9 bytes")
    assert describe_size("1.5 gib") == ("1.5GiB", "1.5 x 2^30 bytes")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4000000", 4_000_000),
        ("1_000_000", 1_000_000),
        ("500k", 500_000),
        ("500K", 500_000),
        ("4M", 4_000_000),
        ("4m", 4_000_000),
        ("1.5M", 1_500_000),
        ("0.5k", 500),
        ("8B", 8_000_000_000),
        ("15T", 15_000_000_000_000),
        (" 32 ", 32),
        ("1.0", 1),
        ("1000000T", 10**18),
    ],
)
def test_counts_take_decimal_suffixes(text, count):
    """k, M, B and T are 10^3, 10^6, 10^9 and 10^12: tokens are not counted in powers of two."""
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "0M", "-4", "+4", "1.5", "0.0001k", "1.0005k", "nan", "inf", "four", "4G", "4MB", "4Mi", "4 M M"),
        *("1__000", "_1", "1_", "4,000", "1e6", "\u0662", "1000001T", "9" * 31),
    ],
)
def test_what_is_no_positive_whole_number_is_a_usage_error(text):
    """A count is exact: fractions of one are refused and never rounded."""
    with pytest.raises(UsageError) as caught:
        parse_count(text)
    assert caught.value.cure == "Say a positive whole number such as 4000000, 1_000_000, 500k or 4M."


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (200_840, "196 KiB"),
        (1_048_064, "1.00 MiB"),  # 1023.5 KiB
        (10_485_760, "10.0 MiB"),
        (147_718_144, "141 MiB"),  # 140.875 MiB
        (446_693_376, "426 MiB"),
        (1_073_741_823, "1.00 GiB"),
        (1_073_741_824, "1.00 GiB"),
        (25_249_710_080, "23.52 GiB"),  # 24,080 MiB
        (1_649_267_441_664, "1,536.00 GiB"),
        (12 << 40, "12.0 TiB"),
        (3 << 60, "3.00 EiB"),
        (5 << 72, "20.0 ZiB"),
        (-1536, "-1.50 KiB"),
        (-3_435_973_837, "-3.20 GiB"),
    ],
)
def test_bytes_are_printed_in_gib_and_small_ones_with_three_digits(num_bytes, text):
    """GiB with two decimals from 1 GiB up; below, the unit that keeps three significant digits; never GB."""
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1.00 k"),
        (151_936, "152 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (494_032_768, "494 M"),
        (8_030_261_248, "8.03 B"),
        (70_553_706_496, "70.6 B"),
        (15_000_000_000_000, "15.0 T"),
        (-4_000_000, "-4.00 M"),
    ],
)
def test_counts_are_printed_in_thousands_with_three_digits(count, text):
    """Parameters are counted in thousands: 8,030,261,248 is 8.03 B, not 7.48."""
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (1.234e-6, "1.23 us"),
        (0.0123, "12.3 ms"),
        (0.9996, "1.00 s"),
        (1.5, "1.50 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3599.6, "1 h 0 min"),
        (4980, "1 h 23 min"),
        (86_399, "1 d 0 h"),
        (1_000_000, "11 d 14 h"),  # 277.8 h
        (-2.5, "-2.50 s"),
        (float("inf"), "inf s"),
    ],
)
def test_seconds_are_printed_as_people_say_them(seconds, text):
    """Three significant digits below a minute; above, two units, the smaller one rounded and carried."""
    assert format_seconds(seconds) == text
