"""The output of `--help`: a command's description, its flags, and the configuration's by group. Imports no jax."""

import dataclasses
import inspect
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from lwfedssl_jax import config as configs
from lwfedssl_jax import options

WIDTH = 100
_ASKS = frozenset({'--help', '-help', '-h', '--helpshort', '-helpshort', '--helpfull', '-helpfull'})


def asked(arguments: Sequence[str]) -> str | None:
  """Returns the first argument that requests help, or None."""
  return next((argument for argument in arguments if argument in _ASKS), None)


def _limits(metadata: Mapping[str, Any]) -> str:
  """Returns the range of a configuration field, or choices that a flag's type does not know, in words."""
  if metadata['open_choice']:
    return ', '.join(options.shown_choices(metadata))
  words = {'at_least': 'at least', 'above': 'more than', 'at_most': 'at most'}
  return ', '.join(f'{words[name]} {metadata[name]:g}' for name in words if metadata[name] is not None)


def _describe(flag: 'flags.Flag[Any]', limits: str = '') -> str:
  """Returns a flag with its default on one line, and its help text below, with limits in brackets."""
  text, default = flag.help or '', (flag.default_as_str or '').strip("'")
  head = f'--{flag.name}={default}'
  if flag.boolean:
    head, limits = f'--[no]{flag.name}', f'default: {default or "unset"}'
  elif isinstance(flag, flags.EnumFlag):
    text, limits = text.partition('>: ')[2], ', '.join(flag.parser.enum_values)  # absl puts the choices first
  lines = textwrap.wrap(f'{text} ({limits})' if limits else text, WIDTH - 6)
  return '\n'.join([f'  {head}', *(f'      {line}' for line in lines)])


def _started_as(program: str) -> str:
  """Returns the prefix of commands, by the way in which this one was started."""
  script = os.path.basename(program)
  return 'lwfedssl-' if script.startswith('lwfedssl-') else f'python -m {__package__}.'


def describe(
  doc: str, values: flags.FlagValues, common: frozenset[str], *, has_config: bool, full: bool, program: str
) -> str:
  """Returns the help text of a command.

  Args:
    doc: its description with usage examples, whose lines are preserved; `python -m experiments.` is replaced by the
      way in which the program was started.
    values: its flags.
    common: names of the flags of every command.
    has_config: whether the configuration's fields are among them.
    full: include the flags of every command.
    program: argv[0].
  """
  groups = (
    {
      f'configuration, {group}': {field.name: _limits(field.metadata) for field in dataclasses.fields(group_type)}
      for group, group_type in configs.GROUPS.items()
    }
    if has_config
    else {}
  )
  elsewhere = common.union(*groups.values())
  own = {name: '' for name in values if name not in elsewhere}
  shared = {name: '' for name in values if name in common} if full else {}
  sections = {'flags of this command': own, **groups, 'flags of every command': shared}
  return (
    '\n\n'.join(
      [
        inspect.cleandoc(doc).replace('python -m experiments.', _started_as(program)),
        *(
          '\n'.join([f'{title}:', *(_describe(values[name], limits) for name, limits in names.items())])
          for title, names in sections.items()
          if names
        ),
        *([] if full else ['--helpfull adds the flags of every command.']),
      ]
    )
    + '\n'
  )
