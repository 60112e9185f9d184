"""The comparison: what is compared to what, in which words, and which value is best."""

import pytest
from report_runs import Page, add_evaluation, fake_costs, read_entries, write_run

from lwfedssl_jax.report import files, finding, runs, sections, tables

MEGABYTES = {'layerwise': 40, 'end_to_end': 90, 'prog_fedssl': 90, 'lw_fedssl': 41.4, 'centralized': 90}


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch):
  fake_costs(monkeypatch, MEGABYTES)


def write_runs(root, *specifications):
  """Writes runs (method, seed, accuracy) or (method, seed, accuracy, {flag: value}) and returns their entries."""
  folders = []
  for index, (method, seed, accuracy, *values) in enumerate(specifications):
    folders.append(write_run(root / str(index), method=method, seed=seed, accuracy=accuracy, **(values or [{}])[0]))
  return read_entries(folders)


def cells(table):
  return {row[0]: dict(zip(table.rows[0], row)) for row in table.rows[1:]}


def test_finding_compares_the_best_method_to_end_to_end(tmp_path):
  entries = write_runs(tmp_path, ('end_to_end', 0, 0.825), ('layerwise', 0, 0.617), ('lw_fedssl', 0, 0.828))
  assert finding.find(entries) == (
    'lw_fedssl reaches 0.828 with 41 MB of client memory, end_to_end 0.825 with 90 MB (kNN accuracy, seed 0).'
  )


def test_methods_that_execute_their_blocks_differently_are_compared(tmp_path):
  lean, plain = {'rematerialize': 'elementwise'}, {'rematerialize': 'none'}
  entries = write_runs(tmp_path, ('end_to_end', 0, 0.825, lean), ('lw_fedssl', 0, 0.828, plain))
  assert finding.find(entries).startswith('lw_fedssl reaches 0.828 with 41 MB of client memory, end_to_end 0.825')


def test_finding_does_not_hide_that_end_to_end_is_better(tmp_path):
  entries = write_runs(tmp_path, ('end_to_end', 0, 0.9), ('layerwise', 0, 0.6), ('centralized', 0, 0.95))
  assert finding.find(entries).startswith(
    'layerwise reaches 0.600 with 40 MB of client memory, end_to_end 0.900 with 90 MB'
  )


def test_finding_over_seeds_gives_means_and_deviations(tmp_path):
  entries = write_runs(tmp_path, ('lw_fedssl', 0, 0.8), ('lw_fedssl', 1, 0.9), ('end_to_end', 0, 0.7))
  assert finding.find(entries) == (
    'lw_fedssl reaches 0.850 ± 0.071 with 41 MB of client memory, end_to_end 0.700 with 90 MB (kNN accuracy, means '
    'of 1 to 2 seeds).'
  )


@pytest.mark.parametrize(
  ('specifications', 'expected'),
  [
    (
      [('layerwise', 0, 0.6)],
      'layerwise reaches 0.600 with 40 MB of client memory, random weights 0.200 (kNN accuracy, seed 0).',
    ),
    (
      [('layerwise', 3, 0.6), ('prog_fedssl', 4, 0.5)],
      'layerwise reaches 0.600 with 40 MB of client memory, '
      'prog_fedssl 0.500 with 90 MB (kNN accuracy, one seed each).',
    ),
    (
      [('end_to_end', 0, 0.6, {'num_clients': 3}), ('layerwise', 0, 0.7)],
      'layerwise reaches 0.700 with 40 MB of client memory, end_to_end 0.600 with 90 MB (kNN accuracy, seed 0).',
    ),
    (
      [('layerwise', 0, None), ('end_to_end', 0, None)],
      'layerwise needs 40 MB of client memory and exchanges 6 MB; '
      'end_to_end needs 90 MB of client memory and exchanges 6 MB (no labels, so no accuracy).',
    ),
    ([('centralized', 0, None)], 'centralized needs 90 MB of client memory (no labels, so no accuracy).'),
    (
      [('layerwise', 0, 0.6), ('layerwise', 0, 0.7, {'dataset': 'tfds:mnist'})],
      'digits: layerwise, dataset=digits reaches 0.600 with 40 MB of client memory, random weights 0.200 '
      '(kNN accuracy, seed 0). tfds:mnist: layerwise, dataset=tfds:mnist '
      'reaches 0.700 with 40 MB of client memory, random weights '
      '0.200 (kNN accuracy, seed 0).',
    ),
  ],
)
def test_finding_states_only_figures_of_the_runs(tmp_path, specifications, expected):
  assert finding.find(write_runs(tmp_path, *specifications)) == expected


def test_ratios_are_to_end_to_end_with_the_same_settings(tmp_path):
  entries = write_runs(
    tmp_path,
    ('end_to_end', 0, 0.8),
    ('layerwise', 0, 0.6),
    ('prog_fedssl', 0, 0.7),
    ('layerwise', 0, 0.6, {'num_clients': 3, 'batch_size': 8}),
  )
  found = cells(tables.comparison(entries))
  ratios = ['×\u00a0less memory', '×\u00a0fewer bytes', '×\u00a0fewer FLOPs']
  small, other = (name for name in found if name.startswith('layerwise'))
  assert [found[small][ratio] for ratio in ratios] == ['2.25', '1.00', '2.25']  # 90 MB over 40 MB
  assert [found['prog_fedssl'][ratio] for ratio in ratios] == ['1.00'] * 3
  assert [found[other][ratio] for ratio in ratios] == ['-'] * 3


@pytest.mark.parametrize(
  ('values', 'same'),
  [
    ({'calibration_epochs': 9, 'alignment_weight': 3.0}, True),  # which end_to_end has no use for
    ({'blocks_per_stage': 1, 'rounds_per_stage': 1}, False),  # four rounds instead of two
    ({'blocks_per_stage': 4, 'rounds_per_stage': 2}, True),  # two rounds in one stage
    ({'learning_rate': 1.0}, False),
    ({'partition': 'dirichlet'}, False),
    ({'seed': 5}, True),
  ],
)
def test_settings_are_the_same_if_they_decide_the_same_end_to_end_run(tmp_path, values, same):
  reference = write_run(tmp_path / 'a', method='end_to_end')
  entries = read_entries([reference, write_run(tmp_path / 'b', method='layerwise', **values)])
  assert (entries[1].reference is not None) == same


@pytest.mark.parametrize('values', [{'server_calibration': True}, {'representation_alignment': True}])
def test_end_to_end_with_a_mechanism_is_no_reference(tmp_path, values):
  entries = read_entries(
    [write_run(tmp_path / 'a', method='end_to_end', **values), write_run(tmp_path / 'b', method='layerwise')]
  )
  assert [entry.reference for entry in entries] == [None, None]
  assert not any('×' in heading for heading in tables.comparison(entries).rows[0])


def test_best_values_are_marked_in_their_direction(tmp_path):
  entries = write_runs(tmp_path, ('end_to_end', 0, 0.8), ('lw_fedssl', 0, 0.9), ('layerwise', 0, 0.6))
  table = tables.comparison(entries)
  best = {(table.rows[row][0], table.rows[0][column]) for row, column in table.best}
  assert best == {
    ('lw_fedssl', 'kNN accuracy'),
    ('layerwise', 'client memory, MB'),
    ('layerwise', 'GFLOPs per image'),
    ('layerwise', '×\u00a0less memory'),
    ('layerwise', '×\u00a0fewer FLOPs'),
  }  # bytes and seconds: all alike


def test_best_is_marked_where_it_looks_the_same_and_not_across_datasets(tmp_path):
  entries = write_runs(
    tmp_path,
    ('end_to_end', 0, 0.80004),
    ('lw_fedssl', 0, 0.80001),
    ('layerwise', 0, 0.6),
    ('layerwise', 0, 0.99, {'dataset': 'tfds:mnist'}),
  )
  groups = [entry.group for entry in entries]
  rows = tables.best_rows(groups, [tables.accuracy(entry) for entry in entries], '{:.3f}', 1, max)
  assert rows == {0, 1}


def test_one_seed_has_no_mean_and_no_deviation(tmp_path):
  folders = [write_run(tmp_path / 'runs' / method, method=method) for method in ('layerwise', 'end_to_end')]
  for folder in (tmp_path / 'runs').iterdir():
    add_evaluation(folder, 0.5)
  files.write_report(folders, str(tmp_path / 'out'))
  for name in ('report.html', 'report.md'):
    text = (tmp_path / 'out' / name).read_text(encoding='utf-8')
    words = ' '.join(Page(text).text('body')) if name.endswith('html') else text
    assert '±' not in words and 'deviation over' not in words and 'mean of' not in words.lower()
    assert 'over seeds' not in words and 'greatest seed' not in words
  assert tables.comparison(read_entries(folders)).rows[0][1] == 'seed'
  assert not any(key.endswith('_std') for key in tables.records(read_entries(folders))[0])


def test_several_seeds_are_grouped_and_listed(report):
  _, result, text = report
  assert result['groups'] == 3
  line = next(line for line in result['table'].splitlines() if line.startswith('| layerwise  '))
  assert [cell.strip() for cell in line.split('|')][2:4] == ['0, 1', '0.600 ± 0.141']
  assert any(line.startswith('| layerwise + calibration') for line in result['table'].splitlines())
  assert 'Mean ± standard deviation over seeds where a method has several.' in text


def test_rows_in_files_are_those_of_the_table(tmp_path):
  entries = write_runs(tmp_path, ('lw_fedssl', 0, 0.81), ('lw_fedssl', 1, 0.9), ('end_to_end', 0, 0.7))
  table, records = cells(tables.comparison(entries)), tables.records(entries)
  for record in records:
    shown = table[record['method']]
    assert shown['seeds'] == ', '.join(map(str, record['seeds']))
    for column in tables.columns_with_values(entries):
      std = record.get(f'{column.key}_std')
      text = column.form.format(record[column.key] / column.scale)
      assert shown[column.heading] == text + (f' ± {column.form.format(std / column.scale)}' if std else '')
  assert len(table['lw_fedssl']) == 2 + len(tables.columns_with_values(entries))
  assert records[0]['peak_memory_bytes'] == 41.4e6 and records[0]['seeds'] == [0, 1]


def test_groups_of_one_method_are_named_by_what_differs(tmp_path):
  entries = write_runs(
    tmp_path, ('layerwise', 0, 0.5, {'learning_rate': 1e-3}), ('layerwise', 0, 0.5, {'learning_rate': 2e-3})
  )
  assert [entry.name for entry in entries] == ['layerwise, learning_rate=0.001', 'layerwise, learning_rate=0.002']


def test_a_folder_of_runs_gives_the_finished_and_names_the_others(tmp_path):
  write_run(tmp_path / 'b')
  write_run(tmp_path / 'a', finished=False, rounds_per_stage=3)
  (tmp_path / 'c').mkdir()
  found, unfinished = runs.find([str(tmp_path)])
  assert found == [str(tmp_path / 'b')]
  assert unfinished == [runs.UnfinishedRun(str(tmp_path / 'a'), 2, 6)]
  assert runs.find([str(tmp_path / 'a')]) == ([str(tmp_path / 'a')], [])  # asked for by name: an error when it is read


def test_only_common_settings_of_runs_are_described(tmp_path):
  entries = write_runs(tmp_path, ('layerwise', 0, 0.5), ('end_to_end', 0, 0.5))
  assert sections.overview(entries).text.startswith('digits, vit_micro, moco_v3, 2 clients, 2 rounds.')
  entries[0].group.runs[0].summary['num_clients'] = 3
  assert sections.overview(entries).text.startswith('digits, vit_micro, moco_v3, 2 rounds.')
