"""Pure torch linear algebra: matrices in, matrices out."""

from .sketch import TestMatrices, draw_test_matrix, orient_test_matrices, reconstruct
from .svd import TruncatedSVD, fix_signs, randomized_svd, svd_of_product, truncated_svd

__all__ = [
    "TestMatrices",
    "TruncatedSVD",
    "draw_test_matrix",
    "fix_signs",
    "orient_test_matrices",
    "randomized_svd",
    "reconstruct",
    "svd_of_product",
    "truncated_svd",
]
