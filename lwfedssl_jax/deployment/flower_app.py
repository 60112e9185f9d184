"""Flower's configuration, written for the user: the app, the connection, and the arguments of its commands. No flwr."""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping

from lwfedssl_jax import config as configs
from lwfedssl_jax.config import Config
from lwfedssl_jax.deployment.server_options import ServerOptions
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.options import Validated, option

CONNECTION = 'run'  # the name of the SuperLink in Flower's configuration

_PYPROJECT = """\
[project]
name = "lwfedssl"
version = "1.0.0"
description = "Layer-wise federated self-supervised learning"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "lwfedssl"

[tool.flwr.app.components]
serverapp = "lwfedssl_app.server_app:app"
clientapp = "lwfedssl_app.client_app:app"

[tool.flwr.app.config]
config = {config}
options = {options}
"""

_MODULES = {
  '__init__.py': '',
  'server_app.py': 'from lwfedssl_jax.deployment import flower_server\n\napp = flower_server.app\n',
  'client_app.py': 'from lwfedssl_jax.deployment import flower_client\n\napp = flower_client.app\n',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tls(Validated):
  """The files of an encrypted connection; empty: it is not encrypted."""

  ca_certificate: str = option('', "PEM file of the authority that signed the server's certificate")
  certificate: str = option('', "PEM file of the server's certificate")
  private_key: str = option('', "PEM file of the server's private key")
  node_keys: str = option('', 'folder of the public keys (*.pub) of the nodes that may take part')


def write_app(folder: str, config: Config, options: ServerOptions) -> str:
  """Writes the app that Flower runs, with a run's configuration; returns its folder."""
  app = os.path.join(folder, 'app')
  os.makedirs(os.path.join(app, 'lwfedssl_app'), exist_ok=True)
  for name, text in _MODULES.items():
    _write(os.path.join(app, 'lwfedssl_app', name), text)
  values = {'config': configs.flatten(config), 'options': dataclasses.asdict(options)}
  texts = {name: json.dumps(json.dumps(value)) for name, value in values.items()}  # a JSON string is a TOML string
  _write(os.path.join(app, 'pyproject.toml'), _PYPROJECT.format(**texts))
  return app


def write_connection(home: str, address: str, ca_certificate: str) -> None:
  """Writes Flower's configuration in a FLWR_HOME of its own: one SuperLink, encrypted if a certificate is given."""
  os.makedirs(home, mode=0o700, exist_ok=True)
  path = json.dumps(os.path.abspath(ca_certificate))
  secured = f'root-certificates = {path}' if ca_certificate else 'insecure = true'
  _write(
    os.path.join(home, 'config.toml'),
    f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = {json.dumps(address)}\n{secured}\n',
  )


def superlink_arguments(host: str, port: int, tls: Tls, database: str) -> list[str]:
  """Returns the command line of the SuperLink. Raises UsageError for a file that is not there."""
  arguments = [_program('flower-superlink'), '--host', host, '--port', str(port), '--database', database]
  arguments.append('--disable-runtime-dependency-installation')
  if not tls.certificate:
    return [*arguments, '--insecure']
  files = {
    '--ssl-ca-certfile': ('ca_certificate', tls.ca_certificate),
    '--ssl-certfile': ('certificate', tls.certificate),
    '--ssl-keyfile': ('private_key', tls.private_key),
  }
  for flag, (name, path) in files.items():
    arguments += [flag, existing_file(name, path)]
  return [*arguments, '--enable-supernode-auth'] if tls.node_keys else arguments


def supernode_arguments(
  superlink: str, port: int, ca_certificate: str, private_key: str, options_path: str
) -> list[str]:
  """Returns the command line of a SuperNode. Raises UsageError for a file that is not there."""
  arguments = [_program('flower-supernode'), '--superlink', superlink, '--host', '127.0.0.1', '--port', str(port)]
  if ca_certificate:
    arguments += ['--root-certificates', existing_file('ca_certificate', ca_certificate)]
  else:
    arguments.append('--insecure')
  if private_key:
    arguments += ['--auth-supernode-private-key', existing_file('private_key', private_key)]
  return [*arguments, '--node-config', f'options={json.dumps(options_path)}']


def register_arguments(node_keys: str) -> list[list[str]]:
  """Returns the command lines that register the nodes' public keys. Raises UsageError if there is none."""
  names = sorted(os.listdir(node_keys)) if os.path.isdir(node_keys) else []
  keys = [os.path.join(node_keys, name) for name in names if name.endswith('.pub')]
  if not keys:
    raise UsageError(f'--node_keys: expected a folder of public keys (*.pub), found none in {node_keys}')
  return [[_program('flwr'), 'supernode', 'register', key, CONNECTION] for key in keys]


def run_arguments(app: str) -> list[str]:
  """Returns the command line that starts the run and shows its log."""
  return [_program('flwr'), 'run', app, CONNECTION, '--stream']


def environment(home: str) -> Mapping[str, str]:
  """Returns the environment of Flower's commands: its own home, no telemetry, this Python and this package first."""
  package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  first = {'PATH': os.path.dirname(sys.executable), 'PYTHONPATH': package}
  paths = {name: os.pathsep.join(filter(None, [path, os.environ.get(name)])) for name, path in first.items()}
  return {**os.environ, **paths, 'FLWR_HOME': home, 'FLWR_TELEMETRY_ENABLED': '0'}


def existing_file(flag: str, path: str) -> str:
  """Returns the absolute path. Raises UsageError if there is no such file."""
  if not os.path.isfile(path):
    raise UsageError(f'--{flag}: expected a file, found none at {path!r}')
  return os.path.abspath(path)


def _program(name: str) -> str:
  path = os.path.join(os.path.dirname(sys.executable), name)
  if not os.path.exists(path):
    raise UsageError(f'{name}: expected beside {sys.executable} (pip install lwfedssl-jax[federation])')
  return path


def _write(path: str, text: str) -> None:
  with open(path, 'w', encoding='utf-8') as file:
    file.write(text)
