"""From frozen configs to absl flags and back: one flag per field, the only readers of FLAGS."""

import dataclasses
import json
import os
import sys
import typing
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from lwfedssl_jax import config as configs
from lwfedssl_jax import options
from lwfedssl_jax.base import LostPeerError, TrainingError, UsageError
from lwfedssl_jax.config import Config
from lwfedssl_jax.interrupts import Interrupted

USAGE_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1  # all or part of the work failed; the result or the message says which
STOPPED_EXIT_CODE = 75  # by SIGTERM or Ctrl-C (EX_TEMPFAIL): the same command with --resume goes on


def _define(name: str, default: Any, annotation: Any, metadata: Any) -> None:
  kind, _, length = options.value_type(annotation)
  text = metadata['help']
  if length:
    shown = ','.join(map(str, default))
    flags.DEFINE_string(name, shown, f'{text} ({length} comma-separated values)')
  elif metadata['choices']:
    flags.DEFINE_enum(name, default, list(metadata['choices']), text)
  else:
    define = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    define.get(kind, flags.DEFINE_string)(name, default, text)


def define_config_flags() -> None:
  """Defines a flag for every configuration field, with its help text and choices."""
  for group_type in configs.GROUPS.values():
    annotations = typing.get_type_hints(group_type)
    for field in dataclasses.fields(group_type):
      _define(field.name, field.default, annotations[field.name], field.metadata)


def _value(name: str, annotation: Any) -> Any:
  value = flags.FLAGS[name].value
  kind, _, length = options.value_type(annotation)
  if not length:
    return value
  try:
    return tuple(kind(part) for part in value.split(','))
  except ValueError as error:
    raise UsageError(f'--{name}: expected {length} comma-separated values, got {value!r}') from error


def config_from_flags() -> Config:
  """Returns the validated configuration that the parsed flags describe. Raises UsageError."""
  groups = {}
  for group, group_type in configs.GROUPS.items():
    annotations = typing.get_type_hints(group_type)
    fields = dataclasses.fields(group_type)
    groups[group] = group_type(**{field.name: _value(field.name, annotations[field.name]) for field in fields})
  return Config(**groups)


def whole_numbers(name: str) -> list[int]:
  """Returns the values of a list flag as integers. Raises UsageError."""
  values = flags.FLAGS[name].value
  try:
    return [int(value) for value in values]
  except ValueError as error:
    raise UsageError(f'--{name}: expected whole numbers, got {",".join(values)}') from error


def presets_first(argv: list[str]) -> list[str]:
  """Moves --flagfile arguments to the front: absl lets the last one win, and what a user types must beat a preset."""
  presets, others, rest = [], [], iter(argv[1:])
  for argument in rest:
    if argument in ('--flagfile', '-flagfile'):
      presets.append(f'--flagfile={next(rest, "")}')
    elif argument.startswith(('--flagfile=', '-flagfile=')):
      presets.append(argument)
    else:
      others.append(argument)
  return [argv[0], *presets, *others]


def _fail(message: str, code: int = USAGE_EXIT_CODE) -> typing.NoReturn:
  print(f'error: {" ".join(message.split())}', file=sys.stderr, flush=True)
  sys.exit(code)


def _leave_peers(message: str) -> typing.NoReturn:
  """Fails without the farewell that jax takes of processes which are no longer there."""
  print(f'error: {" ".join(message.split())}', file=sys.stderr, flush=True)
  os._exit(FAILURE_EXIT_CODE)


def _parse(argv: list[str]) -> list[str]:
  try:
    left = flags.FLAGS(presets_first(argv))
  except flags.Error as error:
    _fail(str(error))
  except OSError as error:
    _fail(f'--flagfile: expected a file of flags, {error}')
  except UnicodeDecodeError as error:
    presets = [argument for argument in presets_first(argv) if argument.lstrip('-').startswith('flagfile=')]
    _fail(f'{" ".join(presets)}: expected a file of flags, {error}')
  except ValueError as error:  # of --noflag=value
    _fail(str(error))
  if len(left) > 1:
    _fail(f'expected flags only (--name=value), got {left[1]!r}')
  if flags.FLAGS['verbosity'].using_default_value:
    flags.FLAGS.verbosity = logging.WARNING  # orbax tells every step of a save at INFO
  return left


def print_config(config: Config) -> None:
  """Prints the resolved configuration, one line of JSON."""
  print('config: ' + json.dumps(configs.flatten(config)), flush=True)


def use_compilation_cache() -> None:
  """Keeps compiled programs in the user's cache folder, so that a second run starts at once."""
  import jax

  if jax.config.jax_compilation_cache_dir is None:
    root = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    jax.config.update('jax_compilation_cache_dir', os.path.join(root, 'lwfedssl_jax', 'compiled'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def run(main: Callable[[], dict[str, Any]]) -> None:
  """Parses flags, calls `main` and prints its result as the last line, JSON; a user's mistake exits with code 2."""

  def guarded(argv):
    del argv
    try:
      use_compilation_cache()
      result = main()
    except UsageError as error:
      _fail(str(error))
    except TrainingError as error:
      _fail(str(error), FAILURE_EXIT_CODE)
    except LostPeerError as error:
      _leave_peers(str(error))
    except (Interrupted, KeyboardInterrupt) as error:
      _fail(f'{str(error) or "SIGINT"}: dropped what was under way; --resume goes on from the last checkpoint',
            STOPPED_EXIT_CODE)
    print(json.dumps(result), flush=True)
    if result.get('stopped_by'):
      print(f'stopped by {result["stopped_by"]}: the same command with --resume goes on', file=sys.stderr)
      sys.exit(STOPPED_EXIT_CODE)
    if result.get('failed'):
      sys.exit(FAILURE_EXIT_CODE)

  app.run(guarded, flags_parser=_parse)
