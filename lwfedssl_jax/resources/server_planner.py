"""Fits a step of the server's calibration into a memory budget: the largest micro-batch whose compiled step fits."""

import bisect
import functools
from typing import NamedTuple

from lwfedssl_jax import config as configs
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.resources import memory

MEGABYTE = 10**6


class ServerPlan(NamedTuple):
  """A calibration that fits the budget.

  Attributes:
    config: the run, with calibration_micro_batch_size chosen.
    batch_size: images per calibration step.
    peak_bytes: of the compiled step.
  """

  config: Config
  batch_size: int
  peak_bytes: int


def peak_bytes(config: Config, image_size: int, batch_size: int) -> int:
  """Compiles a calibration step on `batch_size` images; one program serves all stages."""
  return memory.calibration_memory(config, image_size, batch_size).peak_bytes


def fit(config: Config, image_size: int, batch_size: int) -> ServerPlan:
  """Chooses the largest micro-batch that keeps a calibration step within --server_memory_budget_mb (10^6 bytes).

  Peak memory falls with the micro-batch, so a bisection over the batch's divisors finds the largest. The gradient is
  exactly that of the full batch.

  Args:
    config: the run.
    image_size: side of the images, pixels.
    batch_size: images per calibration step (`calibration.plan_batches`).

  Raises:
    UsageError: nothing fits; the message names the smallest feasible budget.
  """
  budget = config.method.server_memory_budget_mb * MEGABYTE
  largest = min(config.method.calibration_micro_batch_size or batch_size, batch_size)
  least = largest if config.model.uses_batch_statistics else 1  # statistics of a batch allow no pieces
  sizes = [size for size in range(largest, least - 1, -1) if batch_size % size == 0]  # descending

  @functools.cache
  def peak(size: int) -> tuple[Config, int]:
    chosen = configs.with_values(config, {'calibration_micro_batch_size': 0 if size == batch_size else size})
    return chosen, peak_bytes(chosen, image_size, batch_size)

  def fits(size: int) -> bool:
    return peak(size)[1] <= budget

  if not fits(sizes[0]) and not fits(sizes[-1]):
    smallest = min(peak(sizes[0])[1], peak(sizes[-1])[1])
    raise UsageError(
      f'--server_memory_budget_mb: expected at least {-(-smallest // (MEGABYTE // 10)) / 10:.1f} for calibration on '
      f'{batch_size} images a step, got {config.method.server_memory_budget_mb:g}'
    )
  best = sizes[0] if fits(sizes[0]) else sizes[bisect.bisect_left(sizes, True, 1, len(sizes) - 1, key=fits)]
  chosen, needed = peak(best)
  return ServerPlan(chosen, batch_size, needed)


def describe(plan: ServerPlan) -> str:
  """Returns one line: the micro-batch and its memory."""
  method = plan.config.method
  return (
    f'server memory plan: calibration_micro_batch_size={method.calibration_micro_batch_size or plan.batch_size} of '
    f'{plan.batch_size}: {plan.peak_bytes / MEGABYTE:.1f} of {method.server_memory_budget_mb:g} MB'
  )
