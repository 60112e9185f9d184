"""Losses against a NumPy float64 oracle with loops; padding; stop-gradients; zero rows; no (B, B, P) tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax.objectives import losses
from lwfedssl_jax.objectives.alignment import make_alignment

TEMPERATURE = 0.2


def unit(row):
  return row / np.sqrt((row**2).sum())


def oracle_info_nce(queries, keys, temperature=TEMPERATURE):
  values = []
  for i, query in enumerate(queries):
    scores = np.array([unit(query) @ unit(key) / temperature for key in keys])
    values.append(np.log(np.exp(scores).sum()) - scores[i])
  return np.mean(values)


def oracle_nt_xent(view1, view2, temperature=TEMPERATURE):
  rows, values, batch = [*view1, *view2], [], len(view1)
  for i, row in enumerate(rows):
    scores = {j: unit(row) @ unit(other) / temperature for j, other in enumerate(rows) if j != i}
    assert len(scores) == 2 * batch - 1  # the positive and 2B - 2 negatives
    values.append(np.log(sum(np.exp(list(scores.values())))) - scores[(i + batch) % (2 * batch)])
  return np.mean(values)


def oracle_cosine(x, y):
  return np.mean([1 - unit(a) @ unit(b) for a, b in zip(x, y)])


def info_nce(views, mask):
  return losses.info_nce(views[0], views[1], TEMPERATURE, mask)


def nt_xent(views, mask):
  return losses.nt_xent(views, TEMPERATURE, mask)


def cosine(views, mask):
  return losses.cosine_distance(views[0], views[1], mask)


PAIRWISE = [
  pytest.param(info_nce, oracle_info_nce, id='info_nce'),
  pytest.param(nt_xent, oracle_nt_xent, id='nt_xent'),
  pytest.param(cosine, oracle_cosine, id='cosine'),
]
LOSSES = [pytest.param(p.values[0], id=p.id) for p in PAIRWISE]


def draw(batch, width=5, seed=0):
  return np.random.default_rng(seed).normal(size=(2, batch, width)).astype(np.float32)


@pytest.mark.parametrize('mask', [[1] * 6, [1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]])
@pytest.mark.parametrize(('loss', 'oracle'), PAIRWISE)
def test_value_is_the_oracle_s_over_the_valid_samples(loss, oracle, mask):
  views, mask = draw(6), np.array(mask, bool)
  expected = oracle(*views[:, mask].astype(np.float64))
  np.testing.assert_allclose(loss(jnp.asarray(views), jnp.asarray(mask)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('loss', 'oracle'), PAIRWISE)
def test_gradient_is_the_oracle_s(loss, oracle):
  """By central differences of the float64 oracle; into the first view only, where the second is a constant."""
  views, mask = draw(4), jnp.ones(4, bool)
  gradient = jax.grad(loss)(jnp.asarray(views), mask)
  wide, step = views.astype(np.float64), 1e-5
  for index in np.ndindex(views.shape):
    if index[0] == 1 and oracle is not oracle_nt_xent:
      assert gradient[index] == 0
      continue
    up, down = wide.copy(), wide.copy()
    up[index] += step
    down[index] -= step
    expected = (oracle(*up) - oracle(*down)) / (2 * step)
    np.testing.assert_allclose(gradient[index], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('padding', [0.0, 1.0, 1e6])
@pytest.mark.parametrize('loss', LOSSES)
def test_padding_changes_neither_value_nor_gradient(loss, padding):
  views = draw(4)
  padded = np.full((2, 7, 5), padding, np.float32)
  slots = np.array([1, 2, 4, 6])
  padded[:, slots] = views
  mask = np.zeros(7, bool)
  mask[slots] = True
  value, gradient = jax.value_and_grad(loss)(jnp.asarray(views), jnp.ones(4, bool))
  padded_value, padded_gradient = jax.value_and_grad(loss)(jnp.asarray(padded), jnp.asarray(mask))
  np.testing.assert_allclose(padded_value, value, rtol=1e-6)
  np.testing.assert_allclose(padded_gradient[:, slots], gradient, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(padded_gradient[:, ~mask], 0)


@pytest.mark.parametrize('loss', LOSSES)
def test_fully_masked_batch_is_zero_with_zero_gradient(loss):
  value, gradient = jax.value_and_grad(loss)(jnp.asarray(draw(3)), jnp.zeros(3, bool))
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize('zeros', [np.s_[0, 1], np.s_[:, 1], np.s_[:]])
@pytest.mark.parametrize('loss', LOSSES)
def test_zero_rows_have_a_finite_gradient(loss, zeros):
  views = draw(3)
  views[zeros] = 0
  value, gradient = jax.value_and_grad(loss)(jnp.asarray(views), jnp.ones(3, bool))
  assert np.isfinite(value)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize('loss', LOSSES)
def test_rows_are_normalized(loss):
  views, mask = jnp.asarray(draw(4)), jnp.ones(4, bool)
  scale = jnp.array([[0.1, 1, 10, 100], [3, 2, 1, 0.5]])[..., None]
  np.testing.assert_allclose(loss(views * scale, mask), loss(views, mask), rtol=1e-5)


@pytest.mark.parametrize('loss', LOSSES)
def test_bfloat16_in_float32_out(loss):
  value = loss(jnp.asarray(draw(4), jnp.bfloat16), jnp.ones(4, bool))
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, loss(jnp.asarray(draw(4)), jnp.ones(4, bool)), rtol=0.02)


def test_temperature_small_enough_to_overflow_exp_is_fine():
  views, mask = jnp.asarray(draw(4)), jnp.ones(4, bool)
  for value in (losses.info_nce(views[0], views[1], 1e-3, mask), losses.nt_xent(views, 1e-3, mask)):
    assert np.isfinite(value)


@pytest.mark.parametrize('mask', [[1, 1, 1, 1], [1, 0, 1, 1]])
@pytest.mark.parametrize(('kind', 'oracle'), [('contrastive', oracle_info_nce), ('cosine', oracle_cosine)])
def test_alignment_compares_each_view_with_the_same_view_received(kind, oracle, mask):
  local, received, mask = draw(4, seed=1), draw(4, seed=2), np.array(mask, bool)
  alignment = make_alignment(kind, TEMPERATURE)
  expected = np.mean([oracle(z[mask].astype(np.float64), g[mask].astype(np.float64)) for z, g in zip(local, received)])
  value, gradients = jax.value_and_grad(alignment, argnums=(0, 1))(local, received, jnp.asarray(mask))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert (np.abs(gradients[0][:, mask]).sum(-1) > 0).all()
  np.testing.assert_array_equal(gradients[1], 0)


def shapes_in(jaxpr):
  for equation in jaxpr.eqns:
    yield from (variable.aval.shape for variable in equation.outvars)
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from shapes_in(inner)


@pytest.mark.parametrize('loss', LOSSES)
def test_no_batch_by_batch_by_width_tensor(loss):
  batch, width = 31, 29
  views, mask = jnp.zeros((2, batch, width)), jnp.ones(batch, bool)
  shapes = list(shapes_in(jax.make_jaxpr(jax.value_and_grad(loss))(views, mask).jaxpr))
  assert max(int(np.prod(shape)) for shape in shapes) <= (2 * batch) ** 2
  assert any(shape in ((batch, batch), (2 * batch, 2 * batch)) for shape in shapes) == (loss is not cosine)


@pytest.mark.parametrize('loss', LOSSES)
def test_scratch_memory_at_the_paper_s_batch(loss):
  """`optax.ntxent` takes 406 MB at B = 512, P = 128. A few (2B, 2B) float32 matrices, 4 MB each, are what is needed."""
  views, mask = jax.ShapeDtypeStruct((2, 512, 128), jnp.float32), jax.ShapeDtypeStruct((512,), bool)
  compiled = jax.jit(jax.value_and_grad(loss)).lower(views, mask).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 32e6
