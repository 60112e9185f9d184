"""Data sets by name, and the digits that come with scikit-learn."""

import numpy as np
import pytest
from helpers import refusal

from lwfedssl_jax.data import folder, sources


@pytest.mark.parametrize('spec', ['', 'foo', 'foo:bar', 'tfds', 'tfds:', 'folder:', 'digits:x', 'Digits'])
def test_bad_specification_names_the_flag_and_the_choices(spec):
  assert (
    refusal(spec) == f'--dataset: expected digits, folder:PATH, npz:PATH, tfds:NAME or hf:NAME_OR_PATH, got {spec!r}'
  )


def test_digits_split_is_fixed_stratified_and_complete():
  from sklearn import datasets

  data = sources.load('digits')
  assert data.train_images.shape == (1437, 8, 8, 3) and data.test_images.shape == (360, 8, 8, 3)
  assert data.train_images.dtype == np.uint8 and data.train_labels.dtype == np.int32
  counts = np.bincount(data.test_labels) / np.bincount(np.concatenate([data.train_labels, data.test_labels]))
  assert len(counts) == 10 and counts.min() > 0.19 and counts.max() < 0.21
  assert data.train_images.max() == 255 and data.train_images.min() == 0
  np.testing.assert_array_equal(data.train_images[..., 0], data.train_images[..., 2])
  rows = np.concatenate([data.train_images, data.test_images])[..., 0].reshape(1797, -1)
  original = np.round(datasets.load_digits().data * 255 / 16).astype(np.uint8)
  np.testing.assert_array_equal(np.sort(rows.sum(1)), np.sort(original.sum(1)))
  np.testing.assert_array_equal(data.test_images, sources.load('digits').test_images)
  # Pinned: another split would make results of two versions incomparable.
  assert data.test_labels[:12].tolist() == [2, 5, 9, 0, 6, 4, 0, 0, 7, 2, 6, 7]
  assert data.test_images.sum(dtype=int) == 5375610
  assert sources.describe(data) == 'digits: 1437 training and 360 test images, 8x8, 10 classes'


def test_digits_resized():
  assert sources.load('digits', image_size=16).train_images.shape == (1437, 16, 16, 3)


@pytest.mark.parametrize(('sizes', 'count'), [((1,), 1), ((1, 1, 1), 2), ((100, 10, 1), 11), ((3, 3), 6), ((), 1)])
def test_holdout_leaves_one_of_every_class(sizes, count):
  labels = np.repeat(np.arange(len(sizes)), sizes)
  chosen = folder.stratified_holdout(labels, count)
  assert chosen.sum() <= count
  assert set(labels[~chosen]) == set(labels)


def test_holdout_is_proportional():
  labels = np.repeat([0, 1, 2], [100, 50, 10])
  assert np.bincount(labels[folder.stratified_holdout(labels, 16)]).tolist() == [10, 5, 1]
