"""How weights are stored (sharded, offloaded, quantised), and the processes of a run."""

from .fingerprint import model_fingerprint, stored_weight, weight_hash, with_stored_weight
from .offloading import (
    check_loaded,
    execution_device,
    has_offloaded,
    is_offloaded,
    offloaded_value,
    onloaded,
)
from .sharding import (
    assign,
    is_sharded,
    plain_name,
    resharded,
    uncompiled,
    unwrapped,
    whole,
    whole_modules,
)
from .storage import is_hqq, is_packed
from .tensor_parallel import whole_features
from .world import Processes, agreed, process_state, processes
from .zero3 import runnable
