"""Several seeds of one configuration in one program: every run has its own driver, the rounds are computed together.

Each seed's run is the ordinary one, in a thread, with its own folder, log and checkpoints. What it would compute by
itself, a round, it hands to a `Gang`; when all runs that are still going have done so, rounds that are alike are
computed by one vmapped program. A run that is alone in what it needs (a second attempt, say) gets the ordinary round.
"""

import functools
import os
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lwfedssl_jax import config as configs
from lwfedssl_jax import devices, interrupts, sweeps, training
from lwfedssl_jax.base import FederatedRound, Params, UsageError
from lwfedssl_jax.config import Config
from lwfedssl_jax.stages import StagePlan


class _Call:
  """A round that a run waits for."""

  def __init__(self, built: FederatedRound, params: Params, plan: StagePlan, inputs: Any):
    self.built, self.params, self.plan, self.inputs = built, params, plan, inputs
    self.result: Any = None
    self.error: BaseException | None = None
    self.done = threading.Event()


class Gang:
  """Computes the rounds of several runs together."""

  def __init__(self, members: int):
    self._lock, self._members, self._waiting = threading.Lock(), members, []
    self._many: dict[Any, Any] = {}

  def apply(self, built: FederatedRound, params: Params, plan: StagePlan, inputs: Any) -> Any:
    """As `built.apply`, once every run that is still going waits for a round; the last to come computes for all."""
    call = _Call(built, params, plan, inputs)
    with self._lock:
      self._waiting.append(call)
    self._compute_if_all_wait()
    while not call.done.wait(0.05):  # not for ever at once: a signal must be noticed in the main thread
      pass
    if call.error is not None:
      raise call.error
    return call.result

  def leave(self) -> None:
    """Says that a run has ended, well or not; those that wait for it go on."""
    with self._lock:
      self._members -= 1
    self._compute_if_all_wait()

  def _compute_if_all_wait(self) -> None:
    with self._lock:
      if not self._waiting or len(self._waiting) < self._members:
        return
      calls, self._waiting = self._waiting, []
    groups: dict[Any, list[_Call]] = {}
    for call in calls:
      room = call.inputs.clients.image_ids.shape  # may differ where clients of another seed are larger
      groups.setdefault((call.plan, int(call.inputs.round_num), room), []).append(call)
    for group in groups.values():
      try:
        results = self._run(group)
      except BaseException as error:
        for call in group:
          call.error = error
      else:
        for call, result in zip(group, results, strict=True):
          call.result = result
      for call in group:
        call.done.set()

  def _run(self, group: Sequence[_Call]) -> list[Any]:
    built, plan, inputs = group[0].built, group[0].plan, group[0].inputs
    if len(group) == 1:
      return [built.apply(group[0].params, plan, inputs)]
    images = inputs.images
    shared = all(call.inputs.images is images for call in group)
    many = self._many.setdefault((inputs.clients.image_ids.shape, shared), _vmapped(built, shared))
    return many(plan.shape, [call.params for call in group], plan.start, plan.stop,
                [call.inputs._replace(images=None) if shared else call.inputs for call in group],
                images if shared else None)


def _vmapped(built: FederatedRound, shared: bool) -> Any:
  """Builds (shape, K parameter trees, start, stop, K inputs, images) -> K results; images None: each has its own."""

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
  def run(shape, params, start, stop, inputs, images):
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    compute = lambda one, read: built.apply.body(
        shape, one, start, stop, read._replace(images=images) if shared else read)
    results = jax.vmap(compute)(stack(params), stack(inputs))
    return [jax.tree.map(lambda leaf: leaf[index], results) for index in range(len(params))]

  return run


def train(config: Config, num_seeds: int) -> dict[str, Any]:
  """Runs seeds config.run.seed .. + num_seeds - 1, each in its own folder `seedN` of `config.run.workdir`.

  Returns:
    `seeds`: each run's summary by its seed; `stopped_by`, the signal that stopped them, or None.

  Raises:
    UsageError: as `training.train`; or there are several devices.
    TrainingError: as `training.train`; the other runs go on to their end first.
  """
  if devices.make_mesh(config.run.num_devices) is not None:
    raise UsageError('--num_seeds: expected 1 where several devices share a run (--num_devices=1 takes one)')
  if not config.run.workdir:
    raise UsageError('--workdir: expected a folder to write the runs to')
  gang, summaries, errors = Gang(num_seeds), {}, []

  def one(seed):
    workdir = os.path.join(config.run.workdir, f'seed{seed}')
    own = configs.with_values(config, {'seed': seed, 'workdir': workdir})
    together = lambda made: made._replace(apply=functools.partial(gang.apply, made))
    try:
      summaries[seed] = training.train(own, sweeps.deal(own), together)
    except BaseException as error:
      errors.append(error)
    finally:
      gang.leave()

  seeds = range(config.run.seed, config.run.seed + num_seeds)
  sweeps.deal(configs.with_values(config, {'seed': seeds[0]}))  # load the data once, before the threads
  with interrupts.catch() as stop:
    threads = [threading.Thread(target=one, args=(seed,), name=f'seed {seed}', daemon=True) for seed in seeds]
    for thread in threads:
      thread.start()
    for thread in threads:
      while thread.is_alive():
        thread.join(0.1)
  if errors:
    raise errors[0]
  return {'seeds': {str(seed): summaries[seed] for seed in seeds}, 'stopped_by': stop.name}
