"""Tries Flower's SecAgg+ on the payload of a layer-wise round: clients in this process, Flower's mod and workflow.

    python -m tests.tools.secure_aggregation

A client is sent the active components of the quickstart preset's second stage, as one that holds the frozen part is,
and returns them with a difference of deviation 0.01. Prints bytes, seconds, and the errors against FedAvg in float64:
with all clients, and with one of five lost after it has shared its keys. Needs flwr.
"""

import json
import sys
import time
from types import SimpleNamespace

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.supercore.task_identity import TaskIdentity  # what a process that Flower starts has of it

from lwfedssl_jax import config as configs
from lwfedssl_jax import stages
from lwfedssl_jax.resources import communication

DEVIATION = 0.01


def make_vectors(generator):
  """Returns the active components of the second stage: float32 vectors of deviation 0.1."""
  config = configs.configure(dataset='digits', image_size=16, method='layerwise', num_clients=3)
  payload = communication.make_payload(config, 16)
  names = stages.uploaded_components(stages.make_plans(config)[1], payload.head_names)
  return [generator.normal(0, 0.1, payload.sizes_bytes[name] // 4).astype(np.float32) for name in names]


class Strategy(FedAvg):
  """Sends every client the same vectors; keeps the aggregate."""

  def __init__(self, nodes):
    super().__init__()
    self.nodes = nodes

  def configure_fit(self, server_round, parameters, client_manager):
    return [(SimpleNamespace(node_id=node), FitIns(parameters, {})) for node in self.nodes]


class Nodes:
  """Flower's grid as function calls: each node has the mod before its training; counts the bytes of contents."""

  def __init__(self, trained, lost):
    self.trained, self.lost = trained, lost
    self.contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in trained}
    self.sent = self.received = 0

  def send_and_receive(self, messages, timeout=None):
    del timeout
    replies = []
    for message in messages:
      self.sent += count_bytes(message.content)
      node = message.metadata.dst_node_id
      if node == self.lost and 'collect' in str(message.content.config_records):
        continue
      message.content = travel(message.content)  # the workflow shares contents, and the mod changes them
      reply = secaggplus_mod(message, self.contexts[node], self.train)
      self.received += count_bytes(reply.content)
      replies.append(reply)
    return replies

  def train(self, message, context):
    vectors, count = self.trained[context.node_id]
    result = FitRes(Status(Code.OK, ''), ndarrays_to_parameters(vectors), count, {})
    return Message(compat.fitres_to_recorddict(result, False), reply_to=message)


def travel(content):
  """Returns what arrives of a message's content."""
  return type(content).inflate(
    content.deflate(), {name: travel(child) for name, child in (content.children or {}).items()}
  )


def count_bytes(content):
  """Returns the bytes of all objects that Flower makes of a message's content."""
  return len(content.deflate()) + sum(map(count_bytes, (content.children or {}).values()))


def aggregate(num_nodes, lost=None):
  """Runs the protocol once and returns its figures."""
  generator = np.random.default_rng(0)
  vectors, counts = make_vectors(generator), generator.integers(50, 500, num_nodes).tolist()
  trained = {
    node: ([(v + generator.normal(0, DEVIATION, v.shape)).astype(np.float32) for v in vectors], count)
    for node, count in enumerate(counts, 1)
  }
  nodes, strategy = Nodes(trained, lost), Strategy(list(trained))
  context = LegacyContext(Context(1, 0, {}, RecordDict(), {}), strategy=strategy)
  context.state[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
  context.state[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(ndarrays_to_parameters(vectors), True)
  begin = time.monotonic()
  SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=0.5)(nodes, context)
  seconds = time.monotonic() - begin
  found = parameters_to_ndarrays(
    compat.arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], True)
  )
  returned = [value for node, value in trained.items() if node != lost]
  expected = [
    np.average([arrays[i].astype(np.float64) for arrays, _ in returned], axis=0, weights=[n for _, n in returned])
    for i in range(len(vectors))
  ]
  float32_bytes = num_nodes * sum(v.nbytes for v in vectors)
  return {
    'clients': num_nodes,
    'lost': int(lost is not None),
    'float32_mb': float32_bytes / 1e6,
    'sent_factor': round(nodes.sent / float32_bytes, 4),
    'received_factor': round(nodes.received / (float32_bytes * len(returned) / num_nodes), 4),
    'largest_error': float(max(np.abs(f - e).max() for f, e in zip(found, expected))),
    'rms_error': float(np.sqrt(np.mean([np.mean((f - e) ** 2) for f, e in zip(found, expected)]))),
    'seconds': round(seconds, 2),
  }


if __name__ == '__main__':
  TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
  for case in ((3, None), (5, None), (5, 2)):
    print(json.dumps(aggregate(*case)))
  sys.exit(0)
