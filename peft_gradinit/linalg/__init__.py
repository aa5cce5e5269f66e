"""Pure torch linear algebra: matrices in, matrices out."""

from .factors import Factors, inner_product, joined, negated, truncated
from .nystrom import Components, eigenpairs, explained_share, nystrom
from .ranks import allocate_ranks
from .sketch import TestMatrices, draw_test_matrix, orient_test_matrices, reconstruct
from .subspaces import effective_rank, intruder_dimensions, principal_angles
from .svd import TruncatedSVD, fix_signs, randomized_svd, svd_of_product, truncated_svd

__all__ = [
    "Components",
    "Factors",
    "TestMatrices",
    "TruncatedSVD",
    "allocate_ranks",
    "draw_test_matrix",
    "effective_rank",
    "eigenpairs",
    "explained_share",
    "fix_signs",
    "inner_product",
    "intruder_dimensions",
    "joined",
    "negated",
    "nystrom",
    "orient_test_matrices",
    "principal_angles",
    "randomized_svd",
    "reconstruct",
    "svd_of_product",
    "truncated",
    "truncated_svd",
]
