"""Prints what the two views draw, by number, beside torchvision's rules in NumPy (docs/architecture.md).

python -m tests.tools.augment_distribution
"""

import argparse
import math

import jax
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from lwfedssl_jax.config_groups import AugmentConfig
from lwfedssl_jax.data import augment
from tests.reference import naive_augment

SIZES = (32, 224)
TILE = 224  # side of what is cut from the photographs
CONFIG = AugmentConfig()
ORDERS = {order: index for index, order in enumerate(naive_augment.ORDERS)}


def draw_ours(size: int, number: int, count: int) -> dict[str, np.ndarray]:
  """What the library draws for view `number` (0 or 1) from `count` keys."""
  rule = augment.ViewRule(CONFIG.blur_probability[number], CONFIG.solarize_probability[number])
  draw = jax.jit(jax.vmap(lambda key: augment.draw_view(key, size, rule, CONFIG)))
  view = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(size + number), count)))
  order = [ORDERS[tuple('BCSH'[i] for i in order)] for order in view.order]
  return {
    'box': view.box,
    'flip': view.flips,
    'jitter': view.jitters,
    'brightness': view.factors[:, 0],
    'hue': view.factors[:, 3],
    'order': np.array(order),
    'gray': view.is_gray,
    'blur': view.blurs,
    'sigma': view.sigma,
    'solarize': view.solarizes,
  }


def draw_rule(size: int, number: int, count: int) -> dict[str, np.ndarray]:
  """What torchvision's rules draw, from a NumPy generator."""
  generator = np.random.default_rng(size + number)
  views = [naive_augment.view_of(generator.random(naive_augment.NUM_DRAWS), size, number, CONFIG) for _ in range(count)]
  own = {
    name: np.array([getattr(view, name) for view in views])
    for name in ('box', 'flip', 'jitter', 'gray', 'blur', 'sigma', 'solarize')
  }
  return own | {
    'brightness': np.array([view.factors['B'] for view in views]),
    'hue': np.array([view.factors['H'] for view in views]),
    'order': np.array([ORDERS[view.order] for view in views]),
  }


def describe(drawn: dict[str, np.ndarray], size: int, number: int) -> dict[str, np.ndarray]:
  """Samples whose means are the table's numbers."""
  area = drawn['box'][:, 2] * drawn['box'][:, 3] / size**2
  crop = {
    'crop: mean area': area,
    'crop: share of areas above 0.8': area > 0.8,
    'crop: share of sides that are whole': (drawn['box'][:, 2:] == size).mean(axis=1),
    'crop: mean \\|log aspect ratio\\|': np.abs(np.log(drawn['box'][:, 3] / drawn['box'][:, 2])),
  }
  shares = np.bincount(drawn['order'], minlength=24)
  once = {
    'flip: share': drawn['flip'],
    'jitter: share': drawn['jitter'],
    'jitter: rarest of the 24 orders': drawn['order'] == shares.argmin(),
    'jitter: most frequent of the 24 orders': drawn['order'] == shares.argmax(),
    'jitter: mean brightness factor': drawn['brightness'],
    'jitter: mean distance of that factor from 1': np.abs(drawn['brightness'] - 1),
    'jitter: mean \\|turn of the hue\\|': np.abs(drawn['hue']),
    'grayscale: share': drawn['gray'],
    'blur: mean sigma, pixels': drawn['sigma'],
  }
  views = {f'blur: share, view {number + 1}': drawn['blur'], f'solarize: share, view {number + 1}': drawn['solarize']}
  if number:
    return views
  return crop | once | views if size == SIZES[0] else crop


def photographs(size: int) -> np.ndarray:
  """Squares of scikit-learn's two photographs, (4, size, size, 3) uint8."""
  tiles = [photo[:TILE, left : left + TILE] for photo in load_sample_images().images for left in (0, TILE)]
  return np.stack([np.asarray(Image.fromarray(tile).resize((size, size), Image.Resampling.LANCZOS)) for tile in tiles])


def blur_changes(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Mean absolute change of `count` photographs, gray levels of 255, by the library's blur and by NumPy's."""
  tiles = photographs(size)
  images = np.tile(tiles, (-(-count // len(tiles)), 1, 1, 1))[:count] / np.float32(255)
  sigmas = np.random.default_rng(0).uniform(*CONFIG.blur_sigma, count)
  support = augment.blur_support(CONFIG, size)

  def one(image, sigma):
    matrix = augment.blur_matrix(size, sigma, support)
    return 255 * abs(augment.resample(image, matrix, matrix) - image).mean()

  side = naive_augment.kernel_side(CONFIG, size)
  ours = jax.lax.map(lambda pair: one(*pair), (images, sigmas.astype(np.float32)))
  rule = [
    255 * np.abs(naive_augment.blur(image, sigma, side) - image).mean()
    for image, sigma in zip(images.astype(np.float64), sigmas)
  ]
  return np.asarray(ours), np.array(rule)


def print_row(name: str, size: int, ours: np.ndarray, rule: np.ndarray) -> None:
  """One line: both means, and their difference in its standard errors."""
  error = math.sqrt(ours.var() / len(ours) + rule.var() / len(rule))
  difference = (ours.mean() - rule.mean()) / error if error else 0.0
  print(f'| {name} | {size} | {ours.mean():.4f} | {rule.mean():.4f} | {difference:+.1f} |')


def main() -> None:
  """Prints the table in Markdown."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--draws', type=int, default=100_000, help='of each quantity')
  count = parser.parse_args().draws
  print("| quantity | side, pixels | here | torchvision's rule | difference, standard errors |\n|---|---|---|---|---|")
  for size in SIZES:
    for number in range(2 if size == SIZES[0] else 1):
      ours, rule = (describe(draw(size, number, count), size, number) for draw in (draw_ours, draw_rule))
      for name in ours:
        print_row(name, size, np.asarray(ours[name], float), np.asarray(rule[name], float))
  for size, blurred in ((SIZES[0], count // 10), (SIZES[1], count // 200)):
    print_row('blur: mean change of a photograph, gray levels', size, *blur_changes(size, blurred))


if __name__ == '__main__':
  main()
