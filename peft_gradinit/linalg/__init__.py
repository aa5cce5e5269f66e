"""Pure torch linear algebra: matrices in, matrices out."""

from .factors import Factors, inner_product, joined, negated
from .nystrom import Components, eigenpairs, explained_share, nystrom
from .product import TruncatedProduct, pad_rank, truncate_product
from .ranks import allocate_ranks
from .rates import first_move, lora_rate, rate_of_start, spectral_rate
from .sketch import TestMatrices, draw_test_matrix, orient_test_matrices, reconstruct
from .subspaces import effective_rank, intruder_dimensions, principal_angles
from .svd import TruncatedSVD, fix_signs, randomized_svd, svd_of_product, truncated_svd

__all__ = [
    "Components",
    "Factors",
    "TestMatrices",
    "TruncatedProduct",
    "TruncatedSVD",
    "allocate_ranks",
    "draw_test_matrix",
    "effective_rank",
    "eigenpairs",
    "explained_share",
    "first_move",
    "fix_signs",
    "inner_product",
    "intruder_dimensions",
    "joined",
    "lora_rate",
    "negated",
    "nystrom",
    "orient_test_matrices",
    "pad_rank",
    "principal_angles",
    "randomized_svd",
    "rate_of_start",
    "reconstruct",
    "spectral_rate",
    "svd_of_product",
    "truncate_product",
    "truncated_svd",
]
