"""Residual network of basic units (arXiv 1512.03385), cut into its stem and its stages, each of which is a block.

Layers and initial weights are torchvision's: padded 3x3 convolutions without bias, He's normal initialization by fan
out, strides in the first unit of a stage. A stage doubles the width of the one below and halves the side.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lwfedssl_jax.base import Array, Encoder, EncoderFlops, Float, Function, Key, Mask, Params, PartFlops
from lwfedssl_jax.block_trees import adapter_name, block_name
from lwfedssl_jax.catalog import ResnetTraits
from lwfedssl_jax.models import blocks
from lwfedssl_jax.models.blocks import BlockExecution
from lwfedssl_jax.models.normalization import NORMS, STATISTICS, FeatureMaps

CHANNELS = 3
KERNEL_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
ADAPTER_INIT = nn.initializers.lecun_normal()


def convolution(width: int, side: int, stride: int, dtype: Any, name: str) -> nn.Conv:
  """Returns a square convolution without bias, padded by half of its side."""
  padding = ((side // 2, side // 2),) * 2
  return nn.Conv(
    width,
    (side, side),
    (stride, stride),
    padding,
    use_bias=False,
    dtype=dtype,
    kernel_init=KERNEL_INIT,
    name=name,
  )


class Stem(nn.Module):
  """Images -> feature maps: 3x3 and stride 1; or `large`, 7x7 and stride 2, then a 3x3 maximum with stride 2."""

  width: int
  large: bool
  norm: str
  dtype: Any

  @nn.compact
  def __call__(self, x: FeatureMaps, mask: Mask | None = None) -> FeatureMaps:
    side, stride = (7, 2) if self.large else (3, 1)
    x = convolution(self.width, side, stride, self.dtype, 'conv1')(x)
    x = nn.relu(NORMS[self.norm](self.dtype, name='norm1')(x, mask))
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if self.large else x


class Unit(nn.Module):
  """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where width or side change."""

  width: int
  stride: int
  norm: str
  dtype: Any

  @nn.compact
  def __call__(self, x: FeatureMaps, mask: Mask | None = None) -> FeatureMaps:
    def convolve(x, side, stride, number):
      x = convolution(self.width, side, stride, self.dtype, f'conv{number}')(x)
      return NORMS[self.norm](self.dtype, name=f'norm{number}')(x, mask)

    hidden = nn.relu(convolve(x, 3, self.stride, 1))
    hidden = convolve(hidden, 3, 1, 2)
    if x.shape[-1] != self.width or self.stride != 1:
      x = convolve(x, 1, self.stride, '_shortcut')
    return nn.relu(hidden + x)


class Stage(nn.Module):
  """Units of one width, the first of which has the stride."""

  width: int
  stride: int
  num_units: int
  norm: str
  dtype: Any

  @nn.compact
  def __call__(self, x: FeatureMaps, mask: Mask | None = None) -> FeatureMaps:
    for index in range(self.num_units):
      stride = self.stride if index == 0 else 1
      x = Unit(self.width, stride, self.norm, self.dtype, name=f'unit{index}')(x, mask)
    return x


def stage_strides(size: ResnetTraits) -> tuple[int, ...]:
  """Returns the stride of each stage."""
  return (1, *(2,) * (size.depth - 1))


def make_resnet(
  size: ResnetTraits,
  image_size: int,
  large_stem: bool,
  norm: str = 'batch',
  dtype: Any = jnp.float32,
  execution: BlockExecution = BlockExecution(),
) -> Encoder:
  """Builds a residual network.

  Args:
    size: width and units of the stages.
    image_size: side of the images, pixels.
    large_stem: see Stem.
    norm: a name of NORMS.
    dtype: type of activations and products; parameters are float32.
    execution: of blocks that are differentiated.
  """
  stem = Stem(size.width, large_stem, norm, dtype)
  stages = {
    block_name(i): Stage(size.stage_widths[i], stride, size.units[i], norm, dtype)
    for i, stride in enumerate(stage_strides(size))
  }
  output_width = size.stage_widths[-1]

  def run(module: nn.Module, params: Params, x: Array, mask: Mask) -> tuple[Array, Params]:
    apply: Function = module.apply
    x, statistics = apply({'params': params}, x, mask, mutable=[STATISTICS])
    return x, statistics.get(STATISTICS, {})

  def run_stage(name: str, params: Params, x: Array, mask: Mask) -> tuple[Array, Params]:
    run_block: Function = blocks.rematerialize(lambda *given: run(stages[name], *given), execution)
    return run_block(params, x, mask)

  def init(key: Key) -> Params:
    stem_key, blocks_key, adapters_key = (jax.random.fold_in(key, i) for i in range(3))
    x = jnp.zeros((1, image_size, image_size, CHANNELS), dtype)
    params: Params = {'embedding': stem.init(stem_key, x)['params'], 'blocks': {}, 'norm': {}, 'adapters': {}}
    x = jnp.zeros((1, 1, 1, size.width), dtype)
    for i, (name, stage) in enumerate(stages.items()):
      params['blocks'][name] = stage.init(jax.random.fold_in(blocks_key, i), x)['params']
      x = jnp.zeros((1, 1, 1, size.stage_widths[i]), dtype)
    for i in range(size.num_adapters):
      shape = (size.stage_widths[i], output_width)
      kernel = ADAPTER_INIT(jax.random.fold_in(adapters_key, i), shape)
      params['adapters'][adapter_name(i)] = {'kernel': kernel, 'bias': jnp.zeros(output_width)}
    return params

  def embed(params: Params, images: Array) -> Array:
    apply: Function = stem.apply
    return apply({'params': params}, images)

  def apply_blocks(params: Params, x: Array, stop: Any = None) -> Array:
    del stop  # they are those below it
    for name in sorted(params):
      apply: Function = stages[name].apply
      x = apply({'params': params[name]}, x)
    return x

  def pool(params: Params, x: Array) -> Float[Array, 'B _']:
    del params
    return x.astype(jnp.float32).mean((1, 2))

  def train(active: Params, x: Array, mask: Mask, stop: Any = None) -> tuple[Float[Array, 'N _'], Params]:
    del stop
    statistics: Params = {'blocks': {}}
    if 'embedding' in active:
      x, statistics['embedding'] = run(stem, active['embedding'], x, mask)
    for name in sorted(active['blocks']):
      x, statistics['blocks'][name] = run_stage(name, active['blocks'][name], x, mask)
    pooled = pool({}, x)
    for layer in active.get('adapters', {}).values():
      pooled = pooled @ layer['kernel'] + layer['bias']
    return pooled, statistics

  flops = count_flops(size, image_size, large_stem)
  return Encoder(init, embed, apply_blocks, apply_blocks, pool, size.depth, output_width, flops, train=train)


def count_flops(size: ResnetTraits, image_size: int, large_stem: bool) -> EncoderFlops:
  """Counts the products of an image's forward pass: convolutions, with their padding."""

  def halve(side):
    return (side + 1) // 2

  side = halve(image_size) if large_stem else image_size
  stem = side**2 * (7 if large_stem else 3) ** 2 * CHANNELS * size.width
  side, below, stages = halve(side) if large_stem else side, size.width, []
  for width, units, stride in zip(size.stage_widths, size.units, stage_strides(size)):
    side = side if stride == 1 else halve(side)
    entry = 9 * below * width + (below * width if stride != 1 or below != width else 0)
    products = side**2 * (entry + (2 * units - 1) * 9 * width * width)
    stages.append(PartFlops(products, input_products=side**2 * entry))
    below = width
  return EncoderFlops(PartFlops(stem), tuple(stages), PartFlops(0))
