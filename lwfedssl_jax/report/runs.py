"""Finished runs: the seeds of one configuration form a group with a distinct name."""

import glob
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lwfedssl_jax import config as configs
from lwfedssl_jax import run_evaluation, stages
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.workdir import metrics_writer, run_dir

_MECHANISMS = frozenset({'server_calibration', 'representation_alignment'})
_APART = frozenset({'seed', 'method'}) | _MECHANISMS | run_dir.FREE_FIELDS
# Fields that end-to-end training does not depend on; its number of rounds is compared separately.
_NOT_END_TO_END = _APART | {
  'calibration_epochs',
  'calibration_batch_size',
  'calibration_micro_batch_size',
  'server_memory_budget_mb',
  'calibration_learning_rate',
  'alignment_kind',
  'alignment_weight',
  'new_block_init',
  'blocks_per_stage',
  'rounds_per_stage',
  'total_rounds',
  'depth_dropout_keep',
  'warmup_rounds',
  # Chosen by the method; they change rounding only.
  'rematerialize',
  'calibration_rematerialize',
  'unroll_blocks',
  'attention',
}


class FinishedRun(NamedTuple):
  """The files of a finished run."""

  workdir: str
  config: Config
  summary: dict[str, Any]
  rows: list[dict[str, Any]]
  evaluations: list[dict[str, Any]]
  environment: dict[str, Any]

  @property
  def embeddings_path(self) -> str:
    return os.path.join(self.workdir, run_dir.EMBEDDINGS)


class UnfinishedRun(NamedTuple):
  """A run without a summary."""

  workdir: str
  rounds_done: int
  num_rounds: int


class Group(NamedTuple):
  """Runs that differ only in their seed, under one name."""

  name: str
  runs: tuple[FinishedRun, ...]

  @property
  def config(self) -> Config:
    return self.runs[0].config

  @property
  def dataset(self) -> str:
    return self.config.data.dataset

  @property
  def seeds(self) -> list[int]:
    return [run.config.run.seed for run in self.runs]


class Stat(NamedTuple):
  """A figure over seeds.

  Attributes:
    mean: arithmetic mean.
    std: sample standard deviation; None for one value.
    low: minimum.
    high: maximum.
  """

  mean: float
  std: float | None
  low: float
  high: float


def stat(values: Sequence[float | None]) -> Stat | None:
  """Returns the statistic of values; None if there is none or one is missing."""
  if not values or any(value is None for value in values):
    return None
  present = [value for value in values if value is not None]
  return Stat(
    float(np.mean(present)),
    float(np.std(present, ddof=1)) if len(present) > 1 else None,
    float(min(present)),
    float(max(present)),
  )


def over_seeds(group: Group, value: Callable[[FinishedRun], float | None]) -> Stat | None:
  """Returns the statistic of a value over the runs of a group."""
  return stat([value(run) for run in group.runs])


def show(found: Stat | None, form: str = '{:.3f}', scale: float = 1, missing: str = '-') -> str:
  """Returns mean and standard deviation as text; the latter only if seeds differ."""
  if found is None:
    return missing
  text = form.format(found.mean / scale)
  return text + f' ± {form.format(found.std / scale)}' if found.std else text


def read_run(workdir: str) -> FinishedRun:
  """Reads a finished run. Raises UsageError."""
  path = os.path.join(workdir, run_dir.SUMMARY)
  if not os.path.exists(path):
    raise UsageError(f'--workdirs: expected a finished run, {workdir} has no {run_dir.SUMMARY}')
  saved = run_dir.read_json(os.path.join(workdir, run_dir.CONFIG))
  return FinishedRun(
    workdir,
    run_dir.read_config(workdir),
    run_dir.read_json(path),
    metrics_writer.read_metrics(workdir),
    run_evaluation.read_evaluations(workdir),
    {key: value for key, value in saved.items() if key != 'config'},
  )


def num_rounds(config: Config) -> int:
  """Returns the number of rounds of a run."""
  return sum(plan.num_rounds for plan in stages.make_plans(config))


def find(folders: Sequence[str]) -> tuple[list[str], list[UnfinishedRun]]:
  """Replaces a folder without a run of its own by the runs in it.

  Returns:
    The folders to read, and the unfinished runs in such a folder. A run's folder that is named itself is among the
    former, finished or not.

  Raises:
    UsageError: an unfinished run's files cannot be read.
  """
  chosen, unfinished = [], []
  for folder in folders:
    inside = sorted(map(os.path.dirname, glob.glob(os.path.join(glob.escape(folder), '*', run_dir.CONFIG))))
    finished = [path for path in inside if os.path.exists(os.path.join(path, run_dir.SUMMARY))]
    if os.path.exists(os.path.join(folder, run_dir.CONFIG)) or not finished:
      chosen.append(folder)
      continue
    chosen += finished
    unfinished += [
      UnfinishedRun(path, len(metrics_writer.read_metrics(path)), num_rounds(run_dir.read_config(path)))
      for path in inside
      if path not in finished
    ]
  return chosen, unfinished


def short_names(workdirs: Sequence[str]) -> list[str]:
  """Returns the folders without their common prefix."""
  paths = [os.path.abspath(workdir) for workdir in workdirs]
  common = os.path.commonpath(map(os.path.dirname, paths))
  return [os.path.relpath(path, common) for path in paths]


def method_name(config: Config) -> str:
  """Returns the method, and mechanisms that differ from its default: 'layerwise + calibration'."""
  plain = configs.with_values(config, {'server_calibration': None, 'representation_alignment': None})
  name = config.method.method
  for switch, text in (('uses_calibration', 'calibration'), ('uses_alignment', 'alignment')):
    given, default = getattr(config, switch), getattr(plain, switch)
    if given != default:
      name += f' {"+" if given else "without"} {text}'
  return name


def _identity(config: Config) -> tuple[Any, ...]:
  flat = configs.flatten(config)
  return (method_name(config), *(value for name, value in flat.items() if name not in _APART))


def is_end_to_end(config: Config) -> bool:
  """Whether this is plain end-to-end training, the reference of others."""
  return config.method.method == 'end_to_end' and not config.uses_calibration and not config.uses_alignment


def end_to_end_settings(config: Config) -> tuple[Any, ...]:
  """Returns the settings that determine an end-to-end run's result; a run and its reference share them."""
  flat = configs.flatten(config)
  return (num_rounds(config), *(value for name, value in flat.items() if name not in _NOT_END_TO_END))


def differing_fields(runs: Sequence[FinishedRun]) -> dict[str, list[Any]]:
  """Returns {field: its value in each run} of the fields that differ."""
  flat = [configs.flatten(run.config) for run in runs]
  return {
    name: [values[name] for values in flat]
    for name in flat[0]
    if name not in run_dir.FREE_FIELDS and any(values[name] != flat[0][name] for values in flat)
  }


def shared_fields(runs: Sequence[FinishedRun]) -> dict[str, Any]:
  """Returns {field: value} of the fields that all runs share and that affect a result: no folders, no devices."""
  differing = differing_fields(runs)
  return {
    name: value
    for name, value in configs.flatten(runs[0].config).items()
    if name not in differing and name not in run_dir.FREE_FIELDS
  }


def group(runs: Sequence[FinishedRun]) -> tuple[Group, ...]:
  """Groups seeds, in the given order; names of groups of one method list their differing fields."""
  members: dict[tuple[Any, ...], list[FinishedRun]] = {}
  for run in runs:
    members.setdefault(_identity(run.config), []).append(run)
  firsts = [found[0] for found in members.values()]
  names = [method_name(run.config) for run in firsts]
  differing = {name: values for name, values in differing_fields(firsts).items() if name not in _APART}

  def full_name(index):
    if names.count(names[index]) == 1:
      return names[index]
    same = [i for i, name in enumerate(names) if name == names[index]]
    return ', '.join(
      [names[index]]
      + [f'{field}={values[index]}' for field, values in differing.items() if len({str(values[i]) for i in same}) > 1]
    )

  return tuple(Group(full_name(index), tuple(found)) for index, found in enumerate(members.values()))


def seeds_text(groups: Sequence[Group]) -> str:
  """Describes the seeds of figures: 'seed 0', 'mean of 3 seeds', 'means of 1 to 3 seeds'."""
  counts = sorted({len(found.runs) for found in groups})
  if counts == [1]:
    seeds = sorted({seed for found in groups for seed in found.seeds})
    return f'seed {seeds[0]}' if len(seeds) == 1 else 'one seed each'
  return f'mean of {counts[0]} seeds' if len(counts) == 1 else f'means of {counts[0]} to {counts[-1]} seeds'
