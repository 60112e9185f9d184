"""The presets of the paper's tables: what their sweeps run, that they run, and one table made by two commands."""

import json
import re

import numpy as np
import pytest

from experiments import command, evaluate, presets, sweep
from lwfedssl_jax import config as configs
from lwfedssl_jax.training import simulation
from lwfedssl_jax.training import sweep as sweeps
from lwfedssl_jax.workdir import metrics_writer
from tests import tiny
from tests.tools import preset_work

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('tiny_library', 'cheap_views')]

METHODS = ('end_to_end', 'layerwise', 'prog_fedssl')
# Methods, fields that vary and their numbers of values; the run of the sweep that is trained here.
TABLES = {
  'paper_v1': (('end_to_end', 'lw_fedssl', 'prog_fedssl'), {}, 1),
  'paper_v4': (METHODS, {}, 2),
  'v1_mechanisms': (('lw_fedssl',), {'server_calibration': 2, 'representation_alignment': 2}, 2),
  'v4_batch': (METHODS, {'batch_size': 4}, 4),
  'v4_blocks': (('layerwise', 'prog_fedssl'), {'blocks_per_stage': 5}, 4),
  'v4_byol': (METHODS, {'objective': 1}, 0),
  'v4_centralized': (('centralized', *METHODS), {}, 0),
  'v4_depth_dropout': (('layerwise', 'prog_fedssl'), {}, 1),
  'v4_dirichlet': (METHODS, {'dirichlet_beta': 3}, 5),
  'v4_dropout': (METHODS, {'client_dropout': 2}, 3),
  'v4_medmnist': (METHODS, {'image_size': 3}, 3),
  'v4_participation': (METHODS, {'clients_per_round': 2}, 2),
  'v4_resnet18': (METHODS, {}, 2),
  'v4_simclr': (METHODS, {'objective': 1}, 1),
}
SMALLER = (
  '--preset=scale_cpu',
  '--vit_width=8',
  '--vit_mlp_ratio=2',
  '--total_rounds=36',  # so that two rounds end no stage, and no embedding is measured
  '--stop_after_round=2',
  '--batch_size=8',
  '--image_size=8',
  '--patch_size=4',
  '--learning_rate=1e-3',
  '--knn_bank_images=50',
  '--tracker=none',
  *tiny.PLAIN_VIEWS,
)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  """MedMNIST's layout: 1,300 images of three classes to train on, 24 for validation, 30 to test."""
  generator, arrays = np.random.default_rng(0), {}
  for split, count in (('train', 1300), ('val', 24), ('test', 30)):
    labels = np.arange(count) % 3
    pixels = generator.integers(0, 60, (count, 8, 8, 3)) + 90 * np.eye(3, dtype=int)[labels][:, None, None]
    arrays |= {f'{split}_images': pixels.astype(np.uint8), f'{split}_labels': labels[:, None].astype(np.uint8)}
  path = tmp_path_factory.mktemp('presets') / 'data.npz'
  np.savez(path, **arrays)
  return f'--dataset=npz:{path}', f'--cache_dir={path.parent}'


def test_every_table_is_here():
  assert set(TABLES) == set(preset_work.paper_presets())


@pytest.mark.parametrize('preset', TABLES)
def test_a_preset_s_sweep_has_the_table_s_rows_and_runs(preset, images, tmp_path):
  methods, varied, chosen = TABLES[preset]
  for smaller in ((), SMALLER):
    runs = preset_work.plan(f'--preset={preset}', *smaller, *images)
    assert len(runs) == len(methods) * int(np.prod(list(varied.values())))
    assert {run.config.method.method for run in runs} == set(methods)
    for field, count in varied.items():
      assert len({configs.flatten(run.config)[field] for run in runs}) == count
  config = configs.with_values(runs[chosen].config, {'workdir': str(tmp_path / 'run')})
  simulation._shared_round.cache_clear()
  outcome = sweeps.run_all([runs[chosen]._replace(config=config)])
  assert not outcome.failed
  rows = metrics_writer.read_metrics(str(tmp_path / 'run'))
  assert [row['round'] for row in rows] == [0, 1]
  assert all(np.isfinite(row['loss']) for row in rows if row['participants'])


@pytest.mark.parametrize('preset', TABLES)
def test_a_preset_s_header_states_its_command_and_its_work(preset):
  text = (presets.FOLDER / f'{preset}.flags').read_text()
  assert f'#   python -m experiments.sweep --preset={preset} ' in text
  stated = re.search(r'# Work: (\d+) runs, (\S+) FLOPs on 100,000 images; (\S+) hours at 100 TFLOP/s', text)
  runs, work = preset_work.count_flops(preset)
  assert int(stated[1]) == runs
  assert float(stated[2]) == pytest.approx(work, rel=0.05)
  assert float(stated[3]) == pytest.approx(work / preset_work.RATE / 3600, rel=0.05, abs=0.06)
  assert '# Published' in text


def execute(capsys, one, *arguments):
  capsys.readouterr()
  code = command.execute(one, ['program', *arguments])
  printed = capsys.readouterr()
  assert code == 0, printed.err
  return printed.out.splitlines()


def test_two_commands_pretrain_on_train_finetune_on_val_and_test_on_test(images, tmp_path, capsys):
  """Every method of a sweep, and random weights beside them."""
  methods = ('--methods=layerwise,end_to_end', '--vit_depth=2', '--total_rounds=2', '--stop_after_round=0')
  printed = execute(
    capsys, sweep.COMMAND, '--preset=v4_medmnist', *SMALLER, *images, '--vary=', *methods, f'--output={tmp_path}/runs'
  )
  table = [line for line in printed if line.startswith('| ')]
  assert [line.split('|')[1].strip() for line in table[-2:]] == ['layerwise-seed0', 'end_to_end-seed0']
  printed = execute(
    capsys,
    evaluate.COMMAND,
    f'--workdir={tmp_path}/runs',
    '--protocol=finetune',
    '--train_split=val',
    '--epochs=1',
    '--warmup_epochs=0',
    '--batch_size=8',
  )
  name = f'finetune, {images[0].partition("=")[2]}, 100 % of labels, fitted on val'
  assert [found['name'] for found in json.loads(printed[-1])['results']] == [name, name, f'{name}, from scratch']
  heading = next(line for line in printed if line.startswith('| run'))
  assert 'mean per class accuracy' in heading
  for folder in (tmp_path / 'runs').iterdir():
    for path in (folder / 'evaluations').glob('*.json'):
      stored = json.loads(path.read_text())
      assert stored['runs'][0]['num_labels'] == stored['num_train_images'] == 24
      assert np.sum(stored['confusion']) == 30
