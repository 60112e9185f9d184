"""Vision transformer without class token, cut into embedding, stacked blocks and final norm.

Dosovitskiy et al. 2021 (arXiv 2010.11929), pre-norm; sizes of DeiT-Tiny (arXiv 2012.12877) as LW-FedSSL uses them
(arXiv 2401.11647): exact GELU, LayerNorm epsilon 1e-6, query-key-value bias, mean pooling after the final norm.
The position table is learned. Its initial values are random (timm) or 2-D sines and cosines (MoCo v3).
"""

import functools
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lwfedssl_jax.base import Array, Encoder, EncoderFlops, Float, Function, Key, Params, PartFlops
from lwfedssl_jax.catalog import VitTraits
from lwfedssl_jax.models.blocks import KEPT, BlockExecution, stack_blocks

LAYER_NORM_EPSILON = 1e-6
POSITION_DEVIATION = 0.02
CHANNELS = 3
KERNEL_INIT = nn.initializers.truncated_normal(0.02)


def position_table(grid: int, width: int) -> Float[np.ndarray, 'T D']:
  """Returns a table for grid * grid tokens, float32: sines and cosines of row and column, MoCo v3's frequencies."""
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
  def __call__(self, x: Float[Array, '... _']) -> Float[Array, '... _']:
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
  def __call__(self, images: Float[Array, 'B H W C']) -> Float[Array, 'B T D']:
    b, h, w, c = images.shape
    p = self.patch_size
    patches = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(b, (h // p) * (w // p), p * p * c)
    tokens = Linear(self.width, self.dtype, name='patch')(patches)
    random = nn.initializers.truncated_normal(POSITION_DEVIATION)

    def initial(key, shape):
      return jnp.asarray(position_table(h // p, self.width)) if self.sincos else random(key, shape)

    table = self.param('position', initial, tokens.shape[1:])
    return (tokens.astype(table.dtype) + table).astype(self.dtype)


class HeadsFirst(nn.Module):
  """Queries, keys and values of H heads of size E, (B, T, D) -> three (B, H, T, E): `Linear` by a product each."""

  num_heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> tuple[Float[Array, 'B H T E'], ...]:
    width, heads = x.shape[-1], self.num_heads
    kernel = self.param('kernel', KERNEL_INIT, (width, 3 * width))
    bias = self.param('bias', nn.initializers.zeros, (3 * width,)).reshape(3, heads, 1, width // heads)
    kernels = kernel.astype(self.dtype).reshape(width, 3, heads, width // heads)
    products = (jnp.einsum('btd,dhe->bhte', x.astype(self.dtype), kernels[:, i]) for i in range(3))
    return tuple((product.astype(bias.dtype) + bias[i]).astype(self.dtype) for i, product in enumerate(products))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def narrow_softmax(scores: Float[Array, '... T'], dtype: Any) -> Float[Array, '... T']:
  """Softmax over the last axis, computed in float32, the scores' dtype, and returned in `dtype`.

  The derivative is that of `jax.nn.softmax`, evaluated at what is returned. For the backward pass the forward pass
  stores that array only, which the weighted sum of the values stores too, and not a second one in float32.
  """
  return jax.nn.softmax(scores, axis=-1).astype(dtype)


def _narrow_softmax_forward(scores: Array, dtype: Any) -> tuple[Array, Array]:
  weights = checkpoint_name(narrow_softmax(scores, dtype), KEPT)
  return weights, weights


def _narrow_softmax_backward(dtype: Any, weights: Array, cotangent: Array) -> tuple[Array]:
  wide, cotangent = weights.astype(jnp.float32), cotangent.astype(jnp.float32)
  return (wide * (cotangent - (wide * cotangent).sum(axis=-1, keepdims=True)),)


narrow_softmax.defvjp(_narrow_softmax_forward, _narrow_softmax_backward)


def attend(
  q: Float[Array, 'B *TH E'], k: Float[Array, 'B *TH E'], v: Float[Array, 'B *TH E'], implementation: str
) -> Float[Array, 'B T H E']:
  """Attends over tokens, H heads of size E; the softmax is float32.

  Args:
    q: queries, (B, T, H, E); with `heads_first`, (B, H, T, E).
    k: keys, as q.
    v: values, as q.
    implementation: `plain`, `heads_first`, or one of `jax.nn.dot_product_attention`: `cudnn` is a fused kernel that
      never writes the (T, T) scores to memory, for GPUs in bfloat16.
  """
  if implementation not in ('plain', 'heads_first'):
    return jax.nn.dot_product_attention(q, k, v, implementation=cast(Literal['xla', 'cudnn'], implementation))
  query, key = ('bqhe', 'bkhe') if implementation == 'plain' else ('bhqe', 'bhke')
  scores = jnp.einsum(f'{query},{key}->bhqk', q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(scores, axis=-1) if scores.dtype == v.dtype else narrow_softmax(scores, v.dtype)
  return jnp.einsum(f'bhqk,{key}->bqhe', weights, v)


class Attention(nn.Module):
  """Multi-head self-attention, (B, T, D) -> (B, T, D); see `attend`."""

  num_heads: int
  dtype: Any
  implementation: str = 'plain'

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    b, t, d = x.shape

    def linear(width, name):
      return Linear(width, self.dtype, name=name)

    if self.implementation == 'heads_first':
      q, k, v = HeadsFirst(self.num_heads, self.dtype, name='qkv')(x)
    else:
      qkv = linear(3 * d, 'qkv')(x).reshape(b, t, 3, self.num_heads, d // self.num_heads)
      q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    attended = attend(q, k, v, self.implementation)
    return linear(d, 'projection')(attended.reshape(b, t, d))


@jax.custom_jvp
def gelu(x: Float[Array, '...']) -> Float[Array, '...']:
  """Exact GELU by erf, elementwise, float32 inside: 1 + erf(x) cancels for negative x, in bfloat16 visibly.

  The derivative is explicit, so that the forward pass stores one array for the backward pass, of x's dtype.
  `jax.nn.gelu` uses erfc, which takes twice the time on a CPU.
  """
  return _gelu_and_slope(x)[0]


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
  value, slope = _gelu_and_slope(*primals)
  return value, slope * tangents[0]


def _gelu_and_slope(x: Float[Array, '...']) -> tuple[Float[Array, '...'], Float[Array, '...']]:
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  cumulative = 0.5 * (1 + jax.lax.erf(wide * 0.5**0.5))
  density = jnp.exp(-0.5 * jnp.square(wide)) * (2 * np.pi) ** -0.5
  return (wide * cumulative).astype(x.dtype), (cumulative + wide * density).astype(x.dtype)


class Block(nn.Module):
  """Pre-norm transformer block, (B, T, D) -> (B, T, D)."""

  num_heads: int
  mlp_ratio: int
  dtype: Any
  attention: str = 'plain'

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    def norm(name):
      return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=self.dtype, name=name)

    def linear(width, name):
      return Linear(width, self.dtype, name=name)

    x = x + Attention(self.num_heads, self.dtype, self.attention, name='attention')(norm('norm1')(x))
    hidden = gelu(linear(self.mlp_ratio * x.shape[-1], 'mlp1')(norm('norm2')(x)))
    return x + linear(x.shape[-1], 'mlp2')(hidden)


def make_vit(
  size: VitTraits,
  image_size: int,
  patch_size: int,
  dtype: Any = jnp.float32,
  sincos: bool = False,
  execution: BlockExecution = BlockExecution(),
) -> Encoder:
  """Builds a vision transformer.

  Args:
    size: width, depth, heads and MLP expansion.
    image_size: side of the images, pixels, divisible by patch_size.
    patch_size: side of a patch, pixels.
    dtype: type of activations and products; parameters are float32.
    sincos: start the position table as sines and cosines.
    execution: of blocks that are differentiated.
  """
  embedding = Embedding(size.width, patch_size, dtype, sincos)
  block = Block(size.num_heads, size.mlp_ratio, dtype, execution.attention)
  norm = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32)
  apply_embedding: Function = embedding.apply
  apply_norm: Function = norm.apply
  apply_block: Function = block.apply
  stack = stack_blocks(
    lambda key: block.init(key, jnp.zeros((1, 1, size.width), dtype))['params'],
    lambda params, tokens: apply_block({'params': params}, tokens),
    size.depth,
    execution,
  )

  def init(key: Key) -> Params:
    images, token = jnp.zeros((1, image_size, image_size, CHANNELS)), jnp.zeros((1, 1, size.width), dtype)
    embedding_key, blocks_key, norm_key = (jax.random.fold_in(key, i) for i in range(3))
    return {
      'embedding': embedding.init(embedding_key, images)['params'],
      'blocks': stack.init(blocks_key),
      'norm': norm.init(norm_key, token)['params'],
    }

  def embed(params: Params, images: Float[Array, 'B H W C']) -> Float[Array, 'B T D']:
    return apply_embedding({'params': params}, images)

  def pool(params: Params, tokens: Float[Array, 'B T D']) -> Float[Array, 'B D']:
    return apply_norm({'params': params}, tokens.astype(jnp.float32)).mean(axis=1)

  return Encoder(
    init, embed, stack.prefix, stack.blocks, pool, size.depth, size.width, count_flops(size, image_size, patch_size)
  )


def count_flops(size: VitTraits, image_size: int, patch_size: int) -> EncoderFlops:
  """Counts the products of an image's forward pass: linear layers, attention scores, weighted sums of values."""
  tokens, width = (image_size // patch_size) ** 2, size.width
  linear = tokens * (4 + 2 * size.mlp_ratio) * width * width
  attention = 2 * tokens * tokens * width  # the same for any number of heads
  normalized = tokens * width
  return EncoderFlops(
    embedding=PartFlops(tokens * CHANNELS * patch_size**2 * width),
    blocks=(PartFlops(linear + attention, 2 * normalized),) * size.depth,
    pool=PartFlops(0, normalized),
  )
