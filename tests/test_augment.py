"""Augmentation against Pillow, colorsys and SciPy, its ranges, its keys and its probabilities."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from lwfedssl_jax.config import AugmentConfig
from lwfedssl_jax.data import augment

OFF = {
    'crop_area': (1.0, 1.0), 'flip_probability': 0.0, 'jitter_probability': 0.0, 'grayscale_probability': 0.0,
    'blur_probability': (0.0, 0.0), 'solarize_probability': (0.0, 0.0)}


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)


@pytest.fixture
def no_aspect(monkeypatch):
  """A crop of the whole area is the whole image only if its aspect ratio is one."""
  monkeypatch.setattr(augment, 'CROP_ASPECT', (1.0, 1.0))


def views_of(images, seed=0, **values):
  """Both views with everything switched off but `values`."""
  config = AugmentConfig(**{**OFF, **values})
  return np.asarray(jax.jit(lambda key, x: augment.two_views(key, x, config))(jax.random.key(seed), images))


# Each operation against an oracle.


@pytest.mark.parametrize(('left', 'top', 'width', 'height', 'flip'), [
    (0, 0, 8, 8, False), (0, 0, 8, 8, True), (2, 1, 5, 6, False), (3, 0, 5, 2, True), (7, 7, 1, 1, False),
    (1, 4, 6, 3, True)])
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


@pytest.mark.parametrize(('offset', 'length'), [(0.0, 8.0), (1.3, 4.2), (0.7, 7.3), (3.6, 0.8)])
def test_fractional_crop_is_linear_interpolation_inside_the_crop(offset, length):
  ramp = jnp.arange(8.0)  # resampling a ramp reads off the positions that are sampled
  actual = augment.crop_matrix(8, jnp.float32(offset), jnp.float32(length), jnp.bool_(False)) @ ramp
  expected = offset + (np.arange(8) + 0.5) * length / 8 - 0.5
  expected = np.clip(expected, offset, max(offset, offset + length - 1))
  np.testing.assert_allclose(actual, expected, atol=1e-5)
  mirrored = augment.crop_matrix(8, jnp.float32(offset), jnp.float32(length), jnp.bool_(True)) @ ramp
  np.testing.assert_allclose(mirrored, expected[::-1], atol=1e-5)


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


@pytest.mark.parametrize('draw', [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize(('index', 'enhance'), list(enumerate(
    [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color])))
def test_jitter_is_pillow_s_enhancement(images, index, enhance, draw):
  strength = [0.0] * 4
  strength[index] = 0.8
  draws = jnp.full(4, 0.5).at[index].set(draw)
  for image in images[:2]:
    actual = augment.jitter(jnp.asarray(image) / 255, tuple(strength), draws)
    expected = enhance(Image.fromarray(image)).enhance(1 + 0.8 * (2 * draw - 1))
    np.testing.assert_allclose(255 * actual, np.asarray(expected, np.float64), atol=2)  # Pillow rounds to integers


def test_jitter_is_brightness_contrast_saturation_hue_in_that_order(images):
  draws, strength = np.array([0.1, 0.8, 0.3, 0.9]), (0.4, 0.5, 0.6, 0.1)
  image = images[1] / 255
  factors = [1 + s * (2 * d - 1) for s, d in zip(strength, draws)]
  luma = lambda x: x @ np.array([0.299, 0.587, 0.114])
  image = np.clip(factors[0] * image, 0, 1)
  image = np.clip(factors[1] * image + (1 - factors[1]) * luma(image).mean(), 0, 1)
  image = np.clip(factors[2] * image + (1 - factors[2]) * luma(image)[..., None], 0, 1)
  expected = augment.shift_hue(jnp.asarray(image, jnp.float32), jnp.float32(0.08))
  actual = augment.jitter(jnp.asarray(images[1]) / 255, strength, jnp.asarray(draws, jnp.float32))
  np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_gray_is_pillow_s(images):
  expected = np.asarray(Image.fromarray(images[0]).convert('L'), np.float64)
  np.testing.assert_allclose(255 * augment.gray(jnp.asarray(images[0]) / 255)[..., 0], expected, atol=1)


@pytest.mark.parametrize('sigma', [0.01, 0.4, 1.0, 2.0])
def test_blur_is_scipy_s_gaussian_filter_with_mirrored_edges(sigma):
  image = np.random.default_rng(0).random((16, 16, 3))
  matrix = augment.blur_matrix(16, jnp.float32(sigma))
  actual = augment.resample(jnp.asarray(image, jnp.float32), matrix, matrix)
  expected = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode='mirror', radius=(15, 15, 0))
  np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_solarize_is_pillow_s():
  ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
  image = np.stack([ramp, ramp[::-1], ramp.T], axis=-1)
  expected = np.asarray(ImageOps.solarize(Image.fromarray(image), threshold=128), np.float64)
  np.testing.assert_allclose(255 * augment.solarize(jnp.asarray(image) / 255), expected, atol=1e-3)


def test_normalize_maps_the_unit_interval_to_minus_one_and_one():
  np.testing.assert_array_equal(augment.normalize(jnp.array([0.0, 0.5, 1.0])), [-1, 0, 1])


# The whole of it.


def test_identity_when_everything_is_off(images, no_aspect):
  views = views_of(images)
  np.testing.assert_allclose(views, np.stack([images, images]) / 255, atol=1e-6)


def test_always_on_is_the_operation(images, no_aspect):
  image = images / 255
  flipped = views_of(images, flip_probability=1.0)
  np.testing.assert_allclose(flipped, np.stack([image, image])[..., ::-1, :], atol=1e-6)
  sigma = 60.0 * 8 / 224  # blur is given in pixels of a 224-pixel image
  views = views_of(images, grayscale_probability=1.0, blur_probability=(1.0, 0.0), blur_sigma=(60.0, 60.0),
                   solarize_probability=(0.0, 1.0))
  luma = np.repeat(image @ np.array([[0.299], [0.587], [0.114]]), 3, axis=-1)
  matrix = np.asarray(augment.blur_matrix(8, jnp.float32(sigma)), np.float64)
  np.testing.assert_allclose(views[0], np.einsum('yh,bhwc,xw->byxc', matrix, luma, matrix), atol=1e-5)
  np.testing.assert_allclose(views[1], np.where(luma >= 0.5, 1 - luma, luma), atol=1e-5)


def test_blur_comes_before_solarization(images, no_aspect):
  views = views_of(images, blur_probability=(1.0, 1.0), blur_sigma=(60.0, 60.0), solarize_probability=(1.0, 1.0))
  blurred = views_of(images, blur_probability=(1.0, 1.0), blur_sigma=(60.0, 60.0))
  np.testing.assert_allclose(views, np.where(blurred >= 0.5, 1 - blurred, blurred), atol=1e-6)


STRONG = {
    'crop_area': (0.08, 1.0), 'flip_probability': 0.5, 'jitter_probability': 0.9,
    'jitter_strength': (1.0, 1.0, 1.0, 0.5), 'grayscale_probability': 0.3, 'blur_probability': (0.7, 0.7),
    'solarize_probability': (0.5, 0.5)}


@functools.cache
def strong_views():
  """Augments black, white, gray, primary colours and noise, 40 times over."""
  flat = [np.full((8, 8, 3), colour) for colour in
          [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]]
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


@pytest.mark.parametrize(('name', 'value'), [
    ('flip_probability', 0.3), ('jitter_probability', 0.6), ('grayscale_probability', 0.2),
    ('blur_probability', (0.7, 0.1)), ('solarize_probability', (0.0, 0.4))])
def test_probabilities(name, value, no_aspect):
  """A share of 2000 images has a standard deviation of at most 0.011; changed images are counted."""
  image = np.random.default_rng(1).integers(0, 256, (1, 4, 4, 3)).astype(np.uint8)
  views = views_of(np.repeat(image, 2000, axis=0), **{name: value}, blur_sigma=(60.0, 60.0))
  changed = np.abs(views - image / 255).max(axis=(2, 3, 4)) > 1e-4
  np.testing.assert_allclose(changed.mean(axis=1), value, atol=0.045)
  if changed.any(axis=1).all() and not isinstance(value, tuple):
    both = (changed[0] & changed[1]).mean()
    assert abs(both - value ** 2) < 0.045  # the two views decide independently


def test_crops_have_the_area_aspect_and_place_asked_for():
  """Red is a ramp along x and green along y, so a crop's corners can be read off it."""
  size = 32
  ramp = np.arange(size) * 8
  image = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], 0), axis=-1).astype(np.uint8)
  views = views_of(np.repeat(image[None], 1000, axis=0), crop_area=(0.2, 0.6)) * 255 / 8
  left, top = views[:, :, 0, 0, 0], views[:, :, 0, 0, 1]
  width, height = views[:, :, 0, -1, 0] - left + 1, views[:, :, -1, 0, 1] - top + 1
  area, ratio = width * height / size ** 2, width / height
  assert 0.199 < area.min() < 0.22 and 0.58 < area.max() < 0.601
  assert abs(area.mean() - 0.4) < 0.01
  assert 0.749 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.334
  assert abs(np.log(ratio).mean()) < 0.02
  for start, length in ((left, width), (top, height)):
    share = start / (size - length)  # uniform
    assert share.min() > -1e-3 and share.max() < 1.001
    assert abs(share.mean() - 0.5) < 0.03 and abs(share.std() - 12 ** -0.5) < 0.02
  assert abs(np.corrcoef(left[0], left[1])[0, 1]) < 0.12
