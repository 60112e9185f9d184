"""torchvision's augmentation, and the two views, written as plainly as possible, to check the fast ones against.

NumPy in float64: one image at a time, ten tries of a crop in a loop, pixels by colorsys, the operations in the order
drawn. The rules are those of torchvision 0.29.1's RandomResizedCrop.get_params, ColorJitter.forward,
GaussianBlur and RandomSolarize, on images that are not rounded to 8 bits between operations.

Nothing is shared with the library but the uniform numbers that the views consume: `jax.random.uniform` of each view's
own key, 33 of them, in this layout: 0-9 areas and 10-19 aspect ratios of the crop's tries, 20 top, 21 left, 22 flip,
23-26 brightness, contrast, saturation and hue, 27 order (of 24, lexicographic), 28 jitter at all, 29 gray at all,
30 sigma, 31 blur at all, 32 solarize at all.
"""

import colorsys
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NUM_DRAWS = 33
LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))
ORDERS = list(itertools.permutations('BCSH'))  # brightness, contrast, saturation, hue


class View(NamedTuple):
  """What is drawn for a view."""

  box: tuple[int, int, int, int]  # top, left, height, width
  flip: bool
  jitter: bool
  factors: dict[str, float]  # by the letters of ORDERS
  order: tuple[str, ...]
  gray: bool
  blur: bool
  sigma: float
  solarize: bool


def scale(u, low, high):
  return low + u * (high - low)


# Parameters.


def crop_sides(size, area_share, log_aspect):
  """Height and width of one try, or None if it does not fit."""
  target, aspect = size * size * area_share, math.exp(log_aspect)
  width, height = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
  return (height, width) if 0 < width <= size and 0 < height <= size else None


def draw_box(generator, size, area):
  """A crop (top, left, height, width) from a NumPy generator."""
  for _ in range(10):
    sides = crop_sides(size, generator.uniform(*area), generator.uniform(*LOG_ASPECT))
    if sides:
      height, width = sides
      return int(generator.integers(0, size - height + 1)), int(generator.integers(0, size - width + 1)), height, width
  return 0, 0, size, size  # of a square image the whole: its own aspect ratio is within the bounds


def box_of(draws, size, area):
  """The crop that a view's first 22 uniform numbers stand for."""
  for area_draw, aspect_draw in zip(draws[:10], draws[10:20]):
    sides = crop_sides(size, scale(area_draw, *area), scale(aspect_draw, *LOG_ASPECT))
    if sides:
      height, width = sides
      return int(draws[20] * (size - height + 1)), int(draws[21] * (size - width + 1)), height, width
  return 0, 0, size, size


def view_of(draws, size, number, config):
  """Everything that a view's uniform numbers stand for; `number` is 0 or 1, the view's."""
  signed = [strength * (2 * u - 1) for strength, u in zip(config.jitter_strength, draws[23:27])]
  return View(
    box=box_of(draws, size, config.crop_area),
    flip=draws[22] < config.flip_probability,
    jitter=draws[28] < config.jitter_probability,
    factors={'B': 1 + signed[0], 'C': 1 + signed[1], 'S': 1 + signed[2], 'H': signed[3]},
    order=ORDERS[int(24 * draws[27])],
    gray=draws[29] < config.grayscale_probability,
    blur=draws[31] < config.blur_probability[number],
    sigma=scale(draws[30], *config.blur_sigma),
    solarize=draws[32] < config.solarize_probability[number],
  )


# Operations on one image (S, S, 3) in [0, 1].


def resize_rows(image, size):
  """Enlarges (H, W, 3) to `size` rows by linear interpolation between the two nearest rows; edges repeat."""
  height, rows = len(image), []
  for index in range(size):
    position = min(max((index + 0.5) * height / size - 0.5, 0), height - 1)
    low = int(position)
    high = min(low + 1, height - 1)
    rows.append((1 - (position - low)) * image[low] + (position - low) * image[high])
  return np.stack(rows)


def crop(image, box):
  """Cuts a box out and enlarges it to the size of the image."""
  top, left, height, width = box
  cut = resize_rows(image[top : top + height, left : left + width], len(image))
  return resize_rows(cut.swapaxes(0, 1), len(image)).swapaxes(0, 1)


def luma(image):
  return 0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]


def to_gray(image):
  return np.stack([luma(image)] * 3, axis=-1)


def mix(image, other, factor):
  return np.clip(factor * image + (1 - factor) * other, 0, 1)


def turn_hue(image, turn):
  turned = np.empty_like(image)
  for place in np.ndindex(image.shape[:2]):
    hue, saturation, value = colorsys.rgb_to_hsv(*image[place])
    turned[place] = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
  return turned


JITTER = {
  'B': lambda image, factor: mix(image, 0, factor),
  'C': lambda image, factor: mix(image, luma(image).mean(), factor),
  'S': lambda image, factor: mix(image, to_gray(image), factor),
  'H': turn_hue,
}


def jitter(image, factors, order):
  for letter in order:
    image = JITTER[letter](image, factors[letter])
  return image


def kernel_side(config, size):
  """The configured kernel, or the odd number nearest to a tenth of the side; the larger one where two are as near."""
  return config.blur_kernel_size or max(3, min(range(1, size + 2, 2), key=lambda odd: (abs(odd - size / 10), -odd)))


def blur(image, sigma, side):
  """Gaussian of `side` x `side` pixels, edges mirrored without repeating the edge pixel."""
  radius = side // 2
  weights = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(-radius, radius + 1)]
  for axis in (0, 1):
    padding = [(radius, radius) if i == axis else (0, 0) for i in range(3)]
    padded, length = np.pad(image, padding, mode='reflect'), image.shape[axis]
    image = sum(weight / sum(weights) * np.take(padded, range(i, i + length), axis) for i, weight in enumerate(weights))
  return image


def solarize(image):
  return np.where(image >= 0.5, 1 - image, image)


def apply(image, view, config):
  """Makes a view of one image."""
  image = crop(image, view.box)
  if view.flip:
    image = image[:, ::-1]
  if view.jitter:
    image = jitter(image, view.factors, view.order)
  if view.gray:
    image = to_gray(image)
  if view.blur:
    image = blur(image, view.sigma, kernel_side(config, len(image)))
  return solarize(image) if view.solarize else image


def draws_of(key, count):
  """The uniform numbers of both views of `count` images, (2, count, 33) float64."""
  keys = jax.random.split(key, (2, count))

  def uniform(own):
    return jax.random.uniform(own, (NUM_DRAWS,), jnp.float32)

  return np.asarray(jax.vmap(jax.vmap(uniform))(keys), np.float64)


def two_views(key, images, config):
  """Both views of a batch as the library draws them from the same key.

  Args:
    key: the step's.
    images: (B, S, S, 3) uint8.
    config: an AugmentConfig.

  Returns:
    (2, B, S, S, 3) float64 in [0, 1].
  """
  images = np.asarray(images, np.float64) / 255
  draws, size = draws_of(key, len(images)), images.shape[1]
  return np.stack(
    [
      np.stack([apply(image, view_of(own, size, number, config), config) for image, own in zip(images, draws[number])])
      for number in range(2)
    ]
  )
