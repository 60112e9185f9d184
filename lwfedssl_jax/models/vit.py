"""Vision transformer without class token, cut into embedding, stacked blocks and final norm.

Dosovitskiy et al. 2021 (arXiv 2010.11929), pre-norm; sizes of DeiT-Tiny (arXiv 2012.12877) as LW-FedSSL uses them
(arXiv 2401.11647): exact GELU, LayerNorm epsilon 1e-6, query-key-value bias, mean pooling after the final norm.
The position table is learned. Its initial values are random (timm) or 2-D sines and cosines (MoCo v3).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lwfedssl_jax.base import Encoder, Key, Params
from lwfedssl_jax.catalog import EncoderSize
from lwfedssl_jax.config import ModelConfig

LAYER_NORM_EPSILON = 1e-6
POSITION_DEVIATION = 0.02
KERNEL_INIT = nn.initializers.truncated_normal(0.02)


def position_table(grid: int, width: int) -> np.ndarray:
  """Returns (grid * grid, width) float32: sines and cosines of row and column, MoCo v3's frequencies."""
  quarter = (width + 3) // 4
  frequency = 1.0 / 10_000 ** (np.arange(quarter) / quarter)
  angle = np.arange(grid)[:, None] * frequency
  rows, columns = np.repeat(angle, grid, axis=0), np.tile(angle, (grid, 1))
  table = np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], axis=1)
  return table[:, :width].astype(np.float32)


class Linear(nn.Module):
  """Affine map of the last axis, (..., D) -> (..., width), as one two-dimensional product.

  With flattened batch axes the weight gradient is one matrix product too, which takes a quarter less processor time
  for a block's backward pass (docs/performance.md). The bias is added in float32, so that its gradient, a sum over all
  tokens, is computed in float32 (docs/architecture.md).
  """

  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', KERNEL_INIT, (x.shape[-1], self.width))
    bias = self.param('bias', nn.initializers.zeros, (self.width,))
    product = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel.astype(self.dtype)
    return (product.astype(bias.dtype) + bias).astype(self.dtype).reshape(*x.shape[:-1], self.width)


class Embedding(nn.Module):
  """Patch projection and position table: (B, H, W, C) -> (B, T, D)."""

  width: int
  patch_size: int
  dtype: Any
  sincos: bool = False

  @nn.compact
  def __call__(self, images):
    b, h, w, c = images.shape
    p = self.patch_size
    patches = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(b, (h // p) * (w // p), p * p * c)
    tokens = Linear(self.width, self.dtype, name='patch')(patches)
    random = nn.initializers.truncated_normal(POSITION_DEVIATION)
    initial = lambda key, shape: jnp.asarray(position_table(h // p, self.width)) if self.sincos else random(key, shape)
    table = self.param('position', initial, tokens.shape[1:])
    return (tokens.astype(table.dtype) + table).astype(self.dtype)


class Attention(nn.Module):
  """Multi-head self-attention, (B, T, D) -> (B, T, D); the softmax is float32."""

  num_heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    b, t, d = x.shape
    linear = lambda width, name: Linear(width, self.dtype, name=name)
    qkv = linear(3 * d, 'qkv')(x).reshape(b, t, 3, self.num_heads, d // self.num_heads)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = jnp.einsum('bqhe,bkhe->bhqk', q * (d // self.num_heads) ** -0.5, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
    return linear(d, 'projection')(jnp.einsum('bhqk,bkhe->bqhe', weights, v).reshape(b, t, d))


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU by erf, elementwise, float32 inside: 1 + erf(x) cancels for negative x, in bfloat16 visibly.

  The derivative is explicit, so that the forward pass stores one array for the backward pass, of x's dtype.
  `jax.nn.gelu` uses erfc, which takes twice the time on a CPU.
  """
  return _gelu_and_slope(x)[0]


@gelu.defjvp
def _gelu_jvp(primals, tangents):
  value, slope = _gelu_and_slope(*primals)
  return value, slope * tangents[0]


def _gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  cumulative = 0.5 * (1 + jax.lax.erf(wide * 0.5**0.5))
  density = jnp.exp(-0.5 * jnp.square(wide)) * (2 * np.pi) ** -0.5
  return (wide * cumulative).astype(x.dtype), (cumulative + wide * density).astype(x.dtype)


class Block(nn.Module):
  """Pre-norm transformer block, (B, T, D) -> (B, T, D)."""

  num_heads: int
  mlp_ratio: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    norm = lambda name: nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=self.dtype, name=name)
    linear = lambda width, name: Linear(width, self.dtype, name=name)
    x = x + Attention(self.num_heads, self.dtype, name='attention')(norm('norm1')(x))
    hidden = gelu(linear(self.mlp_ratio * x.shape[-1], 'mlp1')(norm('norm2')(x)))
    return x + linear(x.shape[-1], 'mlp2')(hidden)


def make_vit(
    size: EncoderSize, image_size: int, patch_size: int, dtype: Any = jnp.float32, sincos: bool = False,
    rematerialize: str = 'none') -> Encoder:
  """Builds a vision transformer.

  Args:
    size: width, depth, heads and MLP expansion.
    image_size: side of the images, pixels, divisible by patch_size.
    patch_size: side of a patch, pixels.
    dtype: type of activations and products; parameters are float32.
    sincos: initialize the position table with sines and cosines.
    rematerialize: activation checkpointing of differentiated blocks: 'none'; 'elementwise' (store the results of matrix
      products, recompute the rest); 'all' (store the block's input only).
  """
  embedding = Embedding(size.width, patch_size, dtype, sincos)
  block = Block(size.num_heads, size.mlp_ratio, dtype)
  norm = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32)

  def init(key: Key) -> Params:
    images, token = jnp.zeros((1, image_size, image_size, 3)), jnp.zeros((1, 1, size.width), dtype)
    embedding_key, blocks_key, norm_key = (jax.random.fold_in(key, i) for i in range(3))
    block_keys = jax.vmap(lambda i: jax.random.fold_in(blocks_key, i))(jnp.arange(size.depth))
    return {
        'embedding': embedding.init(embedding_key, images)['params'],
        'blocks': jax.vmap(lambda k: block.init(k, token)['params'])(block_keys),
        'norm': norm.init(norm_key, token)['params'],
    }

  def embed(params, images):
    return embedding.apply({'params': params}, images)

  def apply_block(params, tokens):
    return block.apply({'params': params}, tokens)

  def prefix(stacked, tokens, count):
    body = lambda i, x: apply_block(jax.tree.map(lambda leaf: leaf[i], stacked), x)
    return jax.lax.fori_loop(0, count, body, tokens)

  run_block = apply_block
  if rematerialize != 'none':
    policies = jax.checkpoint_policies
    kept = {'elementwise': policies.dots_saveable, 'all': policies.nothing_saveable}[rematerialize]
    run_block = jax.checkpoint(apply_block, policy=kept)

  def blocks(stacked, tokens, depth=None):
    def body(x, scanned):
      params, index = scanned
      if depth is None:
        return run_block(params, x), None
      return jax.lax.cond(index < depth, run_block, lambda _, y: y, params, x), None

    length = jax.tree.leaves(stacked)[0].shape[0]
    if length == 1 and depth is None:
      return run_block(jax.tree.map(lambda leaf: leaf[0], stacked), tokens)
    return jax.lax.scan(body, tokens, (stacked, jnp.arange(length)))[0]

  def pool(params, tokens):
    return norm.apply({'params': params}, tokens.astype(jnp.float32)).mean(axis=1)

  return Encoder(init, embed, prefix, blocks, pool, size.depth, size.width)


@functools.lru_cache(maxsize=16)
def make_encoder(config: ModelConfig, image_size: int, *, rematerialize: str = 'none') -> Encoder:
  """Builds the configured encoder for images of a given side, in pixels."""
  return make_vit(
      config.size, image_size, config.patch_size, jnp.dtype(config.compute_dtype),
      sincos=config.position_init == 'sincos', rematerialize=rematerialize)
