r"""Times client steps or whole rounds of every method, against end to end and against plain PyTorch, in one run.

    python -m experiments.benchmark --suite=step --encoder=vit_tiny --image_size=32 --batch_size=64
    python -m experiments.benchmark --suite=round --encoder=vit_tiny --image_size=32 --batch_size=64 --num_clients=2
    python -m experiments.benchmark --suite=clients --method=layerwise --image_size=32
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m experiments.benchmark --suite=devices \
        --method=layerwise --image_size=32 --num_clients=16 --batch_size=32

Timing is interleaved, so that a drift of the machine's speed affects all cases equally. Quote the ratios, which are
formed within a repeat. PyTorch, with torchvision's transforms in a round, is skipped if it is not installed (extra
`torch`).
"""

from typing import Any

from absl import flags as absl_flags

from lwfedssl_jax.errors import UsageError

from . import command, flags

FLAGS = absl_flags.FlagValues()
_SUITE = absl_flags.DEFINE_enum(
  'suite', 'step', ['step', 'round', 'clients', 'devices'], 'what to measure', flag_values=FLAGS
)
_REPEATS = absl_flags.DEFINE_integer(
  'repeats', 7, 'timed repeats, after an untimed one', lower_bound=1, flag_values=FLAGS
)
_IMAGES = absl_flags.DEFINE_integer(
  'images_per_client', 128, 'suite round: images per client', lower_bound=2, flag_values=FLAGS
)
_ALL_STAGES = absl_flags.DEFINE_boolean(
  'all_stages', False, 'every stage of layerwise, not four of them', flag_values=FLAGS
)


def main() -> dict[str, Any]:
  """Prints a table and returns the figures."""
  config, suite = flags.config_from_flags(FLAGS), _SUITE.value
  if not config.model.image_size:
    raise UsageError('--image_size: expected the side of the images in pixels, got 0')
  if suite == 'round' and _IMAGES.value < config.client.batch_size:
    raise UsageError(
      f'--images_per_client: expected at least --batch_size={config.client.batch_size}, got {_IMAGES.value}'
    )

  import jax

  from .benchmarks import suites

  if suite == 'devices' and jax.device_count() == 1:
    raise UsageError(
      '--suite=devices: expected several devices; on a CPU XLA_FLAGS='
      '--xla_force_host_platform_device_count=8 creates them'
    )
  flags.print_config(config)
  if suite in ('clients', 'devices'):
    command.use_compilation_cache()
    run_suite = suites.run_clients if suite == 'clients' else suites.run_devices
    found: dict[str, Any] = {'cases': run_suite(config, _REPEATS.value)}
  else:
    jax.config.update('jax_enable_compilation_cache', False)  # so that compilation is timed
    found = suites.run_cases(config, suite, _REPEATS.value, _IMAGES.value, _ALL_STAGES.value)
  return {'suite': suite, 'device_kind': jax.devices()[0].device_kind, **found}


COMMAND = command.Command(__doc__, FLAGS, main, has_config=True)


def run() -> None:
  """Runs this command line."""
  command.run(COMMAND)


if __name__ == '__main__':
  run()
