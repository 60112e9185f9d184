"""Measures a client's memory from outside of its process, layer-wise and end to end, with and without a budget.

    python -m tests.tools.client_memory --folder=runs/memory --budgets_mb=0,260

The process is the worker of `lwfedssl-node` (deployment/worker.py), started again once its programs are compiled. It is
sent the last stage's first task several times. The baseline is its least resident memory between tasks: Python, jax,
the loaded programs, images and components. The peak is the kernel's high-water mark over the tasks. Linux only. Exit
code 1 if a round needs more than its budget.
"""

import argparse
import json
import os
import pathlib
import re
import sys
import time

import jax

from lwfedssl_jax import config as configs
from lwfedssl_jax import rng, stages
from lwfedssl_jax.deployment import components, messages, worker
from lwfedssl_jax.deployment.messages import Refused, Task
from lwfedssl_jax.deployment.node_options import NodeOptions
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.resources import communication

VALUES = {
  'dataset': 'digits',
  'image_size': 32,
  'encoder': 'vit_micro',
  'num_clients': 4,
  'batch_size': 128,
  'local_epochs': 1,
  'blur_probability': (0.0, 0.0),
}
ROUNDS = 5
# Buffers of a program go back to the system when it ends, so that those of the next round count.
ALLOCATOR = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '0', 'MALLOC_ARENA_MAX': '1'}


def make_task(config):
  """Returns a task of the last stage's first round, and the components that it takes."""
  plan = stages.make_plans(config)[-1]
  size = config.model.image_size
  params = make_model(config.model, config.objective, size).init_params(rng.key(0, rng.Stream.INIT))
  vectors = components.cut(jax.tree.map(jax.numpy.asarray, params))
  required = stages.required_components(plan, communication.make_payload(config, size).head_names)
  data = {name: components.to_bytes(vectors[name]) for name in required}
  digests = {name: components.digest(value) for name, value in data.items()}
  return Task('memory', messages.client_config(config), 0, plan.first_round, 0, digests), data


def status_mb(pid, name):
  """Returns a line of /proc/PID/status in megabytes (10^6 bytes)."""
  status = pathlib.Path(f'/proc/{pid}/status').read_text()
  return 1024 * int(re.search(rf'{name}:\s+(\d+)', status).group(1)) / 1e6


def measure(folder, method, budget_mb):
  """Returns the figures of a client with a memory budget (0: none), or why it refuses."""
  state = folder / f'{method}-{budget_mb:g}'
  options = NodeOptions(client_id=0, part_of='digits', state_dir=str(state), memory_budget_mb=budget_mb)
  worker.write_options(options)
  task, data = make_task(configs.configure(**VALUES, method=method))
  first = messages.unpack(worker.ask(options, messages.pack(task, data)))
  worker.stop(options)
  if isinstance(first, Refused):
    return {'refused': first.reason}
  idle, peaks = [], []
  for _ in range(1 + ROUNDS):
    reply = messages.unpack(worker.ask(options, messages.pack(task)))
    if isinstance(reply, Refused):
      raise SystemExit(f'{method}: {reply.reason}')
    pid = int((state / 'worker.pid').read_text())
    peaks.append(status_mb(pid, 'VmHWM'))
    time.sleep(1)
    idle.append(status_mb(pid, 'VmRSS'))
    pathlib.Path(f'/proc/{pid}/clear_refs').write_text('5')
  worker.stop(options)
  before, peak = min(idle), max(peaks[1:])
  log = (state / 'worker.log').read_text()
  plan = re.findall(r'memory plan: (.*?):', log)
  program = float(re.findall(r'a program of ([0-9.]+) MB', log)[-1])
  return {
    'plan': plan[-1] if plan else 'as configured',
    'program_mb': program,
    'baseline_mb': round(before, 1),
    'peak_mb': round(peak, 1),
    'round_mb': round(peak - before, 1),
  }


def main():
  """Measures and prints a line a case, JSON."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--folder', default='runs/memory')
  parser.add_argument('--budgets_mb', default='0,260', help='0: none')
  parser.add_argument('--methods', default='layerwise,end_to_end')
  options = parser.parse_args()
  os.environ.update(ALLOCATOR)
  folder, exceeded = pathlib.Path(options.folder).absolute(), False
  for budget_mb in map(float, options.budgets_mb.split(',')):
    for method in options.methods.split(','):
      figures = measure(folder, method, budget_mb)
      exceeded |= bool(budget_mb) and figures.get('round_mb', 0) > budget_mb
      print(json.dumps({'method': method, 'budget_mb': budget_mb, **figures}), flush=True)
  return int(exceeded)


if __name__ == '__main__':
  sys.exit(main())
