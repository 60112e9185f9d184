"""Pretrains an encoder over simulated clients.

    python -m experiments.pretrain --preset=quickstart --workdir=runs/quickstart

On several hosts, run the same command on each with --coordinator_address (docs/clusters.md).
"""

from typing import Any

from absl import flags as absl_flags

from . import command, flags

FLAGS = absl_flags.FlagValues()
_COORDINATOR = absl_flags.DEFINE_string(
  'coordinator_address',
  '',
  "HOST:PORT of the first process; auto: from the cluster's environment; empty: one process",
  flag_values=FLAGS,
)
_PROCESSES = absl_flags.DEFINE_integer('num_processes', 1, 'number of processes', flag_values=FLAGS)
_PROCESS_ID = absl_flags.DEFINE_integer('process_id', 0, 'index of this process, from 0', flag_values=FLAGS)


def main() -> dict[str, Any]:
  """Runs the configured pretraining and returns its summary."""
  config = flags.config_from_flags(FLAGS)

  from lwfedssl_jax import devices
  from lwfedssl_jax.training import train

  command.use_compilation_cache()
  devices.connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)
  return train.train(config, on_start=flags.print_config)


COMMAND = command.Command(__doc__, FLAGS, main, has_config=True)


def run() -> None:
  """Runs this command line."""
  command.run(COMMAND)


if __name__ == '__main__':
  run()
