"""Test images in two dimensions: embeddings of trained and of random weights by PCA and t-SNE."""

import os
import re
from collections.abc import Sequence

import numpy as np

from lwfedssl_jax.plots import charts
from lwfedssl_jax.report.items import Chart, Key, Section
from lwfedssl_jax.report.runs import Group

SCATTER_POINTS = 400
LEAST_POINTS = 10


def _projections(rows: np.ndarray) -> dict[str, np.ndarray]:
  import threadpoolctl
  from sklearn import decomposition, manifold

  # One thread: for so few points more threads only wait for each other.
  with threadpoolctl.threadpool_limits(1):
    return {
      'PCA': decomposition.PCA(2, random_state=0).fit_transform(rows),
      't-SNE': manifold.TSNE(2, perplexity=min(30, len(rows) / 4), init='pca', random_state=0).fit_transform(rows),
    }


def _scatters(name: str, rows: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> list[Chart]:
  return [
    Chart(
      re.sub(r'[^\w-]+', '_', f'embeddings_{name}_{kind}').lower(),
      charts.scatter_by_class(points, labels, names),
      f'{name}, {kind}',
      f'Embeddings of {len(rows)} test images of {name} in two dimensions by {kind}; each mark is the sign of '
      'its class.',
    )
    for kind, points in _projections(rows).items()
  ]


def make_key(labels: np.ndarray, names: Sequence[str]) -> Key:
  """Returns the signs of the classes that occur, in order; images without labels have none."""
  return Key(
    [
      (charts.class_sign(index, names), index % len(charts.COLORS), names[index])
      for index in map(int, np.unique(labels))
      if index >= 0
    ]
  )


def _dataset_items(groups: Sequence[Group]) -> list[Key | Chart]:
  """Returns the key and the scatter plots of groups on one dataset."""
  found: list[Key | Chart] = []
  every: list[np.ndarray] = []
  for group in groups:
    with np.load(group.runs[0].embeddings_path, allow_pickle=False) as archive:
      labels = archive['labels'][:SCATTER_POINTS]
      names = archive['class_names'].tolist() if 'class_names' in archive else []
      names = names or [str(index) for index in range(labels.max() + 1)]
      sets = {'trained': archive['trained'][:SCATTER_POINTS], 'random': archive['random'][:SCATTER_POINTS]}
    if len(labels) < LEAST_POINTS:
      continue
    if not found:
      found += _scatters(f'random weights, {group.dataset}', sets['random'], labels, names)
    found += _scatters(group.name, sets['trained'], labels, names)
    every.append(labels)
  key = make_key(np.concatenate(every), names) if every else Key([])
  return [key, *found] if key.entries else found


def embeddings_section(groups: Sequence[Group]) -> Section | None:
  """Returns scatter plots of the first seed of each group, and of random weights once per dataset."""
  items = []
  for dataset in dict.fromkeys(group.dataset for group in groups):
    items += _dataset_items(
      [group for group in groups if group.dataset == dataset and os.path.exists(group.runs[0].embeddings_path)]
    )
  if not items:
    return None
  seeds = ' First seed of each method.' if any(len(group.runs) > 1 for group in groups) else ''
  return Section('Embeddings', f'Test images in two dimensions, each drawn as the sign of its class.{seeds}', items)
