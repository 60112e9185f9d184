"""How active blocks are executed: activation checkpointing and unrolling, chosen by what was measured and compiled.

Several blocks at once, as in `end_to_end`, `prog_fedssl` and calibration: elementwise operations are computed again in
the backward pass. CPUs gain time too (docs/performance.md): what is not kept is not moved. A single block, as in
layer-wise stages, gains nothing: its peak is its own backward pass. Accelerators unroll the blocks; on CPUs that saves
2 % of a step and multiplies the time to compile.
"""

import importlib.util

import jax

from lwfedssl_jax import config as configs
from lwfedssl_jax.catalog import AUTO, VitTraits
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.models.blocks import BlockExecution
from lwfedssl_jax.stages import make_plans

CPU = 'cpu'
MOST_HEAD_SIZE = 128  # of cuDNN's kernel
LEAST_CAPABILITY = 8.0


def resolve(config: Config, platform: str | None = None) -> Config:
  """Replaces what is left to choose: --rematerialize, --calibration_rematerialize, --unroll_blocks, --attention.

  Args:
    config: the run.
    platform: of a target (`cuda`, `tpu`); None: the default device's.

  Raises:
    UsageError: --attention=cudnn where there is no such kernel.
  """
  if config.client.attention == 'cudnn' and not has_fused_attention(config, platform):
    raise UsageError(
      '--attention: expected auto, plain or heads_first without a GPU with cuDNN, or without bfloat16, got cudnn'
    )
  return _choose(config, platform)


def _choose(config: Config, platform: str | None = None) -> Config:
  attention = config.client.attention

  def chosen(value: str, num_blocks: int) -> str:
    return value if value != AUTO else 'elementwise' if num_blocks > 1 else 'none'

  most = max(plan.shape.num_active for plan in make_plans(config))
  unroll = config.client.unroll_blocks
  return configs.with_values(
    config,
    {
      'rematerialize': chosen(config.client.rematerialize, most),
      'calibration_rematerialize': chosen(config.method.calibration_rematerialize, config.model.traits.depth),
      'attention': attention if attention != AUTO else _best_attention(config, platform),
      'unroll_blocks': (platform or jax.default_backend()) != CPU if unroll is None else unroll,
    },
  )


def _best_attention(config: Config, platform: str | None) -> str:
  if has_fused_attention(config, platform):
    return 'cudnn'
  return 'heads_first' if (platform or jax.default_backend()) == 'tpu' else 'plain'


def has_fused_attention(config: Config, platform: str | None) -> bool:
  """Whether cuDNN's kernel computes this attention: bfloat16, heads of a multiple of 8 up to 128, and a GPU for it.

  A target's program is compiled with the cuDNN that is installed here, if any.
  """
  traits = config.model.traits
  if not isinstance(traits, VitTraits) or config.model.compute_dtype != 'bfloat16':
    return False
  size = traits.width // traits.num_heads
  if size % 8 or size > MOST_HEAD_SIZE:
    return False
  if platform is not None:
    return (
      platform == 'cuda'
      and importlib.util.find_spec('nvidia') is not None
      and bool(importlib.util.find_spec('nvidia.cudnn'))
    )
  if jax.default_backend() != 'gpu':
    return False
  capability = getattr(jax.local_devices()[0], 'compute_capability', None)  # NVIDIA's alone have it as a number
  return str(capability).replace('.', '', 1).isdigit() and float(str(capability)) >= LEAST_CAPABILITY


def client_execution(config: Config) -> BlockExecution:
  """Returns the execution of a client's active blocks."""
  client = _choose(config).client
  return BlockExecution(client.rematerialize, bool(client.unroll_blocks), client.attention)


def server_execution(config: Config) -> BlockExecution:
  """Returns the execution of calibration, whose loop has a traced end and is not unrolled."""
  resolved = _choose(config)
  return BlockExecution(resolved.method.calibration_rematerialize, attention=resolved.client.attention)
