"""Exports an encoder to PyTorch: safetensors with the names and layout of timm's VisionTransformer."""

import json
import os
from typing import Any

import numpy as np

from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.models.vit import LAYER_NORM_EPSILON
from lwfedssl_jax.pretrained import LoadedEncoder

# Ours, below a block -> timm's, below blocks.N.
_BLOCK_NAMES = {
    'norm1': 'norm1', 'norm2': 'norm2', 'attention/qkv': 'attn.qkv', 'attention/projection': 'attn.proj',
    'mlp1': 'mlp.fc1', 'mlp2': 'mlp.fc2'}


def _layer(name: str, params: Any) -> dict[str, np.ndarray]:
  """Renames a linear layer or norm; timm stores kernels as (out, in)."""
  if 'scale' in params:
    return {f'{name}.weight': np.asarray(params['scale']), f'{name}.bias': np.asarray(params['bias'])}
  return {f'{name}.weight': np.asarray(params['kernel']).T, f'{name}.bias': np.asarray(params['bias'])}


def _patch_weight(kernel: np.ndarray, patch_size: int) -> np.ndarray:
  """(p * p * C, D), pixels before channels -> a convolution's (D, C, p, p)."""
  return kernel.reshape(patch_size, patch_size, -1, kernel.shape[1]).transpose(3, 2, 0, 1)


def timm_tensors(loaded: LoadedEncoder) -> dict[str, np.ndarray]:
  """Returns {timm's name: float32 array}, a complete state dict."""
  params, patch = loaded.params, loaded.params['embedding']['patch']
  tensors = {
      'pos_embed': np.asarray(params['embedding']['position'])[None],
      'patch_embed.proj.weight': _patch_weight(np.asarray(patch['kernel']), loaded.config.model.patch_size),
      'patch_embed.proj.bias': np.asarray(patch['bias']),
      **_layer('norm', params['norm']),
  }
  for index in range(loaded.depth):
    for ours, theirs in _BLOCK_NAMES.items():
      layer = params['blocks']
      for part in ours.split('/'):
        layer = layer[part]
      tensors |= _layer(f'blocks.{index}.{theirs}', {name: leaf[index] for name, leaf in layer.items()})
  return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}


def timm_arguments(loaded: LoadedEncoder) -> dict[str, Any]:
  """Returns the arguments of timm.models.vision_transformer.VisionTransformer for the same encoder.

  timm's default for mean pooling normalizes after pooling; `fc_norm=False` selects our order, norm before mean.
  """
  model = loaded.config.model
  return {
      'img_size': model.image_size, 'patch_size': model.patch_size, 'in_chans': 3, 'num_classes': 0,
      'embed_dim': model.size.width, 'depth': loaded.depth, 'num_heads': model.size.num_heads,
      'mlp_ratio': model.size.mlp_ratio, 'qkv_bias': True, 'class_token': False, 'global_pool': 'avg',
      'fc_norm': False}


def export_encoder(loaded: LoadedEncoder, path: str) -> str:
  """Writes `path` (.safetensors) and, beside it, a JSON with architecture and normalization; returns the JSON's path.

  Raises:
    UsageError: the path does not end in .safetensors or cannot be written, or safetensors is not installed.
  """
  if not path.endswith('.safetensors'):
    raise UsageError(f'--output: expected a file name that ends in .safetensors, got {path!r}')
  try:
    from safetensors.numpy import save_file
  except ImportError as error:
    raise UsageError('--output: expected the package safetensors (pip install safetensors)') from error
  description = {
      'model': 'timm.models.vision_transformer.VisionTransformer',
      'arguments': timm_arguments(loaded),
      'normalization': {'mean': [0.5] * 3, 'std': [0.5] * 3, 'of': 'RGB pixels in [0, 1]'},
      'layer_norm_epsilon': LAYER_NORM_EPSILON,
      'rounds_done': loaded.rounds_done,
      'method': loaded.config.method.method,
      'dataset': loaded.config.data.dataset,
  }
  json_path = path.removesuffix('.safetensors') + '.json'
  try:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    save_file(timm_tensors(loaded), path + '.tmp', metadata={'format': 'pt'})
    os.replace(path + '.tmp', path)
    with open(json_path, 'w', encoding='utf-8') as file:
      json.dump(description, file, indent=2)
  except OSError as error:
    raise UsageError(f'--output: expected a path that can be written, {path}: {error.strerror}') from error
  return json_path
