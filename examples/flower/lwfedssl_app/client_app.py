from lwfedssl_jax.deployment import flower_client

app = flower_client.app
