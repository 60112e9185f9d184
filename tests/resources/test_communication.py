"""Bytes: the paper's published numbers, and hand-computed examples."""

import jax
import jax.numpy as jnp
import pytest

from lwfedssl_jax import block_trees
from lwfedssl_jax.catalog import HEAD_HIDDEN, PROJECTION_SIZE
from lwfedssl_jax.config import Config, with_values
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.models import make_encoder
from lwfedssl_jax.models.heads import Head
from lwfedssl_jax.resources import communication as comm

TINY = {'encoder': 'vit_tiny'}


def configure(**values):
  return with_values(Config(), values)


def traffic(config, image_size=32, convention='paper_v4', **options):
  found = comm.stage_traffic(config, image_size, convention, **options)
  return sum(stage.download_bytes + stage.upload_bytes for stage in found)


# Parameters.


@pytest.mark.parametrize('encoder', ['vit_tiny', 'vit_micro'])
@pytest.mark.parametrize('objective', ['moco_v3', 'byol', 'simclr'])
def test_component_params_are_those_of_the_model(encoder, objective):
  config = configure(encoder=encoder, objective=objective)

  def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

  params = jax.eval_shape(make_encoder(config.model, 32).init, jax.random.key(0))
  depth = config.model.traits.depth
  expected = {'embedding': count(params['embedding'])}
  expected |= {block_trees.block_name(i): count(params['blocks']) // depth for i in range(depth)}
  expected['norm'] = count(params['norm'])
  heads = {'projector': Head((HEAD_HIDDEN, HEAD_HIDDEN), PROJECTION_SIZE)}
  if objective != 'simclr':
    heads['predictor'] = Head((HEAD_HIDDEN,), PROJECTION_SIZE)
  for name, head in heads.items():
    width = config.model.traits.width if name == 'projector' else PROJECTION_SIZE
    expected[name] = count(jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((2, width)), jnp.ones(2, bool)))
  assert comm.component_params(config, 32) == expected
  assert list(comm.component_params(config, 32)) == list(expected)
  assert comm.make_payload(config, 32).head_names == tuple(heads)


def test_block_of_vit_tiny_is_as_published():
  assert comm.component_params(configure(**TINY), 32)['block_00'] == 444_864


@pytest.mark.parametrize(
  ('image_size', 'patch_size', 'embedding'),
  [
    (32, 4, 48 * 192 + 192 + 64 * 192),
    (64, 4, 58_560),  # 48 * 192 + 192 + 256 * 192
    (128, 8, 86_208),  # 192 * 192 + 192 + 256 * 192
    (224, 16, 185_280),  # 768 * 192 + 192 + 196 * 192
  ],
)
def test_only_the_embedding_depends_on_the_image(image_size, patch_size, embedding):
  params = comm.component_params(configure(patch_size=patch_size, **TINY), image_size)
  small = comm.component_params(configure(**TINY), 32)
  assert params.pop('embedding') == embedding
  small.pop('embedding')
  assert params == small


def test_patch_size_must_divide_the_image():
  with pytest.raises(UsageError, match='--patch_size'):
    comm.component_params(configure(patch_size=5), 32)


# The paper's conventions.


@pytest.mark.parametrize(
  ('method', 'objective', 'published'),
  [
    ('end_to_end', 'moco_v3', 8.40),
    ('layerwise', 'moco_v3', 1.66),
    ('prog_fedssl', 'moco_v3', 5.04),
    ('end_to_end', 'byol', 8.40),
    ('layerwise', 'byol', 1.66),
    ('prog_fedssl', 'byol', 5.04),
    ('end_to_end', 'simclr', 8.03),
    ('layerwise', 'simclr', 1.29),
    ('prog_fedssl', 'simclr', 4.68),
  ],
)
def test_published_gigabytes(method, objective, published):
  total = traffic(configure(method=method, objective=objective, **TINY))
  assert total / comm.PAPER_GB_BYTES == pytest.approx(published, abs=0.01)
  assert isinstance(total, int)


@pytest.mark.parametrize(
  ('method', 'ratio'), [('lw_fedssl', 24 / 7.5), ('prog_fedssl', 24 / 13), ('layerwise', 24 / 2)]
)
@pytest.mark.parametrize('objective', ['moco_v3', 'byol', 'simclr'])
def test_ratios_of_the_first_versions(method, ratio, objective):
  total = {
    m: traffic(configure(method=m, objective=objective, **TINY), convention='paper_v1') for m in ('end_to_end', method)
  }
  assert total['end_to_end'] / total[method] == pytest.approx(ratio, rel=1e-12)


def test_published_ratios():
  """3.20 and 1.846 (v1-v3), and 5.07 and 1.67 (v4; within its rounding of 8.40 GB / 1.66 GB)."""

  def total(m, c):
    return traffic(configure(method=m, **TINY), convention=c)

  def ratio(m, c):
    return total('end_to_end', c) / total(m, c)

  assert round(ratio('lw_fedssl', 'paper_v1'), 2) == 3.20
  assert round(ratio('prog_fedssl', 'paper_v1'), 3) == 1.846
  assert round(ratio('prog_fedssl', 'paper_v4'), 2) == 1.67
  assert ratio('layerwise', 'paper_v4') == pytest.approx(5.07, abs=0.02)


@pytest.mark.parametrize(
  ('blocks_per_stage', 'total_bytes'),
  [
    # 2 directions * rounds * 4 bytes * (21,696 + 12 * 444,864 + stages * 757,120): norm and heads in every stage
    (1, 120 * (5_360_064 + 12 * 757_120)),
    (2, 240 * (5_360_064 + 6 * 757_120)),
    (3, 360 * (5_360_064 + 4 * 757_120)),
    (4, 480 * (5_360_064 + 3 * 757_120)),
    (6, 720 * (5_360_064 + 2 * 757_120)),
    (12, 1440 * (5_360_064 + 757_120)),
  ],
)
def test_blocks_per_stage(blocks_per_stage, total_bytes):
  config = configure(
    method='layerwise', blocks_per_stage=blocks_per_stage, rounds_per_stage=15 * blocks_per_stage, **TINY
  )
  assert traffic(config) == total_bytes
  assert len(comm.stage_traffic(config, 32, 'paper_v4')) == 12 // blocks_per_stage


def test_methods_agree_when_one_stage_has_all_blocks():
  totals = {
    traffic(configure(method=m, blocks_per_stage=12, rounds_per_stage=180, **TINY))
    for m in ('end_to_end', 'layerwise', 'lw_fedssl', 'prog_fedssl')
  }
  assert len(totals) == 1


@pytest.mark.parametrize(('image_size', 'patch_size'), [(64, 4), (128, 8), (224, 16)])
def test_a_larger_embedding_costs_as_often_as_it_travels(image_size, patch_size):
  extra = comm.component_params(configure(patch_size=patch_size, **TINY), image_size)['embedding'] - 21_696
  for method, rounds in (('end_to_end', 180), ('layerwise', 15), ('prog_fedssl', 180)):
    small = traffic(configure(method=method, **TINY))
    large = traffic(configure(method=method, patch_size=patch_size, **TINY), image_size)
    assert large - small == 2 * rounds * 4 * extra > 0


MICRO = {'encoder': 'vit_micro', 'objective': 'simclr', 'rounds_per_stage': 2}
# vit_micro at 16x16, patch 4, in parameters: embedding 48 * 64 + 64 + 16 * 64 = 4,160; block 12 * 64**2 + 13 * 64 =
# 49,984; norm 128; projector 64 * 512 + 512 * 512 + 512 * 256 + 4 * 512 = 428,032.


def test_worst_case_download():
  config = configure(method='layerwise', **MICRO)
  third = comm.stage_traffic(config, 16, 'paper_v4', worst_case_download=True)[2]
  assert third.round_downloads == {
    'embedding': 16_640,
    'block_00': 199_936,
    'block_01': 199_936,
    'block_02': 199_936,
    'norm': 512,
    'projector': 1_712_128,
  }
  assert third.round_uploads == {'block_02': 199_936, 'norm': 512, 'projector': 1_712_128}
  assert (third.download_bytes, third.upload_bytes) == (2 * 2_329_088, 2 * 1_912_576)
  sent = 2 * 4 * (4_160 + 4 * (49_984 + 128 + 428_032))
  received = 2 * 4 * (4 * (4_160 + 128 + 428_032) + 10 * 49_984)
  assert traffic(config, 16) == 2 * sent
  assert traffic(config, 16, worst_case_download=True) == sent + received


def test_worst_case_of_blocks_only_is_that_of_lw_fedssl():
  """Without calibration a client that downloads everything pays what calibration makes all clients pay."""
  worst = traffic(configure(method='layerwise', **TINY), 32, 'paper_v1', worst_case_download=True)
  assert worst == traffic(configure(method='lw_fedssl', **TINY), 32, 'paper_v1')


def test_unknown_convention():
  with pytest.raises(UsageError, match='--convention: expected one of paper_v4, paper_v1'):
    comm.stage_traffic(configure(), 32, 'actual')
