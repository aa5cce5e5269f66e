"""Rows of a dataset, stored or streaming."""

import datasets

Rows = datasets.Dataset | datasets.IterableDataset


def columns_of(rows: Rows) -> list[str]:
    """Names of the columns, also of streams that do not know them before the first row."""
    return list(rows.column_names or next(iter(rows), {}))
