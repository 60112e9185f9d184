from lwfedssl_jax.deployment import flower_server

app = flower_server.app
