"""The devices of a run, in one process or several (jax.distributed): a mesh of one axis, `clients`."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from lwfedssl_jax.errors import UsageError

AXIS = 'clients'
# Found in the messages of the transports and of the coordination service; error types vary.
_LOST_PEER_MARKS = ('Gloo', 'NCCL', 'heartbeat', 'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'Barrier', 'Connection')


def connect(address: str, num_processes: int, process_id: int) -> None:
  """Joins the processes of a run, before any other use of jax; with an empty address there is one process.

  Args:
    address: HOST:PORT of the first process; `auto`: address, number and id from the cluster's environment (Slurm, TPU).
    num_processes: in all, 2 or more.
    process_id: of this one, from 0.

  Raises:
    UsageError: a value is missing or out of range, or the first process is not found.
  """
  if not address:
    return
  values: dict[str, Any] = {}
  if address != 'auto':
    host, _, port = address.rpartition(':')
    if not host or not port.isdigit():
      raise UsageError(f'--coordinator_address: expected HOST:PORT or auto, got {address!r}')
    if num_processes < 2:
      raise UsageError(f'--num_processes: expected at least 2 with --coordinator_address, got {num_processes}')
    if not 0 <= process_id < num_processes:
      raise UsageError(f'--process_id: expected 0 to {num_processes - 1}, got {process_id}')
    values = {'coordinator_address': address, 'num_processes': num_processes, 'process_id': process_id}
  try:
    jax.distributed.initialize(**values)
  except (RuntimeError, ValueError) as error:
    reason = ' '.join(str(error).split())[:300]
    raise UsageError(f'--coordinator_address: expected to reach the other processes by {address}: {reason}') from error


def make_mesh(num_devices: int = 0) -> Mesh | None:
  """Returns the mesh of the first `num_devices` devices, 0: all of them, of all processes; None for one device.

  Raises:
    UsageError: there are fewer devices, or a process would have none.
  """
  found = jax.devices()
  count = num_devices or len(found)
  if count > len(found):
    raise UsageError(f'--num_devices: expected at most {len(found)}, the number of devices, got {count}')
  if jax.process_count() > 1 and count != len(found):
    raise UsageError(
      f'--num_devices: expected 0 or all {len(found)} devices of {jax.process_count()} processes, got {count}'
    )
  return Mesh(np.array(found[:count]), (AXIS,)) if count > 1 else None


def sharding(mesh: Mesh | None, spec: PartitionSpec = PartitionSpec()) -> Sharding:
  """Returns the sharding of an array by `spec`; by default it is replicated."""
  return SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, spec)


def put(array: np.ndarray, target: Sharding) -> jax.Array:
  """Copies a host array to the devices; a process reads only the part that its own devices hold."""
  return jax.make_array_from_callback(array.shape, target, lambda index: np.asarray(array[index]))


def replicate(mesh: Mesh | None, array: Any) -> jax.Array:
  """Replicates a host array on every device."""
  return put(np.asarray(array), sharding(mesh))


def fetch(array: jax.Array) -> np.ndarray:
  """Returns an array's values from any process; all processes must call it."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def total_bytes() -> int | None:
  """Returns the memory of a device that programs may use, in whole GiB; None if it is unknown, as on CPUs.

  It depends on the kind of device and the allocator's share, not on current use, so that a choice based on it is the
  same in every run on such devices. Of several processes, the minimum over their first devices counts.
  """
  memory = jax.local_devices()[0].memory_stats()
  if not memory or 'bytes_limit' not in memory:
    return None
  gibibytes = memory['bytes_limit'] >> 30
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    gibibytes = int(multihost_utils.process_allgather(np.array(gibibytes, np.int32)).min())
  return gibibytes << 30


def is_lost_peer(error: BaseException) -> bool:
  """Whether an error of jax or orbax comes from a collective operation that lost a process."""
  return jax.process_count() > 1 and any(mark in str(error) for mark in _LOST_PEER_MARKS)


def is_first_process() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def any_process(value: bool) -> bool:
  """Returns whether the value is true in any process; all processes must call it."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return bool(multihost_utils.process_allgather(np.array(value)).any())
