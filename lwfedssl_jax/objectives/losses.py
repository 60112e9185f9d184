"""Pairwise losses on l2-normalized rows; every reduction respects a sample mask.

No (B, B, P) tensor is built: similarities come from one matrix product in float32 (`HIGHEST`). A backend's default may
be bfloat16 (TPU) or TF32 (GPU), and a temperature of 0.05 multiplies that error by 20.
"""

import jax
import jax.numpy as jnp

from lwfedssl_jax.base import Array, Bool, Float, Mask, Projections, Scalar

NORM_EPSILON = 1e-12


def l2_normalize(x: Float[Array, '... P']) -> Float[Array, '... P']:
  """Scales rows to unit length, in float32; a zero row stays zero, with a finite gradient."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), NORM_EPSILON))


def mean_over(values: Float[Array, ' B'], mask: Mask) -> Scalar:
  """Mean over the valid samples; 0 if there is none."""
  return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1)


def _cross_entropy(
  logits: Float[Array, 'R R'], positives: Float[Array, ' R'], excluded: Bool[Array, '#R R'], mask: Bool[Array, ' R']
) -> Scalar:
  logits = jnp.where(excluded, -jnp.inf, logits)
  # A padded row may exclude everything: give it one finite entry, so that its (unused) gradient is finite.
  logits = jnp.where(mask[:, None], logits, 0)
  return mean_over(jax.nn.logsumexp(logits, axis=1) - positives, mask)


def info_nce(queries: Float[Array, 'B P'], keys: Float[Array, 'B P'], temperature: float, mask: Mask) -> Scalar:
  """-mean_i log softmax_j(q_i . k_j / temperature)[i], keys under stop-gradient.

  LW-FedSSL's Eq. 2 (arXiv 2401.11647): without the 2 * temperature factor of MoCo v3's code.

  Args:
    queries: normalized here.
    keys: normalized here.
    temperature: > 0.
    mask: the valid samples.

  Returns:
    Scalar float32.
  """
  queries, keys = l2_normalize(queries), l2_normalize(jax.lax.stop_gradient(keys))
  logits = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST) / temperature
  return _cross_entropy(logits, jnp.diagonal(logits), ~mask[None, :], mask)


def nt_xent(projections: Projections, temperature: float, mask: Mask) -> Scalar:
  """SimCLR's loss (arXiv 2002.05709, Eq. 1) over 2B rows, each with 2B - 2 negatives.

  Args:
    projections: of the two views; normalized here.
    temperature: > 0.
    mask: the valid samples.

  Returns:
    Scalar float32, mean over the 2B valid rows.
  """
  batch = projections.shape[1]
  rows = l2_normalize(projections).reshape(2 * batch, -1)
  row_mask = jnp.concatenate([mask, mask])
  logits = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST) / temperature
  index = jnp.arange(2 * batch)
  positives = logits[index, (index + batch) % (2 * batch)]
  return _cross_entropy(logits, positives, ~row_mask[None, :] | (index[:, None] == index), row_mask)


def _cosines(x: Float[Array, 'B P'], y: Float[Array, 'B P']) -> Float[Array, ' B']:
  return (l2_normalize(x) * l2_normalize(jax.lax.stop_gradient(y))).sum(-1)


def two_way_contrast(
  x: Float[Array, 'B P'], positive: Float[Array, 'B P'], negative: Float[Array, 'B P'], temperature: float, mask: Mask
) -> Scalar:
  """Mean over the valid rows of -log softmax((cos(x_i, positive_i), cos(x_i, negative_i)) / temperature)[0].

  `positive` and `negative` are under stop-gradient.
  """
  x, (positive, negative) = l2_normalize(x), map(l2_normalize, jax.lax.stop_gradient((positive, negative)))
  return mean_over(jax.nn.softplus((x * (negative - positive)).sum(-1) / temperature), mask)


def cosine_distance(x: Float[Array, 'B P'], y: Float[Array, 'B P'], mask: Mask) -> Scalar:
  """Mean of 1 - cos(x_i, y_i) over the valid rows, y under stop-gradient."""
  return mean_over(1 - _cosines(x, y), mask)


def negative_cosine(x: Float[Array, 'B P'], y: Float[Array, 'B P'], mask: Mask) -> Scalar:
  """Mean of -cos(x_i, y_i) over the valid rows, y under stop-gradient."""
  return mean_over(-_cosines(x, y), mask)
