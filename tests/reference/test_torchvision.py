"""`naive_augment` against torchvision itself, where it is installed (`pip install torchvision`)."""

import collections
import math

import numpy as np
import pytest
from naive_augment import ORDERS, blur, crop, draw_box, jitter, solarize, to_gray

torch = pytest.importorskip('torch')
transforms = pytest.importorskip('torchvision.transforms', reason='torchvision is not installed')
functional = transforms.functional

NUM_DRAWS = 50_000
ASPECT = (3 / 4, 4 / 3)


@pytest.fixture(scope='module')
def image():
  return np.random.default_rng(0).random((16, 16, 3))


def apply(function, image, *arguments, **keywords):
  tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
  return function(tensor, *arguments, **keywords).numpy().transpose(1, 2, 0)


@pytest.mark.parametrize('box', [(0, 0, 16, 16), (2, 3, 9, 7), (5, 0, 1, 16), (14, 14, 2, 2)])
def test_crop(image, box):
  expected = apply(functional.resized_crop, image, *box, [16, 16], antialias=True)
  np.testing.assert_allclose(crop(image, box), expected, atol=1e-6)


@pytest.mark.parametrize(('sigma', 'side'), [(0.1, 3), (1.0, 3), (2.0, 7), (1.3, 31)])
def test_blur(image, sigma, side):
  np.testing.assert_allclose(
    blur(image, sigma, side), apply(functional.gaussian_blur, image, [side, side], [sigma, sigma]), atol=1e-6
  )


@pytest.mark.parametrize('order', ORDERS[::5])
def test_jitter(image, order):
  factors = {'B': 1.4, 'C': 0.6, 'S': 1.2, 'H': 0.08}
  adjust = {
    'B': functional.adjust_brightness,
    'C': functional.adjust_contrast,
    'S': functional.adjust_saturation,
    'H': functional.adjust_hue,
  }
  expected = image
  for letter in order:
    expected = apply(adjust[letter], expected, factors[letter])
  # torchvision weighs the channels of gray with four digits, 0.2989 for red, and turns the hue in float32.
  np.testing.assert_allclose(jitter(image, factors, order), expected, atol=5e-4)


def test_gray_and_solarize(image):
  gray = apply(functional.rgb_to_grayscale, image, num_output_channels=3)
  np.testing.assert_allclose(to_gray(image), gray, atol=2e-4)
  np.testing.assert_allclose(solarize(image), apply(functional.solarize, image, 0.5), atol=1e-6)


@pytest.mark.parametrize('size', [32, 224])
def test_distribution_of_crops(size):
  """The distance of Kolmogorov and Smirnov exceeds the limit once in 10^6 tries if the distributions are one."""
  torch.manual_seed(0)
  generator, blank = np.random.default_rng(0), torch.zeros(3, size, size)
  rule = np.array([transforms.RandomResizedCrop.get_params(blank, [0.08, 1.0], ASPECT) for _ in range(NUM_DRAWS)])
  ours = np.array([draw_box(generator, size, (0.08, 1.0)) for _ in range(NUM_DRAWS)])
  limit = math.sqrt(math.log(2 / 1e-6) / 2) * math.sqrt(2 / NUM_DRAWS)
  for quantity in (
    lambda box: box[:, 2] * box[:, 3],
    lambda box: np.log(box[:, 3] / box[:, 2]),
    *(lambda box, i=i: box[:, i] for i in range(4)),
    lambda box: (box[:, 2:] == size).sum(axis=1),
  ):
    values = np.union1d(quantity(rule), quantity(ours))
    shares = [np.searchsorted(np.sort(quantity(boxes)), values, 'right') / NUM_DRAWS for boxes in (rule, ours)]
    assert np.abs(shares[0] - shares[1]).max() < limit


def test_distribution_of_jitter():
  torch.manual_seed(0)
  bounds = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
  drawn = [transforms.ColorJitter.get_params(*bounds) for _ in range(NUM_DRAWS)]
  counts = collections.Counter(tuple(order.tolist()) for order, *_ in drawn)
  assert len(counts) == 24
  assert np.abs(np.array(list(counts.values())) - NUM_DRAWS / 24).max() < 5 * math.sqrt(NUM_DRAWS / 24)
  for factors, (low, high) in zip(np.array([factors for _, *factors in drawn], float).T, bounds):
    assert low <= factors.min() and factors.max() <= high
    assert abs(factors.mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * NUM_DRAWS)
