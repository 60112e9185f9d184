"""Predicts the costs of a client before a run: bytes, FLOPs and memory, per method and stage.

    python -m experiments.resources --encoder=vit_tiny --image_size=32 --convention=paper_v4
    python -m experiments.resources --preset=paper_v1 --convention=actual --format=json

    python -m experiments.resources --encoder=vit_tiny --image_size=32 --target=gpu-h100 --target_devices=8

Shows all methods, or the one of --method. With --target, what that chip's compiler gives; the chip is not needed.
"""

import os
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from lwfedssl_jax import catalog
from lwfedssl_jax import config as configs
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError

from . import command, flags

FLAGS = absl_flags.FlagValues()
_CONVENTION = absl_flags.DEFINE_enum(
  'convention', 'paper_v4', catalog.CONVENTIONS, 'how costs are counted', flag_values=FLAGS
)
_WORST_CASE = absl_flags.DEFINE_boolean(
  'worst_case_download',
  False,
  'charge the download of everything below the active block in every round',
  flag_values=FLAGS,
)
_FORMAT = absl_flags.DEFINE_enum('format', 'table', ['table', 'json'], 'output before the last line', flag_values=FLAGS)
_MEMORY = absl_flags.DEFINE_boolean(
  'memory', True, 'own conventions: compile the steps for their peak memory', flag_values=FLAGS
)
_MEASURE = absl_flags.DEFINE_boolean(
  'measure_memory',
  False,
  'own conventions: run each step in a process of its own and read its high-water mark',
  flag_values=FLAGS,
)
_PLOTS = absl_flags.DEFINE_string(
  'plots', '', 'folder for plots of memory, FLOPs and bytes; empty: none', flag_values=FLAGS
)
_TARGET = absl_flags.DEFINE_string(
  'target',
  '',
  'compile for this chip, which need not exist here, instead of counting costs: gpu-h100, gpu-a100, tpu-v5e:2x2, ..., '
  'or file:PATH (docs/accelerators.md)',
  flag_values=FLAGS,
)
_STAGES = absl_flags.DEFINE_list(
  'stages', [], '--target: stages, from 1, whose steps are compiled; empty: one of each shape', flag_values=FLAGS
)
_DEVICES = absl_flags.DEFINE_integer(
  'target_devices',
  0,
  "--target: compile a round of each method's last stage too, on so many devices; 0: none",
  lower_bound=0,
  flag_values=FLAGS,
)
_IMAGES = absl_flags.DEFINE_integer(
  'target_images',
  50_000,
  "--target: training images of that round and of a run, the server's among them",
  1,
  flag_values=FLAGS,
)
_LARGEST = absl_flags.DEFINE_boolean(
  'largest_batch', False, '--target: find the largest batch whose steps fit, too', flag_values=FLAGS
)


def _measured(run: Config) -> list[dict[str, int]]:
  """Measures a method's stages, each in a process of its own, and prints them."""
  from lwfedssl_jax.resources import measure

  stages = measure.measure_stages(run, run.model.image_size)
  for stage in stages:
    print(
      f'{run.method.method}, stage {stage["stage"] + 1}: compiled {stage["compiled_bytes"] / 1e6:.1f} MB, '
      f'measured {stage["measured_bytes"] / 1e6:.1f} MB',
      flush=True,
    )
  return stages


def _predict(config: Config, methods: Sequence[str]) -> dict[str, Any]:
  """Compiles the methods' steps and rounds for --target, prints tables, and returns the figures."""
  import jax

  jax.config.update('jax_platforms', 'cpu')  # tracing needs no accelerator, and must not take one
  from lwfedssl_jax.resources import planner, predict, target_tables, targets
  from lwfedssl_jax.stages import make_plans

  target, image_size = targets.load(_TARGET.value, max(1, _DEVICES.value)), config.model.image_size
  target.make_mesh(_DEVICES.value)  # an error before the first minute of compilation
  wanted = flags.whole_numbers('stages', _STAGES.value)
  steps, rounds, whole_runs, batches = [], [], [], {}
  runs = [configs.with_values(config, {'method': method}) for method in methods]
  plans = {run.method.method: make_plans(run) for run in runs}
  most = max(map(len, plans.values()))
  if not all(1 <= stage <= most for stage in wanted):
    raise UsageError(f'--stages: expected 1 to {most}, got {",".join(_STAGES.value)}')
  flags.print_config(config)
  for run in runs:
    method = run.method.method
    if config.client.client_memory_budget_mb:
      plan = planner.fit(run, image_size, target)
      run = plan.config
      print(f'{method}: {planner.describe(plan)}', flush=True)
    chosen = [stage for stage in plans[method] if not wanted or stage.stage + 1 in wanted]
    found = predict.predict_steps(run, image_size, target, chosen) if chosen else []
    if wanted:
      steps += found
    else:
      shown = predict.last_of_each_shape(plans[method])
      steps += [step for step, plan in zip(found, chosen) if plan in shown]
      whole_runs.append(predict.predict_run(run, found, _IMAGES.value))
    if _DEVICES.value:
      peak = None if wanted else max(step.peak_bytes for step in found)
      run = predict.resolve_chunk(run, image_size, target, _IMAGES.value, peak)
      rounds.append(predict.predict_round(run, image_size, plans[method][-1], target, _DEVICES.value, _IMAGES.value))
    if _LARGEST.value:
      batches[method] = planner.largest_batch(run, image_size, target.memory_bytes, target)
      print(f'{method}: largest batch that fits {target.name}: {batches[method]} images', flush=True)
  if _FORMAT.value == 'table':
    print(target_tables.to_text(target, steps, rounds, whole_runs), flush=True)
  return {**target_tables.to_json(target, steps, rounds, whole_runs), **({'largest_batch': batches} if batches else {})}


def main() -> dict[str, Any]:
  """Prints the table and returns the figures."""
  config = flags.config_from_flags(FLAGS)
  convention, image_size = _CONVENTION.value, config.model.image_size
  if not image_size:
    raise UsageError('--image_size: expected the side of the images in pixels, got 0')
  methods = (config.method.method,) if FLAGS['method'].present else tuple(catalog.METHODS)
  if _TARGET.value:
    return _predict(config, methods)
  if _MEASURE.value and convention not in catalog.OWN_CONVENTIONS:
    raise UsageError(f'--measure_memory: expected --convention=actual, got {convention}')
  runs = [configs.with_values(config, {'method': method}) for method in methods]

  from lwfedssl_jax.plots import cost_plots
  from lwfedssl_jax.resources import cost_tables, costs, planner

  command.use_compilation_cache()
  plans = [planner.fit(run, image_size) for run in runs] if config.client.client_memory_budget_mb else []
  flags.print_config(config)
  for plan in plans:
    print(f'{plan.config.method.method}: {planner.describe(plan)}', flush=True)
  runs = [plan.config for plan in plans] or runs
  found = [
    costs.method_cost(
      run,
      image_size,
      convention,
      worst_case_download=_WORST_CASE.value,
      with_memory=_MEMORY.value,
      with_server_memory=_MEMORY.value,
    )
    for run in runs
  ]
  if _FORMAT.value == 'table':
    print(cost_tables.to_text(found), flush=True)
  if _PLOTS.value:
    os.makedirs(_PLOTS.value, exist_ok=True)
    cost_plots.write_cost_plots(_PLOTS.value, found)
  figures = {cost.method: costs.to_json(cost) for cost in found}
  if _MEASURE.value:
    for run in runs:
      figures[run.method.method]['measured_memory'] = _measured(run)
  return {
    'convention': convention,
    'objective': config.objective.objective,
    'gb_bytes': costs.gb_bytes(convention),
    'worst_case_download': _WORST_CASE.value,
    'methods': figures,
  }


COMMAND = command.Command(__doc__, FLAGS, main, has_config=True)


def run() -> None:
  """Runs this command line."""
  command.run(COMMAND)


if __name__ == '__main__':
  run()
