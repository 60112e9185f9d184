"""The compiled figure against a real process's high-water mark."""

import os
import sys

import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax.resources import measure

pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')


@pytest.mark.parametrize(('method', 'stage'), [('layerwise', 2), ('end_to_end', 0)])
def test_measured_peak_agrees_with_the_compiled_one(method, stage, monkeypatch):
  """On one core: on several, products that run at the same time each hold buffers outside the compiled figure."""
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '0')
  config = configs.with_values(configs.Config(), {'encoder': 'vit_micro', 'method': method, 'batch_size': 256})
  cores = os.sched_getaffinity(0)
  os.sched_setaffinity(0, {min(cores)})  # inherited by the process that is measured
  try:
    found = measure.measure_stage(config, 32, stage)
  finally:
    os.sched_setaffinity(0, cores)
  assert found['compiled_bytes'] > 3 * measure.OVERHEAD_BYTES
  difference = abs(found['measured_bytes'] - found['compiled_bytes'])
  assert difference <= 0.1 * found['compiled_bytes'] + measure.OVERHEAD_BYTES
