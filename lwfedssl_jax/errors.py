"""Errors that end in one line for the user. Imports no jax."""


class UsageError(ValueError):
  """Invalid input: the message is one line that names the flag or file and what was expected."""


class StorageError(RuntimeError):
  """A disk is full or cannot be written: the message is one line with the failure and the last saved round."""


class LostPeerError(RuntimeError):
  """Another process of the run died; the checkpoints are complete."""


class MeasurementError(RuntimeError):
  """A measurement is physically impossible. The message is one line."""


class TrainingError(RuntimeError):
  """A run cannot continue; the last valid state is saved. The message is one line."""
