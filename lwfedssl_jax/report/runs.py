"""Finished runs, gathered: seeds of one configuration together, under a name that tells them from the others."""

import glob
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lwfedssl_jax import config as configs
from lwfedssl_jax import evaluations, run_log
from lwfedssl_jax.base import UsageError
from lwfedssl_jax.config import Config

_APART = frozenset({'seed', 'method', 'server_calibration', 'representation_alignment'}) | run_log.FREE_FIELDS


class FinishedRun(NamedTuple):
  """What a run left behind."""

  workdir: str
  config: Config
  summary: dict[str, Any]
  rows: list[dict[str, Any]]
  evaluations: list[dict[str, Any]]
  environment: dict[str, Any]

  @property
  def embeddings_path(self) -> str:
    return os.path.join(self.workdir, run_log.EMBEDDINGS)


class Group(NamedTuple):
  """Runs that differ in their seed alone, under one name."""

  name: str
  runs: tuple[FinishedRun, ...]

  @property
  def config(self) -> Config:
    return self.runs[0].config


def read_run(workdir: str) -> FinishedRun:
  """Reads a finished run. Raises UsageError."""
  path = os.path.join(workdir, run_log.SUMMARY)
  if not os.path.exists(path):
    raise UsageError(f'--workdirs: expected a finished run, {workdir} has no {run_log.SUMMARY}')
  saved = run_log.read_json(os.path.join(workdir, run_log.CONFIG))
  return FinishedRun(
      workdir, run_log.read_config(workdir), run_log.read_json(path), run_log.read_metrics(workdir),
      evaluations.read_evaluations(workdir), {key: value for key, value in saved.items() if key != 'config'})


def expand(folders: Sequence[str]) -> list[str]:
  """Replaces a folder that has no run of its own by the folders of finished runs in it."""
  found = []
  for folder in folders:
    inside = sorted(glob.glob(os.path.join(glob.escape(folder), '*', run_log.SUMMARY)))
    if os.path.exists(os.path.join(folder, run_log.CONFIG)) or not inside:
      found.append(folder)
    else:
      found += map(os.path.dirname, inside)
  return found


def method_name(config: Config) -> str:
  """Returns the method, and the mechanisms switched on or off against its default: 'layerwise + calibration'."""
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


def differing_fields(runs: Sequence[FinishedRun]) -> dict[str, list[Any]]:
  """Returns {field: its value in each run} of the fields that are not the same in all."""
  flat = [configs.flatten(run.config) for run in runs]
  return {name: [values[name] for values in flat] for name in flat[0]
          if name not in run_log.FREE_FIELDS and any(values[name] != flat[0][name] for values in flat)}


def group(runs: Sequence[FinishedRun]) -> tuple[Group, ...]:
  """Puts seeds together, in the order given; names groups of one method apart by the fields in which they differ."""
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
    return ', '.join([names[index]] + [
        f'{field}={values[index]}' for field, values in differing.items() if len({str(values[i]) for i in same}) > 1])

  return tuple(Group(full_name(index), tuple(found)) for index, found in enumerate(members.values()))


def mean_and_spread(values: Sequence[float | None]) -> tuple[float, float] | None:
  """Returns mean and sample standard deviation (0 for one value); None if any value is missing."""
  if not values or any(value is None for value in values):
    return None
  return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
