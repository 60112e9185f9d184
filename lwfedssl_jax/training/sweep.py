"""Sweeps: methods x seeds x variations of fields; finished runs are skipped, interrupted ones resumed."""

import functools
import itertools
import os
import time
import traceback
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from lwfedssl_jax import config as configs
from lwfedssl_jax import options, tables
from lwfedssl_jax.config import Config
from lwfedssl_jax.config_groups import DataConfig
from lwfedssl_jax.data import batching, federated_dataset, sources
from lwfedssl_jax.data.federated_dataset import FederatedDataset
from lwfedssl_jax.errors import StorageError, UsageError
from lwfedssl_jax.federated import calibration
from lwfedssl_jax.resources import flops
from lwfedssl_jax.stages import make_plans
from lwfedssl_jax.training import train
from lwfedssl_jax.workdir import metrics_writer, run_dir

# Share of the machine's matrix-product rate that a small encoder's run reaches: an estimate, corrected by every run.
FIRST_GUESS_SHARE = 0.15
_NOT_VARIED = ('workdir', 'seed', 'method')  # they have flags of their own


class Variation(NamedTuple):
  """Configuration fields and the values that they take together in the sweep, a tuple each time."""

  fields: tuple[str, ...]
  values: tuple[tuple[Any, ...], ...]


class SweepRun(NamedTuple):
  """One run of a sweep: its configuration, workdir included, the rounds already done, and whether it is finished."""

  config: Config
  rounds_done: int
  finished: bool

  @property
  def workdir(self) -> str:
    return self.config.run.workdir


class Outcome(NamedTuple):
  """The result of a sweep.

  Attributes:
    finished: workdirs.
    failed: workdir -> reason.
    stopped_by: the signal that stopped it, or None.
  """

  finished: list[str]
  failed: dict[str, str]
  stopped_by: str | None = None


def parse_variations(text: str) -> tuple[Variation, ...]:
  """Reads variations, all combinations of which the sweep runs: 'field=value,value;field+field=value+value,...'.

  Fields that '+' joins vary together. Parts of a value of several numbers are joined by ':'.

  Raises:
    UsageError: not of that form, or not a field that a sweep can vary.
  """
  return tuple(_parse_variation(part.strip()) for part in text.split(';')) if text else ()


def _parse_variation(text: str) -> Variation:
  names, equals, values = text.partition('=')
  fields = tuple(names.split('+'))
  annotations = {
    name: annotation for group in configs.GROUPS.values() for name, annotation in typing.get_type_hints(group).items()
  }
  if not equals or not values or any(name not in annotations or name in _NOT_VARIED for name in fields):
    raise UsageError(
      f'--vary: expected FLAG=VALUE,VALUE,... with a flag of pretrain other than workdir, seed and method, got {text!r}'
    )

  def read(name: str, part: str) -> Any:
    kind, _, length = options.value_type(annotations[name])
    try:
      if kind is bool:
        return {'true': True, 'false': False}[part.lower()]
      return tuple(map(kind, part.split(':'))) if length else kind(part)
    except (KeyError, ValueError) as error:
      raise UsageError(f'--vary: expected values of type {kind.__name__} for {name}, got {part!r}') from error

  def read_together(joined: str) -> tuple[Any, ...]:
    parts = joined.split('+') if len(fields) > 1 else [joined]
    if len(parts) != len(fields):
      raise UsageError(f'--vary: expected {len(fields)} values joined by + for {names}, got {joined!r}')
    return tuple(map(read, fields, parts))

  return Variation(fields, tuple(map(read_together, values.split(','))))


def _shown(value: Any) -> str:
  text = ':'.join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
  return text.replace(os.sep, '_')


def plan(
  base: Config, methods: Sequence[str], seeds: Sequence[int], variations: Sequence[Variation], output: str
) -> list[SweepRun]:
  """Lists a sweep's runs; runs that share compiled programs are adjacent.

  Raises:
    UsageError: a configuration is invalid, or a folder of that name holds another run.
  """
  runs = []
  fields = [name for variation in variations for name in variation.fields]
  combined = [
    dict(zip(fields, itertools.chain.from_iterable(chosen), strict=True))
    for chosen in itertools.product(*(variation.values for variation in variations))
  ]
  for method, varied, seed in itertools.product(methods, combined, seeds):
    name = '-'.join([method, *(f'{field}={_shown(value)}' for field, value in varied.items()), f'seed{seed}'])
    config = configs.with_values(
      base, {'method': method, 'seed': seed, **varied, 'workdir': os.path.join(output, name), 'resume': True}
    )
    runs.append(
      SweepRun(
        config,
        len(metrics_writer.read_metrics(config.run.workdir)),
        os.path.exists(os.path.join(config.run.workdir, run_dir.SUMMARY)),
      )
    )
  return runs


@functools.lru_cache(maxsize=2)
def _dataset(data: DataConfig, image_size: int, client_folders: bool) -> sources.ImageDataset:
  return sources.load(
    data.dataset,
    image_size=image_size,
    data_dir=data.data_dir,
    cache_dir=data.cache_dir,
    client_folders=client_folders,
  )


def load_data(config: Config) -> FederatedDataset:
  """Loads a run's data, once for all runs with the same images, and partitions it. Raises UsageError."""
  if config.data.auxiliary_dataset:
    return federated_dataset.load(config)
  dataset = _dataset(config.data, config.model.image_size, config.partition.has_client_folders)
  return federated_dataset.partition_dataset(dataset, config)


def count_flops(config: Config, data: FederatedDataset, first_round: int = 0) -> float:
  """Counts the FLOPs of a run's matrix products from a round on, clients and calibration; a multiply-add counts 2."""
  sizes = [len(ids) for ids in data.client_images]
  batch, total = config.client.batch_size, 0.0
  steps: float = config.client.local_epochs * sum(batching.steps_per_epoch(size, batch) for size in sizes)
  steps *= config.effective_clients_per_round / config.effective_num_clients * (1 - config.client.client_dropout)
  for stage in make_plans(config):
    rounds = stage.num_rounds - min(max(first_round - stage.first_round, 0), stage.num_rounds)
    total += rounds * steps * flops.executed_flops(config, data.image_size, stage, batch).total_flops
    if stage.calibrates:
      server_batch, steps_per_epoch = calibration.plan_batches(config, len(data.server_images))
      per_step = flops.calibration_flops(config, data.image_size, stage, server_batch).total_flops
      total += rounds * config.method.calibration_epochs * steps_per_epoch * per_step
  return total


def describe(runs: Sequence[SweepRun], remaining_flops: float, rate: float) -> str:
  """Describes a sweep before it starts: its runs, and an estimate of its time.

  Args:
    runs: see `plan`.
    remaining_flops: FLOPs of all unfinished rounds.
    rate: FLOP/s of the machine's matrix products.
  """
  states = [
    f'  {"finished" if run.finished else f"from round {run.rounds_done + 1}" if run.rounds_done else "new"}: '
    f'{run.workdir}'
    for run in runs
  ]
  minutes = remaining_flops / (rate * FIRST_GUESS_SHARE) / 60
  return '\n'.join(
    [
      f'{len(runs)} runs, {sum(not run.finished for run in runs)} to do:',
      *states,
      f'about {minutes:.0f} minutes at {100 * FIRST_GUESS_SHARE:.0f} % of {rate / 1e9:.0f} GFLOP/s, plus compilation; '
      'corrected after every run',
    ]
  )


def tabulate(workdirs: Sequence[str]) -> str:
  """Returns a Markdown table of finished runs, one row each; others are omitted."""
  rows = [['run', 'final loss', 'kNN accuracy', 'random weights', 'down, MB', 'up, MB', 'seconds']]

  def show(value: float | None) -> str:
    return '-' if value is None else f'{value:.3f}'

  for workdir in workdirs:
    path = os.path.join(workdir, run_dir.SUMMARY)
    if not os.path.exists(path):
      continue
    found = run_dir.read_json(path)
    accuracies = [show(found[name]) for name in ('final_loss', 'final_knn_accuracy', 'random_init_knn_accuracy')]
    megabytes = [f'{found[name] / 1e6:.1f}' for name in ('download_bytes', 'upload_bytes')]
    rows.append([os.path.basename(workdir), *accuracies, *megabytes, f'{found["seconds"]:.0f}'])
  return tables.markdown(rows)


def run_all(runs: Sequence[SweepRun]) -> Outcome:
  """Trains unfinished runs one after the other; a failure is recorded and the next run starts."""
  outcome = Outcome([run.workdir for run in runs if run.finished], {})
  waiting = [(run, count_flops(run.config, load_data(run.config), run.rounds_done)) for run in runs if not run.finished]
  done_flops, seconds = 0.0, 0.0
  for index, (run, work) in enumerate(waiting):
    print(f'== run {index + 1} of {len(waiting)}: {run.workdir}', flush=True)
    started = time.perf_counter()
    try:
      summary = train.train(run.config, load_data(run.config))
      if summary.get('stopped_by'):
        return outcome._replace(stopped_by=summary['stopped_by'])
      outcome.finished.append(run.workdir)
    except (StorageError, UsageError) as error:
      outcome.failed[run.workdir] = str(error)
    except Exception as error:  # one failed run must not stop the others
      traceback.print_exc()
      outcome.failed[run.workdir] = f'{type(error).__name__}: {error}'
    else:
      done_flops, seconds = done_flops + work, seconds + time.perf_counter() - started
      left = sum(work for _, work in waiting[index + 1 :])
      if left:
        print(f'== {seconds / done_flops * left / 60:.0f} minutes left, by the runs so far', flush=True)
  for workdir, reason in outcome.failed.items():
    print(f'failed: {workdir}: {reason}', flush=True)
  return outcome
