"""FLOPs and bytes of the kernels of a compiled program, from its text.

A kernel is an instruction of a computation that is run, not of one that is fused. XLA's `cost_analysis` is no
substitute: it counts the body of a loop once, and gives no FLOPs on GPUs.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lwfedssl_jax.resources.hlo import Computation, Instruction, Program, Shape

FREE = (
  *('parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'after-all', 'partition-id', 'replica-id'),
  *('opt-barrier', 'add-dependency', 'domain'),
)
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_SLICES = ('slice', 'dynamic-slice', 'gather')
_RUNS = ('call', 'conditional', 'while', 'async-start')  # run the computations that they name
_NO_TRAFFIC = ('AllocateBuffer', 'ConcatBitcast', 'SliceBitcast')  # custom calls that move nothing
_CUDNN_PRODUCTS = {'Backward': 5}  # of fused attention; 2 forward


class Kernel(NamedTuple):
  """One kernel.

  Attributes:
    instruction: of the program.
    num_launches: how often a run of the program launches it.
    flops: {type: FLOPs of a launch's matrix products}, a multiply-add counts 2; a type is `bfloat16`, `float32`, or
      `float32_highest` for products of full precision.
    num_bytes: that a launch reads from and writes to the main memory; of a sliced operand, what is read.
  """

  instruction: Instruction
  num_launches: int
  flops: dict[str, float]
  num_bytes: int


def list_kernels(program: Program, unknown_trips: int = 1) -> list[Kernel]:
  """Lists the kernels that a run of the program launches.

  Args:
    program: parsed.
    unknown_trips: repetitions of loops whose number the compiler does not know, such as the loop over frozen blocks.
  """
  return list(_walk(program, program.entry, 1, unknown_trips))


def _walk(program: Program, name: str, count: int, unknown_trips: int) -> Iterator[Kernel]:
  computation = program.computations[name]
  for instruction in computation.instructions.values():
    opcode = instruction.opcode
    if opcode in _RUNS:
      known = program.trip_count(instruction) if opcode == 'while' else 1
      trips = unknown_trips if known is None else known
      branches = [list(_walk(program, called, count * trips, unknown_trips)) for called in instruction.called]
      yield from max(branches, key=_weight, default=[])  # of a conditional, the branch that costs most
    elif opcode not in FREE and not opcode.endswith('-done'):
      flops = count_flops(program, computation, instruction)
      yield Kernel(instruction, count, flops, count_bytes(program, computation, instruction))


def _weight(kernels: list[Kernel]) -> tuple[float, float]:
  return sum(k.num_launches * sum(k.flops.values()) for k in kernels), sum(
    k.num_launches * k.num_bytes for k in kernels
  )


# FLOPs.


def count_flops(program: Program, computation: Computation, instruction: Instruction) -> dict[str, float]:
  """Counts the matrix products of one launch, those inside a fusion too; returns {type: FLOPs}."""
  if instruction.opcode == 'fusion':
    total: dict[str, float] = {}
    for name in instruction.called:
      fused = program.computations[name]
      for inner in fused.instructions.values():
        for kind, flops in count_flops(program, fused, inner).items():
          total[kind] = total.get(kind, 0) + flops
    return total
  shapes = [shape for name in instruction.operands for shape in computation.instructions[name].shapes]
  counters = {'dot': _dot_flops, 'convolution': _convolution_flops, 'custom-call': _custom_call_flops}
  flops = counters[instruction.opcode](instruction, shapes) if instruction.opcode in counters else 0
  if not flops:
    return {}
  kind = 'bfloat16' if shapes[0].dtype in ('bf16', 'f16') else 'float32'
  highest = kind == 'float32' and 'highest' in instruction.attribute('operand_precision')
  return {kind + '_highest' * highest: flops}


def _dot_flops(instruction: Instruction, shapes: list[Shape]) -> float:
  contracted = instruction.attribute('lhs_contracting_dims').split(',')
  return 2 * instruction.shapes[0].num_elements * math.prod(shapes[0].sizes[int(i)] for i in contracted if i)


def _convolution_flops(instruction: Instruction, shapes: list[Shape]) -> float:
  """Counts a convolution; products of matrices are convolutions on TPUs, and batches are dilated dimensions."""
  lhs, kernel, result = re.split('_|->', instruction.attribute('dim_labels'))
  window = dict(field.split('=') for field in instruction.attribute('window').split() if '=' in field)

  def window_field(name: str, axis: int, default: str) -> str:
    return window[name].split('x')[axis] if name in window else default

  flops = 2.0 * shapes[1].sizes[kernel.index('i')]
  for label, size in zip(result, instruction.shapes[0].sizes):
    if not label.isdigit():
      flops *= size
      continue
    axis = int(label)
    stride, base_dilation = (int(window_field(name, axis, '1')) for name in ('stride', 'lhs_dilate'))
    window_dilation, low = (
      int(window_field('rhs_dilate', axis, '1')),
      int(window_field('pad', axis, '0_0').split('_')[0]),
    )
    taps = np.arange(int(window_field('size', axis, '1'))) * window_dilation - low
    places = np.arange(size)[:, None] * stride + taps
    extent = (shapes[0].sizes[lhs.index(label)] - 1) * base_dilation + 1
    flops *= int(((places >= 0) & (places < extent) & (places % base_dilation == 0)).sum())
  return flops


def _custom_call_flops(instruction: Instruction, shapes: list[Shape]) -> float:
  """Counts products that a GPU's libraries compute: cuBLAS, and cuDNN's fused attention."""
  target = instruction.attribute('custom_call_target').strip('"')
  if target.startswith('__cublas'):
    config = json.loads(re.search(r'backend_config=(\{.*\})', instruction.attributes)[1])['gemm_backend_config']  # type: ignore[index]
    contracted = config['dot_dimension_numbers']['lhs_contracting_dimensions']
    return 2 * instruction.shapes[0].num_elements * math.prod(shapes[0].sizes[int(i)] for i in contracted)
  if target.startswith('__cudnn$fmha'):
    (batch, length, heads, size), keys = shapes[0].sizes, shapes[1].sizes[1]
    products = next((number for name, number in _CUDNN_PRODUCTS.items() if name in target), 2)
    return 2 * products * batch * heads * length * keys * size
  return 0


# Bytes.


def count_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
  """Counts the bytes of the main memory that one launch reads and writes."""
  opcode = instruction.opcode
  if opcode == 'copy-start':  # (destination, source, context): each side that is in the main memory
    return _main_bytes(instruction.shapes[:2])
  if opcode.endswith('-start'):  # ((operands), result, ...); an all-reduce has results only
    shapes = (
      instruction.shapes if opcode.startswith('all-reduce') else instruction.shapes[len(instruction.operands) :][:1]
    )
    return sum((1 + shape.is_main_memory) * shape.num_bytes for shape in shapes)  # read, and perhaps written
  if opcode == 'custom-call' and instruction.attribute('custom_call_target').strip('"') in _NO_TRAFFIC:
    return 0
  if opcode == 'fusion':
    fused = program.computations[instruction.called[0]]
    read = sum(_read_bytes(program, fused, parameter) for parameter in fused.parameters)
    return read + _written_bytes(fused, fused.root)
  operands = [computation.instructions[name] for name in instruction.operands]
  if opcode == 'dynamic-update-slice':
    return 2 * _main_bytes(operands[1].shapes)
  written = _main_bytes(instruction.shapes)
  if opcode in _SLICES and operands:
    return written + (_main_bytes(operands[0].shapes) and sum(shape.num_bytes for shape in instruction.shapes))
  return written + sum(_main_bytes(operand.shapes) for operand in operands)


def _main_bytes(shapes: tuple[Shape, ...]) -> int:
  return sum(shape.num_bytes for shape in shapes if shape.is_main_memory)


def _read_bytes(program: Program, fused: Computation, value: Instruction) -> int:
  """Counts what a fusion reads of a parameter: the slices, where all that it does with it is slicing."""
  full = _main_bytes(value.shapes)
  if not full:
    return 0
  total = 0
  for user in fused.users(value.name):
    is_first = user.operands[0] == value.name
    if user.opcode == 'bitcast':
      total += _read_bytes(program, fused, user)
    elif user.opcode == 'fusion':
      inner = program.computations[user.called[0]]
      places = [place for place, name in enumerate(user.operands) if name == value.name]
      total += sum(_read_bytes(program, inner, inner.parameters[place]) for place in places)
    elif user.opcode in _SLICES and is_first:
      total += sum(shape.num_bytes for shape in user.shapes)
    elif not (user.opcode == 'dynamic-update-slice' and is_first):  # that one is updated in place
      return full
  return min(total, full)


def _written_bytes(fused: Computation, root: Instruction) -> int:
  """Counts what a fusion writes: of an array that is updated in place, the update."""
  operands = [fused.instructions[name] for name in root.operands]
  if root.opcode == 'tuple':
    return sum(_written_bytes(fused, operand) for operand in operands)
  if root.opcode == 'bitcast':
    return _written_bytes(fused, operands[0])
  if root.opcode == 'dynamic-update-slice':
    return _main_bytes(root.shapes) and sum(shape.num_bytes for shape in operands[1].shapes)
  return _main_bytes(root.shapes)
