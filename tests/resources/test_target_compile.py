"""Programs compiled for an H100 that is not there (extra gpu-aot): bounds on memory, exact products, exchanges.

TPUs' compiler is too big for CI (684 MB): `make test-targets` runs those tests, and end to end's on an H100.
"""

import importlib.util
import warnings

import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax.catalog import PROJECTION_SIZE
from lwfedssl_jax.resources import collectives, flops, hlo, hlo_costs, memory, predict, targets
from lwfedssl_jax.stages import make_plans

pytestmark = pytest.mark.usefixtures('fully_optimized')
needs_tpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu (extra tpu-aot), 684 MB')
GIGABYTE = 10**9


def config_of(method, **values):
  defaults = {'encoder': 'vit_tiny', 'image_size': 32, 'batch_size': 512, 'compute_dtype': 'bfloat16'}
  return configs.with_values(configs.Config(), {'method': method, **defaults, **values})


def check_step(target, limit_gb):
  config = config_of('layerwise')
  plan = make_plans(config)[-1]
  with warnings.catch_warnings():
    warnings.filterwarnings('error', message='.*persistent compilation cache')
    (step,) = predict.predict_steps(config, 32, target, [plan])
  assert step.fits and 0.05 * GIGABYTE < step.peak_bytes <= limit_gb * GIGABYTE
  line = step.roofline
  # The prefix loop is multiplied out: the compiled products are those that flops.py counts, to the last one.
  assert line.flops == flops.executed_flops(config, 32, plan, 512).total_flops
  assert line.bound == 'memory' and sum(line.shares.values()) == pytest.approx(1)
  return line


def check_round(target, num_devices, limit_gb):
  config = config_of('lw_fedssl', num_clients=10 * num_devices, client_chunk=1)
  plan = make_plans(config)[-1]
  found = predict.predict_round(config, 32, plan, target, num_devices, 50_000)
  assert found.fits and found.peak_bytes <= limit_gb * GIGABYTE
  active, everything = 4 * 1_201_984, 4 * 6_117_184  # parameters of the last stage, and of the calibrated model
  assert active < collectives.bytes_per_round(found.exchanged) < active + 1000
  gradients = [part for part in found.exchanged if part.in_loop and part.kind == 'all-reduce']
  assert sum(part.num_bytes for part in gradients) == pytest.approx(everything, rel=1e-3)
  embeddings = [part for part in found.exchanged if part.in_loop and part.kind == 'all-gather']
  assert 0 < sum(part.num_bytes for part in embeddings) <= 2 * 2 * 2 * 512 * 192 * 4


def test_a_layerwise_step_on_an_h100():
  line = check_step(targets.load('gpu-h100'), 0.62)
  assert line.num_bytes <= 22 * GIGABYTE and line.num_kernels < 600


@needs_tpu  # not for its compiler: half a minute more than CI has
@pytest.mark.parametrize(('method', 'stage', 'limit_gb'), [('end_to_end', 1, 4.5), ('prog_fedssl', 6, 2.5)])
def test_several_blocks_at_once_are_lean_on_an_h100(method, stage, limit_gb):
  config = config_of(method)
  (step,) = predict.predict_steps(config, 32, targets.load('gpu-h100'), [make_plans(config)[stage - 1]])
  assert step.peak_bytes <= limit_gb * GIGABYTE and step.roofline.num_bytes <= 70 * GIGABYTE


def test_a_round_on_eight_h100s():
  check_round(targets.load('gpu-h100', 8), 8, 1.1)


@needs_tpu
def test_a_layerwise_step_on_a_tpu():
  line = check_step(targets.load('tpu-v5e'), 0.8)
  assert line.num_bytes <= 12 * GIGABYTE  # 18 where 64 numbers of a head are padded to 128


@needs_tpu
def test_a_layerwise_round_on_a_tpu():
  config = config_of('layerwise', client_chunk=1)
  found = predict.predict_round(config, 32, make_plans(config)[-1], targets.load('tpu-v5e'), 1, 50_000)
  assert found.peak_bytes <= 1.0 * GIGABYTE  # 1.6 where its images are padded


@needs_tpu
def test_a_round_on_four_tpus():
  check_round(targets.load('tpu-v5e:2x2'), 4, 2.4)


@needs_tpu
def test_a_step_that_does_not_fit_a_tpu_is_an_answer():
  config = config_of('end_to_end', compute_dtype='float32', batch_size=4096)
  (step,) = predict.predict_steps(config, 32, targets.load('tpu-v5e'))
  assert not step.fits and step.peak_bytes > 15.75 * 2**30 and step.roofline is None


def executed_products(compute_dtype):
  """Returns {type: FLOPs} of a client step's products as a TPU executes them; batch 64."""
  config = config_of('layerwise', encoder='vit_micro', batch_size=64, compute_dtype=compute_dtype)
  program = memory.compile_client_step(config, 32, make_plans(config)[1], targets.load('tpu-v5e'))
  total = dict.fromkeys(('bfloat16', 'float32', 'float32_highest'), 0)
  for kernel in hlo_costs.list_kernels(hlo.parse_program(program.as_text())):
    for kind, count in kernel.flops.items():
      total[kind] += kernel.num_launches * count
  return total


@needs_tpu
@pytest.mark.parametrize('compute_dtype', ['float32', 'bfloat16'])
def test_precision_of_products_on_a_tpu(compute_dtype):
  """Similarities are full float32 products; the backend rounds the operands of the others, in either type."""
  found = executed_products(compute_dtype)
  assert found['float32_highest'] == 4 * 2 * 64 * 64 * PROJECTION_SIZE  # two views, forward and gradient
  assert found['bfloat16'] > 2 * found['float32'] > 0
