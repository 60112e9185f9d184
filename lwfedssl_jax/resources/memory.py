"""What one client step holds in memory, read off the compiled program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax import stages
from lwfedssl_jax.config import Config
from lwfedssl_jax.federated import local
from lwfedssl_jax.federated import round as rounds
from lwfedssl_jax.stages import StagePlan


class StepMemory(NamedTuple):
  """Memory of a compiled step, bytes, without the program itself.

  Attributes:
    argument_bytes: parameters, optimizer state, target branch and the batch.
    output_bytes: what the step returns.
    alias_bytes: outputs that take the place of donated arguments.
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


def lower_client_step(config: Config, image_size: int, plan: StagePlan, num_steps: int = 1) -> Any:
  """Traces one client step of a stage on abstract arrays, state donated; returns jax's `Lowered`.

  The step is `federated.local.train_step`, the one the round scans over, on two views of `config.client.batch_size`
  images of `image_size` pixels. With `num_steps` above 1, so many steps on the same batch, one after the other in one
  program, as in a round.
  """
  rules = rounds.make_rules(config, image_size)
  whole = jax.eval_shape(rounds.make_round(config, image_size, config.client.batch_size).init, jax.random.key(0))
  active, frozen = jax.eval_shape(lambda params: stages.split(params, plan.shape, plan.start), whole)
  state = jax.eval_shape(lambda params: local.init_state(rules, params), active)
  views = jax.ShapeDtypeStruct((2, config.client.batch_size, image_size, image_size, 3), jnp.float32)
  mask = jax.ShapeDtypeStruct((config.client.batch_size,), jnp.bool_)

  def step(state, received, frozen, start, views, mask):
    take = lambda state: local.train_step(rules, state, received, frozen, start, views, mask)
    if num_steps == 1:
      return take(state)
    return jax.lax.scan(lambda state, _: take(state), state, None, length=num_steps)

  start = jax.ShapeDtypeStruct((), jnp.int32)
  return jax.jit(step, donate_argnums=0).lower(state, active, frozen, start, views, mask)


def step_memory(config: Config, image_size: int, plan: StagePlan) -> StepMemory:
  """Compiles one client step of a stage for the default device and returns its memory."""
  return read_analysis(lower_client_step(config, image_size, plan).compile())


def read_analysis(compiled: Any) -> StepMemory:
  """Reads the memory of a compiled program."""
  analysis = compiled.memory_analysis()
  return StepMemory(
      analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.alias_size_in_bytes,
      analysis.temp_size_in_bytes)
