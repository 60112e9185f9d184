"""What client steps and rounds take on a target (targets.py), as its compiler gives it. Nothing is run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lwfedssl_jax import config as configs
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import batching
from lwfedssl_jax.federated import client_state, depth_dropout, execution, scheduling, server_optimizer
from lwfedssl_jax.federated import round as rounds
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.federated.placement import Placement, input_specs
from lwfedssl_jax.federated.round_types import ClientSlots, RoundInputs
from lwfedssl_jax.resources import collectives, memory, planner, roofline, targets
from lwfedssl_jax.resources.collectives import Collective
from lwfedssl_jax.resources.memory import StepMemory
from lwfedssl_jax.resources.roofline import Roofline
from lwfedssl_jax.resources.targets import OutOfMemoryError, Target
from lwfedssl_jax.stages import StagePlan, make_plans


class StepPrediction(NamedTuple):
  """One client step on a target.

  Attributes:
    method: of the run.
    stage: 0-based.
    peak_bytes: arguments + outputs - aliases + temporaries; of a refused program what the compiler states.
    fits: whether programs may use as much on the target.
    memory: the parts; None where the compiler refuses.
    roofline: None where the compiler refuses.
  """

  method: str
  stage: int
  peak_bytes: int
  fits: bool
  memory: StepMemory | None
  roofline: Roofline | None


class RoundPrediction(NamedTuple):
  """One round on devices of a target.

  Attributes:
    method: of the run.
    stage: 0-based.
    num_devices: over which clients are sharded.
    client_chunk: clients that a device vmaps.
    peak_bytes: of one device, images among them.
    fits: as in StepPrediction.
    exchanged: collectives; [] where the compiler refuses.
  """

  method: str
  stage: int
  num_devices: int
  client_chunk: int
  peak_bytes: int
  fits: bool
  exchanged: list[Collective]


class RunPrediction(NamedTuple):
  """The clients' training of a whole run on one device of a target.

  Attributes:
    method: of the run.
    num_images: training images, the server's among them.
    num_steps: of all clients in all rounds.
    seconds: the sum of the steps' least times (`Roofline.seconds`); None where the compiler refuses one. Augmentation,
      calibration and evaluation are not in it.
  """

  method: str
  num_images: int
  num_steps: int
  seconds: float | None


def last_of_each_shape(plans: Sequence[StagePlan]) -> tuple[StagePlan, ...]:
  """Returns the stages that differ as programs, of equal ones the last, which has most frozen blocks."""
  return tuple({plan.shape: plan for plan in plans}.values())


def predict_steps(
  config: Config, image_size: int, target: Target, plans: Sequence[StagePlan] = ()
) -> list[StepPrediction]:
  """Compiles a run's client steps for a target, one program for all stages of a shape.

  Args:
    config: the run.
    image_size: side of the images, pixels.
    target: to compile for.
    plans: stages; (): those of `last_of_each_shape`.
  """
  compiled: dict[Any, Any] = {}
  found = []
  for plan in plans or last_of_each_shape(make_plans(config)):
    if plan.shape not in compiled:
      try:
        program = memory.compile_client_step(config, image_size, plan, target)
        compiled[plan.shape] = memory.read_analysis(program), program.as_text()
      except OutOfMemoryError as error:
        compiled[plan.shape] = error
    result, method = compiled[plan.shape], config.method.method
    if isinstance(result, OutOfMemoryError):
      found.append(StepPrediction(method, plan.stage, result.needed_bytes, False, None, None))
      continue
    step, text = result
    fits = step.peak_bytes <= target.memory_bytes
    line = roofline.estimate(text, target.peaks, plan.num_frozen)
    found.append(StepPrediction(method, plan.stage, step.peak_bytes, fits, step, line))
  return found


def predict_run(config: Config, steps: Sequence[StepPrediction], num_images: int) -> RunPrediction:
  """Adds up a run's client steps; clients hold equal shares of the training images.

  Args:
    config: the run.
    steps: of every stage, in order: `predict_steps` of all plans.
    num_images: training images, the server's among them.
  """
  each, _ = _share_images(config, num_images)
  per_client = config.client.local_epochs * batching.steps_per_epoch(each, config.client.batch_size)
  counts = [plan.num_rounds * config.effective_clients_per_round * per_client for plan in make_plans(config)]
  lines = [step.roofline for step in steps]
  seconds = [count * line.seconds for count, line in zip(counts, lines, strict=True) if line is not None]
  total = sum(seconds) if len(seconds) == len(counts) else None
  return RunPrediction(config.method.method, num_images, sum(counts), total)


def _share_images(config: Config, num_images: int) -> tuple[int, int]:
  """Returns how many of a run's training images each client has, and the server."""
  of_server = 0 if config.data.auxiliary_dataset else int(num_images * config.data.auxiliary_fraction)
  return max(1, (num_images - of_server) // config.effective_num_clients), of_server


def resolve_chunk(
  config: Config, image_size: int, target: Target, num_images: int, peak_bytes: int | None = None
) -> Config:
  """Resolves --client_chunk by the target's memory, as a run on it would.

  Args:
    config: the run.
    image_size: side of the images, pixels.
    target: to compile for.
    num_images: training images that a device holds.
    peak_bytes: of the most demanding step; None: compile it.
  """
  if config.client.client_chunk:
    return config
  free = target.memory_bytes - num_images * 3 * image_size**2
  if peak_bytes is None:
    peak_bytes = planner.peak_bytes(config, image_size, target)
  return configs.with_values(config, {'client_chunk': planner.count_clients(config, free, peak_bytes)})


def lower_round(
  config: Config, image_size: int, plan: StagePlan, target: Target, num_devices: int, num_images: int
) -> Any:
  """Traces a round on abstract arrays for devices of a target; returns jax's `Lowered`.

  Clients hold equal shares of the training images, which every device has.

  Args:
    config: the run, client_chunk resolved.
    image_size: side of the images, pixels.
    plan: of the stage.
    target: to compile for.
    num_devices: of the mesh.
    num_images: training images, the server's among them.
  """
  config, mesh = execution.resolve(config, target.platform), target.make_mesh(num_devices)
  placement, batch = Placement(mesh), config.client.batch_size
  each, server_images = _share_images(config, num_images)
  slots = scheduling.run_layout(config, num_devices).slots
  struct: Any = jax.ShapeDtypeStruct  # stands for an array
  model = make_model(config.model, config.objective, image_size)

  def images(count):
    return struct((count, 3 * image_size**2), np.uint8)

  inputs = RoundInputs(
    jax.eval_shape(lambda: jax.random.key(0)),
    struct((), jnp.int32),
    images(num_images - server_images),
    ClientSlots(
      struct((slots,), jnp.int32),
      struct((slots, batching.padded_capacity(each, batch)), jnp.int32),
      struct((slots,), jnp.int32),
      struct((slots,), jnp.bool_),
      struct((slots, depth_dropout.num_inputs(plan)), jnp.int32) if plan.keep else None,
      jax.eval_shape(lambda: client_state.start(config, model, plan.shape, slots)),
    ),
    images(server_images if config.uses_calibration else 0),
    struct((), jnp.float32),
    struct((), jnp.int32),
    jax.eval_shape(lambda: server_optimizer.init_state(config.method, model, plan.shape)),
  )
  if mesh is None:
    inputs = targets.place(inputs, target.sharding)
  else:
    inputs = jax.tree.map(
      lambda spec, part: targets.place(part, NamedSharding(mesh, spec)), input_specs(placement), inputs
    )
  params = jax.eval_shape(model.init_params, jax.random.key(0))
  params = targets.place(params, targets.replicated(target, mesh))
  steps = config.client.local_epochs * batching.steps_per_epoch(each, batch)
  return rounds.make_round(config, image_size, placement, steps).lower(params, plan, inputs)


def predict_round(
  config: Config, image_size: int, plan: StagePlan, target: Target, num_devices: int, num_images: int
) -> RoundPrediction:
  """Compiles a round for devices of a target; arguments as in `lower_round`, client_chunk 0: see `resolve_chunk`."""
  config = resolve_chunk(config, image_size, target, num_images)
  chunk = scheduling.run_layout(config, num_devices).chunk
  method = config.method.method
  try:
    lowered = lower_round(config, image_size, plan, target, num_devices, num_images)
    compiled = targets.compile_program(lowered, target)
  except OutOfMemoryError as error:
    return RoundPrediction(method, plan.stage, num_devices, chunk, error.needed_bytes, False, [])
  peak = memory.read_analysis(compiled).peak_bytes
  exchanged = collectives.read_collectives(compiled.as_text())
  return RoundPrediction(method, plan.stage, num_devices, chunk, peak, peak <= target.memory_bytes, exchanged)
