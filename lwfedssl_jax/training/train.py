"""The driver: stages times rounds, with metrics, checkpoints and resume."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from lwfedssl_jax import devices, rng, stages, trees
from lwfedssl_jax.base import Params
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import federated_dataset, partition_file, sources
from lwfedssl_jax.data.federated_dataset import FederatedDataset
from lwfedssl_jax.errors import LostPeerError, StorageError, TrainingError, UsageError
from lwfedssl_jax.federated import privacy
from lwfedssl_jax.plots import run_plots
from lwfedssl_jax.stages import StagePlan
from lwfedssl_jax.training import signals
from lwfedssl_jax.training.round_runner import RoundRunner
from lwfedssl_jax.training.setup import RunSetup, resolve
from lwfedssl_jax.training.simulation import Simulation
from lwfedssl_jax.workdir import checkpoint, client_store, metrics_writer, run_dir, trackers

Summary = dict[str, Any]


def train(
  config: Config,
  data: FederatedDataset | None = None,
  on_start: Callable[[Config], None] = lambda config: None,
  on_row: metrics_writer.OnRow = lambda row: None,
  make_runner: Callable[[RunSetup], RoundRunner] = Simulation,
) -> Summary:
  """Runs a pretraining to its end or to `stop_after_round`, from the start or the newest checkpoint.

  Args:
    config: the run; it writes to `config.run.workdir`.
    data: loaded and partitioned images; None loads the configured data set.
    on_start: called with the resolved configuration by the process that writes, after all validation.
    on_row: called by that process with a copy of each row of metrics.jsonl, once it is on disk. What it raises ends the
      run before the round is saved; `resume` repeats the round.
    make_runner: builds whoever trains: simulated clients, or real ones (`deployment`).

  Returns:
    The summary, as in summary.json. For a run that stopped early: `finished` False, the rounds done, and the signal
    that stopped it (see signals.py) or None.

  Raises:
    UsageError: invalid configuration, data or workdir, before anything is written.
    StorageError: the workdir's disk is full or fails; saved checkpoints are complete.
    TrainingError: two attempts at a round in a row gave no update that could be used; the state before it is saved.
    LostPeerError: another process of the run is gone; checkpoints stay.
    Interrupted: a second signal; complete checkpoints stay.
  """
  trackers.check_installed(config.run.tracker)
  data = data or federated_dataset.load(config)
  config, memory_plan = resolve(config, data)
  with _claim_workdir(config) as workdir:
    first = devices.is_first_process()
    if first:
      on_start(config)
      print('\n'.join(filter(None, [memory_plan, sources.describe(data.dataset)])), flush=True)
    summary_path = os.path.join(workdir, run_dir.SUMMARY)
    if os.path.exists(summary_path):
      return run_dir.read_json(summary_path)
    run = RunSetup(config, data)
    with (
      contextlib.closing(make_runner(run)) as runner,
      checkpoint.Checkpoints(workdir, config.run.keep_checkpoints, sharding=run.sharding) as checkpoints,
    ):
      restored = checkpoints.restore_newest(jax.eval_shape(run.model.init_params, jax.random.key(0)), run.trace_server)
      if restored is not None:
        _check_partition(data, workdir)
      elif first:
        _write_plots(run, workdir)
      params, rounds_done, server_state = restored or (run.init(), 0, None)
      with _open_log(run, rounds_done, on_row) as log, signals.handle() as stop, _naming_lost_peers():
        runner.resume(rounds_done, server_state)
        params, rounds_done = _train_rounds(run, runner, params, rounds_done, log, checkpoints, stop)
        rows = log.rows
    if rounds_done < run.num_rounds:
      return {
        'finished': False,
        'method': config.method.method,
        'rounds_done': rounds_done,
        'num_rounds': run.num_rounds,
        'params_sha256': trees.sha256(params),
        'stopped_by': stop.name,
      }
    sample, summary = run.monitor.sample(params, run.init()), _summarize(run, params, rows)
    if first:
      run_dir.write_arrays(os.path.join(workdir, run_dir.EMBEDDINGS), sample)
      run_dir.write_json(summary_path, summary)
      client_store.clear(workdir)
    return summary


@contextlib.contextmanager
def _claim_workdir(config: Config) -> Iterator[str]:
  """As run_dir.claim_workdir, by the first process for all of them."""
  refused: Exception | None = None
  with contextlib.ExitStack() as stack:
    if devices.is_first_process():
      try:
        stack.enter_context(run_dir.claim_workdir(config))
      except (StorageError, UsageError) as error:
        refused = error
    if devices.any_process(refused is not None):
      raise refused or UsageError('--workdir: expected a folder that the first process can use, see its message')
    yield config.run.workdir


@contextlib.contextmanager
def _open_log(run: RunSetup, rounds_done: int, on_row: metrics_writer.OnRow) -> Iterator[metrics_writer.MetricsReader]:
  """Opens metrics.jsonl and the tracker in the first process."""
  workdir = run.config.run.workdir
  if not devices.is_first_process():
    yield metrics_writer.MetricsReader(workdir, rounds_done, run.num_rounds)
    return
  with trackers.TrackerThread(run.config, rounds_done) as tracker:
    with metrics_writer.MetricsWriter(workdir, rounds_done, run.num_rounds, (tracker.log, on_row)) as log:
      yield log


@contextlib.contextmanager
def _naming_lost_peers() -> Iterator[None]:
  """Turns a failed collective operation of several processes into LostPeerError."""
  try:
    yield
  except Exception as error:
    if not devices.is_lost_peer(error):
      raise
    reason = ' '.join(str(error).split())[:200]
    raise LostPeerError(
      f'another process of the run died; --resume continues from the last checkpoint ({reason})'
    ) from error


def _train_rounds(
  run: RunSetup,
  runner: RoundRunner,
  params: Params,
  rounds_done: int,
  log: metrics_writer.MetricsReader,
  checkpoints: checkpoint.Checkpoints,
  stop: signals.StopRequest,
) -> tuple[Params, int]:
  """Runs rounds from `rounds_done` on; returns the parameters and the rounds done at the end."""
  options = run.config.run
  last = min(options.stop_after_round or run.num_rounds, run.num_rounds)
  saved, ended = rounds_done, time.perf_counter()
  for round_num in range(rounds_done, last):
    plan = run.find_plan(round_num)
    stage_ends = round_num + 1 == plan.first_round + plan.num_rounds
    if round_num == plan.first_round:
      params = stages.init_new_blocks(params, plan, run.config.method.new_block_init)
    between = time.perf_counter() - ended
    params, row = _run_round(run, runner, params, plan, round_num, log)
    row['between_seconds'], ended = between, time.perf_counter()
    if row['participants'] and not row['accepted']:
      if saved < round_num:
        runner.keep_since(checkpoints.save(params, round_num, runner.server_state))
      raise TrainingError(
        f'round {round_num + 1}: no valid client update in two attempts (not finite, or its loss diverged); '
        'the state before it is saved. A smaller --learning_rate may help'
      )
    if stage_ends:
      row |= _measure_stage(run, params, plan)
    log.write(row)
    rounds_done = round_num + 1
    stops = devices.any_process(stop.name is not None)
    if stage_ends or rounds_done == last or rounds_done % options.checkpoint_every == 0 or stops:
      runner.keep_since(checkpoints.save(params, rounds_done, runner.server_state))
      saved = rounds_done
    if stops:
      stop.name = stop.name or 'a signal to another process'
      break
  return params, rounds_done


def _run_round(
  run: RunSetup,
  runner: RoundRunner,
  params: Params,
  plan: StagePlan,
  round_num: int,
  log: metrics_writer.MetricsReader,
) -> tuple[Params, dict[str, Any]]:
  start, limit = time.perf_counter(), _loss_limit(run.config, plan, log.rows)
  down = up = np.zeros(1, np.int64)
  for attempt in range(2):
    params, result = runner.run(params, plan, round_num, attempt, limit)
    down, up = down + result.traffic.download_bytes.sum(axis=1), up + result.traffic.upload_bytes.sum(axis=1)
    rejected_clients = result.client_ids[result.returned & ~result.accepted].tolist()
    if rejected_clients:
      log.log(f'round {round_num + 1}: rejected clients {rejected_clients}: update not finite or loss diverged')
    if result.accepted.any() or not result.returned.any():
      break
    log.log(f'round {round_num + 1}: no valid update' + ('; retry with other randomness' * (not attempt)))
  seconds = time.perf_counter() - start
  row = {
    'round': round_num,
    'stage': plan.stage,
    'loss': None,
    'attempts': attempt + 1,
    'sampled': len(result.returned),
    'participants': int(result.returned.sum()),
    'client_ids': result.client_ids.tolist(),
    'client_losses': [
      loss if back and np.isfinite(loss) else None for loss, back in zip(result.client_losses.tolist(), result.returned)
    ],
    'accepted': int(result.accepted.sum()),
    'rejected_clients': rejected_clients,
    'seconds': seconds,
    'images_per_second': result.images_trained / seconds,
    **_traffic_row(down, up, run.config.effective_num_clients),
  }
  if result.losses is None:
    log.log(f'round {round_num + 1}: no client returned, the global model is unchanged')
    return params, row
  row['padding_fraction'] = result.padding_fraction
  row['loss'] = float(result.losses.total)
  row['objective_loss'] = float(result.losses.objective)
  row['client_divergence'] = result.divergence
  if run.config.uses_alignment:
    row['alignment_loss'] = float(result.losses.alignment)
  if result.calibration is not None:
    row['calibration_loss'] = float(result.calibration.total)
  return params, row


def _loss_limit(config: Config, plan: StagePlan, rows: list[dict[str, Any]]) -> float:
  """Returns the loss above which a client is rejected: a multiple of the stage's last loss, infinity without one."""
  factor = config.method.client_loss_limit
  last = next((row['loss'] for row in reversed(rows) if row['loss'] is not None and row['stage'] == plan.stage), None)
  return factor * abs(last) if factor and last is not None else np.inf


def _traffic_row(client_down: np.ndarray, client_up: np.ndarray, num_clients: int) -> dict[str, Any]:
  """Returns the bytes of a round: per sampled client, their total, and the mean over all clients."""
  down, up = int(client_down.sum()), int(client_up.sum())
  return {
    'download_bytes': down / num_clients,
    'upload_bytes': up / num_clients,
    'total_download_bytes': down,
    'total_upload_bytes': up,
    'client_download_bytes': client_down.tolist(),
    'client_upload_bytes': client_up.tolist(),
  }


def _measure_stage(run: RunSetup, params: Params, plan: StagePlan) -> dict[str, Any]:
  random = run.monitor.measure(run.init(), plan.stop)
  return run.monitor.measure(params, plan.stop) | {'random_knn_accuracy': random['knn_accuracy']}


def _summarize(run: RunSetup, params: Params, rows: list[dict[str, Any]]) -> Summary:
  config, last = run.config, rows[-1]

  def total(name):
    return sum(row[name] for row in rows)

  return {
    'finished': True,
    'method': config.method.method,
    'objective': config.objective.objective,
    'encoder': config.model.encoder,
    'dataset': config.data.dataset,
    'seed': config.run.seed,
    'num_clients': config.effective_num_clients,
    'num_rounds': run.num_rounds,
    'final_loss': last['loss'],
    'final_knn_accuracy': last['knn_accuracy'],
    'random_init_knn_accuracy': last['random_knn_accuracy'],
    'raw_pixel_knn_accuracy': run.monitor.raw_pixel_accuracy(),
    'embedding_std': last['embedding_std'],
    'effective_rank': last['effective_rank'],
    'download_bytes': total('total_download_bytes') / config.effective_num_clients,
    'upload_bytes': total('total_upload_bytes') / config.effective_num_clients,
    'seconds': total('seconds'),
    **privacy.summarize(config, rows),
    'params_sha256': trees.sha256(params),
  }


def _partition_json(data: FederatedDataset) -> dict[str, Any]:
  partition = partition_file.Partition(data.client_images, data.server_ids)
  return partition_file.to_json(partition, len(data.dataset.train_images))


def _check_partition(data: FederatedDataset, workdir: str) -> None:
  """Raises UsageError where a run that continues would train on another partition than it started with."""
  path = os.path.join(workdir, partition_file.NAME)
  if os.path.exists(path) and run_dir.read_json(path) != _partition_json(data):
    raise UsageError(f'--resume: expected the partition in {path}; the data set or the file of --partition has changed')


def _write_plots(run: RunSetup, workdir: str) -> None:
  """Plots augmented views and the partition, and saves the partition, before training starts."""
  run_plots.write_contact_sheet(
    os.path.join(workdir, 'views.png'), run.data, run.config, rng.key(run.config.run.seed, rng.Stream.CONTACT_SHEET)
  )
  if not run.data.client_images:  # they are elsewhere
    return
  with open(os.path.join(workdir, partition_file.NAME), 'w', encoding='utf-8') as file:
    json.dump(_partition_json(run.data), file)
  run_plots.write_partition_plot(os.path.join(workdir, 'partition.png'), run.data)
