"""Settings, provenance, the paper's table, clients, the key of the scatter plots."""

import numpy as np
import pytest
from report_runs import ENVIRONMENT, add_embeddings, fake_costs, read_entries, write_run

from lwfedssl_jax import config as configs
from lwfedssl_jax.report import clients, embeddings, provenance, published, runs
from lwfedssl_jax.report.items import Chart, Folded, Key, Table

PAPER = {
  'encoder': 'vit_tiny',
  'image_size': 32,
  'patch_size': 4,
  'num_clients': 10,
  'rounds_per_stage': 15,
  'blocks_per_stage': 1,
  'batch_size': 512,
}


def read_groups(*folders):
  return runs.group([runs.read_run(folder) for folder in folders])


def by_caption(section, start):
  return next(item for item in section.items if isinstance(item, Table) and item.caption.startswith(start))


def test_settings_show_what_differs_and_fold_the_defaults(tmp_path):
  section = provenance.settings_section(
    read_groups(
      write_run(tmp_path / 'a', learning_rate=0.1, data_dir='/data', resume=True),
      write_run(tmp_path / 'b', learning_rate=0.2, data_dir='/data', resume=True),
    )
  )
  differing, chosen = by_caption(section, 'Runs'), by_caption(section, 'Shared settings')
  [folded] = [item for item in section.items if isinstance(item, Folded)]
  assert [row[:2] for row in differing.rows] == [['run', 'learning_rate'], ['a', '0.1'], ['b', '0.2']]
  assert ['batch_size', '4', '64'] in chosen.rows and ['num_clients', '2', '10'] in chosen.rows
  assert all(value != default for _, value, default in chosen.rows[1:])
  assert ['temperature', '0.2'] in folded.table.rows
  listed = {row[0] for table in (chosen, folded.table) for row in table.rows[1:]}
  assert folded.summary == f'{len(folded.table.rows) - 1} settings at their defaults'
  assert not listed & {'workdir', 'data_dir', 'resume', 'learning_rate'}
  assert listed | {'learning_rate'} == set(configs.flatten(configs.Config())) - runs.run_dir.FREE_FIELDS


def test_provenance_names_the_runs_of_a_fact_that_differs(tmp_path):
  section = provenance.provenance_section(
    read_groups(
      write_run(tmp_path / 'a'),
      write_run(tmp_path / 'b', seed=1, environment={'git_revision': 'fedcba', 'started': '2026-03-05T07:08:09+00:00'}),
    ),
    {'written': 'today', 'command': 'python -m x'},
  )
  rows = by_caption(section, 'The runs').rows
  assert ['started', '2026-03-04 05:06 to 2026-03-05 07:08 UTC'] in rows
  assert [row[1] for row in rows if row[0] == 'git revision'] == ['abcdef0123 (a)', 'fedcba (b)']
  for fact, value in (('command', ENVIRONMENT['command']), ('host', 'a host'), ('devices', '1 × cpu'), ('jax', '0.10')):
    assert [fact, value] in rows
  assert ['command', 'python -m x'] in by_caption(section, 'This report').rows


def test_provenance_of_runs_that_recorded_little(tmp_path):
  bare = dict.fromkeys(ENVIRONMENT) | {'versions': {}}
  folder = write_run(tmp_path / 'a')
  run = runs.read_run(folder)
  run = run._replace(environment={key: value for key, value in run.environment.items() if key not in bare})
  rows = by_caption(provenance.provenance_section([runs.Group('m', (run,))], {}), 'The runs').rows
  assert rows == [['fact', 'value']]


def paper_run(tmp_path, **values):
  return write_run(tmp_path / str(len(list(tmp_path.iterdir()))), **{'method': 'layerwise', **PAPER, **values})


def test_the_paper_s_table_names_the_runs_that_have_its_setting(tmp_path):
  section = published.published_section(
    read_groups(
      paper_run(tmp_path),
      paper_run(tmp_path, method='lw_fedssl'),
      paper_run(tmp_path, method='prog_fedssl', batch_size=4),
    )
  )
  assert section.title == "The paper's table" and 'nother setting' not in section.text
  assert {row[0]: row[-1] for row in section.items[0].rows[1:]} == {
    'end_to_end': 'none',
    'layerwise': 'layerwise',
    'prog_fedssl': 'none',
  }
  layerwise = section.items[0].rows[2]
  assert layerwise[1] == layerwise[2] == '139' and layerwise[3] == '1.66'


@pytest.mark.parametrize(
  ('values', 'named'),
  [
    ({'encoder': 'vit_micro'}, 'encoder vit_micro instead of vit_tiny'),
    ({'image_size': 64}, 'image_size 64 instead of 32'),
    ({'patch_size': 8}, 'patch_size 8 instead of 4'),
    ({'objective': 'byol'}, 'objective byol instead of moco_v3'),
    ({'rounds_per_stage': 2}, 'rounds 24 instead of 180'),
    ({'num_clients': 5}, 'num_clients 5 instead of 10'),
    ({'clients_per_round': 5}, 'clients_per_round 5 instead of 10'),
    ({'client_dropout': 0.5}, 'client_dropout 0.5 instead of 0.0'),
    ({'local_epochs': 1}, 'local_epochs 1 instead of 3'),
    ({'batch_size': 4}, 'batch_size 4 instead of 512'),
    ({'server_calibration': True}, 'none of their methods'),
  ],
)
def test_any_other_setting_is_labeled_as_such(tmp_path, values, named):
  section = published.published_section(read_groups(paper_run(tmp_path, **values)))
  assert section.title == "The paper's table: another setting"
  assert section.text.startswith('The setting differs from that of the runs on this page. ') and named in section.text
  assert 'another setting' in section.items[0].caption
  assert {row[-1] for row in section.items[0].rows[1:]} == {'none'}


def test_clients_have_a_row_each(tmp_path):
  section = clients.clients_section(
    read_groups(write_run(tmp_path / 'a', method='layerwise'), write_run(tmp_path / 'b', method='layerwise', seed=1))
  )
  [table] = [item for item in section.items if isinstance(item, Table)]
  assert table.caption == 'layerwise, seed 0' and 'First seed' in section.text
  assert table.rows == [
    ['client', 'images', 'rounds', 'returned', 'rejected', 'last loss', 'down, MB', 'up, MB'],
    ['0', '3', '2', '2', '0', '1.500', '2.0', '8.0'],
    ['1', '2', '2', '1', '1', '-', '2.0', '0.0'],
  ]
  [chart] = [item for item in section.items if isinstance(item, Chart)]
  assert 'layerwise ends at 1.5' in chart.alternative


def test_many_clients_are_folded_and_old_rows_have_none(tmp_path, monkeypatch):
  groups = read_groups(write_run(tmp_path / 'a'))
  monkeypatch.setattr(clients, 'SHOWN_CLIENTS', 1)
  assert isinstance(clients.clients_section(groups).items[-1], Folded)
  for row in groups[0].runs[0].rows:
    del row['client_ids'], row['client_losses']
  assert clients.clients_section(groups) is None


def test_scatter_plots_have_a_key_of_the_classes_that_occur(tmp_path):
  write_run(tmp_path / 'a', method='layerwise')
  add_embeddings(tmp_path / 'a')
  section = embeddings.embeddings_section(read_groups(str(tmp_path / 'a')))
  assert [type(item) for item in section.items] == [Key, Chart, Chart, Chart, Chart]
  assert section.items[0].entries == [('3', 0, '3'), ('B', 1, 'cat'), ('C', 2, 'dog')]
  assert section.items[1].plot.titles == {'class-0': ['class 3'], 'class-1': ['class cat'], 'class-2': ['class dog']}


def test_classes_without_names_are_numbered_and_images_without_labels_have_no_key():
  assert embeddings.make_key(np.array([2, 0, -1, 2]), ['0', '1', '2']).entries == [('0', 0, '0'), ('2', 2, '2')]
  assert embeddings.make_key(np.array([-1, -1]), []).entries == []


def test_key_is_shown_once_in_the_page(report):
  assert report[2].count('aria-label="Signs of the classes"') == 1
  assert '<b style="color: var(--c1)">B</b> cat' in report[2] and '</b> class 3' in report[2]
  assert 'Signs of the classes: 3, B cat, C dog.' in (report[0] / 'report.md').read_text()


def test_costs_are_counted_once_for_each_group(tmp_path, monkeypatch):
  fake_costs(monkeypatch, {'layerwise': 40})
  entries = read_entries([write_run(tmp_path / str(seed), method='layerwise', seed=seed) for seed in (0, 1)])
  assert len(entries) == 1 and entries[0].actual.convention == 'actual' and entries[0].paper.convention == 'paper_v4'
