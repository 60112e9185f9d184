"""Local training: what one client does between download and upload (LW-FedSSL, arXiv 2401.11647, Algorithm 1).

Gradients are taken with respect to the active parameters only. In a layer-wise stage nothing below the active
blocks changes, so one forward pass through the frozen prefix per view, without stored activations, serves the
online branch, the target branch and the received global model; under vmap over clients, whose prefix is the same,
it is one large matrix product. The server's calibration is the same function over all blocks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lwfedssl_jax import trees
from lwfedssl_jax.base import Encoder, Objective, Params, PRNGKey
from lwfedssl_jax.config import AugmentConfig
from lwfedssl_jax.data import augment
from lwfedssl_jax.federated import optimizer as optimizers


class Losses(NamedTuple):
  """Scalars float32: the sum that is minimised, and its two parts."""

  total: Any
  objective: Any
  alignment: Any


class LocalState(NamedTuple):
  """What changes from step to step; all of it covers active parameters only, and is packed (`trees.pack`)."""

  params: Params
  target: Params | None
  optimizer: Any


class LocalRules(NamedTuple):
  """Everything about local training that does not change during a run.

  Attributes:
    encoder: the encoder.
    objective: the self-supervised objective.
    alignment: (local, received projections (2, B, P), mask) -> scalar; None switches it off.
    alignment_weight: its weight.
    optimizer: transformation over the active parameters.
    block_learning_rate_decay: factor on the updates per block below the newest one.
    augment: augmentation strengths.
    micro_batch_size: images whose activations are held at once, a divisor of the batch; 0: the whole batch.
    axis: name of a mesh axis whose devices share each batch between them, in equal parts; None: one device has it all.
  """

  encoder: Encoder
  objective: Objective
  alignment: Callable[..., Any] | None
  alignment_weight: float
  optimizer: optax.GradientTransformation
  block_learning_rate_decay: float
  augment: AugmentConfig
  micro_batch_size: int
  axis: str | None = None


def init_state(rules: LocalRules, active: Params) -> LocalState:
  """Starts a round on a client: fresh optimizer, target branch copied from the received online branch."""
  packed = trees.pack(active)
  without_predictor = {name: vector for name, vector in packed.items() if not name.startswith(trees.PREDICTOR)}
  return LocalState(
      params=packed,
      target=without_predictor if rules.objective.update_target else None,
      optimizer=rules.optimizer.init(packed),
  )


def prefix_tokens(rules: LocalRules, frozen: Params, start: Any, views: jax.Array) -> jax.Array:
  """Runs everything frozen, once for both views, never differentiated.

  Args:
    rules: see LocalRules.
    frozen: the frozen part; without 'embedding' nothing is frozen and the views are returned as they are.
    start: first active block, may be traced.
    views: (2, B, H, W, C) float32 in [0, 1].

  Returns:
    Tokens (2B, T, D), or normalised images (2B, H, W, C).
  """
  inputs = augment.normalize(views.reshape(-1, *views.shape[2:]))
  if 'embedding' not in frozen:
    return inputs
  tokens = rules.encoder.embed(frozen['embedding'], inputs)
  return jax.lax.stop_gradient(rules.encoder.prefix(frozen['blocks'], tokens, start))


def embed_active(rules: LocalRules, active: Params, inputs: jax.Array, depth: Any = None) -> jax.Array:
  """Runs the active part of the encoder on `prefix_tokens`' result; returns pooled embeddings (2, B, D)."""
  if 'embedding' in active:
    inputs = rules.encoder.embed(active['embedding'], inputs)
  tokens = rules.encoder.blocks(active['blocks'], inputs, depth)
  return rules.encoder.pool(active['norm'], tokens).reshape(2, -1, rules.encoder.width)


class Branches(NamedTuple):
  """Something of each branch: active parameters, or pooled embeddings (2, B, D). None: the branch does not exist."""

  online: Any
  target: Any
  received: Any


def branches_of(rules: LocalRules, params: Params, target: Params | None, received: Params) -> Branches:
  """Gathers the active parameters of all branches; only the online branch has a gradient."""
  constant = jax.lax.stop_gradient
  return Branches(params, constant(target), constant(received) if rules.alignment is not None else None)


def embed_branches(rules: LocalRules, branches: Branches, inputs: jax.Array, depth: Any = None) -> Branches:
  """Runs every branch's active part on the result of `prefix_tokens`; returns embeddings (2, B, D)."""
  return Branches(*(None if tree is None else embed_active(rules, tree, inputs, depth) for tree in branches))


def losses_of(rules: LocalRules, branches: Branches, embeddings: Branches, mask: jax.Array) -> tuple[jax.Array, Losses]:
  """Loss of one batch from its embeddings: heads, objective and alignment.

  Args:
    rules: see LocalRules.
    branches: parameters, of which the heads are used.
    embeddings: (2, B, D) each.
    mask: (B,) bool, the valid samples.

  Returns:
    The total loss, and its parts as `Losses`.
  """
  objective = rules.objective
  project = lambda tree, pooled: None if tree is None else objective.project(tree, pooled, mask)
  projections = Branches(*map(project, branches, embeddings))
  main = objective.loss(branches.online, projections.online, projections.target, mask)
  aligned = jnp.float32(0)
  if rules.alignment is not None:
    aligned = rules.alignment(projections.online, projections.received, mask)
  total = main + rules.alignment_weight * aligned
  return total, Losses(total, main, aligned)


def step_losses(
    rules: LocalRules, params: Params, target: Params | None, received: Params, inputs: jax.Array, mask: jax.Array,
    depth: Any = None) -> tuple[jax.Array, Losses]:
  """Loss of one batch.

  Args:
    rules: see LocalRules.
    params: active parameters of the online branch; differentiated.
    target: those of the target branch, or None.
    received: active parameters as received, for the alignment.
    inputs: result of `prefix_tokens` for the batch.
    mask: (B,) bool, the valid samples.
    depth: blocks at or above it are left out; None: all are used.

  Returns:
    The total loss, and its parts as `Losses`.
  """
  branches = branches_of(rules, params, target, received)
  embeddings = embed_branches(rules, branches, inputs, depth)
  if rules.axis is not None:  # the loss compares all images of the batch: every device gets all embeddings
    embeddings = jax.tree.map(lambda part: jax.lax.all_gather(part, rules.axis, axis=1, tiled=True), embeddings)
  return losses_of(rules, branches, embeddings, mask)


def gradient(
    rules: LocalRules, packed: Params, target: Params | None, received: Params, frozen: Params, start: Any,
    views: jax.Array, mask: jax.Array, depth: Any = None) -> tuple[Params, Losses]:
  """Gradient of `step_losses` with respect to the packed active parameters, and the losses.

  In pieces of `rules.micro_batch_size` images it is the same gradient, not one of smaller batches: embeddings of all
  pieces first, the loss and its gradient on the whole batch of embeddings, then each piece's embeddings again, pulled
  back (GradCache, arXiv 2101.06983). The prefix runs once either way: its tokens are kept.
  """
  unpacked = lambda vectors: trees.unpack(vectors, received)
  size, batch = rules.micro_batch_size, views.shape[1]
  if not size or size >= batch:
    inputs = prefix_tokens(rules, frozen, start, views)
    loss = lambda vectors: step_losses(rules, unpacked(vectors), target, received, inputs, mask, depth)
    gradients, losses = jax.grad(loss, has_aux=True)(packed)
    # Each of D devices has the whole gradient of the heads, and of the encoder D times the share of its own images
    # (the cotangents of D copies of the loss are summed): either way the mean is the gradient.
    return (gradients if rules.axis is None else jax.lax.pmean(gradients, rules.axis)), losses

  def embed_piece(index):
    piece = jax.lax.dynamic_slice_in_dim(views, index * size, size, axis=1)
    inputs = prefix_tokens(rules, frozen, start, piece)
    return inputs, embed_branches(rules, branches_of(rules, unpacked(packed), target, received), inputs, depth)

  def loss(vectors, online):
    branches = branches_of(rules, unpacked(vectors), target, received)
    return losses_of(rules, branches, whole._replace(online=online), mask)

  def pull_back(total, piece):
    inputs, cotangent = piece
    embed = lambda vectors: embed_active(rules, unpacked(vectors), inputs, depth)
    return jax.tree.map(jnp.add, total, jax.vjp(embed, packed)[1](cotangent)[0]), None

  join = lambda pieces: jnp.moveaxis(pieces, 0, 1).reshape(2, batch, -1)
  inputs, embeddings = jax.lax.map(embed_piece, jnp.arange(batch // size))
  whole = jax.tree.map(join, embeddings)
  (of_heads, of_embeddings), losses = jax.grad(loss, argnums=(0, 1), has_aux=True)(packed, whole.online)
  cotangents = jnp.moveaxis(of_embeddings.reshape(2, batch // size, size, -1), 1, 0)
  return jax.lax.scan(pull_back, of_heads, (inputs, cotangents))[0], losses


def train_step(
    rules: LocalRules, state: LocalState, received: Params, frozen: Params, start: Any, views: jax.Array,
    mask: jax.Array, depth: Any = None) -> tuple[LocalState, Losses]:
  """Takes one optimizer step on a batch of views (2, B, H, W, C); a batch without valid samples changes nothing."""
  target = None if state.target is None else trees.unpack(state.target, received)
  gradients, losses = gradient(rules, state.params, target, received, frozen, start, views, mask, depth)
  updates, optimizer = rules.optimizer.update(gradients, state.optimizer, state.params)
  if rules.block_learning_rate_decay != 1:
    scales = trees.pack(optimizers.block_scales(received, rules.block_learning_rate_decay, depth))
    updates = jax.tree.map(jnp.multiply, updates, scales)
  params = optax.apply_updates(state.params, updates)
  target = None if state.target is None else rules.objective.update_target(state.target, params)
  return trees.select(mask.any(), LocalState(params, target, optimizer), state), losses


def train(
    rules: LocalRules, key: PRNGKey, active: Params, frozen: Params, start: Any, images: jax.Array, ids: jax.Array,
    mask: jax.Array, depth: Any = None, num_steps: Any = None) -> tuple[Params, Losses]:
  """Trains the active part on a sequence of batches; blocks that do not exist come back as they were.

  Args:
    rules: see LocalRules.
    key: for augmentation; step t uses fold_in(key, t).
    active: active part of the received model.
    frozen: the rest.
    start: first active block, may be traced.
    images: (N, H, W, C) uint8, of which the client sees its own.
    ids: (S, B) int32 into `images`.
    mask: (S, B) bool.
    depth: as in `step_losses`.
    num_steps: () int, may be traced: batches from here on are masked and are not run; None: S.

  Returns:
    The trained active part, and the mean losses over the steps that were taken.
  """
  piece = None
  if rules.axis is not None:
    count = ids.shape[1] // jax.lax.axis_size(rules.axis)
    piece = (jax.lax.axis_index(rules.axis) * count, count)

  def step(index, carry):
    state, sums = carry
    batch_mask = mask[index]
    views = augment.two_views(jax.random.fold_in(key, index), images[ids[index]], rules.augment, piece)
    state, losses = train_step(rules, state, active, frozen, start, views, batch_mask, depth)
    return state, jax.tree.map(lambda total, x: total + jnp.where(batch_mask.any(), x, 0), sums, losses)

  sums = Losses(*jnp.zeros(3))
  state, sums = jax.lax.fori_loop(
      0, ids.shape[0] if num_steps is None else num_steps, step, (init_state(rules, active), sums))
  taken = jnp.maximum(mask.any(axis=1).sum(), 1)
  trained = trees.unpack(state.params, active)
  if depth is not None:  # weight decay has moved what no gradient reaches
    exists = jnp.arange(rules.encoder.depth) < depth
    keep = lambda new, old: jnp.where(exists.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)
    trained['blocks'] = jax.tree.map(keep, trained['blocks'], active['blocks'])
  return trained, jax.tree.map(lambda total: total / taken, sums)
