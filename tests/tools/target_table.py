"""Prints the table of docs/accelerators.md: peak memory of client steps by target, type, batch and method.

    python -m tests.tools.target_table --targets=gpu-h100,gpu-a100 --batches=128,512,1024 --dtypes=bfloat16,float32

Each line is printed when it is known: seconds a step for GPUs, a minute or two for TPUs. Needs the extras gpu-aot and
tpu-aot.
"""

import argparse
import itertools

import jax

from lwfedssl_jax import config as configs
from lwfedssl_jax.resources import predict, targets
from lwfedssl_jax.stages import make_plans

# Method, stage, execution: by default, and end to end also without care, as a loop that keeps everything.
DEFAULT = {'rematerialize': 'auto', 'unroll_blocks': None}
WASTEFUL = {'rematerialize': 'none', 'unroll_blocks': False}
CASES = (
  ('layerwise', 12, DEFAULT),
  ('lw_fedssl', 12, DEFAULT),
  ('end_to_end', 1, DEFAULT),
  ('end_to_end', 1, WASTEFUL),
  ('prog_fedssl', 6, DEFAULT),
)


def cell(target: targets.Target, case: tuple[str, int, dict[str, object]], dtype: str, batch: int) -> str:
  """Returns `peak GB / GB moved / least ms` of a step of ViT-Tiny, 32x32 images, patch 4."""
  method, stage, execution = case
  values = {'encoder': 'vit_tiny', 'image_size': 32, 'patch_size': 4, 'batch_size': batch}
  values |= {'method': method, 'compute_dtype': dtype}
  config = configs.with_values(configs.Config(), values | execution)
  (step,) = predict.predict_steps(config, 32, target, [make_plans(config)[stage - 1]])
  if step.roofline is None:
    return f'{step.peak_bytes / 1e9:.2f}, does not fit'
  line, note = step.roofline, '' if step.fits else ', does not fit'
  return f'{step.peak_bytes / 1e9:.2f} / {line.num_bytes / 1e9:.1f} / {1e3 * line.seconds:.1f}{note}'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--targets', default='gpu-h100,gpu-a100,tpu-v5e')
  parser.add_argument('--batches', default='128,512,1024')
  parser.add_argument('--dtypes', default='bfloat16,float32')
  parser.add_argument('--methods', default='end_to_end,prog_fedssl,layerwise,lw_fedssl')
  given = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  batches = [int(batch) for batch in given.batches.split(',')]
  print('| target | type | method | stage | execution | ' + ' | '.join(f'batch {b}' for b in batches) + ' |')
  print('|' + '---|' * (5 + len(batches)), flush=True)
  for name, dtype in itertools.product(given.targets.split(','), given.dtypes.split(',')):
    target = targets.load(name)
    for case in CASES:
      if case[0] in given.methods.split(','):
        how = 'default' if case[2] is DEFAULT else 'loop, none'
        cells = [cell(target, case, dtype, batch) for batch in batches]
        print('| ' + ' | '.join([name, dtype, case[0], str(case[1]), how, *cells]) + ' |', flush=True)


if __name__ == '__main__':
  main()
