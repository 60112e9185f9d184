"""The measured memory of a step: the high-water mark of a process that runs it, and the compiled program's figure.

`python -m lwfedssl_jax.resources.measure` reads {"config": ..., "image_size": ..., "plan": ...} on standard input.
"""

import ctypes
import gc
import json
import subprocess
import sys

from lwfedssl_jax import config as configs
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.stages import StageShape, make_plans

# Memory of the allocator, the thread pools and XLA's matrix products besides the step; measured, docs/performance.md.
OVERHEAD_BYTES = 96 * 2**20


def _status_bytes(name: str) -> int:
  with open('/proc/self/status', encoding='ascii') as file:
    line = next(line for line in file if line.startswith(name + ':'))
  return 1024 * int(line.split()[1])


def _forget_high_water_mark() -> None:
  """Releases freed memory to the system and resets the kernel's high-water mark."""
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)
  with open('/proc/self/clear_refs', 'w', encoding='ascii') as file:
    file.write('5')


def run_step(config: Config, image_size: int, index: int) -> dict[str, int]:
  """Compiles and runs a client step of a run's stage plan, given by its position, in this process.

  Returns:
    `compiled_bytes`: arguments + outputs - aliases + scratch. `measured_bytes`: the arguments, and the peak rise of
    resident memory over two steps.
  """
  import jax
  import jax.numpy as jnp

  from lwfedssl_jax import rng
  from lwfedssl_jax.resources import memory

  lowered = memory.lower_client_step(config, image_size, make_plans(config)[index])
  compiled = lowered.compile()
  step_memory = memory.read_analysis(compiled)
  generator = rng.host_generator(0, rng.Stream.MEASUREMENT)

  def filled(leaf):
    # Random, so that every page is allocated: untouched zeros take no memory.
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      return jnp.asarray(generator.random(leaf.shape, jnp.float32) * 1e-2, leaf.dtype)
    return jnp.ones(leaf.shape, leaf.dtype)

  arguments = jax.tree.map(filled, lowered.args_info[0])
  state, rest = arguments[0], arguments[1:]
  del arguments
  jax.block_until_ready((state, rest))
  _forget_high_water_mark()
  before = _status_bytes('VmRSS')
  for _ in range(2):
    state, _ = jax.block_until_ready(compiled(state, *rest))
  rise = _status_bytes('VmHWM') - before
  return {'compiled_bytes': step_memory.peak_bytes, 'measured_bytes': step_memory.argument_bytes + rise}


def measure_stage(config: Config, image_size: int, index: int) -> dict[str, int]:
  """Runs `run_step` in a process of its own. Raises UsageError on systems other than Linux."""
  if not sys.platform.startswith('linux'):
    raise UsageError(f'--measure_memory: expected Linux, got {sys.platform}')
  request = json.dumps({'config': configs.flatten(config), 'image_size': image_size, 'plan': index})
  result = subprocess.run(
    [sys.executable, '-m', 'lwfedssl_jax.resources.measure'], input=request, capture_output=True, text=True, check=False
  )
  if result.returncode:
    last = (result.stderr.strip().splitlines() or ['no output'])[-1]
    raise RuntimeError(f'the measurement process ended with code {result.returncode}: {last}')
  return json.loads(result.stdout.splitlines()[-1])


def measure_stages(config: Config, image_size: int) -> list[dict[str, int]]:
  """Measures the first stage of each shape: all layer-wise stages after the first have equal shapes."""
  first: dict[StageShape, int] = {}
  plans = make_plans(config)
  for index, plan in enumerate(plans):
    first.setdefault(plan.shape, index)
  return [{'stage': plans[index].stage, **measure_stage(config, image_size, index)} for index in first.values()]


if __name__ == '__main__':
  given = json.load(sys.stdin)
  print(json.dumps(run_step(configs.from_flat(given['config']), given['image_size'], given['plan'])))
