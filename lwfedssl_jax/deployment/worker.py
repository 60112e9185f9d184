"""A process that keeps a client between messages: images, compiled programs and held components stay in memory.

Flower starts a process for each message; that one only passes the message on, over a Unix socket that takes whoever can
read a random key in the client's folder. The worker ends when it is idle. Nothing is pickled.

    python -m lwfedssl_jax.deployment.worker OPTIONS.json
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client as Connect
from multiprocessing.connection import Connection, Listener
from typing import Any

import filelock

from lwfedssl_jax.deployment import messages
from lwfedssl_jax.deployment.messages import Envelope, Refused
from lwfedssl_jax.deployment.node_options import NodeOptions

IDLE_SECONDS = 600.0
START_SECONDS = 120.0
MOST_LOG_BYTES = 1 << 20
_MOST_BYTES = 1 << 31
_STOP = Envelope('stop', {})


def read_options(path: str) -> NodeOptions:
  """Reads the options that `lwfedssl-node` wrote."""
  with open(path, encoding='utf-8') as file:
    return NodeOptions(**json.load(file))


def options_path(state_dir: str) -> str:
  """Returns the file of a client's options."""
  return os.path.join(os.path.abspath(state_dir), 'node.json')


def write_options(options: NodeOptions) -> None:
  """Writes a client's options to its folder, whose path is absolute there; a worker with other ones ends."""
  options = dataclasses.replace(options, state_dir=os.path.abspath(options.state_dir))
  os.makedirs(options.state_dir, mode=0o700, exist_ok=True)
  path = options_path(options.state_dir)
  if os.path.exists(path) and read_options(path) != options:
    stop(options)
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(dataclasses.asdict(options), file, indent=2)


def ask(options: NodeOptions, request: Envelope) -> Envelope:
  """Passes a message to the worker, which is started if there is none, and returns its answer."""
  with _connect(options) as connection:
    _send(connection, request)
    return _receive(connection)


def stop(options: NodeOptions) -> None:
  """Ends the worker, if there is one, after the message at which it is."""
  with contextlib.suppress(OSError, EOFError, AuthenticationError):
    with Connect(_address(options), 'AF_UNIX', authkey=_key(options)) as connection:
      _send(connection, _STOP)
      _receive(connection)


def _connect(options: NodeOptions) -> Connection:
  lock = filelock.FileLock(os.path.join(options.state_dir, 'start.lock'))
  end, process = time.monotonic() + START_SECONDS, None
  with lock:
    while True:
      try:
        return Connect(_address(options), 'AF_UNIX', authkey=_key(options))
      except OSError:  # none listens, or one has just ended
        if process is None:
          process = _start(options)
        if process.poll() is not None or time.monotonic() > end:
          raise RuntimeError(f'the worker did not start, see {_log_path(options)}') from None
        time.sleep(0.1)


def _start(options: NodeOptions) -> 'subprocess.Popen[bytes]':
  _key(options)
  with open(_log_path(options), 'wb') as log:
    return subprocess.Popen(
      [sys.executable, '-m', 'lwfedssl_jax.deployment.worker', options_path(options.state_dir)],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=log,
      start_new_session=True,
    )


def _address(options: NodeOptions) -> str:
  """Returns the socket's path: short, as the system asks, and the user's own."""
  name = hashlib.sha256(os.path.realpath(options.state_dir).encode()).hexdigest()[:16]
  folder = os.path.join(tempfile.gettempdir(), f'lwfedssl-{os.getuid()}')
  os.makedirs(folder, mode=0o700, exist_ok=True)
  if os.stat(folder).st_uid != os.getuid():
    raise RuntimeError(f'{folder}: expected a folder of this user')
  return os.path.join(folder, name)


def _key(options: NodeOptions) -> bytes:
  path = os.path.join(options.state_dir, 'worker.key')
  with contextlib.suppress(FileExistsError):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, 'wb') as file:
      file.write(secrets.token_bytes(32))
  with open(path, 'rb') as file:
    return file.read()


def _pid_path(options: NodeOptions) -> str:
  return os.path.join(options.state_dir, 'worker.pid')


def _log_path(options: NodeOptions) -> str:
  return os.path.join(options.state_dir, 'worker.log')


def _send(connection: Connection, envelope: Envelope) -> None:
  connection.send_bytes(json.dumps([envelope.header, list(envelope.vectors)]).encode())
  for data in envelope.vectors.values():
    connection.send_bytes(data)


def _receive(connection: Connection) -> Envelope:
  header, names = json.loads(connection.recv_bytes(_MOST_BYTES))
  return Envelope(header, {name: connection.recv_bytes(_MOST_BYTES) for name in names})


def _answer(client: Any, request: Envelope) -> Envelope:
  """Answers a message, and logs how long that took; the server learns of the type of an error of our own."""
  begin, error_text = time.monotonic(), ''
  try:
    reply = client.handle(request)
  except Exception as error:
    reply, error_text = messages.pack(Refused(f'internal error: {type(error).__name__}')), traceback.format_exc()
  if os.fstat(sys.stderr.fileno()).st_size < MOST_LOG_BYTES:
    print(f'{error_text}{messages.describe(reply)}: {time.monotonic() - begin:.2f} s', file=sys.stderr, flush=True)
  return reply


def serve(options: NodeOptions) -> None:
  """Serves messages, one at a time, until none has come for IDLE_SECONDS."""
  from lwfedssl_jax.deployment.client import Client

  client, address = Client(options), _address(options)
  last = [time.monotonic()]
  busy = threading.Lock()

  def end_when_idle() -> None:
    while time.monotonic() - last[0] < IDLE_SECONDS or busy.locked():
      time.sleep(1)
    os._exit(0)

  with contextlib.suppress(FileNotFoundError):
    os.unlink(address)  # of a worker that was killed
  with open(_pid_path(options), 'w', encoding='ascii') as file:
    file.write(str(os.getpid()))
  with Listener(address, 'AF_UNIX', authkey=_key(options)) as listener:
    threading.Thread(target=end_when_idle, daemon=True).start()
    while True:
      with contextlib.suppress(OSError, EOFError, ValueError, AuthenticationError):
        with listener.accept() as connection, busy:
          request = _receive(connection)
          _send(connection, _STOP if request == _STOP else _answer(client, request))
          if request == _STOP:
            return
      last[0] = time.monotonic()


def use_compilation_cache(state_dir: str) -> None:
  """Keeps compiled programs in the client's folder, at most a gigabyte of them."""
  import jax

  jax.config.update('jax_compilation_cache_dir', os.path.join(state_dir, 'compiled'))
  jax.config.update('jax_compilation_cache_max_size', 10**9)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


if __name__ == '__main__':
  node_options = read_options(sys.argv[1])
  use_compilation_cache(node_options.state_dir)
  serve(node_options)
