"""Costs of a client: bytes, FLOPs and memory, per stage and in total, in one named convention.

`paper_v4` and `paper_v1` are the paper's (arXiv 2401.11647; bytes in communication.py, FLOPs in flops.py), for a client
that takes part in every round. `actual` counts this program: the bytes that this configuration's seeded participation
exchanges (catch-up included, mean over clients), the matrix products that it executes (all branches and views, a
multiply-add counts 2), and the peak memory of the compiled step, a client's and the server's. `expected` differs only
in its bytes, which are the mean over all seeds. Figures of other pairs of conventions are not comparable.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lwfedssl_jax.catalog import OWN_CONVENTIONS
from lwfedssl_jax.config import Config
from lwfedssl_jax.federated import sampling
from lwfedssl_jax.resources import accounting, communication, flops, memory, server_planner
from lwfedssl_jax.stages import StagePlan, kept_share, make_plans, required_components

PARTS = ('embedding', 'blocks', 'norm', 'heads')
OWN_GB_BYTES = 10**9
Traffic = tuple[dict[str, float], dict[str, float]]  # {component: bytes} that a client receives and sends in a stage


class StageCost(NamedTuple):
  """One client's cost of a stage, or of one of the two parts of a stage with a warm-up.

  Attributes:
    stage: 0-based.
    num_rounds: rounds in the stage.
    local_epochs: local epochs over these rounds.
    start: first block that is trained.
    stop: blocks from here on are absent.
    download_bytes: {part of PARTS: bytes} over the stage.
    upload_bytes: the same, sent.
    flops: FLOPs per image over the stage's local epochs; None if the convention has no count.
    server_flops: calibration, per server image over the stage; None if the convention has no count.
    peak_memory_bytes: of a training step; None if the convention has no figure.
    scratch_bytes: of it, activations and gradients.
  """

  stage: int
  num_rounds: int
  local_epochs: int
  start: int
  stop: int
  download_bytes: dict[str, float]
  upload_bytes: dict[str, float]
  flops: float | None
  server_flops: float | None
  peak_memory_bytes: int | None
  scratch_bytes: int | None


class MethodCost(NamedTuple):
  """One client's cost of a run.

  Attributes:
    method: its name.
    convention: of all figures.
    stages: in order.
    server_memory_bytes: peak of a step of the server's calibration, the same in every stage; None where the server does
      not train or the convention has no figure.
  """

  method: str
  convention: str
  stages: tuple[StageCost, ...]
  server_memory_bytes: int | None = None

  @property
  def total_bytes(self) -> float:
    """Both directions."""
    return sum(sum(s.download_bytes.values()) + sum(s.upload_bytes.values()) for s in self.stages)

  @property
  def total_flops(self) -> float | None:
    """Per image, over all local epochs of all rounds."""
    return None if self.stages[0].flops is None else sum(s.flops or 0 for s in self.stages)

  @property
  def peak_memory_bytes(self) -> int | None:
    """Of the most demanding stage."""
    return None if self.stages[0].peak_memory_bytes is None else max(s.peak_memory_bytes or 0 for s in self.stages)


def gb_bytes(convention: str) -> int:
  """Bytes of a "GB": 1000 MiB in the paper's conventions, 10^9 in our own."""
  return OWN_GB_BYTES if convention in OWN_CONVENTIONS else communication.PAPER_GB_BYTES


def by_part(components: dict[str, float]) -> dict[str, float]:
  """Sums {component: bytes} into the four PARTS."""
  parts: dict[str, float] = dict.fromkeys(PARTS, 0)
  for name, count in components.items():
    parts['blocks' if name.startswith('block_') else name if name in parts else 'heads'] += count
  return parts


def _paper_bytes(config: Config, image_size: int, convention: str, worst_case: bool) -> list[Traffic]:
  def scaled(sizes, rounds):
    return {name: rounds * size for name, size in sizes.items()}

  stages = communication.stage_traffic(config, image_size, convention, worst_case_download=worst_case)
  return [(scaled(s.round_downloads, s.num_rounds), scaled(s.round_uploads, s.num_rounds)) for s in stages]


def _actual_bytes(config: Config, image_size: int, plans: tuple[StagePlan, ...], worst_case: bool) -> list[Traffic]:
  """Mean over the federation of what the run's own participation exchanges."""
  payload = communication.make_payload(config, image_size)
  rounds = [(index, plan) for index, plan in enumerate(plans) for _ in range(plan.num_rounds)]
  planned = sampling.plan_run(config)
  sizes = np.array(list(payload.sizes_bytes.values()), np.int64)
  down, up = np.zeros((2, len(plans), len(sizes)), np.int64)
  ledger = accounting.start_ledger(payload, config.effective_num_clients)
  for round_num, (index, plan) in enumerate(rounds):
    ids, returned = planned.client_ids[round_num], planned.returned[round_num]
    keeps = None if planned.keeps is None else planned.keeps[round_num]
    if worst_case:  # as clients that hold nothing
      ledger = accounting.start_ledger(payload, config.effective_num_clients)
    ledger, traffic = accounting.charge_round(ledger, payload, plan, ids, returned, keeps)
    down[index] += traffic.download_bytes.sum(axis=0)
    up[index] += traffic.upload_bytes.sum(axis=0)

  def named(row):
    return dict(zip(payload.sizes_bytes, (row / config.effective_num_clients).tolist()))

  return [(named(d), named(u)) for d, u in zip(down, up)]


def _expected_bytes(config: Config, image_size: int, plans: tuple[StagePlan, ...], worst_case: bool) -> list[Traffic]:
  payload = communication.make_payload(config, image_size)
  found = accounting.expected_traffic(config, image_size)

  def named(row):
    return dict(zip(payload.sizes_bytes, row.tolist()))

  if not worst_case:
    return [(named(d), named(u)) for d, u in zip(*found)]
  share = config.effective_clients_per_round / config.effective_num_clients

  def everything(plan):
    required = required_components(plan, payload.head_names)
    times = {name: plan.num_rounds * share * kept_share(plan, name) for name in required}
    return {name: times.get(name, 0) * size for name, size in payload.sizes_bytes.items()}

  return [(everything(plan), named(u)) for plan, u in zip(plans, found.upload_bytes)]


def _actual_memory(config: Config, image_size: int, plans: tuple[StagePlan, ...]) -> list[memory.StepMemory]:
  """Compiles one step per stage shape: all layer-wise stages after the first share one."""
  found = {}
  for plan in plans:
    if plan.shape not in found:
      found[plan.shape] = memory.step_memory(config, image_size, plan)
  return [found[plan.shape] for plan in plans]


def _server_memory(config: Config, image_size: int) -> int | None:
  """Compiles a step of calibration at the batch that is asked for; fewer images on the server allow a smaller one."""
  if not config.uses_calibration:
    return None
  return server_planner.peak_bytes(config, image_size, config.method.calibration_batch_size or config.client.batch_size)


def method_cost(
  config: Config,
  image_size: int,
  convention: str,
  *,
  worst_case_download: bool = False,
  with_memory: bool = True,
  with_server_memory: bool = False,
) -> MethodCost:
  """Computes the costs of one client of a run.

  Args:
    config: the run; its method decides the stages.
    image_size: side of the images, pixels.
    convention: one of catalog.CONVENTIONS.
    worst_case_download: the client downloads everything that exists at a stage in every round.
    with_memory: in `actual` and `expected`, compile the steps for their peak memory; seconds per stage shape.
    with_server_memory: compile a step of the server's calibration too.

  Raises:
    UsageError: the convention is not one of catalog.CONVENTIONS, or the patch size does not divide the image.
  """
  plans, epochs = make_plans(config), config.client.local_epochs
  memories: Sequence[memory.StepMemory | None] = [None] * len(plans)
  flop_counts: Sequence[float | None] = [None] * len(plans)
  server: Sequence[float | None] = flop_counts
  if convention in OWN_CONVENTIONS:
    expected = convention == 'expected'
    traffic = (_expected_bytes if expected else _actual_bytes)(config, image_size, plans, worst_case_download)
    batch = config.client.batch_size

    def per_image(count, plan):
      return plan.num_rounds * count(config, image_size, plan, batch).total_flops / batch

    flop_counts = [epochs * per_image(flops.executed_flops, plan) for plan in plans]
    server = [
      plan.calibrates * config.method.calibration_epochs * per_image(flops.calibration_flops, plan) for plan in plans
    ]
    if with_memory:
      memories = _actual_memory(config, image_size, plans)
  else:
    traffic = _paper_bytes(config, image_size, convention, worst_case_download)
    if convention == 'paper_v4':
      flop_counts = [stage.total_flops for stage in flops.paper_stage_flops(config, image_size)]
  return MethodCost(
    config.method.method,
    convention,
    tuple(
      StageCost(
        stage=plan.stage,
        num_rounds=plan.num_rounds,
        local_epochs=epochs * plan.num_rounds,
        start=plan.start,
        stop=plan.stop,
        download_bytes=by_part(down),
        upload_bytes=by_part(up),
        flops=count,
        server_flops=server_count,
        peak_memory_bytes=step and step.peak_bytes,
        scratch_bytes=step and step.scratch_bytes,
      )
      for plan, (down, up), count, server_count, step in zip(plans, traffic, flop_counts, server, memories)
    ),
    _server_memory(config, image_size) if with_server_memory and convention in OWN_CONVENTIONS else None,
  )


def to_json(cost: MethodCost) -> dict[str, Any]:
  """Returns the totals, in the convention's GB and in GFLOPs (10^9), and the stages."""
  total_flops = cost.total_flops
  return {
    'communication_gb': cost.total_bytes / gb_bytes(cost.convention),
    'download_bytes': sum(sum(s.download_bytes.values()) for s in cost.stages),
    'upload_bytes': sum(sum(s.upload_bytes.values()) for s in cost.stages),
    'gflops': None if total_flops is None else total_flops / 1e9,
    'peak_memory_bytes': cost.peak_memory_bytes,
    'server_memory_bytes': cost.server_memory_bytes,
    'stages': [stage._asdict() for stage in cost.stages],
  }
