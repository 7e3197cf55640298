"""Read and write YAML by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), as the Hub does.

PyYAML follows YAML 1.1, which takes `no` and `on` for booleans, `12:30` for 750, `017` for 15 and `1e-3` for text.
"""

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, ScalarNode


CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class CoreLoader(yaml.SafeLoader):
    """Loads plain data by the core schema. A key that stands twice is an error."""

    yaml_implicit_resolvers: dict[str, list] = {}

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {key.value!r} is a duplicate", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node

    def construct_core_int(self, node: ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0 if text.startswith(("0o", "0x")) else 10)


class CoreDumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or the core schema would read as something else."""


for name, (pattern, first_characters) in CORE_SCHEMA.items():
    for each in (CoreLoader, CoreDumper):
        each.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})\Z"), first_characters)
CoreLoader.add_constructor("tag:yaml.org,2002:int", CoreLoader.construct_core_int)


# What PyYAML raises for damaged text. Python raises the last two for huge integers and for deep nesting.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


def describe_yaml_error(error: Exception) -> str:
    """Return one line on an error of `YAML_ERRORS`, with the place if PyYAML knows it."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        problem = ", ".join(filter(None, [error.context, error.problem]))
        return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"byte {error.position + 1} is no text in UTF-8 or UTF-16: {error.reason}"
    return " ".join(str(error).split())


def dump_yaml(data: Any, **options) -> str:
    """Return plain data as YAML, in their order and without line wrapping. `options` go to `yaml.dump`."""
    return yaml.dump(data, Dumper=CoreDumper, sort_keys=False, allow_unicode=True, width=float("inf"), **options)
