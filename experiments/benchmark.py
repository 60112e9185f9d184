"""Times one client step of every method and stage asked for, against an end-to-end step in the same run.

    python -m experiments.benchmark --suite=step --encoder=vit_tiny --image_size=32 --batch_size=64

The cases take turns, so that a machine whose speed drifts treats them alike: quote the ratios.
"""

import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags as absl_flags

from experiments import flags
from lwfedssl_jax import config as configs
from lwfedssl_jax import stages
from lwfedssl_jax.base import UsageError
from lwfedssl_jax.config import Config
from lwfedssl_jax.federated import local
from lwfedssl_jax.federated import round as rounds
from lwfedssl_jax.resources import memory

_SUITE = absl_flags.DEFINE_enum('suite', 'step', ['step'], 'what to measure')
_REPEATS = absl_flags.DEFINE_integer('repeats', 7, 'turns that are timed, after one that is not', lower_bound=1)


class Case(NamedTuple):
  """A compiled step with what it needs."""

  name: str
  step: Any
  state: Any
  arguments: tuple[Any, ...]
  compile_seconds: float
  scratch_bytes: int


def _prepare(config: Config, method: str, stage: int) -> Case:
  config = configs.with_values(config, {'method': method})
  size, plan = config.model.image_size, stages.make_plans(config)[stage]
  begin = time.perf_counter()
  compiled = memory.lower_client_step(config, size, plan).compile()
  compile_seconds = time.perf_counter() - begin
  rules = rounds.make_rules(config, size)
  params = rounds.make_round(config, size, config.client.batch_size).init(jax.random.key(config.run.seed))
  active, frozen = stages.split(params, plan.shape, plan.start)
  state = jax.tree.map(jnp.copy, local.init_state(rules, active))  # its own buffers: the step takes them over
  views = jax.random.uniform(jax.random.key(1), (2, config.client.batch_size, size, size, 3))
  arguments = (active, frozen, jnp.int32(plan.start), views, jnp.ones(config.client.batch_size, bool))
  scratch = compiled.memory_analysis().temp_size_in_bytes
  return Case(f'{method}, stage {stage + 1}', compiled, state, arguments, compile_seconds, scratch)


def _time_in_turns(cases: list[Case], repeats: int) -> list[list[float]]:
  states, seconds = [case.state for case in cases], [[] for _ in cases]
  for turn in range(repeats + 1):
    for index, case in enumerate(cases):
      begin = time.perf_counter()
      states[index], _ = jax.block_until_ready(case.step(states[index], *case.arguments))
      if turn:
        seconds[index].append(time.perf_counter() - begin)
  return seconds


def main():
  """Prints a table and returns the figures."""
  config = flags.config_from_flags()
  if not config.model.image_size:
    raise UsageError('--image_size: expected the side of the images in pixels, got 0')
  flags.print_config(config)
  jax.config.update('jax_enable_compilation_cache', False)  # so that compiling is really timed
  last = len(stages.make_plans(configs.with_values(config, {'method': 'layerwise'}))) - 1
  named = [('end_to_end', 0), *(('layerwise', s) for s in sorted({0, 1, last // 2, last})), ('lw_fedssl', last),
           ('prog_fedssl', last // 2)]
  cases = [_prepare(config, method, stage) for method, stage in named]
  turns = _time_in_turns(cases, _REPEATS.value)
  results = []
  print('| step | median s | fastest s | of end to end | images/s | compile s | scratch MB |\n' + '|---' * 7 + '|')
  for case, seconds in zip(cases, turns):
    ratio = statistics.median(s / e for s, e in zip(seconds, turns[0]))  # within a turn
    median, name = statistics.median(seconds), case.name
    rate = config.client.batch_size / median
    results.append({
        'step': name, 'median_seconds': median, 'fastest_seconds': min(seconds), 'ratio_to_end_to_end': ratio,
        'images_per_second': rate, 'compile_seconds': case.compile_seconds,
        'scratch_bytes': case.scratch_bytes})
    print(f'| {name} | {median:.3f} | {min(seconds):.3f} | {ratio:.3f} | {rate:.0f} | '
          f'{case.compile_seconds:.1f} | {case.scratch_bytes / 1e6:.0f} |')
  return {'suite': _SUITE.value, 'device_kind': jax.devices()[0].device_kind, 'steps': results}


if __name__ == '__main__':
  flags.define_config_flags()
  flags.run(main)
