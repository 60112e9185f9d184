"""Hostile messages at both ends: one line each, no crash, no growth, nothing written outside the client's folder."""

import json
import os
import string

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lwfedssl_jax import config as configs
from lwfedssl_jax import stages
from lwfedssl_jax.deployment import components, messages
from lwfedssl_jax.deployment.client import Client
from lwfedssl_jax.deployment.exchange import Exchange
from lwfedssl_jax.deployment.members import Connected, Members
from lwfedssl_jax.deployment.messages import Envelope, Hello, Lacking, Member, MessageError, Refused, Task, Update
from lwfedssl_jax.deployment.node_options import NodeOptions
from lwfedssl_jax.deployment.server_options import ServerOptions
from lwfedssl_jax.resources import communication
from tests.deployment import in_process

pytestmark = pytest.mark.usefixtures('tiny_library')
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
  scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
names = st.sampled_from(['embedding', 'block_00', 'norm', '../escape', '/etc/passwd', '', 'a' * 500]) | st.text(
  max_size=9
)
vectors = st.dictionaries(names, st.binary(max_size=64) | st.just(b'\x80\x04.' * 9), max_size=3)


def valid_config():
  return messages.client_config(in_process.make_config('unused', method='layerwise'))


def valid_task():
  return Task('run', valid_config(), 0, 0, 0, {})


@st.composite
def hostile_headers(draw, records):
  """A valid record with some fields replaced, added or left out; or any text."""
  record = draw(st.sampled_from(records))
  fields = json.loads(messages.pack(record).header)
  for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=2, unique=True)):
    fields[name] = draw(values)
  if isinstance(fields.get('config'), dict) and draw(st.booleans()):
    fields['config'] = {**fields['config'], draw(st.sampled_from(sorted(valid_config()))): draw(values)}
  if draw(st.booleans()):
    fields |= draw(st.dictionaries(st.text(max_size=6), values, max_size=2))
  texts = [json.dumps(fields), draw(st.text(alphabet=string.printable, max_size=40)), '[' * 50_000, '9' * 50_000]
  return draw(st.sampled_from([texts[0]] * 6 + texts[1:]))


def files_below(folder):
  return sorted(os.path.relpath(os.path.join(at, name), folder) for at, _, found in os.walk(folder) for name in found)


def one_line(text):
  return '\n' not in text and len(text) <= 2 * messages.MOST_TEXT


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  folder = tmp_path_factory.mktemp('node')
  return folder, Client(NodeOptions(client_id=0, part_of='digits', state_dir=str(folder / 'state')))


@FUZZ
@given(hostile_headers([Hello('run', valid_config()), valid_task()]), vectors)
def test_a_client_answers_any_message_in_one_line_and_writes_only_to_its_folder(client, header, parts):
  folder, answers = client
  reply = messages.unpack(answers.handle(Envelope(header, parts)))
  assert isinstance(reply, Refused | Member)
  assert isinstance(reply, Member) or (reply.reason and one_line(reply.reason))
  found = os.listdir(folder)
  assert set(found) <= {'state'}
  assert len(os.listdir(folder / 'state')) <= 1 if found else True
  assert not [name for name in files_below(folder) if not name.startswith('state/run-')]


def make_exchange():
  config = in_process.make_config('unused', method='layerwise')
  payload = communication.make_payload(config, 8)
  log = []
  transport = in_process.InProcess({})
  members = Members(transport, ServerOptions(), messages.pack(Hello('r', {})), payload, 4, log.append)
  return config, payload, log, transport, members, Exchange(transport, members, payload, log.append)


class Answering:
  """A node that gives one answer to everything."""

  def __init__(self, reply):
    self.reply = reply

  def handle(self, request):
    return self.reply


@FUZZ
@given(
  hostile_headers([Member(1, 9, {}), Update(1, 0, 0, (1.0, 1.0, 0.0)), Lacking(('norm',)), Refused('\x1b[2J\nno')]),
  vectors,
)
def test_a_server_takes_nothing_of_a_message_that_is_not_valid(header, parts):
  config, payload, log, transport, members, exchange = make_exchange()
  transport.clients[7] = Answering(Envelope(header, parts))
  members._refresh()  # the greeting
  assert set(members.connected) <= {1, 0, 2, 3}
  members.connected = {1: Connected(7, 9, {})}
  plan = stages.make_plans(config)[0]
  whole = {name: np.zeros(size // 4, np.float32) for name, size in payload.sizes_bytes.items()}
  trained, traffic = exchange.run(Task('r', {}, 0, 0, 0, {}), plan, whole, [1], 5)
  assert trained == {}  # no update in these messages has the components of the round
  assert traffic.upload_bytes.sum() == 0
  assert log and all(one_line(line) and line.isprintable() for line in log)


def test_a_valid_update_is_taken_and_its_bytes_are_counted():
  config, payload, log, transport, members, exchange = make_exchange()
  plan = stages.make_plans(config)[0]
  uploaded = stages.uploaded_components(plan, payload.head_names)
  data = {name: bytes(payload.sizes_bytes[name]) for name in uploaded}
  transport.clients[7] = Answering(messages.pack(Update(1, 0, 0, (float('nan'), 1.0, 0.0)), data))
  members.connected = {1: Connected(7, 9, {})}
  whole = {name: np.zeros(size // 4, np.float32) for name, size in payload.sizes_bytes.items()}
  trained, traffic = exchange.run(Task('r', {}, 0, 0, 0, {}), plan, whole, [1], 5)
  assert list(trained) == [1] and np.isnan(trained[1][1][0])  # the round's rule rejects it
  assert traffic.upload_bytes.sum() == sum(map(len, data.values())) and log == []


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda data: data | {'block_01': b''}, 'components: expected'),
    (lambda data: {name: value for name, value in data.items() if name != 'norm'}, 'components: expected'),
    (lambda data: data | {'norm': data['norm'] + b'0000'}, 'norm: expected 64 bytes'),
  ],
  ids=['another component', 'one left out', 'too long'],
)
def test_components_of_another_name_or_size_are_refused(change, message):
  sizes = {'norm': 64, 'block_00': 8}
  with pytest.raises(MessageError, match=message):
    messages.check_vectors(change({name: bytes(size) for name, size in sizes.items()}), sizes)


def test_a_claimed_number_stays_with_its_node_and_counts_are_bounded():
  _, _, log, transport, members, _ = make_exchange()
  transport.clients |= {
    1: Answering(messages.pack(Member(2, 50, {}))),
    2: Answering(messages.pack(Member(2, 60, {}))),
    3: Answering(messages.pack(Member(3, 10**8, {}))),
    4: Answering(messages.pack(Member(4, 5, {}))),
  }
  members._refresh()
  assert {number: each.node_id for number, each in members.connected.items()} == {2: 1}
  assert [line.split(':')[0] for line in log] == ['client 2', 'node 2', 'node 3', 'node 4']


def test_a_client_with_a_wrong_digest_keeps_nothing(client):
  folder, answers = client
  config = configs.from_flat({**valid_config()})
  plan = stages.make_plans(config)[0]
  sizes = communication.make_payload(config, 8).sizes_bytes
  required = stages.required_components(plan, communication.make_payload(config, 8).head_names)
  task = valid_task()._replace(digests={name: components.digest(b'other') for name in required})
  before = files_below(folder)
  reply = messages.unpack(answers.handle(messages.pack(task, {'norm': bytes(sizes['norm'])})))
  assert isinstance(reply, Refused) and 'digest' in reply.reason
  assert files_below(folder) == before


class Forgetful:
  """A node that holds nothing although the server takes it to hold all; then it trains."""

  def __init__(self, data):
    self.data, self.requests = data, []

  def handle(self, request):
    self.requests.append(set(request.vectors))
    task = messages.unpack(request)
    lacking = tuple(name for name in task.digests if not any(name in names for names in self.requests))
    if lacking:
      return messages.pack(Lacking(lacking))
    return messages.pack(Update(1, 0, 0, (1.0, 1.0, 0.0)), self.data)


def test_what_a_client_turns_out_to_lack_is_sent_and_charged_once():
  config, payload, log, transport, members, exchange = make_exchange()
  plan = stages.make_plans(config)[0]
  required = stages.required_components(plan, payload.head_names)
  uploaded = stages.uploaded_components(plan, payload.head_names)
  whole = {name: np.full(size // 4, 0.5, np.float32) for name, size in payload.sizes_bytes.items()}
  held = {name: components.digest(components.to_bytes(whole[name])) for name in required}
  node = Forgetful({name: bytes(payload.sizes_bytes[name]) for name in uploaded})
  transport.clients[7], members.connected = node, {1: Connected(7, 9, dict(held))}
  trained, traffic = exchange.run(Task('r', {}, 0, 0, 0, {}), plan, whole, [1], 5)
  assert list(trained) == [1] and node.requests == [set(), set(required)] and log == []
  assert traffic.download_bytes.sum() == sum(payload.sizes_bytes[name] for name in required)


def test_a_silent_client_is_lost_pays_its_download_and_is_greeted_again():
  config, payload, log, transport, members, exchange = make_exchange()
  plan = stages.make_plans(config)[0]
  whole = {name: np.zeros(size // 4, np.float32) for name, size in payload.sizes_bytes.items()}
  transport.clients[7] = Answering(messages.pack(Member(1, 9, {})))
  transport.lose = lambda client, request: True
  members.connected = {1: Connected(7, 9, {})}
  trained, traffic = exchange.run(Task('r', {}, 0, 0, 0, {}), plan, whole, [1], 5)
  assert trained == {} and log == ['round 1: no update of clients [1]'] and members.connected == {}
  required = stages.required_components(plan, payload.head_names)
  assert traffic.download_bytes.sum() == sum(payload.sizes_bytes[name] for name in required)
  transport.lose = lambda client, request: False
  members.gather(1)
  assert set(members.connected) == {1}
