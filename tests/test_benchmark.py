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


def test_a_pytorch_round_takes_a_client_s_steps_and_averages(monkeypatch):
  """Two clients of five images, batches of two, two epochs: four steps, each of which adds one to all parameters."""
  torch = pytest.importorskip('torch')
  pytest.importorskip('torchvision')
  from experiments.benchmarks import torch_round, torch_step

  config = configure(
    method='layerwise', encoder='vit_micro', image_size=8, patch_size=4, batch_size=2, num_clients=2, local_epochs=2
  )
  plan, seen = make_plans(config)[1], []
  prefix, online, predictor = modules = torch_step.make_modules(config, plan)
  monkeypatch.setattr(torch_step, 'make_modules', lambda *arguments: modules)

  def step(client, views):
    seen.append((client, tuple(views.shape), float(views.min()), float(views.max())))
    with torch.no_grad():
      for parameter in client.modules.parameters():
        parameter.add_(1)

  monkeypatch.setattr(torch_step.Client, 'step', step)
  before = [[p.detach().clone() for p in part.parameters()] for part in modules]
  torch_round.make_round(config, plan, 5)()
  assert [shape for _, shape, *_ in seen] == [(4, 3, 8, 8)] * 8
  assert len({id(client) for client, *_ in seen}) == 2
  assert all(-1 <= low < high <= 1 for *_, low, high in seen)
  for part, old, moved in zip((prefix, online, predictor), before, (0, 4, 4), strict=True):
    assert all(torch.allclose(p, q + moved) for p, q in zip(part.parameters(), old, strict=True))
