"""Simulated clients: every round is one compiled function on this process's devices."""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from lwfedssl_jax import devices, rng
from lwfedssl_jax.base import Params
from lwfedssl_jax.config_groups import RunConfig
from lwfedssl_jax.data import batching
from lwfedssl_jax.federated import client_state, round_loader, sampling
from lwfedssl_jax.federated import round as rounds
from lwfedssl_jax.federated.placement import input_specs
from lwfedssl_jax.federated.round_loader import RoundLoader
from lwfedssl_jax.federated.round_types import RoundInputs
from lwfedssl_jax.resources import accounting
from lwfedssl_jax.resources.accounting import RoundTraffic
from lwfedssl_jax.stages import StagePlan
from lwfedssl_jax.training.round_runner import RoundResult
from lwfedssl_jax.training.setup import RunSetup
from lwfedssl_jax.workdir.client_store import ClientStore

POLL_SECONDS = 0.002

# Runs that differ only in RunConfig (seed, workdir, ...) share a compiled round. Two are kept: a program for CPUs takes
# a thousand of the 65,530 memory maps of a process on Linux, and a progressive method has one for every stage.
_shared_round = functools.lru_cache(maxsize=2)(rounds.make_round)


class Simulation:
  """Runs rounds on simulated clients; see RoundRunner."""

  def __init__(self, setup: RunSetup):
    config, data = setup.config, setup.data
    self._setup, self._config = setup, config
    self._participation = sampling.plan_run(config)
    placement = round_loader.choose_placement(config, data, self._participation)
    by_client: Any = input_specs(placement).clients.returned
    self._by_client = devices.sharding(setup.mesh, by_client)
    self._loader = RoundLoader(config, data, self._participation, placement)
    self._round = _shared_round(
      dataclasses.replace(config, run=RunConfig()), data.image_size, placement, self._loader.client_steps()
    )
    self._seed_key = jax.jit(rng.attempt_key, static_argnums=1, out_shardings=setup.sharding)
    server_images = data.server_images if config.uses_calibration else data.server_images[:0]
    self._server_images = devices.replicate(setup.mesh, round_loader.flatten(server_images))
    self._ledger = accounting.start_ledger(setup.payload, config.effective_num_clients)
    self.server_state: Any = None
    self._store = ClientStore(config.run.workdir) if config.uses_client_state else None

  def resume(self, rounds_done: int, server_state: Any) -> None:
    """Charges the rounds that are done, and takes over their state."""
    self.server_state = server_state
    if self._store is not None:
      if rounds_done:
        self._store.check()
      self._store.rewind(rounds_done)
    planned, done = self._participation, slice(0, rounds_done)
    self._ledger = accounting.charge_run(
      self._setup.payload,
      self._setup.plans,
      self._config.effective_num_clients,
      planned.client_ids[done],
      planned.returned[done],
      None if planned.keeps is None else planned.keeps[done],
    ).ledger

  def run(
    self, params: Params, plan: StagePlan, round_num: int, attempt: int, loss_limit: float
  ) -> tuple[Params, RoundResult]:
    """Runs an attempt at a round; see RoundRunner."""
    client_ids, returned = self._participation.client_ids[round_num], self._participation.returned[round_num]
    traffic = self._charge(plan, round_num, attempt)
    if round_num == plan.first_round and attempt == 0:
      self.server_state = self._setup.start_server(plan)
    nothing = RoundResult(
      client_ids, returned, np.zeros_like(returned), np.zeros(len(returned), np.float32), None, 0.0, None, traffic, 0
    )
    if not returned.any():
      return params, nothing
    batch = self._loader.load(round_num)
    kept = self._load_states(batch.client_ids, plan)
    inputs = RoundInputs(
      self._seed_key(self._config.run.seed, attempt),
      np.int32(round_num),
      batch.images,
      batch.clients._replace(state=kept),
      self._server_images,
      np.float32(loss_limit),
      np.int32(plan.stage_round(round_num)),
      self.server_state,
    )
    params, metrics = self._round.apply(params, plan, inputs)
    self.server_state = metrics.server_state
    metrics = jax.tree.map(devices.fetch, _wait_for(metrics._replace(server_state=None)))
    slots = np.flatnonzero(batch.client_ids >= 0)
    slots = slots[np.argsort(batch.client_ids[slots])]  # by ascending client id
    if self._store is not None:
      for slot in slots[metrics.accepted[slots]]:
        own = jax.tree.map(lambda leaf, slot=slot: leaf[slot], metrics.client_states)
        self._store.save(int(batch.client_ids[slot]), round_num + 1, own)
    return params, nothing._replace(
      accepted=metrics.accepted[slots],
      client_losses=metrics.client_losses[slots],
      losses=metrics.client,
      divergence=float(metrics.divergence),
      calibration=metrics.calibration,
      images_trained=batching.images_trained(self._setup.sizes[client_ids], self._config.client),
      padding_fraction=batch.padding_fraction,
    )

  def _load_states(self, client_ids: np.ndarray, plan: StagePlan) -> Any:
    """Returns what the clients of the slots keep, on their devices; None where clients keep nothing."""
    if self._store is None:
      return None
    like = client_state.trace(self._config, self._setup.model, plan.shape)
    states = self._store.load(client_ids.tolist(), plan.first_round, like)
    return jax.tree.map(lambda leaf: devices.put(leaf, self._by_client), states)

  def keep_since(self, rounds_done: int) -> None:
    """Lets clients forget what only checkpoints of fewer rounds need."""
    if self._store is not None:
      self._store.keep_since(rounds_done)

  def close(self) -> None:
    """Stops the background copy of images."""
    self._loader.close()

  def _charge(self, plan: StagePlan, round_num: int, attempt: int) -> RoundTraffic:
    """Accounts for an attempt; in a second one clients hold what they require, and upload again."""
    planned, payload = self._participation, self._setup.payload
    returned, keeps = planned.returned[round_num], None if planned.keeps is None else planned.keeps[round_num]
    if attempt:
      return accounting.second_attempt(payload, plan, returned, keeps)
    self._ledger, traffic = accounting.charge_round(
      self._ledger, payload, plan, planned.client_ids[round_num], returned, keeps
    )
    return traffic


def _wait_for(arrays: Any) -> Any:
  """Waits for arrays in Python, so that signals are handled in the meantime."""
  while not all(leaf.is_ready() for leaf in jax.tree.leaves(arrays)):
    time.sleep(POLL_SECONDS)
  return arrays
