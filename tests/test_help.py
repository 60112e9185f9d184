"""What `--help` of every command shows, and that it shows it at once."""

import dataclasses
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

from experiments import command, flags, pretrain
from lwfedssl_jax import config as configs
from lwfedssl_jax.evaluation import finetune

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = ('pretrain', 'sweep', 'evaluate', 'resources', 'benchmark', 'report', 'export', 'server', 'node')
WITH_CONFIG = ('pretrain', 'sweep', 'resources', 'benchmark', 'server')
FIELDS = {field.name: field for group in configs.GROUPS.values() for field in dataclasses.fields(group)}


def import_command(name):
  return importlib.import_module(f'experiments.{name}')


def shown(name, capsys, argument, program='program'):
  assert command.execute(import_command(name).COMMAND, [program, argument]) == 0
  captured = capsys.readouterr()
  assert not captured.err
  return captured.out


def section(text, title):
  """Returns the lines of one section."""
  return text.partition(f'\n{title}:\n')[2].partition('\n\n')[0].splitlines()


def names_in(lines):
  return [
    line.strip().removeprefix('--').removeprefix('[no]').partition('=')[0] for line in lines if line.startswith('  --')
  ]


@pytest.mark.parametrize('argument', ['--help', '--helpshort', '-h', '--helpfull'])
@pytest.mark.parametrize('name', COMMANDS)
def test_help_shows_the_description_as_written_and_every_flag(name, argument, capsys):
  text = shown(name, capsys, argument)
  assert text.startswith(inspect.cleandoc(import_command(name).__doc__) + '\n\n')
  assert all(len(line) <= 120 for line in text.splitlines())
  values = import_command(name).FLAGS
  common = {'flagfile', 'verbosity'}
  fields = set(FIELDS) if name in WITH_CONFIG else set()
  assert set(names_in(section(text, 'flags of this command'))) == set(values) - common - fields
  for group, group_type in configs.GROUPS.items():
    expected = [field.name for field in dataclasses.fields(group_type)] if name in WITH_CONFIG else []
    assert names_in(section(text, f'configuration, {group}')) == expected
  full = names_in(section(text, 'flags of every command'))
  assert set(full) == (common if argument == '--helpfull' else set())


def test_help_shows_defaults_choices_and_ranges(capsys):
  text = ' '.join(shown('pretrain', capsys, '--help').split())
  assert ' --method=lw_fedssl ' in text and '(end_to_end, layerwise, lw_fedssl, prog_fedssl, centralized)' in text
  assert ' --crop_area=0.08,1.0 ' in text
  assert ' --[no]resume continue' in text and '--workdir (default: false)' in text
  assert 'on for lw_fedssl (default: unset)' in text
  assert '(more than 0, at most 1)' in text
  assert all(FIELDS[name].metadata['help'] for name in FIELDS)


@pytest.mark.parametrize('name', ['sweep', 'benchmark'])
def test_an_example_over_two_lines_keeps_its_break(name, capsys):
  assert ' \\\n        --' in shown(name, capsys, '--help')


def test_examples_are_written_for_the_way_the_program_was_started(capsys):
  assert 'lwfedssl-sweep --' in shown('sweep', capsys, '--help', '/bin/lwfedssl-sweep')
  assert 'python -m experiments.sweep --' in shown('sweep', capsys, '--help', 'experiments/sweep.py')


def test_flags_of_evaluation_have_the_library_s_defaults():
  values = import_command('evaluate').FLAGS
  for name, default in finetune.FinetuneOptions()._asdict().items():
    assert name not in values or values[name].default == default, name
  assert {'epochs', 'warmup_epochs', 'batch_size', 'learning_rate', 'weight_decay'} <= set(values)


def test_help_of_no_command_loads_jax():
  code = f"""
import sys
from unittest import mock
for name in {COMMANDS}:
  module = __import__('experiments.' + name, fromlist=['COMMAND'])
  with mock.patch.object(sys, 'argv', [name, '--help']):
    try:
      module.run()
    except SystemExit as stopped:
      assert stopped.code == 0, name
heavy = {{'jax', 'flax', 'numpy', 'sklearn', 'matplotlib', 'tensorflow_datasets'}} & sys.modules.keys()
sys.exit(', '.join(heavy) or 0)
"""
  result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr


def test_a_reader_that_closes_the_pipe_is_no_error():
  with subprocess.Popen(
    [sys.executable, '-m', 'experiments.pretrain', '--help'],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    process.stdout.close()
    assert process.stderr.read() == ''
  assert process.returncode == 0


def test_nothing_of_an_earlier_command_line_remains():
  """Two commands in one process: the second has its own values and the defaults."""
  described = pretrain.COMMAND
  command.parse(described, ['--micro_batch_size=48', '--preset=quickstart'])
  assert described.flags['micro_batch_size'].value == 48
  command.parse(described, ['--batch_size=32'])
  config = flags.config_from_flags(described.flags)
  assert (config.client.micro_batch_size, config.client.batch_size, config.model.image_size) == (0, 32, 0)
