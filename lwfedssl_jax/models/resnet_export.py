"""A residual network for PyTorch: names and layout of timm's ResNet, which are torchvision's."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lwfedssl_jax.base import ExportedEncoder, Params
from lwfedssl_jax.block_trees import block_name
from lwfedssl_jax.catalog import ResnetTraits
from lwfedssl_jax.models.resnet import CHANNELS

# Ours -> timm's, in the stem and in a unit.
_LAYERS = {
  'conv1': 'conv1',
  'norm1': 'bn1',
  'conv2': 'conv2',
  'norm2': 'bn2',
  'conv_shortcut': 'downsample.0',
  'norm_shortcut': 'downsample.1',
}
_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'running_mean': 'running_mean',
  'running_var': 'running_var',
}
RESNET18 = (2, 2, 2, 2)
TIMM_WIDTH = 64  # of timm's stem


def _places(params: Params) -> Iterator[tuple[Any, str]]:
  """Yields the layers of the stem and of each unit, with the prefix of their names in timm."""
  yield params['embedding'], ''
  for index in range(len(params['blocks'])):
    for number, unit in enumerate(sorted(params['blocks'][block_name(index)])):
      yield params['blocks'][block_name(index)][unit], f'layer{index + 1}.{number}.'


def export_timm(size: ResnetTraits, large_stem: bool, norm: str, params: Params) -> ExportedEncoder:
  """Returns a state dict, and what builds its timm.models.resnet.ResNet.

  timm has the large stem, the width 64 and all stages. Other encoders have its names, and the description says what
  differs.
  """
  tensors = {}
  for place, prefix in _places(params):
    for layer, leaves in place.items():
      for leaf, value in leaves.items():
        tensor = np.asarray(value)
        tensor = tensor.transpose(3, 2, 0, 1) if leaf == 'kernel' else tensor  # to (out, in, height, width)
        tensors[f'{prefix}{_LAYERS[layer]}.{_LEAVES[leaf]}'] = tensor
  arguments = {'num_classes': 0, 'in_chans': CHANNELS, 'global_pool': 'avg'}
  if norm == 'group':
    arguments['norm_layer'] = 'groupnorm'
  description = {
    'model': 'timm.models.resnet.ResNet',
    'arguments': arguments,
    'first_conv': 'conv1',
    'classifier': 'fc',
  }
  num_stages = len(params['blocks'])
  if large_stem and size.width == TIMM_WIDTH and size.units == RESNET18 and num_stages == size.depth:
    return ExportedEncoder(tensors, description | {'timm_architecture': 'resnet18'})
  stem = {} if large_stem else {'conv1': '3x3, stride 1, padding 1', 'maxpool': 'none'}
  differs = {'layers': size.units[:num_stages], 'channels': size.stage_widths[:num_stages], **stem}
  return ExportedEncoder(tensors, description | {'differs': differs})


def import_timm(tensors: dict[str, np.ndarray]) -> Params:
  """Returns the parameters of the tensors of `export_timm`. Raises KeyError for an unknown name."""
  layers = {theirs: ours for ours, theirs in _LAYERS.items()}
  params: Params = {'embedding': {}, 'blocks': {}, 'norm': {}}
  for name, tensor in tensors.items():
    path, leaf = name.rsplit('.', 1)
    place = params['embedding']
    if path.startswith('layer'):
      stage, unit, path = path.split('.', 2)
      place = params['blocks'].setdefault(block_name(int(stage.removeprefix('layer')) - 1), {})
      place = place.setdefault(f'unit{unit}', {})
    ours, value = ('kernel', tensor.transpose(2, 3, 1, 0)) if tensor.ndim == 4 else (leaf, tensor)
    place.setdefault(layers[path], {})['scale' if ours == 'weight' else ours] = value
  return params
