"""One configuration field: its declaration with help text, choices and range, and the check of a value. No jax."""

import dataclasses
import sys
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from lwfedssl_jax.errors import UsageError


def option(
  default: Any,
  help: str,
  *,
  choices: Collection[str] = (),
  open_choice: str = '',
  at_least: float | None = None,
  above: float | None = None,
  at_most: float | None = None,
) -> Any:
  """Declares one configuration field with its help text, choices and range.

  `open_choice`, such as 'file:PATH', is one more choice: any value that starts with it up to the colon.
  """
  metadata = {
    'help': help,
    'choices': choices,
    'open_choice': open_choice,
    'at_least': at_least,
    'above': above,
    'at_most': at_most,
  }
  return dataclasses.field(default=default, metadata=metadata)


def value_type(annotation: Any) -> tuple[type, bool, int]:
  """Splits a field's annotation into (scalar type, may be None, tuple length or 0)."""
  optional = isinstance(annotation, types.UnionType)
  if optional:
    annotation = next(t for t in typing.get_args(annotation) if t is not type(None))
  members = typing.get_args(annotation)
  return (members[0], optional, len(members)) if members else (annotation, optional, 0)


def _check_number(name: str, value: float, limits: Mapping[str, Any]) -> None:
  """Raises UsageError unless a number is finite and in its range."""
  if not abs(value) <= sys.float_info.max:  # nan, infinity, or an integer that no float holds
    raise UsageError(f'--{name}: expected a finite number, got {value!r}')
  at_least, above, at_most = (limits[limit] for limit in ('at_least', 'above', 'at_most'))
  if at_least is not None and value < at_least:
    raise UsageError(f'--{name}: expected at least {at_least}, got {value}')
  if above is not None and value <= above:
    raise UsageError(f'--{name}: expected more than {above}, got {value}')
  if at_most is not None and value > at_most:
    raise UsageError(f'--{name}: expected at most {at_most}, got {value}')


def shown_choices(metadata: Mapping[str, Any]) -> list[str]:
  """Returns the choices of a field as help and messages show them."""
  return [*metadata['choices'], *filter(None, [metadata['open_choice']])]


def _is_open_choice(item: str, metadata: Mapping[str, Any]) -> bool:
  kind, colon, _ = metadata['open_choice'].partition(':')
  return bool(colon) and item.startswith(kind + colon) and item != kind + colon


def _check_value(name: str, value: Any, annotation: Any, metadata: Mapping[str, Any]) -> None:
  """Raises UsageError unless `value` has the annotated type, is among its choices and lies in its range."""
  kind, optional, length = value_type(annotation)
  if value is None and optional:
    return
  if length and (not isinstance(value, tuple) or len(value) != length):
    raise UsageError(f'--{name}: expected {length} comma-separated values, got {value!r}')
  for item in value if length else (value,):
    is_number = kind in (int, float)
    accepted: Any = (int, float) if kind is float else kind
    if not isinstance(item, accepted) or (is_number and isinstance(item, bool)):
      raise UsageError(f'--{name}: expected {kind.__name__}, got {item!r}')
    if metadata['choices'] and item not in metadata['choices'] and not _is_open_choice(item, metadata):
      raise UsageError(f'--{name}: expected one of {", ".join(shown_choices(metadata))}, got {item!r}')
    if is_number:
      _check_number(name, item, metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validated:
  """Base of a group of options: checks every field against its declared type, choices and range."""

  def __post_init__(self) -> None:
    annotations = typing.get_type_hints(type(self))
    for field in dataclasses.fields(self):
      _check_value(field.name, getattr(self, field.name), annotations[field.name], field.metadata)
