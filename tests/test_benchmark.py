"""A benchmark that cannot lie: what is counted is what is timed."""

import itertools

import jax
import pytest

from experiments.benchmarks import cases, suites, timing
from lwfedssl_jax import configure
from lwfedssl_jax.errors import MeasurementError
from lwfedssl_jax.resources import machine, memory
from lwfedssl_jax.stages import make_plans


def run_fake(monkeypatch, seconds):
  """Runs suite `step` on one case of 4 steps, 10 GFLOP each, that takes so many seconds on a machine of 100 GFLOP/s."""
  case = cases.Case('layerwise, stage 12', lambda: None, images=64, flop_count=10e9, steps=4)
  monkeypatch.setattr(cases, 'make_cases', lambda *arguments: [case])
  monkeypatch.setattr(machine, 'matrix_product_rate', lambda: 100e9)
  monkeypatch.setattr(timing.time, 'perf_counter', itertools.count(step=seconds).__next__)
  return suites.run_cases(None, 'step', 3, 2, False)['cases'][0]


def test_a_share_above_the_rate_of_matrix_products_is_refused(monkeypatch, capsys):
  """As on equal views, where the compiler takes the frozen prefix out of the loop: four steps in the time of two."""
  assert run_fake(monkeypatch, 0.5)['share_of_matrix_product_rate'] == pytest.approx(0.8)
  with pytest.raises(MeasurementError, match=r'^layerwise, stage 12: 160 % of the rate .* the measurement is wrong$'):
    run_fake(monkeypatch, 0.25)
  assert '160' not in capsys.readouterr().out  # no table of figures that are wrong


def test_every_step_of_a_call_has_views_of_its_own():
  config = configure(method='layerwise', encoder='vit_micro', image_size=8, patch_size=4, batch_size=4)
  lowered = memory.lower_client_step(config, 8, make_plans(config)[1], num_steps=3)
  batch = lowered.args_info[0][2]
  assert batch.views.shape == (3, 2, 4, 8, 8, 3)
  assert batch.mask.shape == (3, 4)
  assert isinstance(lowered, jax.stages.Lowered)
