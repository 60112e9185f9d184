"""Heads: masked batch normalization against NumPy, padding, shapes, no biases."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax.config_groups import ObjectiveConfig
from lwfedssl_jax.models.heads import Head, MaskedBatchNorm, masked_mean
from lwfedssl_jax.objectives import make_objective

MASKS = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]]


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(2, 3, size=shape).astype(np.float32)


def oracle_norm(x, scale=1.0, bias=0.0):
  """x (B, F), valid samples only."""
  x = x.astype(np.float64)
  return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * scale + bias


def oracle_head(params, x, layers):
  for layer in range(1, layers + 1):
    x = x.astype(np.float64) @ np.asarray(params[f'linear{layer}']['kernel'], np.float64)
    norm = params.get(f'norm{layer}', {'scale': 1.0, 'bias': 0.0})
    x = oracle_norm(x, np.asarray(norm['scale']), np.asarray(norm['bias']))
    x = np.maximum(x, 0) if layer < layers else x
  return x


def shaken(params, seed=1):
  """Moves every parameter away from its initial value, so that a scale of one or a bias of zero hides nothing."""
  generator = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: leaf + 0.3 * generator.normal(size=leaf.shape).astype(np.float32), params)


@pytest.mark.parametrize('mask', MASKS)
def test_masked_mean(mask):
  x, mask = draw(2, 5, 3), np.array(mask, bool)
  found = masked_mean(jnp.asarray(x), jnp.asarray(mask))
  np.testing.assert_allclose(found, x[:, mask].mean(1, keepdims=True), rtol=1e-5)


def test_masked_mean_of_nothing_is_zero():
  np.testing.assert_array_equal(masked_mean(jnp.asarray(draw(2, 5, 3)), jnp.zeros(5, bool)), 0)


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('affine', [True, False])
def test_batch_norm_is_numpy_s_over_the_valid_samples_of_each_view(affine, mask):
  x, mask = draw(2, 5, 3), np.array(mask, bool)
  x[1] = 10 * x[1] + 4  # views of other statistics must not be mixed
  module = MaskedBatchNorm(affine=affine)
  params = shaken(module.init(jax.random.key(0), jnp.asarray(x), jnp.asarray(mask)).get('params', {}))
  assert set(params) == ({'scale', 'bias'} if affine else set())
  actual = module.apply({'params': params}, jnp.asarray(x), jnp.asarray(mask))
  for view in range(2):
    expected = oracle_norm(x[view][mask], params.get('scale', 1.0), params.get('bias', 0.0))
    np.testing.assert_allclose(actual[view][mask], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('mask', MASKS)
def test_head_is_numpy_s(mask):
  x, mask = draw(2, 5, 6), np.array(mask, bool)
  head = Head((7, 8), 4)
  params = shaken(head.init(jax.random.key(0), jnp.asarray(x), jnp.asarray(mask))['params'])
  actual = head.apply({'params': params}, jnp.asarray(x), jnp.asarray(mask))
  assert actual.shape == (2, 5, 4)
  for view in range(2):
    np.testing.assert_allclose(actual[view][mask], oracle_head(params, x[view][mask], 3), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('padding', [0.0, 1e3])
def test_padding_changes_neither_output_nor_gradients(padding):
  head, x = Head((7,), 4), jnp.asarray(draw(2, 3, 6))
  slots, mask = np.array([0, 2, 3]), np.array([1, 0, 1, 1, 0], bool)
  padded = np.full((2, 5, 6), padding, np.float32)
  padded[:, slots] = x
  params = shaken(head.init(jax.random.key(0), x, jnp.ones(3, bool))['params'])
  weights = draw(2, 3, 4, seed=5)

  def scalar(params, x, mask, slots):
    return (head.apply({'params': params}, x, mask)[:, slots] * weights).sum()

  value, gradients = jax.value_and_grad(scalar, argnums=(0, 1))(params, x, jnp.ones(3, bool), np.arange(3))
  padded_value, padded_gradients = jax.value_and_grad(scalar, argnums=(0, 1))(params, padded, jnp.asarray(mask), slots)
  np.testing.assert_allclose(padded_value, value, rtol=1e-5)

  def close(a, b):
    return np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)

  jax.tree.map(close, padded_gradients[0], gradients[0])
  close(padded_gradients[1][:, slots], gradients[1])
  np.testing.assert_array_equal(padded_gradients[1][:, ~mask], 0)


@pytest.mark.parametrize('mask', [[0, 0, 0], [0, 1, 0]])
def test_few_or_no_valid_samples_give_finite_gradients(mask):
  head, x = Head((7,), 4), jnp.asarray(draw(2, 3, 6))
  params = head.init(jax.random.key(0), x, jnp.ones(3, bool))['params']
  gradients = jax.grad(lambda p: (head.apply({'params': p}, x, jnp.array(mask, bool)) ** 2).sum())(params)
  chex.assert_tree_all_finite(gradients)


def test_bfloat16_products_float32_result():
  head, x = Head((7,), 4, jnp.bfloat16), jnp.asarray(draw(2, 5, 6))
  params = head.init(jax.random.key(0), x, jnp.ones(5, bool))['params']
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))

  def apply(params):
    return head.apply({'params': params}, x, jnp.ones(5, bool))

  assert apply(params).dtype == jnp.float32
  products = [equation for equation in jax.make_jaxpr(apply)(params).eqns if equation.primitive.name == 'dot_general']
  assert len(products) == 2
  assert {variable.aval.dtype for product in products for variable in product.invars} == {jnp.dtype('bfloat16')}


def test_statistics_of_a_bfloat16_batch_are_float32():
  """Of 301 in bfloat16, 300 is left: values near 300 lie 2 apart, and their mean lies between them."""
  x = jnp.asarray(300 + 2 * np.random.default_rng(0).integers(0, 3, (1, 5, 4)), jnp.bfloat16)
  actual = MaskedBatchNorm(affine=False).apply({}, x, jnp.ones(5, bool))
  np.testing.assert_allclose(actual[0], oracle_norm(np.asarray(x[0], np.float64)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('objective', ['moco_v3', 'byol', 'simclr'])
def test_paper_s_heads(objective):
  """H is 192-512-512-256 and P 256-512-256; linear layers have no bias, the last normalization no parameters."""
  built = make_objective(ObjectiveConfig(objective=objective))
  heads = jax.eval_shape(lambda key: built.init(key, 192), jax.random.key(0))
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(heads)
  }
  expected = {
    'projector/linear1/kernel': (192, 512),
    'projector/norm1/scale': (512,),
    'projector/norm1/bias': (512,),
    'projector/linear2/kernel': (512, 512),
    'projector/norm2/scale': (512,),
    'projector/norm2/bias': (512,),
    'projector/linear3/kernel': (512, 256),
  }
  if objective != 'simclr':
    expected |= {
      'predictor/linear1/kernel': (256, 512),
      'predictor/norm1/scale': (512,),
      'predictor/norm1/bias': (512,),
      'predictor/linear2/kernel': (512, 256),
    }
  assert shapes == expected
  assert set(built.head_names) == set(heads)
