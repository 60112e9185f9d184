"""Presets: files of flags that never beat what is typed."""

from collections.abc import Sequence


def put_first(arguments: Sequence[str]) -> list[str]:
  """Moves --flagfile arguments to the front: absl lets the last one win, and what a user types must beat a preset."""
  files, others, rest = [], [], iter(arguments)
  for argument in rest:
    if argument in ('--flagfile', '-flagfile'):
      files.append(f'--flagfile={next(rest, "")}')
    elif argument.startswith(('--flagfile=', '-flagfile=')):
      files.append(argument)
    else:
      others.append(argument)
  return [*files, *others]
