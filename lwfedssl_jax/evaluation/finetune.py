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

from lwfedssl_jax import rng, trees
from lwfedssl_jax.base import Apply, Array, Float, Function, Images, Int, Integer, Key, Params, Scalar, UInt8
from lwfedssl_jax.data import batching, randaugment
from lwfedssl_jax.evaluation import embeddings
from lwfedssl_jax.federated import optimizer


class FinetuneOptions(NamedTuple):
  """Hyperparameters of finetuning.

  Attributes:
    epochs: over the labeled images.
    warmup_epochs: of them, with a linearly increasing rate.
    batch_size: maximum; a smaller data set is one batch.
    learning_rate: base, per 256 images.
    weight_decay: of matrices.
    flip_probability: of a horizontal flip.
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


def make_optimizer(options: FinetuneOptions, num_images: int) -> optax.GradientTransformation:
  """Builds AdamW (arXiv 1711.05101) with the schedule for `num_images`; only kernels have weight decay."""
  batch_size = min(options.batch_size, num_images)
  schedule = make_schedule(options, batch_size, batching.steps_per_epoch(num_images, batch_size))
  return optax.adamw(schedule, weight_decay=options.weight_decay, mask=optimizer.is_matrix)


def plan_epoch(seed_key: Key, epoch_num: Integer, num_images: int, batch_size: int) -> Int[Array, 'S B']:
  """Shuffles the images of an epoch and cuts them into batches; an incomplete last batch is dropped.

  Args:
    seed_key: typed key of the finetuning's seed.
    epoch_num: 0-based, may be traced.
    num_images: N.
    batch_size: B, at most N.

  Returns:
    N // B batches of indices, none twice.
  """
  key = rng.key(seed_key, rng.Stream.FINETUNE_SHUFFLE, epoch_num)
  steps = batching.steps_per_epoch(num_images, batch_size)
  return batching.plan_epochs(key, jnp.arange(num_images), jnp.int32(num_images), 1, steps, batch_size)[0]


def make_views(
  key: Key, step: Integer, images: UInt8[Array, 'B H W C'], options: FinetuneOptions
) -> Float[Array, 'B H W C']:
  """Augments a batch by RandAugment; returns float32 in [0, 1].

  Args:
    key: the epoch's.
    step: within the epoch, may be traced.
    images: of the batch.
    options: of which the flip probability is used.
  """
  return randaugment.rand_augment(jax.random.fold_in(key, step), images, options.flip_probability)


def init_params(params: Params, width: int, num_classes: int) -> Params:
  """Returns {'encoder', 'head'}: a copy of the encoder's parameters, and a head of zeros on embeddings of `width`."""
  return {
    'encoder': jax.tree.map(jnp.array, params),
    'head': {'kernel': jnp.zeros((width, num_classes)), 'bias': jnp.zeros(num_classes)},
  }


def compute_logits(head: Params, embeddings: Float[Array, 'B D']) -> Float[Array, 'B Y']:
  """Returns logits for Y classes; the head's product is float32 at full precision on every device."""
  return jnp.matmul(embeddings, head['kernel'], precision='highest') + head['bias']


@functools.lru_cache(maxsize=2)
def _make_epoch(apply: Apply, options: FinetuneOptions) -> Callable[..., Any]:
  """Builds (trained, optimizer state, seed key, epoch number, images, labels) -> (trained, state, mean loss)."""
  run: Function = getattr(apply, 'train', lambda params, images: (apply(params, images), {}))

  def loss(trained: Params, views: Float[Array, 'B H W C'], labels: Int[Array, ' B']) -> tuple[Scalar, Params]:
    embedded, statistics = run(trained['encoder'], views)
    logits = compute_logits(trained['head'], embedded)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), {'encoder': statistics}

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def epoch(
    trained: Params, state: optax.OptState, seed_key: Key, epoch_num: Integer, images: Images, labels: Int[Array, ' N']
  ) -> tuple[Params, optax.OptState, Scalar]:
    adamw = make_optimizer(options, len(images))
    ids = plan_epoch(seed_key, epoch_num, len(images), min(options.batch_size, len(images)))
    key = rng.key(seed_key, rng.Stream.FINETUNE_AUGMENT, epoch_num)

    def take_step(carry, scanned):
      trained, state = carry
      step, batch_ids = scanned
      views = make_views(key, step, images[batch_ids], options)
      (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(trained, views, labels[batch_ids])
      updates, state = adamw.update(gradients, state, trained)
      return (trees.overlay(optax.apply_updates(trained, updates), statistics), state), value

    (trained, state), losses = jax.lax.scan(take_step, (trained, state), (jnp.arange(len(ids)), ids))
    return trained, state, losses.mean()

  return epoch


def train(
  apply: Apply,
  params: Params,
  examples: tuple[UInt8[np.ndarray, 'N H W C'], Int[np.ndarray, ' N']],
  num_classes: int,
  seed: int,
  options: FinetuneOptions = FinetuneOptions(),
) -> tuple[Params, float]:
  """Trains encoder and head on labeled images.

  Args:
    apply: (params, images) -> embeddings (B, D) float32, as `LoadedEncoder.apply`, whose `train` is used if it has one.
    params: the encoder's; not changed.
    examples: images, and labels 0 .. num_classes - 1.
    num_classes: outputs of the head.
    seed: of order and augmentation.
    options: the schedule.

  Returns:
    `{'encoder': ..., 'head': ...}`, and the last epoch's mean loss.
  """
  images, labels = jnp.asarray(examples[0]), jnp.asarray(examples[1], jnp.int32)
  width = jax.eval_shape(apply, params, images[:1]).shape[-1]
  trained, epoch, loss = init_params(params, width, num_classes), _make_epoch(apply, options), jnp.float32(0)
  state = make_optimizer(options, len(images)).init(trained)
  for epoch_num in range(options.epochs):
    trained, state, loss = epoch(trained, state, jax.random.key(seed), epoch_num, images, labels)
  return trained, float(loss)


@functools.partial(jax.jit, static_argnums=0)
def _classify_batch(apply: Apply, trained: Params, images: UInt8[Array, 'B H W C']) -> Int[Array, ' B']:
  return compute_logits(trained['head'], apply(trained['encoder'], images)).argmax(axis=1)


def classify(apply: Apply, trained: Params, images: UInt8[np.ndarray, 'N H W C']) -> Int[np.ndarray, ' N']:
  """Returns the predicted labels of images."""
  return embeddings.in_batches(lambda batch: _classify_batch(apply, trained, batch), images)
