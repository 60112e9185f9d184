"""A vision transformer for PyTorch: names, layout and arguments of timm's VisionTransformer."""

from typing import Any

import numpy as np

from lwfedssl_jax.base import ExportedEncoder, Params
from lwfedssl_jax.catalog import VitTraits
from lwfedssl_jax.models.vit import CHANNELS, LAYER_NORM_EPSILON

TIMM_ARCHITECTURE = 'vit_tiny_patch16_224'  # any plain one: the arguments below replace all its sizes

# Ours, below a block -> timm's, below blocks.N.
_BLOCK_NAMES = {
  'norm1': 'norm1',
  'norm2': 'norm2',
  'attention/qkv': 'attn.qkv',
  'attention/projection': 'attn.proj',
  'mlp1': 'mlp.fc1',
  'mlp2': 'mlp.fc2',
}


def _layer(name: str, params: Any) -> dict[str, np.ndarray]:
  """Renames a linear layer or norm; timm keeps kernels as (out, in)."""
  if 'scale' in params:
    return {f'{name}.weight': np.asarray(params['scale']), f'{name}.bias': np.asarray(params['bias'])}
  return {f'{name}.weight': np.asarray(params['kernel']).T, f'{name}.bias': np.asarray(params['bias'])}


def _patch_weight(kernel: np.ndarray, patch_size: int) -> np.ndarray:
  """(p * p * C, D), pixels before channels -> a convolution's (D, C, p, p)."""
  return kernel.reshape(patch_size, patch_size, -1, kernel.shape[1]).transpose(3, 2, 0, 1)


def _tensors(depth: int, patch_size: int, params: Params) -> dict[str, np.ndarray]:
  patch = params['embedding']['patch']
  tensors = {
    'pos_embed': np.asarray(params['embedding']['position'])[None],
    'patch_embed.proj.weight': _patch_weight(np.asarray(patch['kernel']), patch_size),
    'patch_embed.proj.bias': np.asarray(patch['bias']),
    **_layer('norm', params['norm']),
  }
  for index in range(depth):
    for ours, theirs in _BLOCK_NAMES.items():
      layer = params['blocks']
      for part in ours.split('/'):
        layer = layer[part]
      tensors |= _layer(f'blocks.{index}.{theirs}', {name: leaf[index] for name, leaf in layer.items()})
  return tensors


def export_timm(size: VitTraits, image_size: int, patch_size: int, params: Params) -> ExportedEncoder:
  """Returns a complete state dict, and the arguments of its timm.models.vision_transformer.VisionTransformer.

  timm's default for mean pooling normalizes after the pooling; `fc_norm=False` keeps our order, norm then mean.

  Args:
    size: of the encoder.
    image_size: side of the images, pixels.
    patch_size: side of a patch, pixels.
    params: of the encoder; the model is as deep as they have blocks.
  """
  depth = len(params['blocks']['norm1']['scale'])
  arguments = {
    'img_size': image_size,
    'patch_size': patch_size,
    'in_chans': CHANNELS,
    'num_classes': 0,
    'embed_dim': size.width,
    'depth': depth,
    'num_heads': size.num_heads,
    'mlp_ratio': size.mlp_ratio,
    'qkv_bias': True,
    'class_token': False,
    'global_pool': 'avg',
    'fc_norm': False,
  }
  return ExportedEncoder(
    _tensors(depth, patch_size, params),
    {
      'model': 'timm.models.vision_transformer.VisionTransformer',
      'timm_architecture': TIMM_ARCHITECTURE,
      'arguments': arguments,
      'layer_norm_epsilon': LAYER_NORM_EPSILON,
      'first_conv': 'patch_embed.proj',
      'classifier': 'head',
    },
  )


def _own_layer(name: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Inverse of `_layer`."""
  weight, bias = tensors[f'{name}.weight'], tensors[f'{name}.bias']
  return {'scale': weight, 'bias': bias} if weight.ndim == 1 else {'kernel': weight.T, 'bias': bias}


def import_timm(tensors: dict[str, np.ndarray]) -> Params:
  """Returns the parameters of the tensors of `export_timm`. Raises KeyError if one is missing."""
  depth = 1 + max((int(name.split('.')[1]) for name in tensors if name.startswith('blocks.')), default=-1)
  blocks: dict[str, Any] = {}
  for ours, theirs in _BLOCK_NAMES.items():
    *parents, last = ours.split('/')
    place = blocks
    for part in parents:
      place = place.setdefault(part, {})
    layers = [_own_layer(f'blocks.{index}.{theirs}', tensors) for index in range(depth)]
    place[last] = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
  weight = tensors['patch_embed.proj.weight']
  patch = {
    'kernel': weight.transpose(2, 3, 1, 0).reshape(-1, len(weight)),
    'bias': tensors['patch_embed.proj.bias'],
  }
  return {
    'embedding': {'patch': patch, 'position': tensors['pos_embed'][0]},
    'blocks': blocks,
    'norm': _own_layer('norm', tensors),
  }
