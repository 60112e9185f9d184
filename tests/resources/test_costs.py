"""The cost sheet: totals under their convention's name, parts that add up, a figure for every switch."""

import json

import pytest

from lwfedssl_jax import UsageError, catalog
from lwfedssl_jax import config as configs
from lwfedssl_jax.plots import cost_plots
from lwfedssl_jax.resources import accounting, communication, cost_tables, costs, flops, memory, server_planner
from lwfedssl_jax.stages import make_plans

PAPER = {'encoder': 'vit_tiny', 'rounds_per_stage': 15, 'local_epochs': 3, 'num_clients': 10}


def config_of(method, **values):
  return configs.with_values(configs.Config(), {**PAPER, 'method': method, **values})


@pytest.mark.parametrize(
  ('method', 'gb', 'gflops'), [('end_to_end', 8.40, 586), ('layerwise', 1.66, 139), ('prog_fedssl', 5.04, 318)]
)
def test_published_totals(method, gb, gflops):
  cost = costs.method_cost(config_of(method), 32, 'paper_v4')
  found = costs.to_json(cost)
  assert found['communication_gb'] == pytest.approx(gb, abs=0.01)
  assert found['gflops'] == pytest.approx(gflops, abs=1)
  assert found['peak_memory_bytes'] is None  # the paper measures a GPU's process, and gives no formula
  assert found['download_bytes'] + found['upload_bytes'] == cost.total_bytes
  assert len(found['stages']) == len(make_plans(config_of(method)))
  assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(('method', 'gb', 'gflops'), [('layerwise', 1.66, 111), ('prog_fedssl', 3.97, 233)])
def test_published_totals_of_depth_dropout(method, gb, gflops):
  found = costs.to_json(costs.method_cost(config_of(method, depth_dropout_keep=6), 32, 'paper_v4'))
  assert found['communication_gb'] == pytest.approx(gb, abs=0.01)
  assert found['gflops'] == pytest.approx(gflops, abs=1)


def test_depth_dropout_has_no_effect_on_one_stage():
  for convention in ('paper_v4', 'actual'):
    with_it, without = (
      costs.method_cost(config_of('end_to_end', depth_dropout_keep=keep), 32, convention, with_memory=False)
      for keep in (6, 0)
    )
    assert with_it == without


def test_actual_bytes_of_depth_dropout_are_the_kept_blocks():
  """Progressive, everyone in every round: each client sends, and lacks, at most six blocks."""
  cost = costs.method_cost(config_of('prog_fedssl', depth_dropout_keep=6), 32, 'actual', with_memory=False)
  for stage in cost.stages:
    sent = 60 * min(stage.stop, 6) * 444_864
    assert stage.upload_bytes['blocks'] == sent
    assert stage.download_bytes['blocks'] <= sent
  last = cost.stages[-1].download_bytes['blocks']
  assert last > 0.9 * 60 * 6 * 444_864  # a block that nobody trained in the round before is held already


@pytest.mark.parametrize(('method', 'stage'), [('prog_fedssl', 3), ('layerwise', 3)])
def test_depth_dropout_takes_the_memory_of_the_kept_blocks(method, stage):
  """The program's arguments are the kept blocks: parameters, and for trained ones target and two moments."""

  def step(keep):
    config = config_of(method, encoder='vit_micro', batch_size=8, depth_dropout_keep=keep)
    return memory.step_memory(config, 8, make_plans(config)[stage])

  without, with_it = step(0), step(2)
  block = 4 * 49_984
  # Without it a layer-wise client's program has all four blocks. What it trains it takes from its state.
  fewer = {'prog_fedssl': 2 * 4, 'layerwise': 3}[method]
  assert without.argument_bytes - with_it.argument_bytes == fewer * block
  assert with_it.peak_bytes < without.peak_bytes


def test_the_first_versions_count_encoder_blocks_only():
  total = {method: costs.method_cost(config_of(method), 32, 'paper_v1') for method in catalog.METHODS}
  assert total['end_to_end'].total_bytes / total['lw_fedssl'].total_bytes == pytest.approx(3.20)
  assert total['end_to_end'].total_bytes / total['prog_fedssl'].total_bytes == pytest.approx(1.846, abs=5e-4)
  assert total['lw_fedssl'].total_flops is None
  for stage in total['lw_fedssl'].stages:
    assert [stage.download_bytes[part] for part in ('embedding', 'norm', 'heads')] == [0, 0, 0]


def test_parts_of_a_stage():
  """Stage 3 of lw_fedssl: all that exists comes down, the active block, norm and heads go up; 15 rounds of float32."""
  stage = costs.method_cost(config_of('lw_fedssl'), 32, 'paper_v4').stages[2]
  block, heads = 444_864, 493_568 + 263_168
  assert stage.download_bytes == {
    'embedding': 60 * 21_696,
    'blocks': 60 * 3 * block,
    'norm': 60 * 384,
    'heads': 60 * heads,
  }
  assert stage.upload_bytes == {'embedding': 0, 'blocks': 60 * block, 'norm': 60 * 384, 'heads': 60 * heads}
  assert (stage.start, stage.stop, stage.num_rounds, stage.local_epochs) == (2, 3, 15, 45)


def test_worst_case_of_layerwise_downloads_what_lw_fedssl_does():
  def cost(method, convention, worst):
    return costs.method_cost(config_of(method), 32, convention, worst_case_download=worst, with_memory=False)

  for convention in ('paper_v4', 'actual'):
    worst, calibrated = cost('layerwise', convention, True), cost('lw_fedssl', convention, False)
    assert [s.download_bytes for s in worst.stages] == [s.download_bytes for s in calibrated.stages]
    assert worst.stages[3].upload_bytes == cost('layerwise', convention, False).stages[3].upload_bytes


def test_actual_counts_the_transfer_of_finished_blocks():
  """Each later stage's first download brings the final state of the block before it: 11 blocks and the embedding."""
  paper = costs.method_cost(config_of('layerwise'), 32, 'paper_v4')
  actual = costs.method_cost(config_of('layerwise'), 32, 'actual', with_memory=False)
  assert actual.total_bytes - paper.total_bytes == 4 * (11 * 444_864 + 21_696)


def test_a_gigabyte_is_its_convention_s():
  for convention, gigabyte in (('paper_v4', 1000 * 2**20), ('paper_v1', 1000 * 2**20), ('actual', 10**9)):
    cost = costs.method_cost(config_of('layerwise'), 32, convention, with_memory=False)
    assert costs.to_json(cost)['communication_gb'] == cost.total_bytes / gigabyte


def test_actual_under_partial_participation_is_what_the_ledger_charges():
  config = config_of('layerwise', num_clients=7, clients_per_round=3, client_dropout=0.3, seed=5, rounds_per_stage=2)
  found = costs.method_cost(config, 32, 'actual', with_memory=False)
  from lwfedssl_jax.federated import sampling

  plans = make_plans(config)
  participation = sampling.plan_participation(5, 24, 7, 3, 0.3)
  charged = accounting.charge_run(communication.make_payload(config, 32), plans, 7, *participation)
  for index, stage in enumerate(found.stages):
    assert sum(stage.download_bytes.values()) * 7 == pytest.approx(charged.download_bytes[index].sum(), rel=1e-12)
    assert sum(stage.upload_bytes.values()) * 7 == pytest.approx(charged.upload_bytes[index].sum(), rel=1e-12)


def test_actual_operations_are_the_executed_ones_per_image():
  config = config_of('lw_fedssl', batch_size=64, calibration_epochs=2)
  found = costs.method_cost(config, 32, 'actual', with_memory=False)
  plan = make_plans(config)[4]
  assert found.stages[4].flops == 45 * flops.executed_flops(config, 32, plan, 64).total_flops / 64
  assert found.stages[4].server_flops == 30 * flops.calibration_flops(config, 32, plan, 64).total_flops / 64
  assert costs.method_cost(config_of('layerwise'), 32, 'actual', with_memory=False).stages[4].server_flops == 0


def test_actual_memory_is_compiled_once_for_all_stages_of_a_shape():
  config = configs.with_values(configs.Config(), {'encoder': 'vit_micro', 'method': 'layerwise', 'batch_size': 8})
  cost = costs.method_cost(config, 8, 'actual')
  stages = cost.stages
  assert cost.peak_memory_bytes == max(stage.peak_memory_bytes for stage in stages)
  assert all(stage.peak_memory_bytes > stage.scratch_bytes > 0 for stage in stages)
  assert len({stage.peak_memory_bytes for stage in stages[1:]}) == 1
  assert stages[0].peak_memory_bytes != stages[1].peak_memory_bytes


def test_the_server_s_memory_is_that_of_its_own_step(monkeypatch):
  asked = []

  def peak(config, image_size, batch_size):
    asked.append((config.method.method, image_size, batch_size))
    return 7_654_321

  monkeypatch.setattr(server_planner, 'peak_bytes', peak)
  values = {'calibration_batch_size': 24, 'batch_size': 64}
  found = [
    costs.method_cost(config_of(method, **values), 32, 'actual', with_memory=False, with_server_memory=True)
    for method in ('lw_fedssl', 'layerwise')
  ]
  assert [cost.server_memory_bytes for cost in found] == [7_654_321, None]
  assert asked == [('lw_fedssl', 32, 24)]
  assert costs.to_json(found[0])['server_memory_bytes'] == 7_654_321
  totals = [[cell.strip() for cell in line.split('|')[1:-1]] for line in cost_tables.to_text(found).splitlines()[2:6]]
  assert [row[-1] for row in (totals[0], *totals[2:])] == ['server memory MB', '7.7', '-']
  assert 'server memory' not in cost_tables.to_text(found[1:])
  assert costs.method_cost(config_of('lw_fedssl'), 32, 'paper_v4', with_server_memory=True).server_memory_bytes is None


def test_micro_batches_and_rematerialization_are_counted_as_flops():
  plan = make_plans(config_of('layerwise'))[3]

  def count(**values):
    return flops.executed_flops(config_of('layerwise', **values), 32, plan, 64)

  whole = count()
  assert whole.recomputed_flops == 0
  again = whole.online_forward_flops
  assert count(micro_batch_size=16, batch_size=64).recomputed_flops == again
  assert count(rematerialize='all').recomputed_flops == again
  assert count(micro_batch_size=16, batch_size=64, rematerialize='all').total_flops == whole.total_flops + 2 * again
  assert count(rematerialize='elementwise') == whole  # matrix products are kept


def test_text_names_its_convention_and_compares_with_end_to_end():
  found = [costs.method_cost(config_of(method), 32, 'paper_v4') for method in ('end_to_end', 'layerwise')]
  text = cost_tables.to_text(found)
  assert text.startswith('convention paper_v4: GB = 1000 MiB')
  row = next(line for line in text.splitlines() if line.startswith('| layerwise'))
  assert [cell.strip() for cell in row.split('|')[1:-1]] == ['layerwise', '1.65', '5.08x', '139.4', '4.20x', '-', '-']


def test_plots_of_what_is_counted(tmp_path):
  found = [costs.method_cost(config_of(method), 32, 'paper_v4') for method in catalog.METHODS]
  names = ['flops_over_local_epochs.png', 'bytes_over_rounds.png']
  assert cost_plots.write_cost_plots(str(tmp_path), found) == names
  assert all((tmp_path / name).stat().st_size > 10_000 for name in names)


def test_unknown_convention():
  with pytest.raises(UsageError, match='--convention'):
    costs.method_cost(config_of('layerwise'), 32, 'paper_v9')


def test_expected_bytes_are_at_most_the_worst_case_and_other_figures_those_of_actual():
  config = config_of('layerwise', clients_per_round=2, client_dropout=0.1)
  expected, actual = (costs.method_cost(config, 32, name, with_memory=False) for name in ('expected', 'actual'))
  worst = costs.method_cost(config, 32, 'expected', worst_case_download=True, with_memory=False)

  def total(cost):
    return sum(sum(stage.download_bytes.values()) for stage in cost.stages)

  assert 0 < total(expected) < total(worst)
  assert total(expected) == pytest.approx(total(actual), rel=0.2)
  assert expected.total_flops == actual.total_flops
  assert costs.gb_bytes('expected') == 10**9
  assert 'mean over all seeds' in cost_tables.to_text([expected])
