"""The table of targets, a user's own GPU, and what is reported where a plugin is missing."""

import importlib.util

import jax
import pytest

from lwfedssl_jax import UsageError
from lwfedssl_jax import config as configs
from lwfedssl_jax.resources import memory, planner, predict, target_tables, targets
from lwfedssl_jax.resources.memory import StepMemory
from lwfedssl_jax.resources.roofline import Roofline
from lwfedssl_jax.resources.targets import OutOfMemoryError, Peaks, Target

MY_GPU = """
description = "a small GPU"
memory_share = 0.5
peak_flops = { bfloat16 = 1e12, float32 = 5e11 }
[gpu_device_info]
shared_memory_per_core = 102400
shared_memory_per_block_optin = 101376
core_count = 10
fpus_per_core = 128
memory_bandwidth = 100000000000
l2_cache_size = 6291456
clock_rate_ghz = 1.8
device_memory_size = 8000000000
cuda_compute_capability = { major = 8, minor = 6 }
"""
CHIP = Target('chip', 'a chip', 'tpu', (), 1000, Peaks({'float32': 1e12}, 1e9), {})


@pytest.fixture
def with_plugins(monkeypatch):
  """Devices without a compiler: the fields that XLA would get."""
  given = []
  monkeypatch.setattr(targets, '_require_plugin', lambda name, platform: None)
  monkeypatch.setattr(
    targets, '_gpu_devices', lambda entry, count: given.append(entry) or [f'gpu{i}' for i in range(count)]
  )
  monkeypatch.setattr(targets, '_tpu_devices', lambda entry, chips: given.append((entry['topology'], chips)) or ['tpu'])
  return given


def config_of(**values):
  return configs.with_values(configs.Config(), {'encoder': 'vit_micro', 'method': 'layerwise', **values})


@pytest.mark.parametrize('name', targets.names())
def test_every_entry_has_memory_and_peaks(with_plugins, name):
  target = targets.load(name, 8)
  assert 8e9 < target.memory_bytes < 200e9
  assert set(target.peaks.flops) == {'bfloat16', 'float32', 'float32_highest'}
  assert 1e11 < target.peaks.memory_bandwidth < 1e13
  assert len(target.devices) == (8 if target.platform == 'cuda' else 1)


def test_names_are_chips_with_a_topology_or_files(with_plugins, tmp_path):
  targets.load('tpu-v5e:2x4')
  assert with_plugins.pop() == ('v5e:2x2', '2x4')
  path = tmp_path / 'gpu.toml'
  path.write_text(MY_GPU)
  mine = targets.load(f'file:{path}')
  assert mine.memory_bytes == 4e9 and mine.peaks == ({'bfloat16': 1e12, 'float32': 5e11}, 1e11)
  assert with_plugins.pop()['gpu_device_info']['threads_per_warp'] == 32  # of all GPUs
  path.write_text(MY_GPU.replace('core_count = 10\n', '').replace(', float32 = 5e11', ''))
  for name, said in (
    (f'file:{path}', 'to have gpu_device_info.core_count, peak_flops.float32'),
    (f'file:{tmp_path}/none', 'TOML file'),
    ('gpu-h101', 'one of gpu-h100, '),
    ('gpu', 'one of gpu-h100, '),
    ('gpu-h100:2x2', '--target_devices'),
  ):
    with pytest.raises(UsageError, match=said):
      targets.load(name)
  path.write_text('gpu_device_info = [')
  with pytest.raises(UsageError, match='TOML'):
    targets.load(f'file:{path}')


def test_a_missing_plugin_is_one_line_that_names_the_extra(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  for name, extra in (('gpu-h100', 'gpu-aot'), ('tpu-v5e', 'tpu-aot')):
    with pytest.raises(UsageError, match=rf"pip install 'lwfedssl-jax\[{extra}\]'$"):
      targets.load(name)


def test_fields_are_written_as_protocol_buffers_read_them():
  assert targets._proto({'a': {'b': 1, 'c': {'d': 1.5}}, 'e': 2}) == 'a { b: 1 c { d: 1.5 } } e: 2'


class Refused:
  def __init__(self, message):
    self.message = message

  def compile(self, compiler_options):
    raise jax.errors.JaxRuntimeError(self.message)


def test_a_program_that_does_not_fit_is_an_answer_other_errors_are_not():
  for message, size in (
    ('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.40G of 15.75G hbm.', 17.40 * 2**30),
    ('RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (600.00M) exceeds', 600 * 2**20),
  ):
    with pytest.raises(OutOfMemoryError) as error:
      targets.compile_program(Refused(message), CHIP)
    assert error.value.needed_bytes == int(size)
  with pytest.raises(jax.errors.JaxRuntimeError, match='Used'):
    targets.compile_program(Refused('INTERNAL: Used 17.40G'), CHIP)
  assert jax.config.jax_enable_compilation_cache


def test_what_does_not_fit_has_a_row(monkeypatch):
  def refuse(*arguments):
    raise OutOfMemoryError(17_000_000_000)

  monkeypatch.setattr(memory, 'compile_client_step', refuse)
  (step, _) = predict.predict_steps(config_of(), 16, CHIP)
  assert not step.fits and step.roofline is None
  text = target_tables.to_text(CHIP, [step])
  assert '| layerwise | 1     | 17.000  | no   | -' in text and 'not run' in text
  assert target_tables.to_json(CHIP, [step])['steps'][0]['peak_bytes'] == 17_000_000_000


def step_of(stage, seconds):
  line = None if seconds is None else Roofline(0.0, 0.0, 0.0, 0.0, seconds, 1, {})
  return predict.StepPrediction('lw_fedssl', stage, 0, line is not None, None, line)


def test_a_run_takes_as_long_as_its_steps():
  """3 of 4 clients a round, 90 of 400 images each, 3 batches of 30 in each of 2 epochs; 4 stages of 5 rounds."""
  run = config_of(
    method='lw_fedssl',
    num_clients=4,
    clients_per_round=3,
    batch_size=30,
    local_epochs=2,
    rounds_per_stage=5,
    auxiliary_fraction=0.1,
  )
  steps = 2 * 3
  found = predict.predict_run(run, [step_of(stage, 0.1 + stage) for stage in range(4)], 400)
  assert found == ('lw_fedssl', 400, 4 * 5 * 3 * steps, pytest.approx(5 * 3 * steps * 6.4))
  text = target_tables.to_text(CHIP, [], runs=[found])
  assert [cell.strip() for cell in text.splitlines()[-1].split('|')[1:-1]] == ['lw_fedssl', '400', '360', '9.6']
  refused = predict.predict_run(run, [*(step_of(stage, 0.1) for stage in range(3)), step_of(3, None)], 400)
  assert refused.seconds is None and target_tables.to_text(CHIP, [], runs=[refused]).rstrip().endswith(
    '| -                |'
  )
  assert target_tables.to_json(CHIP, [], runs=[found])['runs'][0]['num_steps'] == 360


@pytest.fixture
def linear_memory(monkeypatch):
  """Steps of 100 + 10 bytes an image; those above 2000 are refused, with a figure that is rounded."""
  tried = []

  def step_memory(config, image_size, plan, target):
    tried.append(config.client.batch_size)
    needed = 100 + 10 * config.client.batch_size
    if needed > 2000:
      raise OutOfMemoryError(needed // 100 * 100)
    return StepMemory(needed, 0, 0, 0)

  monkeypatch.setattr(memory, 'step_memory', step_memory)
  return tried


@pytest.mark.parametrize(('limit', 'batch'), [(419, 0), (420, 32), (1000, 64), (1059, 64), (1060, 96), (1999, 160)])
def test_the_largest_batch_fits_and_the_next_does_not(linear_memory, limit, batch):
  assert planner.largest_batch(config_of(batch_size=512), 16, limit, CHIP) == batch
  assert batch + 32 in linear_memory and (batch in linear_memory or not batch)
  assert len(set(linear_memory)) < 8


def test_clients_are_vmapped_by_the_memory_of_the_target(linear_memory, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: pytest.fail('the local backend was asked'))
  run = config_of(batch_size=30, num_clients=10)  # 400 bytes a step
  images = 3 * 16 * 16
  for steps, chunk in ((3.5, 3), (0.5, 1), (50, 10)):
    target = CHIP._replace(memory_bytes=int(steps * 400 / 0.8) + images)
    assert predict.resolve_chunk(run, 16, target, 1).client.client_chunk == chunk
  assert predict.resolve_chunk(run, 16, CHIP, 1, peak_bytes=80).client.client_chunk == 2
  assert predict.resolve_chunk(config_of(client_chunk=4), 16, CHIP, 1).client.client_chunk == 4
