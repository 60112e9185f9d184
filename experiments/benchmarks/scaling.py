"""Suites `clients` and `devices` of experiments.benchmark: scaling with clients, communication between devices."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lwfedssl_jax import config as configs
from lwfedssl_jax import devices, rng, stages
from lwfedssl_jax.base import Params
from lwfedssl_jax.config import Config
from lwfedssl_jax.data.federated_dataset import FederatedDataset
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.federated import client_state, round_loader, sampling, scheduling, server_optimizer
from lwfedssl_jax.federated import round as rounds
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.federated.placement import input_specs
from lwfedssl_jax.federated.round_loader import RoundLoader
from lwfedssl_jax.federated.round_types import RoundInputs
from lwfedssl_jax.resources import collectives, memory

POPULATIONS = (10, 100, 1_000, 10_000)
SAMPLED = 10
CLIENTS_A_ROUND = (10, 100, 1_000)
IMAGES_A_CLIENT = 64
POOL_IMAGES = 4_096  # shared by all clients: storage is shared, work is not
ROUNDS_PLANNED = 64


class Scaled(NamedTuple):
  """A compiled round with its loader.

  Attributes:
    name: what it is.
    run: computes the next round and returns when it is done.
    params: () -> the current parameters.
    initial: the parameters before the first round, on the host.
    images: a round trains on, epochs multiplied in.
    image_bytes: of the images among the round's arguments.
    peak_bytes: of the compiled program, the images among them.
    traffic: collectives of the compiled program.
    active_bytes: of the parameters that the stage trains.
  """

  name: str
  run: Any
  params: Any
  initial: Params
  images: int
  image_bytes: int
  peak_bytes: int
  traffic: list[collectives.Collective]
  active_bytes: int


def _federation(config: Config, server_images: int) -> FederatedDataset:
  """Returns a federated data set of random images, in which clients share a pool.

  They are mosaics of colors. An untrained encoder has nearly equal embeddings of pixel noise, and batch normalization
  would amplify their rounding.
  """
  generator = np.random.default_rng(0)
  side = next(tiles for tiles in (4, 2, 1) if config.model.image_size % tiles == 0)
  colors = generator.integers(0, 256, (POOL_IMAGES, side, side, 3), np.uint8)
  pool = colors.repeat(config.model.image_size // side, axis=1).repeat(config.model.image_size // side, axis=2)
  dataset = ImageDataset('synthetic', pool, None, pool[:0], None, ())
  owned = [
    np.sort(generator.choice(POOL_IMAGES, IMAGES_A_CLIENT, replace=False)) for _ in range(config.effective_num_clients)
  ]
  return FederatedDataset(dataset, owned, np.arange(0), pool[:server_images])


def build(config: Config, name: str) -> Scaled:
  """Compiles the last stage's round on a synthetic data set with IMAGES_A_CLIENT images per client."""
  if config.effective_depth_dropout_keep:
    raise UsageError(f'--depth_dropout_keep: expected 0 with this suite, got {config.method.depth_dropout_keep}')
  data = _federation(config, IMAGES_A_CLIENT if config.uses_calibration else 0)
  plan = stages.make_plans(config)[-1]
  participation = sampling.plan_participation(
    config.run.seed,
    ROUNDS_PLANNED,
    config.effective_num_clients,
    config.effective_clients_per_round,
    config.client.client_dropout,
  )
  placement = round_loader.choose_placement(config, data, participation)
  source = RoundLoader(config, data, participation, placement)
  made = rounds.make_round(config, data.image_size, placement, source.client_steps())
  replicated = devices.sharding(placement.mesh)
  model = make_model(config.model, config.objective, data.image_size)
  params = jax.jit(lambda: model.init_params(rng.key(config.run.seed, rng.Stream.INIT)), out_shardings=replicated)()
  seed_key = jax.jit(lambda: jax.random.key(config.run.seed), out_shardings=replicated)()
  server_images = devices.put(data.server_images, replicated)
  slots = scheduling.run_layout(config, placement.num_devices).slots
  by_client: Any = input_specs(placement).clients.returned
  server_state = server_optimizer.init_state(config.method, model, plan.shape)
  client_states = jax.device_put(
    client_state.start(config, model, plan.shape, slots), devices.sharding(placement.mesh, by_client)
  )
  bounds, initial = (np.int32(plan.start), np.int32(plan.stop)), jax.tree.map(np.array, params)

  def inputs(round_num: int) -> RoundInputs:
    batch = source.load(round_num)
    limit, number = np.float32(np.inf), np.int32(round_num)
    clients = batch.clients._replace(state=client_states)
    return RoundInputs(seed_key, number, batch.images, clients, server_images, limit, number, server_state)

  first = inputs(0)
  compiled = made.lower(params, plan, first).compile()
  numbers = iter(range(ROUNDS_PLANNED))

  def run() -> None:
    nonlocal params
    params, _ = jax.block_until_ready(compiled(params, *bounds, inputs(next(numbers))))

  active = stages.split(params, plan.shape, plan.start).active
  return Scaled(
    name,
    run,
    lambda: params,
    initial,
    config.effective_clients_per_round * config.client.local_epochs * IMAGES_A_CLIENT,
    first.images.nbytes,
    memory.read_analysis(compiled).peak_bytes,
    collectives.read_collectives(compiled.as_text() or ''),
    sum(4 * leaf.size for leaf in jax.tree.leaves(active)),
  )


def client_cases(config: Config) -> Iterator[Scaled]:
  """Builds growing populations with SAMPLED clients per round, growing rounds, and one with streamed images."""
  small: dict[str, Any] = {'batch_size': IMAGES_A_CLIENT // 2, 'rounds_per_stage': ROUNDS_PLANNED}
  a_quarter = POOL_IMAGES * 3 * config.model.image_size**2 / 4 / round_loader.MEGABYTE
  for population in POPULATIONS:
    values = {'num_clients': population, 'clients_per_round': SAMPLED}
    yield build(configs.with_values(config, small | values), f'{SAMPLED} of {population} clients')
  for clients in CLIENTS_A_ROUND:
    values = {'num_clients': clients, 'clients_per_round': 0}
    yield build(configs.with_values(config, small | values), f'{clients} of {clients} clients')
  for name, budget in (('on the device', 0.0), ('streamed, a quarter may be on the device', a_quarter)):
    streamed: dict[str, Any] = {'num_clients': 40, 'clients_per_round': 5, 'device_data_budget_mb': budget}
    yield build(configs.with_values(config, small | streamed), f'5 of 40 clients, images {name}')


def device_cases(config: Config) -> Iterator[Scaled]:
  """Builds the same round on 1, 2, 4, .. devices."""
  found = jax.device_count()
  for count in (2**power for power in range(found.bit_length()) if 2**power <= found):
    yield build(configs.with_values(config, {'num_devices': count}), f'{count} devices')


def differences(cases: Sequence[Scaled]) -> list[float]:
  """Returns the l2 distance of each case's parameters to the first one's, relative to the distance these moved."""
  first = cases[0].params()
  moved = _distance(first, cases[0].initial)
  return [_distance(first, case.params()) / moved for case in cases]


def _distance(one: Params, other: Params) -> float:
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return float(np.sqrt(sum(np.square(np.asarray(a, np.float64) - np.asarray(b)).sum() for a, b in pairs)))
