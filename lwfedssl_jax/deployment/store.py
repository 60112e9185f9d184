"""The components that a client holds, on disk: each whole or not at all, of one run at a time."""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping

from lwfedssl_jax.deployment import components
from lwfedssl_jax.workdir import storage
from lwfedssl_jax.workdir.client_store import ClientStore

_PREFIX = 'run-'


class Store:
  """Holds the components of a run in a folder of its own; a new run's store deletes that of the run before it.

  Attributes:
    held: {component: digest}.
    states: what this client keeps between rounds; it is never sent.
  """

  def __init__(self, state_dir: str, run: str, sizes_bytes: Mapping[str, int]):
    """Opens the store of a run.

    Args:
      state_dir: the client's folder.
      run: any text; its digest names the folder.
      sizes_bytes: {component: bytes} of all that the run can exchange; nothing else is kept.

    Raises:
      StorageError: the folder cannot be written.
    """
    name = _PREFIX + hashlib.sha256(run.encode('utf-8', 'surrogatepass')).hexdigest()[:32]
    self._folder = os.path.join(state_dir, name)
    with storage.writing(state_dir):
      os.makedirs(self._folder, exist_ok=True)
      for other in os.listdir(state_dir):
        if other.startswith(_PREFIX) and other != name:
          shutil.rmtree(os.path.join(state_dir, other), ignore_errors=True)
    self.states = ClientStore(self._folder)
    self._data: dict[str, bytes] = {}
    for component, size in sizes_bytes.items():
      path = self._path(component)
      if os.path.isfile(path) and os.path.getsize(path) == size:
        with open(path, 'rb') as file:
          self._data[component] = file.read()
    self.held = {component: components.digest(data) for component, data in self._data.items()}

  def get(self, component: str) -> bytes:
    """Returns a component that is held."""
    return self._data[component]

  def put(self, component: str, data: bytes) -> None:
    """Keeps a component in place of its earlier version. Raises StorageError."""
    path = self._path(component)
    with storage.writing(path):
      with open(f'{path}.tmp', 'wb') as file:
        file.write(data)
      os.replace(f'{path}.tmp', path)
    self._data[component], self.held[component] = data, components.digest(data)

  def _path(self, component: str) -> str:
    if not re.fullmatch('[a-z0-9_]+', component):
      raise ValueError(f'expected the name of a component, got {component!r}')
    return os.path.join(self._folder, component)
