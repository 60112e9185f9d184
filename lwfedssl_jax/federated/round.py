"""One round: clients train the active part, the server aggregates, then calibrates (arXiv 2401.11647, Algorithm 1).

A round is one jitted function. What differs between rounds comes in as arrays, so all rounds of a stage, and
all layer-wise stages after the first, run the same executable.

With a mesh the clients are shared between its devices, each of which adds up its own; what the devices tell each other
is one sum of the active parameters and a few scalars a round. Calibration divides every batch between them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lwfedssl_jax import rng, stages, trees
from lwfedssl_jax.base import FederatedRound, Params
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import batching
from lwfedssl_jax.devices import AXIS
from lwfedssl_jax.federated import aggregation, local, optimizer, packing
from lwfedssl_jax.models.vit import make_encoder
from lwfedssl_jax.objectives import make_objective
from lwfedssl_jax.objectives.alignment import make_alignment
from lwfedssl_jax.stages import StagePlan, StageShape


class Clients(NamedTuple):
  """The sampled clients of a round in K seats (see packing.py), at most M images each.

  Attributes:
    client_ids: (K,) int32.
    image_ids: (K, M) int32 into the images; a client's own first, padding after.
    num_images: (K,) int32; 0 in an empty seat.
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
    images: (N, S, S, 3) uint8, the training images; or, with a placement that streams, those of this round's clients,
      for each device its own.
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
  elif config.uses_alignment:
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


class Placement(NamedTuple):
  """Where a round is computed and where its images are.

  Attributes:
    mesh: see devices.py; None: one device.
    streams: each round brings its own clients' images, divided between the devices; else every device holds all.
  """

  mesh: Mesh | None = None
  streams: bool = False

  @property
  def num_devices(self) -> int:
    return self.mesh.size if self.mesh is not None else 1


def input_specs(placement: Placement) -> RoundInputs:
  """Returns how each of a round's inputs is divided between the devices."""
  whole, divided = PartitionSpec(), PartitionSpec(AXIS)
  return RoundInputs(
      whole, whole, divided if placement.streams else whole, Clients(*[divided] * len(Clients._fields)), whole, whole)


def make_layout(config: Config, num_devices: int = 1) -> packing.Layout:
  """Returns the layout of a run's rounds."""
  return packing.make_layout(
      config.effective_clients_per_round, config.client.client_chunk or default_chunk(), num_devices)


def make_round(
    config: Config, image_size: int, max_client_images: int, placement: Placement = Placement(), client_steps: int = 0
) -> FederatedRound:
  """Builds the round of a run.

  Args:
    config: the run's configuration.
    image_size: side of the images, pixels.
    max_client_images: images of the largest client; room for its steps is made.
    placement: of computation and images; results do not depend on it but for the rounding of sums.
    client_steps: steps that every client takes in a round, where all take as many: a loop whose length is known needs
      no look at the device between steps. 0: they differ.

  Returns:
    `init(key) -> params`, the whole tree, float32, and `apply(params, plan, inputs) -> (params, RoundMetrics)`.
    `apply` gives the parameters' buffers away: the ones passed in are not to be used again.
  """
  rules = make_rules(config, image_size)
  server_rules = make_rules(config, image_size, for_server=True)
  client, method, mesh = config.client, config.method, placement.mesh
  steps = batching.steps_per_epoch(max_client_images, client.batch_size)
  chunk = make_layout(config, placement.num_devices).chunk
  add_devices = (lambda x: x) if mesh is None else functools.partial(jax.lax.psum, axis_name=AXIS)
  join_devices = (lambda x: x) if mesh is None else functools.partial(
      jax.lax.all_gather, axis_name=AXIS, tiled=True)

  def init(key):
    params = rules.encoder.init(jax.random.fold_in(key, 0))
    return params | rules.objective.init(jax.random.fold_in(key, 1), rules.encoder.width)

  def plan_client(inputs, member):
    shuffle_key, augment_key = round_keys(inputs, rng.Stream.SHUFFLE, rng.Stream.AUGMENT, member.client_ids)
    return augment_key, *batching.plan_epochs(
        shuffle_key, member.image_ids, member.num_images, client.local_epochs, steps, client.batch_size)

  def train_clients(inputs, active, frozen, start):
    """Runs the clients in chunks; of a mean only the weighted sum is kept, so memory does not grow with their number.

    A chunk takes the steps of its busiest client. If no update can be used, the active part stays as it was received.
    """
    members = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), inputs.clients)
    weights = jnp.where(members.returned, members.num_images, 0).astype(jnp.float32)
    weights = weights / jnp.maximum(add_devices(weights.sum()), 1)
    received = trees.pack(active)

    def update_of(member, plan, num_steps):
      augment_key, ids, mask = plan
      trained, losses = local.train(
          rules, augment_key, active, frozen, start, inputs.images, ids, mask, num_steps=num_steps)
      update = aggregation.clip_update(trees.pack(trained), received, method.client_update_clip)
      return update, losses, member.returned & aggregation.is_sound(update, losses.total, inputs.loss_limit)

    def add_chunk(total, scanned):
      chunk_members, chunk_weights = scanned
      plans = jax.vmap(functools.partial(plan_client, inputs))(chunk_members)
      taken = plans[2].any(axis=(0, 2))
      num_steps = client_steps or jnp.where(taken, jnp.arange(1, len(taken) + 1), 0).max()
      updates, losses, accepted = jax.vmap(update_of, in_axes=(0, 0, None))(chunk_members, plans, num_steps)
      if method.aggregation != 'mean':
        return total, (losses, accepted, updates)
      chunk_sum = aggregation.weighted_sum(jnp.where(accepted, chunk_weights, 0), updates)
      return jax.tree.map(jnp.add, total, chunk_sum), (losses, accepted, None)

    zeros = jax.tree.map(jnp.zeros_like, received)
    total, scanned = jax.lax.scan(add_chunk, zeros, (members, weights))
    losses, accepted, updates = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), scanned)
    weights = weights.reshape(-1)
    trusted = jnp.where(accepted, weights, 0)
    sums = jnp.array([accepted.sum(), (accepted != (weights > 0)).sum(), trusted.sum()])
    num_accepted, num_left_out, trusted_sum = add_devices(sums)
    trusted_sum = jnp.maximum(trusted_sum, 1e-12)
    if method.aggregation == 'mean':
      # With everybody accepted the weights add up to one already; dividing would only round.
      share = jnp.where(num_left_out == 0, 1, trusted_sum)
      combined = jax.tree.map(lambda leaf: leaf / share, add_devices(total))
    else:
      combined = aggregation.order_statistic(
          method.aggregation, method.trim_fraction, *jax.tree.map(join_devices, (accepted, updates)))
    combined = trees.unpack(trees.select(num_accepted > 0, combined, received), active)
    return combined, losses, accepted, trusted / trusted_sum, num_accepted > 0

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
    divided = mesh is not None and batch_size % placement.num_devices == 0
    own_rules = server_rules._replace(axis=AXIS if divided else None)
    trained, losses = local.train(
        own_rules, augment_key, active, frozen, 0, inputs.server_images, ids, mask, depth=stop)
    return stages.merge(params, trained, 0), losses

  def on_device(shape, params, start, stop, inputs):
    """The round as one of the devices computes it."""
    active, frozen = stages.split(params, shape, start)
    combined, losses, accepted, weights, any_accepted = train_clients(inputs, active, frozen, start)
    params, calibration = stages.merge(params, combined, start), None
    if config.uses_calibration:
      calibrated, calibration = calibrate(inputs, params, stop)
      sound = aggregation.is_sound(calibrated, calibration.total, jnp.inf)
      params = trees.select(any_accepted & sound, calibrated, params)
    weighted = local.Losses(*add_devices(
        jnp.stack([jnp.where(weights > 0, weights * values, 0).sum() for values in losses])))
    return params, RoundMetrics(weighted, losses.total, accepted, calibration)

  def over_devices(shape: StageShape, params, start, stop, inputs: RoundInputs):
    body = functools.partial(on_device, shape)
    if mesh is not None:
      whole, divided = PartitionSpec(), PartitionSpec(AXIS)
      body = jax.shard_map(
          body, mesh=mesh, in_specs=(whole, whole, whole, input_specs(placement)),
          out_specs=(whole, RoundMetrics(whole, divided, divided, whole)), check_vma=False)
    return body(params, start, stop, inputs)

  run = functools.partial(jax.jit, static_argnums=0, donate_argnums=1)(over_devices)

  def apply(params: Params, plan: StagePlan, inputs: RoundInputs):
    return run(plan.shape, params, np.int32(plan.start), np.int32(plan.stop), inputs)

  apply.jitted, apply.body = run, over_devices
  return FederatedRound(init, apply)


def default_chunk() -> int:
  """Clients side by side where nothing is asked: measured, docs/performance.md."""
  return 1 if jax.default_backend() == 'cpu' else 10
