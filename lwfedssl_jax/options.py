"""One configuration field: its declaration with help text, choices and range, and the check of a value. No jax."""

import dataclasses
import sys
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from lwfedssl_jax.base import UsageError


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Any:
  """Declares one configuration field with its help text, choices and range."""
  metadata = {'help': help, 'choices': choices, 'at_least': at_least, 'above': above, 'at_most': at_most}
  return dataclasses.field(default=default, metadata=metadata)


def value_type(annotation: Any) -> tuple[type, bool, int]:
  """Splits a field's annotation into (scalar type, may be None, tuple length or 0)."""
  optional = isinstance(annotation, types.UnionType)
  if optional:
    annotation = next(t for t in typing.get_args(annotation) if t is not type(None))
  members = typing.get_args(annotation)
  return (members[0], optional, len(members)) if members else (annotation, optional, 0)


def _check_value(name: str, value: Any, annotation: Any, limits: Mapping[str, Any]) -> None:
  """Raises UsageError unless `value` has the annotated type and lies in its range."""
  kind, optional, length = value_type(annotation)
  if value is None and optional:
    return
  if length and (not isinstance(value, tuple) or len(value) != length):
    raise UsageError(f'--{name}: expected {length} comma-separated values, got {value!r}')
  for item in value if length else (value,):
    number = kind in (int, float)
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(item, accepted) or (number and isinstance(item, bool)):
      raise UsageError(f'--{name}: expected {kind.__name__}, got {item!r}')
    if number and not abs(item) <= sys.float_info.max:  # nan, infinity, or an integer that no float holds
      raise UsageError(f'--{name}: expected a finite number, got {item!r}')
    if limits['choices'] and item not in limits['choices']:
      raise UsageError(f'--{name}: expected one of {", ".join(limits["choices"])}, got {item!r}')
    if limits['at_least'] is not None and item < limits['at_least']:
      raise UsageError(f'--{name}: expected at least {limits["at_least"]}, got {item}')
    if limits['above'] is not None and item <= limits['above']:
      raise UsageError(f'--{name}: expected more than {limits["above"]}, got {item}')
    if limits['at_most'] is not None and item > limits['at_most']:
      raise UsageError(f'--{name}: expected at most {limits["at_most"]}, got {item}')


class Validated:
  """Checks every field of a dataclass against its declared type, choices and range."""

  def __post_init__(self):
    annotations = typing.get_type_hints(type(self))
    for field in dataclasses.fields(self):
      _check_value(field.name, getattr(self, field.name), annotations[field.name], field.metadata)
