"""Charts by matplotlib: as SVG that takes the page's colours, light or dark, or as PNG.

Series are told apart by dashes and marks as well as by colour.
"""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Okabe and Ito's palette, told apart by the colour-blind; the page sets --c0 .. for its scheme.
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#7f7f7f', '#b59f00')
DASHES = ('-', '--', '-.', ':')
MARKS = 'osD^vP*X'
INK = '#010203'  # stands for the page's text colour
SIZE = (5.4, 3.7)  # inches: text stays readable on a phone


class Series(NamedTuple):
  """A line or a set of marks.

  Attributes:
    label: in the legend.
    x: (N,).
    y: (N,).
    low: (N,) lower edge of a band, or None.
    high: (N,) upper edge.
    style: which colour, dashes and mark; None: by its place in the chart.
  """

  label: str
  x: Sequence[float]
  y: Sequence[float]
  low: Sequence[float] | None = None
  high: Sequence[float] | None = None
  style: int | None = None


def _figure() -> tuple[Any, Any]:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  with matplotlib.rc_context({
      'text.color': INK, 'axes.labelcolor': INK, 'axes.edgecolor': INK, 'xtick.color': INK, 'ytick.color': INK,
      'axes.facecolor': 'none', 'figure.facecolor': 'none', 'font.size': 10, 'axes.spines.top': False,
      'axes.spines.right': False}):
    return pyplot.subplots(figsize=SIZE, layout='constrained')


def _plain_log_ticks(axis: Any, values: np.ndarray) -> None:
  from matplotlib import ticker

  decades = np.log10(values.max() / values.min()) if values.min() > 0 else 1
  axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)))
  axis.set_major_formatter(ticker.StrMethodFormatter('{x:,g}'))
  axis.set_minor_formatter(ticker.NullFormatter())


def line_chart(series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False,
               levels: dict[str, float] | None = None, lines: bool = True) -> Any:
  """Draws series, their bands and named horizontal levels.

  Args:
    series: at least one, none empty.
    x_label: with its unit.
    y_label: with its unit.
    log_x: logarithmic axis.
    log_y: logarithmic axis.
    levels: {name: y}.
    lines: join the points.

  Returns:
    A matplotlib figure.
  """
  figure, axes = _figure()
  for place, one in enumerate(series):
    index = place if one.style is None else one.style
    colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
    style = DASHES[index % len(DASHES)] if lines else 'none'
    axes.plot(one.x, one.y, linestyle=style, marker=mark if len(one.x) <= 30 else None, markersize=6, color=colour,
              label=one.label)
    if one.low is not None and len(one.x) > 1 and lines:
      axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.15, linewidth=0)
    elif one.low is not None:
      axes.vlines(one.x, one.low, one.high, color=colour)
  for name, level in (levels or {}).items():
    axes.axhline(level, color='#888888', linewidth=0.8, linestyle=(0, (1, 3)))
    axes.annotate(name, (1, level), xycoords=('axes fraction', 'data'), ha='right', va='bottom', fontsize=9,
                  color='#888888')
  if log_x:
    axes.set_xscale('log')
    _plain_log_ticks(axes.xaxis, np.concatenate([np.asarray(one.x) for one in series]))
  if log_y:
    axes.set_yscale('log')
    _plain_log_ticks(axes.yaxis, np.concatenate([np.asarray(one.y) for one in series]))
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  axes.margins(x=0.06, y=0.1)
  axes.grid(alpha=0.2)
  figure.legend(loc='outside lower center', ncols=2, frameon=False, fontsize=9, labelcolor=INK)
  return figure


def scatter_by_class(points: np.ndarray, labels: np.ndarray, names: Sequence[str], title: str) -> Any:
  """Draws points (N, 2) as letters or figures of their class, so that classes are told apart without colour."""
  figure, axes = _figure()
  figure.set_size_inches(4, 4)
  for index in np.unique(labels):
    own = points[labels == index]
    sign = _class_sign(int(index), names)
    colour = COLOURS[int(index) % len(COLOURS)] if index >= 0 else '#888888'
    axes.scatter(own[:, 0], own[:, 1], s=28, marker=f'${sign}$' if index >= 0 else 'o', color=colour, linewidths=0)
  axes.set_xticks([])
  axes.set_yticks([])
  axes.set_title(title, fontsize=10, color=INK)
  return figure


def _class_sign(index: int, names: Sequence[str]) -> str:
  """One character for a class: its name if that is one, else a letter in order."""
  if index < len(names) and len(names[index]) == 1 and names[index].isalnum():
    return names[index]
  return 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'[index % 52]


def to_svg(figure: Any, number: int) -> str:
  """Returns the figure as an <svg> element in the page's colours; `number` keeps identifiers of two charts apart."""
  import matplotlib
  from matplotlib import pyplot

  buffer = io.StringIO()
  with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': str(number)}):
    figure.savefig(buffer, format='svg', metadata={'Date': None, 'Creator': None}, transparent=True)
  pyplot.close(figure)
  text = buffer.getvalue()
  text = text[text.index('<svg'):]
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  text = re.sub(r'\s(?:width|height)="[\d.]+pt"', '', text, count=2)
  text = re.sub(r' (id|xlink:href|clip-path)="(url\()?#?', lambda m: f'{m.group(0)}f{number}-', text)
  text = text.replace(INK, 'currentColor')
  for index, colour in enumerate(COLOURS):
    text = text.replace(colour, f'var(--c{index})')
  return text.replace('<svg ', '<svg aria-hidden="true" focusable="false" ', 1)


def write_png(figure: Any, path: str) -> None:
  """Writes the figure as a PNG on white."""
  from matplotlib import pyplot

  figure.savefig(path, dpi=150, facecolor='white')
  pyplot.close(figure)
