"""Texts of compiled programs, shortened (programs/): what is read from them, counted by hand."""

import pathlib

import pytest

from lwfedssl_jax.resources import hlo, hlo_costs, roofline
from lwfedssl_jax.resources.hlo import Shape
from lwfedssl_jax.resources.targets import Peaks

PROGRAMS = pathlib.Path(__file__).parent / 'programs'
# A GPU's: a loop of known length over a product, an update in place and a slice; a loop of unknown length; an exchange.
GPU = (PROGRAMS / 'gpu.hlo').read_text()

# A TPU's: a batch of three products is a convolution with a dilated dimension; S(1) is on the chip.
TPU = (PROGRAMS / 'tpu.hlo').read_text()


@pytest.fixture(scope='module')
def gpu():
  return hlo.parse_program(GPU)


def test_an_array_takes_what_its_type_and_its_tiles_take():
  assert Shape('f32', (4, 8), '1,0').num_bytes == 128
  assert Shape('pred', (5,), '0').num_bytes == 5
  assert Shape('bf16', ()).num_bytes == 2
  assert Shape('token', ()).num_bytes == 0
  assert Shape('bf16', (3, 9, 130), '2,1,0:T(8,128)(2,1)').num_bytes == 2 * 3 * 16 * 256
  assert Shape('bf16', (3, 9, 130), '0,2,1:T(8,128)(2,1)').num_bytes == 2 * 128 * 9 * 136
  assert Shape('f32', (5,), '0:T(1024)S(1)').num_bytes == 4096


def test_instructions_are_read_with_their_operands_and_attributes(gpu):
  assert gpu.entry == 'main' and set(gpu.computations) >= {'body', 'open_body', 'fused_product'}
  update = gpu.computations['fused_update'].root
  assert (update.opcode, update.operands) == (
    'dynamic-update-slice',
    ('param_0', 'bitcast.1', 'param_2', 'zero.1', 'zero.1'),
  )
  product = gpu.computations['body'].instructions['product']
  assert product.called == ['fused_product'] and product.op_name.endswith('mlp1/dot_general')
  with pytest.raises(ValueError, match='ENTRY'):
    hlo.parse_program('HloModule empty\n')


def test_trip_counts_are_stated_or_compared_with_a_constant_or_unknown(gpu):
  loops = gpu.computations['main'].instructions
  assert gpu.trip_count(loops['loop']) == 12
  assert gpu.trip_count(loops['loop']._replace(attributes=', condition=%condition, body=%body')) == 12
  assert gpu.trip_count(loops['open_loop']) is None


def test_loops_are_multiplied_out_and_slices_are_counted_as_such(gpu):
  found = {k.instruction.name: k for k in hlo_costs.list_kernels(gpu, unknown_trips=5)}
  rows = {name: (k.num_launches, k.num_bytes, k.flops) for name, k in found.items()}
  matrix, weight, index = 4 * 8 * 4, 8 * 8 * 4, 4
  assert rows == {
    'one_weight': (12, weight + index + weight, {}),  # of twelve matrices one is read
    'product': (12, matrix + weight + matrix, {'float32': 2 * 4 * 8 * 8}),
    'kept.1': (12, matrix + index + matrix, {}),  # of twelve matrices one is written
    'doubled': (5, 2 * matrix + matrix, {}),
    'start': (1, 2 * 8 * matrix, {}),
    'copy.1': (1, 2 * matrix, {}),
  }


def test_batches_of_products_are_dilated_convolutions_on_tpus():
  (kernel,) = hlo_costs.list_kernels(hlo.parse_program(TPU))
  assert kernel.flops == {'bfloat16': 2 * 3 * 8 * 4 * 16}
  assert kernel.num_bytes == 2 * 2 * 3 * 8 * 128  # both padded to tiles; the operand on the chip costs nothing
  assert roofline.kind_of_operation(kernel) == 'attention'


def test_the_roofline_takes_the_longer_time_of_each_kernel():
  peaks = Peaks({'bfloat16': 1e9, 'float32': 1e6}, 1e6)
  line = roofline.estimate(GPU, peaks, unknown_trips=5)
  products, product_bytes, copied = 12 * 512, 12 * 512, 12 * (516 + 260) + 5 * 384 + 2048 + 256
  assert line.flops == products and line.num_bytes == product_bytes + copied
  assert line.flop_seconds == pytest.approx(products / 1e6)
  assert line.memory_seconds == pytest.approx((product_bytes + copied) / 1e6)
  assert line.seconds == pytest.approx((max(products, product_bytes) + copied) / 1e6)
  assert line.bound == 'memory' and line.num_kernels == 12 * 3 + 5 + 2
  assert sum(line.shares.values()) == pytest.approx(1)
  assert line.shares['norms'] == pytest.approx(5 * 384 / 1e6 / line.seconds)
  slow = roofline.estimate(GPU, peaks._replace(flops={'float32': 1e3}), unknown_trips=5)
  assert slow.bound == 'products' and slow.seconds == pytest.approx((products * 1e3 + copied) / 1e6)
