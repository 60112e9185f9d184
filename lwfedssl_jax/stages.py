"""Stage plans: which parameters are absent, frozen or active in a stage, and which are exchanged.

A method is data: traits (catalog.METHODS), from which this module makes a `StagePlan` per stage (arXiv 2401.11647
v1-v3, Fig. 2 and Algorithm 1). No other module depends on which method runs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax import block_trees
from lwfedssl_jax.base import Integer, Labels, Params
from lwfedssl_jax.block_trees import adapter_name, block_name
from lwfedssl_jax.config import Config


class StageShape(NamedTuple):
  """What determines array shapes in a stage: stages of one shape share one executable.

  Attributes:
    num_active: blocks that are trained.
    trains_embedding: the embedding is trained too.
    start: first of the blocks if they are unlike; None: they are equal, and their start may be traced.
  """

  num_active: int
  trains_embedding: bool
  start: int | None = None

  def bounds(self, start: Integer, stop: Integer) -> tuple[Integer, Integer]:
    """Returns start and stop of the stage: static ones of unlike blocks, else as given, perhaps traced."""
    return (start, stop) if self.start is None else (self.start, self.start + self.num_active)


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
    equal_blocks: all blocks have the same shapes.
    has_adapter: a temporary layer follows the last block.
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
  equal_blocks: bool = True
  has_adapter: bool = False

  @property
  def shape(self) -> StageShape:
    return StageShape(self.stop - self.start, self.trains_embedding, None if self.equal_blocks else self.start)

  @property
  def static_stop(self) -> int | None:
    """`stop` where a program depends on it, for unlike blocks; None: it may be traced."""
    return None if self.equal_blocks else self.stop


def make_plans(config: Config) -> tuple[StagePlan, ...]:
  """Builds the stage plans of a run.

  All methods run the same number of rounds in all: depth / blocks_per_stage * rounds_per_stage.
  """
  method, encoder = config.method.traits, config.model.traits
  depth = encoder.depth
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
        equal_blocks=encoder.equal_blocks,
        has_adapter=stop <= encoder.num_adapters,
      )
    )
  return tuple(plans)


class StageParams(NamedTuple):
  """The global parameters, split for a stage.

  Attributes:
    active: what is differentiated, optimized and uploaded; `num_active` blocks.
    frozen: the rest; of its blocks only those below `start` are ever read.
    start: first active block; may be traced.
    stop: active blocks from here on, counted from `start`, do not exist yet; may be traced. None: all exist.
  """

  active: Params
  frozen: Params
  start: Integer
  stop: Integer | None = None


def split(params: Params, shape: StageShape, start: Integer, stop: Integer | None = None) -> StageParams:
  """Splits the full parameter tree for a stage of a static shape; see StageParams."""
  start = shape.bounds(start, 0)[0]
  active = {name: tree for name, tree in params.items() if name not in ('blocks', 'embedding', 'adapters')}
  active['blocks'] = block_trees.take(params['blocks'], start, shape.num_active)
  frozen = {'blocks': block_trees.readable(params['blocks'], start)}
  if 'adapters' in params:
    last = adapter_name(int(start) + shape.num_active - 1)
    active['adapters'] = {name: layer for name, layer in params['adapters'].items() if name == last}
  (active if shape.trains_embedding else frozen)['embedding'] = params['embedding']
  return StageParams(active, frozen, start, stop)


def split_existing(params: Params, stop: Integer) -> StageParams:
  """Splits off all that exists below `stop`, which may be traced if the blocks are equal; the rest is absent.

  Equal blocks are active in full depth, so that one program serves every `stop`.
  """
  if block_trees.is_stacked(params['blocks']):
    return split(params, StageShape(block_trees.count(params['blocks']), True), 0, stop)
  return split(params, StageShape(int(stop), True, start=0), 0)


def merge(params: Params, active: Params, start: Integer) -> Params:
  """Merges an active part into the full tree; all other leaves and blocks are unchanged."""
  merged = dict(params, **{name: tree for name, tree in active.items() if name not in ('blocks', 'adapters')})
  merged['blocks'] = block_trees.put(params['blocks'], active['blocks'], start)
  if 'adapters' in params:
    merged['adapters'] = {**params['adapters'], **active['adapters']}
  return merged


ABSENT, FROZEN, ACTIVE = range(3)


def labels(params: Params, start: Integer, stop: Integer, trains_embedding: bool) -> Labels:
  """Labels every parameter of a stage ABSENT, FROZEN or ACTIVE; the optimizer takes its rules per layer from them.

  Args:
    params: the full tree, or an active part (then `start` is 0), of n blocks.
    start: first active block.
    stop: blocks from here on are absent.
    trains_embedding: the embedding is active too.

  Returns:
    A tree like `params` of int32 arrays: scalars, and (n,) vectors for stacked blocks.
  """
  block = jnp.arange(block_trees.count(params['blocks']))
  per_block = jnp.where(block >= stop, ABSENT, jnp.where(block < start, FROZEN, ACTIVE))
  per_part = {'embedding': jnp.int32(ACTIVE if trains_embedding else FROZEN)}
  found = {
    name: jax.tree.map(lambda _, name=name: per_part.get(name, jnp.int32(ACTIVE)), tree)
    for name, tree in params.items()
  }
  return found | {'blocks': block_trees.spread(params['blocks'], per_block)}


def init_new_blocks(params: Params, plan: StagePlan, new_block_init: str) -> Params:
  """Initializes a stage's new blocks: as drawn (`random`), or each a copy of the block below the stage (`previous`)."""
  if new_block_init == 'random' or plan.stage == 0:
    return params
  return dict(params, blocks=block_trees.copy_below(params['blocks'], plan.stop - plan.num_new, plan.stop))


# Exchange is counted in components: 'embedding', 'block_00' .. , 'norm', 'adapter_00' .. , and the heads.


def _end(plan: StagePlan) -> tuple[str, ...]:
  """Returns the components between the last block and the heads."""
  return ('norm', adapter_name(plan.stop - 1)) if plan.has_adapter else ('norm',)


def uploaded_components(plan: StagePlan, head_names: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the components that a client uploads: the active ones."""
  blocks = tuple(block_name(i) for i in range(plan.start, plan.stop))
  return (('embedding',) if plan.trains_embedding else ()) + blocks + _end(plan) + head_names


def modified_components(plan: StagePlan, head_names: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the components of the global model that a round modifies, by aggregation and by calibration."""
  return required_components(plan, head_names) if plan.calibrates else uploaded_components(plan, head_names)


def required_components(plan: StagePlan, head_names: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the components that a client requires for training: all that exist at this stage."""
  return ('embedding', *(block_name(i) for i in range(plan.stop)), *_end(plan), *head_names)
