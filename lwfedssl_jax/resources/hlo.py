"""Reads the text of a compiled program (`compiled.as_text()`): computations, instructions, shapes.

The format is XLA's HLO text, https://openxla.org/xla/operation_semantics and https://openxla.org/xla/shapes.
"""

import functools
import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r'(?P<dtype>[a-z]\w*)\[(?P<sizes>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?')
_HEADER = re.compile(r'(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$')
_NAME = re.compile(r'\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = ')
_OPERAND = re.compile(r'%([\w.-]+)')
_COMMENT = re.compile(r'/\*.*?\*/')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.-]+)'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


class Shape(NamedTuple):
  """An array of a program.

  Attributes:
    dtype: XLA's name, such as `bf16`.
    sizes: of its dimensions.
    layout: XLA's text: order of dimensions, tiles, memory space; may be empty.
  """

  dtype: str
  sizes: tuple[int, ...]
  layout: str = ''

  @property
  def num_elements(self) -> int:
    """Without padding."""
    return math.prod(self.sizes)

  @property
  def num_bytes(self) -> int:
    """In memory, padding to tiles included."""
    bits = re.search(r'\d+', self.dtype)
    per_element = 1 if self.dtype == 'pred' else int(bits[0]) // 8 if bits else 0  # 0: token, opaque
    return per_element * math.prod(self._padded_sizes())

  @property
  def is_main_memory(self) -> bool:
    """Whether it is in the device's main memory (HBM), not in a scratchpad such as a TPU's VMEM."""
    return not re.search(r'S\([1-9]', self.layout)

  def _padded_sizes(self) -> list[int]:
    """Rounds the minor dimensions up to the first tile: `{2,1,0:T(8,128)}` pads dimension 2 to 128 and 1 to 8."""
    order, _, rest = self.layout.partition(':')
    tile = re.match(r'T\(([\d,]+)\)', rest)
    sizes = list(self.sizes)
    if not tile or not sizes:
      return sizes
    minor_first = [int(dimension) for dimension in order.split(',')]
    for dimension, step in zip(minor_first, reversed([int(step) for step in tile[1].split(',')])):
      sizes[dimension] = -(-sizes[dimension] // step) * step
    return sizes


class Instruction(NamedTuple):
  """One instruction.

  Attributes:
    name: unique in the program.
    opcode: such as `fusion`.
    result: text of the result's shape; a tuple's has parentheses.
    operands: names of instructions of the same computation.
    argument: the text in the parentheses: a parameter's number.
    attributes: text after the operands.
    is_root: whether it is its computation's result.
  """

  name: str
  opcode: str
  result: str
  operands: tuple[str, ...]
  argument: str
  attributes: str
  is_root: bool

  @property
  def shapes(self) -> tuple[Shape, ...]:
    """The arrays of the result, nested tuples flattened."""
    return parse_shapes(self.result)

  @property
  def called(self) -> list[str]:
    """Computations that it runs; of a loop, the body."""
    return [name for text in _CALLED.findall(self.attributes) for name in _OPERAND.findall(text)]

  @property
  def op_name(self) -> str:
    """The operation of the traced program that it comes from, with its scopes."""
    found = _OP_NAME.search(self.attributes)
    return found[1] if found else ''

  def attribute(self, name: str) -> str:
    """Returns the text of an attribute, `{1,2}` without braces; '' where there is none."""
    found = re.search(rf'\b{name}=(\{{[^}}]*\}}|[^,\s]+)', self.attributes)
    return found[1].strip('{}') if found else ''


class Computation(NamedTuple):
  """Instructions by name, in the order of the text."""

  name: str
  instructions: dict[str, Instruction]

  @property
  def root(self) -> Instruction:
    """The result."""
    return next(instruction for instruction in self.instructions.values() if instruction.is_root)

  @property
  def parameters(self) -> list[Instruction]:
    """In the order of their numbers."""
    found = [instruction for instruction in self.instructions.values() if instruction.opcode == 'parameter']
    return sorted(found, key=lambda instruction: int(instruction.argument))

  def users(self, name: str) -> list[Instruction]:
    """Instructions that read the result of `name`."""
    return [instruction for instruction in self.instructions.values() if name in instruction.operands]


class Program(NamedTuple):
  """Computations by name, and the name of the one that is run."""

  computations: dict[str, Computation]
  entry: str

  def trip_count(self, loop: Instruction) -> int | None:
    """Returns the repetitions of a `while`; None if they depend on data.

    GPUs' programs state them. In TPUs' the condition compares a counter, which starts at 0, with a constant.
    """
    stated = _TRIPS.search(loop.attributes)
    if stated:
      return int(stated[1])
    condition = self.computations[loop.attribute('condition').lstrip('%')]
    compared = [condition.instructions[name] for name in condition.root.operands]
    if condition.root.attribute('direction') == 'LT' and compared[-1].opcode == 'constant':
      return int(compared[-1].argument)
    return None


@functools.cache
def parse_shapes(text: str) -> tuple[Shape, ...]:
  """Returns the arrays of a shape's text, nested tuples flattened."""
  return tuple(
    Shape(match['dtype'], tuple(int(size) for size in match['sizes'].split(',') if size), match['layout'] or '')
    for match in _ARRAY.finditer(text)
  )


def parse_program(text: str) -> Program:
  """Parses the text of a compiled program. Raises ValueError if it has no entry computation."""
  computations: dict[str, Computation] = {}
  entry, current = '', Computation('', {})
  for line in text.splitlines():
    if line.startswith(' '):
      if (instruction := _parse_instruction(line)) is not None:
        current.instructions[instruction.name] = instruction
    elif header := _HEADER.match(line):
      current = computations[header['name']] = Computation(header['name'], {})
      entry = header['name'] if header['entry'] else entry
  if not entry:
    raise ValueError('expected the text of a compiled program, found no ENTRY computation')
  return Program(computations, entry)


def _parse_instruction(line: str) -> Instruction | None:
  line = _COMMENT.sub('', line)
  start = _NAME.match(line)
  if start is None:
    return None
  end = _closing(line, start.end()) if line[start.end()] == '(' else line.find(' ', start.end())
  result, rest = line[start.end() : end], line[end:].lstrip()
  opcode, opening = rest[: rest.find('(')], rest.find('(')
  closing = _closing(rest, opening)
  argument = rest[opening + 1 : closing - 1]
  operands = () if opcode in ('parameter', 'constant') else tuple(_OPERAND.findall(argument))
  return Instruction(start['name'], opcode, result, operands, argument, rest[closing:], bool(start['root']))


def _closing(text: str, opening: int) -> int:
  """Returns the place after the parenthesis that closes the one at `opening`."""
  depth = 0
  for match in re.compile(r'[()]').finditer(text, opening):
    depth += 1 if match[0] == '(' else -1
    if depth == 0:
      return match.end()
  return len(text)
