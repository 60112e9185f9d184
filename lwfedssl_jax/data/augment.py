"""Two-view augmentation on the device: pure functions on float images (S, S, 3) in [0, 1].

Random resized crop, color jitter, grayscale, Gaussian blur, solarize and horizontal flip by torchvision's rules, with
MoCo v3's strengths (arXiv 2104.02057). One key per image and view. The crop (with the flip) and the blur are linear
along each side, so each is a pair of small matrices.

A view consumes NUM_DRAWS uniform numbers of its key: 0-9 areas of ten candidate crops, 10-19 their aspect ratios,
20 top, 21 left, 22 flip, 23-26 brightness, contrast, saturation and hue, 27 the order of these four, 28 jitter,
29 gray, 30 sigma, 31 blur, 32 solarization.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax.base import Key
from lwfedssl_jax.config import AugmentConfig

NUM_DRAWS = 33
CROP_TRIES = 10
CROP_ASPECT = (3 / 4, 4 / 3)  # width / height
GRAY_WEIGHTS = (0.299, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
JITTER_ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
HIGHEST = jax.lax.Precision.HIGHEST  # a TPU's default rounds the operands of a product to bfloat16


def to_float(images: jax.Array) -> jax.Array:
  """uint8 (..., S, S, 3) -> float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255


def normalize(images: jax.Array) -> jax.Array:
  """Normalizes floats in [0, 1] by mean 0.5 and standard deviation 0.5, to [-1, 1]."""
  return (images - 0.5) / 0.5


def crop_matrix(size: int, offset: jax.Array, length: jax.Array, flip: jax.Array) -> jax.Array:
  """Bilinear resampling of pixels offset .. offset + length - 1 to `size` pixels, mirrored if `flip`; (size, size).

  A crop is enlarged or kept, never reduced, so antialiasing would change nothing.
  """
  position = (jnp.arange(size) + 0.5) / size
  position = jnp.where(flip, 1 - position, position)
  # Pixels outside the crop have no weight: its edge pixels repeat.
  source = jnp.clip(offset + position * length - 0.5, offset, offset + length - 1)
  return jnp.maximum(0, 1 - jnp.abs(source[:, None] - jnp.arange(size)))


def blur_support(config: AugmentConfig, size: int) -> int:
  """Returns the side of the blur kernel, pixels: as configured, else the odd number nearest to size / 10, min. 3."""
  return config.blur_kernel_size or max(3, 2 * (size // 20) + 1)


def blur_matrix(size: int, sigma: jax.Array, support: int) -> jax.Array:
  """Gaussian blur along one side, torchvision's: (size, size).

  Args:
    size: of the side, pixels.
    sigma: of the Gaussian, pixels.
    support: pixels that have a weight, odd; may exceed the side.

  Returns:
    Weights proportional to exp(-(distance / sigma)^2 / 2) within the support. Beyond its edges the side is mirrored;
    the edge pixel is not repeated.
  """
  radius = support // 2
  mirrored = np.pad(np.arange(size), radius, mode='reflect')
  weights = jnp.exp(-0.5 * jnp.square(jnp.arange(-radius, radius + 1) / sigma))
  weights = weights / weights.sum()
  return sum(weights[i] * (mirrored[i:i + size, None] == jnp.arange(size)) for i in range(support))


def resample(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
  """Applies one matrix along each side of an image (S, S, 3)."""
  return jnp.einsum('yh,hwc,xw->yxc', rows, image, columns, precision=HIGHEST)


def gray(image: jax.Array) -> jax.Array:
  """Luma of (S, S, 3) as (S, S, 1)."""
  return sum(weight * image[..., i:i + 1] for i, weight in enumerate(GRAY_WEIGHTS))


def blend(image: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
  """Factor * image + (1 - factor) * other, clipped to [0, 1]; a factor of 1 changes no bit."""
  return jnp.clip(image + (1 - factor) * (other - image), 0, 1)


def shift_hue(image: jax.Array, turns: jax.Array) -> jax.Array:
  """Shifts the hue of (S, S, 3) by a share of a full circle, in HSV."""
  red, green, blue = image[..., 0], image[..., 1], image[..., 2]
  value, low = image.max(-1), image.min(-1)
  chroma = value - low
  safe = jnp.where(chroma > 0, chroma, 1)
  sextant = jnp.where(
      value == red, (green - blue) / safe, jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe))
  sextant = sextant + 6 * turns
  channel = lambda n: n + sextant - 6 * jnp.floor((n + sextant) / 6)  # a remainder, by cheaper operations than %
  ramp = lambda k: value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)
  return jnp.stack([ramp(channel(n)) for n in (5.0, 3.0, 1.0)], axis=-1)


def enhance(image: jax.Array, operation: jax.Array, factor: jax.Array) -> jax.Array:
  """Brightness, contrast or saturation of (S, S, 3), by a factor."""
  luma = gray(image)
  other = jnp.where(operation == CONTRAST, luma.mean(), jnp.where(operation == SATURATION, luma, 0))
  return blend(image, other, factor)


def jitter(image: jax.Array, factors: jax.Array, order: jax.Array) -> jax.Array:
  """Applies brightness, contrast, saturation and hue in any order.

  The hue is shifted once. Each of the other three runs once before and once after it; one of the two factors is 1.

  Args:
    image: (S, S, 3) in [0, 1].
    factors: (4,) of brightness, contrast and saturation, and the hue shift in shares of a full circle.
    order: (4,) the four operations in order.
  """
  place = jnp.argmax(order == HUE)
  others = jnp.where(jnp.arange(3) < place, order[:3], order[1:])
  for after in (False, True):
    for index in range(3):
      factor = jnp.where((index >= place) == after, factors[others[index]], 1)
      image = enhance(image, others[index], factor)
    image = image if after else shift_hue(image, factors[HUE])
  return image


def solarize(image: jax.Array) -> jax.Array:
  """Inverts values of at least 0.5."""
  return jnp.where(image >= 0.5, 1 - image, image)


class ViewRule(NamedTuple):
  """The parameters that differ between the two views: probabilities of blur and solarization."""

  blur_probability: Any
  solarize_probability: Any


class ViewParams(NamedTuple):
  """The random parameters of one view of one image."""

  box: jax.Array  # (4,) float32, whole numbers of pixels: top, left, height, width
  flips: jax.Array
  jitters: jax.Array
  factors: jax.Array  # (4,) of brightness, contrast, saturation; the hue shift
  order: jax.Array  # (4,) the jitter's operations in order
  is_gray: jax.Array
  blurs: jax.Array
  sigma: jax.Array  # pixels
  solarizes: jax.Array


def between(draws: jax.Array, bounds: tuple[float, float]) -> jax.Array:
  """Uniform numbers in [0, 1) -> uniform numbers within the bounds."""
  return bounds[0] + draws * (bounds[1] - bounds[0])


def crop_box(draws: jax.Array, size: int, area: tuple[float, float]) -> jax.Array:
  """Draws a crop as torchvision's RandomResizedCrop: the first of ten candidates that fits, else the whole image.

  Args:
    draws: (22,) uniform numbers in [0, 1), the first of the module's layout.
    size: side of the image, pixels.
    area: minimum and maximum share of the area.

  Returns:
    (4,) float32, whole numbers of pixels: top, left, height, width.
  """
  areas, ratios, offsets = jnp.split(draws, (CROP_TRIES, 2 * CROP_TRIES))
  areas = size**2 * between(areas, area)
  ratios = jnp.exp(between(ratios, tuple(map(math.log, CROP_ASPECT))))
  sides = jnp.round(jnp.sqrt(areas * jnp.stack([1 / ratios, ratios])))
  fits = ((sides > 0) & (sides <= size)).all(axis=0)
  sides = jnp.where(fits.any(), sides[:, jnp.argmax(fits)], size)
  return jnp.concatenate([jnp.floor(offsets * (size - sides + 1)), sides])


def draw_view(key: Key, size: int, rule: ViewRule, config: AugmentConfig) -> ViewParams:
  """Draws the parameters of one view of an image of side `size`, pixels; one key per image and view."""
  draw = jax.random.uniform(key, (NUM_DRAWS,))
  spread = jnp.array(config.jitter_strength) * (2 * draw[23:27] - 1)
  return ViewParams(
      box=crop_box(draw[:22], size, config.crop_area),
      flips=draw[22] < config.flip_probability,
      jitters=draw[28] < config.jitter_probability,
      factors=jnp.array([1, 1, 1, 0]) + spread,
      order=jnp.array(JITTER_ORDERS)[(draw[27] * len(JITTER_ORDERS)).astype(jnp.int32)],
      is_gray=draw[29] < config.grayscale_probability,
      blurs=draw[31] < rule.blur_probability,
      sigma=between(draw[30], config.blur_sigma),
      solarizes=draw[32] < rule.solarize_probability)


def apply_view(image: jax.Array, view: ViewParams, config: AugmentConfig) -> jax.Array:
  """Makes a view of one image, float32 (S, S, 3) in [0, 1]; operations of probability 0 are not computed."""
  size = image.shape[0]
  top, left, height, width = view.box
  rows, columns = crop_matrix(size, top, height, jnp.bool_(False)), crop_matrix(size, left, width, view.flips)
  image = jnp.clip(resample(image, rows, columns), 0, 1)
  image = jnp.where(view.jitters, jitter(image, view.factors, view.order), image)
  image = jnp.where(view.is_gray, gray(image), image)
  if any(config.blur_probability):
    blur = blur_matrix(size, view.sigma, blur_support(config, size))
    image = jnp.where(view.blurs, resample(image, blur, blur), image)
  if any(config.solarize_probability):
    image = jnp.where(view.solarizes, solarize(image), image)
  return image


def two_views(
    key: Key, images: jax.Array, config: AugmentConfig, piece: tuple[Any, int] | None = None) -> jax.Array:
  """Draws both views of a batch.

  Args:
    key: the step's; each view of each image has a key derived from it.
    images: (B, S, S, 3) uint8.
    config: probabilities and strengths.
    piece: (first, count): a slice of the images, identical to that slice of the full batch.

  Returns:
    (2, B, S, S, 3) float32 in [0, 1].
  """
  keys = jax.random.split(key, (2, images.shape[0]))
  if piece is not None:
    keys, images = (jax.lax.dynamic_slice_in_dim(x, *piece, axis=axis) for x, axis in ((keys, 1), (images, 0)))
  rules = ViewRule(jnp.array(config.blur_probability), jnp.array(config.solarize_probability))
  size = images.shape[1]
  one_view = jax.vmap(
      lambda k, x, rule: apply_view(x, draw_view(k, size, rule, config), config), in_axes=(0, 0, None))
  return jax.vmap(one_view, in_axes=(0, None, 0))(keys, to_float(images), rules)
