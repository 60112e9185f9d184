"""The kNN monitor: accuracy and collapse metrics of the encoder at the end of a stage."""

from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from lwfedssl_jax import rng
from lwfedssl_jax.base import Encoder, Float, Int, Params, UInt8
from lwfedssl_jax.config_groups import RunConfig
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.evaluation import embeddings, knn

SAMPLE_IMAGES = 1000


class _Subset(NamedTuple):
  images: UInt8[np.ndarray, 'N H W C']
  labels: Int[np.ndarray, ' N'] | None


class Monitor:
  """Measures kNN accuracy and collapse on a fixed, seeded subset of training (bank) and test images."""

  def __init__(self, encoder: Encoder, dataset: ImageDataset, config: RunConfig, mesh: Mesh | None = None):
    generator = rng.host_generator(0, rng.Stream.MONITOR_SUBSET)

    def choose(images: UInt8[np.ndarray, 'N H W C'], labels: Int[np.ndarray, ' N'] | None, limit: int) -> _Subset:
      ids = np.sort(generator.permutation(len(images))[: limit or None])
      return _Subset(images[ids], None if labels is None else labels[ids])

    self._bank = choose(dataset.train_images, dataset.train_labels, config.knn_bank_images)
    self._test = choose(dataset.test_images, dataset.test_labels, config.knn_test_images)
    self._class_names = dataset.class_names
    self._embed, self._depth = embeddings.make_embedder(encoder, mesh), encoder.depth

  @property
  def has_labels(self) -> bool:
    """Whether kNN accuracy can be measured."""
    return self._bank.labels is not None and self._test.labels is not None and len(self._test.images) > 0

  def measure(self, params: Params, depth: int) -> dict[str, float | None]:
    """Returns knn_accuracy (None without labels), embedding_std and effective_rank of the first `depth` blocks."""
    bank = self._embed(params, self._bank.images, depth)
    accuracy = None
    if self.has_labels:
      test = self._embed(params, self._test.images, depth)
      accuracy = self._accuracy(bank, test)
    return {'knn_accuracy': accuracy, **embeddings.collapse_metrics(bank)}

  def raw_pixel_accuracy(self) -> float | None:
    """Returns the kNN accuracy of raw pixels, with the mean image subtracted; None without labels."""
    if not self.has_labels:
      return None

    def flat(images):
      return images.reshape(len(images), -1).astype(np.float32) / 255

    bank, test = flat(self._bank.images), flat(self._test.images)
    return self._accuracy(bank - bank.mean(axis=0), test - bank.mean(axis=0))

  def sample(self, params: Params, random: Params) -> dict[str, np.ndarray]:
    """Returns the embeddings of up to 1,000 test images (training images if there are none), for plots.

    Args:
      params: trained parameters.
      random: those before the first round.

    Returns:
      `trained` and `random`, (N, D) float32; `labels` (N,) int32, -1 without labels; `class_names` (C,) str.
    """
    images, labels = self._test if len(self._test.images) else self._bank
    images = images[:SAMPLE_IMAGES]
    labels = np.full(len(images), -1, np.int32) if labels is None else labels[:SAMPLE_IMAGES]
    depth = self._depth
    return {
      'trained': self._embed(params, images, depth),
      'random': self._embed(random, images, depth),
      'labels': labels,
      'class_names': np.array(self._class_names, np.str_),
    }

  def _accuracy(self, bank: Float[np.ndarray, 'N D'], test: Float[np.ndarray, 'Q D']) -> float:
    bank_labels, test_labels = self._bank.labels, self._test.labels
    assert bank_labels is not None
    assert test_labels is not None
    return knn.knn_accuracy(bank, bank_labels, test, test_labels, len(self._class_names))
