"""The batches of a pass: read, cut, counted, and shared among processes."""

from .batches import first_sequence, n_orientations
from .budget import Step
from .feed import Feed
from .selection import TokenSelection
from .shards import unsharded
from .tokens import is_encoder_decoder, loss_weight
