"""The work of one client between download and upload (LW-FedSSL, arXiv 2401.11647, Algorithm 1, client side).

A pure function of the global parameters, the client's images and its keys: no vmap, no mesh, no state between rounds.
The simulator maps it over clients; a deployment calls it on one client's own images.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lwfedssl_jax import rng
from lwfedssl_jax.base import Array, Bool, Images, Int, Integer, Key, Raveled
from lwfedssl_jax.config import AugmentConfig, Config
from lwfedssl_jax.data import augment, batching
from lwfedssl_jax.federated import execution, privacy, training_step
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.federated.training_step import Batch, Losses, StepOptions
from lwfedssl_jax.objectives.alignment import make_alignment
from lwfedssl_jax.stages import StageParams


class ClientData(NamedTuple):
  """A client's images: the first `num_images` of `image_ids`, indices into `images`; padding follows."""

  images: Images
  image_ids: Int[Array, ' M']
  num_images: Integer


class ClientKeys(NamedTuple):
  """Typed keys of a client in a round: for the order of its images, their augmentation, and the noise of its update."""

  shuffle: Key
  augment: Key
  noise: Key | None = None


class ClientResult(NamedTuple):
  """The upload of a client: its active parameters, raveled, and its mean losses over its steps."""

  params: Raveled
  losses: Losses


class Pipeline(NamedTuple):
  """Source of batches: `batching.plan_epochs` and `augment.two_views`, or functions of the same signatures."""

  plan_epochs: Callable[..., Any] = batching.plan_epochs
  two_views: Callable[..., Any] = augment.two_views


def draw_keys(
  seed_key: Key,
  round_num: Integer,
  client_id: Integer | None = None,
  streams: tuple[rng.Stream, rng.Stream] = (rng.Stream.SHUFFLE, rng.Stream.AUGMENT),
) -> ClientKeys:
  """Draws a client's keys of a round; with other `streams` and no `client_id`, the server's."""
  indices = (round_num,) if client_id is None else (round_num, client_id)
  keys = jax.vmap(lambda stream: rng.key(seed_key, stream, *indices))(jnp.array(streams))
  return ClientKeys(keys[0], keys[1])


class ClientUpdate(NamedTuple):
  """Local training.

  Attributes:
    options: of a step; `training_step` has the functions that take them.
    apply: (global_params, data, keys, num_steps=None) -> ClientResult. `num_steps` (may be traced) is at least the
      client's own steps (`batching.client_steps`); steps beyond them are masked. None: as many as the padded images
      fill.
  """

  options: StepOptions
  apply: Callable[..., ClientResult]


def make_step_options(
  config: Config, image_size: int, scale: optax.GradientTransformation | None = None
) -> StepOptions:
  """Builds a client's step options; `scale` as in StepOptions."""
  client, objective = config.client, config.objective
  alignment = None
  if config.uses_alignment:
    alignment = make_alignment(objective.alignment_kind, objective.temperature)
  return StepOptions(
    model=make_model(config.model, objective, image_size, execution.client_execution(config)),
    alignment=alignment,
    alignment_weight=objective.alignment_weight,
    learning_rate=client.learning_rate,
    batch_size=client.batch_size,
    weight_decay=client.weight_decay,
    block_learning_rate_decay=client.block_learning_rate_decay,
    micro_batch_size=client.micro_batch_size,
    proximal_weight=client.proximal_weight,
    scale=scale,
  )


def make_client_update(
  config: Config, image_size: int, pipeline: Pipeline = Pipeline(), scale: optax.GradientTransformation | None = None
) -> ClientUpdate:
  """Builds the local training of a run's clients.

  Args:
    config: the run.
    image_size: side of the images, pixels.
    pipeline: how images are shuffled and augmented.
    scale: as in StepOptions.
  """
  options, client = make_step_options(config, image_size, scale), config.client

  def apply(
    global_params: StageParams, data: ClientData, keys: ClientKeys, num_steps: Integer | None = None
  ) -> ClientResult:
    ids, mask = pipeline.plan_epochs(
      keys.shuffle,
      data.image_ids,
      data.num_images,
      client.local_epochs,
      batching.steps_per_epoch(data.image_ids.shape[0], client.batch_size),
      client.batch_size,
    )
    batches = Batches(data.images, ids, mask, keys.augment)
    draw_views = make_view_drawer(pipeline, config.augment)
    result = run_steps(options, global_params, batches, draw_views, num_steps)
    if not client.dp_noise_multiplier:
      return result
    if keys.noise is None:
      raise ValueError('--dp_noise_multiplier: a client update needs the key of its noise')
    start, clip = options.model.raveler.ravel(global_params.active), config.method.client_update_clip
    noisy = privacy.privatize_update(result.params, start, clip, client.dp_noise_multiplier, keys.noise)
    return result._replace(params=noisy)

  return ClientUpdate(options, apply)


class Batches(NamedTuple):
  """A sequence of S batches: `ids` (S, B) into `images`, the valid samples, and the key of their augmentation."""

  images: Images
  ids: Int[Array, 'S B']
  mask: Bool[Array, 'S B']
  key: Key


def make_view_drawer(pipeline: Pipeline, config: AugmentConfig, axis: str | None = None) -> Callable[..., Batch]:
  """Builds (batches, index) -> Batch; with a mesh axis, the views are this device's shard."""

  def draw(batches: Batches, index: Integer) -> Batch:
    piece = None
    if axis is not None:
      count = batches.ids.shape[1] // jax.lax.axis_size(axis)
      piece = (jax.lax.axis_index(axis) * count, count)
    key = jax.random.fold_in(batches.key, index)
    views = pipeline.two_views(key, batches.images[batches.ids[index]], config, piece)
    return Batch(views, batches.mask[index])

  return draw


def run_steps(
  options: StepOptions,
  global_params: StageParams,
  batches: Batches,
  draw_views: Callable[..., Batch],
  num_steps: Integer | None = None,
) -> ClientResult:
  """Trains the active part on a sequence of batches, from a fresh optimizer and target branch.

  Args:
    options: of a step.
    global_params: the initial parameters; absent blocks are returned unchanged.
    batches: see Batches.
    draw_views: from `make_view_drawer`.
    num_steps: batches from this one on are masked and not run; may be traced. None: all are run.
  """
  optimizer = training_step.make_optimizer(options, global_params)

  def step(index, carry):
    state, sums = carry
    batch = draw_views(batches, index)
    state, losses = training_step.train_step(options, optimizer, state, global_params, batch)
    taken = batch.mask.any()
    return state, jax.tree.map(lambda total, value: total + jnp.where(taken, value, 0), sums, losses)

  start = (training_step.init_state(options, optimizer, global_params), Losses(*jnp.zeros(3)))
  state, sums = jax.lax.fori_loop(0, batches.ids.shape[0] if num_steps is None else num_steps, step, start)
  taken = jnp.maximum(batches.mask.any(axis=1).sum(), 1)
  return ClientResult(state.params, jax.tree.map(lambda total: total / taken, sums))
