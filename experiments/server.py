r"""Pretrains an encoder with real clients: starts a Flower SuperLink, runs the rounds, and prints the summary.

    lwfedssl-server --preset=quickstart --num_clients=3 --workdir=runs/federation --insecure
    lwfedssl-server --preset=quickstart --num_clients=3 --workdir=runs/federation --host=0.0.0.0 \
      --ca_certificate=ca.crt --certificate=server.pem --private_key=server.key --node_keys=keys

--resume continues after any interruption. Clients run lwfedssl-node (docs/federation.md).
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from absl import flags as absl_flags

from lwfedssl_jax import config as configs
from lwfedssl_jax.deployment import flower_app
from lwfedssl_jax.deployment.flower_app import Tls
from lwfedssl_jax.deployment.server_options import ServerOptions, check
from lwfedssl_jax.errors import TrainingError, UsageError

from . import command, flags

START_SECONDS, STOP_SECONDS = 60.0, 20.0
FLAGS = absl_flags.FlagValues()
_HOST = absl_flags.DEFINE_string('host', '127.0.0.1', 'address to listen on; 0.0.0.0: all', flag_values=FLAGS)
_PORT = absl_flags.DEFINE_integer('port', 8000, 'port to listen on', flag_values=FLAGS)
_INSECURE = absl_flags.DEFINE_boolean('insecure', False, 'serve without encryption', flag_values=FLAGS)
flags.define_group_flags(FLAGS, ServerOptions)
flags.define_group_flags(FLAGS, Tls)


def main() -> dict[str, Any]:
  """Runs the federation and returns its summary."""
  config = flags.config_from_flags(FLAGS)
  options, tls = flags.group_from_flags(FLAGS, ServerOptions), flags.group_from_flags(FLAGS, Tls)
  if bool(tls.certificate) == _INSECURE.value:
    raise UsageError('--certificate: expected the file, or --insecure for connections without encryption')
  check(config, options)
  workdir = os.path.abspath(config.run.workdir) if config.run.workdir else ''
  config = configs.with_values(config, {'workdir': workdir, 'num_devices': 1})

  from lwfedssl_jax.workdir import metrics_writer, run_dir

  run_dir.check_workdir(config)
  summary = os.path.join(workdir, run_dir.SUMMARY)
  if os.path.exists(summary):
    return run_dir.read_json(summary)
  registrations = flower_app.register_arguments(tls.node_keys) if tls.node_keys else []
  folder = os.path.join(workdir, 'flower')
  home = os.path.join(folder, 'home')
  link = flower_app.superlink_arguments(_HOST.value, _PORT.value, tls, os.path.join(folder, 'superlink.db'))
  app = flower_app.write_app(folder, config, options)
  local = '127.0.0.1' if _HOST.value == '0.0.0.0' else _HOST.value
  flower_app.write_connection(home, f'{local}:{_PORT.value}', tls.ca_certificate if tls.certificate else '')
  environment = {**flower_app.environment(home), 'JAX_COMPILATION_CACHE_DIR': command.compilation_cache_dir()}
  with _running(link, environment, os.path.join(folder, 'superlink.log')):
    _wait_for_port(local, _PORT.value)
    for registration in registrations:
      subprocess.run(registration, env=environment, check=False, stdout=subprocess.DEVNULL)
    subprocess.run(flower_app.run_arguments(app), env=environment, check=False)
  if not os.path.exists(summary):
    rounds_done = len(metrics_writer.read_metrics(workdir))
    if config.run.stop_after_round and rounds_done >= config.run.stop_after_round:
      return {'finished': False, 'rounds_done': rounds_done}
    raise TrainingError(f'the run has not finished, see above and {folder}/superlink.log; --resume continues')
  return run_dir.read_json(summary)


@contextlib.contextmanager
def _running(arguments: list[str], environment: dict[str, str], log_path: str) -> Iterator[None]:
  """Runs a program in a process group of its own, which ends with the block: Flower starts further processes."""
  with open(log_path, 'wb') as log:
    process = subprocess.Popen(arguments, env=environment, stdout=log, stderr=log, start_new_session=True)
  try:
    yield
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGTERM)
    try:
      process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)


def _wait_for_port(host: str, port: int) -> None:
  end = time.monotonic() + START_SECONDS
  while True:
    try:
      socket.create_connection((host, port), 1).close()
      return
    except OSError as error:
      if time.monotonic() > end:
        raise TrainingError(f'the SuperLink does not listen on {host}:{port} after {START_SECONDS:g} s') from error
      time.sleep(0.2)


def _stop(number: int, frame: Any) -> None:
  del frame
  raise KeyboardInterrupt(signal.Signals(number).name)


COMMAND = command.Command(__doc__, FLAGS, main, has_config=True)


def run() -> None:
  """Runs this command line."""
  signal.signal(signal.SIGTERM, _stop)
  command.run(COMMAND)


if __name__ == '__main__':
  run()
