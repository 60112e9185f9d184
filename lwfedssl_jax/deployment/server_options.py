"""What a server decides besides the run's configuration. Imports no jax."""

import dataclasses

from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.options import Validated, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions(Validated):
  min_clients: int = option(
    0, 'clients that must be there before a round starts; 0: as many as --clients_per_round', at_least=0
  )
  join_timeout_seconds: float = option(0.0, 'time to wait for them; 0: without end', at_least=0, at_most=10**8)
  round_timeout_seconds: float = option(
    600.0, 'time that clients have for a round; one that has not answered then is lost for it', above=0, at_most=10**8
  )
  hello_timeout_seconds: float = option(
    30.0, 'time that a new client has to say what it holds; it is asked again later', above=0, at_most=10**8
  )
  most_client_images: int = option(
    10**7, 'most images that a client may claim to have, on which its weight depends', at_least=1, at_most=2**31 - 1
  )


def check(config: Config, options: ServerOptions) -> None:
  """Raises UsageError if a setting makes no sense with real clients."""
  if not config.is_federated:
    raise UsageError(f'--method: expected a federated method, got {config.method.method}')
  if config.client.client_dropout:
    raise UsageError('--client_dropout: expected 0, real clients are lost by themselves')
  if config.effective_depth_dropout_keep:
    raise UsageError(f'--depth_dropout_keep: expected 0 with real clients, got {config.method.depth_dropout_keep}')
  if config.partition.file or config.partition.has_client_folders:
    raise UsageError(
      f'--partition: expected one that is drawn, real clients hold their images, got {config.partition.partition}'
    )
  if options.min_clients > config.effective_num_clients:
    raise UsageError(
      f'--min_clients: expected at most --num_clients={config.effective_num_clients}, got {options.min_clients}'
    )
