"""Collective operations of a compiled round: what the devices of a mesh exchange."""

import itertools
import math
import re
from typing import NamedTuple

_BYTES = {
  'f64': 8,
  's64': 8,
  'u64': 8,
  'f32': 4,
  's32': 4,
  'u32': 4,
  'bf16': 2,
  'f16': 2,
  'u16': 2,
  's16': 2,
  'pred': 1,
  's8': 1,
  'u8': 1,
}
_OPERATION = re.compile(
  r'= (?P<shapes>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)'
  r'(?P<start>-start)?\('
)
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')


class Collective(NamedTuple):
  """A collective operation.

  Attributes:
    kind: `all-reduce`, `all-gather` and so on.
    num_bytes: of its result on one device.
    in_loop: whether it is in a loop's body; then its bytes count per step, not per round.
  """

  kind: str
  num_bytes: int
  in_loop: bool


def read_collectives(hlo_text: str) -> list[Collective]:
  """Lists the collective operations of a compiled program (`compiled.as_text()`)."""
  found, in_entry = [], False
  for line in hlo_text.splitlines():
    if line.endswith('{') and not line.startswith(' '):
      in_entry = line.startswith('ENTRY')
    elif match := _OPERATION.search(line):
      shapes = match['shapes']
      # (operands, results, ...); an all-reduce has results only, before jax 0.12
      if match['start'] and (match['kind'] != 'all-reduce' or shapes.startswith('((')):
        shapes = _tuple_elements(shapes)[1]
      sizes = [
        _BYTES.get(dtype, 0) * math.prod(int(n) for n in shape.split(',') if n)
        for dtype, shape in _ARRAY.findall(shapes)
      ]
      found.append(Collective(match['kind'], sum(sizes), not in_entry))
  return found


def _tuple_elements(shapes: str) -> list[str]:
  """Splits the text of a tuple shape, '((f32[8]), f32[2])', at its own commas."""
  depths = itertools.accumulate({'(': 1, '[': 1, '{': 1, ')': -1, ']': -1, '}': -1}.get(letter, 0) for letter in shapes)
  commas = [place for place, (letter, depth) in enumerate(zip(shapes, depths)) if letter == ',' and depth == 1]
  return [shapes[first + 1 : last] for first, last in itertools.pairwise([0, *commas, len(shapes) - 1])]


def bytes_per_round(found: list[Collective]) -> int:
  """Returns the bytes that a device contributes to collectives outside loops."""
  return sum(operation.num_bytes for operation in found if not operation.in_loop)
