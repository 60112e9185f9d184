"""Experiment trackers: TensorBoard, Weights & Biases, MLflow. A row of TRACKERS opens each.

A tracker works in a thread of its own. What it raises is logged once and ends the logging; what hangs is left behind at
the end of the run. Rows of a run are on disk in metrics.jsonl before a tracker sees them.
"""

import contextlib
import importlib.util
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import logging

from lwfedssl_jax import config as configs
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError

PROJECT = 'lwfedssl_jax'  # of Weights & Biases, and MLflow's experiment, unless the environment names another
CLOSE_SECONDS = 60.0  # for what is left to send at the end of a run
_IDS = 'tracker.json'  # in the workdir: {tracker: id of the run}, so that a run that continues is one run there too


class Tracker(NamedTuple):
  """An open tracker.

  Attributes:
    log: (scalars of a round, round) -> None.
    close: () -> None, sends what is left.
  """

  log: Callable[[dict[str, float], int], None]
  close: Callable[[], None]


class _Kind(NamedTuple):
  open: Callable[[Config, int], Tracker]  # (configuration, rounds done)
  module: str
  install: str


def _open_tensorboard(config: Config, rounds_done: int) -> Tracker:
  from tensorboardX import SummaryWriter

  folder = os.path.join(config.run.workdir, 'tensorboard')
  # A file's name has whole seconds: without the suffix, a quick resume would overwrite the file before it.
  writer = SummaryWriter(folder, purge_step=rounds_done or None, filename_suffix=f'.{rounds_done}')

  def log(scalars: dict[str, float], round_num: int) -> None:
    for name, value in scalars.items():
      writer.add_scalar(name, value, round_num)
    writer.flush()

  return Tracker(log, writer.close)


def _open_wandb(config: Config, rounds_done: int) -> Tracker:
  """Opens a run by the environment: WANDB_PROJECT, WANDB_MODE, WANDB_API_KEY, ..."""
  import wandb

  del rounds_done
  identifier = _saved_id(config, 'wandb') or secrets.token_hex(4)
  run = wandb.init(
    project=os.environ.get('WANDB_PROJECT', PROJECT),
    id=identifier,
    resume='allow',
    name=_run_name(config),
    dir=config.run.workdir,
    config=configs.flatten(config),
    reinit='create_new',
    settings=wandb.Settings(console='off'),
  )
  _save_id(config, 'wandb', identifier)
  return Tracker(lambda scalars, round_num: run.log(scalars, step=round_num), run.finish)


def _open_mlflow(config: Config, rounds_done: int) -> Tracker:
  """Opens a run by the environment: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ..."""
  from mlflow import entities, tracking

  del rounds_done
  client = tracking.MlflowClient()
  identifier = _saved_id(config, 'mlflow')
  if identifier is None:
    name = os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT)
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
    identifier = client.create_run(experiment_id, run_name=_run_name(config)).info.run_id
    params = [entities.Param(name, str(value)) for name, value in configs.flatten(config).items()]
    client.log_batch(identifier, params=params)
    _save_id(config, 'mlflow', identifier)
  client.update_run(identifier, status='RUNNING')

  def log(scalars: dict[str, float], round_num: int) -> None:
    now = int(time.time() * 1000)
    metrics = [entities.Metric(name, value, now, round_num) for name, value in scalars.items()]
    client.log_batch(identifier, metrics=metrics)

  return Tracker(log, lambda: client.set_terminated(identifier))


# Keys are catalog.TRACKERS without `none`.
TRACKERS: dict[str, _Kind] = {
  'tensorboard': _Kind(_open_tensorboard, 'tensorboardX', 'tensorboardX'),
  'wandb': _Kind(_open_wandb, 'wandb', "'lwfedssl-jax[wandb]'"),
  'mlflow': _Kind(_open_mlflow, 'mlflow', "'lwfedssl-jax[mlflow]'"),
}


def _run_name(config: Config) -> str:
  return os.path.basename(os.path.abspath(config.run.workdir))


def _read_ids(config: Config) -> dict[str, str]:
  try:
    with open(os.path.join(config.run.workdir, _IDS), encoding='utf-8') as file:
      return dict(json.load(file))
  except FileNotFoundError:
    return {}


def _saved_id(config: Config, name: str) -> str | None:
  return _read_ids(config).get(name)


def _save_id(config: Config, name: str, identifier: str) -> None:
  ids = _read_ids(config) | {name: identifier}
  with open(os.path.join(config.run.workdir, _IDS), 'w', encoding='utf-8') as file:
    json.dump(ids, file)


def check_installed(name: str) -> None:
  """Raises UsageError if a tracker's package is not installed."""
  kind = TRACKERS.get(name)
  if kind and importlib.util.find_spec(kind.module) is None:
    raise UsageError(
      f'--tracker={name}: cannot log without the package {kind.module}, run pip install {kind.install} or choose '
      '--tracker=none'
    )


def to_scalars(row: dict[str, Any]) -> dict[str, float]:
  """Returns the numbers of a round's row, without the round and the stage."""
  return {
    name: value
    for name, value in row.items()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in ('round', 'stage')
  }


class TrackerThread:
  """Passes the rows of a run to the configured tracker. Never raises; waits only in `close`, CLOSE_SECONDS at most."""

  def __init__(self, config: Config, rounds_done: int):
    self._name, self._rows = config.run.tracker, queue.SimpleQueue[dict[str, Any] | None]()
    self._thread: threading.Thread | None = None
    if self._name in TRACKERS:
      self._thread = threading.Thread(target=self._run, args=(config, rounds_done), daemon=True)
      self._thread.start()

  def log(self, row: dict[str, Any]) -> None:
    """Passes on the row of a round."""
    if self._thread is not None and self._thread.is_alive():
      self._rows.put(row)

  def close(self) -> None:
    """Waits until everything is sent."""
    if self._thread is None:
      return
    self._rows.put(None)
    self._thread.join(CLOSE_SECONDS)
    if self._thread.is_alive():
      logging.warning('--tracker=%s did not end in %g seconds and is left behind', self._name, CLOSE_SECONDS)

  def __enter__(self) -> 'TrackerThread':
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()

  def _run(self, config: Config, rounds_done: int) -> None:
    try:
      tracker = TRACKERS[self._name].open(config, rounds_done)
      with contextlib.closing(tracker):
        while (row := self._rows.get()) is not None:
          tracker.log(to_scalars(row), row['round'])
    except BaseException as error:  # SystemExit too: no tracker ends a run
      text = ' '.join(str(error).split())[:300]
      logging.warning(
        '--tracker=%s failed, the run continues without it: %s: %s', self._name, type(error).__name__, text
      )
