"""Memory budgets: met by the compiled program, or refused with the smallest that would be."""

import re

import jax
import pytest

from lwfedssl_jax import UsageError, devices
from lwfedssl_jax import config as configs
from lwfedssl_jax.data import federated_dataset
from lwfedssl_jax.federated import execution
from lwfedssl_jax.resources import memory, planner
from lwfedssl_jax.stages import make_plans
from lwfedssl_jax.training import setup
from lwfedssl_jax.workdir import run_dir


def config_of(**values):
  return configs.with_values(
    configs.Config(), {'encoder': 'vit_micro', 'method': 'layerwise', 'batch_size': 32, **values}
  )


@pytest.fixture(scope='module')
def whole():
  return planner.peak_bytes(config_of(), 16)


def test_demanding_stages_are_the_widest_of_each_shape():
  def shapes(method):
    return [(p.stage, p.shape) for p in planner.demanding_stages(make_plans(config_of(method=method)))]

  assert shapes('layerwise') == [(1, (1, False, None)), (0, (1, True, None))]
  assert shapes('prog_fedssl') == [(3, (4, True, None))]
  assert shapes('end_to_end') == [(0, (4, True, None))]


def test_as_many_clients_are_vmapped_as_fit(whole):
  def chosen(steps, **values):
    return planner.choose_chunk(config_of(**values), 16, int(steps * whole / 0.8) + 1)

  assert chosen(3.5) == 3
  assert chosen(0.5) == 1
  assert chosen(100) == 10  # clients a round
  assert chosen(100, num_clients=200, clients_per_round=100) == 32


class Device:
  """Stands in for an accelerator with 80 GiB, of which programs may use `limit` and something is in use."""

  def __init__(self, limit, used):
    self.memory_stats = lambda: {'bytes_limit': limit, 'bytes_in_use': used}


def test_memory_in_use_does_not_change_the_chunk(whole, monkeypatch, tmp_path):
  """The chunk changes the order of sums: if it followed free memory, a seed would not fix the bits."""
  data = federated_dataset.load(config_of(dataset='digits', image_size=16, batch_size=8))
  monkeypatch.setattr(planner, 'peak_bytes', lambda config, image_size: 12 * 2**30)
  chosen = []
  for limit, used in ((60 * 2**30, 0), (60 * 2**30 + 2**29, 50 * 2**30)):
    monkeypatch.setattr(jax, 'local_devices', lambda limit=limit, used=used: [Device(limit, used)])
    chosen.append(setup.with_chunk(config_of(workdir=str(tmp_path)), data).client.client_chunk)
  assert chosen == [3, 3]  # 0.8 of 60 GiB less the images


def test_a_resumed_run_keeps_its_chunk_on_another_device(monkeypatch, tmp_path):
  given = config_of(workdir=str(tmp_path), dataset='digits', image_size=16, resume=True)
  data = federated_dataset.load(given)
  run_dir.write_json(
    str(tmp_path / 'config.json'),
    {'format': run_dir.FORMAT, 'config': configs.flatten(configs.with_values(given, {'client_chunk': 7}))},
  )
  assert setup.with_chunk(given, data).client.client_chunk == 7
  new = configs.with_values(given, {'resume': False})  # refused later, because the folder holds a run
  assert setup.with_chunk(new, data).client.client_chunk == 1
  assert setup.with_chunk(configs.with_values(given, {'client_chunk': 2}), data).client.client_chunk == 2
  elsewhere = configs.with_values(given, {'workdir': str(tmp_path / 'new')})
  assert setup.with_chunk(elsewhere, data).client.client_chunk == 1  # CPUs do not name their memory
  monkeypatch.setattr(devices, 'total_bytes', lambda: 2**40)
  monkeypatch.setattr(planner, 'peak_bytes', lambda config, image_size: 2**38)
  assert setup.with_chunk(elsewhere, data).client.client_chunk == 3


def test_a_step_that_fits_is_unchanged(whole):
  plan = planner.fit(config_of(client_memory_budget_mb=whole / 1e6), 16)
  assert plan.peak_bytes == whole
  assert plan.recomputed_share == 0
  assert plan.config == execution.resolve(config_of(client_memory_budget_mb=whole / 1e6))


def test_a_smaller_budget_is_met_by_the_largest_micro_batch_that_fits(whole):
  budget = 0.8 * whole
  plan = planner.fit(config_of(client_memory_budget_mb=budget / 1e6), 16)
  chosen = plan.config.client
  assert 0 < chosen.micro_batch_size < 32 and chosen.rematerialize == 'none'
  assert plan.config.model.compute_dtype == 'float32'
  for stage in make_plans(plan.config):
    assert memory.step_memory(plan.config, 16, stage).peak_bytes <= plan.peak_bytes <= budget
  if chosen.micro_batch_size < 16:
    larger = configs.with_values(plan.config, {'micro_batch_size': 2 * chosen.micro_batch_size})
    assert planner.peak_bytes(larger, 16) > budget
  assert 0 < plan.recomputed_share < 0.3
  assert f'micro_batch_size={chosen.micro_batch_size} of 32' in planner.describe(plan)


def test_operations_without_matrix_products_are_computed_again_before_any_product_is():
  def of(**values):
    return config_of(method='end_to_end', batch_size=64, **values)

  needed = {level: planner.peak_bytes(of(rematerialize=level), 16) for level in ('none', 'elementwise')}
  assert needed['elementwise'] < 0.8 * needed['none']  # under 0.6 with jax 0.10.2, 0.62 with 0.12.0.1
  plan = planner.fit(of(client_memory_budget_mb=needed['elementwise'] / 1e6, rematerialize='none'), 16)
  assert plan.config.client.rematerialize == 'elementwise'
  assert plan.config.client.micro_batch_size == 0
  assert plan.recomputed_share == 0


def test_impossible_budget_is_refused_with_the_smallest_that_works():
  few = {'compute_dtype': 'bfloat16', 'rematerialize': 'all', 'batch_size': 4}  # nothing else is left to try
  with pytest.raises(UsageError, match='--client_memory_budget_mb: expected at least') as error:
    planner.fit(config_of(client_memory_budget_mb=1, **few), 16)
  smallest = float(re.search(r'at least ([\d.]+)', str(error.value)).group(1))
  found = [planner.peak_bytes(config_of(micro_batch_size=size, **few), 16) for size in (0, 1)]
  assert smallest - 0.1 <= min(found) / 1e6 <= smallest


@pytest.mark.usefixtures('fully_optimized')
def test_a_batch_of_512_of_vit_tiny_fits_in_150_mb_of_scratch():
  config = configs.with_values(
    configs.Config(), {'encoder': 'vit_tiny', 'method': 'layerwise', 'batch_size': 512, 'micro_batch_size': 8}
  )
  for plan in planner.demanding_stages(make_plans(config)):
    assert memory.step_memory(config, 32, plan).scratch_bytes < 150e6
