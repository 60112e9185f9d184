"""The clients of a round: sampled clients train locally, vmapped in chunks that are scanned, and are added up."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax import stages
from lwfedssl_jax.base import Array, Bool, Float, Integer, Raveled
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import batching
from lwfedssl_jax.federated import aggregation, client_update, divergence, privacy, scheduling
from lwfedssl_jax.federated.aggregation import Aggregator, Uploads
from lwfedssl_jax.federated.client_state import ClientState
from lwfedssl_jax.federated.client_update import ClientData, ClientKeys, ClientUpdate
from lwfedssl_jax.federated.divergence import DivergenceSums
from lwfedssl_jax.federated.placement import Placement
from lwfedssl_jax.federated.round_types import ClientSlots, RoundInputs
from lwfedssl_jax.federated.training_step import Losses
from lwfedssl_jax.stages import StageParams


class Training(NamedTuple):
  """How clients train: their update, what adds them up, their placement, and make_round's `client_steps`."""

  client_update: ClientUpdate
  aggregator: Aggregator
  placement: Placement
  client_steps: int


class TrainedClients(NamedTuple):
  """What K clients return.

  Attributes:
    aggregate: the aggregator's state after all of them.
    distances: sums from which `divergence.finish` takes the distance between them.
    losses: means of each.
    accepted: those that returned a valid update.
    states: what each keeps, leaves (K, ...); None where clients keep nothing.
    weights: share of each of the images of all that returned.
  """

  aggregate: Any
  distances: DivergenceSums
  losses: Losses
  accepted: Bool[Array, ' K']
  states: ClientState | None
  weights: Float[Array, ' K']


def train_clients(
  config: Config, training: Training, global_params: StageParams, inputs: RoundInputs
) -> TrainedClients:
  """Trains the clients chunk by chunk; a chunk takes the steps of its busiest client.

  Args:
    config: the run.
    training: see Training.
    global_params: what clients receive.
    inputs: of the round.
  """
  client, aggregator, raveler = config.client, training.aggregator, training.client_update.options.model.raveler
  global_active = raveler.ravel(global_params.active)
  chunk = scheduling.run_layout(config, training.placement.num_devices).chunk
  sizes = aggregation.weigh_clients(aggregator, inputs.clients.num_images, inputs.stage_round)
  weights = aggregation.client_weights(sizes, inputs.clients.returned, training.placement.axis)

  def draw_keys(client_id: Integer) -> ClientKeys:
    keys = client_update.draw_keys(inputs.seed_key, inputs.round_num, client_id)
    if client.dp_noise_multiplier:
      keys = keys._replace(noise=privacy.draw_noise_key(inputs.seed_key, inputs.round_num, client_id))
    return keys

  def upload(slot: ClientSlots, keys: ClientKeys, num_steps: Integer) -> tuple[Raveled, Any]:
    data = ClientData(inputs.images, slot.image_ids, slot.num_images)
    own = global_params if slot.kept is None else stages.keep_blocks(global_params, slot.kept)
    params, losses, state = training.client_update.apply(own, data, keys, num_steps, slot.state)
    if slot.kept is not None and 'embedding' in own.active:
      params = raveler.ravel(stages.put_blocks(global_params.active, raveler.unravel(params, own.active), slot.kept))
    params = aggregation.clip_update(params, global_active, config.server_update_clip)
    valid = aggregation.is_valid_update(params, losses.total, inputs.loss_limit)
    return params, (losses, slot.returned & valid, state)

  def add_chunk(carry, scanned):
    (aggregate, distances, first), (slots, chunk_weights) = carry, scanned
    taken = batching.client_steps(slots.num_images, client.local_epochs, client.batch_size)
    num_steps = training.client_steps or taken.max()
    keys = jax.vmap(draw_keys)(slots.client_ids)
    params, results = jax.vmap(upload, in_axes=(0, 0, None))(slots, keys, num_steps)
    uploads = Uploads(params, chunk_weights, results[1], slots.kept)
    prepared = aggregation.prepare_uploads(aggregator, raveler, uploads, global_params.active, inputs.stage_round)
    aggregate, distances = aggregator.add(aggregate, prepared, first), divergence.add(distances, uploads, global_active)
    return (aggregate, distances, first + chunk), results

  start = (aggregator.init(global_active, len(weights)), divergence.init(aggregator, global_active), jnp.int32(0))
  chunks = scheduling.chunk_clients((inputs.clients, weights), chunk)
  (aggregate, distances, _), results = jax.lax.scan(add_chunk, start, chunks)
  losses, accepted, states = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)
  return TrainedClients(aggregate, distances, losses, accepted, states, weights)
