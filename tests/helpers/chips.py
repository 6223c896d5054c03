"""TPUs that are described and not there, to compile for: needs libtpu."""

import importlib.util
import os
import warnings

import numpy as np
import pytest
from jax.experimental import topologies

SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}

# What tests that compile for these chips are marked with.
AHEAD_OF_TIME = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu: pip install 'jax[tpu]'",
    ),
    pytest.mark.xdist_group("libtpu"),
]


def described(topology: str) -> np.ndarray:
    """Gives the chips of a topology, such as v5e:2x2."""
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return np.array(found.devices)
