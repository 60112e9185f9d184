"""The rate of the machine's matrix products, the reference of benchmarks and estimates."""

import time

import jax
import jax.numpy as jnp

SIDE = 2048  # of the square float32 matrices
PRODUCTS = 20


def matrix_product_rate() -> float:
  """Returns the FLOP/s of the fastest of 20 products of 2048 x 2048 matrices; a multiply-add counts 2."""
  matrix = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
  product, fastest = jax.jit(jnp.matmul), float('inf')
  jax.block_until_ready(product(matrix, matrix))
  for _ in range(PRODUCTS):
    start = time.perf_counter()
    jax.block_until_ready(product(matrix, matrix))
    fastest = min(fastest, time.perf_counter() - start)
  return 2 * SIDE**3 / fastest
