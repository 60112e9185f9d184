"""A run on real clients: the driver of `training.train` with a network in place of the simulation."""

from collections.abc import Callable

from lwfedssl_jax.config import Config
from lwfedssl_jax.data import federated_dataset
from lwfedssl_jax.deployment.network import Network
from lwfedssl_jax.deployment.server_options import ServerOptions, check
from lwfedssl_jax.deployment.transport import Transport
from lwfedssl_jax.training import train


def serve(
  config: Config,
  transport: Transport,
  options: ServerOptions,
  on_start: Callable[[Config], None] = lambda config: None,
) -> train.Summary:
  """Runs a pretraining on the clients of a transport; arguments, result and errors as `train.train`.

  `--dataset` is the server's own: its labeled images for kNN, and those of calibration. `--num_clients` bounds the
  clients' numbers.

  Raises:
    UsageError: as `train.train`, or a setting makes no sense with real clients.
  """
  check(config, options)
  return train.train(
    config,
    federated_dataset.load_for_server(config),
    on_start,
    make_runner=lambda setup: Network(setup, transport, options),
  )
