"""The vision transformer against a NumPy float64 one, and its cuts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from lwfedssl_jax.catalog import ENCODERS, VitTraits
from lwfedssl_jax.config_groups import ModelConfig
from lwfedssl_jax.models import make_encoder
from lwfedssl_jax.models.vit import Attention, make_vit, position_table

SIZE = VitTraits(width=8, depth=3, num_heads=2, mlp_ratio=2)


@pytest.fixture(scope='module')
def encoder():
  return make_vit(SIZE, image_size=8, patch_size=4)


@pytest.fixture(scope='module')
def params(encoder):
  """Parameters none of which is zero or one."""
  generator = np.random.default_rng(0)

  def draw(leaf):
    return 0.5 * generator.normal(size=leaf.shape).astype(np.float32)

  return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf)), jax.eval_shape(encoder.init, jax.random.key(0)))


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(1).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)


def block(params, index):
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[index], params['blocks'])


def layer_norm(p, x):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']


def dense(p, x):
  return x @ p['kernel'] + p['bias']


def numpy_embed(p, images):
  tokens = np.empty((len(images), 4, SIZE.width))
  for row in range(2):
    for column in range(2):
      patch = images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(len(images), -1).astype(np.float64)
      tokens[:, 2 * row + column] = dense(p['patch'], patch) + p['position'][2 * row + column]
  return tokens


def numpy_block(p, x):
  normed, size = layer_norm(p['norm1'], x), SIZE.width // SIZE.num_heads
  query, key, value = np.split(dense(p['attention']['qkv'], normed), 3, axis=-1)
  heads = []
  for head in range(SIZE.num_heads):
    own = np.s_[..., head * size : (head + 1) * size]
    weights = softmax(query[own] @ key[own].transpose(0, 2, 1) / np.sqrt(size), axis=-1)
    heads.append(weights @ value[own])
  x = x + dense(p['attention']['projection'], np.concatenate(heads, axis=-1))
  hidden = dense(p['mlp1'], layer_norm(p['norm2'], x))
  return x + dense(p['mlp2'], hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))))


def numpy_tokens(params, images, count):
  x = numpy_embed(jax.tree.map(np.float64, params['embedding']), images)
  for index in range(count):
    x = numpy_block(block(params, index), x)
  return x


def test_forward_is_numpy_s(encoder, params, images):
  tokens = encoder.blocks(params['blocks'], encoder.embed(params['embedding'], jnp.asarray(images)))
  expected = numpy_tokens(params, images, SIZE.depth)
  np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-4)
  pooled = encoder.pool(params['norm'], tokens)
  assert pooled.shape == (3, SIZE.width)
  np.testing.assert_allclose(pooled, layer_norm(params['norm'], expected).mean(1), rtol=1e-4, atol=1e-4)


def test_layer_norm_epsilon(encoder, params):
  """Tokens of size 1e-3 have a variance of the order of the epsilon, 1e-6; larger ones do not show it."""
  tokens = 1e-3 * np.random.default_rng(2).normal(size=(3, 4, SIZE.width)).astype(np.float32)
  one = jax.tree.map(lambda leaf: leaf[:1], params['blocks'])
  expected = numpy_block(block(params, 0), tokens.astype(np.float64))
  np.testing.assert_allclose(encoder.blocks(one, jnp.asarray(tokens)), expected, rtol=1e-3, atol=1e-4)
  expected = layer_norm(params['norm'], tokens.astype(np.float64)).mean(1)
  np.testing.assert_allclose(encoder.pool(params['norm'], jnp.asarray(tokens)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('count', range(4))
def test_prefix_and_the_rest_are_all_blocks(encoder, params, images, count):
  tokens = encoder.embed(params['embedding'], jnp.asarray(images))
  middle = jax.jit(encoder.prefix)(params['blocks'], tokens, count)  # the count is traced here
  np.testing.assert_allclose(middle, numpy_tokens(params, images, count), rtol=1e-4, atol=1e-4)
  if count < SIZE.depth:
    rest = jax.tree.map(lambda leaf: leaf[count:], params['blocks'])
    whole = encoder.blocks(params['blocks'], tokens)
    np.testing.assert_allclose(encoder.blocks(rest, middle), whole, rtol=1e-5, atol=1e-5)


def test_depth_leaves_out_the_blocks_above(encoder, params, images):
  tokens = encoder.embed(params['embedding'], jnp.asarray(images))
  with_depth = jax.jit(lambda blocks, depth: encoder.blocks(blocks, tokens, depth))
  gradient = jax.jit(jax.grad(lambda blocks, depth: (encoder.blocks(blocks, tokens, depth) ** 2).sum()))
  for depth in range(1, SIZE.depth + 1):
    first = jax.tree.map(lambda leaf, depth=depth: leaf[:depth], params['blocks'])
    expected = encoder.blocks(first, tokens)
    np.testing.assert_allclose(with_depth(params['blocks'], depth), expected, rtol=1e-5, atol=1e-5)
    for leaf in jax.tree.leaves(gradient(params['blocks'], depth)):
      np.testing.assert_array_equal(leaf[depth:], 0)
      assert all(np.abs(leaf[i]).max() > 0 for i in range(depth))


def test_the_only_block_may_be_absent(encoder, params, images):
  tokens = encoder.embed(params['embedding'], jnp.asarray(images))
  one = jax.tree.map(lambda leaf: leaf[1:2], params['blocks'])
  np.testing.assert_array_equal(encoder.blocks(one, tokens, 0), tokens)
  np.testing.assert_allclose(encoder.blocks(one, tokens, 1), encoder.blocks(one, tokens), rtol=1e-5, atol=1e-6)


def test_vit_tiny_has_the_paper_s_parameters():
  encoder = make_vit(ENCODERS['vit_tiny'], image_size=32, patch_size=4)
  shapes = jax.eval_shape(encoder.init, jax.random.key(0))
  leaves = jax.tree.leaves(shapes['blocks'])
  assert all(leaf.shape[0] == 12 for leaf in leaves)
  assert sum(int(np.prod(leaf.shape[1:])) for leaf in leaves) == 444_864
  assert shapes['embedding']['position'].shape == (64, 192)
  assert shapes['embedding']['patch']['kernel'].shape == (48, 192)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}
  assert (encoder.depth, encoder.width) == (12, 192)


def test_sines_and_cosines_of_column_and_row():
  """arXiv 2104.02057: 48 frequencies from 1 down to almost 1e-4 for each of the four."""
  table = position_table(3, 192)
  for row in range(3):
    for column in range(3):
      for place in range(48):
        angles = column / 10_000 ** (place / 48), row / 10_000 ** (place / 48)
        expected = [function(angle) for angle in angles for function in (np.sin, np.cos)]
        np.testing.assert_allclose(table[3 * row + column, place::48], expected, atol=1e-6)


@pytest.mark.parametrize('start', ['random', 'sincos'])
def test_position_table_starts_as_configured(start):
  config = ModelConfig(encoder='vit_micro', patch_size=4, position_init=start)
  table = np.asarray(make_encoder(config, 8).init(jax.random.key(0))['embedding']['position'])
  if start == 'sincos':
    np.testing.assert_array_equal(table, position_table(2, table.shape[1]))
  else:
    assert table.std() == pytest.approx(0.02, rel=0.25) and abs(table).max() < 0.05


def test_blocks_start_out_different(encoder):
  kernels = jax.jit(encoder.init)(jax.random.key(0))['blocks']['mlp1']['kernel']
  assert all(np.abs(kernels[i] - kernels[j]).max() > 0 for i in range(3) for j in range(i))


def test_bfloat16_keeps_float32_parameters_and_embeddings(params, images):
  encoder = make_vit(SIZE, image_size=8, patch_size=4, dtype=jnp.bfloat16)
  shapes = jax.eval_shape(encoder.init, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}
  tokens = encoder.embed(params['embedding'], jnp.asarray(images))
  assert tokens.dtype == jnp.bfloat16
  tokens = encoder.blocks(params['blocks'], encoder.prefix(params['blocks'], tokens, 0))
  assert tokens.dtype == jnp.bfloat16
  pooled = encoder.pool(params['norm'], tokens)
  assert pooled.dtype == jnp.float32
  expected = layer_norm(params['norm'], numpy_tokens(params, images, SIZE.depth)).mean(1)
  np.testing.assert_allclose(pooled, expected, atol=0.05)


def test_bfloat16_attention_keeps_scores_and_softmax_in_float32():
  """Scores near 256 differ by 1 where bfloat16 numbers lie 2 apart; queries, keys and values are exact in both."""
  tokens = np.random.default_rng(0).integers(-2, 3, (1, 8, 4)).astype(np.float32)
  tokens[..., 0] = 1
  scales = np.array([[32, 1, 1, 1], [16, 1, 1, 1], [1, 1, 1, 1]])  # of queries, keys and values

  def linear(kernel):
    return {'kernel': jnp.asarray(kernel, jnp.float32), 'bias': jnp.zeros(kernel.shape[1])}

  qkv = np.concatenate([np.diag(scale) for scale in scales], axis=1)
  params = {'qkv': linear(qkv), 'projection': linear(np.eye(4))}
  query, key, value = (tokens[0].astype(np.float64) * scale for scale in scales)
  scores = query @ key.T / 2
  assert scores.min() > 240 and (scores % 2 == 1).any() and (scores % 1 == 0.5).any()
  found = Attention(1, jnp.bfloat16).apply({'params': params}, jnp.asarray(tokens, jnp.bfloat16))
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(found[0], np.float64), softmax(scores, axis=-1) @ value, atol=0.02)
