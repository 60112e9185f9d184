"""The saving is a fact of the compiled program."""

import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax import stages
from lwfedssl_jax.resources import memory

pytestmark = pytest.mark.usefixtures('fully_optimized')


def compiled_memory(method, stage, **values):
  values = {'encoder': 'vit_tiny', 'method': method, 'batch_size': 64, **values}
  config = configs.with_values(configs.Config(), values)
  return memory.step_memory(config, 32, stages.make_plans(config)[stage])


@pytest.fixture(scope='module')
def end_to_end():
  return compiled_memory('end_to_end', 0, rematerialize='none')


@pytest.mark.parametrize('method', ['layerwise', 'lw_fedssl'])
def test_last_layerwise_stage_needs_an_eighth_of_the_scratch_of_end_to_end(end_to_end, method):
  assert compiled_memory(method, 11).scratch_bytes <= end_to_end.scratch_bytes / 8


def test_computing_again_what_is_no_matrix_product_saves_two_fifths_of_end_to_end(end_to_end):
  again = compiled_memory('end_to_end', 0)  # the default
  assert again.scratch_bytes < 0.6 * end_to_end.scratch_bytes
  assert compiled_memory('layerwise', 11).scratch_bytes <= again.scratch_bytes / 4  # at equal care


def test_layerwise_memory_does_not_grow_with_depth():
  second, last = compiled_memory('layerwise', 1), compiled_memory('layerwise', 11)
  assert second == last


@pytest.mark.parametrize(('method', 'without_predictor'), [('layerwise', 1), ('lw_fedssl', 2)])
def test_optimizer_and_target_exist_for_active_parameters_only(end_to_end, method, without_predictor):
  """Of what is active: online, two moments; without predictor: target, and for the alignment the received model."""
  memory_of_step = compiled_memory(method, 11)
  projector, predictor, block, norm = (4 * n for n in (493_568, 263_168, 444_864, 384))
  embedding, batch = 4 * (9_408 + 12_288), 4 * 2 * 64 * 32 * 32 * 3
  active = 3 * (block + projector + predictor + norm) + without_predictor * (block + projector + norm)
  expected = active + 12 * block + embedding + batch  # below the active block everything is there once
  assert memory_of_step.argument_bytes == pytest.approx(expected, abs=1000)  # and step counts, mask, scalars
  assert end_to_end.argument_bytes > 4 * (12 * block + projector + predictor) - predictor
  assert memory_of_step.alias_bytes > 0.99 * memory_of_step.output_bytes  # the donated state is updated in place
