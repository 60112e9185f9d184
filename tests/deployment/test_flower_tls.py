"""Flower's encryption and node authentication, as this package starts them: without key or certificate nobody gets in.

Needs flwr, openssl and ssh-keygen.
"""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import time

import pytest

pytest.importorskip('flwr.app')

from lwfedssl_jax.deployment import flower_app
from lwfedssl_jax.deployment.flower_app import Tls

SCRIPT = pathlib.Path(__file__).parents[2] / 'examples' / 'flower' / 'certificates.sh'
JOINED = 'SuperNode ID'  # what a node logs once the SuperLink has taken it
pytestmark = pytest.mark.slow


def free_port():
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


def start(arguments, environment, log):
  with open(log, 'wb') as file:
    return subprocess.Popen(arguments, env=environment, stdout=file, stderr=file, start_new_session=True)


def wait_for(condition, seconds=90):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.2)


def listens(port):
  with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1):
    return True


@pytest.fixture
def processes():
  """Processes that end with the test, and what they started."""
  started = []
  yield started
  for process in started:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def test_only_a_registered_key_over_the_authority_s_certificate_gets_in(tmp_path, processes):
  ours, theirs, port = tmp_path / 'ours', tmp_path / 'theirs', free_port()
  subprocess.run([SCRIPT, ours, '127.0.0.1', 'known'], check=True)
  subprocess.run([SCRIPT, theirs, '127.0.0.1', 'stranger'], check=True)
  files = ('ca.crt', 'server.pem', 'server.key', 'keys')
  names = ('ca_certificate', 'certificate', 'private_key', 'node_keys')
  tls = Tls(**{name: str(ours / file) for name, file in zip(names, files)})
  home = str(tmp_path / 'home')
  link = flower_app.superlink_arguments('127.0.0.1', port, tls, str(tmp_path / 'superlink.db'))
  processes.append(start(link, flower_app.environment(home), tmp_path / 'superlink.log'))
  wait_for(lambda: listens(port))
  flower_app.write_connection(home, f'127.0.0.1:{port}', tls.ca_certificate)
  for registration in flower_app.register_arguments(tls.node_keys):
    subprocess.run(registration, env=flower_app.environment(home), check=True, capture_output=True)

  def join(name, ca, key):
    arguments = flower_app.supernode_arguments(f'127.0.0.1:{port}', free_port(), ca and str(ca), key and str(key), 'x')
    node = start(arguments, flower_app.environment(str(tmp_path / name)), tmp_path / f'{name}.log')
    processes.append(node)
    return node

  refused = {
    'CERTIFICATE_VERIFY_FAILED': join('another authority', theirs / 'ca.crt', ours / 'known.key'),
    'code: 2004': join('an unregistered key', ours / 'ca.crt', theirs / 'stranger.key'),
    'code: 2001': join('no key', ours / 'ca.crt', ''),
  }
  plain = join('plain text', '', ours / 'known.key')
  codes = [node.wait(90) for node in refused.values()]
  join('known', ours / 'ca.crt', ours / 'known.key')
  wait_for(lambda: JOINED in (tmp_path / 'known.log').read_text())
  assert all(codes)
  for reason, name in zip(refused, ('another authority', 'an unregistered key', 'no key')):
    assert reason in (tmp_path / f'{name}.log').read_text(), name
  for name in ('another authority', 'an unregistered key', 'no key', 'plain text'):
    assert JOINED not in (tmp_path / f'{name}.log').read_text(), name
  assert plain.poll() != 0  # it tries again, or has given up
