"""Plots that runs and evaluations write."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lwfedssl_jax.base import Key
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import augment
from lwfedssl_jax.data.federated_dataset import FederatedDataset
from lwfedssl_jax.data.partition import class_counts

SHEET_IMAGES = 16
SHEET_PIXELS = 96  # displayed side of an image
SHEET_GAP = 6


def _pyplot() -> Any:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  return pyplot


def _readable_on(color: Sequence[float]) -> str:
  """Returns black or white, the one with the higher contrast on a color (red, green, blue, ..) in [0, 1]; WCAG 2.2."""
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
  luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
  return 'black' if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else 'white'


def write_contact_sheet(path: str, data: FederatedDataset, config: Config, key: Key) -> None:
  """Writes a PNG of training images in two columns: each image, then its two augmented views."""
  from PIL import Image

  ids = np.concatenate(data.client_images or [np.arange(len(data.dataset.train_images))])
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


def write_partition_plot(path: str, data: FederatedDataset) -> None:
  """Draws clients x classes, or the sizes of clients without labels, as a PNG."""
  pyplot = _pyplot()
  labels, names = data.dataset.train_labels, data.dataset.class_names
  # Narrow, so that text is readable on a phone.
  figure, axes = pyplot.subplots(figsize=(4.7, 1.6 + 0.3 * min(len(data.client_images), 40)), layout='constrained')
  if labels is None:
    axes.barh(range(len(data.client_images)), [len(ids) for ids in data.client_images])
    axes.invert_yaxis()
    axes.set_xlabel('images')
  else:
    counts = class_counts(data.client_images, labels, len(names))
    image = axes.imshow(counts, aspect='auto', cmap='viridis', vmin=0, interpolation='nearest')
    figure.colorbar(image, label='images')
    axes.set_xlabel('class')
    if len(names) <= 20:
      axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 2 else 0)
    if len(names) <= 10 and len(counts) <= 40 and counts.max() < 1000:
      for (client, label), count in np.ndenumerate(counts):
        axes.text(
          label, client, str(count), ha='center', va='center', fontsize=9, color=_readable_on(image.to_rgba(count))
        )
  axes.yaxis.get_major_locator().set_params(integer=True)
  axes.set_ylabel('client')
  axes.set_title(f'{data.dataset.name}: images of each client', fontsize=10)
  figure.savefig(path, dpi=200)
  pyplot.close(figure)


def write_confusion_plot(path: str, confusion: Sequence[Sequence[int]], names: Sequence[str], title: str) -> None:
  """Draws counts (C, C), rows the true classes, as shares of their row; with numbers for up to 20 classes."""
  pyplot = _pyplot()
  counts = np.asarray(confusion)
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  figure, axes = pyplot.subplots(figsize=(7, 6), layout='constrained')
  image = axes.imshow(shares, cmap='viridis', vmin=0, vmax=1, interpolation='nearest')
  figure.colorbar(image, label='share of the class')
  if len(names) <= 20:
    axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(range(len(names)), names)
    for (row, column), count in np.ndenumerate(counts):
      axes.text(
        column,
        row,
        str(count),
        ha='center',
        va='center',
        fontsize=7,
        color=_readable_on(image.to_rgba(shares[row, column])),
      )
  axes.set_xlabel('predicted')
  axes.set_ylabel('true')
  axes.set_title(title, fontsize=10)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
