"""The clients of runs: images, rounds, losses, bytes, rejected updates."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from lwfedssl_jax.data import partition_file
from lwfedssl_jax.plots.charts import Axes, Series
from lwfedssl_jax.report import curves
from lwfedssl_jax.report.items import Folded, Section, Table
from lwfedssl_jax.report.runs import FinishedRun, Group
from lwfedssl_jax.workdir import run_dir

SHOWN_CLIENTS = 20  # tables of more are folded
_HEADINGS = ['client', 'images', 'rounds', 'returned', 'rejected', 'last loss', 'down, MB', 'up, MB']


def _num_images(run: FinishedRun) -> list[int] | None:
  path = os.path.join(run.workdir, partition_file.NAME)
  return [len(ids) for ids in run_dir.read_json(path)['clients']] if os.path.exists(path) else None


def _client_rows(run: FinishedRun) -> dict[int, list[dict[str, Any]]]:
  """Returns {client: one entry per round}, by client; empty if rows have no clients."""
  found: dict[int, list[dict[str, Any]]] = {}
  for row in run.rows:
    for place, client in enumerate(row.get('client_ids', ())):
      rejected = client in row['rejected_clients']
      loss = row['client_losses'][place]
      found.setdefault(client, []).append(
        {
          'loss': loss,
          'rejected': rejected,
          'returned': rejected or loss is not None,
          'down': row['client_download_bytes'][place],
          'up': row['client_upload_bytes'][place],
        }
      )
  return dict(sorted(found.items()))


def _table(group: Group) -> Table | Folded | None:
  run = group.runs[0]
  clients, images = _client_rows(run), _num_images(run)
  if not clients:
    return None
  rows = [_HEADINGS]
  for client, seen in clients.items():
    losses = [entry['loss'] for entry in seen if entry['loss'] is not None]

    def total(name, seen=seen):
      return sum(entry[name] for entry in seen)

    rows.append(
      [
        str(client),
        '-' if images is None else str(images[client]),
        str(len(seen)),
        str(total('returned')),
        str(total('rejected')),
        f'{losses[-1]:.3f}' if losses else '-',
        f'{total("down") / 1e6:.1f}',
        f'{total("up") / 1e6:.1f}',
      ]
    )
  caption = f'{group.name}, seed {run.config.run.seed}'
  table = Table(caption, rows)
  return table if len(clients) <= SHOWN_CLIENTS else Folded(f'{caption}: {len(clients)} clients', table)


def _losses(group: Group, style: int) -> Series | None:
  """Returns the unweighted mean of the clients' losses in each round, with minimum and maximum as the band."""
  found = [
    (row['round'] + 1, losses)
    for row in group.runs[0].rows
    if (losses := [loss for loss in row.get('client_losses', ()) if loss is not None])
  ]
  if not found:
    return None
  return Series(
    group.name,
    [round_num for round_num, _ in found],
    [float(np.mean(losses)) for _, losses in found],
    [min(losses) for _, losses in found],
    [max(losses) for _, losses in found],
    style,
  )


def clients_section(groups: Sequence[Group]) -> Section | None:
  """Returns a row per client of each group's first run; None if the runs did not record clients."""
  tables = [found for group in groups if (found := _table(group))]
  if not tables:
    return None
  chart = curves.line(
    'client_losses',
    'Mean loss of the clients in each round; the band spans minimum and maximum over clients.',
    [_losses(group, place) for place, group in enumerate(groups)],
    Axes('round', 'loss of a client'),
  )
  text = (
    'Rounds: in which the client was sampled. Rejected: its update was not finite or its loss diverged, so the '
    'server did not aggregate it.'
  )
  if any(len(group.runs) > 1 for group in groups):
    text += ' First seed of each method.'
  return Section('Clients', text, [*([chart] if chart else []), *tables])
