"""The micro-batch of the server's calibration: on made-up peaks, and in a run's resolved configuration."""

import re

import pytest

from lwfedssl_jax import UsageError
from lwfedssl_jax import config as configs
from lwfedssl_jax.data import federated_dataset
from lwfedssl_jax.resources import server_planner
from lwfedssl_jax.training import setup

BATCH = 12
MADE_UP = {0: 26, 12: 26, 6: 14, 4: 10, 3: 8, 2: 6, 1: 4}  # MB by micro-batch


def config_of(**values):
  return configs.configure(method='lw_fedssl', encoder='vit_micro', **values)


@pytest.fixture
def made_up(monkeypatch):
  asked = []

  def peak(config, image_size, batch_size):
    asked.append(config.method.calibration_micro_batch_size)
    return MADE_UP[asked[-1]] * server_planner.MEGABYTE

  monkeypatch.setattr(server_planner, 'peak_bytes', peak)
  return asked


@pytest.mark.parametrize('budget', [4, 5, 6, 9.9, 10, 13, 14, 25, 26, 100])
def test_the_largest_micro_batch_that_fits_is_taken(made_up, budget):
  plan = server_planner.fit(config_of(server_memory_budget_mb=float(budget)), 16, BATCH)
  largest = max(size for size in (1, 2, 3, 4, 6, 12) if MADE_UP[size] <= budget)
  assert plan.config.method.calibration_micro_batch_size == (0 if largest == BATCH else largest)
  assert plan.peak_bytes == MADE_UP[largest] * server_planner.MEGABYTE
  assert len(made_up) <= 5


def test_a_configured_micro_batch_is_an_upper_bound(made_up):
  config = config_of(server_memory_budget_mb=100.0, calibration_micro_batch_size=5)
  assert server_planner.fit(config, 16, BATCH).config.method.calibration_micro_batch_size == 4
  assert 0 not in made_up


def test_the_smallest_feasible_budget_is_named(made_up):
  with pytest.raises(UsageError, match=r'--server_memory_budget_mb: expected at least 4\.0 .* 12 images a step, got 3'):
    server_planner.fit(config_of(server_memory_budget_mb=3.0), 16, BATCH)


def test_a_run_plans_for_the_batch_that_its_server_has():
  """Batch 64 is asked for; a tenth of 200 images are the server's."""
  config = config_of(max_train_images=200, num_clients=2, batch_size=64)
  data = federated_dataset.load(config)
  whole = server_planner.peak_bytes(configs.with_values(config, {'image_size': 8}), 8, len(data.server_images))
  budget = 0.9 * whole / server_planner.MEGABYTE
  resolved, text = setup.resolve(configs.with_values(config, {'server_memory_budget_mb': budget}), data)
  chosen = resolved.method.calibration_micro_batch_size
  assert 0 < chosen < len(data.server_images) and len(data.server_images) % chosen == 0
  stated = re.fullmatch(r'server memory plan: calibration_micro_batch_size=(\d+) of (\d+): ([\d.]+) of .* MB', text)
  assert stated.groups()[:2] == (str(chosen), str(len(data.server_images)))
  assert 0 < float(stated.group(3)) <= budget
