"""Defines absl flags from the configuration's fields, and builds the configuration from them. Imports no jax.

Each command has a `FlagValues` of its own instead of absl's global one, so that one process can run several commands.
"""

import dataclasses
import json
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from absl import flags

from lwfedssl_jax import config as configs
from lwfedssl_jax import options
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.options import Validated

Group = TypeVar('Group', bound=Validated)


def _define(values: flags.FlagValues, name: str, default: Any, annotation: Any, metadata: Any) -> None:
  kind, _, length = options.value_type(annotation)
  text = metadata['help']
  if length:
    shown = ','.join(map(str, default))
    flags.DEFINE_string(name, shown, f'{text} ({length} comma-separated values)', flag_values=values)
  elif metadata['choices'] and not metadata['open_choice']:
    flags.DEFINE_enum(name, default, list(metadata['choices']), text, flag_values=values)
  elif kind is bool:
    flags.DEFINE_boolean(name, default, text, flag_values=values)
  elif kind is int:
    flags.DEFINE_integer(name, default, text, flag_values=values)
  elif kind is float:
    flags.DEFINE_float(name, default, text, flag_values=values)
  else:
    flags.DEFINE_string(name, default, text, flag_values=values)


def define_config_flags(values: flags.FlagValues) -> None:
  """Defines a flag for every configuration field, with its help text and choices."""
  for group_type in configs.GROUPS.values():
    define_group_flags(values, group_type)


def define_group_flags(values: flags.FlagValues, group_type: Any) -> None:
  """Defines a flag for every field of a group of options."""
  annotations = typing.get_type_hints(group_type)
  for field in dataclasses.fields(group_type):
    _define(values, field.name, field.default, annotations[field.name], field.metadata)


def group_from_flags(values: flags.FlagValues, group_type: type[Group]) -> Group:
  """Returns the validated options of a group. Raises UsageError."""
  annotations = typing.get_type_hints(group_type)
  fields = dataclasses.fields(group_type)
  return group_type(**{field.name: _value(values, field.name, annotations[field.name]) for field in fields})


def _value(values: flags.FlagValues, name: str, annotation: Any) -> Any:
  value = values[name].value
  kind, _, length = options.value_type(annotation)
  if not length:
    return value
  try:
    return tuple(kind(part) for part in str(value).split(','))
  except ValueError as error:
    raise UsageError(f'--{name}: expected {length} comma-separated values, got {value!r}') from error


def config_from_flags(values: flags.FlagValues) -> Config:
  """Returns the validated configuration of the parsed flags. Raises UsageError."""
  groups: dict[str, Any] = {name: group_from_flags(values, group_type) for name, group_type in configs.GROUPS.items()}
  return Config(**groups)


def whole_numbers(name: str, texts: Sequence[str]) -> list[int]:
  """Returns the values of a list flag as integers. Raises UsageError."""
  try:
    return [int(text) for text in texts]
  except ValueError as error:
    raise UsageError(f'--{name}: expected whole numbers, got {",".join(texts)}') from error


def print_config(config: Config) -> None:
  """Prints the resolved configuration, one line of JSON."""
  print('config: ' + json.dumps(configs.flatten(config)), flush=True)
