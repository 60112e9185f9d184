"""The saving is a fact of the compiled program."""

import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax import stages
from lwfedssl_jax.resources import memory


def compiled_memory(method, stage, **values):
  values = {'encoder': 'vit_tiny', 'method': method, 'batch_size': 64, **values}
  config = configs.with_values(configs.Config(), values)
  return memory.step_memory(config, 32, stages.make_plans(config)[stage])


@pytest.fixture(scope='module')
def end_to_end():
  return compiled_memory('end_to_end', 0)


@pytest.mark.parametrize('method', ['layerwise', 'lw_fedssl'])
def test_last_layerwise_stage_needs_a_tenth_of_the_scratch_of_end_to_end(end_to_end, method):
  assert compiled_memory(method, 11).scratch_bytes <= end_to_end.scratch_bytes / 10


def test_layerwise_memory_does_not_grow_with_depth():
  second, last = compiled_memory('layerwise', 1), compiled_memory('layerwise', 11)
  assert second == last


def test_optimizer_and_target_exist_for_active_parameters_only(end_to_end):
  layerwise = compiled_memory('layerwise', 11)
  params = 4 * (12 * 444_864 + 192 * 2 + 9_408 + 12_288)
  heads = 4 * (493_568 + 263_168)
  block = 4 * 444_864
  batch = 4 * 2 * 64 * 32 * 32 * 3
  # online, target (no predictor), two moments and the received copy; frozen: everything below, once.
  expected = 5 * (block + heads + 4 * 192 * 2) - 4 * 263_168 + 12 * block + 4 * (9_408 + 12_288) + batch
  assert layerwise.argument_bytes == pytest.approx(expected, rel=0.002)
  assert end_to_end.argument_bytes > 4 * params
  assert layerwise.alias_bytes > 0.7 * layerwise.output_bytes  # donated state is updated in place
