"""RandAugment's operations against Pillow's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from lwfedssl_jax.data import randaugment

LEVEL = 1 / 255
MAGNITUDE = 9
STRENGTH = MAGNITUDE / 30
FACTOR = 0.9 * STRENGTH


@pytest.fixture(scope='module')
def pixels():
  generator = np.random.default_rng(0)
  smooth = generator.integers(20, 200, (4, 4, 3)).astype(np.uint8)
  picture = Image.fromarray(smooth).resize((24, 24), Image.Resampling.BICUBIC)
  return np.clip(np.asarray(picture) + generator.integers(-20, 20, (24, 24, 3)), 0, 255).astype(np.uint8)


def apply(kind, pixels, sign=1.0):
  return np.asarray(jax.jit(randaugment.operate)(pixels / np.float32(255), jnp.int32(kind), jnp.float32(sign)))


def pillow(kind, image, sign):
  factor = 1 + FACTOR * sign
  return {
      6: lambda: ImageEnhance.Brightness(image).enhance(factor),
      7: lambda: ImageEnhance.Color(image).enhance(factor),
      8: lambda: ImageEnhance.Contrast(image).enhance(factor),
      9: lambda: ImageEnhance.Sharpness(image).enhance(factor),
      10: lambda: ImageOps.posterize(image, 8 - round(MAGNITUDE * 4 / 30)),
      11: lambda: ImageOps.solarize(image, math.ceil(255 * (1 - STRENGTH))),
      12: lambda: ImageOps.autocontrast(image),
      13: lambda: ImageOps.equalize(image),
  }[kind]()


@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize('kind', range(6, 14))
def test_colour_operations_are_pillow_s(pixels, kind, sign):
  expected = np.asarray(pillow(kind, Image.fromarray(pixels), sign)) / 255
  found = apply(kind, pixels, sign)
  assert np.abs(found - expected).max() <= 2.01 * LEVEL  # Pillow rounds each step to a level
  if kind not in (10, 13):
    assert np.abs(found - pixels / 255).max() > 3 * LEVEL  # and something happened


@pytest.mark.parametrize(('kind', 'matrix'), [
    (1, (1, 0.3 * STRENGTH, 0, 0, 1, 0)),
    (2, (1, 0, 0, 0.3 * STRENGTH, 1, 0)),
    (3, (1, 0, -150 / 331 * 24 * STRENGTH, 0, 1, 0)),
    (4, (1, 0, 0, 0, 1, -150 / 331 * 24 * STRENGTH)),
])
def test_shears_and_translations_are_pillow_s_affine_maps(pixels, kind, matrix):
  a, b, c, d, e, f = matrix
  centre = 12  # Pillow maps pixel centres, x + 0.5
  moved = (a, b, c + centre - a * centre - b * centre, d, e, f + centre - d * centre - e * centre)
  expected = np.asarray(Image.fromarray(pixels).transform((24, 24), Image.Transform.AFFINE, moved,
                                                         Image.Resampling.BILINEAR)) / 255
  inside = (slice(8, 16), slice(8, 16))  # at the border Pillow rounds whether a point is inside
  np.testing.assert_allclose(apply(kind, pixels)[inside], expected[inside], atol=2 * LEVEL)


def test_rotation_is_pillow_s(pixels):
  expected = np.asarray(Image.fromarray(pixels).rotate(30 * STRENGTH, Image.Resampling.BILINEAR)) / 255
  inside = (slice(6, 18), slice(6, 18))
  rotated = {sign: apply(5, pixels, sign)[inside] for sign in (1, -1)}
  nearest = min(rotated, key=lambda sign: np.abs(rotated[sign] - expected[inside]).max())
  np.testing.assert_allclose(rotated[nearest], expected[inside], atol=2 * LEVEL)
  assert np.abs(rotated[-nearest] - expected[inside]).max() > 0.05


def test_constant_image_survives_autocontrast_and_equalize():
  gray = np.full((8, 8, 3), 77, np.uint8)
  for kind in (0, 12, 13):
    np.testing.assert_allclose(apply(kind, gray), gray / 255, atol=1e-6)


def test_batch_is_drawn_image_by_image_and_by_key(pixels):
  batch = np.stack([pixels] * 32)
  found = np.asarray(jax.jit(randaugment.rand_augment)(jax.random.key(0), batch))
  assert found.shape == (32, 24, 24, 3) and found.min() >= 0 and found.max() <= 1 + 1e-6
  assert len({image.tobytes() for image in found}) > 20
  again = np.asarray(jax.jit(randaugment.rand_augment)(jax.random.key(0), batch))
  np.testing.assert_array_equal(found, again)
  other = np.asarray(jax.jit(randaugment.rand_augment)(jax.random.key(1), batch))
  assert np.abs(found - other).max() > 0.1


def test_mirror_only_with_its_probability(pixels):
  identity = lambda flip: np.asarray(jax.jit(jax.vmap(
      lambda key: randaugment.rand_augment(key, jnp.asarray(pixels)[None], flip)[0]))(
          jax.random.split(jax.random.key(0), 64)))
  mirrored = pixels[:, ::-1] / 255
  same = lambda images, target: sum(np.abs(image - target).max() < 1e-5 for image in images)
  assert same(identity(0.0), mirrored) == 0
  assert same(identity(1.0), pixels / 255) == 0
