"""Two-view augmentation on the device: pure functions on float images (S, S, 3) in [0, 1].

Random resized crop, colour jitter, grayscale, Gaussian blur, solarize and horizontal flip with MoCo v3's
strengths (arXiv 2104.02057), one key an image. The crop (with the flip) and the blur are linear along
each side, so each is a pair of small matrices. The jitter's four operations run in one fixed order
(brightness, contrast, saturation, hue), which is our choice; torchvision draws an order per image.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax.config import AugmentConfig
from lwfedssl_jax.contracts import Key

NUM_DRAWS = 14  # uniform numbers a view consumes
GRAY_WEIGHTS = (0.299, 0.587, 0.114)
CROP_ASPECT = (3 / 4, 4 / 3)
BLUR_REFERENCE_SIZE = 224


def to_float(images: jax.Array) -> jax.Array:
  """uint8 (..., S, S, 3) -> float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255


def normalize(images: jax.Array) -> jax.Array:
  """Float [0, 1] -> what the encoder sees: mean 0.5 and standard deviation 0.5 taken out, [-1, 1]."""
  return (images - 0.5) / 0.5


def crop_matrix(size: int, offset: jax.Array, length: jax.Array, flip: jax.Array) -> jax.Array:
  """Bilinear resampling of [offset, offset + length) pixels to `size` pixels, mirrored if `flip`; (size, size)."""
  position = (jnp.arange(size) + 0.5) / size
  position = jnp.where(flip, 1 - position, position)
  # Neighbours outside the crop are not looked at: its edge pixels repeat, as if it had been cut out first.
  source = jnp.clip(offset + position * length - 0.5, offset, jnp.maximum(offset + length - 1, offset))
  return jnp.maximum(0, 1 - jnp.abs(source[:, None] - jnp.arange(size)))


def blur_matrix(size: int, sigma: jax.Array) -> jax.Array:
  """Gaussian blur along one side with mirrored edges (the edge pixel is not repeated); (size, size)."""
  output, source = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
  weight = lambda distance: jnp.exp(-0.5 * jnp.square(distance / sigma))
  mirrored = jnp.where(source > 0, weight(output + source), 0)
  mirrored += jnp.where(source < size - 1, weight(2 * (size - 1) - source - output), 0)
  matrix = weight(output - source) + mirrored
  return matrix / matrix.sum(axis=1, keepdims=True)


def resample(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
  """Applies one matrix along each side of an image (S, S, 3)."""
  return jnp.einsum('yh,hwc,xw->yxc', rows, image, columns)


def gray(image: jax.Array) -> jax.Array:
  """Luma of (S, S, 3) as (S, S, 1)."""
  return (image @ jnp.array(GRAY_WEIGHTS, image.dtype))[..., None]


def blend(image: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
  """Factor * image + (1 - factor) * other, clipped to [0, 1]."""
  return jnp.clip(other + factor * (image - other), 0, 1)


def shift_hue(image: jax.Array, turns: jax.Array) -> jax.Array:
  """Turns the hue of (S, S, 3) by a share of a full circle, in HSV."""
  red, green, blue = image[..., 0], image[..., 1], image[..., 2]
  value, low = image.max(-1), image.min(-1)
  chroma = value - low
  safe = jnp.where(chroma > 0, chroma, 1)
  sextant = jnp.where(
      value == red, (green - blue) / safe, jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe))
  sextant = sextant + 6 * turns
  channel = lambda n: (n + sextant) % 6
  ramp = lambda k: value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)
  return jnp.stack([ramp(channel(n)) for n in (5.0, 3.0, 1.0)], axis=-1)


def jitter(image: jax.Array, strength: tuple[float, float, float, float], draws: jax.Array) -> jax.Array:
  """Brightness, contrast, saturation and hue by factors drawn from 1 +- strength (hue: turns); draws (4,) in [0, 1)."""
  signed = 2 * draws - 1
  brightness, contrast, saturation, turns = (strength[i] * signed[i] for i in range(4))
  image = blend(image, jnp.zeros_like(image), 1 + brightness)
  image = blend(image, gray(image).mean(), 1 + contrast)
  image = blend(image, gray(image), 1 + saturation)
  return shift_hue(image, turns)


def solarize(image: jax.Array) -> jax.Array:
  """Inverts what is at least half as bright as can be."""
  return jnp.where(image >= 0.5, 1 - image, image)


class ViewRule(NamedTuple):
  """What differs between the two views: probabilities of a blur and of solarization."""

  blur_probability: Any
  solarize_probability: Any


def augment_image(key: Key, image: jax.Array, rule: ViewRule, config: AugmentConfig) -> jax.Array:
  """Draws one view of one image.

  Args:
    key: the image's own, for this view.
    image: (S, S, 3) float32 in [0, 1].
    rule: the view's probabilities.
    config: all other probabilities and strengths.

  Returns:
    (S, S, 3) float32 in [0, 1].
  """
  size = image.shape[0]
  draw = jax.random.uniform(key, (NUM_DRAWS,))
  between = lambda u, bounds: bounds[0] + u * (bounds[1] - bounds[0])

  area = between(draw[0], config.crop_area)
  ratio = jnp.exp(between(draw[1], tuple(map(math.log, CROP_ASPECT))))
  width, height = (jnp.minimum(jnp.sqrt(area * r), 1) * size for r in (ratio, 1 / ratio))
  rows = crop_matrix(size, draw[2] * (size - height), height, jnp.bool_(False))
  columns = crop_matrix(size, draw[3] * (size - width), width, draw[4] < config.flip_probability)
  image = jnp.clip(resample(image, rows, columns), 0, 1)

  jittered = jitter(image, config.jitter_strength, draw[5:9])
  image = jnp.where(draw[9] < config.jitter_probability, jittered, image)
  image = jnp.where(draw[10] < config.grayscale_probability, gray(image), image)
  if any(config.blur_probability):
    blur = blur_matrix(size, between(draw[11], config.blur_sigma) * size / BLUR_REFERENCE_SIZE)
    image = jnp.where(draw[12] < rule.blur_probability, resample(image, blur, blur), image)
  if any(config.solarize_probability):
    image = jnp.where(draw[13] < rule.solarize_probability, solarize(image), image)
  return image


def two_views(
    key: Key, images: jax.Array, config: AugmentConfig, piece: tuple[Any, int] | None = None) -> jax.Array:
  """Draws both views of a batch.

  Args:
    key: the step's; each view of each image gets its own from it.
    images: (B, S, S, 3) uint8.
    config: probabilities and strengths.
    piece: (first, count): only so many images from the first one on, as they come out of the whole batch.

  Returns:
    (2, B, S, S, 3) float32 in [0, 1].
  """
  keys = jax.random.split(key, (2, images.shape[0]))
  if piece is not None:
    keys, images = (jax.lax.dynamic_slice_in_dim(x, *piece, axis=axis) for x, axis in ((keys, 1), (images, 0)))
  rules = ViewRule(jnp.array(config.blur_probability), jnp.array(config.solarize_probability))
  one_view = jax.vmap(lambda k, x, rule: augment_image(k, x, rule, config), in_axes=(0, 0, None))
  return jax.vmap(one_view, in_axes=(0, None, 0))(keys, to_float(images), rules)
