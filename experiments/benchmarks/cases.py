"""Suites `step` and `round` of experiments.benchmark: client steps and rounds of every method, and PyTorch's steps."""

import importlib.util
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import config as configs
from lwfedssl_jax import stages
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import batching
from lwfedssl_jax.federated import calibration, client_state, depth_dropout, server_optimizer
from lwfedssl_jax.federated import round as rounds
from lwfedssl_jax.federated.client_update import make_step_options
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.federated.round_types import ClientSlots, RoundInputs
from lwfedssl_jax.federated.training_step import Batch
from lwfedssl_jax.resources import flops, memory
from lwfedssl_jax.stages import StagePlan

STEPS_PER_CALL = 4  # in one program, as in a round, so that the cost of a call is not charged to the step


class Case(NamedTuple):
  """A case to time.

  Attributes:
    name: what it is.
    run: takes `steps` steps, or a round, and returns when it is done.
    images: that a step or the round trains on.
    flop_count: FLOPs of its matrix products, a multiply-add counts 2.
    compile_seconds: tracing and compiling; None if nothing is compiled.
    peak_bytes: of the compiled program; None if unknown.
    steps: that `run` takes; 1 for a round.
  """

  name: str
  run: Callable[[], Any]
  images: int
  flop_count: float
  compile_seconds: float | None = None
  peak_bytes: int | None = None
  steps: int = 1


def _compile(lower: Callable[[], Any]) -> tuple[Any, float]:
  started = time.perf_counter()
  compiled = lower().compile()
  return compiled, time.perf_counter() - started


def _step_case(config: Config, plan: StagePlan) -> Case:
  size, batch = config.model.image_size, config.client.batch_size
  compiled, seconds = _compile(lambda: memory.lower_client_step(config, size, plan, STEPS_PER_CALL))
  options = make_step_options(config, size)
  params = options.model.init_params(jax.random.key(config.run.seed))
  global_params = memory.split_for_client(params, plan, jnp.int32(plan.start))
  batches = Batch(
    jax.random.uniform(jax.random.key(1), (STEPS_PER_CALL, 2, batch, size, size, 3)),
    jnp.ones((STEPS_PER_CALL, batch), bool),
  )
  # Copied, because the step donates its state.
  state = jax.tree.map(jnp.copy, memory.init_step_state(options, global_params))
  previous = memory.previous_model(config, options, global_params, jnp.ones((), bool))

  def run() -> None:
    nonlocal state
    state, _ = jax.block_until_ready(compiled(state, global_params, batches, *previous))

  flop_count = flops.executed_flops(config, size, plan, batch).total_flops
  name = f'{config.method.method}, stage {plan.stage + 1}'
  return Case(name, run, batch, flop_count, seconds, memory.read_analysis(compiled).peak_bytes, STEPS_PER_CALL)


def _round_case(config: Config, plan: StagePlan, each: int) -> Case:
  """Compiles a round in which every client holds `each` random images."""
  size, clients = config.model.image_size, config.effective_num_clients
  batch, epochs = config.client.batch_size, config.client.local_epochs
  generator = np.random.default_rng(0)

  def images(count):
    return jnp.asarray(generator.integers(0, 256, (count, 3 * size**2), np.uint8))

  num_server = each if config.uses_calibration else 0
  model = make_model(config.model, config.objective, size)
  inputs = RoundInputs(
    jax.random.key(config.run.seed),
    jnp.int32(0),
    images(clients * each),
    ClientSlots(
      jnp.arange(clients),
      jnp.arange(clients * each).reshape(clients, each),
      jnp.full(clients, each),
      jnp.ones(clients, bool),
      _draw_kept(config, plan),
      client_state.start(config, model, plan.shape, clients),
    ),
    images(num_server),
    jnp.float32(jnp.inf),
    jnp.int32(0),
    server_optimizer.init_state(config.method, model, plan.shape),
  )
  steps = batching.steps_per_epoch(each, batch)
  built = rounds.make_round(config, size, client_steps=epochs * steps)
  params = model.init_params(jax.random.key(config.run.seed))
  start, stop = jnp.int32(plan.start), jnp.int32(plan.stop)
  compiled, seconds = _compile(lambda: built.lower(params, plan, inputs))

  def run() -> None:
    nonlocal params
    params, _ = jax.block_until_ready(compiled(params, start, stop, inputs))

  flop_count = clients * epochs * steps * flops.executed_flops(config, size, plan, batch).total_flops
  if plan.calibrates:
    server_batch, steps_per_epoch = calibration.plan_batches(config, num_server)
    flop_count += (
      config.method.calibration_epochs
      * steps_per_epoch
      * flops.calibration_flops(config, size, plan, server_batch).total_flops
    )
  name = f'{config.method.method}, stage {plan.stage + 1}'
  return Case(
    name, run, clients * epochs * steps * batch, flop_count, seconds, memory.read_analysis(compiled).peak_bytes
  )


def _draw_kept(config: Config, plan: StagePlan) -> jax.Array | None:
  """Draws the blocks that every client keeps in the first round of a stage."""
  if not plan.keep:
    return None
  ids = np.arange(config.effective_num_clients)[None]
  keeps = depth_dropout.draw_kept(config.run.seed, [plan], [plan.first_round], ids)[0]
  return jnp.asarray(depth_dropout.select_inputs(plan, keeps))


def _torch_step_case(config: Config, plan: StagePlan) -> Case:
  from . import torch_step

  batch = config.client.batch_size
  flop_count = flops.executed_flops(config, config.model.image_size, plan, batch).total_flops
  step = torch_step.make_step(config, plan)

  def run():
    return [step() for _ in range(STEPS_PER_CALL)]

  return Case(f'PyTorch {config.method.method}, stage {plan.stage + 1}', run, batch, flop_count, steps=STEPS_PER_CALL)


def _torch_round_case(config: Config, plan: StagePlan, ours: Case, each: int) -> Case:
  """Makes PyTorch's case beside ours: as many images, as many products."""
  from . import torch_round

  return Case(f'PyTorch {ours.name}', torch_round.make_round(config, plan, each), ours.images, ours.flop_count)


def _named_stages(config: Config, all_stages: bool) -> list[tuple[str, int]]:
  last = len(stages.make_plans(configs.with_values(config, {'method': 'layerwise'}))) - 1
  chosen = range(last + 1) if all_stages else sorted({0, 1, last // 2, last})
  return [
    ('end_to_end', 0),
    *(('layerwise', stage) for stage in chosen),
    ('lw_fedssl', last),
    ('prog_fedssl', last // 2),
  ]


def _has_torch(config: Config, suite: str) -> bool:
  """Whether PyTorch can be timed too; prints a line if it is not installed."""
  if config.objective.objective != 'moco_v3' or config.method.depth_dropout_keep or jax.default_backend() != 'cpu':
    return False
  needed = ('torch',) if suite == 'step' else ('torch', 'torchvision')
  missing = [name for name in needed if importlib.util.find_spec(name) is None]
  if missing:
    print(f'{" and ".join(missing)} not installed (extra `torch`): PyTorch is skipped', flush=True)
  return not missing


def make_cases(config: Config, suite: str, images_per_client: int, all_stages: bool) -> list[Case]:
  """Compiles steps (suite `step`) or rounds (`round`), end to end first, as the reference."""
  with_torch = _has_torch(config, suite)
  cases, torch_cases = [], []
  for method, stage in _named_stages(config, all_stages):
    run = configs.with_values(config, {'method': method})
    plan = [plan for plan in stages.make_plans(run) if plan.stage == stage][-1]  # after a warm-up
    compare = with_torch and method in ('end_to_end', 'layerwise')
    if suite == 'step':
      cases.append(_step_case(run, plan))
      torch_cases += [_torch_step_case(run, plan)] if compare else []
    else:
      cases.append(_round_case(run, plan, images_per_client))
      torch_cases += [_torch_round_case(run, plan, cases[-1], images_per_client)] if compare else []
  return [*cases, *torch_cases]
