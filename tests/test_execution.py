"""How active blocks are executed: what `auto` chooses, and that the choice changes rounding only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax.data.federated_dataset import FederatedDataset
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.federated import execution
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
