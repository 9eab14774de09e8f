import pytest

from lightning_efficient.dissect.report.numbers import column, quantity, scale


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (1.5, "s", "1.50 s"),
        (2e-6, "s", "2 \u00b5s"),
        (0, "s", "0 s"),
        (3 * 2**20, "B", "3 MiB"),
        (1536, "B", "1.50 KiB"),
        (512, "B", "512 B"),
        (3412.4, "tokens/s", "3 412 tokens/s"),
        (341_200, "tokens/s", "341 k tokens/s"),
        (2.5e12, "FLOP", "2.50 TFLOP"),
        (989.5e12, "FLOP/s", "990 TFLOP/s"),
        (0.312, "%", "31.2 %"),
        (1.2099, "x", "1.21\u00d7"),
        (1234567, "", "1.23M"),
        (42, "", "42"),
        (None, "s", "\u2013"),
        (float("nan"), "s", "nan s"),
    ],
)
def test_a_quantity_reads(value: float | None, unit: str, text: str) -> None:
    assert quantity(value, unit).replace("\u00a0", " ") == text


def test_no_number_is_written_with_an_exponent() -> None:
    for exponent in range(-12, 16):
        for unit in ("s", "B", "%", "tokens/s", ""):
            assert "e" not in quantity(1.234 * 10.0**exponent, unit).removesuffix(unit)


def test_a_column_has_the_same_decimals_and_hides_no_value() -> None:
    assert column([0.057, 0.024, 0.0081, 4e-6], 1e-3) == ["57.0", "24.0", "8.1", "0.004"]
    assert column([4.0, 28.0], 1.0) == ["4", "28"]


def test_the_unit_suits_the_largest_value() -> None:
    assert scale(0.5, "s") == (1e-3, "ms")
    assert scale(3 * 2**30, "B") == (2**30, "GiB")
