"""A size means one number of bytes however it is written, and every wrong one says what is wrong."""

import pytest

from balanced_offload.offload.sizes import GIB, KIB, MIB, format_size, parse_size, read_size

TOTAL = 16 * GIB


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (4_000_000_000, 4_000_000_000),
        (0, 0),
        (1, 1),  # an integer from code is taken at its word: one byte, not 100 %
        (0.0, 0),
        (1.0, TOTAL),
        (4e9, 4_000_000_000),
        # 0.6 * 16 GiB = 10307921510.4, rounded down
        (0.6, 10_307_921_510),
        ("60%", 10_307_921_510),
        ("60 %", 10_307_921_510),
        ("0.6", 10_307_921_510),
        (".6", 10_307_921_510),
        ("100%", TOTAL),
        ("0%", 0),
        ("1.0", TOTAL),
        # 9.5 * 1073741824
        ("9.5GiB", 10_200_547_328),
        ("9.5 gib", 10_200_547_328),
        ("  9.5GIB  ", 10_200_547_328),
        ("9.5GB", 9_500_000_000),
        ("512MiB", 512 * MIB),
        ("512MB", 512_000_000),
        ("4KiB", 4 * KIB),
        ("1TiB", 1 << 40),
        ("17B", 17),
        ("0", 0),
        ("4000000000", 4_000_000_000),
        ("1048576", MIB),
        ("auto", None),
        (" AUTO ", None),
        (None, None),
    ],
)
def test_written_sizes_in_bytes(written: object, expected: int | None) -> None:
    assert parse_size("high", written, total=TOTAL) == expected


@pytest.mark.parametrize("percent", range(101))
@pytest.mark.parametrize("total", [16 * GIB, 12 * GIB - 7, 25_393_889_280, 1])
def test_a_share_and_its_percentage_are_the_same_byte(percent: int, total: int) -> None:
    # Binary floats would differ by one byte: 0.29 * 100 is 28.999999999999996.
    expected = total * percent // 100
    assert parse_size("low", f"{percent}%", total=total) == expected
    assert parse_size("low", percent / 100, total=total) == expected


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (float("nan"), "finite"),
        (float("inf"), "finite"),
        (float("-inf"), "finite"),
        ("nan", "write for example"),
        ("inf", "write for example"),
        (-1, "negative"),
        (-0.1, "negative"),
        ("-1GiB", "negative"),
        ("-60%", "negative"),
        ("110%", "at most 100%"),
        ("100.01%", "at most 100%"),
        (1.5, '"1.5GiB"'),
        ("1.5", '"1.5GiB"'),
        ("8", '"8GiB"'),
        ("1", '"1GiB"'),
        ("1048575", "without a unit"),
        ("8G", '"8GiB"'),
        ("8m", '"8MiB"'),
        ("8 parsecs", "unknown unit"),
        ("9,5GiB", "write for example"),
        ("1e9", "write for example"),
        ("GiB", "write for example"),
        ("", "write for example"),
        ("60%%", "unknown unit"),
        ("lots", "write for example"),
        (True, "true and false"),
        (False, "true and false"),
        ([1], "list"),
        ({}, "dict"),
        (b"8GiB", "bytes is not a size"),
        (1 << 63, "no size of memory"),
        ("9" * 30 + "TiB", "no size of memory"),
        ("9" * 400, "write for example"),
        ("٤GiB", "write for example"),  # digits of other scripts are refused, not guessed at
    ],
)
def test_wrong_sizes_name_field_value_and_remedy(written: object, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_size("high", written, total=TOTAL)
    text = str(caught.value)
    assert text.startswith("high: got ")
    shown = repr(written)
    assert (shown if len(shown) <= 80 else shown[:77]) in text
    assert '"9.5GiB"' in text and '"auto"' in text
    assert says in text


def test_a_share_without_a_total_is_refused_and_bytes_are_not() -> None:
    with pytest.raises(ValueError, match=r"^pinned_ram: a share .* total, which is unknown"):
        parse_size("pinned_ram", 0.5, total=None)
    assert parse_size("pinned_ram", "2GiB", total=None) == 2 * GIB
    assert parse_size("pinned_ram", "auto", total=None) is None


def test_fields_without_auto_and_without_shares() -> None:
    with pytest.raises(ValueError, match=r"^reserve: .*no automatic value"):
        read_size("reserve", "auto", auto=False)
    with pytest.raises(ValueError, match=r"^reserve: .*no automatic value"):
        read_size("reserve", None, auto=False)
    with pytest.raises(ValueError, match=r"^prefetch: .*write bytes"):
        read_size("prefetch", "60%", share=False)
    # zero is zero in any writing
    assert read_size("prefetch", 0.0, share=False).to_bytes("prefetch", None) == 0


@pytest.mark.parametrize("zero", [0, 0.0, -0.0, "0", "0%", "0.0", "0GiB", "-0"])
def test_every_writing_of_zero_is_zero(zero: object) -> None:
    assert read_size("low", zero).is_zero
    assert parse_size("low", zero, total=TOTAL) == 0


def test_auto_is_not_zero() -> None:
    assert not read_size("low", "auto").is_zero


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (None, "n/a"),
        (0, "0 B"),
        (17, "17 B"),
        (1023, "1023 B"),
        (3 * KIB, "3.0 KiB"),
        (512 * MIB, "512.0 MiB"),
        (GIB - 1, "1.0 GiB"),  # not "1024.0 MiB"
        (1023 * MIB, "1023.0 MiB"),
        (10_522_669_875, "9.8 GiB"),
        (16 * GIB, "16.0 GiB"),
        (3 << 40, "3.0 TiB"),
        (-512 * MIB, "-512.0 MiB"),
    ],
)
def test_sizes_for_people(n: int | None, text: str) -> None:
    assert format_size(n) == text


@pytest.mark.parametrize("n", [10**k + d for k in range(14) for d in (-1, 0, 1)] + [(1 << k) - 1 for k in range(45)])
def test_no_printed_size_reaches_1024_of_its_unit(n: int) -> None:
    number, unit = format_size(n).split()
    assert float(number) < 1024.0 or unit == "TiB"
