"""Memory does not grow with clients, neither in the federation nor in a round, as the compiled programs say."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import scaling, timing
from lwfedssl_jax import config as configs

pytestmark = pytest.mark.usefixtures('tiny_library')


@pytest.fixture(scope='module')
def cases(tiny_library):
  del tiny_library
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scaling, 'POPULATIONS', (10, 300))
    patch.setattr(scaling, 'CLIENTS_A_ROUND', (10, 60))
    patch.setattr(scaling, 'IMAGES_A_CLIENT', 8)
    patch.setattr(scaling, 'POOL_IMAGES', 320)
    values = {'method': 'layerwise', 'image_size': 8, 'local_epochs': 1, 'learning_rate': 0.1}
    yield list(scaling.client_cases(configs.configure(**values)))


def test_peak_memory_is_flat_in_the_population_and_in_the_clients_of_a_round(cases):
  peaks = {case.name: case.peak_bytes - case.image_bytes for case in cases}
  assert len(peaks) == 5  # 10 of 10 clients stands in both series
  first = peaks['10 of 10 clients']
  assert peaks['10 of 300 clients'] == first
  # What a client more costs is a row of image indices, and a few numbers: who it is, its loss, its weight.
  assert 0 < peaks['60 of 60 clients'] - first <= 50 * 4 * (8 + 16)


def test_images_that_stream_are_a_round_s_alone(cases):
  resident, streamed = cases[-2:]
  assert resident.image_bytes == 320 * 8 * 8 * 3
  assert streamed.image_bytes == 5 * 8 * 8 * 8 * 3


def test_cases_train_equally_for_every_location_of_images(cases):
  seconds = timing.time_interleaved(cases[-2:], 1)
  assert [len(measured) for measured in seconds] == [1, 1] and min(seconds)[0] > 0
  initial, trained = (jax.tree.leaves(tree) for tree in (cases[-1].initial, cases[-1].params()))
  assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(initial, trained))
  assert scaling.differences(cases[-2:]) == [0, 0]
  timing.time_once(cases[-1:])
  assert scaling.differences(cases[-2:])[1] > 0.1
