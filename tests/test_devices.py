"""A round on four devices is the round of one, to rounding; streaming changes no bit; traffic is what it must be."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lwfedssl_jax.resources import collectives

SCALARS = 32  # bytes: three counts and weights, their total, three losses, and the clients' squared distances


@pytest.fixture(scope='module')
def report():
  flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=4'
  environment = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, '-m', 'tests.devices_check'],
    env=environment,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found.pop('num_devices') == 4
  return found


@pytest.mark.parametrize('case', ['lw_fedssl', 'median', 'layerwise', 'states'])
def test_four_devices_give_one_device_s_result(report, case):
  found = report[case]
  assert found['moved'] > 0.5
  assert found['devices_differ'] < 1e-5
  assert found['embeddings_differ'] < 1e-5
  np.testing.assert_allclose(*found['loss'], rtol=1e-5)
  np.testing.assert_allclose(*found['divergence'], rtol=1e-4)
  assert found['divergence'][0] > 1e-3
  assert found['accepted'][0] == found['accepted'][1]
  assert 1 < len(found['accepted'][0]) < 6  # somebody did not return
  if case == 'lw_fedssl':
    np.testing.assert_allclose(*found['calibration'], rtol=1e-5)


def test_what_the_server_and_the_clients_keep_is_one_device_s(report):
  """FedYogi's moments and, client by client, FedEMA's parameters and target branch."""
  found = report['states']
  assert found['states'][0] == found['states'][1] > 2
  assert found['states_differ'] < 1e-5


def test_calibration_in_micro_batches_on_four_devices_gives_one_device_s_result(report):
  assert report['lw_fedssl']['pieces_differ'] < 1e-5


def test_streaming_changes_no_bit_and_holds_only_a_round_s_images(report):
  found = report['lw_fedssl']
  assert found['streams'] == [False, True, True]
  assert found['streaming_differs'] == 0
  all_images, a_round_s, on_four_devices = found['images']
  assert a_round_s < on_four_devices < all_images


def test_a_round_s_traffic_is_one_sum_of_the_active_parameters(report):
  for case in ('lw_fedssl', 'layerwise'):
    one, four = report[case]['bytes_per_round']
    assert one == 0
    assert four - report[case]['active_bytes'] == SCALARS
  assert report['layerwise']['in_loops'] == [0, 0]
  assert report['lw_fedssl']['in_loops'][1] > report['lw_fedssl']['active_bytes']  # calibration: gradients, embeddings
  assert report['median']['bytes_per_round'][1] > 4 * report['median']['active_bytes']  # all updates, to every device


def test_collectives_are_read_from_the_program_s_text():
  text = """
%body (p: f32[4]) -> f32[4] {
  %all-gather.1 = bf16[2,8]{1,0} all-gather(%x), dimensions={0}
}

ENTRY %main (a: f32[3]) -> f32[3] {
  %all-reduce.2 = (f32[10]{0}, s32[]) all-reduce(%a, %b), to_apply=%add
  %all-reduce-start = f32[5]{0} all-reduce-start(%c), to_apply=%add
  %done = f32[5]{0} all-reduce-done(%all-reduce-start)
}
"""
  found = collectives.read_collectives(text)
  assert found == [('all-gather', 32, True), ('all-reduce', 44, False), ('all-reduce', 20, False)]
  assert collectives.bytes_per_round(found) == 64


def test_asynchronous_collectives_of_a_gpu_program_count_their_results_alone():
  """Lines of an H100 program: the shape of a -start is the operands and then the results."""
  text = """
ENTRY %main (a: f32[3]) -> f32[3] {
  %all-gather-start = (bf16[64,768]{1,0}, bf16[512,768]{1,0}) all-gather-start(%x), channel_id=1, dimensions={0}
  %all-gather-start.1 = ((f32[2]{0}, f32[4,2]{1,0}), (f32[16]{0}, f32[32,2]{1,0})) all-gather-start(%y, %z)
  %reduce-scatter-start = ((f32[196608]{0}), f32[24576]{0}) reduce-scatter-start(%g), to_apply=%add
  %collective-permute-start = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%h)
  %all-reduce-start = ((f32[12]{0}), f32[12]{0}) all-reduce-start(%i), to_apply=%add
  %all-reduce-start.1 = ((f32[2]{0}, f32[]), (f32[2]{0}, f32[])) all-reduce-start(%j, %k), to_apply=%add
}
"""
  found = collectives.read_collectives(text)
  assert found == [
    ('all-gather', 2 * 512 * 768, False),
    ('all-gather', 4 * (16 + 64), False),
    ('reduce-scatter', 98_304, False),
    ('collective-permute', 32, False),
    ('all-reduce', 48, False),  # as of jax 0.12; before, an all-reduce's shape is its results
    ('all-reduce', 12, False),
  ]
