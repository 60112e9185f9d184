"""RandAugment (arXiv 1909.13719) on the device: pure functions on one square float image (S, S, 3) in [0, 1].

Fourteen operations with torchvision's strengths. The five geometric ones share one affine resampling per draw: under
vmap every image is resampled once per draw, for any operation.
"""

import jax
import jax.numpy as jnp

from lwfedssl_jax.base import Array, Float, Integer, Key, Number, UInt8
from lwfedssl_jax.data import augment

Image = Float[Array, 'S S 3']
NUM_OPERATIONS = 2  # drawn an image
MAGNITUDE = 9  # of 30
MAX_MAGNITUDE = 30


def affine(image: Image, matrix: Float[Array, '2 3']) -> Image:
  """Resamples bilinearly; black outside.

  Args:
    image: the input.
    matrix: output (x, y, 1), in pixels from the center -> input (x, y).
  """
  size = image.shape[0]
  centered = jnp.arange(size) - (size - 1) / 2
  y, x = jnp.meshgrid(centered, centered, indexing='ij')
  grid = jnp.stack([x, y, jnp.ones_like(x)])
  source = jnp.einsum('ij,jhw->ihw', matrix, grid, precision=augment.HIGHEST) + (size - 1) / 2

  def sample(channel):
    return jax.scipy.ndimage.map_coordinates(channel, [source[1], source[0]], order=1)

  return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)


def autocontrast(image: Image) -> Image:
  """Stretches each channel to [0, 1]; a constant channel stays."""
  low, high = image.min((0, 1)), image.max((0, 1))
  return jnp.where(high > low, (image - low) / jnp.where(high > low, high - low, 1), image)


def equalize(image: Image) -> Image:
  """Equalizes each channel's histogram of 256 levels, as Pillow does."""

  def one(channel: Float[Array, 'S S']) -> Float[Array, 'S S']:
    levels = jnp.round(channel * 255).astype(jnp.int32)
    counts = jnp.zeros(256, jnp.int32).at[levels.ravel()].add(1)
    last = counts[255 - jnp.argmax(counts[::-1] > 0)]
    step = (counts.sum() - last) // 255
    table = jnp.clip((jnp.cumsum(counts) - counts + step // 2) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, table[levels] / 255, channel)

  return jax.vmap(one, in_axes=-1, out_axes=-1)(image)


def posterize(image: Image, bits: Integer) -> Image:
  """Keeps the highest `bits` of 8."""
  levels = jnp.round(image * 255).astype(jnp.int32)
  dropped = 8 - bits
  return ((levels >> dropped) << dropped) / 255


def sharpness(image: Image, factor: Number) -> Image:
  """Blends with a 3 x 3 smoothing; the border of one pixel stays."""
  kernel = jnp.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], image.dtype) / 13

  def convolve(channel):
    return jax.scipy.signal.convolve2d(channel, kernel, 'valid', precision=augment.HIGHEST)

  smooth = jax.vmap(convolve, in_axes=-1, out_axes=-1)(image)
  return augment.blend(image, image.at[1:-1, 1:-1].set(smooth), factor)


def _matrices(strength: Number, sign: Number, size: int) -> Float[Array, '6 2 3']:
  """Affine matrices of identity, shear x and y, translation x and y, rotation, strength in [0, 1]."""
  shear, shift = 0.3 * strength * sign, 150 / 331 * size * strength * sign
  angle = jnp.deg2rad(30 * strength * sign)
  zero, one, cos, sin = 0 * strength, 1 + 0 * strength, jnp.cos(angle), jnp.sin(angle)
  rows = [
    [one, zero, zero, zero, one, zero],
    [one, shear, zero, zero, one, zero],
    [one, zero, zero, shear, one, zero],
    [one, zero, -shift, zero, one, zero],
    [one, zero, zero, zero, one, -shift],
    [cos, sin, zero, -sin, cos, zero],
  ]
  return jnp.array(rows).reshape(6, 2, 3)


NUM_KINDS = 14


def operate(image: Image, kind: Integer, sign: Number, magnitude: float = MAGNITUDE) -> Image:
  """Applies one operation.

  Args:
    image: in [0, 1].
    kind: 0 identity, 1 to 5 geometric (see `_matrices`), then brightness, color, contrast, sharpness, posterize,
      solarize, autocontrast, equalize.
    sign: +1 or -1, the direction of geometry and the four enhancements.
    magnitude: 0 to 30.
  """
  strength = jnp.float32(magnitude / MAX_MAGNITUDE)
  factor = 1 + 0.9 * strength * sign
  gray = augment.gray(image)
  bits = 8 - jnp.round(magnitude * 4 / MAX_MAGNITUDE).astype(jnp.int32)
  operations = [
    lambda: affine(image, _matrices(strength, sign, image.shape[0])[jnp.minimum(kind, 5)]),
    lambda: augment.blend(image, jnp.zeros_like(image), factor),
    lambda: augment.blend(image, gray, factor),
    lambda: augment.blend(image, gray.mean(), factor),
    lambda: sharpness(image, factor),
    lambda: posterize(image, bits),
    lambda: jnp.where(image >= 1 - strength, 1 - image, image),
    lambda: autocontrast(image),
    lambda: equalize(image),
  ]
  return jax.lax.switch(jnp.maximum(kind - 5, 0), operations)


def rand_augment(key: Key, images: UInt8[Array, 'B S S 3'], flip_probability: float = 0.5) -> Float[Array, 'B S S 3']:
  """Mirrors images at random and applies two random operations to each.

  Args:
    key: the step's.
    images: of a batch.
    flip_probability: of a horizontal flip.

  Returns:
    The batch in [0, 1], float32.
  """

  def one(key: Key, image: Image) -> Image:
    flip_key, kind_key, sign_key = jax.random.split(key, 3)
    image = jnp.where(jax.random.uniform(flip_key) < flip_probability, image[:, ::-1], image)
    kinds = jax.random.randint(kind_key, (NUM_OPERATIONS,), 0, NUM_KINDS)
    signs = jax.random.rademacher(sign_key, (NUM_OPERATIONS,), jnp.float32)
    for kind, sign in zip(kinds, signs):
      image = operate(image, kind, sign)
    return image

  return jax.vmap(one)(jax.random.split(key, len(images)), augment.to_float(images))
