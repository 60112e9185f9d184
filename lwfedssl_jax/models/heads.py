"""Projector and predictor: MLPs with batch normalization over the client's own batch.

MoCo v3 (arXiv 2104.02057), with LW-FedSSL's widths. Linear layers have no bias; the last normalization
has neither scale nor bias. The heads are discarded after training, so there are no running statistics.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lwfedssl_jax.base import Array, Float, Mask

BATCH_NORM_EPSILON = 1e-5


def masked_mean(values: Float[Array, '... B F'], mask: Mask) -> Float[Array, '... 1 F']:
  """Mean over the valid samples, kept as an axis of length 1."""
  weights = mask.astype(values.dtype)[:, None]
  return (values * weights).sum(-2, keepdims=True) / jnp.maximum(weights.sum(), 1)


class MaskedBatchNorm(nn.Module):
  """Normalizes (..., B, F) by the mean and (biased) variance of the valid samples; float32."""

  affine: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, '... B F'], mask: Mask) -> Float[Array, '... B F']:
    x = x.astype(jnp.float32)
    centered = x - masked_mean(x, mask)
    x = centered * jax.lax.rsqrt(masked_mean(jnp.square(centered), mask) + BATCH_NORM_EPSILON)
    if self.affine:
      x = x * self.param('scale', nn.initializers.ones, x.shape[-1:])
      x = x + self.param('bias', nn.initializers.zeros, x.shape[-1:])
    return x


class Head(nn.Module):
  """Linear-BN-ReLU for each hidden width, then Linear-BN: (..., B, F) -> (..., B, output) float32.

  Without `norm_output` the last linear layer is the output, as in SimSiam's predictor.
  """

  hidden: tuple[int, ...]
  output: int
  dtype: Any = jnp.float32
  norm_output: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, '... B _'], mask: Mask) -> Float[Array, '... B _']:
    for index, width in enumerate((*self.hidden, self.output)):
      last = index == len(self.hidden)
      x = nn.Dense(width, use_bias=False, dtype=self.dtype, name=f'linear{index + 1}')(x)
      if last and not self.norm_output:
        return x.astype(jnp.float32)
      x = MaskedBatchNorm(affine=not last, name=f'norm{index + 1}')(x, mask)
      x = x if last else nn.relu(x)
    return x
