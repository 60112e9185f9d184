"""Normalization of feature maps: over the client's own batch, or over groups of channels of each image."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lwfedssl_jax.base import Array, Float, Mask
from lwfedssl_jax.models.heads import BATCH_NORM_EPSILON, masked_mean

STATISTICS = 'statistics'  # flax's collection of what a forward pass in training returns
MOMENTUM = 0.1  # weight of a batch in the running statistics
MOST_GROUPS = 32  # arXiv 1803.08494
GROUP_NORM_EPSILON = 1e-5

FeatureMaps = Float[Array, 'N _ _ _']


class BatchNorm(nn.Module):
  """Batch normalization of feature maps (arXiv 1502.03167), in float32.

  With a mask, as in training: by mean and biased variance of the valid samples, of each view alone; N is a multiple of
  the mask's length. The new running statistics are stored in the collection STATISTICS, after a step of size MOMENTUM
  per view, the variance unbiased, as PyTorch does. Without a mask: by the running statistics, which are parameters
  without gradient.
  """

  dtype: Any

  @nn.compact
  def __call__(self, x: FeatureMaps, mask: Mask | None = None) -> FeatureMaps:
    features = x.shape[-1:]
    scale = self.param('scale', nn.initializers.ones, features)
    bias = self.param('bias', nn.initializers.zeros, features)
    mean = jax.lax.stop_gradient(self.param('running_mean', nn.initializers.zeros, features))
    variance = jax.lax.stop_gradient(self.param('running_var', nn.initializers.ones, features))
    wide = x.astype(jnp.float32)
    if mask is None:
      # Averages of variances with privacy noise may be negative.
      normalized = (wide - mean) * jax.lax.rsqrt(jnp.maximum(variance, 0) + BATCH_NORM_EPSILON)
      return (normalized * scale + bias).astype(self.dtype)
    views = wide.reshape(-1, mask.shape[0], *x.shape[1:])
    means = masked_mean(views.mean((2, 3)), mask)  # (views, 1, C)
    centered = views - means[:, :, None, None]
    variances = masked_mean(jnp.square(centered).mean((2, 3)), mask)
    count = mask.sum() * (x.shape[1] * x.shape[2])
    unbiased = variances * (count / jnp.maximum(count - 1, 1))
    for index in range(len(views)):
      mean = (1 - MOMENTUM) * mean + MOMENTUM * means[index, 0]
      variance = (1 - MOMENTUM) * variance + MOMENTUM * unbiased[index, 0]
    self.put_variable(STATISTICS, 'running_mean', mean)
    self.put_variable(STATISTICS, 'running_var', variance)
    normalized = centered * jax.lax.rsqrt(variances + BATCH_NORM_EPSILON)[:, :, None, None]
    return (normalized * scale + bias).astype(self.dtype).reshape(x.shape)


class GroupNorm(nn.Module):
  """Normalization over groups of channels of an image (arXiv 1803.08494), in float32; no image affects another."""

  dtype: Any

  @nn.compact
  def __call__(self, x: FeatureMaps, mask: Mask | None = None) -> FeatureMaps:
    del mask
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
    bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
    num_groups = math.gcd(MOST_GROUPS, x.shape[-1])
    groups = x.astype(jnp.float32).reshape(len(x), -1, num_groups, x.shape[-1] // num_groups)
    centered = groups - groups.mean((1, 3), keepdims=True)
    variance = jnp.square(centered).mean((1, 3), keepdims=True)
    normalized = (centered * jax.lax.rsqrt(variance + GROUP_NORM_EPSILON)).reshape(x.shape)
    return (normalized * scale + bias).astype(self.dtype)


NORMS = {'batch': BatchNorm, 'group': GroupNorm}
