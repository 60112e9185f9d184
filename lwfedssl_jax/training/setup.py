"""Set-up of a run: the resolved configuration, participants, inputs, the compiled round."""

import dataclasses
import functools

import jax
import numpy as np

from lwfedssl_jax import config as configs
from lwfedssl_jax import devices, rng, stages
from lwfedssl_jax.base import Params
from lwfedssl_jax.config import Config, RunConfig
from lwfedssl_jax.data import batching
from lwfedssl_jax.data.federated_dataset import FederatedDataset
from lwfedssl_jax.evaluation.monitor import Monitor
from lwfedssl_jax.federated import calibration, execution, round_loader, sampling, scheduling
from lwfedssl_jax.federated import round as rounds
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.federated.round_loader import RoundBatch, RoundLoader
from lwfedssl_jax.federated.round_types import RoundInputs
from lwfedssl_jax.resources import accounting, communication, planner, server_planner
from lwfedssl_jax.stages import StagePlan
from lwfedssl_jax.workdir import run_dir

# Runs that differ only in RunConfig (seed, workdir, ...) share a compiled round.
_shared_round = functools.lru_cache(maxsize=4)(rounds.make_round)


class RunSetup:
  """The constants of a run, each a pure function of the configuration and the data."""

  def __init__(self, config: Config, data: FederatedDataset):
    self.config, self.data = config, data
    self.plans = stages.make_plans(config)
    self.num_rounds = sum(plan.num_rounds for plan in self.plans)
    self.participation = sampling.plan_participation(
      config.run.seed,
      self.num_rounds,
      config.effective_num_clients,
      config.effective_clients_per_round,
      config.client.client_dropout,
    )
    self.placement = round_loader.choose_placement(config, data, self.participation)
    self.loader = RoundLoader(config, data, self.participation, self.placement)
    self.model = make_model(config.model, config.objective, data.image_size)
    self.round = _shared_round(
      dataclasses.replace(config, run=RunConfig()), data.image_size, self.placement, self.loader.client_steps()
    )
    self.sharding = devices.sharding(self.placement.mesh)
    fast_to_compile = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
    self._init = jax.jit(
      lambda seed: self.model.init_params(rng.key(seed, rng.Stream.INIT)),
      compiler_options=fast_to_compile,
      out_shardings=self.sharding,
    )
    self._seed_key = jax.jit(
      lambda seed, attempt: rng.key(seed, rng.Stream.RETRY) if attempt else jax.random.key(seed),
      static_argnums=1,
      out_shardings=self.sharding,
    )
    self.monitor = Monitor(self.model.encoder, data.dataset, config.run, self.placement.mesh)
    self.payload = communication.make_payload(config, data.image_size)
    self.sizes = np.array([len(ids) for ids in data.client_images])
    server_images = data.server_images if config.uses_calibration else data.server_images[:0]
    self.server_images = devices.replicate(self.placement.mesh, server_images)

  def init(self) -> Params:
    """Returns the parameters before the first round."""
    return self._init(self.config.run.seed)

  def find_plan(self, round_num: int) -> StagePlan:
    """Returns the stage plan of a round (0-based, over the run)."""
    return self.plans[round_num // self.plans[0].num_rounds]

  def inputs(self, round_num: int, batch: RoundBatch, last_loss: float | None, attempt: int) -> RoundInputs:
    """Returns the inputs of a round; a second attempt uses other randomness."""
    factor = self.config.method.client_loss_limit
    limit = factor * abs(last_loss) if factor and last_loss is not None else np.inf
    return RoundInputs(
      self._seed_key(self.config.run.seed, attempt),
      np.int32(round_num),
      batch.images,
      batch.clients,
      self.server_images,
      np.float32(limit),
    )

  def images_trained(self, round_num: int) -> int:
    """Returns the images that the clients of a round train on, over all local epochs."""
    client = self.config.client
    sizes = [int(self.sizes[i]) for i in self.participation.client_ids[round_num]]
    per_epoch = sum(min(n, batching.steps_per_epoch(n, client.batch_size) * client.batch_size) for n in sizes)
    return client.local_epochs * per_epoch

  def ledger_after(self, rounds_done: int) -> accounting.Ledger:
    """Returns the ledger after some rounds."""
    done = slice(0, rounds_done)
    return accounting.charge_run(
      self.payload,
      self.plans,
      self.config.effective_num_clients,
      self.participation.client_ids[done],
      self.participation.returned[done],
    ).ledger


def with_chunk(config: Config, data: FederatedDataset) -> Config:
  """Resolves --client_chunk: that of the run in the workdir, else by the devices' total memory (CPUs: 1).

  The chunk changes the order of sums, so it must not depend on the free memory.
  """
  if config.client.client_chunk:
    return config
  chunk = run_dir.saved_value(config.run.workdir, 'client_chunk') if config.run.resume else None
  total = devices.total_bytes()
  if not chunk and total is None:
    chunk = scheduling.default_chunk()
  elif not chunk and total is not None:
    budget = config.run.device_data_budget_mb * round_loader.MEGABYTE
    images = data.dataset.train_images.nbytes
    chunk = planner.choose_chunk(config, data.image_size, total - int(min(images, budget or images)))
  return configs.with_values(config, {'client_chunk': chunk})


def with_execution(config: Config) -> Config:
  """Resolves how blocks are executed; a resumed run keeps it on any device, because it changes the last bits."""
  if config.run.resume and config.client.unroll_blocks is None:
    config = configs.with_values(config, {'unroll_blocks': run_dir.saved_value(config.run.workdir, 'unroll_blocks')})
  return execution.resolve(config)


def resolve(config: Config, data: FederatedDataset) -> tuple[Config, str]:
  """Resolves settings that depend on data, memory and devices; returns the configuration and the memory plan's text.

  Raises:
    UsageError: no step fits --client_memory_budget_mb or --server_memory_budget_mb.
  """
  config, text = with_execution(configs.with_values(config, {'image_size': data.image_size})), ''
  if config.client.client_memory_budget_mb:
    plan = planner.fit(config, data.image_size)
    config, text = plan.config, planner.describe(plan)
  if config.method.server_memory_budget_mb and config.uses_calibration:
    batch_size = calibration.plan_batches(config, len(data.server_images)).batch_size
    server = server_planner.fit(config, data.image_size, batch_size)
    config, text = server.config, '\n'.join(filter(None, [text, server_planner.describe(server)]))
  return with_chunk(config, data), text
