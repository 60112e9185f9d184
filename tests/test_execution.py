"""How active blocks are executed: what `auto` chooses, and that the choice changes rounding only."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import catalog
from lwfedssl_jax import config as configs
from lwfedssl_jax.data.federated_dataset import FederatedDataset
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.federated import execution
from lwfedssl_jax.models import vit
from lwfedssl_jax.models.blocks import BlockExecution, stack_blocks
from lwfedssl_jax.training import setup
from lwfedssl_jax.workdir import run_dir


def resolved(platform, **values):
  config = execution.resolve(configs.with_values(configs.Config(), values), platform)
  return config.client.rematerialize, config.method.calibration_rematerialize, config.client.unroll_blocks


def test_several_blocks_at_once_are_lean_and_accelerators_unroll_them():
  assert resolved('cpu', method='layerwise') == ('none', 'elementwise', False)
  assert resolved('cuda', method='lw_fedssl') == ('none', 'elementwise', True)
  assert resolved('tpu', method='end_to_end') == ('elementwise', 'elementwise', True)
  assert resolved('cpu', method='prog_fedssl') == ('elementwise', 'elementwise', False)
  assert resolved('cpu', method='layerwise', blocks_per_stage=2) == ('elementwise', 'elementwise', False)


def test_what_is_asked_for_is_kept():
  asked = {'rematerialize': 'none', 'calibration_rematerialize': 'all', 'unroll_blocks': False}
  assert resolved('cuda', method='end_to_end', **asked) == ('none', 'all', False)


def test_the_server_and_the_clients_have_their_own_and_only_clients_unroll():
  config = configs.with_values(configs.Config(), {'method': 'lw_fedssl', 'unroll_blocks': True})
  assert execution.client_execution(config) == BlockExecution('none', True)
  assert execution.server_execution(config) == BlockExecution('elementwise', False)


BFLOAT16 = {'encoder': 'vit_tiny', 'compute_dtype': 'bfloat16'}


@pytest.mark.parametrize(
  ('backend', 'capability', 'values', 'expected'),
  [
    ('gpu', '9.0', BFLOAT16, 'cudnn'),
    ('gpu', '8.0', BFLOAT16, 'cudnn'),
    ('gpu', '7.5', BFLOAT16, 'plain'),
    ('gpu', 'gfx942', BFLOAT16, 'plain'),
    ('gpu', '9.0', BFLOAT16 | {'compute_dtype': 'float32'}, 'plain'),
    ('gpu', '9.0', BFLOAT16 | {'attention': 'plain'}, 'plain'),
    ('cpu', None, BFLOAT16, 'plain'),
    ('tpu', None, BFLOAT16, 'heads_first'),
    ('tpu', None, BFLOAT16 | {'attention': 'plain'}, 'plain'),
  ],
  ids=str,
)
def test_attention_is_fused_where_cudnn_has_a_kernel(monkeypatch, backend, capability, values, expected):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(jax, 'local_devices', lambda: [types.SimpleNamespace(compute_capability=capability)])
  config = configs.with_values(configs.Config(), values)
  assert execution.resolve(config).client.attention == expected
  assert execution.client_execution(config).attention == execution.server_execution(config).attention == expected


@pytest.mark.parametrize('platform', [None, 'tpu'])
def test_cudnn_where_there_is_none_is_refused(platform):
  config = configs.with_values(configs.Config(), BFLOAT16 | {'attention': 'cudnn'})
  with pytest.raises(UsageError, match='--attention: expected auto, plain or heads_first without'):
    execution.resolve(config, platform)


def test_what_was_resolved_for_a_target_is_kept_on_this_machine():
  config = configs.with_values(configs.Config(), BFLOAT16 | {'attention': 'cudnn'})
  assert execution.client_execution(config).attention == execution.server_execution(config).attention == 'cudnn'


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 0.02)])
def test_jax_s_attention_is_the_plain_one(dtype, tolerance):
  """The same function of the same arguments, gradients included, by the implementation that runs on a CPU."""
  draws = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 8)).astype(dtype)

  def run(implementation):
    def loss(arrays):
      result = vit.attend(*arrays, implementation)
      assert result.dtype == dtype
      return jnp.square(result.astype(jnp.float32)).sum(), result

    return jax.jit(jax.grad(loss, has_aux=True))(draws)

  for found, expected in zip(run('xla'), run('plain')):
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 0.03)])
def test_heads_first_is_plain_attention(dtype, tolerance):
  """The same parameters, the same function, and the same gradients."""
  x = jax.random.normal(jax.random.key(0), (3, 5, 8)).astype(dtype)
  params = vit.Attention(2, jnp.dtype(dtype)).init(jax.random.key(1), x)
  params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(2), leaf.shape) / 3, params)

  def run(implementation):
    def loss(params):
      result = vit.Attention(2, jnp.dtype(dtype), implementation).apply(params, x)
      assert result.dtype == dtype
      return jnp.square(result.astype(jnp.float32)).sum(), result

    return jax.jit(jax.grad(loss, has_aux=True))(params)

  for found, expected in zip(jax.tree.leaves(run('heads_first')), jax.tree.leaves(run('plain'))):
    scale = float(jnp.abs(expected.astype(jnp.float32)).max())
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance * scale)


def test_every_block_uses_the_chosen_attention(monkeypatch):
  asked = []

  def attend(q, k, v, implementation):
    asked.append(implementation)
    return v

  monkeypatch.setattr(vit, 'attend', attend)
  size = catalog.VitTraits(width=8, depth=3, num_heads=2, mlp_ratio=1)
  encoder = vit.make_vit(size, 8, 4, execution=BlockExecution(unrolled=True, attention='xla'))
  params = jax.eval_shape(encoder.init, jax.random.key(0))
  asked.clear()
  tokens = jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)
  jax.eval_shape(lambda blocks, x: encoder.blocks(blocks, encoder.prefix(blocks, x, 1)), params['blocks'], tokens)
  assert set(asked) == {'xla'} and len(asked) >= 4


@pytest.mark.parametrize('rematerialize', ['none', 'elementwise', 'all'])
def test_unrolled_blocks_have_the_gradient_of_the_loop(rematerialize):
  def run(params, tokens):
    return tokens + jnp.tanh(tokens @ params['kernel'])

  def gradient(unrolled, stop):
    stack = stack_blocks(
      lambda key: {'kernel': jax.random.normal(key, (4, 4))}, run, 3, BlockExecution(rematerialize, unrolled)
    )
    params = stack.init(jax.random.key(0))

    def loss(params, tokens):
      return jnp.square(stack.blocks(params, tokens, stop)).sum()

    program = jax.jit(jax.grad(loss))
    tokens = jax.random.normal(jax.random.key(1), (2, 5, 4))
    loops = program.lower(params, tokens).as_text().count('stablehlo.while')
    return program(params, tokens)['kernel'], loops

  (looped, loops), (flat, none) = gradient(False, None), gradient(True, None)
  assert loops and not none
  np.testing.assert_allclose(flat, looped, rtol=1e-5, atol=1e-5)
  part, _ = gradient(True, 2)  # a traced end keeps the loop
  assert np.abs(part[:2]).min() > 0 and not np.asarray(part[2]).any()


def test_config_json_states_the_choice_and_a_resumed_run_keeps_it(tmp_path, monkeypatch):
  images = np.zeros((8, 16, 16, 3), np.uint8)
  dataset = ImageDataset('zeros', images, None, images[:0], None, ())
  data = FederatedDataset(dataset, [np.arange(4), np.arange(4, 8)], np.arange(0), images[:0])
  values = {'encoder': 'vit_micro', 'method': 'prog_fedssl', 'num_clients': 2, 'batch_size': 4}
  config = configs.with_values(configs.Config(), {**values, 'workdir': str(tmp_path)})
  first, _ = setup.resolve(config, data)
  assert first.client.rematerialize == 'elementwise' and first.client.unroll_blocks is False
  with run_dir.claim_workdir(first):
    pass
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  elsewhere, _ = setup.resolve(configs.with_values(config, {'resume': True}), data)
  assert elsewhere.client.unroll_blocks is False
  assert setup.resolve(config, data)[0].client.unroll_blocks is True
