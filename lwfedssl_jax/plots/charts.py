"""Line charts and scatter plots by matplotlib, with a text for each mark.

Series differ in dashes and marks as well as in color.
"""

import functools
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

# After Okabe and Ito's color-blind safe palette; contrast of at least 4.5:1 on the background.
COLORS = ('#0072b2', '#c24e00', '#00805c', '#ad4f88', '#976300', '#6f42c1', '#6a6a6a', '#1f5c66')  # on white
DARK_COLORS = ('#56b4e9', '#ff8c42', '#2fd3a0', '#e5a3cb', '#f0b93a', '#b79bff', '#a5a5a5', '#7fd6e0')
DASHES = ('-', '--', '-.', ':')
MARKS = 'osD^vP*X'
INK = '#010203'  # placeholder of the page's text color
MUTED = '#5a5958'  # placeholder of the page's muted text color
SIZE = (4.7, 3.5)  # inches; with FONT_POINTS text is 12 pixels high on a screen 390 pixels wide
FONT_POINTS = 11.5
LEGEND_CHARACTERS, Y_LABEL_CHARACTERS = 44, 24  # that fit beside an axis
_STYLE: Any = {  # matplotlib types the keys one by one
  'text.color': INK,
  'axes.labelcolor': INK,
  'axes.edgecolor': INK,
  'xtick.color': INK,
  'ytick.color': INK,
  'axes.facecolor': 'none',
  'figure.facecolor': 'none',
  'font.size': FONT_POINTS,
  'axes.labelsize': FONT_POINTS,
  'xtick.labelsize': FONT_POINTS,
  'ytick.labelsize': FONT_POINTS,
  'legend.fontsize': FONT_POINTS,
  'legend.frameon': False,
  'legend.handlelength': 1.8,
  'legend.columnspacing': 1.2,
  'axes.spines.top': False,
  'axes.spines.right': False,
}
Values = Sequence[float] | np.ndarray


class Series(NamedTuple):
  """A line or a set of marks.

  Attributes:
    label: in the legend.
    x: (N,).
    y: (N,).
    low: (N,) lower edge of a band, or None.
    high: (N,) upper edge.
    style: index of color, dashes and mark; None: by its position in the chart.
  """

  label: str
  x: Values
  y: Values
  low: Values | None = None
  high: Values | None = None
  style: int | None = None


class Axes(NamedTuple):
  """Names with their units, and which axes are logarithmic."""

  x_label: str
  y_label: str
  log_x: bool = False
  log_y: bool = False


class Plot(NamedTuple):
  """A matplotlib figure, and texts for its marks.

  Attributes:
    figure: the figure.
    titles: {gid of an artist: a text for each of its marks, in order; or one for all of them}.
  """

  figure: Any
  titles: dict[str, list[str]]


def _styled(draw: Callable[..., Plot]) -> Callable[..., Plot]:
  @functools.wraps(draw)
  def styled(*args: Any, **kwargs: Any) -> Plot:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
      return draw(*args, **kwargs)

  return styled


def _subplots(size: tuple[float, float]) -> tuple[Any, Any]:
  from matplotlib import figure

  made = figure.Figure(size, layout='constrained')
  return made, made.subplots()


def _set_log_scale(axes: Any, which: str, values: np.ndarray) -> None:
  """Makes axis `x` or `y` logarithmic with plain numbers at its ticks; it stays linear within a factor of 2."""
  from matplotlib import ticker

  if values.min() <= 0 or values.max() < 2 * values.min():
    return
  decades = np.log10(values.max() / values.min())
  axes.set(**{f'{which}scale': 'log'})
  axis = getattr(axes, f'{which}axis')
  steps = range(1, 10) if decades < 0.6 else (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)
  axis.set_major_locator(ticker.LogLocator(subs=steps))
  axis.set_major_formatter(ticker.StrMethodFormatter('{x:,g}'))
  axis.set_minor_formatter(ticker.NullFormatter())


def _describe_mark(series: Series, index: int, names: Axes) -> str:
  text = f'{series.label}: {names.y_label} {series.y[index]:.4g}'
  if series.low is not None and series.high is not None:
    text += f' ({series.low[index]:.4g} to {series.high[index]:.4g})'
  return f'{text}; {names.x_label} {series.x[index]:.4g}'


def _draw_series(axes: Any, series: Series, index: int, lines: bool) -> None:
  color, mark = COLORS[index % len(COLORS)], MARKS[index % len(MARKS)]
  axes.plot(
    series.x,
    series.y,
    linestyle=DASHES[index % len(DASHES)] if lines else 'none',
    color=color,
    marker=mark if len(series.x) <= 30 else None,
    markersize=6,
    label=series.label,
  )
  if series.low is not None and len(series.x) > 1 and lines:
    axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.15, linewidth=0)
  elif series.low is not None:
    axes.vlines(series.x, series.low, series.high, color=color)


def _draw_level(axes: Any, name: str, level: float) -> None:
  axes.axhline(level, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)))
  axes.annotate(name, (1, level), xycoords=('axes fraction', 'data'), ha='right', va='bottom', color=MUTED)


@_styled
def line_chart(
  series: Sequence[Series], names: Axes, *, levels: dict[str, float] | None = None, lines: bool = True
) -> Plot:
  """Draws series, their bands and named horizontal levels.

  Args:
    series: at least one, none empty.
    names: of the axes.
    levels: {name: y}.
    lines: join the points.
  """
  figure, axes = _subplots(SIZE)
  titles = {}
  for place, one in enumerate(series):
    _draw_series(axes, one, place if one.style is None else one.style, lines)
  for name, level in (levels or {}).items():
    _draw_level(axes, name, level)
  if names.log_x:
    _set_log_scale(axes, 'x', np.concatenate([np.asarray(one.x) for one in series]))
  if names.log_y:
    _set_log_scale(axes, 'y', np.concatenate([np.asarray(one.y) for one in series]))
  for place, one in enumerate(series):  # last, so that they are on top
    gid = f'marks-{place}'
    axes.plot(one.x, one.y, linestyle='none', marker='o', markersize=14, alpha=0, gid=gid)
    titles[gid] = [_describe_mark(one, index, names) for index in range(len(one.x))]
  axes.set_xlabel(names.x_label)
  axes.set_ylabel(textwrap.fill(names.y_label, Y_LABEL_CHARACTERS))
  axes.margins(x=0.06, y=0.1)
  axes.grid(alpha=0.2)
  longest = max(len(one.label) for one in series)
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(
    handles,
    [textwrap.fill(label, LEGEND_CHARACTERS) for label in labels],
    loc='outside lower center',
    ncols=2 if longest <= LEGEND_CHARACTERS // 2 else 1,
  )
  return Plot(figure, titles)


def class_sign(index: int, names: Sequence[str]) -> str:
  """Returns one character for a class: its name if that is a single character, else a letter in order."""
  if index < len(names) and len(names[index]) == 1 and names[index].isalnum():
    return names[index]
  return 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'[index % 52]


@_styled
def scatter_by_class(points: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Plot:
  """Draws points (N, 2) as the signs of their classes, labels (N,) int; a dot for label -1."""
  figure, axes = _subplots((4, 4))
  titles = {}
  for index in map(int, np.unique(labels)):
    own, gid = points[labels == index], f'class-{index}'
    sign = f'${class_sign(index, names)}$' if index >= 0 else 'o'
    color = COLORS[index % len(COLORS)] if index >= 0 else MUTED
    axes.scatter(own[:, 0], own[:, 1], s=36, marker=sign, color=color, linewidths=0, gid=gid)
    titles[gid] = [f'class {names[index]}' if 0 <= index < len(names) else 'no label']
  axes.set_xticks([])
  axes.set_yticks([])
  axes.spines[:].set(visible=True, color=MUTED, linewidth=0.6)
  return Plot(figure, titles)


def write_png(plot: Plot, path: str) -> None:
  """Writes the figure as a PNG on white."""
  plot.figure.savefig(path, dpi=160, facecolor='white')
