"""How fast a compiled program can run on a target at best: FLOPs and bytes of its kernels against the device's peaks.

Each kernel takes at least the longer of two times: its matrix products at the peak rate, its bytes at the memory's
bandwidth (Williams et al. 2009, doi:10.1145/1498765.1498785). Launches, latency and idle cores are not counted.
"""

import re
from typing import NamedTuple

from lwfedssl_jax.resources import hlo, hlo_costs
from lwfedssl_jax.resources.hlo_costs import COLLECTIVES, Kernel
from lwfedssl_jax.resources.targets import Peaks

EXCHANGE, PRODUCTS, COPIES, REST = 'exchange between devices', 'matrix products', 'copies', 'others'
ATTENTION = 'attention'  # scores, softmax, weighted sums, and their layouts; not the linear layers around them
# The first pattern that occurs in a kernel's operation of the traced program.
_BY_OPERATION = (
  (ATTENTION, re.compile(r'attention/(?!qkv|projection)|cudnn_fusion|dot_product_attention')),
  (PRODUCTS, None),
  ('norms', re.compile(r'/(norm\w*|LayerNorm)/')),
  ('GELU, biases, residuals', re.compile(r'Block')),
  ('heads', re.compile(r'Head')),
)
_COPY_OPCODES = ('copy', 'copy-start', 'transpose', 'slice-start', 'dynamic-slice-start')


class Roofline(NamedTuple):
  """Least times of one run of a program on one device.

  Attributes:
    flops: of matrix products, a multiply-add counts 2.
    num_bytes: that kernels read from and write to the main memory.
    flop_seconds: all products at the peak rates of their types.
    memory_seconds: all bytes at the memory's bandwidth.
    seconds: the sum over kernels of the longer of the two.
    num_kernels: launches.
    shares: {kind of operation: its share of `seconds`}, in descending order.
  """

  flops: float
  num_bytes: float
  flop_seconds: float
  memory_seconds: float
  seconds: float
  num_kernels: int
  shares: dict[str, float]

  @property
  def bound(self) -> str:
    """The resource that takes longer."""
    return 'memory' if self.memory_seconds > self.flop_seconds else 'products'


def kind_of_operation(kernel: Kernel) -> str:
  """Returns what a kernel does, in a word or two."""
  instruction = kernel.instruction
  if instruction.opcode.startswith(COLLECTIVES):
    return EXCHANGE
  for kind, pattern in _BY_OPERATION:
    if pattern.search(instruction.op_name) if pattern else kernel.flops:
      return kind
  return COPIES if instruction.opcode in _COPY_OPCODES else REST


def estimate(hlo_text: str, peaks: Peaks, unknown_trips: int = 1) -> Roofline:
  """Computes the roofline of a compiled program.

  Args:
    hlo_text: `compiled.as_text()`.
    peaks: of the device.
    unknown_trips: repetitions of loops whose number the compiler does not know; of a client step, the frozen blocks.
  """
  kernels = hlo_costs.list_kernels(hlo.parse_program(hlo_text), unknown_trips)
  flops = flop_seconds = memory_seconds = num_bytes = 0.0
  by_kind: dict[str, float] = {}
  for kernel in kernels:
    computing = kernel.num_launches * sum(count / _rate(peaks, kind) for kind, count in kernel.flops.items())
    moving = kernel.num_launches * kernel.num_bytes / peaks.memory_bandwidth
    flops += kernel.num_launches * sum(kernel.flops.values())
    num_bytes += kernel.num_launches * kernel.num_bytes
    flop_seconds += computing
    memory_seconds += moving
    kind = kind_of_operation(kernel)
    by_kind[kind] = by_kind.get(kind, 0.0) + max(computing, moving)
  seconds = sum(by_kind.values())
  shares = (
    {kind: part / seconds for kind, part in sorted(by_kind.items(), key=lambda item: -item[1])} if seconds else {}
  )
  return Roofline(
    flops, num_bytes, flop_seconds, memory_seconds, seconds, sum(kernel.num_launches for kernel in kernels), shares
  )


def _rate(peaks: Peaks, kind: str) -> float:
  return peaks.flops.get(kind, peaks.flops['float32'])
