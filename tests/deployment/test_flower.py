"""Flower at the edge: a real SuperLink and two SuperNodes give the simulation's parameters; messages add few bytes.

Needs flwr, which brings some fifty packages; CI runs it in a job of its own.
"""

import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import NamedTuple

import numpy as np
import pytest

flwr_app = pytest.importorskip('flwr.app')

from lwfedssl_jax import config as configs  # noqa: E402
from lwfedssl_jax import stages  # noqa: E402
from lwfedssl_jax.deployment import components, flower_messages, worker  # noqa: E402
from lwfedssl_jax.deployment.messages import (  # noqa: E402
  Envelope,
  MessageError,
  Refused,
  Task,
  Update,
  client_config,
  pack,
)
from lwfedssl_jax.deployment.node_options import NodeOptions  # noqa: E402
from lwfedssl_jax.resources import communication  # noqa: E402

FLAGS = [
  '--dataset=digits',
  '--image_size=16',
  '--max_train_images=160',
  '--num_clients=2',
  '--batch_size=32',
  '--client_chunk=1',
  '--method=layerwise',
  '--rounds_per_stage=1',
  '--blocks_per_stage=2',
  '--local_epochs=1',
  '--blur_probability=0,0',
  '--knn_bank_images=100',
  '--knn_test_images=50',
]

EMPTY_BYTES = 64  # of an answer without a message
MOST_HEADER_BYTES = 1100  # of a call, both ways; 970 in the mean
SESSION = {'register-node', 'activate-node', 'deactivate-node', 'unregister-node', 'get-run', 'get-fab'}
MESSAGES = {'pull-messages', 'pull-object', 'push-messages', 'push-object', 'confirm-message-received'}
POLLS = ('pull-messages', 'send-node-heartbeat')  # what a node sends without end; the first may bring a message


class Call(NamedTuple):
  """A call of Flower's Fleet interface, HTTP: bytes of both bodies, and of both headers."""

  name: str
  body_bytes: int
  header_bytes: int
  is_poll: bool


class CountingProxy:
  """Passes a node's calls on to a SuperLink and counts their bytes."""

  def __init__(self, port):
    self.calls = []
    handler = type('Handler', (_Handler,), {'target': port, 'calls': self.calls})
    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    self.port = self._server.server_address[1]
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def close(self):
    self._server.shutdown()
    self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def do_POST(self):
    body = self.rfile.read(int(self.headers['content-length']))
    connection = http.client.HTTPConnection('127.0.0.1', self.target)
    try:
      connection.request('POST', self.path, body, dict(self.headers))
      response = connection.getresponse()
      answer = response.read()
    except OSError:  # the SuperLink is not there yet
      self.send_error(503)
      return
    finally:
      connection.close()
    name = self.path.rpartition('/')[2]
    lines = [self.requestline, f'HTTP/1.1 {response.status} {response.reason}', '', '']
    lines += [f'{key}: {value}' for key, value in (*self.headers.items(), *response.getheaders())]
    is_poll = name in POLLS and len(answer) < EMPTY_BYTES
    self.calls.append(Call(name, len(body) + len(answer), sum(len(line) + 2 for line in lines), is_poll))
    self.send_response_only(response.status)
    for key, value in response.getheaders():
      self.send_header(key, value)
    self.end_headers()
    self.wfile.write(answer)

  def log_message(self, *arguments):
    del arguments


def free_port():
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


def start(module, *arguments, log):
  command = [sys.executable, '-m', f'experiments.{module}', *arguments]
  return subprocess.Popen(command, stdout=open(log, 'wb'), stderr=subprocess.STDOUT, start_new_session=True)


def stop(process):
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGTERM)
  process.wait(30)


@pytest.mark.slow
def test_two_nodes_on_loopback_give_the_simulation_s_parameters_and_bytes(tmp_path):
  port = free_port()
  proxy = CountingProxy(port)
  nodes = [
    start(
      'node',
      f'--superlink=127.0.0.1:{proxy.port}',
      '--insecure',
      f'--client_id={i}',
      '--part_of=digits',
      f'--state_dir={tmp_path / f"node{i}"}',
      f'--local_port={free_port()}',
      log=tmp_path / f'node{i}.log',
    )
    for i in range(2)
  ]
  server = start(
    'server', *FLAGS, f'--workdir={tmp_path / "real"}', '--insecure', f'--port={port}', log=tmp_path / 'server.log'
  )
  try:
    pretrain = [sys.executable, '-m', 'experiments.pretrain', *FLAGS, f'--workdir={tmp_path / "simulated"}']
    simulated = json.loads(subprocess.run(pretrain, capture_output=True, check=True, text=True).stdout.splitlines()[-1])
    assert server.wait(500) == 0, (tmp_path / 'server.log').read_text()[-3000:]
  finally:
    for process in (*nodes, server):
      stop(process)
    proxy.close()
  real = json.loads((tmp_path / 'real' / 'summary.json').read_text())
  assert real['params_sha256'] == simulated['params_sha256']
  predicted = 2 * (simulated['download_bytes'] + simulated['upload_bytes'])
  assert real['download_bytes'] + real['upload_bytes'] == predicted / 2
  messages = [call for call in proxy.calls if not call.is_poll]
  assert predicted < sum(call.body_bytes for call in messages) < 1.005 * predicted
  # What else is on the wire: headers, with the node's key and signature, and polls without end.
  assert {call.name for call in messages} <= SESSION | MESSAGES
  assert max(call.header_bytes for call in proxy.calls) < MOST_HEADER_BYTES
  assert max(call.body_bytes for call in proxy.calls if call.is_poll) < 2 * EMPTY_BYTES


def test_records_round_trip_and_other_arrays_are_refused():
  envelope = Envelope('{"kind": "x"}', {'norm': bytes(range(16)), 'block_00': b''})
  records = flower_messages.to_records(envelope)
  assert flower_messages.from_records(records) == envelope
  assert records['components']['norm'].numpy().dtype == 'float32'  # Flower's mods can read it
  array = flwr_app.Array
  for data in (b'', b'\x93NUMPY', b'\x80\x04.' * 50, flower_messages._npy_header(3) + bytes(16)):
    records['components'] = flwr_app.ArrayRecord({'norm': array('float32', (4,), 'numpy.ndarray', data)})
    with pytest.raises(MessageError, match='float32 vector'):
      flower_messages.from_records(records)
  for content in (
    flwr_app.RecordDict({}),
    flwr_app.RecordDict({'header': flwr_app.ConfigRecord({'json': 3})}),
    flwr_app.RecordDict({'header': flwr_app.ConfigRecord({'json': 'x' * (1 << 17)})}),
  ):
    with pytest.raises(MessageError):
      flower_messages.from_records(content)


def serialized_bytes(records):
  """Bytes of all objects that Flower makes of a message's content; equal objects travel once."""
  found, waiting = {}, [records]
  while waiting:
    item = waiting.pop()
    found[item.object_id] = len(item.deflate())
    waiting += (item.children or {}).values()
  return sum(found.values())


def test_flower_adds_less_than_half_a_percent_to_a_round_s_messages():
  config = configs.configure(dataset='digits', image_size=16, method='layerwise', num_clients=2)
  payload = communication.make_payload(config, 16)
  plan = stages.make_plans(config)[1]
  random = np.random.default_rng(0)
  data = {
    name: random.bytes(payload.sizes_bytes[name]) for name in stages.required_components(plan, payload.head_names)
  }
  digests = {name: components.digest(value) for name, value in data.items()}
  task = pack(Task('run', client_config(config), 0, 20, 0, digests), data)
  uploaded = {name: data[name] for name in stages.uploaded_components(plan, payload.head_names)}
  update = pack(Update(0, 20, 0, (1.0, 1.0, 0.0)), uploaded)
  predicted = sum(map(len, data.values())) + sum(map(len, uploaded.values()))
  wire = sum(serialized_bytes(flower_messages.to_records(envelope)) for envelope in (task, update))
  assert predicted < wire < 1.005 * predicted


def test_a_worker_stays_between_messages_and_takes_only_who_has_the_key(tmp_path, monkeypatch):
  options = NodeOptions(client_id=0, part_of='digits', state_dir=str(tmp_path / 'state'))
  worker.write_options(options)
  first = worker.ask(options, Envelope('nonsense', {}))
  assert first == pack(Refused('header: expected JSON'))
  monkeypatch.setattr(worker, '_start', lambda options: pytest.fail('a second worker was started'))
  assert worker.ask(options, Envelope('nonsense', {'x': b'0' * 10**6})) == first
  assert os.stat(tmp_path / 'state' / 'worker.key').st_mode & 0o077 == 0
  from multiprocessing import AuthenticationError

  key = (tmp_path / 'state' / 'worker.key').read_bytes()
  (tmp_path / 'state' / 'worker.key').write_bytes(b'another')
  with pytest.raises(AuthenticationError):
    worker.ask(options, Envelope('nonsense', {}))
  (tmp_path / 'state' / 'worker.key').write_bytes(key)
  worker.write_options(dataclasses.replace(options, client_id=1))  # the worker with other options ends
  with pytest.raises(pytest.fail.Exception, match='second worker'):
    worker.ask(options, Envelope('nonsense', {}))


def test_configurations_reach_the_app_as_they_are(tmp_path):
  import tomllib

  from lwfedssl_jax.deployment import flower_app
  from lwfedssl_jax.deployment.server_options import ServerOptions

  config = configs.configure(workdir='a "quoted"\n{path}', crop_area=(0.2, 0.9))
  app = flower_app.write_app(str(tmp_path), config, ServerOptions(min_clients=3))
  with open(os.path.join(app, 'pyproject.toml'), 'rb') as file:
    values = tomllib.load(file)['tool']['flwr']['app']['config']
  assert configs.from_flat(json.loads(values['config'])) == config
  assert ServerOptions(**json.loads(values['options'])).min_clients == 3
