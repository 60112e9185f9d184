"""What a view draws, over many keys: against torchvision's rules in NumPy, and against numbers.

Two samples of n are compared by the greatest distance of their distribution functions (Kolmogorov, Smirnov). Where the
distributions are one, it exceeds CRITICAL once in 10^6 tries, in fewer where values repeat. Seeds are fixed.
"""

import functools
import math

import jax
import numpy as np
import pytest

from lwfedssl_jax.config_groups import AugmentConfig
from lwfedssl_jax.data import augment
from tests.reference import naive_augment

NUM_DRAWS = 100_000
CRITICAL = math.sqrt(math.log(2 / 1e-6) / 2) * math.sqrt(2 / NUM_DRAWS)  # 0.012
SIGMAS = 5  # standard errors that a mean may be off
RULE = augment.ViewRule(blur_probability=0.3, solarize_probability=0.2)


@functools.cache
def draw_views(size, count=NUM_DRAWS, **values):
  """What `count` keys draw, as NumPy arrays."""
  config = AugmentConfig(**values)
  draw = jax.jit(jax.vmap(lambda key: augment.draw_view(key, size, RULE, config)))
  return jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(size), count)))


@functools.cache
def naive_boxes(size, area=(0.08, 1.0)):
  generator = np.random.default_rng(size)
  return np.array([naive_augment.draw_box(generator, size, area) for _ in range(NUM_DRAWS)])


def distance(first, second):
  """The greatest difference between the shares of two samples that are at most x, over all x."""
  values = np.union1d(first, second)
  shares = [np.searchsorted(np.sort(sample), values, 'right') / len(sample) for sample in (first, second)]
  return np.abs(shares[0] - shares[1]).max()


def assert_mean(sample, expected):
  """The mean is as expected, to a few of its standard errors."""
  assert abs(sample.mean() - expected) <= SIGMAS * sample.std() / math.sqrt(len(sample)), (sample.mean(), expected)


@pytest.mark.parametrize('size', [32, 224])
def test_crops_have_torchvision_s_distribution(size):
  drawn, rule = draw_views(size).box, naive_boxes(size)
  ours = drawn.astype(int)
  np.testing.assert_array_equal(ours, drawn)
  top, left, height, width = ours.T
  assert min(top.min(), left.min()) == 0 and min(height.min(), width.min()) > 0
  assert (top + height).max() == (left + width).max() == size
  for quantity in (
    lambda box: box[:, 2] * box[:, 3],  # area
    lambda box: np.log(box[:, 3] / box[:, 2]),  # aspect ratio
    lambda box: box[:, 2],
    lambda box: box[:, 3],
    lambda box: box[:, 0],
    lambda box: box[:, 1],
    lambda box: box[:, 0] / np.maximum(size - box[:, 2], 1),
    lambda box: box[:, 1] / np.maximum(size - box[:, 3], 1),
    lambda box: (box[:, 2:] == size).sum(axis=1),  # full sides
    lambda box: box[:, 0] * box[:, 1],
    lambda box: box[:, 1] * box[:, 2],
  ):  # what goes together
    assert distance(quantity(ours), quantity(rule)) < CRITICAL
  assert_mean((ours[:, 2:] == size).mean(axis=1), (rule[:, 2:] == size).mean())


@pytest.mark.parametrize(('size', 'area'), [(32, (0.08, 1.0)), (224, (0.08, 1.0)), (8, (0.9, 1.0)), (8, (1e-4, 0.01))])
def test_crop_is_numpy_s_for_the_same_uniform_numbers(size, area):
  """But for sides so near to a half that float32 rounds them to the other side.

  A side of at most 224 pixels is computed to 4 units in the last place, 6e-5 pixels; two sides of the few tries until
  one fits make less than 10^-3 of the crops.
  """
  draws = np.random.default_rng(0).random((20_000, 22), np.float32)
  ours = np.asarray(jax.jit(jax.vmap(lambda u: augment.crop_box(u, size, area)))(draws))
  rule = np.array([naive_augment.box_of(own, size, area) for own in draws.astype(np.float64)])
  assert (ours != rule).any(axis=1).mean() < 1e-3


def test_offset_stays_inside_for_the_greatest_uniform_number():
  greatest = np.float32(1 - 2**-23)
  draws = np.full((1000, 22), greatest)
  draws[:, :10] = np.random.default_rng(0).random((1000, 1))
  draws[:, 10:20] = np.random.default_rng(1).random((1000, 1))
  for size in (3, 32, 224, 4096):
    draw_boxes = jax.jit(jax.vmap(functools.partial(augment.crop_box, size=size, area=(0.08, 1.0))))
    top, left, height, width = np.asarray(draw_boxes(draws)).T
    assert (top + height == size).all() and (left + width == size).all()


def test_views_are_made_of_the_crops_drawn():
  """Red is a ramp along x and green along y, so a crop's corners can be read off it."""
  size, count = 32, 400
  ramp = np.arange(size) * 8
  image = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], 0), axis=-1).astype(np.uint8)
  config = AugmentConfig(
    flip_probability=0.0,
    jitter_probability=0.0,
    grayscale_probability=0.0,
    blur_probability=(0.0, 0.0),
    solarize_probability=(0.0, 0.0),
  )
  key = jax.random.key(3)
  views = jax.jit(lambda key, x: augment.two_views(key, x, config))(key, np.stack([image] * count))
  views = np.asarray(views) * 255 / 8
  left, top = views[:, :, 0, 0, 0], views[:, :, 0, 0, 1]
  boxes = np.stack([top, left, views[:, :, -1, 0, 1] - top + 1, views[:, :, 0, -1, 0] - left + 1], axis=-1)
  drawn = [
    [naive_augment.box_of(own, size, config.crop_area) for own in view] for view in naive_augment.draws_of(key, count)
  ]
  np.testing.assert_allclose(boxes, drawn, atol=1e-3)
  assert abs(np.corrcoef(left[0], left[1])[0, 1]) < SIGMAS / math.sqrt(count)  # the views crop independently


def test_jitter_takes_each_of_24_orders_as_often():
  orders, counts = np.unique(draw_views(32).order, axis=0, return_counts=True)
  assert len(orders) == 24 and (np.sort(orders, axis=1) == np.arange(4)).all()
  expected = NUM_DRAWS / 24
  assert np.abs(counts - expected).max() < SIGMAS * math.sqrt(expected)


def test_jittered_views_follow_each_order_as_often():
  """A view is explained by the order that was drawn and by those that commute to it; these share it."""
  count, size = 300, 2
  image = np.random.default_rng(0).integers(0, 256, (size, size, 3)).astype(np.uint8)
  config = AugmentConfig(
    crop_area=(1.0, 1.0),
    flip_probability=0.0,
    jitter_probability=1.0,
    jitter_strength=(1.0, 1.0, 1.0, 0.5),
    grayscale_probability=0.0,
    blur_probability=(0.0, 0.0),
    solarize_probability=(0.0, 0.0),
  )
  key = jax.random.key(0)
  views = np.asarray(jax.jit(lambda key, x: augment.two_views(key, x, config))(key, np.stack([image] * count)))
  shares = np.zeros(24)
  for number, draws in enumerate(naive_augment.draws_of(key, count)):
    for view, own in zip(views[number], draws):
      factors = naive_augment.view_of(own, size, number, config).factors
      explains = np.array(
        [
          np.abs(naive_augment.jitter(image / 255, factors, order) - view).max() < 1e-4
          for order in naive_augment.ORDERS
        ]
      )
      assert explains.any()
      shares += explains / explains.sum()
  expected = 2 * count / 24
  assert np.abs(shares - expected).max() < SIGMAS * math.sqrt(expected)


def test_shares_and_strengths():
  view = draw_views(32)
  for sample, share in (
    (view.flips, 0.5),
    (view.jitters, 0.8),
    (view.is_gray, 0.2),
    (view.blurs, 0.3),
    (view.solarizes, 0.2),
  ):
    assert_mean(sample, share)
  generator = np.random.default_rng(0)
  bounds = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)]
  for sample, (low, high) in zip([*view.factors.T, view.sigma], bounds):
    assert distance(sample, generator.uniform(low, high, NUM_DRAWS)) < CRITICAL


def test_what_is_drawn_for_a_view_is_independent():
  """Correlations of 10^5 independent pairs have a standard deviation of 0.003."""
  view = draw_views(32)
  drawn = np.column_stack(
    [
      view.box[:, 2] * view.box[:, 3],
      view.box[:, 3] / view.box[:, 2],
      view.flips,
      view.jitters,
      view.factors,
      view.order[:, 0],
      view.is_gray,
      view.blurs,
      view.sigma,
      view.solarizes,
    ]
  ).astype(np.float64)
  correlations = np.corrcoef(drawn.T) - np.eye(drawn.shape[1])
  assert np.abs(correlations).max() < SIGMAS / math.sqrt(NUM_DRAWS)
