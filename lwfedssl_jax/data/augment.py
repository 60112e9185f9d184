"""Two-view augmentation on the device: pure functions on square float images (H, W, 3) in [0, 1].

Random resized crop, color jitter, grayscale, Gaussian blur, solarize and horizontal flip by torchvision's rules, with
MoCo v3's strengths (arXiv 2104.02057). One key per image and view. The crop (with the flip) and the blur are linear
along each side, so each is a pair of small matrices.

A view consumes NUM_DRAWS uniform numbers of its key: 0-9 areas of ten candidate crops, 10-19 their aspect ratios,
20 top, 21 left, 22 flip, 23-26 brightness, contrast, saturation and hue, 27 the order of these four, 28 jitter,
29 gray, 30 sigma, 31 blur, 32 solarization.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax.base import Array, Bool, Float, Int, Integer, Key, Number, UInt8
from lwfedssl_jax.config_groups import AugmentConfig

NUM_DRAWS = 33
CROP_TRIES = 10
CROP_ASPECT = (3 / 4, 4 / 3)  # width / height
GRAY_WEIGHTS = (0.299, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
JITTER_ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
Image = Float[Array, 'H W C']
HIGHEST = jax.lax.Precision.HIGHEST  # a TPU otherwise rounds the operands of a product to bfloat16


def to_float(images: UInt8[Array | np.ndarray, '... H W C']) -> Float[Array, '... H W C']:
  """uint8 -> float32 in [0, 1]."""
  return jnp.asarray(images).astype(jnp.float32) / 255


def normalize(images: Float[Array | np.ndarray, '...']) -> Float[Array, '...']:
  """Normalizes floats in [0, 1] by mean 0.5 and standard deviation 0.5, to [-1, 1]."""
  return (jnp.asarray(images) - 0.5) / 0.5


def crop_matrix(size: int, offset: Number, length: Number, flip: Bool[Array, '']) -> Float[Array, '{size} {size}']:
  """Bilinear resampling of pixels offset .. offset + length - 1 to `size` pixels, mirrored if `flip`.

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


def blur_matrix(size: int, sigma: Number, support: int) -> Float[Array, '{size} {size}']:
  """Gaussian blur along one side, torchvision's.

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
  return sum(weights[i] * (mirrored[i : i + size, None] == jnp.arange(size)) for i in range(support))


def resample(image: Image, rows: Float[Array, 'H H'], columns: Float[Array, 'W W']) -> Image:
  """Applies one matrix along each side of an image."""
  return jnp.einsum('yh,hwc,xw->yxc', rows, image, columns, precision=HIGHEST)


def gray(image: Float[Array, 'H W 3']) -> Float[Array, 'H W 1']:
  """Luma."""
  return jnp.asarray(sum(weight * image[..., i : i + 1] for i, weight in enumerate(GRAY_WEIGHTS)))


def blend(image: Image, other: Float[Array, '...'], factor: Number) -> Image:
  """Factor * image + (1 - factor) * other (broadcast), clipped to [0, 1]; a factor of 1 changes no bit."""
  return jnp.clip(image + (1 - factor) * (other - image), 0, 1)


def shift_hue(image: Float[Array, 'H W 3'], shift: Number) -> Float[Array, 'H W 3']:
  """Turns the hue by a share of a full circle, in HSV."""
  red, green, blue = image[..., 0], image[..., 1], image[..., 2]
  value, low = image.max(-1), image.min(-1)
  chroma = value - low
  safe = jnp.where(chroma > 0, chroma, 1)
  # Compared with each other, not with `value`: a compiler that computes a channel twice, once for its maximum, may
  # round it twice, and no channel would be the largest.
  is_red, is_green = (red >= green) & (red >= blue), green >= blue
  after_green = jnp.where(is_green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
  sextant = jnp.where(is_red, (green - blue) / safe, after_green) + 6 * shift

  def channel(n):
    return n + sextant - 6 * jnp.floor((n + sextant) / 6)  # a remainder, by cheaper operations than %

  def ramp(k):
    return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

  return jnp.stack([ramp(channel(n)) for n in (5.0, 3.0, 1.0)], axis=-1)


def enhance(image: Float[Array, 'H W 3'], operation: Integer, factor: Number) -> Float[Array, 'H W 3']:
  """Brightness, contrast or saturation, by a factor."""
  luma = gray(image)
  other = jnp.where(operation == CONTRAST, luma.mean(), jnp.where(operation == SATURATION, luma, 0))
  return blend(image, other, factor)


def jitter(image: Float[Array, 'H W 3'], factors: Float[Array, '4'], order: Int[Array, '4']) -> Float[Array, 'H W 3']:
  """Brightness, contrast, saturation and hue, in any order.

  The hue is shifted once. Each of the other three runs once before and once after it; one of the two factors is 1.

  Args:
    image: in [0, 1].
    factors: of brightness, contrast and saturation, and the hue's turn in shares of a full circle.
    order: the four operations, the first one first.
  """
  place = jnp.argmax(order == HUE)
  others = jnp.where(jnp.arange(3) < place, order[:3], order[1:])
  for after in (False, True):
    for index in range(3):
      factor = jnp.where((index >= place) == after, factors[others[index]], 1)
      image = enhance(image, others[index], factor)
    image = image if after else shift_hue(image, factors[HUE])
  return image


def solarize(image: Image) -> Image:
  """Inverts values of at least 0.5."""
  return jnp.where(image >= 0.5, 1 - image, image)


class ViewRule(NamedTuple):
  """The parameters that differ between the two views: probabilities of blur and solarization."""

  blur_probability: Number
  solarize_probability: Number


class ViewParams(NamedTuple):
  """The random parameters of one view of one image."""

  box: Float[Array, '4']  # whole numbers of pixels: top, left, height, width
  flips: Bool[Array, '']
  jitters: Bool[Array, '']
  factors: Float[Array, '4']  # of brightness, contrast, saturation; the hue's turn
  order: Int[Array, '4']  # the jitter's operations, the first one first
  is_gray: Bool[Array, '']
  blurs: Bool[Array, '']
  sigma: Float[Array, '']  # pixels
  solarizes: Bool[Array, '']


def between(draws: Float[Array, '...'], bounds: tuple[float, float]) -> Float[Array, '...']:
  """Uniform numbers in [0, 1) -> uniform numbers within the bounds."""
  return bounds[0] + draws * (bounds[1] - bounds[0])


def crop_box(draws: Float[Array, '22'], size: int, area: tuple[float, float]) -> Float[Array, '4']:
  """Draws a crop as torchvision's RandomResizedCrop: the first of ten candidates that fits, else the whole image.

  Args:
    draws: uniform numbers in [0, 1), the first of the module's layout.
    size: side of the image, pixels.
    area: minimum and maximum share of the area.

  Returns:
    Whole numbers of pixels, float32: top, left, height, width.
  """
  areas, ratios, offsets = jnp.split(draws, (CROP_TRIES, 2 * CROP_TRIES))
  areas = size**2 * between(areas, area)
  ratios = jnp.exp(between(ratios, (math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1]))))
  sides = jnp.round(jnp.sqrt(areas * jnp.stack([1 / ratios, ratios])))
  fits = ((sides > 0) & (sides <= size)).all(axis=0)
  sides = jnp.where(fits.any(), sides[:, jnp.argmax(fits)], size)
  return jnp.concatenate([jnp.floor(offsets * (size - sides + 1)), sides])


def draw_view(key: Key, size: int, rule: ViewRule, config: AugmentConfig) -> ViewParams:
  """Draws the parameters of one view of an image of side `size`, pixels; one key per image and view."""
  draw = jax.random.uniform(key, (NUM_DRAWS,))
  offsets = jnp.array(config.jitter_strength) * (2 * draw[23:27] - 1)
  return ViewParams(
    box=crop_box(draw[:22], size, config.crop_area),
    flips=draw[22] < config.flip_probability,
    jitters=draw[28] < config.jitter_probability,
    factors=jnp.array([1, 1, 1, 0]) + offsets,
    order=jnp.array(JITTER_ORDERS)[(draw[27] * len(JITTER_ORDERS)).astype(jnp.int32)],
    is_gray=draw[29] < config.grayscale_probability,
    blurs=draw[31] < rule.blur_probability,
    sigma=between(draw[30], config.blur_sigma),
    solarizes=draw[32] < rule.solarize_probability,
  )


def apply_view(image: Float[Array, 'S S 3'], view: ViewParams, config: AugmentConfig) -> Float[Array, 'S S 3']:
  """Makes a view of one square image in [0, 1]; what has no probability in `config` is not computed."""
  size = image.shape[0]
  top, left, height, width = view.box
  rows, columns = crop_matrix(size, top, height, jnp.bool_(False)), crop_matrix(size, left, width, view.flips)
  image = jnp.clip(resample(image, rows, columns), 0, 1)
  if config.jitter_probability:
    image = jnp.where(view.jitters, jitter(image, view.factors, view.order), image)
  if config.grayscale_probability:
    image = jnp.where(view.is_gray, gray(image), image)
  if any(config.blur_probability):
    blur = blur_matrix(size, view.sigma, blur_support(config, size))
    image = jnp.where(view.blurs, resample(image, blur, blur), image)
  if any(config.solarize_probability):
    image = jnp.where(view.solarizes, solarize(image), image)
  return image


def two_views(
  key: Key, images: UInt8[Array, 'N S S 3'], config: AugmentConfig, piece: tuple[Integer, int] | None = None
) -> Float[Array, '2 B S S 3']:
  """Draws both views of a batch.

  Args:
    key: the step's; each view of each image gets its own from it.
    images: of the full batch.
    config: probabilities and strengths.
    piece: (first, count): a slice of B of the N images, identical to that slice of the full batch.

  Returns:
    Views in [0, 1], float32.
  """
  keys = jax.random.split(key, (2, images.shape[0]))
  if piece is not None:
    keys, images = (jax.lax.dynamic_slice_in_dim(x, *piece, axis=axis) for x, axis in ((keys, 1), (images, 0)))
  rules = ViewRule(jnp.array(config.blur_probability), jnp.array(config.solarize_probability))
  size = images.shape[1]
  one_view = jax.vmap(lambda k, x, rule: apply_view(x, draw_view(k, size, rule, config), config), in_axes=(0, 0, None))
  return jax.vmap(one_view, in_axes=(0, None, 0))(keys, to_float(images), rules)
