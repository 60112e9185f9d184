"""Runs a command: parsing, help, one-line errors, exit codes. Imports no jax."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from absl import flags as absl_flags
from absl import logging

from lwfedssl_jax.errors import LostPeerError, MeasurementError, StorageError, TrainingError, UsageError
from lwfedssl_jax.training.signals import Interrupted

from . import flags, presets, usage

USAGE_EXIT_CODE = 2
STORAGE_EXIT_CODE = 3  # a disk is full or cannot be written; the same command with --resume continues
FAILURE_EXIT_CODE = 1  # all or part of the work failed; the result or the message names it
STOPPED_EXIT_CODE = 75  # by SIGTERM or Ctrl-C (EX_TEMPFAIL): the same command with --resume continues
CLOSED_PIPE_EXIT_CODE = 141  # standard output is closed; a shell's code for SIGPIPE

_COMMON = frozenset({'flagfile', 'verbosity'})


class Command(NamedTuple):
  """A program of this package.

  Attributes:
    doc: description with usage examples.
    flags: its own flags; `define_flags` adds the others.
    main: () -> result, after flags are parsed.
    has_config: whether configuration fields are flags too, which presets may set.
  """

  doc: str
  flags: absl_flags.FlagValues
  main: Callable[[], dict[str, Any]]
  has_config: bool = False


def _print_error(message: str) -> None:
  print(f'error: {" ".join(message.split())}', file=sys.stderr, flush=True)


def define_flags(command: Command) -> None:
  """Adds the configuration's flags and the common ones, unless they are defined."""
  if 'verbosity' in command.flags:
    return
  if command.has_config:
    absl_flags.DEFINE_string(
      'preset',
      '',
      f'named set of flag values: {", ".join(presets.names())}; repeat it to combine several, the last '
      'one wins; flags on the command line override it',
      flag_values=command.flags,
    )
    flags.define_config_flags(command.flags)
  absl_flags.DEFINE_string(
    'flagfile', '', 'file of flags, one per line; flags on the command line override it', flag_values=command.flags
  )
  absl_flags.DEFINE_integer(
    'verbosity',
    logging.WARNING,
    'log messages shown: -1 warnings, 0 information, 1 debugging',
    flag_values=command.flags,
  )


def parse(command: Command, arguments: Sequence[str]) -> None:
  """Parses a command line, without the program's name; nothing of an earlier one remains. Raises UsageError."""
  define_flags(command)
  for name in command.flags:
    command.flags[name].unparse()
  files, own = presets.split(presets.expand(arguments) if command.has_config else arguments)
  presets.check_lists(own)
  try:
    left = command.flags(['program', *presets.read(files, command.flags), *own])
  except OSError as error:
    raise UsageError(f'--flagfile: expected a file of flags, {error}') from error
  except UnicodeDecodeError as error:
    raise UsageError(f'{" ".join(files or own)}: expected a file of flags, {error}') from error
  except (absl_flags.Error, ValueError) as error:  # ValueError: of --noflag=value
    raise UsageError(str(error)) from error
  if len(left) > 1:
    raise UsageError(f'expected flags only (--name=value), got {left[1]!r}')
  logging.set_verbosity(command.flags.verbosity)


def compilation_cache_dir() -> str:
  """Returns JAX_COMPILATION_CACHE_DIR, else a folder in the user's cache folder."""
  root = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
  return os.environ.get('JAX_COMPILATION_CACHE_DIR') or os.path.join(root, 'lwfedssl_jax', 'compiled')


def use_compilation_cache() -> None:
  """Caches compiled programs in the user's cache folder, so that a second run starts at once."""
  import jax

  if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
    jax.config.update('jax_compilation_cache_dir', compilation_cache_dir())
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def _leave_peers(message: str) -> NoReturn:
  """Exits without jax's shutdown barrier, which waits for lost processes."""
  _print_error(message)
  os._exit(FAILURE_EXIT_CODE)


def _result_code(result: dict[str, Any]) -> int:
  """Prints a result as the last line, JSON."""
  print(json.dumps(result), flush=True)
  if result.get('stopped_by'):
    print(f'stopped by {result["stopped_by"]}: the same command with --resume continues', file=sys.stderr)
    return STOPPED_EXIT_CODE
  return FAILURE_EXIT_CODE if result.get('failed') else 0


def execute(command: Command, argv: Sequence[str]) -> int:
  """Runs a command with argv (the program's name first) and returns its exit code."""
  try:
    asked = usage.asked(argv[1:])
    if asked:
      define_flags(command)
      print(
        usage.describe(
          command.doc,
          command.flags,
          _COMMON,
          has_config=command.has_config,
          full=asked.endswith('full'),
          program=argv[0],
        ),
        end='',
        flush=True,
      )
      return 0
    parse(command, argv[1:])
    return _result_code(command.main())
  except UsageError as error:
    _print_error(str(error))
    return USAGE_EXIT_CODE
  except StorageError as error:
    _print_error(str(error))
    return STORAGE_EXIT_CODE
  except (TrainingError, MeasurementError) as error:
    _print_error(str(error))
    return FAILURE_EXIT_CODE
  except LostPeerError as error:
    _leave_peers(str(error))
  except (Interrupted, KeyboardInterrupt) as error:
    _print_error(f'{str(error) or "SIGINT"}: dropped the current round; --resume continues from the last checkpoint')
    return STOPPED_EXIT_CODE


def run(command: Command) -> None:
  """Runs a command with the arguments of this process and exits."""
  logging.use_absl_handler()
  absl_flags.FLAGS.mark_as_parsed()  # absl's global flags, which libraries may read
  try:
    code = execute(command, sys.argv)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
    code = 0 if usage.asked(sys.argv[1:]) else CLOSED_PIPE_EXIT_CODE
  sys.exit(code)
