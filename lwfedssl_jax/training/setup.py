"""Set-up of a run: the resolved configuration, and what the driver and every round runner share."""

from typing import Any

import jax
import numpy as np

from lwfedssl_jax import config as configs
from lwfedssl_jax import devices, rng, stages
from lwfedssl_jax.base import Params
from lwfedssl_jax.config import Config
from lwfedssl_jax.data.federated_dataset import FederatedDataset
from lwfedssl_jax.evaluation.monitor import Monitor
from lwfedssl_jax.federated import (
  calibration,
  client_state,
  execution,
  privacy,
  round_loader,
  scheduling,
  server_optimizer,
)
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.resources import communication, planner, server_planner
from lwfedssl_jax.stages import StagePlan, StageShape
from lwfedssl_jax.workdir import run_dir


class RunSetup:
  """The constants of a run, each a pure function of the configuration and the data."""

  def __init__(self, config: Config, data: FederatedDataset):
    self.config, self.data = config, data
    self.plans = stages.make_plans(config)
    self.num_rounds = sum(plan.num_rounds for plan in self.plans)
    self.model = make_model(config.model, config.objective, data.image_size)
    self.mesh = devices.make_mesh(config.run.num_devices)
    self.sharding = devices.sharding(self.mesh)
    fast_to_compile = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
    self._init = jax.jit(
      lambda seed: self.model.init_params(rng.key(seed, rng.Stream.INIT)),
      compiler_options=fast_to_compile,
      out_shardings=self.sharding,
    )
    self.monitor = Monitor(self.model.encoder, data.dataset, config.run, self.mesh)
    self.payload = communication.make_payload(config, data.image_size)
    self.sizes = np.array([len(ids) for ids in data.client_images])

  def init(self) -> Params:
    """Returns the parameters before the first round."""
    return self._init(self.config.run.seed)

  def start_server(self, plan: StagePlan) -> Any:
    """Returns the state of the server's optimizer at the start of a stage; None without one."""
    init = jax.jit(self._start_server, static_argnums=0, out_shardings=self.sharding)
    return init(plan.shape) if self.config.method.server_optimizer != 'none' else None

  def trace_server(self, rounds_done: int) -> Any:
    """Returns the shapes of the state of the server's optimizer after a number of rounds (1 or more)."""
    return jax.eval_shape(lambda: self._start_server(self.find_plan(rounds_done - 1).shape))

  def _start_server(self, shape: StageShape) -> Any:
    return server_optimizer.init_state(self.config.method, self.model, shape)

  def find_plan(self, round_num: int) -> StagePlan:
    """Returns the stage plan of a round (0-based, over the run)."""
    return stages.find_plan(self.plans, round_num)


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
    UsageError: no step fits --client_memory_budget_mb or --server_memory_budget_mb, or a package is missing.
  """
  privacy.require_accountant(config)
  client_state.check(config)
  config, text = with_execution(configs.with_values(config, {'image_size': data.image_size})), ''
  if config.client.client_memory_budget_mb:
    plan = planner.fit(config, data.image_size)
    config, text = plan.config, planner.describe(plan)
  if config.method.server_memory_budget_mb and config.uses_calibration:
    batch_size = calibration.plan_batches(config, len(data.server_images)).batch_size
    server = server_planner.fit(config, data.image_size, batch_size)
    config, text = server.config, '\n'.join(filter(None, [text, server_planner.describe(server)]))
  return with_chunk(config, data), text
