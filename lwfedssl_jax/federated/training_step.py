"""One optimizer step on the active parameters, as clients and the server's calibration take it.

Gradients are taken with respect to the active parameters only. In a layer-wise stage nothing below the active blocks
changes. One forward pass through the frozen prefix per view, without stored activations, therefore serves the online
branch, the target branch and the global model. Under vmap over clients, which share the prefix, it is one large matrix
product (LW-FedSSL, arXiv 2401.11647).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lwfedssl_jax import block_trees, stages, trees
from lwfedssl_jax.base import Array, Bool, Float, Function, Mask, Params, Raveled, Scalar
from lwfedssl_jax.data import augment
from lwfedssl_jax.federated import optimizer as optimizers
from lwfedssl_jax.federated.model import Model
from lwfedssl_jax.stages import StageParams


class Losses(NamedTuple):
  """The total loss, which is minimized, and its terms; the proximal term is the rest."""

  total: Scalar
  objective: Scalar
  alignment: Scalar


class StepState(NamedTuple):
  """The state of local training; it covers active parameters only, raveled. The optimizer has no running statistics."""

  params: Raveled
  target: Raveled | None
  optimizer: optax.OptState


class Batch(NamedTuple):
  """Two augmented views of a batch, in [0, 1], and which of its samples are valid."""

  views: Float[Array, '2 B H W C']
  mask: Mask


class PreviousModel(NamedTuple):
  """A client's active parameters after its last training, without the online-only heads, and whether there are any."""

  params: Params
  exists: Bool[Array, '']


class StepOptions(NamedTuple):
  """The constants of a training step.

  Attributes:
    model: encoder and objective.
    alignment: (local, global projections (2, B, P), mask) -> scalar; None switches it off. With `previous` it takes
      that model's projections too, and whether it exists.
    alignment_weight: its weight.
    learning_rate: base rate of AdamW, per 256 images.
    batch_size: images per step; scales the rate.
    weight_decay: of matrices.
    block_learning_rate_decay: factor on the updates per block below the newest one.
    micro_batch_size: images whose activations are stored at once, a divisor of the batch; 0: the full batch.
    axis: name of the mesh axis over which each batch is sharded; None: it is not sharded.
    proximal_weight: mu of FedProx's term (mu / 2) ||w - w_global||^2 over the active parameters; 0: none.
    scale: replaces `optax.scale_by_adam()`; None: Adam.
    previous: the client's own model of its last round, which the alignment `moon` compares with.
  """

  model: Model
  alignment: Function | None
  alignment_weight: float
  learning_rate: float
  batch_size: int
  weight_decay: float
  block_learning_rate_decay: float
  micro_batch_size: int = 0
  axis: str | None = None
  proximal_weight: float = 0.0
  scale: optax.GradientTransformation | None = None
  previous: PreviousModel | None = None


def make_optimizer(options: StepOptions, global_params: StageParams) -> optax.GradientTransformation:
  """Builds the optimizer of a stage's active parameters, raveled."""
  factors = None
  if options.block_learning_rate_decay != 1 or global_params.stop is not None:
    active = global_params.active
    count = block_trees.count(active['blocks'])
    labels = stages.labels(
      active, 0, count if global_params.stop is None else global_params.stop, trains_embedding='embedding' in active
    )
    of_layers = optimizers.layer_factors(active, labels, options.block_learning_rate_decay)
    factors = trees.split_statistics(options.model.raveler.ravel(of_layers))[0]
  return optimizers.make_optimizer(
    options.learning_rate, options.batch_size, options.weight_decay, factors, options.scale
  )


def init_state(options: StepOptions, optimizer: optax.GradientTransformation, global_params: StageParams) -> StepState:
  """Starts local training: fresh optimizer, target branch copied from the global model."""
  params = options.model.raveler.ravel(global_params.active)
  target = trees.without_online_only(params) if options.model.objective.update_target else None
  return StepState(params, target, optimizer.init(trees.split_statistics(params)[0]))


def prefix_tokens(model: Model, global_params: StageParams, views: Float[Array, '2 B H W C']) -> Array:
  """Runs the frozen part once for both views, without differentiation.

  Returns:
    Tokens (2B, T, D); if nothing is frozen (the embedding is active), normalized images (2B, H, W, C).
  """
  inputs = augment.normalize(views.reshape(-1, *views.shape[2:]))
  frozen = global_params.frozen
  if 'embedding' not in frozen:
    return inputs
  tokens = model.encoder.embed(frozen['embedding'], inputs)
  return jax.lax.stop_gradient(model.encoder.prefix(frozen['blocks'], tokens, global_params.start))


def embed_active(
  model: Model, active: Params, inputs: Array, mask: Array, stop: Any = None
) -> tuple[Float[Array, '2 B D'], Raveled]:
  """Runs the active part of the encoder on the result of `prefix_tokens`.

  Returns:
    Pooled embeddings, and the running statistics after this pass, raveled; no group if there are none.
  """
  train: Any = model.encoder.train
  pooled, statistics = train(active, inputs, mask, stop)
  return pooled.reshape(2, -1, model.encoder.width), model.raveler.ravel(statistics)


class Branches(NamedTuple):
  """One value per branch: active parameters, or pooled embeddings (2, B, D). None: the branch does not exist."""

  online: Any
  target: Any
  global_model: Any
  previous: Any = None


def stack_branches(options: StepOptions, params: Params, target: Params | None, global_params: StageParams) -> Branches:
  """Gathers the active parameters of all branches; only the online branch has a gradient."""
  constant = jax.lax.stop_gradient
  if options.alignment is None:
    return Branches(params, constant(target), None)
  previous = None if options.previous is None else constant(options.previous.params)
  return Branches(params, constant(target), constant(global_params.active), previous)


def embed_branches(
  model: Model, branches: Branches, inputs: Array, mask: Array, stop: Any = None
) -> tuple[Branches, Raveled]:
  """Runs every branch's active part; returns embeddings (2, B, D), and the running statistics of the online branch."""
  online, statistics = embed_active(model, branches.online, inputs, mask, stop)
  others = (None if tree is None else embed_active(model, tree, inputs, mask, stop)[0] for tree in branches[1:])
  return Branches(online, *others), statistics


def compute_losses(options: StepOptions, branches: Branches, embeddings: Branches, mask: Mask) -> tuple[Scalar, Losses]:
  """Computes the loss of one batch from its embeddings: heads, objective and alignment.

  Args:
    options: see StepOptions.
    branches: active parameters; only the heads are used.
    embeddings: (2, B, D) each.
    mask: the valid samples.

  Returns:
    The total loss, and its parts.
  """
  objective = options.model.objective
  projections = Branches(
    *(None if tree is None else objective.project(tree, pooled, mask) for tree, pooled in zip(branches, embeddings))
  )
  main = objective.loss(branches.online, projections.online, projections.target, mask)
  aligned = jnp.float32(0)
  if options.alignment is not None:
    previous = () if options.previous is None else (projections.previous, options.previous.exists)
    aligned = options.alignment(projections.online, projections.global_model, mask, *previous)
  total = main + options.alignment_weight * aligned
  return total, Losses(total, main, aligned)


def batch_losses(
  options: StepOptions, branches: Branches, inputs: Array, mask: Mask, stop: Any = None
) -> tuple[Scalar, tuple[Losses, Raveled]]:
  """Computes the loss of one batch from the result of `prefix_tokens`, its parts, and the running statistics."""
  embeddings, statistics = embed_branches(options.model, branches, inputs, mask, stop)
  if options.axis is not None:  # the loss compares all images: gather the batch's embeddings
    embeddings = jax.tree.map(lambda part: jax.lax.all_gather(part, options.axis, axis=1, tiled=True), embeddings)
  total, losses = compute_losses(options, branches, embeddings, mask)
  return total, (losses, statistics)


def gradient(
  options: StepOptions, state: StepState, global_params: StageParams, batch: Batch
) -> tuple[Raveled, Losses, Raveled]:
  """Computes the gradient of the loss with respect to the active parameters, raveled; losses; running statistics."""
  unravel, active, model = options.model.raveler.unravel, global_params.active, options.model
  params, constant = trees.split_statistics(state.params)
  target = None if state.target is None else unravel(state.target, active)
  if 0 < options.micro_batch_size < batch.views.shape[1]:
    return *_gradient_in_pieces(options, params, target, global_params, batch), {}
  inputs = prefix_tokens(model, global_params, batch.views)

  def loss(vectors):
    branches = stack_branches(options, unravel(vectors | constant, active), target, global_params)
    return batch_losses(options, branches, inputs, batch.mask, global_params.stop)

  gradients, (losses, statistics) = jax.grad(loss, has_aux=True)(params)
  # Each of D devices has the full gradient of the heads, and D times its own images' share of the encoder's gradient
  # (the cotangents of D copies of the loss are summed). The mean over devices is the gradient of both.
  return (gradients if options.axis is None else jax.lax.pmean(gradients, options.axis)), losses, statistics


def _gradient_in_pieces(
  options: StepOptions, params: Raveled, target: Params | None, global_params: StageParams, batch: Batch
) -> tuple[Raveled, Losses]:
  """Computes the full batch's exact gradient in pieces of `micro_batch_size` images.

  No image's embedding may depend on others: batch normalization in the encoder is refused (config.py).

  First the embeddings of all pieces, then the loss and its gradient with respect to the full batch of embeddings, then
  each piece's embeddings again with their vjp (GradCache, arXiv 2101.06983). The prefix runs once; its tokens are kept.
  With a mesh axis, each device takes its own images in pieces; the loss compares the embeddings of all.
  """
  model, size, count, axis = options.model, options.micro_batch_size, batch.views.shape[1], options.axis
  unravel, stop = (lambda vectors: model.raveler.unravel(vectors, global_params.active)), global_params.stop

  def branches_at(vectors):
    return stack_branches(options, unravel(vectors), target, global_params)

  def embed_piece(index):
    piece = jax.lax.dynamic_slice_in_dim(batch.views, index * size, size, axis=1)
    inputs = prefix_tokens(model, global_params, piece)
    return inputs, embed_branches(model, branches_at(params), inputs, batch.mask, stop)[0]

  def loss(vectors, online):
    return compute_losses(options, branches_at(vectors), whole._replace(online=online), batch.mask)

  def pull_back(total, piece):
    inputs, cotangent = piece

    def embed(vectors):
      return embed_active(model, unravel(vectors), inputs, batch.mask, stop)[0]

    return jax.tree.map(jnp.add, total, jax.vjp(embed, params)[1](cotangent)[0]), None

  inputs, embeddings = jax.lax.map(embed_piece, jnp.arange(count // size))
  whole = jax.tree.map(lambda pieces: jnp.moveaxis(pieces, 0, 1).reshape(2, count, -1), embeddings)
  if axis is not None:
    whole = jax.tree.map(lambda part: jax.lax.all_gather(part, axis, axis=1, tiled=True), whole)
  (of_heads, of_embeddings), losses = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, whole.online)
  if axis is not None:  # D times its own images' share, as in `gradient`
    own = jax.lax.dynamic_slice_in_dim(of_embeddings, jax.lax.axis_index(axis) * count, count, axis=1)
    of_embeddings = jax.lax.axis_size(axis) * own
  cotangents = jnp.moveaxis(of_embeddings.reshape(2, count // size, size, -1), 1, 0)
  total = jax.lax.scan(pull_back, of_heads, (inputs, cotangents))[0]
  return (total if axis is None else jax.lax.pmean(total, axis)), losses


def add_proximal_term(
  weight: float, params: Raveled, global_params: Raveled, gradients: Raveled, losses: Losses
) -> tuple[Raveled, Losses]:
  """Adds (weight / 2) ||params - global_params||^2 and its gradient (FedProx, arXiv 1812.06127, equation 2)."""
  delta = jax.tree.map(jnp.subtract, params, global_params)
  penalty = weight / 2 * sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(delta))
  return jax.tree.map(lambda g, d: g + weight * d, gradients, delta), losses._replace(total=losses.total + penalty)


def train_step(
  options: StepOptions,
  optimizer: optax.GradientTransformation,
  state: StepState,
  global_params: StageParams,
  batch: Batch,
) -> tuple[StepState, Losses]:
  """Takes one step of the optimizer from `make_optimizer`; a batch without valid samples changes nothing."""
  gradients, losses, statistics = gradient(options, state, global_params, batch)
  params = trees.split_statistics(state.params)[0]
  if options.proximal_weight:
    start = trees.split_statistics(options.model.raveler.ravel(global_params.active))[0]
    gradients, losses = add_proximal_term(options.proximal_weight, params, start, gradients, losses)
  updates, optimizer_state = optimizer.update(gradients, state.optimizer, params)
  params = optax.apply_updates(params, updates) | statistics
  update_target, target = options.model.objective.update_target, state.target
  if update_target is not None and target is not None:
    target = update_target(target, params)
  return optax.tree.where(batch.mask.any(), StepState(params, target, optimizer_state), state), losses
