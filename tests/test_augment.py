"""Augmentation against Pillow, colorsys, SciPy and NumPy, its ranges, its keys and its probabilities."""

import colorsys
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from lwfedssl_jax.config_groups import AugmentConfig
from lwfedssl_jax.data import augment, randaugment
from lwfedssl_jax.errors import UsageError
from tests.reference import naive_augment

OFF = {
  'crop_area': (1.0, 1.0),
  'flip_probability': 0.0,
  'jitter_probability': 0.0,
  'grayscale_probability': 0.0,
  'blur_probability': (0.0, 0.0),
  'solarize_probability': (0.0, 0.0),
}


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)


def views_of(images, seed=0, **values):
  """Both views with everything switched off but `values`."""
  config = AugmentConfig(**{**OFF, **values})
  return np.asarray(jax.jit(lambda key, x: augment.two_views(key, x, config))(jax.random.key(seed), images))


# Each operation against an oracle.


@pytest.mark.parametrize(
  ('left', 'top', 'width', 'height', 'flip'),
  [
    (0, 0, 8, 8, False),
    (0, 0, 8, 8, True),
    (2, 1, 5, 6, False),
    (3, 0, 5, 2, True),
    (7, 7, 1, 1, False),
    (1, 4, 6, 3, True),
  ],
)
def test_crop_is_pillow_s_crop_and_bilinear_resize(images, left, top, width, height, flip):
  image = images[0].astype(np.float32) / 255
  rows = augment.crop_matrix(8, jnp.float32(top), jnp.float32(height), jnp.bool_(False))
  columns = augment.crop_matrix(8, jnp.float32(left), jnp.float32(width), jnp.bool_(flip))
  actual = augment.resample(jnp.asarray(image), rows, columns)
  for channel in range(3):
    pillow = Image.fromarray(image[..., channel]).crop((left, top, left + width, top + height))
    pillow = pillow.resize((8, 8), Image.Resampling.BILINEAR)
    pillow = ImageOps.mirror(pillow) if flip else pillow
    np.testing.assert_allclose(actual[..., channel], np.asarray(pillow), atol=1e-5)


@pytest.mark.parametrize('turns', [-0.5, -0.1, 0.0, 0.1, 0.37, 0.5])
def test_hue_is_colorsys(images, turns):
  corners = np.array(np.meshgrid([0, 128, 255], [0, 128, 255], [0, 128, 255])).T.reshape(-1, 3)  # ties and grays too
  pixels = np.concatenate([images.reshape(-1, 3), corners]) / 255
  expected = []
  for red, green, blue in pixels:
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    expected.append(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value))
  actual = augment.shift_hue(jnp.asarray(pixels, jnp.float32)[None], jnp.float32(turns))[0]
  np.testing.assert_allclose(actual, expected, atol=1e-5)


FIXED = jnp.arange(4)  # an order: brightness, contrast, saturation, hue


@pytest.mark.parametrize('factor', [0.2, 0.68, 1.0, 1.78])
@pytest.mark.parametrize(
  ('index', 'enhance'), list(enumerate([ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]))
)
def test_jitter_is_pillow_s_enhancement(images, index, enhance, factor):
  factors = jnp.array([1.0, 1.0, 1.0, 0.0]).at[index].set(factor)
  for image in images[:2]:
    actual = augment.jitter(jnp.asarray(image) / 255, factors, FIXED)
    expected = enhance(Image.fromarray(image)).enhance(factor)
    np.testing.assert_allclose(255 * actual, np.asarray(expected, np.float64), atol=2)  # Pillow rounds to integers


def test_jitter_follows_each_of_the_24_orders(images):
  """The contrast's mean is that of the image which the operations before it have made."""
  factors, image = (0.6, 1.6, 1.5, 0.3), images[1] / 255
  orders = jnp.array(augment.JITTER_ORDERS)
  jittered = jax.jit(jax.vmap(augment.jitter, in_axes=(None, None, 0)))
  actual = np.asarray(jittered(jnp.asarray(image, jnp.float32), jnp.array(factors), orders))
  expected = np.stack(
    [naive_augment.jitter(image, dict(zip('BCSH', factors)), ['BCSH'[i] for i in order]) for order in orders]
  )
  np.testing.assert_allclose(actual, expected, atol=2e-6)
  assert len(np.unique(expected.round(4), axis=0)) > 12  # orders differ on this image, but for those that commute


def test_an_enhancement_by_one_changes_no_bit(images):
  image = jnp.asarray(images[0], jnp.float32) / 255
  for operation in range(3):
    np.testing.assert_array_equal(augment.enhance(image, jnp.int32(operation), jnp.float32(1)), image)


def test_gray_is_pillow_s(images):
  expected = np.asarray(Image.fromarray(images[0]).convert('L'), np.float64)
  np.testing.assert_allclose(255 * augment.gray(jnp.asarray(images[0]) / 255)[..., 0], expected, atol=1)


@pytest.mark.parametrize(
  ('size', 'sigma', 'support'),
  [
    (16, 0.01, 3),
    (16, 0.4, 3),
    (32, 1.0, 3),
    (32, 2.0, 7),
    (64, 2.0, 7),
    (16, 2.0, 31),
    (5, 3.0, 9),
    (4, 3.0, 23),
    (2, 1.0, 5),
    (1, 1.0, 3),
  ],
)
def test_blur_is_scipy_s_and_numpy_s_with_a_limited_support_and_mirrored_edges(size, sigma, support):
  image = np.random.default_rng(0).random((size, size, 3))
  matrix = augment.blur_matrix(size, jnp.float32(sigma), support)
  actual = augment.resample(jnp.asarray(image, jnp.float32), matrix, matrix)
  radius = support // 2
  expected = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode='mirror', radius=(radius, radius, 0))
  np.testing.assert_allclose(actual, expected, atol=1e-6)
  np.testing.assert_allclose(actual, naive_augment.blur(image, sigma, support), atol=1e-6)


def test_sigma_is_in_pixels_of_the_image_whatever_its_size():
  for size in (16, 32, 224):
    row = augment.blur_matrix(size, jnp.float32(1.0), 5)[size // 2]
    weights = np.exp([-2, -0.5, 0, -0.5, -2])
    np.testing.assert_allclose(row[size // 2 - 2 : size // 2 + 3], weights / weights.sum(), atol=1e-6)
    np.testing.assert_allclose(row.sum(), 1, atol=1e-6)


def test_kernel_is_a_tenth_of_the_side_unless_given():
  sides = [augment.blur_support(AugmentConfig(), size) for size in (8, 16, 32, 39, 40, 64, 96, 224)]
  assert sides == [3, 3, 3, 3, 5, 7, 9, 23]
  assert sides == [naive_augment.kernel_side(AugmentConfig(), size) for size in (8, 16, 32, 39, 40, 64, 96, 224)]
  assert augment.blur_support(AugmentConfig(blur_kernel_size=11), 32) == 11
  with pytest.raises(UsageError, match='--blur_kernel_size: expected an odd number or 0, got 4'):
    AugmentConfig(blur_kernel_size=4)


def test_solarize_is_pillow_s():
  ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
  image = np.stack([ramp, ramp[::-1], ramp.T], axis=-1)
  expected = np.asarray(ImageOps.solarize(Image.fromarray(image), threshold=128), np.float64)
  np.testing.assert_allclose(255 * augment.solarize(jnp.asarray(image) / 255), expected, atol=1e-3)


def test_normalize_maps_the_unit_interval_to_minus_one_and_one():
  np.testing.assert_array_equal(augment.normalize(jnp.array([0.0, 0.5, 1.0])), [-1, 0, 1])


# The whole of it.


def test_identity_when_everything_is_off(images):
  views = views_of(images)
  np.testing.assert_allclose(views, np.stack([images, images]) / 255, atol=1e-6)


@pytest.mark.parametrize(
  'values',
  [
    {'jitter_probability': 0.5},
    {'grayscale_probability': 0.5},
    {'blur_probability': (0.0, 0.5)},
    {'solarize_probability': (0.0, 0.5)},
  ],
)
def test_what_has_no_probability_is_not_in_the_program(images, values):
  def size(config):
    return len(str(jax.make_jaxpr(lambda key: augment.two_views(key, jnp.asarray(images), config))(jax.random.key(0))))

  assert size(AugmentConfig(**OFF)) < size(AugmentConfig(**{**OFF, **values}))


def test_always_on_is_the_operation(images):
  image = images / 255
  flipped = views_of(images, flip_probability=1.0)
  np.testing.assert_allclose(flipped, np.stack([image, image])[..., ::-1, :], atol=1e-6)
  views = views_of(
    images,
    grayscale_probability=1.0,
    blur_probability=(1.0, 0.0),
    blur_sigma=(2.0, 2.0),
    blur_kernel_size=5,
    solarize_probability=(0.0, 1.0),
  )
  luma = np.repeat(image @ np.array([[0.299], [0.587], [0.114]]), 3, axis=-1)
  matrix = np.asarray(augment.blur_matrix(8, jnp.float32(2.0), 5), np.float64)
  np.testing.assert_allclose(views[0], np.einsum('yh,bhwc,xw->byxc', matrix, luma, matrix), atol=1e-5)
  np.testing.assert_allclose(views[1], np.where(luma >= 0.5, 1 - luma, luma), atol=1e-5)


def test_blur_comes_before_solarization(images):
  views = views_of(images, blur_probability=(1.0, 1.0), blur_sigma=(2.0, 2.0), solarize_probability=(1.0, 1.0))
  blurred = views_of(images, blur_probability=(1.0, 1.0), blur_sigma=(2.0, 2.0))
  np.testing.assert_allclose(views, np.where(blurred >= 0.5, 1 - blurred, blurred), atol=1e-6)


STRONG = {
  'crop_area': (0.08, 1.0),
  'flip_probability': 0.5,
  'jitter_probability': 0.9,
  'jitter_strength': (1.0, 1.0, 1.0, 0.5),
  'grayscale_probability': 0.3,
  'blur_probability': (0.7, 0.7),
  'solarize_probability': (0.5, 0.5),
}


@functools.cache
def strong_views():
  """Augments black, white, gray, primary colors and noise, 40 times over."""
  flat = [
    np.full((8, 8, 3), color)
    for color in [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
  ]
  noise = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3))
  images = np.concatenate([np.stack(flat), noise]).astype(np.uint8)
  return views_of(np.tile(images, (40, 1, 1, 1)), **STRONG).reshape(2, 40, 8, 8, 8, 3)


def test_views_stay_finite_and_within_the_unit_interval_up_to_rounding():
  views = strong_views()
  assert np.isfinite(views).all()
  assert views.min() >= -1e-6 and views.max() <= 1 + 1e-6


def test_views_of_one_image_differ():
  noise = strong_views()[:, :, -1].reshape(80, -1)
  assert len(np.unique(noise.round(4), axis=0)) == 80


def test_a_view_does_not_depend_on_the_other_images(images):
  other = images.copy()
  other[[0, 2, 3, 4, 5]] = 255 - images[[0, 2, 3, 4, 5]]
  here, there = views_of(images, **STRONG), views_of(other, **STRONG)
  np.testing.assert_array_equal(here[:, 1], there[:, 1])
  assert np.abs(here[:, 0] - there[:, 0]).max() > 0.01


def test_equal_images_get_different_views_and_a_key_repeats():
  same = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3)), 4, axis=0).astype(np.uint8)
  views = views_of(same, **STRONG)
  assert np.abs(views[:, 0] - views[:, 1]).max() > 0.01
  np.testing.assert_array_equal(views, views_of(same, **STRONG))
  assert np.abs(views - views_of(same, seed=1, **STRONG)).max() > 0.01


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('flip_probability', 0.3),
    ('jitter_probability', 0.6),
    ('grayscale_probability', 0.2),
    ('blur_probability', (0.7, 0.1)),
    ('solarize_probability', (0.0, 0.4)),
  ],
)
def test_probabilities(name, value):
  """A share of 2000 images has a standard deviation of at most 0.011; changed images are counted."""
  image = np.random.default_rng(1).integers(0, 256, (1, 4, 4, 3)).astype(np.uint8)
  views = views_of(np.repeat(image, 2000, axis=0), **{name: value}, blur_sigma=(2.0, 2.0))
  changed = np.abs(views - image / 255).max(axis=(2, 3, 4)) > 1e-4
  np.testing.assert_allclose(changed.mean(axis=1), value, atol=0.045)
  if changed.any(axis=1).all() and not isinstance(value, tuple):
    both = (changed[0] & changed[1]).mean()
    assert abs(both - value**2) < 0.045  # the two views decide independently


@pytest.mark.parametrize(
  ('size', 'values'),
  [(8, STRONG), (20, {}), (9, {**STRONG, 'blur_kernel_size': 21, 'blur_sigma': (0.5, 4.0)})],
  ids=['strong', 'defaults', 'kernel beyond the edges'],
)
def test_views_are_numpy_s(size, values):
  """Same keys, same uniform numbers; all else is written anew in `naive_augment`, in float64."""
  images = np.random.default_rng(2).integers(0, 256, (12, size, size, 3)).astype(np.uint8)
  images[:2] //= 64  # nearly black
  images[2:4, ..., 1:] //= 4  # strong colors, so that jitter is clipped
  config, key = AugmentConfig(**values), jax.random.key(5)
  actual = jax.jit(lambda key, x: augment.two_views(key, x, config))(key, images)
  np.testing.assert_allclose(actual, naive_augment.two_views(key, images, config), atol=1e-5)


@pytest.mark.parametrize(
  'function',
  [lambda key, x: augment.two_views(key, x, AugmentConfig()), randaugment.rand_augment],
  ids=['two_views', 'rand_augment'],
)
def test_every_product_asks_for_full_precision(function):
  """A TPU rounds the operands of a product to bfloat16 otherwise, 8 bits, about one gray level."""
  program = jax.jit(function).lower(jax.random.key(0), np.zeros((2, 8, 8, 3), np.uint8)).as_text()
  products = [line for line in program.splitlines() if re.search(r'stablehlo\.(dot|dot_general|convolution)\b', line)]
  assert len(products) >= 4
  for line in products:
    assert len(re.findall(r'\bHIGHEST\b', line)) == 2, line
