"""One round: clients train the active part, the server aggregates, then calibrates (arXiv 2401.11647, Algorithm 1).

A round is one jitted function. Differences between rounds are array inputs, so that all rounds of a stage, and all
layer-wise stages after the first, run the same executable.

With a mesh the clients are sharded over its devices. Each device sums its own clients; a round exchanges one sum of the
active parameters and a few scalars. Calibration shards every batch over the devices.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
import optax

from lwfedssl_jax import stages
from lwfedssl_jax.base import FederatedRound, Function, Integer, Params
from lwfedssl_jax.config import Config
from lwfedssl_jax.federated import aggregation, calibration, client_update, divergence, server_optimizer
from lwfedssl_jax.federated.aggregation import Aggregator
from lwfedssl_jax.federated.aggregation_by_block import by_block, mark_existing
from lwfedssl_jax.federated.client_update import ClientUpdate
from lwfedssl_jax.federated.clients import Training, train_clients
from lwfedssl_jax.federated.placement import Placement, shard_round
from lwfedssl_jax.federated.round_types import RoundInputs, RoundMetrics
from lwfedssl_jax.federated.training_step import Losses
from lwfedssl_jax.stages import StageShape


class RoundParts(NamedTuple):
  """The parts of a round, each usable alone; None: the server does not train, or has no optimizer."""

  client_update: ClientUpdate
  aggregator: Aggregator
  calibrate: Function | None
  server_optimizer: optax.GradientTransformation | None = None


def make_parts(config: Config, image_size: int, placement: Placement = Placement()) -> RoundParts:
  """Builds the configured parts of a round."""
  calibrate = calibration.make_calibration(config, image_size, placement) if config.uses_calibration else None
  return RoundParts(
    client_update.make_client_update(config, image_size),
    aggregation.make_aggregator(config.method, placement.axis),
    calibrate,
    server_optimizer.make_server_optimizer(config.method),
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
  body = _make_body(config, placement, client_steps, parts)
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


def _make_body(config: Config, placement: Placement, client_steps: int, parts: RoundParts) -> Function:
  """Builds (stage shape, params, start, stop, inputs) -> (params, RoundMetrics): Algorithm 1's loop over a round."""
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
    training = Training(parts.client_update, aggregator, placement, client_steps)
    trained = train_clients(config, training, global_params, inputs)
    tally = aggregation.tally_clients(trained.weights, trained.accepted, axis)
    aggregated = aggregation.aggregate_or_keep(aggregator, trained.aggregate, trained.accepted, tally, global_active)
    exists = mark_existing(raveler, global_params.active, stop) if differ else None
    distance = divergence.finish(trained.distances, tally, aggregated, global_active, axis, exists)
    stepped, server_state = server_optimizer.take_step(
      parts.server_optimizer, inputs.server_state, aggregated, global_active, tally.num_accepted
    )
    params = stages.merge(params, raveler.unravel(stepped, global_params.active), start)
    calibrated = None
    if parts.calibrate is not None:
      keys = calibration.draw_keys(inputs.seed_key, inputs.round_num)
      params, calibrated = calibration.calibrate_or_keep(
        parts.calibrate, params, stop, inputs.server_images, keys, tally.num_accepted
      )
    mean = aggregation.mean_over_accepted(trained.losses, trained.weights, trained.accepted, tally, axis)
    return params, RoundMetrics(
      Losses(*mean), trained.losses.total, trained.accepted, distance, calibrated, server_state, trained.states
    )

  return body
