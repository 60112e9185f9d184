"""One round: clients train the active part, the server aggregates, then calibrates (arXiv 2401.11647, Algorithm 1).

A round is one jitted function. Differences between rounds are array inputs, so that all rounds of a stage, and all
layer-wise stages after the first, run the same executable.

With a mesh the clients are sharded over its devices. Each device sums its own clients; a round exchanges one sum of the
active parameters and a few scalars. Calibration shards every batch over the devices.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import stages
from lwfedssl_jax.base import Array, Bool, FederatedRound, Float, Function, Integer, Params, Raveled
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import batching
from lwfedssl_jax.federated import aggregation, calibration, client_update, divergence, privacy, scheduling
from lwfedssl_jax.federated.aggregation import Aggregator, Uploads
from lwfedssl_jax.federated.aggregation_by_block import by_block, mark_existing
from lwfedssl_jax.federated.client_update import ClientData, ClientKeys, ClientUpdate
from lwfedssl_jax.federated.divergence import DivergenceSums
from lwfedssl_jax.federated.placement import Placement, shard_round
from lwfedssl_jax.federated.round_types import ClientSlots, RoundInputs, RoundMetrics
from lwfedssl_jax.federated.training_step import Losses
from lwfedssl_jax.stages import StageParams, StageShape


class RoundParts(NamedTuple):
  """The parts of a round, each usable alone; `calibrate` is None if the server does not train."""

  client_update: ClientUpdate
  aggregator: Aggregator
  calibrate: Function | None


def make_parts(config: Config, image_size: int, placement: Placement = Placement()) -> RoundParts:
  """Builds the configured parts of a round."""
  calibrate = None
  if config.uses_calibration:
    calibrate = calibration.make_calibration(config, image_size, placement)
  return RoundParts(
    client_update.make_client_update(config, image_size),
    aggregation.make_aggregator(config.method, placement.axis),
    calibrate,
  )


def make_round(
  config: Config,
  image_size: int,
  placement: Placement = Placement(),
  client_steps: int = 0,
  parts: RoundParts | None = None,
) -> FederatedRound:
  """Builds the round of a run.

  Args:
    config: the run's configuration.
    image_size: side of the images, pixels.
    placement: of computation and images; it changes results only by the rounding of sums.
    client_steps: steps per client and round, if they are equal for all: a loop of static length needs no
      device-to-host check between steps. 0: they differ.
    parts: replace the configured ones.
  """
  parts = parts or make_parts(config, image_size, placement)
  raveler, axis = parts.client_update.options.model.raveler, placement.axis

  def body(
    shape: StageShape, params: Params, start: Integer, stop: Integer, inputs: RoundInputs
  ) -> tuple[Params, RoundMetrics]:
    start, stop = shape.bounds(start, stop)
    differ = inputs.clients.kept is not None and shape.trains_embedding  # the blocks that clients train
    global_params = stages.split(params, stages.whole(params) if differ else shape, start)
    global_active = raveler.ravel(global_params.active)
    aggregator = parts.aggregator
    if differ:
      aggregator = by_block(aggregator, raveler, global_params.active, axis)
    own = parts._replace(aggregator=aggregator)
    trained = _train_clients(config, own, placement, global_params, inputs, client_steps)
    state, sums, losses, accepted, weights = trained
    tally = aggregation.tally_clients(weights, accepted, axis)
    aggregated = aggregation.aggregate_or_keep(aggregator, state, accepted, tally, global_active)
    exists = mark_existing(raveler, global_params.active, stop) if differ else None
    distance = divergence.finish(sums, tally, aggregated, global_active, axis, exists)
    params = stages.merge(params, raveler.unravel(aggregated, global_params.active), start)
    calibrated = None
    if parts.calibrate is not None:
      keys = calibration.draw_keys(inputs.seed_key, inputs.round_num)
      params, calibrated = calibration.calibrate_or_keep(
        parts.calibrate, params, stop, inputs.server_images, keys, tally.num_accepted
      )
    mean = Losses(*aggregation.mean_over_accepted(losses, weights, accepted, tally, axis))
    return params, RoundMetrics(mean, losses.total, accepted, distance, calibrated)

  run = functools.partial(jax.jit, static_argnums=0, donate_argnums=1)(shard_round(body, placement))

  def arguments(params, plan, inputs):
    if plan.keep and inputs.clients.kept is None:
      raise ValueError('expected the blocks that each client keeps')
    return (plan.shape, params, np.int32(plan.start), np.int32(plan.stop), inputs)

  return FederatedRound(
    apply=lambda params, plan, inputs: run(*arguments(params, plan, inputs)),
    lower=lambda params, plan, inputs: run.lower(*arguments(params, plan, inputs)),
    body=body,
  )


def _train_clients(
  config: Config,
  parts: RoundParts,
  placement: Placement,
  global_params: StageParams,
  inputs: RoundInputs,
  client_steps: int,
) -> tuple[Any, DivergenceSums, Losses, Bool[Array, ' K'], Float[Array, ' K']]:
  """Trains the clients chunk by chunk; a chunk takes the steps of its busiest client.

  Returns:
    The aggregator's state and the divergence's sums; each client's losses, whether it is accepted, and its weight.
  """
  client, aggregator, raveler = config.client, parts.aggregator, parts.client_update.options.model.raveler
  global_active = raveler.ravel(global_params.active)
  chunk = scheduling.run_layout(config, placement.num_devices).chunk
  sizes = aggregation.weigh_clients(aggregator, inputs.clients.num_images, inputs.stage_round)
  weights = aggregation.client_weights(sizes, inputs.clients.returned, placement.axis)

  def upload(slot: ClientSlots, keys: ClientKeys, num_steps: Integer) -> tuple[Raveled, Losses, Bool[Array, '']]:
    data = ClientData(inputs.images, slot.image_ids, slot.num_images)
    own = global_params if slot.kept is None else stages.keep_blocks(global_params, slot.kept)
    params, losses = parts.client_update.apply(own, data, keys, num_steps)
    if slot.kept is not None and 'embedding' in own.active:
      params = raveler.ravel(stages.put_blocks(global_params.active, raveler.unravel(params, own.active), slot.kept))
    params = aggregation.clip_update(params, global_active, config.server_update_clip)
    valid = aggregation.is_valid_update(params, losses.total, inputs.loss_limit)
    return params, losses, slot.returned & valid

  def prepare(uploads: Uploads) -> Uploads:
    return aggregation.prepare_uploads(aggregator, raveler, uploads, global_params.active, inputs.stage_round)

  def add_chunk(carry, scanned):
    (state, sums, first), (slots, chunk_weights) = carry, scanned

    def draw_keys(client_id):
      keys = client_update.draw_keys(inputs.seed_key, inputs.round_num, client_id)
      if client.dp_noise_multiplier:
        keys = keys._replace(noise=privacy.draw_noise_key(inputs.seed_key, inputs.round_num, client_id))
      return keys

    taken = batching.client_steps(slots.num_images, client.local_epochs, client.batch_size)
    num_steps = client_steps or taken.max()
    params, losses, accepted = jax.vmap(upload, in_axes=(0, 0, None))(
      slots, jax.vmap(draw_keys)(slots.client_ids), num_steps
    )
    uploads = Uploads(params, chunk_weights, accepted, slots.kept)
    state, sums = aggregator.add(state, prepare(uploads), first), divergence.add(sums, uploads, global_active)
    return (state, sums, first + chunk), (losses, accepted)

  start = (
    aggregator.init(global_active, len(weights)),
    divergence.init(aggregator, global_active),
    jnp.int32(0),
  )
  (state, sums, _), results = jax.lax.scan(add_chunk, start, scheduling.chunk_clients((inputs.clients, weights), chunk))
  return state, sums, *jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results), weights
