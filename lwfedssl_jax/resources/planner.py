"""Fits a client's step into a memory budget: activation checkpointing, micro-batches, and bfloat16 last.

Every choice is compiled, for the default device or for a target (targets.py), and its peak memory comes from the
program; nothing is estimated.
"""

import bisect
import functools
import itertools
from typing import NamedTuple

from lwfedssl_jax import catalog
from lwfedssl_jax import config as configs
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.federated import execution
from lwfedssl_jax.resources import flops, memory
from lwfedssl_jax.resources.targets import OutOfMemoryError, Target
from lwfedssl_jax.stages import StagePlan, make_plans

MEGABYTE = 10**6
CHUNK_SHARE = 0.8  # of the memory, for vmapped clients; the rest is for fragmentation and the server
MOST_CLIENTS = 32  # vmapped at a time; more do not increase a device's utilization
BATCH_STEP = 32  # images; the resolution of `largest_batch`
MOST_IMAGES = 2**16  # in a batch that `largest_batch` tries


class MemoryPlan(NamedTuple):
  """A step that fits the budget.

  Attributes:
    config: the run, with micro_batch_size, rematerialize and compute_dtype chosen.
    peak_bytes: of the compiled step of the most demanding stage.
    recomputed_share: share of the run's client FLOPs that is recomputed.
  """

  config: Config
  peak_bytes: int
  recomputed_share: float


def demanding_stages(plans: tuple[StagePlan, ...]) -> tuple[StagePlan, ...]:
  """Returns the stages among which the highest peak is: those that train most blocks, one of each shape."""
  most = max(plan.shape.num_active for plan in plans)
  return tuple({plan.shape: plan for plan in reversed(plans) if plan.shape.num_active == most}.values())


def peak_bytes(config: Config, image_size: int, target: Target | None = None) -> int:
  """Compiles the demanding stages' steps ; returns the highest peak, of a refused program as its compiler states it."""

  def needed(plan: StagePlan) -> int:
    try:
      return memory.step_memory(config, image_size, plan, target).peak_bytes
    except OutOfMemoryError as error:
      return error.needed_bytes

  return max(needed(plan) for plan in demanding_stages(make_plans(config)))


def recomputed_share(config: Config, image_size: int) -> float:
  """Returns the share of matrix products, over all stages and rounds, that is recomputed."""
  steps = [flops.executed_flops(config, image_size, plan, config.client.batch_size) for plan in make_plans(config)]
  again = sum(step.recomputed_flops for step in steps)
  return again / (sum(step.total_flops for step in steps) - again)


def fit(config: Config, image_size: int, target: Target | None = None) -> MemoryPlan:
  """Chooses the cheapest settings that keep a client's step within --client_memory_budget_mb (10^6 bytes).

  The order: as configured; recompute elementwise operations, which costs next to nothing; the largest micro-batch that
  fits; the same with more recomputation; all of these in bfloat16, which alone changes results. Peak memory falls with
  the micro-batch, so a bisection over the batch's divisors finds the largest.

  Raises:
    UsageError: nothing fits; the message names the smallest feasible budget.
  """
  config = execution.resolve(config, target and target.platform)
  budget = config.client.client_memory_budget_mb * MEGABYTE
  batch = config.client.batch_size
  largest = config.client.micro_batch_size or batch
  least = largest if config.model.uses_batch_statistics else 1  # statistics of a batch allow no pieces
  sizes = [size for size in range(least, largest + 1) if batch % size == 0]  # ascending

  @functools.cache
  def peak(size: int, rematerialize: str, dtype: str) -> tuple[Config, int]:
    chosen = configs.with_values(
      config, {'micro_batch_size': 0 if size == batch else size, 'rematerialize': rematerialize, 'compute_dtype': dtype}
    )
    return chosen, peak_bytes(chosen, image_size, target)

  dtypes = dict.fromkeys((config.model.compute_dtype, 'bfloat16'))
  levels = catalog.REMATERIALIZE[catalog.REMATERIALIZE.index(config.client.rematerialize) :]
  in_one_piece = [(level, sizes[-1:]) for level in levels if level != 'all']
  smallest = float('inf')
  for dtype, (level, allowed) in itertools.product(dtypes, [*in_one_piece, *((level, sizes) for level in levels)]):

    def fits(size, level=level, dtype=dtype):
      return peak(size, level, dtype)[1] <= budget

    if fits(allowed[-1]):
      best = allowed[-1]
    elif fits(allowed[0]):
      best = allowed[bisect.bisect_left(allowed, True, 1, len(allowed) - 1, key=lambda size: not fits(size)) - 1]
    else:
      smallest = min(smallest, *(peak(size, level, dtype)[1] for size in (allowed[0], allowed[-1])))
      continue
    chosen, needed = peak(best, level, dtype)
    return MemoryPlan(chosen, needed, recomputed_share(chosen, image_size))
  raise UsageError(
    f'--client_memory_budget_mb: expected at least {-(-smallest // (MEGABYTE // 10)) / 10:.1f} for '
    f'--batch_size={batch} of {config.model.encoder} and --method={config.method.method}, '
    f'got {config.client.client_memory_budget_mb:g}'
  )


def choose_chunk(config: Config, image_size: int, memory_bytes: int) -> int:
  """Returns the number of clients that the default device vmaps, as `count_clients` does.

  Args:
    config: the run.
    image_size: pixels.
    memory_bytes: memory of the device besides its images.
  """
  return count_clients(config, memory_bytes, peak_bytes(config, image_size))


def count_clients(config: Config, memory_bytes: int, step_bytes: int) -> int:
  """Returns the clients that fit a device's memory, at least 1 and at most MOST_CLIENTS or those of a round."""
  capacity = int(CHUNK_SHARE * memory_bytes // step_bytes)
  return max(1, min(config.effective_clients_per_round, MOST_CLIENTS, capacity))


def largest_batch(config: Config, image_size: int, memory_bytes: int, target: Target | None = None) -> int:
  """Returns the largest batch, a multiple of BATCH_STEP images, whose step needs at most `memory_bytes`.

  Memory grows nearly linearly with the batch, so a line through the two nearest measured batches proposes the next one;
  the answer and the next larger batch have been compiled. 0: not even BATCH_STEP images fit.
  """

  @functools.cache
  def peak(steps: int) -> int:
    chosen = configs.with_values(config, {'batch_size': steps * BATCH_STEP, 'micro_batch_size': 0})
    return peak_bytes(chosen, image_size, target)

  if peak(1) > memory_bytes:
    return 0
  fits, refused = 1, MOST_IMAGES // BATCH_STEP + 1
  known, proposed = 1, max(2, config.client.batch_size // BATCH_STEP)
  while refused - fits > 1:
    fits, refused = (proposed, refused) if peak(proposed) <= memory_bytes else (fits, proposed)
    slope = (peak(proposed) - peak(known)) / (proposed - known)
    line = proposed + int((memory_bytes - peak(proposed)) // slope) if slope > 0 else refused
    known, proposed = proposed, min(max(line, fits + 1), refused - 1)
  return fits * BATCH_STEP


def describe(plan: MemoryPlan) -> str:
  """Returns one line: the chosen settings, their memory and their cost."""
  client, budget = plan.config.client, plan.config.client.client_memory_budget_mb
  return (
    f'memory plan: micro_batch_size={client.micro_batch_size or client.batch_size} of {client.batch_size}, '
    f'rematerialize={client.rematerialize}, compute_dtype={plan.config.model.compute_dtype}: '
    f'{plan.peak_bytes / MEGABYTE:.1f} of {budget:g} MB, {100 * plan.recomputed_share:.1f} % more FLOPs'
  )
