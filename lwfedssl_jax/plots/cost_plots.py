"""The paper's three resource plots (arXiv 2401.11647): memory and FLOPs over local epochs, bytes over rounds."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from lwfedssl_jax.resources.costs import MethodCost, StageCost


def _draw(
  path: str,
  found: Sequence[MethodCost],
  lengths: Callable[[StageCost], int],
  value: Callable[[StageCost], float],
  x_label: str,
  y_label: str,
) -> None:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
  for index, cost in enumerate(found):
    edges, values = [0], [value(stage) for stage in cost.stages]
    for stage in cost.stages:
      edges.append(edges[-1] + lengths(stage))
    style: dict[str, Any] = {'linestyle': ('-', '--', '-.', ':')[index % 4], 'linewidth': 1.5 + index % 3}
    axes.stairs(values, edges, baseline=None, label=cost.method, color=f'C{index}', **style)
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  axes.set_ylim(bottom=0)
  axes.set_title(f'one client, convention {found[0].convention}', fontsize=10)
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def write_cost_plots(folder: str, found: Sequence[MethodCost]) -> list[str]:
  """Writes PNGs into an existing folder and returns their names; figures that the convention lacks are omitted."""

  def epochs(stage):
    return stage.local_epochs

  def per_round(s):
    return (sum(s.download_bytes.values()) + sum(s.upload_bytes.values())) / s.num_rounds / 1e6

  drawn = {
    'memory_over_local_epochs': (epochs, lambda s: s.peak_memory_bytes / 1e6, 'local epochs', 'peak memory, MB'),
    'flops_over_local_epochs': (
      epochs,
      lambda s: s.flops / s.local_epochs / 1e9,
      'local epochs',
      'GFLOPs per image and local epoch',
    ),
    'bytes_over_rounds': (lambda s: s.num_rounds, per_round, 'rounds', 'megabytes per round, down and up'),
  }
  first = found[0].stages[0]
  if first.peak_memory_bytes is None:
    del drawn['memory_over_local_epochs']
  if first.flops is None:
    del drawn['flops_over_local_epochs']
  for name, arguments in drawn.items():
    _draw(os.path.join(folder, f'{name}.png'), found, *arguments)
  return [f'{name}.png' for name in drawn]
