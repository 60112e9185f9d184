"""Mistakes in what the server and the clients keep between rounds: path, what, old, new, tests."""

OPTIMIZER = ('test_server_optimizer.py::test_golden_example_on_three_numbers',)
STATE = 'test_client_state.py::'
KILLED = (STATE + 'test_a_run_that_is_killed_between_states_and_checkpoint_ends_with_the_same_bits',)
STORE = (STATE + 'test_the_store_goes_back_and_forgets_what_no_checkpoint_needs',)

ROWS = (
  (
    'federated/server_optimizer.py',
    'a step away from the clients',
    'jnp.subtract, before, mean',
    'jnp.subtract, mean, before',
    OPTIMIZER,
  ),
  ('federated/server_optimizer.py', 'optax starts without tau', 'epsilon**2', '0.0', OPTIMIZER),
  ('federated/server_optimizer.py', 'bias correction', 'jnp.iinfo(jnp.int32).max', '0', OPTIMIZER),
  (
    'federated/client_state.py',
    'local and global swapped',
    'trees.interpolate(weight, state.params, received)',
    'trees.interpolate(weight, received, state.params)',
    (STATE + 'test_fedema_mixes_by_the_last_divergence',),
  ),
  (
    'federated/client_state.py',
    'the global predictor where models diverge',
    'state.divergence < config.client.fedu_threshold, 0, 1',
    'state.divergence < config.client.fedu_threshold, 1, 0',
    (STATE + 'test_fedu_takes_the_global_predictor_below_the_threshold_only',),
  ),
  (
    'federated/client_state.py',
    'lambda follows the divergence',
    'state.scale > 0, state.scale',
    'state.scale > 1e9, state.scale',
    (STATE + 'test_fedema_sets_its_scale_once',),
  ),
  (
    'objectives/alignment.py',
    'the first round has a negative',
    'jnp.where(exists, (first + second) / 2, 0)',
    '(first + second) / 2',
    (STATE + 'test_moon_s_first_round_has_an_empty_negative_pool',),
  ),
  ('workdir/client_store.py', 'states of lost rounds stay', 'if version > rounds_done', 'if version > 1e9', STORE),
  (
    'workdir/client_store.py',
    'all earlier states are deleted',
    'if version < needed',
    'if version < versions[-1]',
    STORE,
  ),
  (
    'training/simulation.py',
    'states of clients that dropped out too',
    'slots[metrics.accepted[slots]]',
    'slots',
    (STATE + 'test_only_accepted_clients_are_written_and_a_second_attempt_starts_from_the_same_states',),
  ),
)
