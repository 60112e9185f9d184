"""Noise on a client's update: its size, whose it is, that nobody clips it afterwards, and the epsilon that it gives."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax import stages
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.federated import aggregation, client_update, privacy
from lwfedssl_jax.federated.client_update import ClientData
from tests.tiny import make_parts

pytestmark = pytest.mark.usefixtures('tiny_library')

NOISE = {'client_update_clip': 0.5, 'dp_noise_multiplier': 2.0}


def norm(tree):
  return float(jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(tree))))


def subtract(one, other):
  return jax.tree.map(jnp.subtract, one, other)


def test_the_update_is_clipped_and_the_noise_has_the_stated_deviation():
  start = {'kernel': jnp.zeros(30_000), 'other': jnp.ones(10_000)}
  trained = {'kernel': jnp.full(30_000, 0.03), 'other': jnp.full(10_000, 1.04)}
  clipped = aggregation.clip_update(trained, start, 0.5)
  assert norm(subtract(clipped, start)) == pytest.approx(0.5, rel=1e-4) and norm(subtract(trained, start)) > 6

  def draw(seed):
    return subtract(privacy.privatize_update(trained, start, 0.5, 2.0, jax.random.key(seed)), clipped)

  first, second = draw(0), draw(1)
  for name, leaf in first.items():
    assert float(leaf.std()) == pytest.approx(1.0, rel=0.02)
    assert abs(float(leaf.mean())) < 0.03
    assert abs(np.corrcoef(leaf, second[name])[0, 1]) < 0.03
  assert abs(np.corrcoef(first['kernel'][:10_000], first['other'])[0, 1]) < 0.03


def test_a_client_adds_it_and_nobody_clips_it_afterwards(tiny_round, tiny_inputs):
  case, inputs = tiny_round('layerwise', 'simclr'), tiny_inputs()
  plan = case.plans[case.stage]
  global_params = stages.split(case.init(0), plan.shape, plan.start)
  keys = client_update.draw_keys(inputs.seed_key, 0, 0)
  data = ClientData(inputs.images, inputs.clients.image_ids[0], inputs.clients.num_images[0])
  config = configs.with_values(case.config, NOISE)
  parts = make_parts(config)
  with pytest.raises(ValueError, match='needs the key of its noise'):
    parts.client_update.apply(global_params, data, keys)
  plain = jax.jit(make_parts(case.config).client_update.apply)(global_params, data, keys).params
  start = parts.client_update.options.model.raveler.ravel(global_params.active)
  clipped = aggregation.clip_update(plain, start, 0.5)
  update = jax.jit(parts.client_update.apply)
  drawn = [privacy.draw_noise_key(inputs.seed_key, 0, client) for client in (0, 1)]
  noisy = [update(global_params, data, keys._replace(noise=key)).params for key in drawn]
  noise = [np.concatenate([*map(np.ravel, jax.tree.leaves(subtract(params, clipped)))]) for params in noisy]
  assert noise[0].std() == pytest.approx(1.0, rel=0.1)
  assert abs(np.corrcoef(*noise)[0, 1]) < 0.1
  assert config.server_update_clip == 0 and case.config.server_update_clip == case.config.method.client_update_clip


def test_epsilon_is_that_of_composed_gaussians():
  """Rényi divergence of order a of T Gaussian mechanisms: T a / (2 z^2), converted by arXiv 2004.00010, theorem 20."""
  orders = np.linspace(1.01, 200, 100_000)
  for noise, uploads in ((2.0, 24), (5.0, 180)):
    divergence = uploads * orders / (2 * noise**2)
    expected = (divergence + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1)).min()
    assert privacy.spent_epsilon(noise, uploads, 1e-5) == pytest.approx(expected, rel=0.01)
  assert privacy.spent_epsilon(2.0, 0, 1e-5) == 0


def test_the_summary_counts_every_update_that_was_sent():
  rows = [
    {'client_ids': [0, 1], 'client_upload_bytes': [10, 10], 'attempts': 1},
    {'client_ids': [2, 1], 'client_upload_bytes': [0, 20], 'attempts': 2},
  ]
  config = configs.configure(**NOISE, dp_delta=1e-6)
  assert privacy.summarize(config, rows) == {'dp_epsilon': privacy.spent_epsilon(2.0, 3, 1e-6), 'dp_delta': 1e-6}
  assert privacy.summarize(configs.configure(), rows) == {}


def test_noise_without_a_clipping_norm_or_an_accountant_is_refused(monkeypatch):
  with pytest.raises(UsageError, match='--client_update_clip: expected more than 0 with --dp_noise_multiplier'):
    configs.configure(dp_noise_multiplier=1.0)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UsageError, match=r'--dp_noise_multiplier: expected dp-accounting, pip install'):
    privacy.require_accountant(configs.configure(**NOISE))
  privacy.require_accountant(configs.configure())
