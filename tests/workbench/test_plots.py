from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from workbench.errors import DataError
from workbench.plots import (
    DASHES,
    INK,
    MARKERS,
    PALETTE,
    PAPER,
    bar_plot,
    groups_of,
    heat_map,
    line_plot,
    new_figure,
    relative_luminance,
    token_heat_map,
)

DARK_FIGURE = "#191d26"
ROWS = [
    {"x": x, "y": 2.0 * x + k, "low": 2.0 * x + k - 1, "high": 2.0 * x + k + 1, "s": s}
    for k, s in enumerate(("a", "b", "c"))
    for x in (3, 1, 2)
]

# Linear-light matrices for complete dichromacy [Machado, Oliveira & Fernandes 2009, severity 1.0]
DICHROMACY = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def to_rgb(colour) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb as convert

    return convert(colour)


def linear(rgb) -> np.ndarray:
    c = np.asarray(rgb, dtype=float)
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb_linear: np.ndarray) -> np.ndarray:
    xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    ) @ np.clip(rgb_linear, 0, 1)
    t = xyz / np.array([0.95047, 1.0, 1.08883])
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def ciede2000(one: np.ndarray, two: np.ndarray) -> float:
    """Perceived colour difference.   [Sharma, Wu & Dalal 2005]"""
    l1, a1, b1 = one
    l2, a2, b2 = two
    mean_c = (math.hypot(a1, b1) + math.hypot(a2, b2)) / 2
    g = 0.5 * (1 - math.sqrt(mean_c**7 / (mean_c**7 + 25**7)))
    a1, a2 = a1 * (1 + g), a2 * (1 + g)
    c1, c2 = math.hypot(a1, b1), math.hypot(a2, b2)
    h1, h2 = math.degrees(math.atan2(b1, a1)) % 360, math.degrees(math.atan2(b2, a2)) % 360
    dh = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0.0
    big_h = 2 * math.sqrt(c1 * c2) * math.sin(math.radians(dh) / 2)
    if not c1 * c2:
        h = h1 + h2
    elif abs(h1 - h2) <= 180:
        h = (h1 + h2) / 2
    else:
        h = (h1 + h2 + 360) / 2 if h1 + h2 < 360 else (h1 + h2 - 360) / 2
    c, ell = (c1 + c2) / 2, (l1 + l2) / 2
    t = 1 - 0.17 * math.cos(math.radians(h - 30)) + 0.24 * math.cos(math.radians(2 * h))
    t += 0.32 * math.cos(math.radians(3 * h + 6)) - 0.20 * math.cos(math.radians(4 * h - 63))
    sl = 1 + 0.015 * (ell - 50) ** 2 / math.sqrt(20 + (ell - 50) ** 2)
    sc, sh = 1 + 0.045 * c, 1 + 0.015 * c * t
    rt = -math.sin(math.radians(60 * math.exp(-(((h - 275) / 25) ** 2))))
    rt *= 2 * math.sqrt(c**7 / (c**7 + 25**7))
    dl, dc, dhh = (l2 - l1) / sl, (c2 - c1) / sc, big_h / sh
    return math.sqrt(dl**2 + dc**2 + dhh**2 + rt * dc * dhh)


def test_the_colour_difference_agrees_with_published_pairs():
    # rows 1, 7 and 25 of the reference data of Sharma, Wu & Dalal 2005
    pairs = [
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ]
    for one, two, expected in pairs:
        assert ciede2000(np.array(one), np.array(two)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("vision", sorted(DICHROMACY))
def test_series_colours_stay_apart_for_colour_blind_readers(vision):
    seen = [lab(np.asarray(DICHROMACY[vision]) @ linear(to_rgb(c))) for c in PALETTE]
    distances = {
        (PALETTE[i], PALETTE[j]): ciede2000(seen[i], seen[j])
        for i, j in itertools.combinations(range(len(PALETTE)), 2)
    }
    assert min(distances.values()) >= 10, min(distances.items(), key=lambda item: item[1])


@pytest.mark.parametrize("ground", [PAPER, DARK_FIGURE])
def test_series_have_contrast_of_three_on_light_and_dark(ground):
    base = relative_luminance(to_rgb(ground))
    for colour in PALETTE:
        one, two = sorted((base, relative_luminance(to_rgb(colour))))
        assert (two + 0.05) / (one + 0.05) >= 3, colour
    assert (relative_luminance(to_rgb(PAPER)) + 0.05) / (
        relative_luminance(to_rgb(INK)) + 0.05
    ) >= 4.5


def test_every_series_differs_by_more_than_colour():
    assert len(set(MARKERS)) == len(set(map(str, DASHES))) == len(set(PALETTE)) == len(PALETTE)
    figure, axes = new_figure()
    line_plot(axes, ROWS, x="x", y="y", series="s", low="low", high="high")
    styles = {(line.get_marker(), str(line.get_linestyle())) for line in axes.lines}
    assert len(styles) == len(axes.lines) == 3
    assert len(axes.collections) == 3  # a band each
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3]
    assert list(axes.lines[0].get_ydata()) == [2, 4, 6]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "b", "c"]
    assert figure is axes.figure


def test_drawing_changes_no_global_state():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure, axes = new_figure(rows=2, columns=2)
    bar_plot(axes[0, 0], [{"n": "a", "v": 1.0}], label="n", value="v")
    heat_map(axes[0, 1], [{"x": 1, "y": 1, "v": 0.5}], x="x", y="y", value="v")
    token_heat_map(axes[1, 0], [" a", "b"], [1, 2])
    line_plot(axes[1, 1], ROWS, x="x", y="y", series="s", log="y", reference={"floor": 1.0})
    figure.canvas.draw()
    assert dict(matplotlib.rcParams) == before
    import sys

    assert "matplotlib.pyplot" not in sys.modules or not matplotlib.pyplot.get_fignums()


def test_bars_start_at_zero_and_show_value_and_interval():
    rows = [{"n": "a", "v": 0.5, "l": 0.4, "h": 0.7}, {"n": "b", "v": 0.9, "l": 0.8, "h": 0.95}]
    _, axes = new_figure()
    bar_plot(axes, rows, label="n", value="v", low="l", high="h", reference={"chance": 0.25})
    assert axes.get_xlim()[0] == 0.0
    assert [patch.get_width() for patch in axes.patches] == [0.5, 0.9]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # first row on top
    assert {"0.5", "0.9", "chance"} <= {text.get_text() for text in axes.texts}
    segments = [s for c in axes.collections for s in c.get_segments()]
    assert sorted(float(s[0][0]) for s in segments) == pytest.approx([0.4, 0.8])
    assert sorted(float(s[1][0]) for s in segments) == pytest.approx([0.7, 0.95])


def test_heat_map_puts_every_number_in_its_cell_readably():
    rows = [
        {"t": t, "m": m, "v": v} for t, m, v in (("p", "a", 0.0), ("q", "a", 1.0), ("q", "b", 0.5))
    ]
    _, axes = new_figure()
    heat_map(axes, rows, x="t", y="m", value="v")
    placed = {text.get_position(): text for text in axes.texts}
    assert {k: v.get_text() for k, v in placed.items()} == {
        (0, 0): "0.00",
        (1, 0): "1.00",
        (1, 1): "0.50",
    }
    from matplotlib import colormaps

    cells = colormaps["cividis"]
    for (x, y), text in placed.items():
        share = {(0, 0): 0.0, (1, 0): 1.0, (1, 1): 0.5}[x, y]
        one, two = sorted(
            relative_luminance(to_rgb(c)) for c in (cells(share)[:3], text.get_color())
        )
        assert (two + 0.05) / (one + 0.05) >= 4.5


def test_token_map_reads_line_by_line():
    _, axes = new_figure()
    token_heat_map(
        axes, [" where", " is", "\n", "$x", " averylongtoken"], [1, 2, 3, 4, 5], per_line=2
    )
    assert [(t.get_position(), t.get_text()) for t in axes.texts] == [
        ((0, 0), "where\n1"),
        ((1, 0), "is\n2"),
        ((0, 1), "·\n3"),
        ((1, 1), "\\$x\n4"),
        ((0, 2), "averylon…\n5"),
    ]


def test_log_axis_has_plain_numbers():
    figure, axes = new_figure()
    line_plot(axes, [{"x": x, "y": 3.0 * x} for x in (1, 2, 4)], x="x", y="y", log="xy")
    figure.canvas.draw()
    labels = [t.get_text() for t in axes.get_yticklabels() if t.get_text()]
    assert "5" in labels
    assert not any("$" in label for label in labels)
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_groups_keep_their_order():
    assert list(groups_of([{"s": "b"}, {"s": "a"}, {"s": "b"}], "s")) == ["b", "a"]


def test_bad_input_is_named():
    _, axes = new_figure()
    with pytest.raises(DataError, match="no rows"):
        line_plot(axes, [], x="x", y="y")
    with pytest.raises(DataError, match="no column 'z'"):
        line_plot(axes, ROWS, x="x", y="z")
    with pytest.raises(DataError, match="no finite value"):
        heat_map(axes, [{"x": 1, "y": 1, "v": None}], x="x", y="y", value="v")
    with pytest.raises(DataError, match="2 tokens and 1 values"):
        token_heat_map(axes, ["a", "b"], [1])
