"""What the planner chooses, on made-up peaks: nothing is compiled here."""

import re

import pytest

from lwfedssl_jax import UsageError
from lwfedssl_jax import config as configs
from lwfedssl_jax.federated import execution
from lwfedssl_jax.resources import flops, memory, planner
from lwfedssl_jax.stages import make_plans

BATCH = 24
SIZES = (1, 2, 3, 4, 6, 8, 12, 24)
LEVELS = {'none': 4.0, 'elementwise': 3.0, 'all': 1.0}  # MB an image


def config_of(**values):
  config = configs.with_values(
    configs.Config(), {'encoder': 'vit_micro', 'method': 'layerwise', 'batch_size': BATCH, **values}
  )
  return execution.resolve(config)  # as the planner does


def made_up_peak(config, image_size, target=None):
  per_image = LEVELS[config.client.rematerialize] * (0.5 if config.model.compute_dtype == 'bfloat16' else 1)
  return int(planner.MEGABYTE * (2 + per_image * (config.client.micro_batch_size or BATCH)))


@pytest.fixture
def made_up(monkeypatch):
  monkeypatch.setattr(planner, 'peak_bytes', made_up_peak)


def choices(config):
  """All choices in the order of what they cost, written out; results change with the type, so it comes last."""
  asked, levels = config.client.micro_batch_size or BATCH, list(LEVELS)
  levels = levels[levels.index(config.client.rematerialize) :]
  sizes = [size for size in reversed(SIZES) if size <= asked]
  for dtype in dict.fromkeys([config.model.compute_dtype, 'bfloat16']):
    in_pieces = [(level, size) for level in levels for size in sizes]
    for level, size in [(level, asked) for level in levels if level != 'all'] + in_pieces:
      yield configs.with_values(
        config, {'rematerialize': level, 'compute_dtype': dtype, 'micro_batch_size': 0 if size == BATCH else size}
      )


@pytest.mark.parametrize(
  'values', [{}, {'micro_batch_size': 8}, {'rematerialize': 'elementwise'}, {'compute_dtype': 'bfloat16'}], ids=str
)
def test_the_cheapest_choice_that_fits_is_taken_or_the_smallest_peak_named(made_up, values):
  for budget in (2.4, 2.5, 3, 4, 6, 7, 10, 17, 18, 30, 50, 73, 74, 97, 98, 200):
    config = config_of(client_memory_budget_mb=budget, **values)
    fitting = [choice for choice in choices(config) if made_up_peak(choice, 16) <= budget * planner.MEGABYTE]
    if fitting:
      plan = planner.fit(config, 16)
      assert plan.config == fitting[0], budget
      assert plan.peak_bytes == made_up_peak(fitting[0], 16)
    else:
      with pytest.raises(UsageError) as error:
        planner.fit(config, 16)
      smallest = min(made_up_peak(choice, 16) for choice in choices(config)) / planner.MEGABYTE
      assert float(re.search(r'at least ([\d.]+)', str(error.value)).group(1)) == pytest.approx(smallest, abs=0.1)


def test_peak_is_that_of_the_most_demanding_stage(monkeypatch):
  sizes = {0: 5, 1: 7, 2: 1}

  def fake(config, image_size, plan, target):
    return memory.StepMemory(sizes[plan.stage], 0, 0, 0)

  monkeypatch.setattr(memory, 'step_memory', fake)
  assert planner.peak_bytes(config_of(), 16) == 7
  sizes[0] = 9
  assert planner.peak_bytes(config_of(), 16) == 9


@pytest.mark.parametrize('method', ['layerwise', 'end_to_end'])
def test_recomputed_share_is_relative_to_a_step_without_recomputation(method):
  plain, again = config_of(method=method), config_of(method=method, micro_batch_size=6)

  def total(config):
    return sum(flops.executed_flops(config, 16, plan, BATCH).total_flops for plan in make_plans(config))

  assert planner.recomputed_share(plain, 16) == 0
  assert planner.recomputed_share(again, 16) == pytest.approx(total(again) / total(plain) - 1)
  assert planner.recomputed_share(again, 16) > 0.1
