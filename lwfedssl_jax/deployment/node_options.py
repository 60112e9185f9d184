"""What a client decides itself: its images, its folder, its limits. Imports no jax."""

import dataclasses

from lwfedssl_jax.config_groups import MOST_PIXELS
from lwfedssl_jax.options import Validated, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeOptions(Validated):
  client_id: int = option(0, "this client's number, from 0, below the server's --num_clients", at_least=0)
  images: str = option('', "the client's images: folder:PATH, npz:PATH or tfds:NAME; its training images are used")
  part_of: str = option(
    '', "train on this client's part of a data set, e.g. digits, as the simulation partitions it; instead of --images"
  )
  state_dir: str = option('', 'folder of the components that the client holds and of its compiled programs')
  data_dir: str = option('', "folder of prepared TFDS data sets; empty: TFDS's default")
  cache_dir: str = option('', "folder of the cache of decoded images; empty: in the user's cache folder")
  memory_budget_mb: float = option(
    0.0,
    'memory of a round besides the idle process, megabytes (10^6 bytes); a step that needs more runs in smaller '
    'pieces, and a configuration that fits in no way is refused; 0: no limit',
    at_least=0,
  )
  most_image_size: int = option(
    512, 'largest side of images that a server may ask for, pixels', at_least=1, at_most=MOST_PIXELS
  )
