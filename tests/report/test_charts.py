"""Charts: what is drawn of long and of broken series, and round numbers on their axes."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from llava_jax.report.charts import MAX_LOG_LEVELS, MAX_POINTS, line_chart, smooth, thin, ticks
from llava_jax.report.formatting import number


def draw(values: list[float], **options: bool) -> tuple[str, ElementTree.Element]:
    steps = np.arange(1.0, len(values) + 1)
    text = line_chart(thin(steps, np.array(values)), "Loss", last_step=len(values), **options)
    return text, ElementTree.fromstring(text)


def drawn(svg: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [element for element in svg if element.get("class") == kind]


def test_a_short_series_is_drawn_as_it_is():
    _, svg = draw([3.0, 2.0, 1.0])
    (line,) = drawn(svg, "line")
    assert len(line.get("d", "").split()) == 6
    assert not drawn(svg, "band")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_breaks_the_line_and_is_marked(bad: float):
    text, svg = draw([1.0, 2.0, bad, 2.0, 1.0])
    assert len(drawn(svg, "line")) == 2
    assert len(drawn(svg, "mark")) == 1
    assert "nan" not in text
    assert "inf" not in text


@pytest.mark.parametrize(
    "values", [[], [np.nan], [0.0], [7.0], [-2.0, -2.0], [1e-9, 1e12], [1e-300]]
)
def test_any_values_can_be_drawn(values: list[float]):
    text, _ = draw(values)
    assert "nan" not in text


def test_a_long_series_is_thinned_to_means_and_ranges():
    steps, values = np.arange(1.0, 100_001), np.tile([0.0, 4.0], 50_000)
    values[:1000] = np.nan
    values[50_000] = 9.0
    series = thin(steps, values)
    assert len(series.steps) == MAX_POINTS
    assert np.isnan(series.mean[0])
    np.testing.assert_allclose(series.mean[-100:], 2.0, atol=0.01)
    assert np.nanmin(series.low) == 0.0
    assert np.nanmax(series.high) == 9.0
    assert len(series.marked) == 1000
    text = line_chart(series, "Loss", last_step=100_000)
    assert 'class="band"' in text
    assert len(text) < 50_000


def test_one_value_far_beyond_the_others_does_not_flatten_them():
    values = [1.0 + 0.1 * (n % 3) for n in range(500)]
    values[250] = 1e6
    text, _ = draw(values)
    assert ">2.0</text>" in text or ">1.5</text>" in text
    assert "thousands" not in text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 60, [0, 20, 40, 60]),
        (0, 100_000, range(0, 100_001, 25_000)),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]):
    assert ticks(low, high, 4) == pytest.approx(list(expected))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.23456, "1.235"), (12345.6, "12,346"), (2e-5, "2 × 10⁻⁵"), (1e30, "1 × 10³⁰")],
)
def test_numbers_as_people_write_them(value: float, text: str):
    assert number(value) == text


def test_two_values_are_points_with_their_values():
    _, svg = draw([2.5, 1.25])
    assert [text.text for text in drawn(svg, "value")] == ["2.5", "1.25"]
    assert [circle.get("r") for circle in svg if circle.tag == "circle"] == ["4", "4"]
    _, svg = draw([0.5, 0.25], percent=True)
    assert [text.text for text in drawn(svg, "value")] == ["50.0 %", "25.0 %"]
    _, svg = draw([3.0, 2.0, 1.0])
    assert not drawn(svg, "value")


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([2.0, 1.2, 1.1], ["1", "1.5", "2"]),
        ([10.0, 1.0, 0.1], ["0.1", "0.3", "1", "3", "10"]),
        ([5.0, 5.0], ["5", "6"]),
        ([1e9, 0.0, -1.0], ["1 × 10⁹", "1.5 × 10⁹"]),
    ],
)
def test_a_logarithmic_axis_has_round_numbers_that_cover_the_values(values, labels):
    text, svg = draw(values, log=True)
    ends = [e.text for e in svg if e.get("text-anchor") == "end" and not e.get("class")]
    assert ends == labels
    assert "nan" not in text
    (line,) = drawn(svg, "line")
    ys = [float(y) for y in line.get("d", "").removeprefix("M").split()[1::2]]
    assert all(20 <= y <= 164 for y in ys)


def test_a_logarithmic_axis_has_few_levels():
    for high in (1e3, 1e30, 1e300):
        _, svg = draw([1e-5, high], log=True)
        ends = [e for e in svg if e.get("text-anchor") == "end" and not e.get("class")]
        assert 2 <= len(ends) <= MAX_LOG_LEVELS + 1


def test_a_smoothed_line_is_a_moving_average_without_delay():
    values = np.arange(1000.0) + np.tile([5.0, -5.0], 500)
    values[300:320] = np.nan
    series = thin(np.arange(1.0, 1001), values)
    found = smooth(series)
    assert found is not None
    inner = np.isfinite(found) & (series.steps > 60) & (series.steps < 940)
    inner &= abs(series.steps - 310) > 60
    np.testing.assert_allclose(found[inner], series.steps[inner] - 1, atol=3)
    assert np.isnan(found).sum() == np.isnan(series.mean).sum() > 0
    text = line_chart(series, "Loss", last_step=1000, trend=found)
    assert text.count('class="line"') == text.count('class="line raw"') == 2
    assert smooth(thin(np.arange(1.0, 21), np.ones(20))) is None
