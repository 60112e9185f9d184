"""Pretrains an encoder over simulated clients.

    python -m experiments.pretrain --preset=quickstart --workdir=runs/quickstart

On several hosts the same command on each of them, with --coordinator_address (docs/clusters.md).
"""

from typing import Any

from absl import flags as absl_flags

from lwfedssl_jax import config as configs
from lwfedssl_jax.base import UsageError
from lwfedssl_jax.config import Config

from . import command, flags

FLAGS = absl_flags.FlagValues()
_COORDINATOR = absl_flags.DEFINE_string(
    'coordinator_address', '', 'HOST:PORT of the first of several processes, or auto: as the cluster says; empty: one',
    flag_values=FLAGS)
_PROCESSES = absl_flags.DEFINE_integer('num_processes', 1, 'processes of the run', flag_values=FLAGS)
_SEEDS = absl_flags.DEFINE_integer(
    'num_seeds', 1, 'seeds, from --seed on, computed side by side in one program; each in a folder of its own',
    lower_bound=1, flag_values=FLAGS)
_PROCESS_ID = absl_flags.DEFINE_integer('process_id', 0, 'which of them this is, from 0', flag_values=FLAGS)


def _check_workdir(config: Config) -> None:
  """Refuses the first process's workdir in all processes, before anything is printed. Raises UsageError."""
  from lwfedssl_jax import devices, run_log

  refused = None
  if devices.is_first_process():
    try:
      run_log.check_workdir(config)
    except UsageError as error:
      refused = error
  if devices.any_process(refused is not None):
    raise refused or UsageError('--workdir: expected a folder that the first process can use, see its message')


def main() -> dict[str, Any]:
  """Runs the configured pretraining and returns its summary."""
  config = flags.config_from_flags(FLAGS)

  from lwfedssl_jax import devices, side_by_side, training
  from lwfedssl_jax.data import federation

  command.use_compilation_cache()
  devices.connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)
  if _SEEDS.value > 1:
    flags.print_config(config)
    return side_by_side.train(config, _SEEDS.value)
  data = federation.load(config)
  if not config.client.client_memory_budget_mb:  # a memory plan changes fields; the run's own check compares them
    _check_workdir(configs.with_values(config, {'image_size': data.image_size}))
  if devices.is_first_process():
    flags.print_config(config)
  return training.train(config, data)


COMMAND = command.Command(__doc__, FLAGS, main, has_config=True)


def run() -> None:
  """Runs this command line."""
  command.run(COMMAND)


if __name__ == '__main__':
  run()
