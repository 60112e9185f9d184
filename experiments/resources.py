"""Predicts the costs of a client before a run: bytes, FLOPs and memory, per method and stage.

    python -m experiments.resources --encoder=vit_tiny --image_size=32 --convention=paper_v4
    python -m experiments.resources --preset=paper_v1 --convention=actual --format=json

Shows all methods, or the one of --method.
"""

import os
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


def main() -> dict[str, Any]:
  """Prints the table and returns the figures."""
  config = flags.config_from_flags(FLAGS)
  convention, image_size = _CONVENTION.value, config.model.image_size
  if not image_size:
    raise UsageError('--image_size: expected the side of the images in pixels, got 0')
  if _MEASURE.value and convention not in catalog.OWN_CONVENTIONS:
    raise UsageError(f'--measure_memory: expected --convention=actual, got {convention}')
  methods = (config.method.method,) if FLAGS['method'].present else tuple(catalog.METHODS)
  runs = [configs.with_values(config, {'method': method}) for method in methods]

  from lwfedssl_jax.plots import cost_plots
  from lwfedssl_jax.resources import costs, planner

  command.use_compilation_cache()
  plans = [planner.fit(run, image_size) for run in runs] if config.client.client_memory_budget_mb else []
  flags.print_config(config)
  for plan in plans:
    print(f'{plan.config.method.method}: {planner.describe(plan)}', flush=True)
  runs = [plan.config for plan in plans] or runs
  found = [
    costs.method_cost(run, image_size, convention, worst_case_download=_WORST_CASE.value, with_memory=_MEMORY.value)
    for run in runs
  ]
  if _FORMAT.value == 'table':
    print(costs.to_text(found), flush=True)
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
