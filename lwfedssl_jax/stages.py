"""Stage plans: which parameters are absent, frozen or active in a stage, and which are exchanged.

A method is data: traits (catalog.METHODS), from which this module makes a `StagePlan` per stage (arXiv 2401.11647
v1-v3, Fig. 2 and Algorithm 1). No other module depends on which method runs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax.base import Integer, Labels, Params
from lwfedssl_jax.config import Config


class StageShape(NamedTuple):
  """What determines array shapes in a stage: stages of one shape share one executable."""

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
    num_new: blocks that this stage adds, the last ones below `stop`.
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

  All methods run the same number of rounds in all: depth / blocks_per_stage * rounds_per_stage, or total_rounds.
  """
  method, depth = config.method.traits, config.model.traits.depth
  step = config.method.blocks_per_stage if method.staged else depth
  rounds = config.effective_rounds_per_stage * (step // config.method.blocks_per_stage)
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
      )
    )
  return tuple(plans)


class StageParams(NamedTuple):
  """The global parameters, split for a stage.

  Attributes:
    active: what is differentiated, optimized and uploaded; blocks (num_active, ...).
    frozen: the rest; blocks (L, ...), of which only those below `start` are ever read.
    start: first active block; may be traced.
    stop: active blocks from here on, counted from `start`, do not exist yet; may be traced. None: all exist.
  """

  active: Params
  frozen: Params
  start: Integer
  stop: Integer | None = None


def split(params: Params, shape: StageShape, start: Integer, stop: Integer | None = None) -> StageParams:
  """Splits the full parameter tree, blocks stacked (L, ...), for a stage of a static shape; see StageParams."""
  active = {name: tree for name, tree in params.items() if name not in ('blocks', 'embedding')}
  active['blocks'] = jax.tree.map(
    lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, shape.num_active), params['blocks']
  )
  frozen = {'blocks': params['blocks']}
  (active if shape.trains_embedding else frozen)['embedding'] = params['embedding']
  return StageParams(active, frozen, start, stop)


def merge(params: Params, active: Params, start: Integer) -> Params:
  """Merges an active part into the full tree; all other leaves and blocks are unchanged."""
  merged = dict(params, **{name: tree for name, tree in active.items() if name != 'blocks'})
  merged['blocks'] = jax.tree.map(
    lambda leaf, part: jax.lax.dynamic_update_slice_in_dim(leaf, part.astype(leaf.dtype), start, 0),
    params['blocks'],
    active['blocks'],
  )
  return merged


ABSENT, FROZEN, ACTIVE = range(3)


def labels(params: Params, start: Integer, stop: Integer, trains_embedding: bool) -> Labels:
  """Labels every parameter of a stage ABSENT, FROZEN or ACTIVE; the optimizer takes its rules per layer from them.

  Args:
    params: the full tree, or an active part (then `start` is 0), blocks stacked (n, ...).
    start: first active block.
    stop: blocks from here on are absent.
    trains_embedding: the embedding is active too.

  Returns:
    A tree like `params` of int32 arrays: scalars, and (n,) vectors for the stacked blocks.
  """
  block = jnp.arange(jax.tree.leaves(params['blocks'])[0].shape[0])
  per_part = {
    'blocks': jnp.where(block >= stop, ABSENT, jnp.where(block < start, FROZEN, ACTIVE)),
    'embedding': jnp.int32(ACTIVE if trains_embedding else FROZEN),
  }
  return {
    name: jax.tree.map(lambda _, name=name: per_part.get(name, jnp.int32(ACTIVE)), tree)
    for name, tree in params.items()
  }


def init_new_blocks(params: Params, plan: StagePlan, new_block_init: str) -> Params:
  """Initializes a stage's new blocks: as drawn (`random`), or each a copy of the block below the stage (`previous`)."""
  if new_block_init == 'random' or plan.stage == 0:
    return params
  first = plan.stop - plan.num_new
  blocks = jax.tree.map(lambda leaf: leaf.at[first : plan.stop].set(leaf[first - 1]), params['blocks'])
  return dict(params, blocks=blocks)


# Exchange is counted in components: 'embedding', 'block_00' .. , 'norm', and the heads.


def block_name(index: int) -> str:
  return f'block_{index:02d}'


def uploaded_components(plan: StagePlan, head_names: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the components that a client uploads: the active ones."""
  blocks = tuple(block_name(i) for i in range(plan.start, plan.stop))
  return (('embedding',) if plan.trains_embedding else ()) + blocks + ('norm', *head_names)


def modified_components(plan: StagePlan, head_names: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the components of the global model that a round modifies, by aggregation and by calibration."""
  return required_components(plan, head_names) if plan.calibrates else uploaded_components(plan, head_names)


def required_components(plan: StagePlan, head_names: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the components that a client requires for training: all that exist at this stage."""
  return ('embedding', *(block_name(i) for i in range(plan.stop)), 'norm', *head_names)
