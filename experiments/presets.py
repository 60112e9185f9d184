"""Presets: files of flags, by name (`--preset=NAME`) or path (`--flagfile=PATH`); the command line overrides them."""

import pathlib
from collections.abc import Iterator, Sequence

from lwfedssl_jax.errors import UsageError

FOLDER = pathlib.Path(__file__).parent / 'presets'


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


def put_first(arguments: Sequence[str]) -> list[str]:
  """Moves flag files to the front, in the order given.

  In absl the last value of a flag wins. A later file therefore overrides an earlier one, and the command line both.
  """
  given = list(_read_values('flagfile', arguments))
  files = [f'--flagfile={path}' for _, path in given if path is not None]
  return [*files, *(argument for argument, path in given if path is None)]
