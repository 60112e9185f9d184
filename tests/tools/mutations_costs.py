"""Mistakes in what training costs, sweeps and reports: path, what, old, new, tests."""

COMMUNICATION, FLOPS = ('resources/test_communication.py',), ('resources/test_flops.py',)
COSTS = ('resources/test_costs.py',)

ROWS = (
    ('resources/communication.py', 'what was held is forgotten in expectation', '(current + missing) * kept',
     'missing * kept', COMMUNICATION),
    ('resources/communication.py', 'a dropped client forgets its download',
     'np.where(stale, ledger.version', 'np.where(stale & returned[:, None], ledger.version', COMMUNICATION),
    ('resources/communication.py', 'a round without returns makes new versions', ' & returned.any()', '',
     COMMUNICATION),
    ('resources/communication.py', 'dropped clients upload', '(returned[:, None] & active) * sizes',
     'np.tile(active, (len(returned), 1)) * sizes', COMMUNICATION),
    ('resources/communication.py', 'the last batch norm has parameters', 'sum(widths[1:-1])', 'sum(widths[1:])',
     COMMUNICATION),
    ('resources/communication.py', 'centralized training pays',
     'BYTES_PER_PARAM if config.is_federated else 0', 'BYTES_PER_PARAM', COMMUNICATION),
    ('resources/flops.py', 'one of the two attention products', 'attention = 2 * tokens', 'attention = tokens',
     FLOPS),
    ('resources/flops.py', 'gradient of the image counted', 'pair * (embedding + 2 * active)',
     'pair * 2 * (embedding + active)', FLOPS),
    ('resources/flops.py', 'projections of the received model forgotten', '1 + has_target + aligned',
     '1 + has_target', FLOPS),
    ('resources/flops.py', 'backward pass as dear as the forward one', 'views * 2 * trained',
     'views * trained', FLOPS),
    ('resources/costs.py', 'mean over the sampled, not the federation', '(row / config.num_clients)',
     '(row / config.clients_per_round)', COSTS),
    ('resources/costs.py', 'calibration epochs forgotten', 'plan.calibrates * config.method.calibration_epochs',
     'plan.calibrates', COSTS),
    ('resources/costs.py', 'one GB for all conventions',
     "OWN_GB_BYTES if convention in OWN_CONVENTIONS else ", '', COSTS),
    ('resources/costs.py', 'peak memory of the least demanding stage', 'max(s.peak_memory_bytes',
     'min(s.peak_memory_bytes', COSTS),
    ('resources/costs.py', 'ratios upside down', "f'{other / mine:.2f}x'", "f'{mine / other:.2f}x'", COSTS),
)
