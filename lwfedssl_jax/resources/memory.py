"""Memory of one client step, from the compiled program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax import stages
from lwfedssl_jax.base import Integer, Params
from lwfedssl_jax.config import Config
from lwfedssl_jax.federated import calibration, depth_dropout, execution, training_step
from lwfedssl_jax.federated.client_update import make_step_options
from lwfedssl_jax.federated.training_step import Batch, PreviousModel, StepOptions, StepState
from lwfedssl_jax.resources import targets
from lwfedssl_jax.resources.targets import Target
from lwfedssl_jax.stages import StageParams, StagePlan


class StepMemory(NamedTuple):
  """Memory of a compiled step, bytes, without the program itself.

  Attributes:
    argument_bytes: parameters, optimizer state, target branch, the previous model where it is compared with, and the
      batch.
    output_bytes: what the step returns.
    alias_bytes: outputs that reuse donated arguments.
    scratch_bytes: temporaries: activations, gradients.
  """

  argument_bytes: int
  output_bytes: int
  alias_bytes: int
  scratch_bytes: int

  @property
  def peak_bytes(self) -> int:
    """Arguments + outputs - aliases + scratch. XLA's own peak figure leaves scratch out on CPU."""
    return self.argument_bytes + self.output_bytes - self.alias_bytes + self.scratch_bytes


def lower_client_step(
  config: Config, image_size: int, plan: StagePlan, num_steps: int = 1, target: Target | None = None
) -> Any:
  """Traces one client step of a stage on abstract arrays, state donated; returns jax's `Lowered`.

  The step is `federated.training_step.train_step`, the step of a round, on two views of `config.client.batch_size`
  images of `image_size` pixels. `num_steps` above 1 gives a program of several steps, as in a round, each on its own
  batch (leading axis): with equal batches the compiler would run the frozen prefix once for all of them. It is lowered
  for the default device or for a target.
  """
  config = execution.resolve(config, target and target.platform)
  options = make_step_options(config, image_size)
  arguments = _abstract_arguments(
    options,
    image_size,
    (num_steps,) if num_steps > 1 else (),
    lambda params, start: split_for_client(params, plan, start),
  )
  arguments = (*arguments, *previous_model(config, options, arguments[1], jax.ShapeDtypeStruct((), jnp.bool_)))
  if target is not None:
    arguments = targets.place(arguments, target.sharding)
  return jax.jit(make_steps(options, num_steps), donate_argnums=0).lower(*arguments)


def split_for_client(params: Params, plan: StagePlan, start: Integer) -> StageParams:
  """Returns what a client of a stage has of the global parameters; with depth dropout, of any of its draws."""
  if not plan.keep:
    return stages.split(params, plan.shape, start)
  kept = jnp.arange(depth_dropout.num_inputs(plan))
  return stages.keep_blocks(stages.split(params, plan.shape if plan.start else stages.whole(params), start), kept)


def previous_model(
  config: Config, options: StepOptions, global_params: StageParams, exists: Any
) -> tuple[PreviousModel, ...]:
  """Returns a stand-in for the model of its last round with which a client compares; () where it does not."""
  if not config.uses_previous_model:
    return ()
  heads = options.model.objective.online_only
  own = {name: tree for name, tree in global_params.active.items() if name not in heads}
  return (PreviousModel(own, exists),)


def _abstract_arguments(
  options: StepOptions, image_size: int, steps: tuple[int, ...], split: Callable[[Params, Integer], StageParams]
) -> Any:
  """Returns state, global parameters and batches of `options.batch_size` images, with leading axes `steps`."""
  struct: Any = jax.ShapeDtypeStruct  # stands for an array
  params, batch_size = jax.eval_shape(options.model.init_params, jax.random.key(0)), options.batch_size
  global_params = jax.eval_shape(split, params, struct((), jnp.int32))
  state = jax.eval_shape(lambda params: init_step_state(options, params), global_params)
  views = struct((*steps, 2, batch_size, image_size, image_size, 3), jnp.float32)
  return state, global_params, Batch(views, struct((*steps, batch_size), jnp.bool_))


def init_step_state(options: StepOptions, global_params: StageParams) -> StepState:
  """Returns the state before the first step."""
  return training_step.init_state(options, training_step.make_optimizer(options, global_params), global_params)


def make_steps(options: StepOptions, num_steps: int) -> Callable[..., Any]:
  """Builds (state, global params, batch or batches, previous=None) -> (state, Losses) after `num_steps` steps."""

  def steps(state, global_params, batches, previous=None):
    own, optimizer = options._replace(previous=previous), training_step.make_optimizer(options, global_params)

    def take(state, batch):
      return training_step.train_step(own, optimizer, state, global_params, batch)

    return take(state, batches) if num_steps == 1 else jax.lax.scan(take, state, batches)

  return steps


def compile_client_step(config: Config, image_size: int, plan: StagePlan, target: Target | None = None) -> Any:
  """Compiles one client step of a stage for the default device or a target.

  Raises:
    OutOfMemoryError: see `targets.compile_program`.
  """
  lowered = lower_client_step(config, image_size, plan, target=target)
  return lowered.compile() if target is None else targets.compile_program(lowered, target)


def step_memory(config: Config, image_size: int, plan: StagePlan, target: Target | None = None) -> StepMemory:
  """Returns the memory of one client step of a stage; see `compile_client_step`."""
  return read_analysis(compile_client_step(config, image_size, plan, target))


def calibration_memory(config: Config, image_size: int, batch_size: int) -> StepMemory:
  """Compiles one step of the server's calibration on `batch_size` images and returns its memory, that of every stage.

  Equal blocks, and the optimizer's state for them, are all held in every stage; those that do not exist yet are
  skipped. Of unlike blocks it is the memory of the last stage.
  """
  options, known = (
    calibration.make_step_options(config, image_size, batch_size),
    stages.make_plans(config)[-1].static_stop,
  )
  arguments = _abstract_arguments(
    options, image_size, (), lambda params, stop: stages.split_existing(params, stop if known is None else known)
  )
  return read_analysis(jax.jit(make_steps(options, 1), donate_argnums=0).lower(*arguments).compile())


def read_analysis(compiled: Any) -> StepMemory:
  """Reads the memory of a compiled program."""
  analysis = compiled.memory_analysis()
  return StepMemory(
    analysis.argument_size_in_bytes,
    analysis.output_size_in_bytes,
    analysis.alias_size_in_bytes,
    analysis.temp_size_in_bytes,
  )
