"""Predictions for a target as tables and as JSON."""

from collections.abc import Sequence
from typing import Any

import jax

from lwfedssl_jax import tables
from lwfedssl_jax.resources import collectives
from lwfedssl_jax.resources.predict import RoundPrediction, RunPrediction, StepPrediction
from lwfedssl_jax.resources.targets import Target

FIT, NO_FIT = 'yes', 'no'


def describe(target: Target) -> str:
  """Returns one line: what was compiled for, and what the figures assume."""
  rates = ', '.join(f'{rate / 1e12:g} TFLOP/s {kind}' for kind, rate in target.peaks.flops.items())
  return (
    f'{target.name}: {target.description}; compiled by jax {jax.__version__}, not run. Memory for programs '
    f'{target.memory_bytes / 1e9:.1f} GB. Assumed peaks: {rates}; {target.peaks.memory_bandwidth / 1e12:g} TB/s'
  )


def _step_rows(steps: Sequence[StepPrediction]) -> list[list[str]]:
  rows = [['method', 'stage', 'peak GB', 'fits', 'GFLOP', 'GB moved', 'products ms', 'memory ms', 'at least ms']]
  rows[0] += ['bound by', 'launches']
  for step in steps:
    line = step.roofline
    figures = ['-'] * 7
    if line is not None:
      times = (line.flop_seconds, line.memory_seconds, line.seconds)
      figures = [f'{line.flops / 1e9:,.0f}', f'{line.num_bytes / 1e9:,.2f}', *(f'{1e3 * time:,.2f}' for time in times)]
      figures += [line.bound, f'{line.num_kernels:,}']
    head = [step.method, str(step.stage + 1), f'{step.peak_bytes / 1e9:.3f}', FIT if step.fits else NO_FIT]
    rows.append([*head, *figures])
  return rows


def _share_rows(steps: Sequence[StepPrediction]) -> list[list[str]]:
  """Returns a row per step: the share of the least time by kind of operation, percent."""
  found = [(step, step.roofline.shares) for step in steps if step.roofline is not None]
  kinds = list(dict.fromkeys(kind for _, shares in found for kind in shares))
  rows = [['method', 'stage', *kinds]]
  for step, shares in found:
    rows.append([step.method, str(step.stage + 1), *(f'{100 * shares.get(kind, 0):.1f}' for kind in kinds)])
  return rows


def _round_rows(found: Sequence[RoundPrediction]) -> list[list[str]]:
  rows = [
    ['method', 'stage', 'devices', 'clients vmapped', 'peak GB', 'fits', 'bytes per round', 'in loops, each time']
  ]
  for prediction in found:
    loops = [f'{one.kind} {one.num_bytes:,}' for one in prediction.exchanged if one.in_loop]
    rows.append(
      [
        prediction.method,
        str(prediction.stage + 1),
        str(prediction.num_devices),
        str(prediction.client_chunk),
        f'{prediction.peak_bytes / 1e9:.3f}',
        FIT if prediction.fits else NO_FIT,
        f'{collectives.bytes_per_round(prediction.exchanged):,}',
        '; '.join(loops) or '-',
      ]
    )
  return rows


def _run_rows(runs: Sequence[RunPrediction]) -> list[list[str]]:
  rows = [['method', 'images', 'steps', 'at least minutes']]
  for run in runs:
    minutes = '-' if run.seconds is None else f'{run.seconds / 60:,.1f}'
    rows.append([run.method, f'{run.num_images:,}', f'{run.num_steps:,}', minutes])
  return rows


def to_text(
  target: Target,
  steps: Sequence[StepPrediction],
  found: Sequence[RoundPrediction] = (),
  runs: Sequence[RunPrediction] = (),
) -> str:
  """Returns the tables: steps, where their time would go, rounds, runs."""
  parts = [describe(target), '', 'one client step', '', tables.markdown(_step_rows(steps)), '']
  if any(step.roofline is not None for step in steps):
    parts += ['share of the least time by kind of operation, percent', '', tables.markdown(_share_rows(steps)), '']
  if found:
    parts += ['one round, per device', '', tables.markdown(_round_rows(found)), '']
  if runs:
    parts += ['client steps of a whole run, one device', '', tables.markdown(_run_rows(runs)), '']
  return '\n'.join(parts)


def to_json(
  target: Target,
  steps: Sequence[StepPrediction],
  found: Sequence[RoundPrediction] = (),
  runs: Sequence[RunPrediction] = (),
) -> dict[str, Any]:
  """Returns the same figures."""

  def step_fields(step: StepPrediction) -> dict[str, Any]:
    line = step.roofline
    return {
      **step._asdict(),
      'memory': step.memory and step.memory._asdict(),
      'roofline': line and {**line._asdict(), 'bound': line.bound},
    }

  return {
    'target': target.name,
    'memory_bytes': target.memory_bytes,
    'peak_flops': target.peaks.flops,
    'memory_bandwidth': target.peaks.memory_bandwidth,
    'steps': [step_fields(step) for step in steps],
    'rounds': [{**one._asdict(), 'exchanged': [part._asdict() for part in one.exchanged]} for one in found],
    'runs': [run._asdict() for run in runs],
  }
