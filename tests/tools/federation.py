"""Kills every part of a federation of four nodes once, and compares its end with the simulation of the same clients.

    python -m tests.tools.federation --folder=runs/kills

Eight rounds in two stages over loopback, with TLS and node authentication:

  rounds 1 to 4   nodes 0 to 2; the SuperLink and the ServerApp are killed in round 3, node 1 with its worker in round 4
  rounds 5 to 8   node 3 joins; the ServerApp alone is killed in round 7

Whoever is killed gets SIGKILL and is started again. Exit code 1 if parameters differ from the simulation's, or if a
byte is charged that the account of the same participants does not charge. Needs flwr, openssl and ssh-keygen.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import numpy as np

from lwfedssl_jax import config as configs
from lwfedssl_jax import stages
from lwfedssl_jax.federated import sampling
from lwfedssl_jax.resources import accounting, communication
from lwfedssl_jax.training import train

ROOT = pathlib.Path(__file__).parents[2]
NODES, FIRST_NODES, ROUNDS = 4, 3, 8
VALUES = {
  'dataset': 'digits',
  'image_size': 16,
  'encoder': 'vit_micro',
  'method': 'lw_fedssl',
  'max_train_images': 320,
  'num_clients': NODES,
  'batch_size': 32,
  'client_chunk': 1,
  'rounds_per_stage': ROUNDS // 2,
  'blocks_per_stage': 2,
  'local_epochs': 1,
  'calibration_epochs': 1,
  'blur_probability': (0.0, 0.0),
  'knn_bank_images': 100,
  'knn_test_images': 50,
}
WAIT_SECONDS = 900


def to_flags(values):
  """Returns command line flags."""
  text = {name: ','.join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
  return [f'--{name}={value}' for name, value in text.items()]


def free_port():
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


def processes_below(pid):
  """Returns {pid: command line} of a process and all that descend from it."""
  table = subprocess.run(['ps', '-e', '-o', 'pid=,ppid=,args='], capture_output=True, text=True, check=True).stdout
  rows = [line.split(None, 2) for line in table.splitlines()]
  commands, children = {int(row[0]): row[2] for row in rows}, collections.defaultdict(list)
  for child, parent, _ in rows:
    children[int(parent)].append(int(child))
  found, waiting = {}, [pid]
  while waiting:
    each = waiting.pop()
    found[each] = commands.get(each, '')
    waiting += children[each]
  return found


def kill(pids):
  for pid in pids:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)


class Federation:
  """The processes of a federation on this machine, and the largest resident memory that was seen of each program."""

  def __init__(self, folder):
    self.folder, self.port = folder, free_port()
    self.ports = [free_port() for _ in range(NODES)]
    self.nodes, self.server, self.peak_mb = {}, None, collections.Counter()
    names = [f'node{i}' for i in range(NODES)]
    subprocess.run([ROOT / 'examples/flower/certificates.sh', folder / 'secrets', '127.0.0.1', *names], check=True)

  def _start(self, module, name, *arguments):
    with open(self.folder / f'{name}.log', 'ab') as log:
      command = [sys.executable, '-m', f'experiments.{module}', *arguments]
      return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)

  def start_node(self, i):
    secrets = self.folder / 'secrets'
    self.nodes[i] = self._start(
      'node',
      f'node{i}',
      f'--superlink=127.0.0.1:{self.port}',
      f'--ca_certificate={secrets / "ca.crt"}',
      f'--private_key={secrets / f"node{i}.key"}',
      f'--client_id={i}',
      '--part_of=digits',
      f'--state_dir={self.folder / f"node{i}"}',
      f'--local_port={self.ports[i]}',
    )

  def start_server(self, *arguments):
    secrets = self.folder / 'secrets'
    files = {'ca_certificate': 'ca.crt', 'certificate': 'server.pem', 'private_key': 'server.key', 'node_keys': 'keys'}
    self.server = self._start(
      'server',
      'server',
      *to_flags(VALUES | {'workdir': self.folder / 'real', 'port': self.port, 'min_clients': FIRST_NODES}),
      *to_flags({flag: secrets / file for flag, file in files.items()}),
      *arguments,
    )

  def rows(self):
    path = self.folder / 'real' / 'metrics.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def wait(self, what, condition):
    """Waits for a condition, and notes memory meanwhile."""
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
      if time.monotonic() > end or (what != 'the end' and self.server.poll() is not None):
        raise SystemExit(f'waited for {what} in vain, see {self.folder}/server.log')
      self._note_memory()
      time.sleep(0.3)
    print(f'{time.strftime("%H:%M:%S")} {what}', flush=True)

  def wait_in_round(self, round_num, node):
    """Waits until a node handles a message of a round, 1-based."""
    self.wait(f'round {round_num - 1} done', lambda: len(self.rows()) >= round_num - 1)
    self.wait(f'in round {round_num}', lambda: any('flwr-clientapp' in text for text in self._below(node).values()))

  def _below(self, node):
    found = processes_below(self.nodes[node].pid)
    path = self.folder / f'node{node}' / 'worker.pid'
    return found | ({int(path.read_text()): 'worker'} if path.exists() else {})

  def _note_memory(self):
    for node in self.nodes:
      for pid, text in self._below(node).items():
        program = re.search(r'worker|flwr-clientapp|flower-supernode|flower-superexec|experiments\.node', text)
        with contextlib.suppress(OSError, AttributeError):  # it has ended, or is none of ours
          status = pathlib.Path(f'/proc/{pid}/status').read_text()
          peak = int(re.search(r'VmHWM:\s+(\d+)', status).group(1)) / 1000
          self.peak_mb[program.group()] = max(self.peak_mb[program.group()], round(peak))

  def kill_node(self, node):
    kill(self._below(node))

  def kill_server(self, only=''):
    """Kills the server's processes, or those with a text in their command line."""
    kill(pid for pid, text in processes_below(self.server.pid).items() if only in text)
    self.wait('the server is gone', lambda: True)
    self.server.wait(120)

  def stop(self):
    for process in (*self.nodes.values(), self.server):
      if process is not None:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def run_with_kills(federation):
  """Runs the federation of the module's docstring."""
  federation.start_server('--round_timeout_seconds=600')
  for i in range(FIRST_NODES):
    federation.start_node(i)
  federation.wait_in_round(3, 0)
  print('kill the SuperLink and the ServerApp', flush=True)
  federation.kill_server()
  federation.start_server('--resume', '--round_timeout_seconds=120', '--hello_timeout_seconds=15')
  federation.wait_in_round(4, 1)
  print('kill node 1', flush=True)
  federation.kill_node(1)
  federation.start_node(1)
  federation.wait('round 4 done', lambda: len(federation.rows()) >= 4)
  federation.start_node(3)
  federation.wait_in_round(7, 3)
  print('kill the ServerApp', flush=True)
  federation.kill_server('flwr-serverapp')
  federation.start_server('--resume', '--round_timeout_seconds=600')
  federation.wait('the end', lambda: federation.server.poll() is not None)


def simulate(folder, rows):
  """Simulates the clients that took part: one that was not there, or was lost, returns nothing. Returns its rows."""
  returned = np.zeros((ROUNDS, NODES), bool)
  for i, row in enumerate(rows):
    for client, num_bytes in zip(row['client_ids'], row['client_upload_bytes']):
      returned[i, client] = num_bytes > 0
  participation = sampling.Participation(np.tile(np.arange(NODES), (ROUNDS, 1)), returned)
  config = configs.configure(**VALUES, workdir=str(folder / 'simulated'))
  with mock.patch.object(sampling, 'plan_participation', return_value=participation):
    summary = train.train(config)
  return summary, [json.loads(line) for line in (folder / 'simulated' / 'metrics.jsonl').read_text().splitlines()]


def account(rows):
  """Returns the bytes of each round that participants of these rows are to be charged: (download, upload)."""
  config, charges = configs.configure(**VALUES), []
  payload = communication.make_payload(config, config.model.image_size)
  ledger = accounting.start_ledger(payload, NODES)
  plans = [plan for plan in stages.make_plans(config) for _ in range(plan.num_rounds)]
  for plan, row in zip(plans, rows):
    returned = [num_bytes > 0 for num_bytes in row['client_upload_bytes']]
    ledger, traffic = accounting.charge_round(ledger, payload, plan, row['client_ids'], returned)
    charges.append((traffic.download_bytes.sum(axis=1), traffic.upload_bytes.sum(axis=1)))
  return charges


def training_seconds(folder):
  """Returns {round, 1-based: seconds of the slowest worker}, of the messages that the workers' logs still have."""
  slowest = collections.Counter()
  for path in folder.glob('node*/worker.log'):
    for round_num, seconds in re.findall(r'update of round (\d+): ([0-9.]+) s', path.read_text()):
      slowest[int(round_num)] = max(slowest[int(round_num)], float(seconds))
  return slowest


def report(folder, rows, simulated):
  """Prints a line a round."""
  trained, log = training_seconds(folder), (folder / 'server.log').read_text()
  parts = dict(re.findall(r'round (\d+): clients took ([0-9.]+ s, aggregation and calibration [0-9.]+) s', log))
  print(
    '\nround  clients       lost  downloaded  uploaded    seconds (training; waiting for clients, server)  simulated'
  )
  for number, (row, other) in enumerate(zip(rows, simulated), 1):
    lost = [client for client, num_bytes in zip(row['client_ids'], row['client_upload_bytes']) if not num_bytes]
    took = re.findall('[0-9.]+', parts.get(str(number), ''))
    print(
      f'{number:5}  {row["client_ids"]!s:13} {lost or ""!s:4} {row["total_download_bytes"]:11,} '
      f'{row["total_upload_bytes"]:11,}  {row["seconds"]:6.1f} ({trained[number]:.1f}; {", ".join(took)})  '
      f'{other["seconds"]:.1f}'
    )


def check(rows, summary, simulated):
  """Returns what is wrong, one text each."""
  wrong = []
  if summary['params_sha256'] != simulated['params_sha256']:
    wrong.append('parameters are not those of the simulation')
  for number, (row, (down, up)) in enumerate(zip(rows, account(rows)), 1):
    if (np.array(row['client_upload_bytes']) != up).any() or (np.array(row['client_download_bytes']) > down).any():
      wrong.append(f'round {number}: charged {row["client_download_bytes"]} down, {row["client_upload_bytes"]} up')
  if any(3 in row['client_ids'] for row in rows[:4]) or 3 not in rows[7]['client_ids']:
    wrong.append('node 3 did not join in the second stage')
  if all(row['client_upload_bytes'].count(0) == 0 for row in rows):
    wrong.append('no round lost a client')
  return wrong


def main():
  """Runs the federation and the simulation."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--folder', default='runs/kills')
  folder = pathlib.Path(parser.parse_args().folder).absolute()
  folder.mkdir(parents=True)
  federation, begin = Federation(folder), time.monotonic()
  try:
    run_with_kills(federation)
  finally:
    federation.stop()
  seconds, rows = time.monotonic() - begin, federation.rows()
  summary_path = folder / 'real' / 'summary.json'
  if not summary_path.exists():
    raise SystemExit(f'the federation did not finish, see {folder}/server.log')
  summary = json.loads(summary_path.read_text())
  simulated, simulated_rows = simulate(folder, rows)
  report(folder, rows, simulated_rows)
  wrong = check(rows, summary, simulated)
  result = {'equal_parameters': summary['params_sha256'] == simulated['params_sha256'], 'wrong': wrong}
  print(json.dumps({**result, 'seconds': round(seconds), 'peak_mb': federation.peak_mb}))
  return 1 if wrong else 0


if __name__ == '__main__':
  sys.exit(main())
