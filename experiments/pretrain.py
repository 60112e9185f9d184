"""Pretrains an encoder over simulated clients; see `--helpshort` for every flag.

python -m experiments.pretrain --flagfile=experiments/presets/quickstart.flags --workdir=runs/quickstart
"""

from experiments import flags
from lwfedssl_jax import training


def main():
  """Runs the configured pretraining and returns its summary."""
  config = flags.config_from_flags()
  flags.print_config(config)
  return training.train(config)


if __name__ == '__main__':
  flags.define_config_flags()
  flags.run(main)
