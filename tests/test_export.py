"""The exported tensors, read by timm's names and formulas: by a NumPy transcription, and by timm itself where it is."""

import json
import pathlib

import jax
import numpy as np
import pytest
from scipy import special

from lwfedssl_jax import UsageError, export, pretrained
from lwfedssl_jax import config as configs

SIZE = 16


@pytest.fixture(scope='module')
def loaded():
  config = configs.with_values(configs.Config(), {'encoder': 'vit_micro', 'image_size': SIZE, 'patch_size': 4})
  made = pretrained.random_encoder(config, seed=0)

  def noise(path, leaf):
    return leaf + 0.05 * np.random.default_rng(len(str(path))).normal(size=leaf.shape).astype('f')

  return made._replace(params=jax.tree_util.tree_map_with_path(noise, made.params))  # biases and scales count too


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)


def normalized(images, description):
  statistics = description['normalization']
  return ((images / 255 - statistics['mean']) / statistics['std']).transpose(0, 3, 1, 2)  # NCHW


def vision_transformer(tensors, arguments, x):
  """timm's VisionTransformer.forward in float64 NumPy, without class token, mean-pooled after the norm."""
  tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

  def linear(name, x):
    return x @ tensors[f'{name}.weight'].T + tensors[f'{name}.bias']

  def norm(name, x):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * tensors[f'{name}.weight'] + tensors[f'{name}.bias']

  p, heads = arguments['patch_size'], arguments['num_heads']
  batch, channels, height, width = x.shape
  patches = x.reshape(batch, channels, height // p, p, width // p, p).transpose(0, 2, 4, 1, 3, 5)
  patches = patches.reshape(batch, -1, channels * p * p)
  weight = tensors['patch_embed.proj.weight']
  x = patches @ weight.reshape(len(weight), -1).T + tensors['patch_embed.proj.bias'] + tensors['pos_embed']
  for index in range(arguments['depth']):
    name = f'blocks.{index}'
    qkv = linear(f'{name}.attn.qkv', norm(f'{name}.norm1', x))
    q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).transpose(2, 0, 3, 1, 4)
    weights = special.softmax(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, axis=-1)
    x = x + linear(f'{name}.attn.proj', (weights @ v).swapaxes(1, 2).reshape(x.shape))
    hidden = linear(f'{name}.mlp.fc1', norm(f'{name}.norm2', x))
    x = x + linear(f'{name}.mlp.fc2', hidden * special.ndtr(hidden))
  return norm('norm', x).mean(1)


def test_exported_tensors_give_the_same_embeddings(loaded, images, tmp_path):
  from safetensors.numpy import load_file

  path = str(tmp_path / 'deep' / 'encoder.safetensors')
  description = json.loads(pathlib.Path(export.export_encoder(loaded, path)).read_text())
  found = vision_transformer(load_file(path), description['arguments'], normalized(images, description))
  expected = np.asarray(jax.jit(loaded.apply)(loaded.params, images))
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert np.abs(expected).max() > 0.1


def test_timm_loads_it_and_gives_the_same_embeddings(loaded, images, tmp_path):
  torch = pytest.importorskip('torch', reason='extra `torch` is not installed')
  transformers = pytest.importorskip('timm.models.vision_transformer', reason='timm is not installed')
  from safetensors.torch import load_file

  path = str(tmp_path / 'encoder.safetensors')
  description = json.loads(pathlib.Path(export.export_encoder(loaded, path)).read_text())
  model = transformers.VisionTransformer(**description['arguments']).eval()
  model.load_state_dict(load_file(path), strict=True)
  with torch.no_grad():
    found = model(torch.tensor(normalized(images, description), dtype=torch.float32)).numpy()
  np.testing.assert_allclose(found, np.asarray(loaded.apply(loaded.params, images)), atol=1e-5)


def test_the_model_is_described_as_it_was_exported(loaded, tmp_path):
  """A run that has reached three of four blocks; the order of norm and mean is ours, not timm's default."""
  blocks = jax.tree.map(lambda leaf: leaf[:3], loaded.params['blocks'])
  part = loaded._replace(params=dict(loaded.params, blocks=blocks), rounds_done=7)
  description = json.loads(pathlib.Path(export.export_encoder(part, str(tmp_path / 'part.safetensors'))).read_text())
  assert description['arguments'] == {
    'img_size': SIZE,
    'patch_size': 4,
    'in_chans': 3,
    'num_classes': 0,
    'embed_dim': 64,
    'depth': 3,
    'num_heads': 2,
    'mlp_ratio': 4,
    'qkv_bias': True,
    'class_token': False,
    'global_pool': 'avg',
    'fc_norm': False,
  }
  assert {name: description[name] for name in ('rounds_done', 'method', 'dataset', 'layer_norm_epsilon')} == {
    'rounds_done': 7,
    'method': part.config.method.method,
    'dataset': part.config.data.dataset,
    'layer_norm_epsilon': 1e-6,
  }
  assert {name.split('.')[1] for name in export.convert(part).tensors if name.startswith('blocks')} == {'0', '1', '2'}


def test_random_weights_follow_the_seed(loaded):
  kernels = [
    np.asarray(pretrained.random_encoder(loaded.config, seed).params['embedding']['patch']['kernel'])
    for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(kernels[0], kernels[1])
  assert (kernels[0] == kernels[2]).mean() < 0.01


def test_pixels_may_be_floats_too(loaded, images):
  whole = loaded.apply(loaded.params, images)
  np.testing.assert_allclose(loaded.apply(loaded.params, images / np.float32(255)), whole, atol=1e-5)


def test_output_must_be_a_safetensors_file(loaded, tmp_path):
  with pytest.raises(UsageError, match=r'--output: expected a file name that ends in \.safetensors'):
    export.export_encoder(loaded, str(tmp_path / 'encoder.bin'))
  (tmp_path / 'file').write_text('')
  with pytest.raises(UsageError, match='--output: expected a path that can be written'):
    export.export_encoder(loaded, str(tmp_path / 'file' / 'encoder.safetensors'))
