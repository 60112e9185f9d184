"""The work of one client between download and upload (LW-FedSSL, arXiv 2401.11647, Algorithm 1, client side).

A pure function of the global parameters, the client's images, its keys and, where a mechanism has one, its state: no
vmap, no mesh.
The simulator maps it over clients; a deployment calls it on one client's own images.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lwfedssl_jax import rng, trees
from lwfedssl_jax.base import Array, Bool, Images, Int, Integer, Key, Raveled
from lwfedssl_jax.config import Config
from lwfedssl_jax.config_groups import AugmentConfig
from lwfedssl_jax.data import augment, batching
from lwfedssl_jax.federated import client_state, execution, privacy, training_step
from lwfedssl_jax.federated.client_state import ClientState
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.federated.training_step import Batch, Losses, PreviousModel, StepOptions, StepState
from lwfedssl_jax.objectives.alignment import make_alignment
from lwfedssl_jax.stages import StageParams


class ClientData(NamedTuple):
  """A client's images: the first `num_images` of `image_ids`, indices into `images`; padding follows.

  Images may be flat. A TPU pads the two last axes of an array to tiles, (N, H, W, 3) to four times its size.
  """

  images: Images
  image_ids: Int[Array, ' M']
  num_images: Integer


class ClientKeys(NamedTuple):
  """Typed keys of a client in a round: for the order of its images, their augmentation, and the noise of its update."""

  shuffle: Key
  augment: Key
  noise: Key | None = None


class ClientResult(NamedTuple):
  """What a client's training gives.

  Attributes:
    params: the upload: its active parameters, raveled.
    losses: its mean losses over its steps.
    state: what it keeps; None where no mechanism has a state.
  """

  params: Raveled
  losses: Losses
  state: ClientState | None = None


Branches = tuple[Raveled, Raveled]  # online and target, raveled


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
    apply: (global_params, data, keys, num_steps=None, state=None) -> ClientResult. `num_steps` (may be traced) is at
      least the client's own steps (`batching.client_steps`); steps beyond them are masked. None: as many as the padded
      images fill. `state` is what the client keeps, see client_state.py.
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
    global_params: StageParams,
    data: ClientData,
    keys: ClientKeys,
    num_steps: Integer | None = None,
    state: ClientState | None = None,
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
    own_options, start = begin_training(config, options, global_params, state)
    trained, losses = run_steps(own_options, global_params, batches, draw_views, num_steps, start)
    kept = None if state is None else keep_state(config, options, global_params, start, trained, state)
    params = trained.params
    if client.dp_noise_multiplier:
      if keys.noise is None:
        raise ValueError('--dp_noise_multiplier: a client update needs the key of its noise')
      received, clip = options.model.raveler.ravel(global_params.active), config.method.client_update_clip
      params = privacy.privatize_update(params, received, clip, client.dp_noise_multiplier, keys.noise)
    return ClientResult(params, losses, kept)

  return ClientUpdate(options, apply)


def begin_training(
  config: Config, options: StepOptions, global_params: StageParams, state: ClientState | None
) -> tuple[StepOptions, Branches | None]:
  """Returns a client's own step options and its branches at the start; None: the received parameters and a copy."""
  if state is None:
    if config.uses_client_state:
      raise ValueError(f'--{config.client_state_flag}: a client update needs the state of its client')
    return options, None
  raveler = options.model.raveler
  if config.uses_previous_model:
    own = raveler.unravel(trees.without_online_only(state.params), global_params.active)
    options = options._replace(previous=PreviousModel(own, state.exists > 0))
  if config.client.client_update == 'global':
    return options, None
  return options, client_state.begin(config, state, raveler.ravel(global_params.active))


def keep_state(
  config: Config,
  options: StepOptions,
  global_params: StageParams,
  start: Branches | None,
  trained: StepState,
  state: ClientState,
) -> ClientState:
  """Returns what a client keeps after its training, which began with the branches `start`."""
  unravel, active = options.model.raveler.unravel, global_params.active
  before = active if start is None else unravel(start[0], active)
  divergence = client_state.measure_divergence(before, unravel(trained.params, active))
  return client_state.finish(config, state, trained.params, trained.target, divergence)


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
    taken = batches.images[batches.ids[index]]
    side = math.isqrt(math.prod(taken.shape[1:]) // 3)
    views = pipeline.two_views(key, taken.reshape(-1, side, side, 3), config, piece)
    return Batch(views, batches.mask[index])

  return draw


def run_steps(
  options: StepOptions,
  global_params: StageParams,
  batches: Batches,
  draw_views: Callable[..., Batch],
  num_steps: Integer | None = None,
  start: Branches | None = None,
) -> tuple[StepState, Losses]:
  """Trains the active part on a sequence of batches, from a fresh optimizer.

  Args:
    options: of a step.
    global_params: the initial parameters; absent blocks are returned unchanged.
    batches: see Batches.
    draw_views: from `make_view_drawer`.
    num_steps: batches from this one on are masked and not run; may be traced. None: all are run.
    start: the branches at the start; None: the initial parameters, and a copy of them.

  Returns:
    The state after the last step, and the mean losses.
  """
  optimizer = training_step.make_optimizer(options, global_params)

  def step(index, carry):
    state, sums = carry
    batch = draw_views(batches, index)
    state, losses = training_step.train_step(options, optimizer, state, global_params, batch)
    taken = batch.mask.any()
    return state, jax.tree.map(lambda total, value: total + jnp.where(taken, value, 0), sums, losses)

  initial = training_step.init_state(options, optimizer, global_params)
  if start is not None:
    initial = initial._replace(params=start[0], target=start[1])
  count = batches.ids.shape[0] if num_steps is None else num_steps
  state, sums = jax.lax.fori_loop(0, count, step, (initial, Losses(*jnp.zeros(3))))
  taken = jnp.maximum(batches.mask.any(axis=1).sum(), 1)
  return state, jax.tree.map(lambda total: total / taken, sums)
