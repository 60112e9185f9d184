"""Charts of the metrics of runs over rounds, and of the costs of stages."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lwfedssl_jax.plots import charts
from lwfedssl_jax.plots.charts import Axes, Series
from lwfedssl_jax.report.items import Chart, Table
from lwfedssl_jax.report.runs import FinishedRun, Group, over_seeds
from lwfedssl_jax.report.tables import Entry, accuracy, memory


def rounds(run: FinishedRun) -> np.ndarray:
  """Returns 1 .. rounds."""
  return np.array([row['round'] + 1 for row in run.rows])


def progress(run: FinishedRun) -> np.ndarray:
  """Returns the share of training done; stages differ between methods, rounds do not."""
  return rounds(run) / len(run.rows)


def exchanged_megabytes(run: FinishedRun) -> np.ndarray:
  """Returns the MB that a client has exchanged by the end of each round."""
  return np.cumsum([row['download_bytes'] + row['upload_bytes'] for row in run.rows]) / 1e6


def numbers(caption: str, series: Sequence[Series], names: Axes) -> Table:
  """Returns the points of a chart as a table."""
  banded = any(one.low is not None for one in series)
  rows = [['method', names.x_label, names.y_label, *(['minimum', 'maximum'] if banded else [])]]
  for one in series:
    for index in range(len(one.x)):
      edges = ['-', '-'] if one.low is None or one.high is None else [f'{one.low[index]:.4g}', f'{one.high[index]:.4g}']
      rows.append([one.label, f'{one.x[index]:.4g}', f'{one.y[index]:.4g}', *(edges if banded else [])])
  return Table(caption, rows)


def ends(series: Sequence[Series]) -> str:
  """Describes the last value of each line."""
  return '; '.join(f'{one.label} ends at {one.y[-1]:.3g}' for one in series)


def _measured(group: Group, metric: str, compute_x: Callable[[FinishedRun], np.ndarray], style: int) -> Series | None:
  """Returns a series over the rows with `metric`: mean over seeds, with minimum and maximum as the band."""
  picked = [[index for index, row in enumerate(run.rows) if row.get(metric) is not None] for run in group.runs]
  if not picked[0] or any(found != picked[0] for found in picked):
    return None
  x = np.mean([compute_x(run)[picked[0]] for run in group.runs], axis=0)
  y = np.array([[run.rows[index][metric] for index in picked[0]] for run in group.runs])
  low, high = (y.min(0), y.max(0)) if len(y) > 1 else (None, None)
  return Series(group.name, x, y.mean(0), low, high, style)


def line(name: str, caption: str, found: Sequence[Series | None], names: Axes, **options: Any) -> Chart | None:
  """Returns a line chart of the series that are not None, or None. Options are those of `charts.line_chart`."""
  series = [one for one in found if one is not None]
  if not series:
    return None
  return Chart(
    name,
    charts.line_chart(series, names, **options),
    caption,
    f'{names.y_label} against {names.x_label}. {ends(series)}.',
    numbers(caption, series, names),
  )


def metric(
  name: str,
  caption: str,
  groups: Sequence[Group],
  compute_x: Callable[[FinishedRun], np.ndarray],
  names: Axes,
  **options: Any,
) -> Chart | None:
  """Returns a line chart of a metric over rounds; a group has one style in all charts.

  Args:
    name: of the metric in metrics.jsonl.
    caption: of the chart.
    groups: a line each; groups without the metric are omitted.
    compute_x: run -> (rounds,).
    names: of the axes.
    **options: of `charts.line_chart`; `file`, the chart's name if it differs from the metric's.
  """
  found = [_measured(group, name, compute_x, place) for place, group in enumerate(groups)]
  return line(options.pop('file', name), caption, found, names, **options)


def accuracy_against_memory(entries: Sequence[Entry], levels: dict[str, float]) -> Chart | None:
  """Returns final accuracy against a client's memory; None without labels."""
  series = []
  for place, entry in enumerate(entries):
    if (found := accuracy(entry)) is not None:
      low, high = (None, None) if found.std is None else ([found.low], [found.high])
      series.append(Series(entry.name, [memory(entry).mean / 1e6], [found.mean], low, high, place))
  if not series:
    return None
  names = Axes('peak memory of a client step, MB', 'kNN accuracy', log_x=True)
  caption = 'Final accuracy against the peak memory of a client step in its most demanding stage (compiled, "actual").'
  alternative = (
    'Final kNN accuracy against client memory: '
    + '; '.join(f'{one.label} {one.y[0]:.3f} at {one.x[0]:.0f} MB' for one in series)
    + '.'
  )
  return Chart(
    'accuracy_against_memory',
    charts.line_chart(series, names, levels=levels, lines=False),
    caption,
    alternative,
    numbers(caption, series, names),
  )


def per_stage(name: str, label: str, entries: Sequence[Entry], value: Callable[[Any], float]) -> Chart | None:
  """Returns a figure of each stage (`value` of its cost) over the rounds, as steps; None without entries."""
  series = []
  for place, entry in enumerate(entries):
    stages = entry.actual.stages
    stop = np.cumsum([stage.num_rounds for stage in stages])
    start = stop - [stage.num_rounds for stage in stages]
    series.append(
      Series(entry.name, np.stack([start, stop], 1).ravel(), np.repeat([value(s) for s in stages], 2), style=place)
    )
  return line(
    name, f'{label[0].upper()}{label[1:]}, over the rounds ("actual").', series, Axes('rounds done', label, log_y=True)
  )


def _from_summary(name: str) -> Callable[[FinishedRun], float | None]:
  return lambda run: run.summary[name]


def reference_levels(groups: Sequence[Group]) -> dict[str, float]:
  """Returns the accuracies of random weights and raw pixels if all groups share a dataset and encoder."""
  if len({(group.dataset, group.config.model) for group in groups}) > 1:
    return {}
  names = {'random_init_knn_accuracy': 'random weights', 'raw_pixel_knn_accuracy': 'raw pixels'}
  found = {text: over_seeds(groups[0], _from_summary(name)) for name, text in names.items()}
  return {text: value.mean for text, value in found.items() if value is not None}
