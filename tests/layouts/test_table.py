"""The support table of the documentation is the table of what the tests run."""

import ast
from pathlib import Path

from tests.layouts.table import ROWS

ROOT = Path(__file__).parents[2]
HEADER = "| layout | made by | here | tested in |"


def test_the_page_lists_exactly_these_rows():
    lines = (ROOT / "docs" / "support.md").read_text().splitlines()
    first = lines.index(HEADER) + 2
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    want = [row.row() for row in ROWS]
    assert lines[first:last] == want, "the table should be:\n" + "\n".join(want)


def test_every_row_is_run_by_the_test_that_it_names():
    assert len({row.key for row in ROWS}) == len(ROWS)
    for row in ROWS:
        tree = ast.parse((ROOT / row.file).read_text())
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert row.test.partition("::")[2] in tests, row.test


def test_every_row_of_this_folder_is_a_layout_of_its_file_and_vice_versa():
    for file in sorted((ROOT / "tests" / "layouts").glob("test_*.py")):
        layouts = _keys_of_layouts(ast.parse(file.read_text()))
        rows = {row.key for row in ROWS if row.file == f"tests/layouts/{file.name}"}
        assert layouts == rows, file.name


def _keys_of_layouts(tree: ast.Module) -> set[str]:
    """Keys of the dict that is assigned to `LAYOUTS`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYOUTS":
            return {ast.literal_eval(key) for key in node.value.keys}
    return set()
