"""FLOPs of a client: in the paper's convention, and as this program executes them.

The two counts are not comparable. `paper_*` is the convention of arXiv 2401.11647 v4, Table 2, derived from its
numbers: one image, one view (SimCLR and SimSiam: both), online branch only, a multiply-add counts 1. `executed_flops`
counts the matrix products of one training step, all branches and views; a multiply-add counts 2.
"""

from collections.abc import Sequence
from typing import NamedTuple

from lwfedssl_jax.base import PartFlops
from lwfedssl_jax.catalog import OBJECTIVES
from lwfedssl_jax.config import Config
from lwfedssl_jax.resources.parameters import Shapes, trace_shapes
from lwfedssl_jax.stages import StagePlan, make_plans

LAYER_NORM_FLOPS = 5  # per element, paper convention


class _Heads(NamedTuple):
  """Multiply-adds of the heads for one image and view."""

  shared: int  # in every branch
  online_only: int


def _count_heads(shapes: Shapes) -> _Heads:
  objective = shapes.model.objective

  def count(names):
    return sum(shapes.count_products(name) for name in names)

  return _Heads(count(set(objective.head_names) - set(objective.online_only)), count(objective.online_only))


def _paper_count(part: PartFlops) -> int:
  return part.products + LAYER_NORM_FLOPS * part.norm_elements


# The paper's convention.


class StageFlops(NamedTuple):
  """FLOPs per image of a client in a stage, paper convention.

  Attributes:
    stage: 0-based.
    epochs: local epochs over all rounds of the stage.
    forward_flops: one epoch's forward pass, frozen and trained.
    backward_flops: one epoch's backward pass, twice the forward pass of what is trained.
  """

  stage: int
  epochs: int
  forward_flops: int
  backward_flops: int

  @property
  def total_flops(self) -> int:
    """All epochs of the stage."""
    return self.epochs * (self.forward_flops + self.backward_flops)


def paper_stage_flops(config: Config, image_size: int) -> tuple[StageFlops, ...]:
  """Counts the FLOPs of a client per stage, as arXiv 2401.11647 v4 does.

  Linear layers, the two attention products and 5 FLOPs per element of a layer norm count; biases, the position
  table, activations, softmax, batch norms and the loss do not. Embedding, final norm and heads count in every stage,
  the frozen embedding forward only.

  Args:
    config: the run.
    image_size: side of the images, pixels.
  """
  shapes = trace_shapes(config, image_size)
  parts = shapes.model.encoder.flops
  embedding, blocks = _paper_count(parts.embedding), [_paper_count(block) for block in parts.blocks]
  views = config.objective.traits.paper_views
  stages = []
  for plan in make_plans(config):
    ends = _paper_count(parts.pool) + shapes.count_adapter(plan.stop) + sum(_count_heads(shapes))
    trained = sum(blocks[plan.stop - plan.shape.num_active : plan.stop]) + ends + plan.trains_embedding * embedding
    stages.append(
      StageFlops(
        stage=plan.stage,
        epochs=plan.num_rounds * config.client.local_epochs,
        forward_flops=views * (embedding + sum(blocks[plan.stop - plan.num_kept : plan.stop]) + ends),
        backward_flops=views * 2 * trained,
      )
    )
  return tuple(stages)


def total_flops(stages: Sequence[StageFlops]) -> int:
  """Sums a client's FLOPs per image over stages."""
  return sum(stage.total_flops for stage in stages)


# What this program executes.


class StepFlops(NamedTuple):
  """FLOPs of one training step, both views, by part; a multiply-add counts 2.

  Attributes:
    prefix_flops: frozen embedding and blocks, once per view, shared by all branches.
    online_forward_flops: active blocks, pool, and the embedding where it is trained.
    online_backward_flops: of the same.
    target_forward_flops: the same of the target branch; 0 where the objective has none.
    global_forward_flops: the same of the global model, and with `moon` of the client's previous one; 0 without
      representation alignment.
    heads_forward_flops: the heads of all branches, and those of the online branch alone.
    heads_backward_flops: of the online branch.
    similarity_flops: similarity matrices of objective and alignment, forward and backward.
    recomputed_flops: forward passes of the online branch that micro-batches or activation checkpointing repeat.
  """

  prefix_flops: int
  online_forward_flops: int
  online_backward_flops: int
  target_forward_flops: int
  global_forward_flops: int
  heads_forward_flops: int
  heads_backward_flops: int
  similarity_flops: int
  recomputed_flops: int

  @property
  def total_flops(self) -> int:
    """All parts of the step."""
    return sum(self)


def _similarity_flops(config: Config, shapes: Shapes, batch_size: int, aligned: bool) -> int:
  one = 2 * batch_size * batch_size * shapes.projection_size
  aligning = aligned and config.objective.alignment_kind == 'contrastive'
  alignment = OBJECTIVES['moco_v3'].similarity_products if aligning else 0  # info_nce too
  return (config.objective.traits.similarity_products + alignment) * one


def _step_flops(
  config: Config,
  image_size: int,
  plan: StagePlan,
  batch_size: int,
  *,
  num_frozen: int,
  num_active: int,
  trains_embedding: bool,
  aligned: bool,
  micro_batched: bool,
) -> StepFlops:
  shapes = trace_shapes(config, image_size)
  parts, heads = shapes.model.encoder.flops, _count_heads(shapes)
  pair = 2 * 2 * batch_size  # 2 FLOPs per multiply-add, two views
  embedding = parts.embedding.products if trains_embedding else 0
  lowest = plan.stop - num_active
  frozen = sum(block.products for block in parts.blocks[lowest - num_frozen : lowest])
  blocks = sum(block.products for block in parts.blocks[lowest : plan.stop])
  active = blocks + parts.pool.products + shapes.count_adapter(plan.stop)
  without_gradient = embedding if trains_embedding else parts.blocks[lowest].input_products
  has_target = shapes.model.objective.update_target is not None
  compared = aligned * (1 + (config.objective.alignment_kind == 'moon'))
  branches = 1 + has_target + compared
  return StepFlops(
    prefix_flops=pair * (parts.embedding.products - embedding + frozen),
    online_forward_flops=pair * (embedding + active),
    online_backward_flops=pair * (2 * (embedding + active) - without_gradient),
    target_forward_flops=has_target * pair * (embedding + active),
    global_forward_flops=compared * pair * (embedding + active),
    heads_forward_flops=pair * (branches * heads.shared + heads.online_only),
    heads_backward_flops=pair * 2 * sum(heads),
    similarity_flops=_similarity_flops(config, shapes, batch_size, aligned),
    recomputed_flops=pair * (micro_batched * (embedding + active) + (config.client.rematerialize == 'all') * blocks),
  )


def executed_flops(config: Config, image_size: int, plan: StagePlan, batch_size: int) -> StepFlops:
  """Counts the matrix products of one client step, as this program executes them.

  Linear layers, the two attention products and the similarity matrices count; elementwise operations do not. The
  backward pass is twice the forward pass of what is trained, except for the lowest product, whose input gradient is not
  needed: the patch projection or stem; else the first convolutions of a ResNet's lowest active block. A transformer's
  has no such product: it begins with a layer norm, whose scale and bias need the input gradient of the product above.

  Args:
    config: the run.
    image_size: side of the images, pixels.
    plan: of the stage.
    batch_size: images in the step, padding included.
  """
  return _step_flops(
    config,
    image_size,
    plan,
    batch_size,
    num_frozen=plan.num_frozen,
    num_active=plan.shape.num_active,
    trains_embedding=plan.trains_embedding,
    aligned=config.uses_alignment,
    micro_batched=0 < config.client.micro_batch_size < batch_size,
  )


def calibration_flops(config: Config, image_size: int, plan: StagePlan, batch_size: int) -> StepFlops:
  """Counts the matrix products of one step of server-side calibration.

  The server trains all blocks of the stage and the embedding end to end on the objective, without alignment. The rules
  are those of `executed_flops`; nothing is frozen. Counts a step whether or not `plan` calibrates.
  """
  return _step_flops(
    config,
    image_size,
    plan,
    batch_size,
    num_frozen=0,
    num_active=plan.stop,
    trains_embedding=True,
    aligned=False,
    micro_batched=False,
  )
