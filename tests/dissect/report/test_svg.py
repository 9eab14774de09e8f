import itertools
import re
from xml.etree import ElementTree

import pytest

from lightning_efficient.dissect.report import bar_chart, line_chart, scatter_chart, stacked_bar_chart
from lightning_efficient.dissect.report.axes import FONT, PALETTE, WIDTH, axis, ink

NAMES = {"none": 1.0, "F": 1.21, "a rather long name of a module.layers.*.mlp.up_proj <&> x32": 0.5}
CHARTS = {
    "bar": bar_chart(NAMES, title="Speed <&>", unit="x", reference=1.0),
    "stacked": stacked_bar_chart({n: {"forward": v, "back": 2 * v} for n, v in NAMES.items()}, title="Steps", unit="s"),
    "scatter": scatter_chart({n: (v * 2**20, v) for n, v in NAMES.items()}, title="T", x_label="m", y_label="s"),
    "line": line_chart({n: [(1, v), (2, v)] for n, v in NAMES.items()}, title="T", x_label="x", y_label="y"),
}


def svg(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.sub(r' xmlns="[^"]*"', "", text, count=1))


def marks(text: str) -> dict[str, ElementTree.Element]:
    return {str(each.findtext("title")): each for each in svg(text).iter() if each.get("class") == "mark"}


@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
def test_a_plot_is_well_formed_labelled_and_escaped(chart: str) -> None:
    root = svg(chart)
    assert root.get("role") == "img"
    assert root.get("aria-label") == root.findtext("title")
    assert any("<&>" in (text.text or "") for text in root.iter("title"))


@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
def test_no_text_leaves_the_drawing(chart: str) -> None:
    root = svg(chart)
    height = float(str(root.get("viewBox")).split()[3])
    for text in root.iter("text"):
        if text.get("transform"):
            continue  # the name of the y axis stands upright
        width = 0.66 * float(text.get("font-size", FONT)) * len(text.text or "")
        x, y = float(str(text.get("x"))), float(str(text.get("y")))
        left = {"start": x, "middle": x - width / 2, "end": x - width}[str(text.get("text-anchor"))]
        assert left >= -1, text.text
        assert left + width <= WIDTH + 1, text.text
        assert FONT - 2 <= y <= height, text.text


def test_bars_are_as_long_as_their_values() -> None:
    lengths = {tip: float(str(bar.get("width"))) for tip, bar in marks(CHARTS["bar"]).items()}
    longest = lengths["F: 1.21\u00d7"]
    assert lengths["none: 1.00\u00d7"] / longest == pytest.approx(1 / 1.21, rel=1e-3)  # written with two decimals


def test_stacked_parts_follow_each_other_and_keep_their_colours() -> None:
    parts = list(marks(CHARTS["stacked"]).values())
    first, second = parts[0], parts[1]
    assert float(str(first.get("x"))) + float(str(first.get("width"))) == pytest.approx(
        float(str(second.get("x"))), abs=0.02
    )
    assert float(str(second.get("width"))) == pytest.approx(2 * float(str(first.get("width"))), rel=1e-3)
    alone = stacked_bar_chart({"a": {"back": 1.0}}, title="t", order=["forward", "back"])
    assert next(iter(marks(alone).values())).get("fill") == PALETTE[1]


def test_points_stand_where_their_values_are() -> None:
    chart = scatter_chart({"a": (0, 0), "b": (10, 5), "c": (5, 10)}, title="t", x_label="x", y_label="y")
    a, b, c = ((float(str(p.get("cx"))), float(str(p.get("cy")))) for p in marks(chart).values())
    assert c[0] - a[0] == pytest.approx((b[0] - a[0]) / 2, abs=0.1)
    assert a[1] - b[1] == pytest.approx((a[1] - c[1]) / 2, abs=0.1)


def test_labels_of_near_points_do_not_overlap() -> None:
    points = {f"technique {index}": (100 + index % 7, 50 + index // 7) for index in range(40)}
    chart = svg(scatter_chart(points, title="t", x_label="x", y_label="y"))
    boxes = [
        (x, y - FONT, x + 0.66 * FONT * len(text.text or ""), y + 3)
        for text in chart.iter("text")
        if (text.text or "").startswith("technique")
        for x, y in [(float(str(text.get("x"))), float(str(text.get("y"))))]
    ]
    assert len(boxes) > 10
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_a_logarithmic_line_of_a_power_is_straight() -> None:
    points = [(10.0**k, 10.0 ** (2 * k)) for k in range(4)]
    chart = svg(line_chart({"s": points}, title="t", x_label="x", y_label="y", log_x=True, log_y=True))
    line = next(chart.iter("polyline"))
    places = [tuple(map(float, pair.split(","))) for pair in str(line.get("points")).split()]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(places)]
    assert slopes == pytest.approx([slopes[0]] * 3, rel=5e-3)  # written with one decimal


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-3.0, 4.0], [1e-9, 2e-9], [1e12, 3e12], [0.37, 99.2]])
def test_an_axis_holds_its_values_between_round_ticks(values: list[float]) -> None:
    made = axis(values, "x")
    assert made.low <= min(values) <= max(values) <= made.high
    assert 2 <= len(made.ticks) <= 8
    assert len({text for _, text in made.ticks}) == len(made.ticks)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="has no bars"):
        bar_chart({}, title="t")
    with pytest.raises(ValueError, match=r"'F' has the value -1"):
        bar_chart({"F": -1}, title="t")
    with pytest.raises(ValueError, match="not finite"):
        line_chart({"a": [(0, float("nan"))]}, title="t", x_label="x", y_label="y")
    with pytest.raises(ValueError, match="a logarithm needs values above 0"):
        line_chart({"a": [(0, 1)]}, title="t", x_label="x", y_label="y", log_x=True)
    with pytest.raises(ValueError, match="no values"):
        scatter_chart({}, title="t", x_label="x", y_label="y")


def test_text_on_a_colour_is_legible() -> None:
    assert ink("#0072b2") == "#fff"
    assert ink("#f0e442") == "#000"
