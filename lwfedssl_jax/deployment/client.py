"""A client without transport: a message in, a message out. Its state outlives the connection."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from lwfedssl_jax import config as configs
from lwfedssl_jax import stages
from lwfedssl_jax.base import Params
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import federated_dataset, sources
from lwfedssl_jax.data.partition import MIN_CLIENT_IMAGES
from lwfedssl_jax.deployment import components, messages
from lwfedssl_jax.deployment.local_training import LocalTraining
from lwfedssl_jax.deployment.messages import Envelope, Hello, Lacking, Member, MessageError, Refused, Task, Update
from lwfedssl_jax.deployment.node_options import NodeOptions
from lwfedssl_jax.deployment.store import Store
from lwfedssl_jax.errors import StorageError, UsageError
from lwfedssl_jax.federated import execution
from lwfedssl_jax.resources import communication, planner

# Of the memory budget, megabytes: copies of components, and what XLA's matrix products use besides a program's own
# figure. A round needed up to 26 more than its program, docs/federation.md.
RESERVE_MB = 48.0
MOST_SAMPLES = 10**8  # images of a round over all local epochs, of which a program holds the indices


class Client:
  """Answers a server's messages. Messages that are not valid change nothing and are refused in one line."""

  def __init__(self, options: NodeOptions):
    """Prepares a client; images are read once a server names their size.

    Raises:
      UsageError: an option is missing, or two exclude each other.
    """
    if bool(options.images) == bool(options.part_of):
      raise UsageError("--images: expected the client's images, or --part_of, a data set that is partitioned")
    if not options.state_dir:
      raise UsageError('--state_dir: expected a folder that the client may write')
    self._options = options
    self._store: tuple[Any, Store] | None = None
    self._prepare = functools.lru_cache(maxsize=1)(self._prepare_uncached)

  def handle(self, request: Envelope) -> Envelope:
    """Answers a message."""
    try:
      record = messages.unpack(request)
      if isinstance(record, Hello):
        messages.check_vectors(request.vectors, {})
        return messages.pack(self._greet(record))
      if isinstance(record, Task):
        return self._work(record, request.vectors)
      raise MessageError(f'kind: a client expects hello or task, got {type(record).__name__.lower()}')
    except (MessageError, UsageError, StorageError) as error:
      return messages.pack(Refused(messages.one_line(error)))

  def _greet(self, hello: Hello) -> Member:
    training, config = self._prepare_from(hello.config)
    store = self._open(hello.run, config)
    return Member(self._options.client_id, training.num_images, dict(store.held))

  def _work(self, task: Task, vectors: Mapping[str, bytes]) -> Envelope:
    if task.client_id != self._options.client_id:
      raise MessageError(f'client_id: expected {self._options.client_id}, got {task.client_id}')
    training, config = self._prepare_from(task.config)
    plan, sizes = _find_plan(config, task.round_num), _sizes(config)
    required = stages.required_components(plan, _head_names(config))
    if set(task.digests) != set(required):
      raise MessageError(f'digests: expected those of {", ".join(required)}')
    messages.check_vectors(vectors, {name: sizes[name] for name in required}, every=False)
    wrong = [name for name, data in vectors.items() if components.digest(data) != task.digests[name]]
    if wrong:
      raise MessageError(f'{wrong[0]}: its bytes have another digest')
    self._check_memory(training, plan)
    store = self._open(task.run, config)
    for name, data in vectors.items():
      store.put(name, data)
    lacking = tuple(name for name in required if store.held.get(name) != task.digests[name])
    if lacking:
      return messages.pack(Lacking(lacking))
    global_vectors = {name: components.from_bytes(store.get(name)) for name in required}
    params = components.paste(training.empty_params(), global_vectors)
    active, losses = self._train(training, store, params, plan, task)
    return messages.pack(
      Update(task.client_id, task.round_num, task.attempt, tuple(map(float, losses))),
      {name: components.to_bytes(vector) for name, vector in active.items()},
    )

  def _train(
    self, training: LocalTraining, store: Store, params: Params, plan: stages.StagePlan, task: Task
  ) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Trains from the state that the server names, and keeps the new one; a client that lost it starts without one."""
    like, state = training.trace_state(plan), None
    if like is not None:
      store.states.rewind(task.state_round)
      store.states.keep_since(task.oldest_round)
      state = store.states.load([task.client_id], plan.first_round, like)
    active, losses, state = training.train(params, plan, task.client_id, task.round_num, task.attempt, state)
    if like is not None:
      store.states.save(task.client_id, task.round_num + 1, state)
    return active, losses

  def _prepare_from(self, fields: dict[str, Any]) -> tuple[LocalTraining, Config]:
    return self._prepare(messages.read_config(fields))

  def _prepare_uncached(self, config: Config) -> tuple[LocalTraining, Config]:
    """Reads the images, fits the step into the memory budget; returns the training and the settings it follows."""
    options, size, client = self._options, config.model.image_size, config.client
    if not 1 <= size <= options.most_image_size:
      raise MessageError(f'image_size: expected 1 to {options.most_image_size} pixels (--most_image_size), got {size}')
    if options.client_id >= config.effective_num_clients:
      raise MessageError(f"num_clients: expected more than {options.client_id}, this client's number")
    images = self._load_images(config)
    if len(images) < MIN_CLIENT_IMAGES:
      raise UsageError(f'--images: expected at least {MIN_CLIENT_IMAGES} images, found {len(images)}')
    if client.local_epochs * max(len(images), client.batch_size) > MOST_SAMPLES:
      raise MessageError(f'local_epochs: expected at most {MOST_SAMPLES} images a round, got {client.local_epochs}')
    config = execution.resolve(config)
    if options.memory_budget_mb:
      plan = _fit(config, options.memory_budget_mb, images.nbytes / planner.MEGABYTE)
      config = plan.config
      print(planner.describe(plan), flush=True)
    else:
      config = configs.with_values(config, {'client_memory_budget_mb': 0.0})
    return LocalTraining(config, images), config

  def _load_images(self, config: Config) -> np.ndarray:
    options = self._options
    dataset = sources.load(
      options.images or options.part_of,
      data_dir=options.data_dir,
      cache_dir=options.cache_dir,
      image_size=config.model.image_size,
    )
    if options.images:
      return np.asarray(dataset.train_images)
    if config.partition.file or config.partition.has_client_folders:
      raise MessageError('partition: expected one that is drawn, of a client with --part_of')
    parts = federated_dataset.partition_dataset(dataset, config).client_images
    return np.asarray(dataset.train_images[parts[options.client_id]])

  def _check_memory(self, training: LocalTraining, plan: stages.StagePlan) -> None:
    budget = self._options.memory_budget_mb
    program = training.peak_bytes(plan) / planner.MEGABYTE
    needed = program + RESERVE_MB
    print(f'stage {plan.stage + 1}: a program of {program:.1f} MB', flush=True)
    if budget and needed > budget:
      raise UsageError(f'--memory_budget_mb: expected at least {needed:.1f} for stage {plan.stage + 1}, got {budget:g}')

  def _open(self, run: str, config: Config) -> Store:
    identity = run, _sizes(config)
    if self._store is None or self._store[0] != identity:
      self._store = identity, Store(self._options.state_dir, *identity)
    return self._store[1]


def _fit(config: Config, budget_mb: float, images_mb: float) -> planner.MemoryPlan:
  """Fits the step into what a client's budget leaves for it. Raises UsageError, of the client's own flag."""
  besides = images_mb + RESERVE_MB
  config = configs.with_values(config, {'client_memory_budget_mb': max(budget_mb - besides, 0.1)})
  try:
    return planner.fit(config, config.model.image_size)
  except UsageError as error:
    expected = str(error).partition(': ')[2]
    raise UsageError(f'--memory_budget_mb: {expected}, besides {besides:.1f} for images and copies') from error


def _sizes(config: Config) -> dict[str, int]:
  return communication.make_payload(config, config.model.image_size).sizes_bytes


def _head_names(config: Config) -> tuple[str, ...]:
  return communication.make_payload(config, config.model.image_size).head_names


def _find_plan(config: Config, round_num: int) -> stages.StagePlan:
  try:
    return stages.find_plan(stages.make_plans(config), round_num)
  except IndexError as error:
    raise MessageError(f'round_num: expected a round of the run, got {round_num}') from error
