"""ProgFed's warm-up: a stage's new blocks alone first, as a plan of its own; and a run with it and depth dropout."""

import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import UsageError, stages
from lwfedssl_jax import config as configs
from lwfedssl_jax.resources import costs, flops
from lwfedssl_jax.training import train
from lwfedssl_jax.workdir import metrics_writer
from tests.test_training import TINY


def plans_of(method, warmup_rounds, **values):
  values = {'method': method, 'rounds_per_stage': 5, 'warmup_rounds': warmup_rounds, **values}
  return stages.make_plans(configs.with_values(configs.Config(), values))


def test_new_blocks_train_alone_first():
  found = [
    (plan.stage, plan.first_round, plan.num_rounds, plan.start, plan.stop, plan.trains_embedding, plan.warmup_rounds)
    for plan in plans_of('prog_fedssl', 2, blocks_per_stage=2)
  ]
  assert found == [(0, 0, 5, 0, 2, True, 0), (1, 5, 2, 2, 4, False, 0), (1, 7, 3, 0, 4, True, 2)]


@pytest.mark.parametrize('method', ['layerwise', 'lw_fedssl', 'end_to_end', 'centralized'])
def test_it_changes_nothing_where_nothing_else_trains(method):
  assert plans_of(method, 2) == plans_of(method, 0)


def test_every_round_has_a_plan():
  plans = plans_of('prog_fedssl', 2)
  numbers = [stages.find_plan(plans, round_num).stage for round_num in range(20)]
  assert numbers == [stage for stage in range(4) for _ in range(5)]
  with pytest.raises(IndexError):
    stages.find_plan(plans, 20)


def test_the_warmed_up_blocks_are_kept():
  params = {'blocks': {'scale': np.arange(4.0)}}
  _, warmup, whole, *_ = plans_of('prog_fedssl', 2)
  begun = stages.init_new_blocks({'blocks': {'scale': jnp.arange(4.0)}}, warmup, 'previous')
  np.testing.assert_array_equal(begun['blocks']['scale'], [0, 0, 2, 3])
  assert stages.init_new_blocks(params, whole, 'previous') is params


def test_it_is_shorter_than_a_stage():
  with pytest.raises(UsageError, match='--warmup_rounds: expected less than the 5 rounds of a stage, got 5'):
    plans_of('prog_fedssl', 5)


def test_costs_follow_from_the_plans():
  """ViT-Tiny, third stage, 5 of 15 rounds: a layer-wise client's exchange and computation, then a progressive one's."""
  values = {'encoder': 'vit_tiny', 'rounds_per_stage': 15, 'warmup_rounds': 5}

  def cost(method, **changes):
    config = configs.with_values(configs.Config(), {**values, 'method': method, **changes})
    return costs.method_cost(config, 32, 'paper_v4').stages

  warmup, whole = cost('prog_fedssl')[3:5]
  alone, together = (cost(method, warmup_rounds=0)[2] for method in ('layerwise', 'prog_fedssl'))
  assert (warmup.stage, warmup.num_rounds, whole.stage, whole.num_rounds) == (2, 5, 2, 10)
  for part, of in ((warmup, alone), (whole, together)):
    assert part.flops == pytest.approx(of.flops * part.num_rounds / 15)
    for direction in ('download_bytes', 'upload_bytes'):
      expected = {name: count * part.num_rounds / 15 for name, count in getattr(of, direction).items()}
      assert getattr(part, direction) == pytest.approx(expected)
  config = configs.with_values(configs.Config(), {**values, 'method': 'prog_fedssl'})
  assert [stage.total_flops for stage in flops.paper_stage_flops(config, 32)][3] == warmup.flops


@pytest.mark.slow
def test_a_run_with_depth_dropout_and_warm_up(tmp_path, cheap_views):
  """Its bytes are the cost sheet's, and it resumes to the bit."""
  values = {
    **TINY,
    'method': 'prog_fedssl',
    'blocks_per_stage': 1,
    'depth_dropout_keep': 2,
    'warmup_rounds': 1,
    'clients_per_round': 2,
    'client_dropout': 0.2,
    'seed': 3,
  }

  def run(name, **changes):
    config = configs.with_values(configs.Config(), {**values, 'workdir': str(tmp_path / name), **changes})
    return config, train.train(config)

  config, summary = run('whole')
  rows = metrics_writer.read_metrics(str(tmp_path / 'whole'))
  assert [row['stage'] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
  found = costs.to_json(costs.method_cost(config, 16, 'actual', with_memory=False))
  for direction in ('download_bytes', 'upload_bytes'):
    assert summary[direction] == pytest.approx(found[direction], rel=1e-12)
  run('parts', stop_after_round=6)
  _, resumed = run('parts', resume=True)
  assert resumed['params_sha256'] == summary['params_sha256']
