"""The messages between server and clients: a header, JSON, and components, bytes. Everything that arrives is checked.

  hello     server: which run it is, and its settings
  member    client: who it is, how many images it has, which components it holds
  task      server: a round, the versions of the components that it takes, and those that the client lacks
  update    client: its losses and its active components
  lacking   client: it does not hold components that the server takes it to hold
  refused   client: why not, in one line

A message of another kind, with other fields, or with a value out of its range raises MessageError. Sizes of components
are exact (`check_vectors`), so a message cannot be larger than its round's. Nothing is unpickled.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lwfedssl_jax import config as configs
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError

MOST_HEADER_CHARACTERS = 1 << 16
MOST_COMPONENTS = 1 << 10
MOST_TEXT = 300
MOST_ROUNDS = 1 << 31

# The settings that clients are sent: what is trained. Where images and files lie is each machine's own.
CLIENT_FIELDS = frozenset(configs.flatten(Config())) - {
  field.name for group in ('data', 'run') for field in dataclasses.fields(configs.GROUPS[group])
} | {'seed', 'max_train_images', 'auxiliary_fraction'}


class MessageError(ValueError):
  """A message that is not valid: the reason, in one line."""


class Envelope(NamedTuple):
  """A message: its header, JSON, and {component: bytes}."""

  header: str
  vectors: dict[str, bytes]


class Hello(NamedTuple):
  """The server's greeting: the run's name and the settings of CLIENT_FIELDS."""

  run: str
  config: dict[str, Any]


class Member(NamedTuple):
  """A client's answer to it: its id, its number of images, and the digests of the components that it holds."""

  client_id: int
  num_images: int
  held: dict[str, str]


class Task(NamedTuple):
  """An attempt at a round for one client.

  Attributes:
    run: its name.
    config: as in Hello.
    client_id: of the client.
    round_num: 0-based.
    attempt: 0 or 1.
    digests: of all components that the client requires.
    state_round: the rounds done after its last accepted update, whose state it takes up; 0: none.
    oldest_round: no state before that of this many rounds will be asked for again.
  """

  run: str
  config: dict[str, Any]
  client_id: int
  round_num: int
  attempt: int
  digests: dict[str, str]
  state_round: int = 0
  oldest_round: int = 0


class Update(NamedTuple):
  """A client's mean losses (total, objective, alignment; any float) of an attempt at a round."""

  client_id: int
  round_num: int
  attempt: int
  losses: tuple[float, ...]


class Lacking(NamedTuple):
  """The components that a client does not hold."""

  names: tuple[str, ...]


class Refused(NamedTuple):
  """The reason why a client does not train."""

  reason: str


Record = Hello | Member | Task | Update | Lacking | Refused
KINDS: dict[str, Any] = {kind.__name__.lower(): kind for kind in (Hello, Member, Task, Update, Lacking, Refused)}


def pack(record: Record, vectors: Mapping[str, bytes] | None = None) -> Envelope:
  """Returns the message of a record."""
  return Envelope(json.dumps({'kind': type(record).__name__.lower(), **record._asdict()}), dict(vectors or {}))


def unpack(envelope: Envelope) -> Record:
  """Returns a message's record; its vectors are yet to be checked. Raises MessageError."""
  header = envelope.header
  if not isinstance(header, str) or len(header) > MOST_HEADER_CHARACTERS:
    raise MessageError(f'header: expected text of at most {MOST_HEADER_CHARACTERS} characters')
  try:
    fields = json.loads(header)
  except (ValueError, RecursionError) as error:
    raise MessageError('header: expected JSON') from error
  kind = fields.pop('kind', None) if isinstance(fields, dict) else None
  record = KINDS.get(kind) if isinstance(kind, str) else None
  if record is None:
    raise MessageError(f'kind: expected one of {", ".join(KINDS)}')
  if set(fields) != set(record._fields):
    raise MessageError(f'{kind}: expected the fields {", ".join(record._fields)}')
  return record(**{name: _CHECKS[name](name, value) for name, value in fields.items()})


def describe(envelope: Envelope) -> str:
  """Returns what one of our own messages is, for a log: its kind, and its round if it has one."""
  fields = json.loads(envelope.header)
  return fields['kind'] + (f' of round {fields["round_num"] + 1}' if 'round_num' in fields else '')


def check_vectors(vectors: Mapping[str, bytes], sizes_bytes: Mapping[str, int], every: bool = True) -> None:
  """Raises MessageError unless the components are those expected and each has exactly its size.

  Args:
    vectors: of a message.
    sizes_bytes: {component: bytes} that are expected.
    every: all of them must be there; else some.
  """
  if not (set(vectors) == set(sizes_bytes) if every else set(vectors) <= set(sizes_bytes)):
    raise MessageError(f'components: expected {"" if every else "some of "}{", ".join(sizes_bytes)}')
  for name, data in vectors.items():
    if not isinstance(data, bytes) or len(data) != sizes_bytes[name]:
      raise MessageError(f'{name}: expected {sizes_bytes[name]} bytes')


def one_line(text: object) -> str:
  """Returns text that is safe to print: one line, printable, at most MOST_TEXT characters."""
  return ''.join(c if c.isprintable() else ' ' for c in str(text)[:MOST_TEXT])


def client_config(config: Config) -> dict[str, Any]:
  """Returns the settings that clients are sent."""
  values = configs.flatten(config)
  if config.data.auxiliary_dataset:  # then no training image is held out for the server
    values['auxiliary_fraction'] = 0.0
  return {name: values[name] for name in sorted(CLIENT_FIELDS)}


def read_config(fields: Mapping[str, Any]) -> Config:
  """Returns the configuration of the settings that a client was sent. Raises MessageError."""
  if set(fields) != CLIENT_FIELDS:
    wrong = sorted(set(fields) ^ CLIENT_FIELDS)[0]
    raise MessageError(f'config: expected the fields of this version, {one_line(wrong)!r} differs')
  try:  # calibration is the server's, and may take images that a client knows nothing of
    return configs.from_flat({**fields, 'server_calibration': False})
  except (UsageError, TypeError, OverflowError) as error:
    raise MessageError(one_line(error)) from error


def _integer(low: int, high: int) -> Callable[[str, Any], int]:
  def check(name: str, value: Any) -> int:
    if type(value) is not int or not low <= value <= high:
      raise MessageError(f'{name}: expected a whole number from {low} to {high}')
    return value

  return check


def _text(name: str, value: Any) -> str:
  if not isinstance(value, str) or len(value) > MOST_TEXT:
    raise MessageError(f'{name}: expected text of at most {MOST_TEXT} characters')
  return one_line(value)


def _names(name: str, value: Any) -> tuple[str, ...]:
  if not isinstance(value, list) or len(value) > MOST_COMPONENTS or not all(map(_is_component, value)):
    raise MessageError(f'{name}: expected names of components')
  return tuple(value)


def _digests(name: str, value: Any) -> dict[str, str]:
  _names(name, list(value) if isinstance(value, dict) else value)
  if not isinstance(value, dict) or not all(
    isinstance(each, str) and re.fullmatch('[0-9a-f]{64}', each) for each in value.values()
  ):
    raise MessageError(f'{name}: expected a digest of each component')
  return value


def _losses(name: str, value: Any) -> tuple[float, ...]:
  if not isinstance(value, list) or len(value) != 3 or not all(type(each) is float for each in value):
    raise MessageError(f'{name}: expected three floating-point numbers')
  return tuple(value)


def _config(name: str, value: Any) -> dict[str, Any]:
  if not isinstance(value, dict):
    raise MessageError(f'{name}: expected the fields of a configuration')
  return value


def _is_component(name: Any) -> bool:
  return isinstance(name, str) and re.fullmatch('[a-z0-9_]{1,64}', name) is not None


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
  'run': _text,
  'reason': _text,
  'config': _config,
  'client_id': _integer(0, MOST_ROUNDS),
  'num_images': _integer(1, MOST_ROUNDS),
  'round_num': _integer(0, MOST_ROUNDS),
  'state_round': _integer(0, MOST_ROUNDS),
  'oldest_round': _integer(0, MOST_ROUNDS),
  'attempt': _integer(0, 1),
  'held': _digests,
  'digests': _digests,
  'names': _names,
  'losses': _losses,
}
