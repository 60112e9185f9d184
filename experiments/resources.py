"""Reads what a client will pay before anything is spent: bytes, operations and memory, per method and stage.

    python -m experiments.resources --encoder=vit_tiny --image_size=32 --convention=paper_v4
    python -m experiments.resources --flagfile=experiments/presets/paper_v1.flags --convention=actual --format=json

All methods, unless --method names one.
"""

import os

from absl import flags as absl_flags

from experiments import flags
from lwfedssl_jax import catalog
from lwfedssl_jax import config as configs
from lwfedssl_jax.base import UsageError
from lwfedssl_jax.resources import costs, measure, pictures, planner

_CONVENTION = absl_flags.DEFINE_enum('convention', 'paper_v4', costs.CONVENTIONS, 'how costs are counted')
_WORST_CASE = absl_flags.DEFINE_boolean(
    'worst_case_download', False, 'the client downloads everything below the active block in every round')
_FORMAT = absl_flags.DEFINE_enum('format', 'table', ['table', 'json'], 'what is printed before the last line')
_MEMORY = absl_flags.DEFINE_boolean('memory', True, 'convention actual: compile the steps for their peak memory')
_MEASURE = absl_flags.DEFINE_boolean(
    'measure_memory', False, 'convention actual: run each step in a process of its own and read its high-water mark')
_PLOTS = absl_flags.DEFINE_string('plots', '', 'folder for memory, operations and bytes as pictures; empty: none')


def main():
  """Prints the table and returns the figures."""
  config = flags.config_from_flags()
  image_size = config.model.image_size
  if not image_size:
    raise UsageError('--image_size: expected the side of the images in pixels, got 0')
  convention = _CONVENTION.value
  if _MEASURE.value and convention not in costs.OWN_CONVENTIONS:
    raise UsageError(f'--measure_memory: expected --convention=actual, got {convention}')
  flags.print_config(config)
  named = absl_flags.FLAGS['method'].present
  methods = (config.method.method,) if named else catalog.METHODS
  runs = [configs.with_values(config, {'method': method}) for method in methods]
  if config.client.client_memory_budget_mb:
    plans = [planner.fit(run, image_size) for run in runs]
    print('\n'.join(f'{plan.config.method.method}: {planner.describe(plan)}' for plan in plans), flush=True)
    runs = [plan.config for plan in plans]
  found = [
      costs.method_cost(run, image_size, convention, worst_case_download=_WORST_CASE.value, with_memory=_MEMORY.value)
      for run in runs
  ]
  if _FORMAT.value == 'table':
    print(costs.to_text(found), flush=True)
  if _PLOTS.value:
    os.makedirs(_PLOTS.value, exist_ok=True)
    pictures.write_cost_pictures(_PLOTS.value, found)
  result = {
      'convention': convention,
      'objective': config.objective.objective,
      'gb_bytes': costs.gb_bytes(convention),
      'worst_case_download': _WORST_CASE.value,
      'methods': {cost.method: costs.to_json(cost) for cost in found},
  }
  if _MEASURE.value:
    for run, method in zip(runs, methods):
      measured = measure.measure_stages(run, image_size)
      for stage in measured:
        print(f'{method}, stage {stage["stage"] + 1}: compiled {stage["compiled_bytes"] / 1e6:.1f} MB, '
              f'measured {stage["measured_bytes"] / 1e6:.1f} MB', flush=True)
      result['methods'][method]['measured_memory'] = measured
  return result


if __name__ == '__main__':
  flags.define_config_flags()
  flags.run(main)
