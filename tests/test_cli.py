"""Commands as a user types them: one line and exit code 2 for mistakes, presets that never beat the command line."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from PIL import Image

from experiments import command as commands
from experiments import flags, presets, sweep
from lwfedssl_jax import UsageError, catalog, run_evaluation
from lwfedssl_jax import config as configs
from lwfedssl_jax.resources import predict, roofline, targets
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
PRESETS = sorted((ROOT / 'experiments' / 'presets').glob('*.flags'))
SMALL = (
  '--encoder=vit_micro',
  '--image_size=8',
  '--patch_size=4',
  '--num_clients=2',
  '--batch_size=8',
  '--rounds_per_stage=1',
  '--blocks_per_stage=4',
  '--local_epochs=1',
  '--auxiliary_fraction=0.2',
  '--flip_probability=0.25',
  *tiny.PLAIN_VIEWS,
)


class Result(NamedTuple):
  returncode: int
  stdout: str
  stderr: str


@pytest.fixture
def command(capsys):
  """Runs a command in this process, as `python -m` does in one of its own."""

  def execute(module, *arguments):
    one = importlib.import_module(f'experiments.{module}').COMMAND
    one.flags.unparse_flags()
    capsys.readouterr()
    return Result(commands.execute(one, [f'experiments/{module}.py', *arguments]), *capsys.readouterr())

  yield execute
  jax.config.update('jax_enable_compilation_cache', True)  # which a benchmark switches off


def start(module, *arguments, without=(), **environment):
  """Runs a command in a process of its own."""
  inherited = {name: value for name, value in os.environ.items() if name not in without}
  return subprocess.run(
    [sys.executable, '-m', f'experiments.{module}', *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    env=inherited | environment,
  )


def parsed_config(*arguments):
  """The configuration that `pretrain` would run with."""
  parsed = commands.Command('', absl_flags.FlagValues(), dict, has_config=True)
  commands.parse(parsed, arguments)
  return flags.config_from_flags(parsed.flags)


def write_class_folder(path, num_classes=2, per_class=20, size=(20, 14)):
  generator = np.random.default_rng(0)
  for label in range(num_classes):
    (path / f'class_{label}').mkdir(parents=True)
    for index in range(per_class):
      pixels = generator.integers(0, 255, (*size, 3), np.uint8) // (label + 1)
      Image.fromarray(pixels).save(path / f'class_{label}' / f'{index}.png')


MISTAKES = {
  'unknown dataset': (('--dataset=nonsense',), '--dataset: expected digits, folder:PATH'),
  'missing folder': (('--dataset=folder:{tmp}/none',), '--dataset'),
  'missing npz': (('--dataset=npz:{tmp}/none.npz',), '--dataset'),
  'unprepared tfds': (('--dataset=tfds:mnist', '--data_dir={tmp}'), 'download_and_prepare'),
  'mixed sizes': (('--dataset=folder:{tmp}/mixed', '--image_size=0'), '--image_size'),
  'patch does not divide': (('--image_size=16', '--patch_size=5'), '--patch_size: expected a divisor'),
  'patch does not divide the native size': (('--image_size=0', '--patch_size=3'), '--patch_size: expected a divisor'),
  'more clients than images': (('--num_clients=2000',), '--num_clients: expected at most'),
  'batch larger than every client': (('--batch_size=1000',), '--batch_size: expected at most'),
  'labels needed': (('--dataset=folder:{tmp}/flat', '--image_size=8', '--partition=dirichlet'), '--partition'),
  'workdir of a run': (('--workdir={tmp}/used',), '--workdir: expected a new folder'),
  'workdir is a file': (('--workdir={tmp}/file',), '--workdir: expected a folder'),
  'no workdir': (('--workdir=',), '--workdir: expected a folder'),
  'unknown flag': (('--no_such_flag=1',), 'no_such_flag'),
  'bad choice': (('--method=magic',), '--method'),
  'bad number': (('--batch_size=many',), '--batch_size'),
  'out of range': (('--temperature=0',), '--temperature: expected more than 0'),
  'not finite': (('--learning_rate=nan',), '--learning_rate: expected a finite number'),
  'bad tuple': (('--crop_area=0.5',), '--crop_area: expected 2 comma-separated values'),
  'tuple of words': (('--crop_area=a,b',), '--crop_area: expected 2 comma-separated values'),
  'blocks do not divide': (('--blocks_per_stage=3',), '--blocks_per_stage: expected a divisor of the 4 blocks'),
  'too many per round': (('--clients_per_round=3',), '--clients_per_round: expected at most'),
  'no server images': (('--auxiliary_fraction=0',), '--auxiliary_fraction: expected more than 0'),
  'positional argument': (('digits',), 'expected flags only'),
  'missing preset': (('--flagfile={tmp}/none.flags',), 'none.flags'),
}
IN_A_PROCESS = ('unknown dataset', 'unknown flag')  # of its own, as the other commands' first mistakes below


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistake_is_one_line_and_exit_code_2_and_writes_nothing(mistake, tmp_path, command):
  write_class_folder(tmp_path / 'mixed', size=(20, 14))
  (tmp_path / 'flat').mkdir()
  for index in range(30):
    Image.new('RGB', (8, 8), (index, 0, 0)).save(tmp_path / 'flat' / f'{index}.png')
  (tmp_path / 'used').mkdir()
  (tmp_path / 'used' / 'config.json').write_text('{}')
  (tmp_path / 'file').write_text('')
  before = sorted(tmp_path.rglob('*'))
  arguments, expected = MISTAKES[mistake]
  given = [argument.format(tmp=tmp_path) for argument in arguments]
  begin = start if mistake in IN_A_PROCESS else command
  result = begin(
    'pretrain', '--dataset=digits', *SMALL, f'--workdir={tmp_path}/run', f'--cache_dir={tmp_path}/cache', *given
  )
  assert result.returncode == 2, result.stderr
  lines = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
  assert len(lines) == 1, result.stderr
  assert expected in lines[0]
  assert 'Traceback' not in result.stderr
  assert result.stdout == ''
  assert sorted(tmp_path.rglob('*')) == before


def test_a_run_needs_no_flag_but_a_folder_and_no_tensorflow_datasets(tmp_path):
  code = (
    'import sys; sys.modules["tensorflow_datasets"] = sys.modules["importlib_resources"] = None; '
    'from experiments import pretrain; pretrain.run()'
  )
  result = subprocess.run(
    [sys.executable, '-c', code, f'--workdir={tmp_path}/run', '--stop_after_round=1'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  config, summary = json.loads(lines[0].removeprefix('config: ')), json.loads(lines[-1])
  assert (config['dataset'], config['image_size'], config['method']) == ('digits', 8, 'lw_fedssl')
  assert summary['rounds_done'] == 1 and not summary['finished']


@pytest.fixture(scope='module')
def class_folder_run(tmp_path_factory):
  root = tmp_path_factory.mktemp('cli')
  write_class_folder(root / 'images', per_class=30)
  return root, as_a_user(root, 'run')


def as_a_user(root, workdir):
  """Compiled fully, into a cache of its own."""
  environment = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '0', 'XDG_CACHE_HOME': str(root / 'user_cache')}
  without = ('JAX_COMPILATION_CACHE_DIR', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', 'XLA_FLAGS')
  return start(
    'pretrain', f'--dataset=folder:{root}/images', *SMALL, f'--workdir={root}/{workdir}', without=without, **environment
  )


def test_second_run_compiles_nothing_and_ends_with_the_same_bits(class_folder_run):
  root, first = class_folder_run

  def compiled():
    return {path.name for path in (root / 'user_cache' / 'lwfedssl_jax' / 'compiled').glob('*-cache')}

  before = compiled()
  assert len(before) > 5
  second = as_a_user(root, 'again')
  assert compiled() == before

  def digest(result):
    return json.loads(result.stdout.splitlines()[-1])['params_sha256']

  assert digest(second) == digest(first)


def test_folder_of_the_users_own_images_trains(class_folder_run):
  root, result = class_folder_run
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  config = json.loads(lines[0].removeprefix('config: '))
  summary = json.loads(lines[-1])
  assert config['method'] == 'lw_fedssl' and config['image_size'] == 8
  assert summary == json.loads((root / 'run' / 'summary.json').read_text())
  assert summary['num_rounds'] == 1 and 0 <= summary['final_knn_accuracy'] <= 1


def test_npz_in_medmnist_layout_trains(tmp_path, command):
  generator = np.random.default_rng(0)
  arrays = {}
  for split, count in (('train', 60), ('val', 10), ('test', 20)):
    arrays[f'{split}_labels'] = generator.integers(0, 3, (count, 1))
    arrays[f'{split}_images'] = generator.integers(0, 255, (count, 8, 8), np.uint8)
  np.savez(tmp_path / 'data.npz', **arrays)
  result = command(
    'pretrain', f'--dataset=npz:{tmp_path}/data.npz', *SMALL, '--objective=simclr', f'--workdir={tmp_path}/run'
  )
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout.splitlines()[-1])['objective'] == 'simclr'


def test_images_without_labels_train_and_report_no_accuracy(tmp_path, command):
  (tmp_path / 'flat').mkdir()
  for index in range(40):
    Image.new('L', (12, 9), 6 * index).save(tmp_path / 'flat' / f'{index}.jpg')
  result = command(
    'pretrain', f'--dataset=folder:{tmp_path}/flat', *SMALL, '--objective=byol', f'--workdir={tmp_path}/run'
  )
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout.splitlines()[-1])['final_knn_accuracy'] is None
  assert (tmp_path / 'run' / 'partition.png').exists()


def test_report_compares_finished_runs(class_folder_run, command):
  root, _ = class_folder_run
  result = command('report', f'--workdirs={root}/run', f'--output={root}/report')
  assert result.returncode == 0, result.stderr
  assert result.stdout.count('| lw_fedssl |') == 1
  assert Image.open(root / 'report' / 'accuracy_against_bytes.png').size[0] > 500
  assert json.loads(result.stdout.splitlines()[-1]) == {'report': f'{root}/report/report.html', 'groups': 1}
  for name in ('report.md', 'report.csv', 'report.json'):
    assert 'lw_fedssl' in (root / 'report' / name).read_text()


def test_run_is_evaluated_and_exported(class_folder_run, command):
  root, _ = class_folder_run
  result = command(
    'evaluate',
    f'--workdir={root}/run',
    '--protocol=finetune',
    '--epochs=2',
    '--warmup_epochs=1',
    '--batch_size=64',
    '--learning_rate=0.002',
    '--weight_decay=0.3',
    '--seeds=0,1',
  )
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout.splitlines()[-1])['results']
  assert [entry['name'] for entry in found] == [f'finetune, folder:{root}/images, 100 % of labels']
  assert 0 <= found[0]['mean']['accuracy'] <= 1
  (kept,) = run_evaluation.read_evaluations(str(root / 'run'))
  assert kept['options'] == {
    'epochs': 2,
    'warmup_epochs': 1,
    'batch_size': 64,
    'learning_rate': 0.002,
    'weight_decay': 0.3,
    'flip_probability': 0.25,
  }
  result = command('export', f'--workdir={root}/run', f'--output={root}/encoder.safetensors')
  assert result.returncode == 0, result.stderr
  written = json.loads(result.stdout.splitlines()[-1])
  assert json.loads(pathlib.Path(written['description']).read_text())['arguments']['embed_dim'] == 64
  assert os.path.getsize(written['weights']) > 4 * 50_000 * 4  # float32 of four blocks


MISTAKES_OF_OTHERS = (
  ('evaluate', (), '--workdir: expected the folder of a run'),
  ('evaluate', ('--workdir={tmp}',), '--workdir: expected the folder of a run, {tmp} has no config.json'),
  ('evaluate', ('--workdir={tmp}/none',), '--workdir: expected the folder of a run, there is no {tmp}/none'),
  ('evaluate', ('--workdir={tmp}', '--seeds='), '--seeds: expected at least one whole number'),
  ('evaluate', ('--workdir={tmp}', '--label_fraction=0'), '--label_fraction: expected more than 0'),
  ('evaluate', ('--workdir={tmp}', '--seeds=a'), '--seeds: expected whole numbers'),
  ('evaluate', ('--workdir={tmp}', '--protocol=magic'), 'protocol'),
  ('export', ('--workdir={tmp}',), '--workdir: expected the folder of a run, {tmp} has no config.json'),
  ('export', ('--workdir={tmp}/none',), '--workdir: expected the folder of a run, there is no {tmp}/none'),
  ('sweep', (), '--output: expected a folder'),
  ('sweep', ('--output={tmp}', '--vary=nonsense=1'), '--vary: expected FLAG=VALUE'),
  (
    'sweep',
    ('--output={tmp}', '--vary=batch_size=4,8', '--vary', 'seed=1'),
    "--vary: expected one, whose parts are separated by ';', got 2 of them",
  ),
  ('sweep', ('--output={tmp}', '--methods=magic'), '--method: expected one of'),
  ('sweep', ('--output={tmp}', '--workdir={tmp}'), '--workdir: expected none'),
  ('sweep', ('--output={tmp}', '--seeds=x'), '--seeds: expected whole numbers'),
  ('benchmark', ('--suite=devices', '--image_size=8'), 'xla_force_host_platform_device_count'),
)


@pytest.mark.parametrize(('module', 'arguments', 'expected'), MISTAKES_OF_OTHERS)
def test_mistake_is_one_line_and_writes_nothing(module, arguments, expected, tmp_path, command):
  first = next(row for row in MISTAKES_OF_OTHERS if row[0] == module)
  begin = start if first[1] == arguments else command
  result = begin(module, *(argument.format(tmp=tmp_path) for argument in arguments))
  assert result.returncode == 2, result.stderr
  assert expected.format(tmp=tmp_path) in result.stderr and 'Traceback' not in result.stderr
  assert result.stdout == '' and not any(tmp_path.iterdir())


def test_sweep_lists_its_runs_and_reports_failures_in_its_exit_code(class_folder_run, tmp_path, command):
  root, _ = class_folder_run
  small = [f'--dataset=folder:{root}/images', *SMALL, f'--output={tmp_path}/sweep']
  result = command('sweep', *small, '--methods=layerwise,end_to_end', '--seeds=0,1', '--dry_run')
  assert result.returncode == 0, result.stderr
  assert '4 runs, 4 to do:' in result.stdout and not (tmp_path / 'sweep').exists()
  (tmp_path / 'sweep').mkdir()
  (tmp_path / 'sweep' / 'layerwise-seed0').write_text('a file where a folder must be')
  result = command('sweep', *small, '--methods=layerwise')
  assert result.returncode == 1, result.stderr
  assert 'Traceback' not in result.stderr
  failed = json.loads(result.stdout.splitlines()[-1])['failed']
  assert list(failed) == [f'{tmp_path}/sweep/layerwise-seed0']
  assert 'expected a folder, ' in failed[f'{tmp_path}/sweep/layerwise-seed0']


def test_report_names_a_run_that_is_not_finished(tmp_path, command):
  result = command('report', f'--workdirs={tmp_path}')
  assert result.returncode == 2
  assert 'expected a finished run' in result.stderr


PUBLISHED = {  # arXiv 2401.11647 v4, Table 2: GB and GFLOPs
  'moco_v3': {'end_to_end': (8.40, 586), 'layerwise': (1.66, 139), 'prog_fedssl': (5.04, 318)},
  'byol': {'end_to_end': (8.40, 586), 'layerwise': (1.66, 139), 'prog_fedssl': (5.04, 318)},
  'simclr': {'end_to_end': (8.03, 1169), 'layerwise': (1.29, 278), 'prog_fedssl': (4.68, 635)},
}


@pytest.mark.parametrize('objective', PUBLISHED)
def test_resources_reproduces_the_paper(objective, command):
  result = command('resources', '--encoder=vit_tiny', '--image_size=32', f'--objective={objective}', '--format=json')
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  found = json.loads(lines[-1])
  assert len(lines) == 2 and lines[0].startswith('config: ')
  assert (found['convention'], found['objective']) == ('paper_v4', objective)
  assert list(found['methods']) == list(catalog.METHODS)
  for method, (gb, gflops) in PUBLISHED[objective].items():
    assert found['methods'][method]['communication_gb'] == pytest.approx(gb, abs=0.01)
    assert found['methods'][method]['gflops'] == pytest.approx(gflops, abs=2 if objective == 'simclr' else 1)


def test_resources_of_one_method_as_table_and_plots(tmp_path, command):
  result = command(
    'resources',
    '--encoder=vit_micro',
    '--image_size=8',
    '--method=layerwise',
    '--batch_size=8',
    '--convention=actual',
    f'--plots={tmp_path}/plots',
    '--client_memory_budget_mb=1000',
  )
  assert result.returncode == 0, result.stderr
  assert 'convention actual: GB = 10^9 bytes' in result.stdout
  assert 'layerwise: memory plan: micro_batch_size=8 of 8' in result.stdout
  found = json.loads(result.stdout.splitlines()[-1])['methods']
  assert list(found) == ['layerwise'] and found['layerwise']['peak_memory_bytes'] > 1e6
  assert len(list((tmp_path / 'plots').glob('*.png'))) == 3


def test_resources_for_a_target_show_a_step_of_each_shape_and_the_whole_run(monkeypatch, command):
  chip = targets.Target('chip', 'a chip', 'gpu', (), 1000, targets.Peaks({'float32': 1e12}, 1e9), {})
  line = roofline.Roofline(0.0, 0.0, 0.0, 0.0, 0.5, 1, {})
  asked = []

  def predict_steps(config, image_size, target, plans):
    asked.append([plan.stage + 1 for plan in plans])
    return [predict.StepPrediction(config.method.method, plan.stage, 10, True, None, line) for plan in plans]

  monkeypatch.setattr(targets, 'load', lambda *_: chip)
  monkeypatch.setattr(targets.Target, 'make_mesh', lambda *_: None)
  monkeypatch.setattr(predict, 'predict_steps', predict_steps)
  size = ('--encoder=vit_micro', '--image_size=8', '--batch_size=50', '--num_clients=2', '--rounds_per_stage=3')
  run = (*size, '--local_epochs=1', '--method=layerwise', '--auxiliary_fraction=0', '--target=chip')
  result = command('resources', *run, '--target_images=200')
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout.splitlines()[-1])
  assert [step['stage'] + 1 for step in found['steps']] == [1, 4]
  # Four stages of three rounds, two clients of 100 images, two batches each, half a second a step.
  assert found['runs'] == [{'method': 'layerwise', 'num_images': 200, 'num_steps': 48, 'seconds': 24.0}]
  found = json.loads(command('resources', *run, '--stages=2').stdout.splitlines()[-1])
  assert [step['stage'] + 1 for step in found['steps']] == [2] and found['runs'] == []
  assert asked == [[1, 2, 3, 4], [2]]


def test_benchmark_compares_every_case_with_end_to_end(command):
  result = command(
    'benchmark', '--suite=step', '--encoder=vit_micro', '--image_size=8', '--batch_size=8', '--repeats=2'
  )
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout.splitlines()[-1])
  cases = {case['case']: case for case in found['cases']}
  assert next(iter(cases)) == 'end_to_end, stage 1' and cases['end_to_end, stage 1']['ratio_to_end_to_end'] == 1
  assert {'layerwise, stage 1', 'layerwise, stage 4', 'lw_fedssl, stage 4', 'prog_fedssl, stage 2'} <= cases.keys()
  assert cases['layerwise, stage 4']['peak_bytes'] < cases['end_to_end, stage 1']['peak_bytes']
  assert all(0 < case['share_of_matrix_product_rate'] < 1 for case in found['cases'])
  assert 'PyTorch end_to_end, stage 1' in cases or 'PyTorch is skipped' in result.stdout


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ((), '--image_size: expected the side'),
    (('--image_size=32', '--convention=paper_v9'), 'convention'),
    (('--image_size=32', '--patch_size=5'), '--patch_size: expected a divisor'),
    (('--image_size=32', '--measure_memory'), '--measure_memory: expected --convention=actual'),
    (('--image_size=32', '--batch_size=64', '--micro_batch_size=48'), '--micro_batch_size: expected a divisor'),
  ],
)
def test_mistake_about_resources_is_one_line(arguments, expected, command):
  result = command('resources', *arguments)
  assert result.returncode == 2
  assert expected in result.stderr and 'Traceback' not in result.stderr and result.stdout == ''


def test_command_line_beats_preset_wherever_the_preset_stands():
  typed = ['--seed=3', '--flagfile', 'a.flags', '--batch_size=8', '--flagfile=b.flags']
  assert presets.split(typed) == (['--flagfile=a.flags', '--flagfile=b.flags'], ['--seed=3', '--batch_size=8'])


@pytest.mark.parametrize(
  ('typed', 'expected'),
  [
    (
      ['--seed=1', '--preset=quickstart', '--preset', 'paper_v1'],
      ['--seed=1', '--flagfile={}/quickstart.flags', '--flagfile={}/paper_v1.flags'],
    ),
    (['--preset=paper_v4', '--flagfile=x'], ['--flagfile={}/paper_v4.flags', '--flagfile=x']),
  ],
)
def test_presets_are_found_by_name(typed, expected):
  assert presets.expand(typed) == [argument.format(presets.FOLDER) for argument in expected]


@pytest.mark.parametrize('preset', PRESETS, ids=lambda path: path.stem)
def test_a_preset_states_what_it_depends_on(preset):
  """Published figures stand on these values: whatever becomes of the defaults, a preset resolves to the same."""
  recorded = json.loads((ROOT / 'tests' / 'resolved_presets.json').read_text())[preset.stem]
  found = json.loads(json.dumps(configs.flatten(parsed_config(f'--preset={preset.stem}'))))
  assert {name: value for name, value in found.items() if name in recorded} == recorded


def test_command_line_overrides_presets_and_later_presets_earlier_ones(tmp_path):
  assert parsed_config('--seed=3', '--preset=quickstart').client.batch_size == 64
  assert parsed_config('--batch_size=9', '--preset=quickstart').client.batch_size == 9
  assert parsed_config('--preset=quickstart', '--preset=cifar10_cpu').client.batch_size == 128
  assert parsed_config('--preset=cifar10_cpu', '--preset=quickstart').client.batch_size == 64
  with pytest.raises(UsageError, match=r'^--preset: expected one of'):
    parsed_config('--preset=magic')


def test_a_file_may_start_from_presets_and_files(tmp_path):
  (tmp_path / 'first.flags').write_text('--preset=quickstart\n--batch_size=32\n--seed=4\n')
  (tmp_path / 'second.flags').write_text(f'--flagfile={tmp_path}/first.flags\n--seed=5\n--methods=layerwise\n')
  found = parsed_config(f'--flagfile={tmp_path}/second.flags')
  assert (found.client.batch_size, found.run.seed, found.model.image_size) == (32, 5, 16)
  (tmp_path / 'endless.flags').write_text(f'--preset=quickstart\n--flagfile={tmp_path}/endless.flags\n')
  assert (
    parsed_config(f'--flagfile={tmp_path}/endless.flags').client.batch_size == 64
  )  # absl ignores it, with a warning
  (tmp_path / 'unknown.flags').write_text('--preset=magic\n')
  with pytest.raises(UsageError, match=r'^--preset: expected one of'):
    parsed_config(f'--flagfile={tmp_path}/unknown.flags')


def test_presets_that_include_each_other_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(presets, 'FOLDER', tmp_path)
  (tmp_path / 'one.flags').write_text('--preset=two\n')
  (tmp_path / 'two.flags').write_text('--preset=one\n')
  with pytest.raises(UsageError, match='include each other'):
    parsed_config('--preset=one')


def test_flags_of_a_sweep_are_skipped_in_files_alone(tmp_path):
  (tmp_path / 'table.flags').write_text('--preset=quickstart\n--vary=seed=1\n--methods=layerwise\n')
  assert parsed_config(f'--flagfile={tmp_path}/table.flags').client.batch_size == 64
  with pytest.raises(UsageError, match='methods'):
    parsed_config('--methods=layerwise')
  commands.parse(sweep.COMMAND, [f'--flagfile={tmp_path}/table.flags', '--methods=prog_fedssl'])
  assert (sweep.FLAGS.vary, sweep.FLAGS.methods) == ('seed=1', ['prog_fedssl'])
