"""Times client steps or whole rounds of every method, against end to end and against plain PyTorch, in one run.

    python -m experiments.benchmark --suite=step --encoder=vit_tiny --image_size=32 --batch_size=64
    python -m experiments.benchmark --suite=round --encoder=vit_tiny --image_size=32 --batch_size=64 --num_clients=2
    python -m experiments.benchmark --suite=clients --method=layerwise --image_size=32
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m experiments.benchmark --suite=devices \
        --method=layerwise --image_size=32 --num_clients=16 --batch_size=32

The cases take turns, so that a machine whose speed drifts treats them alike: quote the ratios, which are formed within
a turn. PyTorch is left out where it is not installed (extra `torch`).
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from experiments import flags, scaling, turns
from lwfedssl_jax import config as configs
from lwfedssl_jax import stages, tables
from lwfedssl_jax.base import UsageError
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import batching
from lwfedssl_jax.federated import local
from lwfedssl_jax.federated import round as rounds
from lwfedssl_jax.resources import collectives, flops, machine, memory
from lwfedssl_jax.stages import StagePlan

_SUITE = absl_flags.DEFINE_enum('suite', 'step', ['step', 'round', 'clients', 'devices'], 'what to measure')
_REPEATS = absl_flags.DEFINE_integer('repeats', 7, 'turns that are timed, after one that is not', lower_bound=1)
_IMAGES = absl_flags.DEFINE_integer('images_per_client', 128, 'suite round: images that a client holds', lower_bound=2)
_ALL_STAGES = absl_flags.DEFINE_boolean('all_stages', False, 'every stage of layerwise, not a choice of four')

STEPS_PER_CALL = 4  # in one program, as in a round: what a call costs by itself must not be charged to the step


class Case(NamedTuple):
  """Something to time.

  Attributes:
    name: what it is.
    run: takes `steps` steps, or a round, and returns when it is done.
    images: that a step or the round trains on.
    operations: of its matrix products, a multiply-add counting 2.
    compile_seconds: tracing and compiling; None if nothing is compiled.
    peak_bytes: of the compiled program; None if unknown.
    steps: that `run` takes; 1 for a round.
  """

  name: str
  run: Callable[[], Any]
  images: int
  operations: float
  compile_seconds: float | None = None
  peak_bytes: int | None = None
  steps: int = 1


def _compile(lower: Callable[[], Any]) -> tuple[Any, float]:
  begin = time.perf_counter()
  compiled = lower().compile()
  return compiled, time.perf_counter() - begin


def _step_case(config: Config, plan: StagePlan) -> Case:
  size, batch = config.model.image_size, config.client.batch_size
  compiled, seconds = _compile(lambda: memory.lower_client_step(config, size, plan, STEPS_PER_CALL))
  rules = rounds.make_rules(config, size)
  params = rounds.make_round(config, size, batch).init(jax.random.key(config.run.seed))
  active, frozen = stages.split(params, plan.shape, plan.start)
  views = jax.random.uniform(jax.random.key(1), (2, batch, size, size, 3))
  arguments = (active, frozen, jnp.int32(plan.start), views, jnp.ones(batch, bool))
  state = jax.tree.map(jnp.copy, local.init_state(rules, active))  # its own buffers: the step takes them over

  def run():
    nonlocal state
    state, _ = jax.block_until_ready(compiled(state, *arguments))

  operations = flops.executed_flops(config, size, plan, batch).total_flops
  name = f'{config.method.method}, stage {plan.stage + 1}'
  return Case(name, run, batch, operations, seconds, memory.read_analysis(compiled).peak_bytes, STEPS_PER_CALL)


def _round_case(config: Config, plan: StagePlan) -> Case:
  """A round in which every client holds --images_per_client random images."""
  size, clients, each = config.model.image_size, config.effective_num_clients, _IMAGES.value
  batch, epochs = config.client.batch_size, config.client.local_epochs
  generator = np.random.default_rng(0)
  images = lambda count: jnp.asarray(generator.integers(0, 256, (count, size, size, 3), np.uint8))
  num_server = each if config.uses_calibration else 0
  inputs = rounds.RoundInputs(
      jax.random.key(config.run.seed), jnp.int32(0), images(clients * each),
      rounds.Clients(jnp.arange(clients), jnp.arange(clients * each).reshape(clients, each),
                     jnp.full(clients, each), jnp.ones(clients, bool)), images(num_server), jnp.float32(jnp.inf))
  steps = batching.steps_per_epoch(each, batch)
  built = rounds.make_round(config, size, each, client_steps=epochs * steps)
  params = built.init(jax.random.key(config.run.seed))
  start, stop = jnp.int32(plan.start), jnp.int32(plan.stop)
  compiled, seconds = _compile(lambda: built.apply.jitted.lower(plan.shape, params, start, stop, inputs))

  def run():
    nonlocal params
    params, _ = jax.block_until_ready(compiled(params, start, stop, inputs))

  operations = clients * epochs * steps * flops.executed_flops(config, size, plan, batch).total_flops
  if plan.calibrates:
    server_batch = min(config.method.calibration_batch_size or batch, num_server)
    server_steps = config.method.calibration_epochs * batching.steps_per_epoch(num_server, server_batch)
    operations += server_steps * flops.calibration_flops(config, size, plan, server_batch).total_flops
  name = f'{config.method.method}, stage {plan.stage + 1}'
  return Case(name, run, clients * epochs * steps * batch, operations, seconds,
              memory.read_analysis(compiled).peak_bytes)


def _torch_case(config: Config, plan: StagePlan) -> Case:
  from experiments import torch_step

  batch = config.client.batch_size
  operations = flops.executed_flops(config, config.model.image_size, plan, batch).total_flops
  step = torch_step.make_step(config, plan)
  run = lambda: [step() for _ in range(STEPS_PER_CALL)]
  return Case(f'PyTorch {config.method.method}, stage {plan.stage + 1}', run, batch, operations, steps=STEPS_PER_CALL)


def _named_stages(config: Config) -> list[tuple[str, int]]:
  last = len(stages.make_plans(configs.with_values(config, {'method': 'layerwise'}))) - 1
  chosen = range(last + 1) if _ALL_STAGES.value else sorted({0, 1, last // 2, last})
  return [('end_to_end', 0), *(('layerwise', stage) for stage in chosen), ('lw_fedssl', last),
          ('prog_fedssl', last // 2)]


def _cases(config: Config) -> list[Case]:
  """End to end first: the others are compared with it."""
  build = {'step': _step_case, 'round': _round_case}[_SUITE.value]
  cases, torch_cases = [], []
  with_torch = (_SUITE.value == 'step' and config.objective.objective == 'moco_v3'
                and jax.default_backend() == 'cpu')
  if with_torch and importlib.util.find_spec('torch') is None:
    print('PyTorch is not installed (extra `torch`): left out', flush=True)
    with_torch = False
  for method, stage in _named_stages(config):
    run = configs.with_values(config, {'method': method})
    plan = stages.make_plans(run)[stage]
    cases.append(build(run, plan))
    if with_torch and method in ('end_to_end', 'layerwise'):
      torch_cases.append(_torch_case(run, plan))
  return [*cases, *torch_cases]


def _result(case: Case, seconds: list[float], reference: list[float], rate: float) -> dict[str, Any]:
  median = statistics.median(seconds)
  return {
      'case': case.name,
      'median_seconds': median,
      'fastest_seconds': min(seconds),
      'slowest_seconds': max(seconds),
      'ratio_to_end_to_end': statistics.median(mine / other for mine, other in zip(seconds, reference)),
      'images_per_second': case.images / median,
      'share_of_matrix_product_rate': case.operations / median / rate,
      'compile_seconds': case.compile_seconds,
      'peak_bytes': case.peak_bytes,
  }


def _row(result: dict[str, Any]) -> list[str]:
  known = lambda value, text: '-' if value is None else text.format(value)
  return [
      result['case'], f'{result["median_seconds"]:.3f}',
      f'{result["fastest_seconds"]:.3f} to {result["slowest_seconds"]:.3f}', f'{result["ratio_to_end_to_end"]:.3f}',
      f'{result["images_per_second"]:.0f}', f'{100 * result["share_of_matrix_product_rate"]:.0f} %',
      known(result['compile_seconds'], '{:.1f}'),
      known(result['peak_bytes'] and result['peak_bytes'] / 1e6, '{:.0f}')]


def _scaled_rows(cases: Sequence[scaling.Scaled], seconds: Sequence[list[float]]) -> list[dict[str, Any]]:
  return [{
      'case': case.name,
      'images_per_second': case.images / statistics.median(measured),
      'rate_to_first': statistics.median(
          (case.images / mine) / (cases[0].images / first) for first, mine in zip(seconds[0], measured)),
      'peak_bytes_without_images': case.peak_bytes - case.image_bytes,
  } for case, measured in zip(cases, seconds)]


def _clients_suite(config: Config) -> list[dict[str, Any]]:
  cases = list(scaling.client_cases(config))
  turns.take_turn(cases)
  results = _scaled_rows(cases, turns.time_in_turns(cases, _REPEATS.value))
  print(tables.markdown([['clients', 'images/s', 'of the first', 'peak MB without images'], *(
      [row['case'], f'{row["images_per_second"]:.0f}', f'{row["rate_to_first"]:.2f}',
       f'{row["peak_bytes_without_images"] / 1e6:.2f}'] for row in results)]))
  return results


def _devices_suite(config: Config) -> list[dict[str, Any]]:
  """Compares after the first round: what rounding changes, later ones amplify."""
  cases = list(scaling.device_cases(config))
  turns.take_turn(cases)
  differences = scaling.differences(cases)
  results = _scaled_rows(cases, turns.time_in_turns(cases, _REPEATS.value))
  for case, row, difference in zip(cases, results, differences, strict=True):
    row['difference_to_one_device'] = difference
    row['active_bytes'], row['bytes_once_a_round'] = case.active_bytes, collectives.once_a_round(case.traffic)
    row['bytes_a_calibration_step'] = sum(op.num_bytes for op in case.traffic if op.in_loop)
  shown = ('active_bytes', 'bytes_once_a_round', 'bytes_a_calibration_step')
  print(tables.markdown([
      ['', 'images/s', *(name.replace('_', ' ') for name in shown), 'difference'], *(
          [row['case'], f'{row["images_per_second"]:.0f}', *(str(row[name]) for name in shown),
           f'{row["difference_to_one_device"]:.1e}'] for row in results)]))
  print('difference: l2 distance of the parameters to one device\'s after a round, as a share of what they moved')
  return results


def main():
  """Prints a table and returns the figures."""
  config = flags.config_from_flags()
  if not config.model.image_size:
    raise UsageError('--image_size: expected the side of the images in pixels, got 0')
  scaled = {'clients': _clients_suite, 'devices': _devices_suite}.get(_SUITE.value)
  if scaled is not None:
    flags.print_config(config)
    return {'suite': _SUITE.value, 'device_kind': jax.devices()[0].device_kind, 'cases': scaled(config)}
  if _SUITE.value == 'round' and _IMAGES.value < config.client.batch_size:
    raise UsageError(f'--images_per_client: expected at least --batch_size={config.client.batch_size}, '
                     f'got {_IMAGES.value}')
  flags.print_config(config)
  jax.config.update('jax_enable_compilation_cache', False)  # so that compiling is really timed
  cases = _cases(config)
  rate = machine.matrix_product_rate()
  turns.take_turn(cases)
  seconds = [[taken / case.steps for taken in measured]
             for case, measured in zip(cases, turns.time_in_turns(cases, _REPEATS.value))]
  rate = max(rate, machine.matrix_product_rate())
  results = [_result(case, measured, seconds[0], rate) for case, measured in zip(cases, seconds)]
  print(tables.markdown([
      [_SUITE.value, 'median s', 'fastest to slowest', 'of end to end', 'images/s', 'of product rate', 'compile s',
       'peak MB'], *map(_row, results)]))
  layerwise = [result['median_seconds'] for result in results if result['case'].startswith('layerwise')]
  print(f'{jax.devices()[0].device_kind}, matrix products {rate / 1e9:.0f} GFLOP/s; median of {_REPEATS.value} turns')
  return {
      'suite': _SUITE.value, 'device_kind': jax.devices()[0].device_kind, 'matrix_product_flops_per_second': rate,
      'mean_layerwise_to_end_to_end': statistics.mean(layerwise) / results[0]['median_seconds'], 'cases': results}


if __name__ == '__main__':
  flags.define_config_flags()
  flags.run(main)
