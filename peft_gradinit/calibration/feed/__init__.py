"""The batches of a pass: read, cut, counted, and shared among processes."""

from .batches import first_sequence, n_batches, n_orientations
from .budget import Budget, Step, lengths_within
from .feed import Feed
from .selection import TokenSelection
from .separable import model_inside, sums_sequences
from .shards import unsharded
from .tokens import is_encoder_decoder, loss_weight, n_sequences
