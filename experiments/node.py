r"""Takes part in a federation with this machine's images: starts a Flower SuperNode that answers a server's rounds.

    lwfedssl-node --superlink=192.168.1.10:8000 --insecure --client_id=0 --images=folder:scans --state_dir=node0
    lwfedssl-node --superlink=server:8000 --ca_certificate=ca.crt --private_key=node0 --client_id=0 \
      --images=folder:scans --state_dir=node0

The images stay on this machine (docs/federation.md).
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from absl import flags as absl_flags

from lwfedssl_jax.deployment import flower_app
from lwfedssl_jax.deployment.node_options import NodeOptions
from lwfedssl_jax.errors import UsageError

from . import command, flags

AGAIN_SECONDS = 10.0
FLAGS = absl_flags.FlagValues()
_SUPERLINK = absl_flags.DEFINE_string('superlink', '', 'HOST:PORT of the server', flag_values=FLAGS)
_CA = absl_flags.DEFINE_string(
  'ca_certificate', '', "PEM file of the authority that signed the server's certificate", flag_values=FLAGS
)
_KEY = absl_flags.DEFINE_string(
  'private_key', '', 'file of the private key whose public key the server knows', flag_values=FLAGS
)
_INSECURE = absl_flags.DEFINE_boolean('insecure', False, 'connect without encryption', flag_values=FLAGS)
_LOCAL_PORT = absl_flags.DEFINE_integer(
  'local_port', 9094, 'port on this machine between the SuperNode and its apps; one a node', flag_values=FLAGS
)
flags.define_group_flags(FLAGS, NodeOptions)


def main() -> dict[str, Any]:
  """Keeps a SuperNode running until a signal; returns its name."""
  options = flags.group_from_flags(FLAGS, NodeOptions)
  if not _SUPERLINK.value:
    raise UsageError('--superlink: expected HOST:PORT of the server')
  if bool(_CA.value) == _INSECURE.value:
    raise UsageError('--ca_certificate: expected the file, or --insecure for a connection without encryption')
  if bool(options.images) == bool(options.part_of):
    raise UsageError("--images: expected this machine's images, or --part_of, a data set that is partitioned")
  if not options.state_dir:
    raise UsageError('--state_dir: expected a folder that the client may write')
  from lwfedssl_jax.deployment import worker

  home = os.path.join(os.path.abspath(options.state_dir), 'flower')
  arguments = flower_app.supernode_arguments(
    _SUPERLINK.value, _LOCAL_PORT.value, _CA.value, _KEY.value, worker.options_path(options.state_dir)
  )
  worker.write_options(options)
  os.makedirs(home, mode=0o700, exist_ok=True)
  try:
    while True:
      code = _run(arguments, flower_app.environment(home))
      print(f'the SuperNode ended with exit code {code}; it starts again in {AGAIN_SECONDS:g} s', flush=True)
      time.sleep(AGAIN_SECONDS)
  except KeyboardInterrupt as signal_name:
    worker.stop(options)
    return {'ended_by': str(signal_name) or 'SIGINT'}


def _run(arguments: list[str], environment: Mapping[str, str]) -> int:
  """Runs the SuperNode; an unknown key, or one whose node was killed a minute ago, makes it end."""
  process = subprocess.Popen(arguments, env=environment)
  try:
    return process.wait()
  finally:
    process.terminate()
    process.wait()


def _stop(number: int, frame: Any) -> None:
  del frame
  raise KeyboardInterrupt(signal.Signals(number).name)


COMMAND = command.Command(__doc__, FLAGS, main)


def run() -> None:
  """Runs this command line."""
  signal.signal(signal.SIGTERM, _stop)
  command.run(COMMAND)


if __name__ == '__main__':
  run()
