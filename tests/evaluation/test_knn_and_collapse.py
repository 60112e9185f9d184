"""kNN and collapse monitors against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import catalog
from lwfedssl_jax.data import augment
from lwfedssl_jax.evaluation import embeddings, knn
from lwfedssl_jax.models import vit

SIZE = catalog.VitTraits(width=8, depth=3, num_heads=2, mlp_ratio=2)


def naive_knn(bank, labels, queries, num_classes):
  predictions = []
  for query in queries.astype(np.float64):
    cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
    nearest = np.argsort(-cosine)[:200]
    votes = np.zeros(num_classes)
    for index in nearest:
      votes[labels[index]] += np.exp(cosine[index] / 0.1)
    predictions.append(votes.argmax())
  return np.array(predictions)


@pytest.mark.parametrize('bank_size', [50, 300])  # fewer and more than the 200 neighbors
def test_knn_votes_as_published(bank_size):
  generator = np.random.default_rng(0)
  centers = generator.normal(size=(5, 6))
  labels = generator.integers(0, 5, bank_size)
  bank = centers[labels] + generator.normal(size=(bank_size, 6))
  queries = 7 * generator.normal(size=(261, 6))  # more than one batch; length must not matter
  expected = naive_knn(bank, labels, queries, 5)
  assert len(set(expected)) > 2
  np.testing.assert_array_equal(knn.knn_predict(bank, labels, queries, 5), expected)
  assert knn.knn_accuracy(bank, labels, queries[:4], np.append(expected[:3], -1), 5) == 0.75


def test_collapse_metrics_of_uniform_and_collapsed_embeddings():
  generator = np.random.default_rng(0)
  even = embeddings.collapse_metrics(generator.normal(size=(4000, 16)))
  assert even['embedding_std'] == pytest.approx(1, abs=0.02)
  assert even['effective_rank'] == pytest.approx(16, rel=0.02)
  offset = embeddings.collapse_metrics(generator.normal(size=(4000, 16)) + 100)
  assert offset['effective_rank'] == pytest.approx(16, rel=0.02)  # what all rows have in common is no direction
  point = embeddings.collapse_metrics(np.ones((100, 16)))
  assert point['embedding_std'] == pytest.approx(0, abs=1e-6)
  line = embeddings.collapse_metrics(generator.normal(size=(100, 1)) * np.ones(16))
  assert line['effective_rank'] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize('depth', [1, 3])
def test_embedder_uses_the_first_blocks_in_batches_of_any_number(depth):
  encoder = vit.make_vit(SIZE, 8, 4)
  params = encoder.init(jax.random.key(0))
  images = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)
  found = embeddings.make_embedder(encoder, batch_size=4)(params, images, depth)
  tokens = encoder.embed(params['embedding'], augment.normalize(jnp.asarray(images) / 255))
  first = jax.tree.map(lambda leaf: leaf[:depth], params['blocks'])
  np.testing.assert_allclose(found, encoder.pool(params['norm'], encoder.blocks(first, tokens)), rtol=1e-4, atol=1e-5)


def test_embedder_of_no_images_is_empty():
  encoder = vit.make_vit(SIZE, 8, 4)
  embed = embeddings.make_embedder(encoder)
  assert embed(encoder.init(jax.random.key(0)), np.zeros((0, 8, 8, 3), np.uint8), 3).shape == (0, 8)
