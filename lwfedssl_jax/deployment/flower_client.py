"""The Flower ClientApp: passes each message to the client's worker. Imports no jax."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from lwfedssl_jax.deployment import messages, worker
from lwfedssl_jax.deployment.flower_messages import from_records, to_records
from lwfedssl_jax.deployment.messages import MessageError, Refused

OPTIONS_KEY = 'options'  # of --node-config: the file that lwfedssl-node wrote

app = ClientApp()


def answer(message: Message, context: Context) -> Message:
  """Answers a message of the server."""
  try:
    options = worker.read_options(str(context.node_config[OPTIONS_KEY]))
    reply = worker.ask(options, from_records(message.content))
  except MessageError as error:
    reply = messages.pack(Refused(messages.one_line(error)))
  return Message(to_records(reply), reply_to=message)


app.train()(answer)
