"""Stage plans: which parameters are absent, frozen or active in a stage, and what travels.

A method is data: traits (catalog.METHODS), from which a `StagePlan` for each stage is made here (arXiv 2401.11647
v1-v3, Fig. 2 and Algorithm 1). Nothing else in the project asks which method runs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax.base import Params
from lwfedssl_jax.config import Config


class StageShape(NamedTuple):
  """What decides array shapes in a stage: stages of one shape share one executable."""

  num_active: int
  trains_embedding: bool


class StagePlan(NamedTuple):
  """One stage of training.

  Attributes:
    stage: 0-based.
    first_round: 0-based global number of the stage's first round.
    num_rounds: rounds in the stage.
    start: blocks below are frozen on the client.
    stop: blocks from here on are absent.
    trains_embedding: the embedding is active too.
    calibrates: the server trains everything below `stop` after aggregation.
    num_new: blocks that this stage adds, the topmost below `stop`.
    depth: blocks in the encoder, absent ones included.
  """

  stage: int
  first_round: int
  num_rounds: int
  start: int
  stop: int
  trains_embedding: bool
  calibrates: bool
  num_new: int
  depth: int

  @property
  def shape(self) -> StageShape:
    return StageShape(self.stop - self.start, self.trains_embedding)


def make_plans(config: Config) -> tuple[StagePlan, ...]:
  """Builds the stage plans of a run.

  All methods run the same number of rounds in all: depth / blocks_per_stage * rounds_per_stage.
  """
  method, depth = config.method.traits, config.model.size.depth
  step = config.method.blocks_per_stage if method.staged else depth
  rounds = config.method.rounds_per_stage * (step // config.method.blocks_per_stage)
  plans = []
  for stage, stop in enumerate(range(step, depth + 1, step)):
    start = method.first_trained(stop, step)
    plans.append(
        StagePlan(
            stage=stage,
            first_round=stage * rounds,
            num_rounds=rounds,
            start=start,
            stop=stop,
            trains_embedding=start == 0,
            calibrates=config.uses_calibration,
            num_new=step,
            depth=depth,
        ))
  return tuple(plans)


def split(params: Params, shape: StageShape, start: Any) -> tuple[Params, Params]:
  """Cuts the parameter tree into (active, frozen).

  Args:
    params: the whole tree, blocks stacked (L, ...).
    shape: static shape of the stage.
    start: first active block, int or traced int32 scalar.

  Returns:
    `active`, with blocks (num_active, ...): all that is differentiated, optimized and sent back;
    `frozen`, with blocks (L, ...), of which only those below `start` are ever read.
  """
  cut = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, shape.num_active)
  active = {k: v for k, v in params.items() if k not in ('blocks', 'embedding')}
  active['blocks'] = jax.tree.map(cut, params['blocks'])
  frozen = {'blocks': params['blocks']}
  (active if shape.trains_embedding else frozen)['embedding'] = params['embedding']
  return active, frozen


def merge(params: Params, active: Params, start: Any) -> Params:
  """Puts an active part back into the whole tree; every other leaf and block is left as it is."""
  put = lambda leaf, part: jax.lax.dynamic_update_slice_in_dim(leaf, part.astype(leaf.dtype), start, 0)
  merged = dict(params, **{k: v for k, v in active.items() if k != 'blocks'})
  merged['blocks'] = jax.tree.map(put, params['blocks'], active['blocks'])
  return merged


def labels(params: Params, plan: StagePlan) -> Params:
  """Labels every parameter: 0 absent, 1 frozen, 2 active.

  Returns:
    A tree like `params` of int32 arrays: scalars, and (L,) vectors for the stacked blocks.
  """
  block = jnp.arange(plan.depth)
  per_block = jnp.where(block >= plan.stop, 0, jnp.where(block < plan.start, 1, 2))
  outside = lambda name: 2 if name != 'embedding' or plan.trains_embedding else 1
  return {
      name: jax.tree.map(lambda _: per_block if name == 'blocks' else jnp.int32(outside(name)), tree)
      for name, tree in params.items()
  }


def begin(params: Params, plan: StagePlan, new_block_init: str) -> Params:
  """Initialises a stage's new blocks: as drawn (random), or each a copy of the block below the stage."""
  if new_block_init == 'random' or plan.stage == 0:
    return params
  first = plan.stop - plan.num_new
  copy = lambda leaf: leaf.at[first:plan.stop].set(leaf[first - 1])
  return dict(params, blocks=jax.tree.map(copy, params['blocks']))


# What travels is counted in components: 'embedding', 'block_00' .. , 'norm', and the heads.


def block_name(index: int) -> str:
  return f'block_{index:02d}'


def uploads(plan: StagePlan, head_names: tuple[str, ...]) -> tuple[str, ...]:
  """Components a client sends back: the active ones."""
  blocks = tuple(block_name(i) for i in range(plan.start, plan.stop))
  return (('embedding',) if plan.trains_embedding else ()) + blocks + ('norm', *head_names)


def changes(plan: StagePlan, head_names: tuple[str, ...]) -> tuple[str, ...]:
  """Components of the global model that a round changes: by aggregation, and by calibration."""
  return needs(plan, head_names) if plan.calibrates else uploads(plan, head_names)


def needs(plan: StagePlan, head_names: tuple[str, ...]) -> tuple[str, ...]:
  """Components a client must hold to train: all that exist at this stage."""
  return ('embedding', *(block_name(i) for i in range(plan.stop)), 'norm', *head_names)
