"""One round: clients train the active part, the server aggregates, then calibrates (arXiv 2401.11647, Algorithm 1).

A round is one jitted function. What differs between rounds comes in as arrays, so all rounds of a stage, and
all layer-wise stages after the first, run the same executable.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax import rng, stages, trees
from lwfedssl_jax.base import FederatedRound, Params
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import batching
from lwfedssl_jax.federated import aggregation, local, optimizer
from lwfedssl_jax.models.vit import make_encoder
from lwfedssl_jax.objectives import make_objective
from lwfedssl_jax.objectives.alignment import make_alignment
from lwfedssl_jax.stages import StagePlan, StageShape


class Clients(NamedTuple):
  """The sampled clients of a round; K clients, at most M images each.

  Attributes:
    client_ids: (K,) int32.
    image_ids: (K, M) int32 into the images; a client's own first, padding after.
    num_images: (K,) int32.
    returned: (K,) bool; the others are left out of the mean.
  """

  client_ids: Any
  image_ids: Any
  num_images: Any
  returned: Any


class RoundInputs(NamedTuple):
  """Everything a round reads besides the parameters.

  Attributes:
    seed_key: typed key of the run's seed.
    round_num: () int32, 0-based over the whole run.
    images: (N, S, S, 3) uint8, the training images.
    clients: who trains.
    server_images: (A, S, S, 3) uint8, the server's own; (0, ...) without calibration.
    loss_limit: () float32; a client whose mean loss is above it is left out.
  """

  seed_key: Any
  round_num: Any
  images: Any
  clients: Clients
  server_images: Any
  loss_limit: Any


class RoundMetrics(NamedTuple):
  """Means over the clients that were accepted, weighted by their images; `client_losses` and `accepted` are (K,).

  A client is accepted if it returned and its update is sound (`aggregation.is_sound`).
  """

  client: local.Losses
  client_losses: Any
  accepted: Any
  calibration: local.Losses | None


def make_rules(config: Config, image_size: int, *, for_server: bool = False) -> local.LocalRules:
  """Builds the local-training rules of a client, or of the server's calibration."""
  client, method, objective = config.client, config.method, config.objective
  batch_size, learning_rate = client.batch_size, client.learning_rate
  alignment = None
  if for_server:
    batch_size = method.calibration_batch_size or batch_size
    learning_rate = method.calibration_learning_rate or learning_rate
  elif config.representation_alignment:
    alignment = make_alignment(objective.alignment_kind, objective.temperature)
  return local.LocalRules(
      encoder=make_encoder(config.model, image_size, rematerialize=client.rematerialize),
      objective=make_objective(objective, config.model.compute_dtype),
      alignment=alignment,
      alignment_weight=objective.alignment_weight,
      optimizer=optimizer.make_optimizer(learning_rate, batch_size, client.weight_decay),
      block_learning_rate_decay=client.block_learning_rate_decay,
      augment=config.augment,
      micro_batch_size=0 if for_server else client.micro_batch_size,
  )


def round_keys(inputs: RoundInputs, shuffle: rng.Stream, augment: rng.Stream, *indices: Any) -> Any:
  """Returns this round's keys of two streams, (2,), for one client or the server; one draw instead of two."""
  keys = jax.vmap(lambda stream: rng.key(inputs.seed_key, stream, inputs.round_num, *indices))
  return keys(jnp.array([shuffle, augment]))


def largest_divisor(number: int, limit: int) -> int:
  """Returns the largest divisor of `number` that is at most `limit` (>= 1)."""
  return next(d for d in range(min(limit, number), 0, -1) if number % d == 0)


def make_round(config: Config, image_size: int, max_client_images: int) -> FederatedRound:
  """Builds the round of a run.

  Args:
    config: the run's configuration.
    image_size: side of the images, pixels.
    max_client_images: images of the largest client; fixes the number of steps.

  Returns:
    `init(key) -> params`, the whole tree, float32, and `apply(params, plan, inputs) -> (params, RoundMetrics)`.
    `apply` gives the parameters' buffers away: the ones passed in are not to be used again.
  """
  rules = make_rules(config, image_size)
  server_rules = make_rules(config, image_size, for_server=True)
  client, method = config.client, config.method
  steps = batching.steps_per_epoch(max_client_images, client.batch_size)
  chunk = largest_divisor(config.clients_per_round, client.client_chunk or default_chunk())

  def init(key):
    params = rules.encoder.init(jax.random.fold_in(key, 0))
    return params | rules.objective.init(jax.random.fold_in(key, 1), rules.encoder.width)

  def train_client(inputs, active, frozen, start, member):
    shuffle_key, augment_key = round_keys(inputs, rng.Stream.SHUFFLE, rng.Stream.AUGMENT, member.client_ids)
    ids, mask = batching.plan_epochs(
        shuffle_key, member.image_ids, member.num_images, client.local_epochs, steps, client.batch_size)
    return local.train(rules, augment_key, active, frozen, start, inputs.images, ids, mask)

  def train_clients(inputs, active, frozen, start):
    """Runs the clients in chunks; of a mean only the weighted sum is kept, so memory does not grow with their number.

    If no update can be used, the active part stays as it was received.
    """
    members = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), inputs.clients)
    weights = jnp.where(members.returned, members.num_images, 0).astype(jnp.float32)
    weights = weights / jnp.maximum(weights.sum(), 1)
    received = trees.pack(active)

    def update_of(member):
      trained, losses = train_client(inputs, active, frozen, start, member)
      update = aggregation.clip_update(trees.pack(trained), received, method.client_update_clip)
      return update, losses, member.returned & aggregation.is_sound(update, losses.total, inputs.loss_limit)

    def add_chunk(total, scanned):
      chunk_members, chunk_weights = scanned
      updates, losses, accepted = jax.vmap(update_of)(chunk_members)
      if method.aggregation != 'mean':
        return total, (losses, accepted, updates)
      chunk_sum = aggregation.weighted_sum(jnp.where(accepted, chunk_weights, 0), updates)
      return jax.tree.map(jnp.add, total, chunk_sum), (losses, accepted, None)

    zeros = jax.tree.map(jnp.zeros_like, received)
    total, scanned = jax.lax.scan(add_chunk, zeros, (members, weights))
    losses, accepted, updates = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), scanned)
    weights = weights.reshape(-1)
    trusted = jnp.where(accepted, weights, 0)
    if method.aggregation == 'mean':
      # With everybody accepted the weights add up to one already; dividing would only round.
      share = jnp.where((accepted == (weights > 0)).all(), 1, jnp.maximum(trusted.sum(), 1e-12))
      combined = jax.tree.map(lambda leaf: leaf / share, total)
    else:
      combined = aggregation.order_statistic(method.aggregation, method.trim_fraction, accepted, updates)
    combined = trees.unpack(trees.select(accepted.any(), combined, received), active)
    return combined, losses, accepted, trusted / jnp.maximum(trusted.sum(), 1e-12)

  def calibrate(inputs, params, stop):
    """Trains everything that exists end to end on the server's images, from a fresh optimizer and target."""
    num_images = inputs.server_images.shape[0]
    batch_size = min(method.calibration_batch_size or client.batch_size, num_images)
    shuffle_key, augment_key = round_keys(inputs, rng.Stream.CALIBRATION_SHUFFLE, rng.Stream.CALIBRATION_AUGMENT)
    ids, mask = batching.plan_epochs(
        shuffle_key, jnp.arange(num_images), jnp.int32(num_images), method.calibration_epochs,
        batching.steps_per_epoch(num_images, batch_size), batch_size)
    whole = StageShape(rules.encoder.depth, trains_embedding=True)
    active, frozen = stages.split(params, whole, 0)
    trained, losses = local.train(
        server_rules, augment_key, active, frozen, 0, inputs.server_images, ids, mask, depth=stop)
    return stages.merge(params, trained, 0), losses

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
  def run(shape: StageShape, params, start, stop, inputs: RoundInputs):
    active, frozen = stages.split(params, shape, start)
    combined, losses, accepted, weights = train_clients(inputs, active, frozen, start)
    params, calibration = stages.merge(params, combined, start), None
    if config.server_calibration:
      calibrated, calibration = calibrate(inputs, params, stop)
      sound = aggregation.is_sound(calibrated, calibration.total, jnp.inf)
      params = trees.select(accepted.any() & sound, calibrated, params)
    weighted = jax.tree.map(lambda x: jnp.where(weights > 0, weights * x, 0).sum(), losses)
    return params, RoundMetrics(weighted, losses.total, accepted, calibration)

  def apply(params: Params, plan: StagePlan, inputs: RoundInputs):
    return run(plan.shape, params, jnp.int32(plan.start), jnp.int32(plan.stop), inputs)

  apply.jitted = run
  return FederatedRound(init, apply)


def default_chunk() -> int:
  """Clients side by side where nothing is asked: measured, docs/performance.md."""
  return 1 if jax.default_backend() == 'cpu' else 10
