"""YAML as people write it."""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 has them, and refuses keys that are there twice.

    PyYAML takes `1e-5`, without a dot, for text, and lets the last of two equal keys win.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dict of a mapping; `ConstructorError` if a key is there twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        *("while reading a mapping", node.start_mark),
                        *(f"the key {key.value!r} is there twice", key.start_mark),
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_MERGE = "tag:yaml.org,2002:merge"
"""Of `<<`, by which a mapping takes what another one has."""

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
