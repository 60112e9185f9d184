"""Pictures and tables of runs."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lwfedssl_jax import run_log, tables
from lwfedssl_jax.base import PRNGKey, UsageError
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import augment
from lwfedssl_jax.data.federation import Federation
from lwfedssl_jax.data.partition import class_counts

SHEET_IMAGES = 16
SHEET_PIXELS = 96  # shown side of an image
SHEET_GAP = 6


def _pyplot() -> Any:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  return pyplot


def write_contact_sheet(path: str, data: Federation, config: Config, key: PRNGKey) -> None:
  """Writes a PNG of training images in two columns: each image, then its two augmented views."""
  from PIL import Image

  ids = np.concatenate(data.client_images)
  ids = ids[np.linspace(0, len(ids) - 1, min(SHEET_IMAGES, len(ids))).astype(int)]
  images = np.asarray(data.dataset.train_images[ids])
  views = jax.jit(lambda k, x: augment.two_views(k, x, config.augment))(key, images)
  cells = np.stack([images, *np.round(np.asarray(views) * 255).astype(np.uint8)])
  rows = -(-len(images) // 2)
  step = SHEET_PIXELS + SHEET_GAP
  sheet = Image.new('RGB', (6 * step + 3 * SHEET_GAP, rows * step + SHEET_GAP), 'white')
  for index in range(len(images)):
    half, row = divmod(index, rows)
    for column in range(3):
      cell = Image.fromarray(cells[column, index]).resize((SHEET_PIXELS, SHEET_PIXELS), Image.Resampling.NEAREST)
      sheet.paste(cell, ((3 * half + column) * step + (2 * half + 1) * SHEET_GAP, row * step + SHEET_GAP))
  sheet.save(path)


def write_partition_picture(path: str, data: Federation) -> None:
  """Draws clients x classes, or the sizes of the clients where there are no labels, as a PNG."""
  pyplot = _pyplot()
  labels, names = data.dataset.train_labels, data.dataset.class_names
  figure, axes = pyplot.subplots(figsize=(8, 2 + 0.25 * min(len(data.client_images), 40)), layout='constrained')
  if labels is None:
    axes.barh(range(len(data.client_images)), [len(ids) for ids in data.client_images])
    axes.invert_yaxis()
    axes.set_xlabel('images')
  else:
    counts = class_counts(data.client_images, labels, len(names))
    picture = axes.imshow(counts, aspect='auto', cmap='viridis', vmin=0, interpolation='nearest')
    figure.colorbar(picture, label='images')
    axes.set_xlabel('class')
    if len(names) <= 20:
      axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 2 else 0)
    if counts.size <= 200:
      for (client, label), count in np.ndenumerate(counts):
        shade = 'black' if count > counts.max() / 2 else 'white'
        axes.text(label, client, str(count), ha='center', va='center', fontsize=7, color=shade)
  axes.yaxis.get_major_locator().set_params(integer=True)
  axes.set_ylabel('client')
  axes.set_title(f'{data.dataset.name}: who holds what')
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


class _Column:
  """A column of the comparison: heading and how a summary is shown in it."""

  def __init__(self, heading: str, show: Any):
    self.heading, self.show = heading, show


def _accuracy(value: float | None) -> str:
  return 'no labels' if value is None else f'{value:.3f}'


_COLUMNS = (
    _Column('method', lambda s: s['method']),
    _Column('objective', lambda s: s['objective']),
    _Column('data', lambda s: s['dataset']),
    _Column('seed', lambda s: str(s['seed'])),
    _Column('kNN accuracy', lambda s: _accuracy(s['final_knn_accuracy'])),
    _Column('random weights', lambda s: _accuracy(s['random_init_knn_accuracy'])),
    _Column('raw pixels', lambda s: _accuracy(s['raw_pixel_knn_accuracy'])),
    _Column('download MB', lambda s: f'{s["download_bytes"] / 1e6:.1f}'),
    _Column('upload MB', lambda s: f'{s["upload_bytes"] / 1e6:.1f}'),
    _Column('seconds', lambda s: f'{s["seconds"]:.0f}'),
)


def comparison_table(summaries: Sequence[dict[str, Any]]) -> str:
  """Returns a Markdown table of runs."""
  rows = [[column.show(summary) for column in _COLUMNS] for summary in summaries]
  return tables.markdown([[column.heading for column in _COLUMNS], *rows])


def read_summary(workdir: str) -> dict[str, Any]:
  """Returns a finished run's summary. Raises UsageError."""
  path = os.path.join(workdir, run_log.SUMMARY)
  if not os.path.exists(path):
    raise UsageError(f'--workdirs: expected a finished run, {workdir} has no {run_log.SUMMARY}')
  return run_log.read_json(path)


def write_comparison_picture(path: str, workdirs: Sequence[str]) -> None:
  """Draws kNN accuracy against the bytes a client has exchanged so far, one line a run, a mark a stage."""
  pyplot = _pyplot()
  from matplotlib import ticker

  figure, axes = pyplot.subplots(figsize=(8, 5), layout='constrained')
  for index, workdir in enumerate(workdirs):
    rows, summary = run_log.read_metrics(workdir), read_summary(workdir)
    megabytes = np.cumsum([row['download_bytes'] + row['upload_bytes'] for row in rows]) / 1e6
    measured = [(x, row['knn_accuracy']) for x, row in zip(megabytes, rows) if row.get('knn_accuracy') is not None]
    if not measured:
      continue
    line, mark = ('-', '--', '-.', ':')[index % 4], 'osD^v<>PX'[index % 9]
    label = f'{summary["method"]} ({summary["objective"]}): {measured[-1][1]:.3f} at the end'
    axes.plot(*zip(*measured), line, marker=mark, markersize=8, label=label)
    if index == 0:
      for name, title in (('random_init_knn_accuracy', 'random weights'), ('raw_pixel_knn_accuracy', 'raw pixels')):
        axes.axhline(summary[name], color='gray', linewidth=0.8)
        axes.annotate(
            title, (1, summary[name]), xycoords=('axes fraction', 'data'), ha='right', va='bottom', color='gray')
  axes.set_xlabel('megabytes a client has exchanged (down and up, convention "actual")')
  axes.set_ylabel('kNN accuracy')
  axes.set_xscale('log')
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
  axes.xaxis.set_minor_formatter(ticker.NullFormatter())
  axes.margins(x=0.1)
  axes.grid(alpha=0.3)
  if axes.lines:
    axes.legend(framealpha=1, loc='upper left', bbox_to_anchor=(0, 0.93))
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def write_report(workdirs: Sequence[str], output: str) -> str:
  """Writes report.md and accuracy_against_bytes.png into a folder; returns the table.

  Raises:
    UsageError: a workdir holds no finished run.
  """
  table = comparison_table([read_summary(workdir) for workdir in workdirs])
  os.makedirs(output, exist_ok=True)
  write_comparison_picture(os.path.join(output, 'accuracy_against_bytes.png'), workdirs)
  with open(os.path.join(output, 'report.md'), 'w', encoding='utf-8') as file:
    file.write('# Comparison of runs\n\n' + table + '\n\nBytes are per client, all rounds, as really exchanged '
               '(convention "actual").\n\n![kNN accuracy against megabytes](accuracy_against_bytes.png)\n')
  return table
