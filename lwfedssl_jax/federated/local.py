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
  """

  encoder: Encoder
  objective: Objective
  alignment: Callable[..., Any] | None
  alignment_weight: float
  optimizer: optax.GradientTransformation
  block_learning_rate_decay: float
  augment: AugmentConfig


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
  objective = rules.objective
  constant = lambda tree: jax.lax.stop_gradient(objective.project(tree, embed_active(rules, tree, inputs, depth), mask))
  projections = objective.project(params, embed_active(rules, params, inputs, depth), mask)
  targets = None if target is None else constant(target)
  main = objective.loss(params, projections, targets, mask)
  aligned = jnp.float32(0)
  if rules.alignment is not None:
    aligned = rules.alignment(projections, constant(received), mask)
  total = main + rules.alignment_weight * aligned
  return total, Losses(total, main, aligned)


def train_step(
    rules: LocalRules, state: LocalState, received: Params, frozen: Params, start: Any, views: jax.Array,
    mask: jax.Array, depth: Any = None) -> tuple[LocalState, Losses]:
  """Takes one optimizer step on a batch of views (2, B, H, W, C); a batch without valid samples changes nothing."""
  inputs = prefix_tokens(rules, frozen, start, views)
  target = None if state.target is None else trees.unpack(state.target, received)
  loss = lambda packed: step_losses(rules, trees.unpack(packed, received), target, received, inputs, mask, depth)
  gradients, losses = jax.grad(loss, has_aux=True)(state.params)
  updates, optimizer = rules.optimizer.update(gradients, state.optimizer, state.params)
  if rules.block_learning_rate_decay != 1:
    scales = trees.pack(optimizers.block_scales(received, rules.block_learning_rate_decay, depth))
    updates = jax.tree.map(jnp.multiply, updates, scales)
  params = optax.apply_updates(state.params, updates)
  target = None if state.target is None else rules.objective.update_target(state.target, params)
  return trees.select(mask.any(), LocalState(params, target, optimizer), state), losses


def train(
    rules: LocalRules, key: PRNGKey, active: Params, frozen: Params, start: Any, images: jax.Array, ids: jax.Array,
    mask: jax.Array, depth: Any = None) -> tuple[Params, Losses]:
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

  Returns:
    The trained active part, and the mean losses over the steps that were taken.
  """
  def step(state, scanned):
    index, batch_ids, batch_mask = scanned
    views = augment.two_views(jax.random.fold_in(key, index), images[batch_ids], rules.augment)
    return train_step(rules, state, active, frozen, start, views, batch_mask, depth)

  state, losses = jax.lax.scan(step, init_state(rules, active), (jnp.arange(ids.shape[0]), ids, mask))
  taken = mask.any(axis=1)
  mean = lambda values: jnp.where(taken, values, 0).sum() / taken.sum()
  trained = trees.unpack(state.params, active)
  if depth is not None:  # weight decay has moved what no gradient reaches
    exists = jnp.arange(rules.encoder.depth) < depth
    keep = lambda new, old: jnp.where(exists.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)
    trained['blocks'] = jax.tree.map(keep, trained['blocks'], active['blocks'])
  return trained, jax.tree.map(mean, losses)
