"""How active blocks are executed: activation checkpointing and unrolling, chosen by what was measured and compiled.

Several blocks at once, as in `end_to_end`, `prog_fedssl` and calibration: elementwise operations are computed again in
the backward pass. CPUs gain time too (docs/performance.md): what is not kept is not moved. A single block, as in
layer-wise stages, gains nothing: its peak is its own backward pass. Accelerators unroll the blocks; on CPUs that saves
2 % of a step and multiplies the time to compile.
"""

import jax

from lwfedssl_jax import config as configs
from lwfedssl_jax.catalog import AUTO
from lwfedssl_jax.config import Config
from lwfedssl_jax.models.blocks import BlockExecution
from lwfedssl_jax.stages import make_plans

CPU = 'cpu'


def resolve(config: Config, platform: str | None = None) -> Config:
  """Replaces what is left to choose: --rematerialize, --calibration_rematerialize, --unroll_blocks.

  Args:
    config: the run.
    platform: `cpu`, `cuda`, `tpu`, ...; None: the default device's.
  """

  def chosen(value: str, num_blocks: int) -> str:
    return value if value != AUTO else 'elementwise' if num_blocks > 1 else 'none'

  most = max(plan.shape.num_active for plan in make_plans(config))
  unroll = config.client.unroll_blocks
  return configs.with_values(
    config,
    {
      'rematerialize': chosen(config.client.rematerialize, most),
      'calibration_rematerialize': chosen(config.method.calibration_rematerialize, config.model.traits.depth),
      'unroll_blocks': (platform or jax.default_backend()) != CPU if unroll is None else unroll,
    },
  )


def client_execution(config: Config) -> BlockExecution:
  """Returns the execution of a client's active blocks."""
  resolved = resolve(config)
  return BlockExecution(resolved.client.rematerialize, bool(resolved.client.unroll_blocks))


def server_execution(config: Config) -> BlockExecution:
  """Returns the execution of calibration, whose loop has a traced end and is not unrolled."""
  return BlockExecution(resolve(config).method.calibration_rematerialize)
