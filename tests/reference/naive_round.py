"""One round of LW-FedSSL written as plainly as possible, to check the fast one against.

Straight from the paper's description (arXiv 2401.11647 v1-v3, Algorithm 1): Python loops over clients, epochs and
steps; a vision transformer of its own, applied block by block; every parameter that exists is differentiated end to
end and only then is the stage's choice applied to the gradients; batches hold their valid samples and nothing else;
AdamW, the losses, the order of images, the weighted mean and the server's calibration are written out. Everything is
float64.

Shared with the library: the names of the parameters, the numbers of the config, and the keys of random draws
(`rng.key`). The two views of a batch are those of naive_augment, unless `Setting.views_of` says otherwise.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import naive_augment
import numpy as np

from lwfedssl_jax import rng

ADAM_EPSILON = 1e-8


class NaiveResult(NamedTuple):
  params: Any  # as the library stacks them, NumPy float64
  client_losses: list[dict[str, float]]  # per client: total, objective, alignment
  client_mean: dict[str, float]  # over the clients that returned, weighted by their images
  divergence: float  # of the clients that returned, see mean_distance
  calibration: dict[str, float] | None


class Trained(NamedTuple):
  """What a stage trains on a client: block numbers, how many blocks exist, whether the embedding is trained."""

  blocks: tuple[int, ...]
  existing: int
  embedding: bool


class Setting(NamedTuple):
  """How a round is run: the run's configuration, Adam's epsilon, and what makes the views of a batch.

  `views_of` is (key, images (B, S, S, 3) uint8, augmentation strengths) -> views (2, B, S, S, 3) in [0, 1].
  """

  config: Any
  epsilon: float = ADAM_EPSILON
  views_of: Callable[..., Any] = naive_augment.two_views


def trained_in_stage(method: str, stage: int, depth: int, blocks_per_stage: int) -> Trained:
  """Reads the table of the paper's methods; `stage` is 0-based."""
  if method in ('end_to_end', 'centralized'):
    return Trained(tuple(range(depth)), depth, True)
  existing = (stage + 1) * blocks_per_stage
  if method == 'prog_fedssl':
    return Trained(tuple(range(existing)), existing, True)
  assert method in ('layerwise', 'lw_fedssl'), method
  return Trained(tuple(range(existing - blocks_per_stage, existing)), existing, stage == 0)


# The model. Each piece is compiled on its own, for speed only.


@functools.partial(jax.jit, static_argnames='patch')
def embed(p, images, patch):
  tokens, per_side = [], images.shape[1] // patch
  for row in range(per_side):
    for column in range(per_side):
      cut = images[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch, :]
      token = cut.reshape(images.shape[0], -1) @ p['patch']['kernel'] + p['patch']['bias']
      tokens.append(token + p['position'][len(tokens)])
  return jnp.stack(tokens, axis=1)


def layer_norm(p, x):
  mean = x.mean(-1, keepdims=True)
  variance = ((x - mean) ** 2).mean(-1, keepdims=True)
  return (x - mean) / jnp.sqrt(variance + 1e-6) * p['scale'] + p['bias']


def dense(p, x):
  return x @ p['kernel'] + p['bias']


@functools.partial(jax.jit, static_argnames='num_heads')
def block(p, x, num_heads):
  width = x.shape[-1]
  size = width // num_heads
  qkv = dense(p['attention']['qkv'], layer_norm(p['norm1'], x))
  query, key, value = qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]
  heads = []
  for head in range(num_heads):
    own = slice(head * size, (head + 1) * size)
    scores = query[..., own] @ key[..., own].transpose(0, 2, 1) / math.sqrt(size)
    weights = jnp.exp(scores)
    heads.append(weights / weights.sum(-1, keepdims=True) @ value[..., own])
  x = x + dense(p['attention']['projection'], jnp.concatenate(heads, -1))
  hidden = dense(p['mlp1'], layer_norm(p['norm2'], x))
  return x + dense(p['mlp2'], hidden * (1 + jax.lax.erf(hidden / math.sqrt(2))) / 2)


@jax.jit
def pool(p, x):
  return layer_norm(p, x).mean(axis=1)


@functools.partial(jax.jit, static_argnames='layers')
def head(p, x, layers):
  for layer in range(1, layers + 1):
    x = x @ p[f'linear{layer}']['kernel']
    x = (x - x.mean(0)) / jnp.sqrt(((x - x.mean(0)) ** 2).mean(0) + 1e-5)
    if layer < layers:
      x = jnp.maximum(0, x * p[f'norm{layer}']['scale'] + p[f'norm{layer}']['bias'])
  return x


@jax.jit
def head_without_last_norm(p, x):
  x = x @ p['linear1']['kernel']
  x = (x - x.mean(0)) / jnp.sqrt(((x - x.mean(0)) ** 2).mean(0) + 1e-5)
  return jnp.maximum(0, x * p['norm1']['scale'] + p['norm1']['bias']) @ p['linear2']['kernel']


def project(params, images, size, patch):
  """Projection of images in [0, 1]; `params['blocks']` is a list of the blocks that exist."""
  x = embed(params['embedding'], 2 * images - 1, patch)
  for p in params['blocks']:
    x = block(p, x, size.num_heads)
  return head(params['projector'], pool(params['norm'], x), 3)


# The losses, as plain softmax.


def cosines(x, y):
  x, y = (rows / jnp.sqrt((rows**2).sum(1, keepdims=True)) for rows in (x, y))
  return x @ y.T


@jax.jit
def info_nce(queries, keys, temperature):
  scores = jnp.exp(cosines(queries, keys) / temperature)
  return -jnp.log(jnp.diag(scores) / scores.sum(1)).mean()


@jax.jit
def nt_xent(z1, z2, temperature):
  rows = jnp.concatenate([z1, z2])
  scores = jnp.exp(cosines(rows, rows) / temperature)
  positives = jnp.exp(jnp.diag(cosines(z1, z2)) / temperature)
  others = scores.sum(1) - jnp.diag(scores)
  return -jnp.log(jnp.concatenate([positives, positives]) / others).mean()


@jax.jit
def one_minus_cosine(x, y):
  return 1 - jnp.diag(cosines(x, y)).mean()


def step_loss(params, target, received, views, config, alignment):
  """Total loss of one batch (and its two parts), as a function of all parameters that exist."""
  o, size, patch = config.objective, config.model.traits, config.model.patch_size
  z1, z2 = (project(params, view, size, patch) for view in views)
  if o.objective == 'simclr':
    main = nt_xent(z1, z2, o.temperature)
  elif o.objective == 'simsiam':
    p1, p2 = (head_without_last_norm(params['predictor'], z) for z in (z1, z2))
    one, two = (one_minus_cosine(p, jax.lax.stop_gradient(z)) - 1 for p, z in ((p1, z2), (p2, z1)))
    main = (one + two) / 2
  else:
    q1, q2 = head(params['predictor'], z1, 2), head(params['predictor'], z2, 2)
    k1, k2 = (project(target, view, size, patch) for view in views)
    if o.objective == 'moco_v3':
      main = info_nce(q1, k2, o.temperature) + info_nce(q2, k1, o.temperature)
    else:
      main = 2 * one_minus_cosine(q1, k2) + 2 * one_minus_cosine(q2, k1)
  aligned = 0.0
  if alignment:
    g1, g2 = (project(received, view, size, patch) for view in views)
    if alignment == 'contrastive':
      aligned = (info_nce(z1, g1, o.temperature) + info_nce(z2, g2, o.temperature)) / 2
    else:
      aligned = (one_minus_cosine(z1, g1) + one_minus_cosine(z2, g2)) / 2
  total = main + o.alignment_weight * aligned
  return total, {'total': total, 'objective': main, 'alignment': aligned}


# The optimizer, on a flat dictionary {('blocks', 2, 'mlp1', 'kernel'): array}.


def flatten(tree, path=()):
  if isinstance(tree, dict):
    items = tree.items()
  elif isinstance(tree, list):
    items = enumerate(tree)
  else:
    return {path: np.asarray(tree)}
  return {p: leaf for name, child in items for p, leaf in flatten(child, (*path, name)).items()}


def unflatten(flat):
  tree = {}
  for path, leaf in flat.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = leaf
  tree['blocks'] = [tree['blocks'][i] for i in sorted(tree['blocks'])]
  return tree


def is_trained(path, trained: Trained) -> bool:
  if path[0] == 'embedding':
    return trained.embedding
  return path[0] != 'blocks' or path[1] in trained.blocks


def learning_rate_factor(path, trained: Trained, decay: float) -> float:
  """decay ** (blocks below the newest trained block); the embedding lies below the lowest; 1 outside the encoder."""
  newest, lowest = max(trained.blocks), min(trained.blocks)
  if path[0] == 'blocks':
    return decay ** (newest - path[1])
  return decay ** (newest - lowest + 1) if path[0] == 'embedding' else 1.0


class AdamW:
  """arXiv 1711.05101 with decay of kernels only, for the parameters that are trained; all others stay as they are."""

  def __init__(self, learning_rate, weight_decay, block_decay, trained, epsilon):
    self.learning_rate, self.weight_decay, self.block_decay = learning_rate, weight_decay, block_decay
    self.trained, self.epsilon = trained, epsilon
    self.count, self.first, self.second = 0, {}, {}

  def step(self, params, gradients):
    self.count += 1
    new = {}
    for path, value in flatten(params).items():
      new[path] = value
      if not is_trained(path, self.trained):
        continue
      gradient = gradients[path]
      self.first[path] = 0.9 * self.first.get(path, 0) + 0.1 * gradient
      self.second[path] = 0.999 * self.second.get(path, 0) + 0.001 * gradient**2
      first = self.first[path] / (1 - 0.9**self.count)
      second = self.second[path] / (1 - 0.999**self.count)
      update = first / (np.sqrt(second) + self.epsilon)
      if path[-1] == 'kernel':
        update = update + self.weight_decay * value
      new[path] = value - self.learning_rate * learning_rate_factor(path, self.trained, self.block_decay) * update
    return unflatten(new)


def train(params, batches, optimizer, config, alignment):
  """Runs the steps of one client, or of the server, from a fresh target branch.

  Args:
    params: as received; `blocks` is the list of those that exist.
    batches: one array (2, valid samples, S, S, 3) a step.
    optimizer: a fresh AdamW.
    config: the run's.
    alignment: its kind, or None.

  Returns:
    The trained parameters, and the mean losses over the steps.
  """
  received, target, history = params, params, []
  for views in batches:
    gradients, losses = jax.grad(step_loss, has_aux=True)(
      params, target, received, jnp.asarray(views, jnp.float64), config, alignment
    )
    history.append({name: float(value) for name, value in losses.items()})
    params = optimizer.step(params, flatten(gradients))
    mu, online = config.objective.target_decay, flatten(params)
    target = unflatten({p: mu * old + (1 - mu) * online[p] for p, old in flatten(target).items()})
  return params, {name: float(np.mean([losses[name] for losses in history])) for name in history[0]}


def plan_steps(key, image_ids, num_images, epochs, batch_size):
  """Returns the images of every step, a list of lists: an order by random numbers for each epoch, cut into batches.

  A rest smaller than a batch is dropped; what is smaller than a batch altogether is a batch of its own. The draws are
  uniform numbers, one an image, under the key folded with the epoch; the smallest comes first.
  """
  steps = []
  for epoch in range(epochs):
    draws = np.asarray(jax.random.uniform(jax.random.fold_in(key, epoch), (num_images,)))
    shuffled = [int(image_ids[place]) for place in sorted(range(num_images), key=lambda place: draws[place])]
    if num_images < batch_size:
      steps.append(shuffled)
      continue
    while len(shuffled) >= batch_size:
      steps.append(shuffled[:batch_size])
      shuffled = shuffled[batch_size:]
  return steps


def make_batches(images, steps, batch_size, key, setting):
  """Views (2, n, S, S, 3) of the n images of each step, with the draws that a batch of `batch_size` images has."""
  batches = []
  for step, ids in enumerate(steps):
    padded = np.zeros((batch_size, *images.shape[1:]), np.uint8)
    padded[: len(ids)] = np.asarray(images)[ids]
    views = setting.views_of(jax.random.fold_in(key, step), padded, setting.config.augment)
    batches.append(np.asarray(views, np.float64)[:, : len(ids)])
  return batches


def keep_blocks(row, trained: Trained):
  """Returns the numbers of the blocks that a client keeps: all (`row` is None), or by the rules of depth dropout."""
  if row is None:
    return list(range(trained.existing))
  numbers = [int(number) for number in np.asarray(row)]
  if trained.embedding:  # the client trains all that it keeps
    return numbers
  return numbers[: min(trained.blocks)] + list(trained.blocks)  # fewer may exist than there is room for


def train_kept(params, trained, numbers, member, inputs, setting):
  """Trains a client on the blocks that it keeps; returns {path: value}, under their numbers, and its losses."""
  own = dict(params, blocks=[params['blocks'][number] for number in numbers])
  places = tuple(numbers.index(number) for number in trained.blocks if number in numbers)
  after, losses = train_client(own, Trained(places, len(numbers), trained.embedding), member, inputs, setting)
  return {
    ('blocks', numbers[path[1]], *path[2:]) if path[0] == 'blocks' else path: leaf
    for path, leaf in flatten(after).items()
  }, losses


def train_client(params, trained, member, inputs, setting):
  client_id, image_ids, num_images = int(member[0]), np.asarray(member[1]), int(member[2])
  config, client = setting.config, setting.config.client

  def own_key(stream):
    return rng.key(inputs.seed_key, stream, inputs.round_num, client_id)

  steps = plan_steps(own_key(rng.Stream.SHUFFLE), image_ids, num_images, client.local_epochs, client.batch_size)
  batches = make_batches(inputs.images, steps, client.batch_size, own_key(rng.Stream.AUGMENT), setting)
  optimizer = AdamW(
    client.learning_rate * client.batch_size / 256,
    client.weight_decay,
    client.block_learning_rate_decay,
    trained,
    setting.epsilon,
  )
  alignment = config.objective.alignment_kind if config.uses_alignment else None
  with jax.enable_x64(True):
    return train(params, batches, optimizer, config, alignment)


def calibrate(params, trained, inputs, setting):
  """The server trains everything that exists, end to end, on its own images; no alignment."""
  config, method, num_images = setting.config, setting.config.method, len(inputs.server_images)
  batch_size = min(method.calibration_batch_size or config.client.batch_size, num_images)

  def own_key(stream):
    return rng.key(inputs.seed_key, stream, inputs.round_num)

  steps = plan_steps(
    own_key(rng.Stream.CALIBRATION_SHUFFLE), range(num_images), num_images, method.calibration_epochs, batch_size
  )
  batches = make_batches(inputs.server_images, steps, batch_size, own_key(rng.Stream.CALIBRATION_AUGMENT), setting)
  everything = Trained(tuple(range(trained.existing)), trained.existing, True)
  base = method.calibration_learning_rate or config.client.learning_rate
  optimizer = AdamW(
    base * batch_size / 256,
    config.client.weight_decay,
    config.client.block_learning_rate_decay,
    everything,
    setting.epsilon,
  )
  with jax.enable_x64(True):
    return train(params, batches, optimizer, config, None)


def mean_distance(clients, weights, trained: Trained):
  """Weighted root mean square distance of clients to their mean, relative to its norm, over what is trained."""
  rows = np.array(
    [np.concatenate([x.ravel() for path, x in flatten(c).items() if is_trained(path, trained)]) for c in clients]
  )
  weights = np.array(weights)
  mean = weights @ rows
  return np.sqrt(weights @ np.square(rows - mean).sum(axis=1)) / np.linalg.norm(mean)


def naive_round(setting: Setting, params, stage: int, inputs) -> NaiveResult:
  """Runs one round.

  Args:
    setting: the run's configuration, Adam's epsilon, and the views.
    params: as the library keeps them (blocks stacked).
    stage: 0-based.
    inputs: the library's RoundInputs.
  """
  config, size = setting.config, setting.config.model.traits
  trained = trained_in_stage(config.method.method, stage, size.depth, config.method.blocks_per_stage)

  def to_float64(leaf):
    return np.asarray(leaf, np.float64)

  per_block = [jax.tree.map(lambda leaf, i=i: to_float64(leaf)[i], params['blocks']) for i in range(size.depth)]
  existing = jax.tree.map(to_float64, {k: v for k, v in params.items() if k != 'blocks'})
  existing['blocks'] = per_block[: trained.existing]

  kept = inputs.clients.kept
  numbers = [keep_blocks(row, trained) for row in ([None] * len(inputs.clients.client_ids) if kept is None else kept)]
  results = [
    train_kept(existing, trained, own, member, inputs, setting)
    for own, member in zip(numbers, zip(*inputs.clients[:3]))
  ]
  client_losses = [losses for _, losses in results]
  back = [i for i, returned in enumerate(np.asarray(inputs.clients.returned)) if returned]
  sizes = np.asarray(inputs.clients.num_images, np.float64)

  def mean(values, members=back):
    return sum(sizes[i] / sum(sizes[j] for j in members) * values[i] for i in members)

  flat = [client_params for client_params, _ in results]
  received, aggregated = flatten(existing), {}
  for path, value in received.items():
    trainers = [i for i in back if path in flat[i]]
    aggregated[path] = mean({i: flat[i][path] for i in trainers}, trainers) if trainers else value
  aggregated = unflatten(aggregated)
  models = [unflatten(received | flat[i]) for i in back]  # what a client does not keep is as it received it
  divergence = mean_distance(models, [sizes[i] / sum(sizes[j] for j in back) for i in back], trained)
  client_mean = {name: mean([losses[name] for losses in client_losses]) for name in client_losses[0]}

  calibration = None
  if config.uses_calibration:
    aggregated, calibration = calibrate(aggregated, trained, inputs, setting)
  blocks = aggregated['blocks'] + per_block[trained.existing :]
  result = dict(aggregated, blocks=jax.tree.map(lambda *leaves: np.stack(leaves), *blocks))
  return NaiveResult(result, client_losses, client_mean, divergence, calibration)
