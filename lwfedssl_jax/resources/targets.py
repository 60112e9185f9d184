"""Chips that XLA compiles for on a machine that has none: GPUs and TPUs, described by data (targets.toml).

Nothing is run: a target gives the memory and the kernels that its compiler decides on. Compiling for GPUs takes jax's
CUDA plugin, without NVIDIA's libraries and driver; for TPUs it takes libtpu.
"""

import contextlib
import functools
import importlib.metadata
import importlib.resources
import importlib.util
import os
import re
import tomllib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from lwfedssl_jax.devices import AXIS
from lwfedssl_jax.errors import UsageError

FILE_PREFIX = 'file:'
_COMMON = 'gpu'  # what GPUs share, not a chip
_NEEDED = {  # fields of a target's table
  'cuda': ('description', 'peak_flops', 'gpu_device_info', 'memory_share'),
  'tpu': ('description', 'peak_flops', 'topology', 'memory_bytes', 'memory_bandwidth'),
}
_PLUGINS = {'cuda': ('jax_plugins.xla_cuda12', 'gpu-aot'), 'tpu': ('libtpu', 'tpu-aot')}  # module, extra
_GPU_SOFTWARE = 'platform_name: "CUDA" runtime_version { major: 12 minor: 9 } dnn_version_info { major: 9 minor: 8 }'
_SIZE_IN_ERROR = re.compile(r'(?:Used|temporaries \() ?([\d.]+)([KMGT])')
_SIZES = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class Peaks(NamedTuple):
  """Rates of a device that its maker states.

  Attributes:
    flops: {type of matrix products: FLOP/s}, a multiply-add counts 2; see targets.toml.
    memory_bandwidth: bytes/s of the main memory.
  """

  flops: dict[str, float]
  memory_bandwidth: float


class Target(NamedTuple):
  """A chip to compile for.

  Attributes:
    name: as given, such as `gpu-h100` or `tpu-v5e:2x4`.
    description: in words.
    platform: `cuda` or `tpu`.
    devices: without hardware; for sharding, not for arrays.
    memory_bytes: of one device, that programs may use.
    peaks: of one device.
    compiler_options: XLA's.
  """

  name: str
  description: str
  platform: str
  devices: tuple[Any, ...]
  memory_bytes: int
  peaks: Peaks
  compiler_options: dict[str, Any]

  @property
  def sharding(self) -> Sharding:
    """Of an array on the first device."""
    return SingleDeviceSharding(self.devices[0])

  def make_mesh(self, num_devices: int) -> Mesh | None:
    """Returns the mesh of the first devices; None for one. Raises UsageError if there are fewer."""
    if num_devices > len(self.devices):
      raise UsageError(f'--target_devices: expected at most {len(self.devices)} for {self.name}, got {num_devices}')
    return Mesh(np.array(self.devices[:num_devices]), (AXIS,)) if num_devices > 1 else None


class OutOfMemoryError(Exception):
  """A program does not fit the target's memory: an answer, not a failure.

  Attributes:
    needed_bytes: as the compiler states it, rounded by it.
  """

  def __init__(self, needed_bytes: int):
    super().__init__(f'needs {needed_bytes} bytes')
    self.needed_bytes = needed_bytes


def names() -> list[str]:
  """Returns the chips of the table."""
  return [name for name in _table() if name != _COMMON]


def load(name: str, num_devices: int = 1) -> Target:
  """Returns a target by its name.

  Args:
    name: one of `names()`, for TPUs also with chips, such as `tpu-v5e:2x4`; or `file:PATH`, a TOML file with the fields
      of a GPU.
    num_devices: of a GPU's machine.

  Raises:
    UsageError: the name, the file or the plugin is missing or invalid.
  """
  kind, _, chips = name.partition(':')
  if name.startswith(FILE_PREFIX):
    entry, chips = _read_file(name[len(FILE_PREFIX) :]), ''
  elif kind in names():
    entry = _with_common(_table()[kind])
  else:
    raise UsageError(f'--target: expected one of {", ".join(names())} or file:PATH, got {name!r}')
  platform = entry['platform']
  if chips and platform != 'tpu':
    raise UsageError(f'--target: expected no chips after the name of a GPU (see --target_devices), got {name!r}')
  _require_plugin(name, platform)
  devices = _tpu_devices(entry, chips) if platform == 'tpu' else _gpu_devices(entry, num_devices)
  info = entry.get('gpu_device_info', {})
  return Target(
    name,
    entry['description'],
    platform,
    tuple(devices),
    int(entry.get('memory_bytes') or entry['memory_share'] * info['device_memory_size']),
    Peaks(entry['peak_flops'], entry.get('memory_bandwidth') or info['memory_bandwidth']),
    entry.get('compiler_options', {}),
  )


def place(tree: Any, sharding: Sharding) -> Any:
  """Returns the abstract arrays of a tree with a sharding."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def replicated(target: Target, mesh: Mesh | None) -> Sharding:
  """Returns the sharding of an array that every device of the mesh has."""
  return target.sharding if mesh is None else NamedSharding(mesh, PartitionSpec())


def compile_program(lowered: Any, target: Target) -> Any:
  """Compiles a program that was lowered on the target's devices.

  Raises:
    OutOfMemoryError: the compiler refuses because it does not fit. Those for GPUs do not; see `Target.memory_bytes`.
  """
  with _without_compilation_cache():
    try:
      return lowered.compile(compiler_options=target.compiler_options or None)
    except jax.errors.JaxRuntimeError as error:
      size = _SIZE_IN_ERROR.search(str(error))
      if 'RESOURCE_EXHAUSTED' not in str(error) or size is None:
        raise
      raise OutOfMemoryError(int(float(size[1]) * _SIZES[size[2]])) from error


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
  """Switches jax's persistent cache off: a program that was compiled without its device cannot be read back."""
  from jax.experimental.compilation_cache import compilation_cache

  before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]

  def switch(enabled: bool) -> None:
    jax.config.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()  # it remembers whether it is used

  switch(False)
  try:
    yield
  finally:
    switch(before)


# Entries.


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
  return tomllib.loads(importlib.resources.files(__package__).joinpath('targets.toml').read_text('utf-8'))


def _with_common(entry: dict[str, Any]) -> dict[str, Any]:
  if 'gpu_device_info' not in entry:
    return entry
  common = _table()[_COMMON]
  return {**common, **entry, 'gpu_device_info': {**common['gpu_device_info'], **entry['gpu_device_info']}}


def _read_file(path: str) -> dict[str, Any]:
  """Reads a user's GPU. Raises UsageError."""
  try:
    with open(path, 'rb') as file:
      entry = _with_common(tomllib.load(file))
  except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
    raise UsageError(f'--target: expected {path} to be a TOML file, {error}') from error
  if entry.get('platform') != 'cuda':
    raise UsageError(f'--target: expected {path} to have a table gpu_device_info of a CUDA GPU (docs/accelerators.md)')
  example = _table()['gpu-h100']['gpu_device_info']
  missing = [name for name in _NEEDED['cuda'] if name not in entry]
  missing += [f'gpu_device_info.{name}' for name in example if name not in entry['gpu_device_info']]
  missing += [f'peak_flops.{name}' for name in ('bfloat16', 'float32') if name not in entry.get('peak_flops', {})]
  if missing:
    raise UsageError(f'--target: expected {path} to have {", ".join(missing)}')
  return entry


def _require_plugin(name: str, platform: str) -> None:
  module, extra = _PLUGINS[platform]
  found = importlib.util.find_spec(module.split('.')[0]) is not None and importlib.util.find_spec(module) is not None
  if not found:
    raise UsageError(f"--target={name}: {module} is not installed; pip install 'lwfedssl-jax[{extra}]'")
  if platform == 'cuda':
    versions = [importlib.metadata.version(package) for package in ('jax-cuda12-plugin', 'jaxlib')]
    if versions[0] != versions[1]:
      raise UsageError(f'--target={name}: expected jax-cuda12-plugin {versions[1]}, as jaxlib, found {versions[0]}')


# Devices without hardware.


def _tpu_devices(entry: dict[str, Any], chips: str) -> Any:
  from jax.experimental import topologies

  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # do not ask the network for a TPU's metadata
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  generation, _, default = entry['topology'].partition(':')
  chips = chips or default
  options: dict[str, Any] = {}
  if set(chips) <= set('1x'):
    options['chips_per_host_bounds'] = [1, 1, 1]
  try:
    topology = topologies.get_topology_desc(platform='tpu', topology_name=f'{generation}:{chips}', **options)
  except jax.errors.JaxRuntimeError as error:
    raise UsageError(f'--target: expected chips such as {default} after the name, got {chips!r}: {error}') from error
  return topology.devices


def _gpu_devices(entry: dict[str, Any], num_devices: int) -> Any:
  from jax.experimental import topologies

  config = f'{_proto({"gpu_device_info": entry["gpu_device_info"]})} {_GPU_SOFTWARE} device_description_str: "GPU"'
  try:
    topology = topologies.get_topology_desc(
      topology_name='x', platform='cuda', target_config=config, topology=f'1x1x{num_devices}'
    )
  except jax.errors.JaxRuntimeError as error:
    raise UsageError(f"--target: expected fields of XLA's GpuDeviceInfoProto in gpu_device_info, {error}") from error
  return topology.devices


def _proto(fields: dict[str, Any]) -> str:
  """Returns nested fields in protocol buffers' text format."""
  return ' '.join(
    f'{name} {{ {_proto(value)} }}' if isinstance(value, dict) else f'{name}: {value}' for name, value in fields.items()
  )
