"""Messages as Flower's records: the header as text, each component as a float32 vector that Flower's mods can read."""

import io

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from lwfedssl_jax.deployment.messages import MOST_COMPONENTS, MOST_HEADER_CHARACTERS, Envelope, MessageError

_HEADER, _COMPONENTS, _TEXT = 'header', 'components', 'json'
_FLOAT_BYTES = 4


def _npy_header(count: int) -> bytes:
  """Returns what NumPy's format has before the values of a float32 vector. It is compared, never parsed."""
  buffer = io.BytesIO()
  np.lib.format.write_array_header_1_0(buffer, {'descr': '<f4', 'fortran_order': False, 'shape': (count,)})
  return buffer.getvalue()


def to_records(envelope: Envelope) -> RecordDict:
  """Returns a message's content for Flower."""
  records = RecordDict({_HEADER: ConfigRecord({_TEXT: envelope.header})})
  if envelope.vectors:
    records[_COMPONENTS] = ArrayRecord({name: _to_array(data) for name, data in envelope.vectors.items()})
  return records


def _to_array(data: bytes) -> Array:
  count = len(data) // _FLOAT_BYTES
  return Array('float32', (count,), 'numpy.ndarray', _npy_header(count) + data)


def from_records(records: RecordDict) -> Envelope:
  """Returns the message in Flower's content. Raises MessageError."""
  header, arrays = records.get(_HEADER), records.get(_COMPONENTS, {})
  if not set(records) <= {_HEADER, _COMPONENTS} or not isinstance(header, ConfigRecord) or set(header) != {_TEXT}:
    raise MessageError('content: expected a header and components')
  text = header[_TEXT]
  if not isinstance(text, str) or len(text) > MOST_HEADER_CHARACTERS:
    raise MessageError(f'header: expected text of at most {MOST_HEADER_CHARACTERS} characters')
  if (_COMPONENTS in records and not isinstance(arrays, ArrayRecord)) or len(arrays) > MOST_COMPONENTS:
    raise MessageError('components: expected arrays')
  return Envelope(text, {name: _from_array(name, array) for name, array in arrays.items()})


def _from_array(name: str, array: Array) -> bytes:
  data = array.data
  start = len(_npy_header(0))  # the same for all counts: NumPy pads it
  header = _npy_header(max(len(data) - start, 0) // _FLOAT_BYTES)
  if (len(data) - start) % _FLOAT_BYTES or not data.startswith(header) or len(header) != start:
    raise MessageError(f'{name[:64]!r}: expected a float32 vector in the format of NumPy')
  return data[start:]
