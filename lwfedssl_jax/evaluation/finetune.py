"""Finetuning: a linear head on the encoder, everything trained on labels (arXiv 2401.11647 v4).

40 epochs, 10 of them warm-up, cosine; batch 256; AdamW, base rate 1e-3 per 256 images; RandAugment.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lwfedssl_jax import rng
from lwfedssl_jax.contracts import Params
from lwfedssl_jax.data import batching, randaugment
from lwfedssl_jax.evaluation import embeddings
from lwfedssl_jax.federated import optimizer


class FinetuneOptions(NamedTuple):
  """Schedule of a finetuning.

  Attributes:
    epochs: over the labelled images.
    warmup_epochs: of them, with a linearly rising rate.
    batch_size: at most; a smaller set is one batch.
    learning_rate: base, per 256 images.
    weight_decay: of matrices.
    flip_probability: of a horizontal mirror.
  """

  epochs: int = 40
  warmup_epochs: int = 10
  batch_size: int = 256
  learning_rate: float = 1e-3
  weight_decay: float = 1e-5
  flip_probability: float = 0.5


def make_schedule(options: FinetuneOptions, batch_size: int, steps_per_epoch: int) -> optax.Schedule:
  """Returns step -> learning rate: from 0 up over the warm-up, then down to 0 by a cosine."""
  peak = options.learning_rate * batch_size / optimizer.REFERENCE_BATCH_SIZE
  warmup, total = (epochs * steps_per_epoch for epochs in (options.warmup_epochs, options.epochs))
  return optax.warmup_cosine_decay_schedule(0.0, peak, min(warmup, total - 1), total)


@functools.lru_cache(maxsize=2)
def _make_epoch(apply: Callable[[Params, Any], Any], options: FinetuneOptions, batch_size: int, steps: int) -> Any:
  """Builds the optimizer, and (trained, optimizer state, key, images, labels, ids, mask) -> the same after an epoch."""
  adamw = optax.adamw(make_schedule(options, batch_size, steps), weight_decay=options.weight_decay,
                      mask=optimizer.is_matrix)

  def loss(trained, views, labels, mask):
    logits = apply(trained['encoder'], views) @ trained['head']['kernel'] + trained['head']['bias']
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(mask, losses, 0).sum() / mask.sum()

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def epoch(trained, state, key, images, labels, ids, mask):
    def step(carry, scanned):
      trained, state = carry
      index, batch_ids, batch_mask = scanned
      views = randaugment.rand_augment(jax.random.fold_in(key, index), images[batch_ids], options.flip_probability)
      value, gradients = jax.value_and_grad(loss)(trained, views, labels[batch_ids], batch_mask)
      updates, state = adamw.update(gradients, state, trained)
      return (optax.apply_updates(trained, updates), state), value

    (trained, state), losses = jax.lax.scan(step, (trained, state), (jnp.arange(len(ids)), ids, mask))
    return trained, state, losses.mean()

  return adamw, epoch


def predict(
    apply: Callable[[Params, Any], Any], params: Params, images: np.ndarray, labels: np.ndarray, queries: np.ndarray,
    num_classes: int, seed: int, options: FinetuneOptions = FinetuneOptions()) -> tuple[np.ndarray, float]:
  """Trains encoder and head on labelled images, then classifies queries; nothing is chosen by looking at these.

  Args:
    apply: (params, images) -> embeddings (B, D) float32, as `LoadedEncoder.apply`.
    params: the encoder's; not changed.
    images: (N, S, S, 3) uint8.
    labels: (N,) int, 0 .. num_classes - 1.
    queries: (Q, S, S, 3) uint8.
    num_classes: outputs of the head.
    seed: of order and augmentation.
    options: the schedule.

  Returns:
    (Q,) predicted labels, and the last epoch's mean loss.
  """
  count = len(images)
  batch_size = min(options.batch_size, count)
  steps = batching.steps_per_epoch(count, batch_size)
  adamw, epoch = _make_epoch(apply, options, batch_size, steps)
  width = params['norm']['scale'].shape[0]
  trained = {'encoder': jax.tree.map(jnp.array, params),
             'head': {'kernel': jnp.zeros((width, num_classes)), 'bias': jnp.zeros(num_classes)}}
  state = adamw.init(trained)
  device_images, device_labels = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
  loss = jnp.float32(0)
  for number in range(options.epochs):
    shuffle_key, augment_key = (rng.key(seed, stream, number) for stream in (
        rng.Stream.FINETUNE_SHUFFLE, rng.Stream.FINETUNE_AUGMENT))
    ids, mask = batching.plan_epochs(shuffle_key, jnp.arange(count), jnp.int32(count), 1, steps, batch_size)
    trained, state, loss = epoch(trained, state, augment_key, device_images, device_labels, ids, mask)
  return classify(apply, trained, queries), float(loss)


@functools.partial(jax.jit, static_argnums=0)
def _classify_batch(apply, trained, images):
  return (apply(trained['encoder'], images) @ trained['head']['kernel'] + trained['head']['bias']).argmax(axis=1)


def classify(apply: Callable[[Params, Any], Any], trained: Params, images: np.ndarray) -> np.ndarray:
  """Returns the predicted labels (N,) of images (N, S, S, 3)."""
  return embeddings.in_batches(lambda batch: _classify_batch(apply, trained, batch), images)
