"""Presets: files of flags, by name (`--preset=NAME`) or path (`--flagfile=PATH`); the command line overrides them.

A file may start from others: its own `--preset=NAME` and `--flagfile=PATH` lines stand for theirs, in place.
"""

import pathlib
from collections.abc import Iterator, Sequence

from absl import flags as absl_flags

from lwfedssl_jax.errors import UsageError

FOLDER = pathlib.Path(__file__).parent / 'presets'
SWEEP_ONLY = ('methods', 'vary')  # flags of experiments.sweep in a file, which every other command skips
_DEEPEST = 8  # files inside files


def names() -> list[str]:
  """Returns the presets of the package."""
  return sorted(path.stem for path in FOLDER.glob('*.flags'))


def find(name: str) -> pathlib.Path:
  """Returns the file of a preset. Raises UsageError."""
  if name not in names():
    raise UsageError(f'--preset: expected one of {", ".join(names())}, got {name!r}')
  return FOLDER / f'{name}.flags'


def _read_values(flag: str, arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
  """Yields every argument, with its value if it sets `flag`; a missing value is empty."""
  rest = iter(arguments)
  for argument in rest:
    name, equals, value = argument.partition('=')
    if name in (f'--{flag}', f'-{flag}'):
      yield argument, value if equals else next(rest, '')
    else:
      yield argument, None


def expand(arguments: Sequence[str]) -> list[str]:
  """Replaces `--preset=NAME` by `--flagfile=PATH`. Raises UsageError if there is no preset of that name."""
  given = _read_values('preset', arguments)
  return [argument if name is None else f'--flagfile={find(name)}' for argument, name in given]


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
  """Returns the arguments that name files of flags, in the order given, and the others.

  In absl the last value of a flag wins. Files that are parsed first therefore lose against the command line, and a
  later file overrides an earlier one.
  """
  given = list(_read_values('flagfile', arguments))
  return (
    [f'--flagfile={path}' for _, path in given if path is not None],
    [argument for argument, path in given if path is None],
  )


def check_lists(arguments: Sequence[str]) -> None:
  """Raises UsageError where a command line repeats a flag that is a list: in absl the last one alone would count."""
  for flag, separator in (('methods', ','), ('vary', ';')):
    count = sum(value is not None for _, value in _read_values(flag, arguments))
    if count > 1:
      raise UsageError(f'--{flag}: expected one, whose parts are separated by {separator!r}, got {count} of them')


def read(files: Sequence[str], values: absl_flags.FlagValues) -> list[str]:
  """Replaces files of flags (`--flagfile=PATH`) by their lines, as far as a command of these flags can use them.

  Raises:
    UsageError: no preset of that name, or presets that include each other.
    absl.flags.Error, OSError, UnicodeDecodeError: a file cannot be read.
  """
  lines = list(files)
  for _ in range(_DEEPEST):
    lines = values.read_flags_from_files(lines)
    if 'preset' not in values or not any(name is not None for _, name in _read_values('preset', lines)):
      skipped = {f'--{name}' for name in SWEEP_ONLY if name not in values}
      return [line for line in lines if line.partition('=')[0] not in skipped]
    lines = expand(lines)
  raise UsageError('--preset: expected files of flags that do not include each other')
