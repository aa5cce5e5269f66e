"""YAML as people write it."""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 has them: PyYAML takes `1e-5`, without a dot, for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_yaml(text: str) -> Any:
    """Read a YAML document, or the value of one key.

    Args:
        text: the document.

    Returns:
        What it holds.

    Raises:
        yaml.YAMLError: if it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)
