"""Pure torch linear algebra: matrices in, matrices out."""

from .factors import Factors, inner_product, joined, negated, rounding_of
from .gram import gram_svd
from .nystrom import Components, eigenpairs, explained_share, nystrom
from .precision import double, eigh, exact_products, inverse, qr, singular_values, svd
from .product import frobenius_of_product, pad_rank, truncate_product
from .ranks import allocate_ranks, total_cost
from .rates import first_moves, lora_rate, rate_of_new_layer, rate_of_start, spectral_rate
from .sketch import TestMatrices, draw_test_matrix, orient_test_matrices, reconstruct
from .subspaces import effective_rank, intruder_dimensions, principal_angles
from .svd import (
    SVDS,
    Decomposition,
    TruncatedSVD,
    decomposed,
    fix_signs,
    of_stack,
    randomized_svd,
    svd_of_product,
    truncated_svd,
)
from .threads import on_all_threads
