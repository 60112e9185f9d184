"""Layer-wise federated self-supervised learning (LW-FedSSL, arXiv 2401.11647) in JAX and Flax."""

from lwfedssl_jax.base import UsageError
from lwfedssl_jax.config import Config
from lwfedssl_jax.version import __version__

__all__ = ['Config', 'UsageError', '__version__']
