"""Stage plans: which parameters are absent, frozen or active in a stage, and which are exchanged.

A method is data: traits (catalog.METHODS), from which this module makes a `StagePlan` per stage (arXiv 2401.11647
v1-v3, Fig. 2 and Algorithm 1). No other module depends on which method runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax import block_trees
from lwfedssl_jax.base import Array, Int, Integer, Labels, Params
from lwfedssl_jax.block_trees import adapter_name, block_name
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError


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
  """One stage of training, or one of the two parts of a stage with a warm-up.

  Attributes:
    stage: 0-based.
    first_round: 0-based global number of the plan's first round.
    num_rounds: rounds of the plan.
    start: blocks below are frozen on the client.
    stop: blocks from here on are absent.
    trains_embedding: the embedding is active too.
    calibrates: the server trains everything below `stop` after aggregation.
    num_new: blocks that this stage adds, the last ones below `stop`.
    depth: blocks in the encoder, absent ones included.
    equal_blocks: all blocks have the same shapes.
    has_adapter: a temporary layer follows the last block.
    keep: blocks that a client keeps at most, the new ones among them (depth dropout); 0: all.
    warmup_rounds: rounds of the stage before the plan's first.
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
  keep: int = 0
  warmup_rounds: int = 0

  @property
  def shape(self) -> StageShape:
    return StageShape(
      min(self.stop - self.start, self.num_kept), self.trains_embedding, None if self.equal_blocks else self.start
    )

  @property
  def static_stop(self) -> int | None:
    """`stop` where a program depends on it, for unlike blocks; None: it may be traced."""
    return None if self.equal_blocks else self.stop

  def stage_round(self, round_num: int) -> int:
    """Returns the 0-based number, within its stage, of a round of the run."""
    return round_num - self.first_round + self.warmup_rounds

  @property
  def num_kept(self) -> int:
    """Blocks that a client keeps: trains or runs."""
    return min(self.stop, self.keep or self.stop)

  @property
  def num_frozen(self) -> int:
    """Frozen blocks that a client runs."""
    return self.num_kept - self.shape.num_active


def make_plans(config: Config) -> tuple[StagePlan, ...]:
  """Builds the stage plans of a run, in the order of its rounds.

  All methods run the same number of rounds in all: depth / blocks_per_stage * rounds_per_stage, or total_rounds. A
  stage whose new blocks train alone for `warmup_rounds` has two plans (ProgFed, arXiv 2110.05323).

  Raises:
    UsageError: depth dropout with a method that trains some of the earlier blocks, not all or none.
  """
  method, encoder, keep = config.method.traits, config.model.traits, config.effective_depth_dropout_keep
  depth = encoder.depth
  step = config.method.blocks_per_stage if method.staged else depth
  rounds = config.effective_rounds_per_stage * (step // config.method.blocks_per_stage)
  plans = []
  for stage, stop in enumerate(range(step, depth + 1, step)):
    start = method.first_trained(stop, step)
    if keep and start not in (0, stop - step):
      raise UsageError(
        f'--depth_dropout_keep: expected 0 with --method={config.method.method}, which trains some earlier blocks'
      )
    plan = StagePlan(
      stage=stage,
      first_round=stage * rounds,
      num_rounds=rounds,
      start=start,
      stop=stop,
      trains_embedding=start == 0,
      calibrates=config.uses_calibration,
      num_new=step,
      depth=depth,
      keep=keep,
      equal_blocks=encoder.equal_blocks,
      has_adapter=stop <= encoder.num_adapters,
    )
    plans += _with_warmup(plan, config.method.warmup_rounds)
  return tuple(plans)


def _with_warmup(plan: StagePlan, num_rounds: int) -> list[StagePlan]:
  """Splits a stage's plan: its new blocks alone, then all; a stage that trains nothing else is one plan."""
  newest = plan.stop - plan.num_new
  if not num_rounds or plan.start == newest:
    return [plan]
  return [
    plan._replace(num_rounds=num_rounds, start=newest, trains_embedding=False),
    plan._replace(
      first_round=plan.first_round + num_rounds, num_rounds=plan.num_rounds - num_rounds, warmup_rounds=num_rounds
    ),
  ]


def find_plan(plans: Sequence[StagePlan], round_num: int) -> StagePlan:
  """Returns the plan of a round (0-based, over the run). Raises IndexError for a round beyond the run."""
  for plan in plans:
    if plan.first_round <= round_num < plan.first_round + plan.num_rounds:
      return plan
  raise IndexError(f'the run has no round {round_num}')


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


def whole(params: Params) -> StageShape:
  """Returns the shape of a stage in which everything is active."""
  return StageShape(block_trees.count(params['blocks']), trains_embedding=True)


def split_existing(params: Params, stop: Integer) -> StageParams:
  """Splits off all that exists below `stop`, which may be traced if the blocks are equal; the rest is absent.

  Equal blocks are active in full depth, so that one program serves every `stop`.
  """
  if block_trees.is_stacked(params['blocks']):
    return split(params, whole(params), 0, stop)
  return split(params, StageShape(int(stop), True, start=0), 0)


def keep_blocks(global_params: StageParams, kept: Int[Array, ' n']) -> StageParams:
  """Returns what a client has of the global parameters with depth dropout (Guo et al. 2023).

  Args:
    global_params: split for the stage. Where the embedding is active, `active` has all blocks.
    kept: ascending block numbers, see `depth_dropout.draw_kept`. Where the embedding is active, those of the blocks
      that the client trains. Else those of the frozen blocks that it runs, of which `start` exist at most.
  """

  def gather(blocks: Params) -> Params:
    rows = kept if kept.shape[0] else jnp.zeros(1, kept.dtype)  # a loop of no steps still indexes its blocks
    return jax.tree.map(lambda leaf: leaf[rows], blocks)

  active, frozen, start, _ = global_params
  if 'embedding' in active:
    return global_params._replace(active=dict(active, blocks=gather(active['blocks'])), frozen={})
  return global_params._replace(
    frozen=dict(frozen, blocks=gather(frozen['blocks'])), start=jnp.minimum(start, kept.shape[0])
  )


def put_blocks(active: Params, trained: Params, kept: Int[Array, ' n']) -> Params:
  """Returns the active part of a client that trained the blocks `kept`; its other blocks are those of `active`."""
  blocks = jax.tree.map(lambda whole, part: whole.at[kept].set(part), active['blocks'], trained['blocks'])
  return dict(trained, blocks=blocks)


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
  """Initializes a stage's new blocks: as drawn (`random`), or each a copy of the block below the stage (`previous`).

  After the warm-up of a stage they are kept.
  """
  if new_block_init == 'random' or plan.stage == 0 or plan.warmup_rounds:
    return params
  return dict(params, blocks=block_trees.copy_below(params['blocks'], plan.stop - plan.num_new, plan.stop))


# Exchange is counted in components: 'embedding', 'block_00' .. , 'norm', 'adapter_00' .. , and the heads.


def _end(plan: StagePlan) -> tuple[str, ...]:
  """Returns the components between the last block and the heads."""
  return ('norm', adapter_name(plan.stop - 1)) if plan.has_adapter else ('norm',)


def kept_share(plan: StagePlan, component: str) -> float:
  """Returns the probability that a client keeps a component that exists; below 1 for earlier blocks, depth dropout."""
  earlier = plan.stop - plan.num_new
  if plan.num_kept == plan.stop or component not in map(block_name, range(earlier)):
    return 1
  return (plan.num_kept - plan.num_new) / earlier


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
