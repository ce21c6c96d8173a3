"""Charts of the report: numbers in, one inline SVG and its data table out.

Nothing here knows about runs or files. Text stays text, colours become variables of the page, so
that a chart follows the reader's light or dark theme, and no series is told by its colour alone.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from backmix.train.metrics import roc_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette (Color Universal Design, 2008), darkest first; yellow is left out, because
# a yellow line on white cannot be seen. The page defines the variables for light and dark.
_COLOURS = {
    "#0072b2": "--blue",
    "#d55e00": "--vermilion",
    "#009e73": "--green",
    "#cc79a7": "--purple",
    "#e69f00": "--orange",
    "#56b4e9": "--sky",
    "#111111": "--ink",
    "#b0b0b1": "--grid",
}
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 2)))
_MARKERS = "osD^vPX"
_PANEL = 3.25, 2.9
"""Width and height of one panel [inches]."""
_COLUMNS = 3


@dataclass(frozen=True)
class Series:
    """One line of a panel; the same name has the same look in all panels of a chart."""

    name: str
    x: np.ndarray
    """float [m]."""
    y: np.ndarray
    """float [m]."""


@dataclass(frozen=True)
class Panel:
    """A pair of axes with its lines."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    shares: bool = False
    """Both axes are shares and run from 0 to 1; else the horizontal axis counts epochs."""
    chance: bool = False
    """The diagonal, where pure chance lies, is drawn."""


@dataclass(frozen=True)
class Histogram:
    """Scores of known and unknown images on one axis."""

    title: str
    known: np.ndarray
    """float [n]."""
    unknown: np.ndarray
    """float [m]."""
    threshold: float
    """Score that 95% of the known images reach, or what else the chart marks with a line."""


@dataclass(frozen=True)
class Rates:
    """A rate over time, window by window, and between which values it is expected; B windows."""

    edges: np.ndarray
    """float [B + 1]: where the windows begin and end, on the horizontal axis."""
    rate: np.ndarray
    """float [B]."""
    expected: np.ndarray
    """float [B]."""
    usual: tuple[np.ndarray, np.ndarray]
    """float [B] each: least and greatest of a single window that is nothing special."""
    limits: tuple[np.ndarray, np.ndarray]
    """float [B] each: least and greatest of a window that is no alarm."""
    outside: np.ndarray
    """bool [B]: alarms."""
    change: float | None = None
    """Where a change begins, on the horizontal axis."""


@dataclass(frozen=True)
class Scatter:
    """Points in a plane whose axes mean nothing by themselves."""

    title: str
    points: tuple[tuple[str, np.ndarray], ...]
    """Kind and places, float [m, 2]; the same kind has the same look in all panels of a chart."""


@dataclass(frozen=True)
class Chart:
    """A chart and what stands beside it."""

    title: str
    text: str
    """One sentence with the numbers that the chart shows."""
    svg: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """The data as text, for readers who cannot or will not read the chart."""


def line_chart(panels: Sequence[Panel]) -> str:
    """Return the panels side by side with one legend below them, as SVG text."""
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    with _style():
        figure, axes = _figure(len(panels), legend_rows=-(-len(names) // _COLUMNS))
        for panel, axis in zip(panels, axes, strict=True):
            axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
            if panel.shares:
                axis.set(xlim=(0, 1), ylim=(0, 1))
            else:
                axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            if panel.chance:
                axis.plot([0, 1], [0, 1], color="#b0b0b1", linewidth=1, zorder=1)
            for series in panel.series:
                axis.plot(series.x, series.y, **_look(names.index(series.name), len(series.x)))
        handles = [axes[0].plot([], [], **_look(number, 1))[0] for number in range(len(names))]
        columns = min(_COLUMNS, len(names))
        figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=3.5)
        return _svg(figure)


def histogram_chart(
    histograms: Sequence[Histogram],
    x_label: str,
    names: tuple[str, str, str] = ("known", "unknown", "95% of the known images are to the right"),
    counted: str = "images",
) -> str:
    """Return one panel per histogram, known filled and unknown outlined, as SVG text.

    `names` are those of known, unknown and the line, `counted` is what they are made of.
    """
    with _style():
        figure, axes = _figure(len(histograms), legend_rows=1)
        for histogram, axis in zip(histograms, axes, strict=True):
            both = np.concatenate([histogram.known, histogram.unknown])
            edges = np.linspace(both.min(), max(both.max(), both.min() + 1e-9), 41)
            axis.set(title=histogram.title, xlabel=x_label, ylabel=f"share of {counted} per bin")
            for scores, look in (
                (histogram.known, {"histtype": "stepfilled", "color": "#0072b2", "alpha": 0.55}),
                (histogram.unknown, {"histtype": "step", "color": "#d55e00", "linewidth": 2}),
            ):
                axis.hist(scores, edges, weights=np.full(len(scores), 1 / len(scores)), **look)
            axis.axvline(histogram.threshold, color="#111111", linestyle=":", linewidth=1.5)
        handles = [*axes[0].patches[-2:], axes[0].lines[-1]]
        figure.legend(handles, names, loc="outside lower center", ncols=3)
        return _svg(figure)


def rate_chart(rates: Rates, x_label: str, y_label: str) -> str:
    """Return a rate over time with the band that is expected, as SVG text."""
    with _style():
        figure, axis = _wide()
        axis.set(xlabel=x_label, ylabel=y_label, xlim=(rates.edges[0], rates.edges[-1]))
        low, high = (np.append(ends, ends[-1]) for ends in rates.usual)
        band = axis.fill_between(
            rates.edges, low, high, step="post", color="#56b4e9", alpha=0.35, linewidth=0
        )
        limit = {"color": "#0072b2", "linestyle": "--", "linewidth": 1.2}
        lines = [axis.stairs(ends, rates.edges, baseline=None, **limit) for ends in rates.limits]
        expected = axis.stairs(
            rates.expected, rates.edges, baseline=None, color="#111111", linewidth=1
        )
        middle = (rates.edges[1:] + rates.edges[:-1]) / 2
        looks: tuple[dict[str, Any], ...] = (
            {"marker": "o", "markersize": 4.5, "color": "#009e73", "linestyle": "none"},
            {"marker": "X", "markersize": 8, "color": "#d55e00", "linestyle": "none"},
        )
        inside, outside = (
            axis.plot(middle[some], rates.rate[some], **look)[0]
            for some, look in zip((~rates.outside, rates.outside), looks, strict=True)
        )
        handles: list[Any] = [inside, outside, expected, band, lines[0]]
        names = ["a window", "an alarm", "expected", "95% of single windows", "limits of alarms"]
        if rates.change is not None:
            handles.append(
                axis.axvline(rates.change, color="#cc79a7", linestyle=":", linewidth=2.2)
            )
            names.append("change begins")
        axis.set_ylim(bottom=0)
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))
        return _svg(figure)


def cells_chart(
    edges: np.ndarray, found: np.ndarray, low: np.ndarray, high: np.ndarray, x_label: str
) -> str:
    """Return shares of cells, as multiples of what is expected of them, as SVG text.

    Args:
        edges: of the cells, float [J + 1].
        found: the multiples, float [J].
        low, high: least and greatest of a cell that is nothing special, float [J] each.
        x_label: of the horizontal axis.
    """
    with _style():
        figure, axis = _wide()
        axis.set(xlabel=x_label, ylabel="images, expected = 1", xlim=(edges[0], edges[-1]))
        least, most = (np.append(ends, ends[-1]) for ends in (low, high))
        band = axis.fill_between(
            edges, least, most, step="post", color="#56b4e9", alpha=0.35, linewidth=0
        )
        axis.axhline(1, color="#111111", linewidth=1)
        bars = axis.stairs(found, edges, baseline=None, color="#d55e00", linewidth=2)
        axis.set_ylim(bottom=0)
        names = ["these images", "95% of single cells, if nothing changed"]
        figure.legend([bars, band], names, loc="outside lower center", ncols=2)
        return _svg(figure)


def scatter_chart(panels: Sequence[Scatter]) -> str:
    """Return one panel per scatter with one legend below them, as SVG text.

    Kinds are told by colour and by shape, the first filled circles.
    """
    kinds = list(dict.fromkeys(kind for panel in panels for kind, _ in panel.points))
    colours, shapes = list(_COLOURS), ("o", "x", "^", "s")
    with _style():
        figure, axes = _figure(len(panels), legend_rows=1)
        looks = {
            kind: {
                "linestyle": "none",
                "marker": shapes[number % len(shapes)],
                "markersize": 3.5,
                "color": colours[number % 7],
                "alpha": 0.7,
            }
            for number, kind in enumerate(kinds)
        }
        for panel, axis in zip(panels, axes, strict=True):
            axis.set(title=panel.title, xticks=[], yticks=[])
            for kind, places in panel.points:
                axis.plot(places[:, 0], places[:, 1], **looks[kind])
        handles = [axes[0].plot([], [], **look)[0] for look in looks.values()]
        figure.legend(handles, kinds, loc="outside lower center", ncols=len(kinds))
        return _svg(figure)


def acceptance_curve(
    known: np.ndarray, counted: np.ndarray, unknown: np.ndarray, shares: np.ndarray
) -> np.ndarray:
    """Return the share of known images that count and are accepted, float64 [m].

    Args:
        known: scores of known images, [n].
        counted: which of them count when accepted, bool [n]: all for the ROC curve, those of the
            right class for the OSCR curve.
        unknown: scores of unknown images.
        shares: shares of unknown images accepted at which to read the curve, ascending, [m].

    A tie of known and unknown scores is a sloped piece, as half credit in the area has it.
    """
    _, x, y = roc_curve(known, unknown, counted)
    return np.interp(shares, x, y)


def _figure(panels: int, legend_rows: int) -> "tuple[Figure, list[Axes]]":
    """Return a figure with its panels in rows of three, and their axes."""
    from matplotlib.figure import Figure

    columns = min(panels, _COLUMNS)
    rows = -(-panels // columns)
    size = (max(_PANEL[0] * columns, 5.0), _PANEL[1] * rows + 0.3 * legend_rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(panels)]
    for axis in axes:
        axis.grid(True, color="#b0b0b1", linewidth=0.5)
        axis.set_axisbelow(True)
    return figure, axes


def _wide() -> "tuple[Figure, Axes]":
    """Return a figure of one panel over the whole width, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PANEL[0] * _COLUMNS, _PANEL[1] + 0.3), layout="constrained")
    axis = figure.add_subplot()
    axis.grid(True, color="#b0b0b1", linewidth=0.5)
    axis.set_axisbelow(True)
    return figure, axis


@contextmanager
def _style() -> Iterator[None]:
    """Set matplotlib's defaults; 9 points are 12 pixels in the page."""
    import matplotlib

    ink = "#111111"
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "backmix",
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "axes.titlecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings):
        yield


def _look(number: int, points: int) -> dict[str, Any]:
    """Return colour, line and marker of the series with this number."""
    colours = list(_COLOURS)[:7]
    every = max(1, points // 6)
    return {
        "color": colours[number % len(colours)],
        "linestyle": _LINES[number % len(_LINES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markevery": (number * every // 3 % every, every),
        "markersize": 4.5,
        "linewidth": 1.8,
    }


def _svg(figure: "Figure") -> str:
    """Return a figure as an SVG element: no prolog, no metadata, colours as variables."""
    file = io.StringIO()
    with warnings.catch_warnings():
        # A name may hold letters that this font lacks; the reader's browser has other fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # The style element would hold for the whole page, which has the same rule for charts alone.
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    # Names of groups are alike in all charts of a page, and nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()
