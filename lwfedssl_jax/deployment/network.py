"""Real clients over a transport: the rounds of `training.simulation`, of those clients that are there."""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lwfedssl_jax import rng
from lwfedssl_jax.base import Params
from lwfedssl_jax.data import batching
from lwfedssl_jax.deployment import components, messages
from lwfedssl_jax.deployment.exchange import Exchange
from lwfedssl_jax.deployment.members import Members
from lwfedssl_jax.deployment.messages import Hello, Task
from lwfedssl_jax.deployment.server_options import ServerOptions
from lwfedssl_jax.deployment.server_step import ServerStep
from lwfedssl_jax.deployment.transport import Transport
from lwfedssl_jax.federated import sampling, scheduling
from lwfedssl_jax.stages import StagePlan
from lwfedssl_jax.training.round_runner import RoundResult
from lwfedssl_jax.training.setup import RunSetup
from lwfedssl_jax.workdir import metrics_writer


def _print(text: str) -> None:
  print(text, flush=True)


class Network:
  """Runs rounds on real clients; see RoundRunner."""

  def __init__(
    self, setup: RunSetup, transport: Transport, options: ServerOptions, log: Callable[[str], None] = _print
  ):
    config = setup.config
    self._setup, self._options, self._log = setup, options, log
    self._fields = messages.client_config(config)
    identity = json.dumps(self._fields, sort_keys=True).encode()
    self._run = hashlib.sha256(identity).hexdigest()[:32]
    self._order = sampling.plan_order(config.run.seed, setup.num_rounds, config.effective_num_clients)
    self._step = ServerStep(config, setup.data.image_size, setup.data.server_images)
    self._make_key = jax.jit(rng.attempt_key, static_argnums=1)
    self._picked, self._sizes = list[int](), np.zeros(0, np.int64)
    hello = messages.pack(Hello(self._run, self._fields))
    self._members = Members(transport, options, hello, setup.payload, config.effective_num_clients, log)
    self._exchange = Exchange(transport, self._members, setup.payload, log)

    self.server_state: Any = None
    self._oldest = 0

  def resume(self, rounds_done: int, server_state: Any) -> None:
    """Takes over the server's state, and which of its states a client takes up; clients say what they hold."""
    self.server_state = server_state
    for row in metrics_writer.read_metrics(self._setup.config.run.workdir)[:rounds_done]:
      plan = self._setup.find_plan(row['round'])
      back = [client for client, loss in zip(row['client_ids'], row['client_losses'], strict=True) if loss is not None]
      self._note_accepted(plan, row['round'], [client for client in back if client not in row['rejected_clients']])

  def _note_accepted(self, plan: StagePlan, round_num: int, clients: list[int]) -> None:
    """Notes whose training counts, and in a stage's first round forgets the stage before."""
    if not self._setup.config.uses_client_state:
      return
    if round_num == plan.first_round:
      self._exchange.state_rounds.clear()
    self._exchange.state_rounds.update(dict.fromkeys(clients, round_num + 1))

  def run(
    self, params: Params, plan: StagePlan, round_num: int, attempt: int, loss_limit: float
  ) -> tuple[Params, RoundResult]:
    """Runs an attempt at a round; see RoundRunner."""
    config = self._setup.config
    if round_num == plan.first_round and attempt == 0:
      self.server_state = self._setup.start_server(plan)
      self._exchange.state_rounds.clear()
    if attempt == 0:
      limit = config.effective_clients_per_round
      self._members.gather(self._options.min_clients or limit)
      there = self._members.connected
      self._picked = sorted([client for client in self._order[round_num].tolist() if client in there][:limit])
      self._sizes = np.array([there[client].num_images for client in self._picked])
    picked, sizes = self._picked, self._sizes
    task = Task(self._run, self._fields, 0, round_num, attempt, {}, oldest_round=self._oldest)
    begin = time.monotonic()
    trained, traffic = self._exchange.run(
      task, plan, components.cut(params), picked, self._options.round_timeout_seconds
    )
    exchanged = time.monotonic()
    updates = [trained.get(client) for client in picked]
    steps = config.client.local_epochs * np.maximum(1, sizes // config.client.batch_size)
    order = scheduling.assign_slots(steps, scheduling.make_layout(len(picked), 1))
    result = RoundResult(
      client_ids=np.array(picked),
      returned=np.array([update is not None for update in updates]),
      accepted=np.zeros(len(picked), bool),
      client_losses=np.array([update[1][0] if update else 0 for update in updates], np.float32),
      losses=None,
      divergence=0.0,
      calibration=None,
      traffic=traffic,
      images_trained=batching.images_trained(sizes, config.client),
    )
    if not trained:
      return params, result
    seed_key = self._make_key(config.run.seed, attempt)
    params, outcome = self._step.run(
      params, self.server_state, plan, [updates[i] for i in order], sizes[order], loss_limit, seed_key, round_num
    )
    self.server_state, result.accepted[order] = outcome.server_state, outcome.accepted
    self._note_accepted(plan, round_num, result.client_ids[result.accepted].tolist())
    jax.block_until_ready(params)
    took = exchanged - begin, time.monotonic() - exchanged
    self._log(f'round {round_num + 1}: clients took {took[0]:.1f} s, aggregation and calibration {took[1]:.1f} s')
    return params, result._replace(
      losses=outcome.client, divergence=float(outcome.divergence), calibration=outcome.calibration
    )

  def keep_since(self, rounds_done: int) -> None:
    """Lets clients forget states that no checkpoint needs."""
    self._oldest = rounds_done

  def close(self) -> None:
    """Does nothing: the transport belongs to the caller."""
