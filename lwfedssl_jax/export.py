"""Takes an encoder to other libraries: safetensors, a ViT's with the names and layout of timm's VisionTransformer."""

import dataclasses
import json
import os

import jax
import numpy as np

from lwfedssl_jax import trees
from lwfedssl_jax.base import ExportedEncoder
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.pretrained import LoadedEncoder

NORMALIZATION = {'mean': [0.5] * 3, 'std': [0.5] * 3, 'of': 'RGB pixels in [0, 1]'}


def convert(loaded: LoadedEncoder) -> ExportedEncoder:
  """Names an encoder's tensors and describes its model: as the encoder does, or by the paths of its own tree.

  If the encoder defines no export, blocks stay stacked, and `arguments` are the fields of ModelConfig.
  """
  if loaded.encoder.export is not None:
    found = loaded.encoder.export(loaded.params)
  else:
    leaves = jax.tree_util.tree_leaves_with_path(loaded.params)
    found = ExportedEncoder(
      {trees.path_name(path): leaf for path, leaf in leaves},
      {
        'model': f'lwfedssl_jax, encoder {loaded.config.model.encoder}',
        'arguments': dataclasses.asdict(loaded.config.model),
      },
    )
  tensors = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in found.tensors.items()}
  return ExportedEncoder(tensors, found.description)


def save_tensors(tensors: dict[str, np.ndarray], path: str) -> None:
  """Writes a .safetensors file atomically. Raises OSError."""
  from safetensors.numpy import save_file

  save_file(tensors, f'{path}.tmp', metadata={'format': 'pt'})
  os.replace(f'{path}.tmp', path)


def export_encoder(loaded: LoadedEncoder, path: str) -> str:
  """Writes `path` (.safetensors) and, beside it, a JSON with architecture and normalization; returns the JSON's path.

  Raises:
    UsageError: the path does not end in .safetensors or cannot be written.
  """
  if not path.endswith('.safetensors'):
    raise UsageError(f'--output: expected a file name that ends in .safetensors, got {path!r}')
  tensors, built = convert(loaded)
  description = {
    **built,
    'normalization': NORMALIZATION,
    'rounds_done': loaded.rounds_done,
    'method': loaded.config.method.method,
    'dataset': loaded.config.data.dataset,
  }
  json_path = path.removesuffix('.safetensors') + '.json'
  try:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    save_tensors(tensors, path)
    with open(json_path, 'w', encoding='utf-8') as file:
      json.dump(description, file, indent=2)
  except OSError as error:
    raise UsageError(f'--output: expected a path that can be written, {path}: {error.strerror}') from error
  return json_path
