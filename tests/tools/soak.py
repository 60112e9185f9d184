"""Kills a run at random moments, again and again, resumes it each time, and compares the end with an undisturbed run.

    python -m tests.tools.soak --kills=40 --folder=runs/soak
    python -m tests.tools.soak --kills=40 -- --objective=byol --client_update=fedema     # flags of the run

Prints when each kill fell and one JSON line last; exit code 1 if anything differs.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from lwfedssl_jax.workdir import metrics_writer
from tests.tiny import PLAIN_VIEWS

RUN = [
  '--dataset=digits',
  '--image_size=16',
  '--encoder=vit_micro',
  '--num_clients=3',
  '--max_train_images=300',
  '--auxiliary_fraction=0.2',
  '--batch_size=16',
  '--rounds_per_stage=4',
  '--blocks_per_stage=2',
  '--local_epochs=2',
  '--learning_rate=5e-3',
  '--temperature=0.2',
  *PLAIN_VIEWS,
  '--method=lw_fedssl',
  '--knn_bank_images=300',
  '--knn_test_images=100',
]


def start(workdir, flags=()):
  command = [sys.executable, '-m', 'experiments.pretrain', *RUN, *flags, f'--workdir={workdir}', '--resume']
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
  output, _ = process.communicate()
  if process.returncode:
    raise SystemExit(f'a run failed with code {process.returncode}:\n{output[-3000:]}')
  return output


def read_rows(workdir):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{key: value for key, value in row.items() if key not in metrics_writer.WALL_CLOCK} for row in rows]


def moment(workdir):
  """Says what the run was doing, by what it had written."""
  if not (workdir / 'config.json').exists():
    return 'before the run was written'
  checkpoints = workdir / 'checkpoints'
  steps = list(checkpoints.iterdir()) if checkpoints.exists() else []
  if any('tmp' in path.name for path in steps):
    return 'while a checkpoint was written'
  rows = (workdir / 'metrics.jsonl').read_text().count('\n') if (workdir / 'metrics.jsonl').exists() else 0
  saved = max((int(path.name) for path in steps if path.name.isdigit()), default=0)
  return 'between a row and its checkpoint' if rows > saved else 'start, compiling, in a round or evaluating'


def kill_until_done(workdir, kills, longest, generator, flags=()):
  """Kills a run that is alive `kills` times after random delays; every other one is aimed at what follows a round."""
  moments, tries = collections.Counter(), 0
  while moments.total() < kills:
    process, tries = start(workdir, flags), tries + 1
    if tries % 2 == 1:
      for line in process.stdout:  # wait for a round, then strike within a fraction of the next
        if line.startswith('round '):
          break
      time.sleep(generator.uniform(0, 0.4))
    else:
      time.sleep(generator.uniform(0.2, longest))
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)
      process.wait()
      where = moment(workdir)
      moments[where] += 1
      print(f'kill {moments.total()} of {kills}: {where}', flush=True)
    process.stdout.close()
    if (workdir / 'summary.json').exists() and moments.total() < kills:
      finished = workdir.with_name(f'{workdir.name}-{tries}')
      os.rename(workdir, finished)  # the next kills start anew
      compare(finished, workdir.with_name('undisturbed'))
  finish(start(workdir, flags))
  return moments


def compare(workdir, reference):
  """Raises SystemExit unless the disturbed run ended as the undisturbed one."""
  summary, expected = (json.loads((path / 'summary.json').read_text()) for path in (workdir, reference))
  if summary['params_sha256'] != expected['params_sha256']:
    raise SystemExit(f'{workdir}: other parameters than {reference}')
  if read_rows(workdir) != read_rows(reference):
    raise SystemExit(f'{workdir}: other rows than {reference}')
  left = [str(path) for path in workdir.rglob('*') if '.tmp' in path.name or 'checkpoint-tmp' in path.name]
  if left:
    raise SystemExit(f'half-written files: {left}')


def main():
  """Runs the soak."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=40)
  parser.add_argument('--longest', type=float, default=20.0, help='seconds before a blind kill, at most')
  parser.add_argument('--folder', default='runs/soak')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('flags', nargs='*', help='more flags of the run, after --')
  options = parser.parse_args()
  folder = pathlib.Path(options.folder)
  folder.mkdir(parents=True)
  begin = time.time()
  finish(start(folder / 'undisturbed', options.flags))
  moments = kill_until_done(
    folder / 'killed', options.kills, options.longest, random.Random(options.seed), options.flags
  )
  compare(folder / 'killed', folder / 'undisturbed')
  print(
    json.dumps(
      {
        'kills': options.kills,
        'identical': True,
        'moments': moments,
        'rounds': len(read_rows(folder / 'killed')),
        'seconds': round(time.time() - begin),
      }
    )
  )


if __name__ == '__main__':
  main()
