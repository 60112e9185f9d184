"""Run by test_devices.py in a process with four forced host devices; prints one line of JSON.

The same round on one device and on four, with the images on every device and streamed to each its own.
"""

import json
import sys

import jax
import numpy as np

from lwfedssl_jax import catalog, devices, objectives, rng, stages
from lwfedssl_jax import config as configs
from lwfedssl_jax.data import federated_dataset, sources
from lwfedssl_jax.evaluation.embeddings import make_embedder
from lwfedssl_jax.federated import client_state, round_loader, sampling, server_optimizer
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.federated.placement import input_specs
from lwfedssl_jax.federated.round_loader import RoundLoader
from lwfedssl_jax.federated.round_types import RoundInputs
from lwfedssl_jax.resources import collectives
from tests import tiny

VALUES = {
  'dataset': 'digits',
  'image_size': 8,
  'patch_size': 4,
  'num_clients': 9,
  'clients_per_round': 6,
  'batch_size': 4,
  'max_train_images': 160,
  'client_size_sigma': 0.7,
  'auxiliary_fraction': 0.1,
  'local_epochs': 2,
  'client_dropout': 0.2,
  'learning_rate': 0.05,
  'temperature': 0.5,
  'client_chunk': 2,
  'calibration_epochs': 1,
  'calibration_batch_size': 8,
}  # batch normalization over few samples amplifies rounding


def _shrink():
  """As the fixture tiny_library, with an optimizer that does not amplify rounding."""
  catalog.ENCODERS['vit_micro'] = catalog.VitTraits(width=8, depth=2, num_heads=2, mlp_ratio=2)
  objectives.HEAD_HIDDEN, objectives.PROJECTION_SIZE = 12, 8


def _draw_states(config, model, plan, client_ids):
  """Returns what the clients of the slots keep, as if each had trained before, from its number alone."""

  def draw(leaf):
    return np.stack([0.1 + 0.01 * np.random.default_rng(max(i, 0)).random(leaf.shape, np.float32) for i in client_ids])

  return jax.tree.map(draw, client_state.trace(config, model, plan.shape))


def _run(values, num_devices, budget_mb):
  """Two rounds of a stage; returns parameters and losses after each, who was accepted at last, and collectives."""
  config = configs.configure(**VALUES, **values, num_devices=num_devices, device_data_budget_mb=budget_mb)
  dataset = sources.load('digits', image_size=8)
  data = federated_dataset.partition_dataset(dataset, config)
  plan = stages.make_plans(config)[-1]
  participation = sampling.plan_participation(
    0, 4, config.effective_num_clients, config.effective_clients_per_round, 0.2
  )
  placement = round_loader.choose_placement(config, data, participation)
  made, model = tiny.make_round(config, placement=placement), make_model(config.model, config.objective, 8)
  whole = devices.sharding(placement.mesh)
  params = jax.jit(lambda: model.init_params(rng.key(0, rng.Stream.INIT)), out_shardings=whole)()
  seed_key = jax.jit(lambda: jax.random.key(0), out_shardings=whole)()
  server_images = devices.put(data.server_images, whole)
  embed = make_embedder(model.encoder, placement.mesh, batch_size=64)
  embeddings = embed(jax.tree.map(np.array, params), dataset.test_images[:50], 2)  # of the same weights in every case
  source = RoundLoader(config, data, participation, placement)
  first_moments = server_optimizer.init_state(config.method, model, plan.shape)
  server_state = jax.tree.map(lambda leaf: devices.put(leaf, whole), first_moments)
  by_client = devices.sharding(placement.mesh, input_specs(placement).clients.returned)
  after = []
  for round_num in range(2):
    batch = source.load(round_num)
    states = _draw_states(config, model, plan, batch.client_ids)
    inputs = RoundInputs(
      seed_key,
      np.int32(round_num),
      batch.images,
      batch.clients._replace(state=jax.tree.map(lambda leaf: devices.put(leaf, by_client), states)),
      server_images,
      np.float32(np.inf),
      server_state=server_state,
    )
    if round_num == 0:
      compiled = made.lower(params, plan, inputs).compile()
    params, metrics = compiled(params, np.int32(plan.start), np.int32(plan.stop), inputs)
    after.append(
      {
        'params': [np.array(devices.fetch(leaf)) for leaf in jax.tree.leaves(params)],
        'states': _sort_states(batch.client_ids, metrics),
        'loss': float(metrics.client.total),
        'divergence': float(metrics.divergence),
        'calibration': None if metrics.calibration is None else float(metrics.calibration.total),
      }
    )
  source.close()
  accepted = np.sort(batch.client_ids[devices.fetch(metrics.accepted)]).tolist()
  active = stages.split(params, plan.shape, plan.start).active
  return {
    'after': after,
    'accepted': accepted,
    'embeddings': embeddings,
    'collectives': collectives.read_collectives(compiled.as_text()),
    'active_bytes': sum(leaf.size * 4 for leaf in jax.tree.leaves(active)),
    'streams': placement.streams,
    'images': batch.images.shape[0],
  }


def _sort_states(client_ids, metrics):
  """Returns what the server, and each accepted client by its number, keep after a round: one vector each."""
  kept = [np.concatenate([np.ravel(devices.fetch(leaf)) for leaf in jax.tree.leaves(metrics.server_state)] or [[]])]
  leaves = [devices.fetch(leaf) for leaf in jax.tree.leaves(metrics.client_states)]
  accepted = np.flatnonzero(devices.fetch(metrics.accepted)) if leaves else []
  for slot in sorted(accepted, key=lambda slot: client_ids[slot]):
    kept.append(np.concatenate([np.ravel(leaf[slot]) for leaf in leaves]))
  return kept


def _difference(one, other, round_num):
  pairs = zip(one['after'][round_num]['params'], other['after'][round_num]['params'], strict=True)
  return max(float(np.abs(a - b).max()) for a, b in pairs)


def main():
  """Prints what test_devices.py asserts."""
  _shrink()
  report = {'num_devices': jax.device_count()}
  for name, values, budget in (
    ('lw_fedssl', {'method': 'lw_fedssl'}, 0.1),  # all training images take 0.28 MB
    ('median', {'method': 'layerwise', 'objective': 'simclr', 'aggregation': 'median'}, 0.0),
    ('layerwise', {'method': 'layerwise', 'objective': 'simclr'}, 0.0),
    (
      'states',
      {'method': 'layerwise', 'objective': 'byol', 'client_update': 'fedema', 'server_optimizer': 'fedyogi'},
      0.0,
    ),
  ):
    one, four = _run(values, 1, 0.0), _run(values, 4, budget)
    streamed = _run(values, 1, budget) if budget else one
    report[name] = {
      'streams': [run['streams'] for run in (one, streamed, four)],
      'images': [run['images'] for run in (one, streamed, four)],
      'streaming_differs': _difference(one, streamed, 1),
      'devices_differ': _difference(one, four, 0),  # a second round amplifies what rounding has changed in the first
      'states': [len(run['after'][0]['states']) for run in (one, four)],
      'states_differ': max(
        float(np.abs(a - b).max(initial=0.0)) for a, b in zip(*(run['after'][0]['states'] for run in (one, four)))
      ),
      'moved': max(float(np.abs(leaf).max()) for leaf in one['after'][0]['params']),
      'embeddings_differ': float(np.abs(one['embeddings'] - four['embeddings']).max()),
      'loss': [run['after'][0]['loss'] for run in (one, four)],
      'divergence': [run['after'][0]['divergence'] for run in (one, four)],
      'calibration': [run['after'][0]['calibration'] for run in (one, four)],
      'accepted': [one['accepted'], four['accepted']],
      'bytes_per_round': [collectives.bytes_per_round(run['collectives']) for run in (one, four)],
      'in_loops': [sum(op.num_bytes for op in run['collectives'] if op.in_loop) for run in (one, four)],
      'active_bytes': one['active_bytes'],
    }
    if name == 'lw_fedssl':
      pieces = _run(values | {'calibration_micro_batch_size': 1}, 4, 0.0)  # a device has two images of a batch
      report[name]['pieces_differ'] = _difference(one, pieces, 0)
  print(json.dumps(report))
  return 0


if __name__ == '__main__':
  sys.exit(main())
