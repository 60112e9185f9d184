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
  image = Image.fromarray(smooth).resize((24, 24), Image.Resampling.BICUBIC)
  return np.clip(np.asarray(image) + generator.integers(-20, 20, (24, 24, 3)), 0, 255).astype(np.uint8)


def apply_to_floats(kind, image, sign):
  return np.asarray(jax.jit(randaugment.operate)(image, jnp.int32(kind), jnp.float32(sign)))


def apply(kind, pixels, sign=1.0):
  return apply_to_floats(kind, pixels / np.float32(255), sign)


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
def test_color_operations_are_pillow_s(pixels, kind, sign):
  expected = np.asarray(pillow(kind, Image.fromarray(pixels), sign)) / 255
  found = apply(kind, pixels, sign)
  assert np.abs(found - expected).max() <= 2.01 * LEVEL  # Pillow rounds each step to a level
  if kind not in (10, 13):
    assert np.abs(found - pixels / 255).max() > 3 * LEVEL  # and something happened


@pytest.mark.parametrize(
  ('kind', 'matrix'),
  [
    (1, (1, 0.3 * STRENGTH, 0, 0, 1, 0)),
    (2, (1, 0, 0, 0.3 * STRENGTH, 1, 0)),
    (3, (1, 0, -150 / 331 * 24 * STRENGTH, 0, 1, 0)),
    (4, (1, 0, 0, 0, 1, -150 / 331 * 24 * STRENGTH)),
  ],
)
def test_shears_and_translations_are_pillow_s_affine_maps(pixels, kind, matrix):
  a, b, c, d, e, f = matrix
  center = 12  # Pillow maps pixel center, x + 0.5
  moved = (a, b, c + center - a * center - b * center, d, e, f + center - d * center - e * center)
  expected = (
    np.asarray(Image.fromarray(pixels).transform((24, 24), Image.Transform.AFFINE, moved, Image.Resampling.BILINEAR))
    / 255
  )
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


def test_two_operations_follow_each_other_each_drawn_from_all_and_both_signs(monkeypatch):
  """An operation that only writes down what it was: 28 kinds with sign, base 64, on images of one black pixel."""
  monkeypatch.setattr(randaugment, 'operate', lambda image, kind, sign: 64 * image + 2 * kind + (sign > 0) + 1)
  count = 20_000
  written = np.asarray(randaugment.rand_augment(jax.random.key(0), jnp.zeros((count, 1, 1, 3), jnp.uint8)))[:, 0, 0, 0]
  drawn = np.stack(np.divmod(written.astype(int), 64)) - 1
  assert drawn.min() == 0 and drawn.max() == 27  # two operations, no third
  expected, deviation = count / 28, np.sqrt(count / 28)
  for place in drawn:
    assert np.abs(np.bincount(place, minlength=28) - expected).max() < 5 * deviation
  (first, first_sign), (second, second_sign) = (np.divmod(place, 2) for place in drawn)
  assert (first == second).mean() == pytest.approx(1 / 14, abs=0.01)
  assert (first_sign == second_sign).mean() == pytest.approx(1 / 2, abs=0.02)


def test_views_are_two_operations_on_the_image_or_its_mirror(pixels):
  """Composed here from single operations, each of which is Pillow's, with the draws that the key stands for."""
  key, batch = jax.random.key(2), np.stack([pixels, pixels[::-1], 255 - pixels, pixels.transpose(1, 0, 2)])
  found = np.asarray(jax.jit(randaugment.rand_augment)(key, batch))
  mirrored = []
  for image, image_key, view in zip(batch, jax.random.split(key, len(batch)), found):
    flip_key, kind_key, sign_key = jax.random.split(image_key, 3)
    mirrored.append(bool(jax.random.uniform(flip_key) < 0.5))
    expected = image[:, ::-1] if mirrored[-1] else image
    expected = expected / np.float32(255)
    kinds, signs = jax.random.randint(kind_key, (2,), 0, 14), jax.random.rademacher(sign_key, (2,), jnp.float32)
    for kind, sign in zip(kinds, signs):
      expected = apply_to_floats(kind, expected, sign)
    np.testing.assert_allclose(view, expected, atol=1e-5)
    assert np.abs(view - image / 255).max() > 0.02
  assert len(set(mirrored)) == 2


@pytest.mark.parametrize(('probability', 'share'), [(0.0, 0), (1.0, 1), (0.3, 0.3)])
def test_mirror_only_with_its_probability(pixels, monkeypatch, probability, share):
  monkeypatch.setattr(randaugment, 'operate', lambda image, kind, sign: image)
  batch = jnp.stack([pixels[:4, :4]] * 400)
  found = np.asarray(randaugment.rand_augment(jax.random.key(0), batch, probability))

  def is_one(image, expected):
    return np.abs(image - expected / 255).max() < 0.01 * LEVEL

  mirrored = np.array([is_one(image, pixels[:4, 3::-1]) for image in found])
  same = np.array([is_one(image, pixels[:4, :4]) for image in found])
  assert (mirrored ^ same).all()
  assert mirrored.mean() == pytest.approx(share, abs=0.1 if 0 < share < 1 else 0)
