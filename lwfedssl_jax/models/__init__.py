"""Encoders by name: what an image becomes; whoever trains one knows it as an `Encoder` alone."""

import functools
from collections.abc import Callable

import jax.numpy as jnp

from lwfedssl_jax.base import Encoder
from lwfedssl_jax.catalog import ENCODERS, EncoderTraits, ResnetTraits, VitTraits
from lwfedssl_jax.config_groups import ModelConfig
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.models import blocks, resnet, resnet_export, vit, vit_export
from lwfedssl_jax.models.blocks import BlockExecution

Builder = Callable[[ModelConfig, int, BlockExecution], Encoder]


def build_vit(config: ModelConfig, image_size: int, execution: BlockExecution) -> Encoder:
  """Builds the vision transformer of a configuration; exported, it has timm's names."""
  size = config.traits
  if not isinstance(size, VitTraits):
    raise TypeError(f'{config.encoder} is no vision transformer')
  encoder = vit.make_vit(
    size,
    image_size,
    config.patch_size,
    jnp.dtype(config.compute_dtype),
    sincos=config.position_init == 'sincos',
    execution=execution,
  )
  export = functools.partial(vit_export.export_timm, size, image_size, config.patch_size)
  return encoder._replace(export=export, restore=vit_export.import_timm)


def build_resnet(config: ModelConfig, image_size: int, execution: BlockExecution) -> Encoder:
  """Builds the residual network of a configuration; exported, it has timm's names."""
  size = config.traits
  if not isinstance(size, ResnetTraits):
    raise TypeError(f'{config.encoder} is no residual network')
  large_stem, dtype = config.has_large_stem(image_size), jnp.dtype(config.compute_dtype)
  encoder = resnet.make_resnet(size, image_size, large_stem, config.norm, dtype, execution)
  export = functools.partial(resnet_export.export_timm, size, large_stem, config.norm)
  return encoder._replace(export=export, restore=resnet_export.import_timm)


# (configuration, side of the images in pixels, execution of blocks) -> encoder
_OF_TRAITS: dict[type, Builder] = {VitTraits: build_vit, ResnetTraits: build_resnet}
BUILDERS: dict[str, Builder] = {name: _OF_TRAITS[type(traits)] for name, traits in ENCODERS.items()}


def register_encoder(name: str, traits: EncoderTraits, builder: Builder) -> None:
  """Adds an encoder under a new name, before a configuration or flags name it (docs/extending.md).

  Raises:
    UsageError: the name is taken.
  """
  if name in ENCODERS:
    raise UsageError(f'--encoder: expected a new name, {name!r} is taken')
  ENCODERS[name], BUILDERS[name] = traits, builder


def make_encoder(config: ModelConfig, image_size: int, execution: BlockExecution = BlockExecution()) -> Encoder:
  """Builds the configured encoder for images of a given side, in pixels.

  Raises:
    UsageError: it takes no images of that side.
  """
  config.check_image_size(image_size, f'the image size {image_size}')
  encoder = BUILDERS[config.encoder](config, image_size, execution)
  return encoder if encoder.train else encoder._replace(train=blocks.compose(encoder))
