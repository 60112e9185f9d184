"""What the monitor embeds and votes on: an encoder that shows which image it saw, and how many blocks it ran."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax.base import Encoder
from lwfedssl_jax.config_groups import RunConfig
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.evaluation import embeddings, knn
from lwfedssl_jax.evaluation.monitor import Monitor

# Images of one pixel; block 0 doubles and block 1 triples.
ENCODER = Encoder(
  init=None,
  embed=lambda params, images: images.reshape(len(images), 1, 3) * params,
  prefix=lambda blocks, tokens, count: tokens * jnp.where(jnp.arange(2) < count, blocks['scale'], 1).prod(),
  blocks=None,
  pool=lambda params, tokens: tokens[:, 0] + params,
  depth=2,
  width=3,
  flops=None,
)
PARAMS = {'embedding': jnp.ones(3), 'blocks': {'scale': jnp.array([2.0, 3.0])}, 'norm': jnp.zeros(3)}
FACTOR = {1: 2, 2: 6}
CONFIG = RunConfig(knn_bank_images=20, knn_test_images=12)


def pixels(count, first):
  levels = first + np.arange(count)
  return np.stack([levels, 255 - levels, 100 * (levels % 2)], axis=1).astype(np.uint8).reshape(count, 1, 1, 3)


DATASET = ImageDataset(
  'made',
  pixels(50, 0),
  np.arange(50, dtype=np.int32) % 4,
  pixels(30, 100),
  np.arange(30, dtype=np.int32) % 3,
  tuple('abcd'),
)


@pytest.fixture
def votes(monkeypatch):
  """Records what is voted on, in place of a vote."""
  recorded = []
  monkeypatch.setattr(knn, 'knn_accuracy', lambda *arguments: recorded.append(arguments) or 0.25)
  return recorded


def compute_levels(rows, depth):
  """The first channel of the images whose embeddings these are."""
  return np.rint((rows[:, 0] / FACTOR[depth] + 1) / 2 * 255).astype(int)


@pytest.mark.parametrize('depth', [1, 2])
def test_a_fixed_sample_of_training_images_votes_on_one_of_test_images(votes, depth):
  found = Monitor(ENCODER, DATASET, CONFIG).measure(PARAMS, depth)
  ((bank, bank_labels, queries, query_labels, num_classes),) = votes
  chosen, asked = compute_levels(bank, depth), compute_levels(queries, depth) - 100
  assert len(set(chosen)) == len(chosen) == 20 and set(chosen) <= set(range(50))
  assert len(set(asked)) == len(asked) == 12 and set(asked) <= set(range(30))
  assert chosen.tolist() != list(range(20)) and asked.tolist() != list(range(12))  # not the first ones
  np.testing.assert_array_equal(bank_labels, chosen % 4)
  np.testing.assert_array_equal(query_labels, asked % 3)
  assert num_classes == 4
  assert found == {'knn_accuracy': 0.25, **embeddings.collapse_metrics(bank)}


def test_the_sample_is_the_same_under_every_seed_of_a_run(votes):
  for seed in (0, 1):
    Monitor(ENCODER, DATASET, dataclasses.replace(CONFIG, seed=seed)).measure(PARAMS, 2)
  for first, second in zip(*votes):
    np.testing.assert_array_equal(first, second)


def test_no_limit_is_all_images(votes):
  Monitor(ENCODER, DATASET, RunConfig(knn_bank_images=0, knn_test_images=0)).measure(PARAMS, 2)
  assert compute_levels(votes[0][0], 2).tolist() == list(range(50))
  assert compute_levels(votes[0][2], 2).tolist() == list(range(100, 130))


def test_pixels_are_centered_by_the_training_images(votes):
  Monitor(ENCODER, DATASET, RunConfig(knn_bank_images=0, knn_test_images=0)).raw_pixel_accuracy()
  ((bank, bank_labels, queries, query_labels, _),) = votes
  flat = [images.reshape(len(images), 3) / 255 for images in (DATASET.train_images, DATASET.test_images)]
  np.testing.assert_allclose(bank, flat[0] - flat[0].mean(axis=0), atol=1e-6)
  np.testing.assert_allclose(queries, flat[1] - flat[0].mean(axis=0), atol=1e-6)
  assert bank_labels.tolist() == DATASET.train_labels.tolist() and query_labels.tolist() == DATASET.test_labels.tolist()


@pytest.mark.parametrize(
  'missing',
  [{'train_labels': None}, {'test_labels': None}, {'test_labels': np.zeros(0, np.int32), 'test_images': pixels(0, 0)}],
)
def test_without_labels_there_is_no_accuracy(votes, missing):
  monitor = Monitor(ENCODER, DATASET._replace(**missing), CONFIG)
  found = monitor.measure(PARAMS, 2)
  assert found['knn_accuracy'] is None and np.isfinite(found['effective_rank'])
  assert monitor.raw_pixel_accuracy() is None
  assert not votes


def test_embeddings_to_look_at_are_of_trained_and_of_random_weights():
  random = dict(PARAMS, embedding=jnp.full(3, -1.0))
  found = Monitor(ENCODER, DATASET, CONFIG).sample(PARAMS, random)
  seen = compute_levels(found['trained'], 2)
  np.testing.assert_allclose(found['random'], -found['trained'], rtol=1e-6)
  np.testing.assert_array_equal(found['labels'], (seen - 100) % 3)
  untested = DATASET._replace(test_images=pixels(0, 0), test_labels=None, train_labels=None)
  found = Monitor(ENCODER, untested, CONFIG).sample(PARAMS, random)
  assert len(found['trained']) == 20 and (compute_levels(found['trained'], 2) < 50).all()
  assert found['labels'].tolist() == [-1] * 20
