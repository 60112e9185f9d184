"""The report's numbers, from made-up runs and costs whose answers are known; nothing is compiled."""

import numpy as np
import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax.report import evaluations, published, runs, sections
from lwfedssl_jax.report.tables import Entry
from lwfedssl_jax.resources import costs

PARTS = dict.fromkeys(costs.PARTS, 0.0)


def make_run(seed=0, knn=(0.4, 0.6), loss=(3.0, 2.0), evaluated=(), **values):
  """Two rounds of two stages; megabytes 1 and 3 down, 2 and 5 up."""
  config = configs.with_values(configs.Config(), {'method': 'layerwise', 'dataset': 'digits', 'seed': seed, **values})
  traffic = (1e6, 2e6), (3e6, 5e6)
  rows = [
    {
      'round': index,
      'loss': loss[index],
      'client_divergence': 0.01 * loss[index],
      'knn_accuracy': knn[index],
      'download_bytes': down,
      'upload_bytes': up,
      'effective_rank': 4.0 + index,
      'embedding_std': 0.5,
    }
    for index, (down, up) in enumerate(traffic)
  ]
  summary = {
    'dataset': 'digits',
    'encoder': 'vit_micro',
    'objective': 'moco_v3',
    'num_clients': 10,
    'num_rounds': 2,
    'final_knn_accuracy': knn[1],
    'random_init_knn_accuracy': 0.2,
    'raw_pixel_knn_accuracy': 0.9,
    'download_bytes': 4e6,
    'upload_bytes': 7e6,
    'seconds': 10.0 + seed,
    'params_sha256': 64 * '0',
  }
  return runs.FinishedRun(f'runs/{seed}', config, summary, rows, list(evaluated), {})


def make_stage(stage, flops, peak, down, up):
  return costs.StageCost(
    stage, 2 + stage, 6, stage, stage + 1, {**PARTS, 'blocks': down}, {**PARTS, 'heads': up}, flops, 0.0, peak, 0
  )


ACTUAL = costs.MethodCost(
  'layerwise', 'actual', (make_stage(0, 6e9, 10_485_760, 1e9, 0.25e9), make_stage(1, 12e9, 20_971_520, 2e9, 0.25e9))
)
PAPER = costs.MethodCost(
  'layerwise', 'paper_v4', (make_stage(0, 3e9, None, 1048.576e6, 0), make_stage(1, 4e9, None, 0, 2 * 1048.576e6))
)


def make_entries(groups):
  return [Entry(group, ACTUAL, PAPER) for group in groups]


@pytest.fixture
def seeds():
  return runs.group([make_run(), make_run(1, knn=(0.5, 0.9), loss=(5.0, 4.0))])


def chart(section, name):
  return next(item for item in section.items if getattr(item, 'name', None) == name).table.rows


def numbers(rows):
  return [[None if cell == '-' else float(cell) for cell in row[1:]] for row in rows[1:]]


def test_accuracy_is_set_against_all_bytes_up_to_then(seeds):
  found = numbers(chart(sections.overview(make_entries(seeds)), 'accuracy_against_bytes'))
  np.testing.assert_allclose(found, [[3, 0.45, 0.4, 0.5], [11, 0.75, 0.6, 0.9]])  # MB, mean, least, greatest


def test_accuracy_is_set_against_the_peak_of_the_most_demanding_stage(seeds):
  found = numbers(chart(sections.overview(make_entries(seeds)), 'accuracy_against_memory'))
  np.testing.assert_allclose(found, [[20.97, 0.75, 0.6, 0.9]], rtol=1e-3)


def test_one_row_a_group(seeds):
  heading, row = sections.overview(make_entries(seeds)).items[0].rows
  found = dict(zip(heading, row, strict=True))
  assert found == {
    'method': 'layerwise',
    'seeds': '0, 1',
    'kNN accuracy': '0.750 ± 0.212',
    'random weights': '0.200',
    'raw pixels': '0.900',
    'down, MB': '4.0',
    'up, MB': '7.0',
    'client memory, MB': '21',
    'GFLOPs per image': '18',
    'seconds': '10 ± 1',
  }  # 10.5, to even


def test_training_counts_rounds_from_one_and_stages_as_shares(seeds):
  section = sections.training_section(seeds)
  np.testing.assert_allclose(numbers(chart(section, 'losses')), [[1, 4, 3, 5], [2, 3, 2, 4]])
  np.testing.assert_allclose(
    numbers(chart(section, 'accuracy_over_training')), [[0.5, 0.45, 0.4, 0.5], [1, 0.75, 0.6, 0.9]]
  )
  np.testing.assert_allclose(
    numbers(chart(section, 'client_divergence')), [[1, 0.04, 0.03, 0.05], [2, 0.03, 0.02, 0.04]]
  )
  assert {item.name for item in section.items} == {
    'accuracy_over_training',
    'losses',
    'client_divergence',
    'effective_rank',
    'embedding_std',
  }  # nothing was calibrated


def test_costs_over_rounds_and_totals_each_in_its_convention():
  section = sections.costs_section(make_entries(runs.group([make_run()])))

  def steps(name):
    return [row[:2] for row in numbers(chart(section, name))]

  np.testing.assert_allclose(steps('memory_per_stage'), [[0, 10.49], [2, 10.49], [2, 20.97], [5, 20.97]])
  np.testing.assert_allclose(steps('flops_per_stage'), [[0, 1000], [2, 1000], [2, 2000], [5, 2000]])
  heading, row = section.items[-1].rows
  assert dict(zip(heading, row, strict=True)) == {
    'method': 'layerwise',
    'communication GB (paper_v4)': '3.000',
    'GFLOPs (paper_v4)': '7.00',
    'communication GB (actual)': '3.500',
    'GFLOPs (actual)': '18.00',
    'client memory, MB (actual)': '21',
  }


def test_the_paper_s_table_is_the_published_one_and_this_program_s_count_agrees():
  rows = published.published_section(runs.group([make_run()])).items[0].rows
  assert [[row[0], row[1], row[3], row[5]] for row in rows[1:]] == [
    ['end_to_end', '586', '8.40', '8.72'],
    ['layerwise', '139', '1.66', '2.61'],
    ['prog_fedssl', '318', '5.04', '-'],
  ]
  for _, gflops, own_gflops, gigabytes, own_gigabytes, *_ in rows[1:]:
    assert float(own_gflops) == pytest.approx(float(gflops), abs=1)
    assert float(own_gigabytes) == pytest.approx(float(gigabytes), abs=0.0101)  # two digits each


def evaluation(name, *accuracies, from_scratch=False):
  figures = ('accuracy', 'mean_per_class_accuracy', 'macro_precision', 'macro_recall', 'macro_f1')
  return {
    'name': name + ', from scratch' * from_scratch,
    'from_scratch': from_scratch,
    'runs': [{figure: accuracy + 0.01 * place for place, figure in enumerate(figures)} for accuracy in accuracies],
  }


def test_evaluations_are_means_over_runs_and_their_seeds():
  first = make_run(evaluated=[evaluation('knn', 0.5), evaluation('linear', 0.6, 0.7)])
  other = make_run(method='prog_fedssl', evaluated=[evaluation('knn', 0.9)])
  groups = runs.group([first, make_run(1, evaluated=[evaluation('knn', 0.7), evaluation('linear', 0.2, 0.3)]), other])
  table, folded = evaluations.evaluations_section(groups).items
  details = folded.table.rows
  assert table.rows == [
    ['method', 'knn', 'linear'],
    ['layerwise', '0.600 ± 0.141', '0.450 ± 0.238'],
    ['prog_fedssl', '0.900', '-'],
  ]
  assert details[0] == ['method', 'protocol', 'accuracy', 'per class', 'precision', 'recall', 'F1']
  assert details[3] == ['prog_fedssl', 'knn', '0.900', '0.910', '0.920', '0.930', '0.940']
  assert evaluations.evaluations_section(runs.group([make_run()])) is None


def test_random_weights_are_a_row_of_their_own_that_counts_once():
  scratch = evaluation('finetune', 0.2, 0.4, from_scratch=True)
  first = make_run(evaluated=[evaluation('finetune', 0.5, 0.7), scratch])
  same = make_run(method='prog_fedssl', evaluated=[scratch])
  table, folded = evaluations.evaluations_section(runs.group([first, same])).items
  assert table.rows == [
    ['method', 'finetune'],
    ['layerwise', '0.600 ± 0.141'],
    ['prog_fedssl', '-'],
    ['random weights', '0.300 ± 0.141'],
  ]
  assert [row[0] for row in folded.table.rows[1:]] == ['layerwise', 'random weights']
  wider = make_run(encoder='vit_tiny', evaluated=[evaluation('finetune', 0.1, from_scratch=True)])
  found = evaluations.evaluations_section(runs.group([first, wider])).items[0].rows
  assert {row[0].split(' (')[0]: row[1] for row in found[3:]} == {'random weights': '0.100'}
  assert len({row[0] for row in found}) == 5


@pytest.mark.parametrize(
  ('values', 'expected'),
  [([], None), ([0.5, None], None), ([0.5], (0.5, None, 0.5, 0.5)), ([3.0, 1.0], (2.0, 2**0.5, 1.0, 3.0))],
)
def test_a_missing_value_leaves_no_mean(values, expected):
  found = runs.stat(values)
  assert found == expected if expected is None else found == pytest.approx(expected)


@pytest.mark.parametrize(
  ('values', 'name'),
  [
    ({}, 'layerwise'),
    ({'server_calibration': True}, 'layerwise + calibration'),
    ({'method': 'lw_fedssl'}, 'lw_fedssl'),
    ({'method': 'lw_fedssl', 'representation_alignment': False}, 'lw_fedssl without alignment'),
    (
      {'method': 'lw_fedssl', 'server_calibration': False, 'representation_alignment': False},
      'lw_fedssl without calibration without alignment',
    ),
  ],
)
def test_names_list_mechanisms_that_differ_from_the_default(values, name):
  assert runs.method_name(make_run(**values).config) == name


def test_seeds_make_a_group_and_settings_or_mechanisms_another():
  groups = runs.group(
    [
      make_run(),
      make_run(learning_rate=0.5),
      make_run(1),
      make_run(server_calibration=True, auxiliary_fraction=0.1),
      make_run(1, learning_rate=0.5, workdir='elsewhere'),
    ]
  )
  assert [[run.config.run.seed for run in group.runs] for group in groups] == [[0, 1], [0, 1], [0]]
  assert len({group.name for group in groups}) == 3
