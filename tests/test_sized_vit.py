"""Vision transformers by size: vit_small, and --encoder=vit."""

import json

import jax
import numpy as np
import pytest

from lwfedssl_jax import UsageError, catalog
from lwfedssl_jax import config as configs
from lwfedssl_jax.models import make_encoder, vit
from lwfedssl_jax.resources import costs, parameters
from lwfedssl_jax.stages import make_plans

SIZE = {'vit_width': 24, 'vit_depth': 3, 'vit_heads': 4, 'vit_mlp_ratio': 2}


def test_vit_small_is_deit_small_without_class_token():
  """timm's vit_small_patch16_224 without classifier has 21,665,664 parameters: ours, a class token and its position."""
  config = configs.configure(encoder='vit_small', patch_size=16)
  counts = parameters.component_params(config, 224)
  encoder = sum(count for name, count in counts.items() if name not in ('projector', 'predictor'))
  assert encoder + 384 + 384 == 21_665_664


def test_a_size_by_flags():
  config = configs.configure(encoder='vit', method='layerwise', rounds_per_stage=2, **SIZE)
  assert config.model.traits == catalog.VitTraits(width=24, depth=3, num_heads=4, mlp_ratio=2)
  assert len(make_plans(config)) == 3
  counts = parameters.component_params(config, 16)
  assert counts['block_02'] == (4 + 2 * 2) * 24**2 + (3 + 1 + 2 + 1 + 4) * 24
  cost = costs.method_cost(config, 16, 'paper_v4')
  block = 16 * 8 * 24**2 + 2 * 16**2 * 24 + 2 * 5 * 16 * 24
  first, second, _ = cost.stages
  # Over two rounds of three epochs: one block more forward, and the embedding not backward.
  assert second.flops - first.flops == 6 * (block - 2 * 16 * 48 * 24)
  assert second.upload_bytes['blocks'] == 2 * 4 * counts['block_01']


def test_default_size_is_vit_tiny():
  sized, tiny = (configs.configure(encoder=name).model.traits for name in ('vit', 'vit_tiny'))
  assert sized == tiny == catalog.ENCODERS['vit']


def test_an_export_names_its_size():
  config = configs.configure(encoder='vit', **SIZE)
  encoder = make_encoder(config.model, 8)
  params = jax.jit(encoder.init)(jax.random.key(0))
  exported = encoder.export(params)
  arguments = json.loads(json.dumps(exported.description))['arguments']
  assert (arguments['embed_dim'], arguments['depth'], arguments['num_heads'], arguments['mlp_ratio']) == (24, 3, 4, 2)
  assert exported.tensors['blocks.2.mlp.fc1.weight'].shape == (48, 24)
  jax.tree.map(np.testing.assert_array_equal, encoder.restore(exported.tensors), params)
  same = vit.make_vit(config.model.traits, 8, 4)
  images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
  tokens = [each.blocks(params['blocks'], each.embed(params['embedding'], images)) for each in (encoder, same)]
  assert tokens[0].shape == (2, 4, 24)
  np.testing.assert_array_equal(*tokens)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'encoder': 'vit_tiny', 'vit_depth': 6}, '--vit_depth: expected --encoder=vit with it, got vit_tiny'),
    ({'encoder': 'vit', 'vit_width': 100}, '--vit_width: expected a multiple of --vit_heads=3, got 100'),
    ({'encoder': 'vit', 'vit_depth': 5, 'blocks_per_stage': 2}, '--blocks_per_stage: expected a divisor of the 5'),
    ({'encoder': 'vit', 'vit_heads': 0}, '--vit_heads: expected at least 1'),
  ],
)
def test_sizes_that_make_no_sense(values, message):
  with pytest.raises(UsageError, match=message):
    configs.configure(**values)
