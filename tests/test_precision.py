"""What is computed in float32 where bfloat16 or a backend's default would decide differently."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from lwfedssl_jax.evaluation import knn
from lwfedssl_jax.models import vit
from lwfedssl_jax.models.blocks import BlockExecution, rematerialize
from lwfedssl_jax.objectives import losses

BFLOAT16 = jnp.bfloat16


def product_precisions(function, *arguments):
  """Returns the precision of every matrix product in the lowered program."""
  text = jax.jit(function).lower(*arguments).as_text()
  products = re.findall(r'stablehlo\.dot_general[^\n]*', text)
  assert products
  return {tuple(re.findall(r'DEFAULT|HIGHEST|HIGH', product)) for product in products}


ROWS, MASK = jnp.ones((4, 8)), jnp.ones(4, bool)


@pytest.mark.parametrize(
  'function',
  [
    lambda x: losses.info_nce(x, x, 0.05, MASK),
    lambda x: losses.nt_xent(jnp.stack([x, x]), 0.05, MASK),
    jax.grad(lambda x: losses.info_nce(x, x, 0.05, MASK)),
    lambda x: knn._votes(x, jnp.zeros(4, int), x, 2, 3),
  ],
  ids=['info_nce', 'nt_xent', 'gradient', 'knn'],
)
def test_similarities_ask_for_float32_products(function):
  assert product_precisions(function, ROWS) == {('HIGHEST', 'HIGHEST')}


@pytest.mark.parametrize(('default', 'expected'), [(None, 'DEFAULT'), ('float32', 'HIGHEST')])
def test_products_of_a_block_follow_the_default_of_jax(default, expected):
  block, tokens = vit.Block(2, 2, jnp.float32), jnp.ones((1, 4, 8))
  params = block.init(jax.random.key(0), tokens)
  with jax.default_matmul_precision(default):
    found = product_precisions(jax.grad(lambda x: block.apply(params, x).sum()), tokens)
  assert {names or ('DEFAULT', 'DEFAULT') for names in found} == {(expected, expected)}


def test_gelu_in_bfloat16_is_exact_to_its_rounding():
  """1 + erf(x) cancels for negative x; in bfloat16 that costs 8.5 times the rounding error."""
  x = jnp.linspace(-4, -1, 3001).astype(BFLOAT16)
  wide = np.asarray(x, np.float64)
  cumulative = special.ndtr(wide)
  slope = cumulative + wide * np.exp(-(wide**2) / 2) / np.sqrt(2 * np.pi)

  def rms(found, exact):
    return np.sqrt(np.mean((np.asarray(found, np.float64) - exact) ** 2))

  assert vit.gelu(x).dtype == BFLOAT16
  assert rms(vit.gelu(x), wide * cumulative) < 1.2e-4  # by erf in bfloat16: 1.3e-3; jax.nn.gelu: 1.5e-4
  assert rms(jax.vmap(jax.grad(vit.gelu))(x), slope) < 1.3e-4  # differentiated in bfloat16: 8.4e-4


def test_gelu_and_its_derivative_in_float32():
  x = np.linspace(-6, 6, 1001)
  exact = x * special.ndtr(x)
  np.testing.assert_allclose(vit.gelu(jnp.float32(x)), exact, rtol=1e-6, atol=1e-6)
  slope = special.ndtr(x) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
  np.testing.assert_allclose(jax.vmap(jax.grad(vit.gelu))(jnp.float32(x)), slope, rtol=1e-6, atol=1e-6)


def attend_by_jax(q, k, v):
  scores = jnp.einsum('bhqe,bhke->bhqk', q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
  return jnp.einsum('bhqk,bhke->bqhe', jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def test_attention_in_bfloat16_keeps_no_float32_weights():
  """The gradient is as near to float32's as that of jax's softmax, which keeps float32 weights for it."""
  wide = jax.random.normal(jax.random.key(0), (4, 2, 3, 16, 8))
  q, k, v = narrow = (2 * wide[:3]).astype(BFLOAT16)
  cotangent = wide[3].swapaxes(1, 2)

  def gradient(attend, rows):
    return jax.grad(lambda rows: (attend(*rows) * cotangent.astype(rows.dtype)).sum())(rows)

  def attend(q, k, v):
    return vit.attend(q, k, v, 'heads_first')

  weights = (2, 3, 16, 16)
  kept = {leaf.dtype for leaf in jax.tree.leaves(jax.vjp(attend, q, k, v)[1]) if leaf.shape == weights}
  assert kept == {jnp.dtype(BFLOAT16)}
  exact = np.asarray(gradient(attend_by_jax, narrow.astype(jnp.float32)), np.float64)
  ours, theirs = (relative_error(gradient(function, narrow), exact) for function in (attend, attend_by_jax))
  assert theirs > 1e-3  # bfloat16 rounds
  assert ours < 1.2 * theirs
  np.testing.assert_array_equal(attend(q, k, v), attend_by_jax(q, k, v))


def test_a_lean_block_in_bfloat16_keeps_weights_of_attention_and_no_scores():
  block, tokens = vit.Block(2, 2, BFLOAT16), jnp.ones((3, 16, 8), BFLOAT16)
  params = block.init(jax.random.key(0), tokens)
  lean = rematerialize(block.apply, BlockExecution('elementwise'))
  kept = [leaf for leaf in jax.tree.leaves(jax.vjp(lean, params, tokens)[1]) if leaf.shape == (3, 2, 16, 16)]
  assert [leaf.dtype for leaf in kept] == [BFLOAT16]


def relative_error(found, exact):
  return np.linalg.norm(np.float64(found) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize(
  ('module', 'shape', 'leaf'),
  [
    (vit.Linear(16, BFLOAT16), (4096, 8), ('bias',)),
    (vit.Embedding(16, 4, BFLOAT16), (512, 8, 8, 3), ('position',)),
    (vit.Embedding(16, 4, BFLOAT16), (512, 8, 8, 3), ('patch', 'bias')),
  ],
  ids=['bias', 'position', 'patch bias'],
)
def test_sums_over_tokens_are_float32_in_bfloat16_runs(module, shape, leaf):
  """A bias gradient is a sum over all tokens of a batch; summed in bfloat16 it is off by three percent."""
  x = jax.random.uniform(jax.random.key(0), shape)
  params = module.init(jax.random.key(1), x)['params']
  outputs = module.apply({'params': params}, x)
  assert outputs.dtype == BFLOAT16
  cotangent = (jax.random.normal(jax.random.key(2), outputs.shape) + 0.05).astype(BFLOAT16)
  found = jax.vjp(lambda p: module.apply({'params': p}, x), params)[1](cotangent)[0]
  for name in leaf:
    found = found[name]
  axes = tuple(range(cotangent.ndim - found.ndim))
  assert relative_error(found, np.asarray(cotangent, np.float64).sum(axes)) < 2e-3
