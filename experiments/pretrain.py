"""Pretrains an encoder over simulated clients; see `--helpshort` for every flag.

    python -m experiments.pretrain --flagfile=experiments/presets/quickstart.flags --workdir=runs/quickstart

On several hosts the same command on each of them, with --coordinator_address (docs/clusters.md).
"""

from absl import flags as absl_flags

from experiments import flags
from lwfedssl_jax import devices, training

_COORDINATOR = absl_flags.DEFINE_string(
    'coordinator_address', '', 'HOST:PORT of the first of several processes, or auto: as the cluster says; empty: one')
_PROCESSES = absl_flags.DEFINE_integer('num_processes', 1, 'processes of the run')
_PROCESS_ID = absl_flags.DEFINE_integer('process_id', 0, 'which of them this is, from 0')


def main():
  """Runs the configured pretraining and returns its summary."""
  config = flags.config_from_flags()
  devices.connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)
  if devices.is_first_process():
    flags.print_config(config)
  return training.train(config)


if __name__ == '__main__':
  flags.define_config_flags()
  flags.run(main)
