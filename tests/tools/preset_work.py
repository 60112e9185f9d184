"""Counts the work of the paper's presets: runs, FLOPs and hours of the whole sweep, a Markdown table.

    python -m tests.tools.preset_work

FLOPs are those of the clients' and the server's matrix products on IMAGES images (`sweep.count_flops`; a multiply-add
counts 2). Hours are FLOPs / RATE: arithmetic, not a measurement.
"""

import sys

import numpy as np
from absl import flags as absl_flags

from experiments import command, flags, presets
from experiments import sweep as sweep_command
from lwfedssl_jax import tables
from lwfedssl_jax.data import federated_dataset
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.training import sweep

IMAGES = 100_000
RATE = 100e12  # FLOP/s: a tenth of an H100's bfloat16 peak of 989e12


def paper_presets() -> list[str]:
  """Returns the presets that are a table of the paper."""
  return [name for name in presets.names() if name.startswith(('paper_', 'v1_', 'v4_'))]


def plan(*arguments: str) -> list[sweep.SweepRun]:
  """Returns the runs of a sweep command."""
  command.parse(sweep_command.COMMAND, arguments)
  values: absl_flags.FlagValues = sweep_command.FLAGS
  config = flags.config_from_flags(values)
  variations = sweep.parse_variations(values.vary)
  return sweep.plan(config, values.methods or [config.method.method], [0], variations, 'runs')


def blank_dataset(num_images: int, size: int) -> ImageDataset:
  """Returns images without content that take no memory, of ten classes."""
  images = np.broadcast_to(np.uint8(0), (num_images, size, size, 3))
  labels = np.arange(num_images, dtype=np.int32) % 10
  return ImageDataset('blank', images, labels, images[:0], labels[:0], tuple('0123456789'))


def count_flops(preset: str) -> tuple[int, float]:
  """Returns the number of runs of a preset's sweep, and the FLOPs of all of them."""
  runs = plan(f'--preset={preset}')
  total = 0.0
  for run in runs:
    dataset = blank_dataset(IMAGES, run.config.model.image_size)
    total += sweep.count_flops(run.config, federated_dataset.partition_dataset(dataset, run.config))
  return len(runs), total


def main() -> int:
  """Prints the table."""
  rows = [['preset', 'runs', 'FLOPs', f'hours at {RATE / 1e12:.0f} TFLOP/s']]
  for name in paper_presets():
    runs, work = count_flops(name)
    rows.append([name, str(runs), f'{work:.1e}', f'{work / RATE / 3600:.1f}'])
  print(tables.markdown(rows))
  return 0


if __name__ == '__main__':
  sys.exit(main())
