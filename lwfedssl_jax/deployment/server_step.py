"""The server's share of a round, compiled: acceptance and addition of an update, the end of aggregation, calibration.

The same operations in the same order as in `federated.round`, so that they round alike.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import stages
from lwfedssl_jax.base import Params
from lwfedssl_jax.config import Config
from lwfedssl_jax.deployment import components
from lwfedssl_jax.federated import aggregation, calibration, divergence, server_optimizer
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.federated.round_types import RoundMetrics
from lwfedssl_jax.federated.training_step import Losses
from lwfedssl_jax.stages import StagePlan, StageShape


class ServerStep:
  """Aggregates the updates of a round's clients, one at a time, and calibrates the result."""

  def __init__(self, config: Config, image_size: int, server_images: np.ndarray):
    """Prepares the step.

    Args:
      config: the run.
      image_size: side of the images, pixels.
      server_images: for calibration, uint8 (A, S, S, 3).
    """
    self._config = config
    self._raveler = make_model(config.model, config.objective, image_size).raveler
    self._aggregator = aggregation.make_aggregator(config.method)
    self._optimizer = server_optimizer.make_server_optimizer(config.method)
    self._calibrate = None
    if config.uses_calibration:
      self._calibrate = jax.jit(self._build_calibration(image_size), static_argnums=0)
      self._server_images = jnp.asarray(server_images)
    self._start = jax.jit(self._start_round, static_argnums=(0, 3))
    self._add = jax.jit(self._add_client)
    self._finish = jax.jit(self._finish_round)

  def run(
    self,
    params: Params,
    server_state: Any,
    plan: StagePlan,
    updates: list[tuple[dict[str, np.ndarray], np.ndarray] | None],
    num_images: np.ndarray,
    loss_limit: float,
    seed_key: Any,
    round_num: int,
  ) -> tuple[Params, RoundMetrics]:
    """Returns the new parameters, and the round's metrics in the order of `updates`.

    Args:
      params: the global parameters.
      server_state: of the server's optimizer.
      plan: of the round's stage.
      updates: (active components, three losses) of each client, None for a lost one, in the order of addition.
      num_images: int (K,), of the same clients.
      loss_limit: a client whose mean loss is above it is rejected.
      seed_key: of the attempt.
      round_num: 0-based over the run.
    """
    count, returned = len(updates), np.array([update is not None for update in updates])
    active, sums = self._start(plan.shape, params, np.int32(plan.start), count)
    stage_round = np.int32(plan.stage_round(round_num))
    sizes = aggregation.weigh_clients(self._aggregator, jnp.asarray(num_images, jnp.int32), stage_round)
    weights = aggregation.client_weights(sizes, jnp.asarray(returned))
    losses, accepted = np.zeros((3, count), np.float32), np.zeros(count, bool)
    for position, update in enumerate(updates):
      if update is None:
        continue
      losses[:, position] = update[1]
      trained = components.paste(active, update[0], plan.start)
      own = trained, losses[0, position], weights[position]
      sums, valid = self._add(sums, own, active, np.float32(loss_limit), np.int32(position), stage_round)
      accepted[position] = valid
    tally = aggregation.tally_clients(weights, jnp.asarray(accepted))
    mean = Losses(*aggregation.mean_over_accepted(list(jnp.asarray(losses)), weights, jnp.asarray(accepted), tally))
    distance, calibrated = jnp.float32(0), None
    if accepted.any():
      params, server_state, distance = self._finish(
        params, server_state, np.int32(plan.start), active, sums, accepted, tally
      )
      if self._calibrate is not None:
        keys = calibration.draw_keys(seed_key, np.int32(round_num))
        stop, images = np.int32(plan.stop), self._server_images
        params, calibrated = self._calibrate(plan.static_stop, params, stop, images, keys, tally.num_accepted)
    return params, RoundMetrics(mean, jnp.asarray(losses[0]), jnp.asarray(accepted), distance, calibrated, server_state)

  def _build_calibration(self, image_size: int) -> Any:
    calibrate = calibration.make_calibration(self._config, image_size)

    def run(static_stop, params, stop, images, keys, num_accepted):
      stop = stop if static_stop is None else static_stop
      return calibration.calibrate_or_keep(calibrate, params, stop, images, keys, num_accepted)

    return run

  def _start_round(self, shape: StageShape, params: Params, start: Any, count: int) -> Any:
    active = stages.split(params, shape, start).active
    global_active = self._raveler.ravel(active)
    sums = (self._aggregator.init(global_active, count), divergence.init(self._aggregator, global_active))
    return active, sums

  def _add_client(
    self, sums: Any, own: tuple[Params, Any, Any], active: Params, loss_limit: Any, position: Any, stage_round: Any
  ) -> Any:
    trained, loss, weight = own
    global_active = self._raveler.ravel(active)

    def accept(params, loss):
      clipped = aggregation.clip_update(params, global_active, self._config.server_update_clip)
      return clipped, aggregation.is_valid_update(clipped, loss, loss_limit)

    vectors = jax.tree.map(lambda leaf: leaf[None], self._raveler.ravel(trained))
    clipped, valid = jax.vmap(accept)(vectors, loss[None])
    uploads = aggregation.Uploads(clipped, weight[None], valid)
    prepared = aggregation.prepare_uploads(self._aggregator, self._raveler, uploads, active, stage_round)
    state = self._aggregator.add(sums[0], prepared, position)
    return (state, divergence.add(sums[1], uploads, global_active)), valid[0]

  def _finish_round(
    self, params: Params, server_state: Any, start: Any, active: Params, sums: Any, accepted: Any, tally: Any
  ) -> tuple[Params, Any, Any]:
    global_active = self._raveler.ravel(active)
    aggregated = aggregation.aggregate_or_keep(self._aggregator, sums[0], accepted, tally, global_active)
    distance = divergence.finish(sums[1], tally, aggregated, global_active)
    stepped, server_state = server_optimizer.take_step(
      self._optimizer, server_state, aggregated, global_active, tally.num_accepted
    )
    return stages.merge(params, self._raveler.unravel(stepped, active), start), server_state, distance
