"""Edit YAML in place: set a value, or append to a list, and keep every other character."""

import re
from typing import Any

import yaml
from yaml.nodes import CollectionNode, MappingNode, Node

from evmamba_hub.errors import UserError
from evmamba_hub.yaml_core import YAML_ERRORS, CoreLoader, describe_yaml_error, dump_yaml


Place = tuple[str | int, ...]  # keys of mappings and indices of lists, from the root

LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


class TreeLoader(CoreLoader):
    """Rejects aliases, because the change of one place would change others."""

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"write out the alias *{event.anchor}, which an update may not keep", event.start_mark
            )
        return super().compose_node(parent, index)


def find_nodes(root: Node, place: Place) -> list[Any]:
    """Return the nodes from the root to a place. The key of a mapping precedes its value."""
    nodes: list[Any] = [root]
    for step in place:
        parent = nodes[-1]
        if isinstance(parent, MappingNode):
            nodes += next(pair for pair in parent.value if pair[0].value == step)
        else:
            nodes.append(parent.value[step])
    return nodes


def find_last_child(node: CollectionNode) -> Node:
    return node.value[-1][1] if isinstance(node, MappingNode) else node.value[-1]


def find_end(node: Node) -> int:
    """Return the index behind the text of a node. PyYAML's mark of a block lies behind the comments that follow."""
    while isinstance(node, CollectionNode) and not node.flow_style:
        node = find_last_child(node)
    return node.end_mark.index


def render_inline(data: list | dict) -> str:
    """Return a list or a mapping in one line, without its brackets."""
    return dump_yaml(data, default_flow_style=True).removesuffix("\n")[1:-1]


class EditableYaml:
    """The text and the data of a YAML file.

    A change that would change other data raises a `UserError`. Do not use the object after that.

    Args:
        text: The text.
        name: The name of the file for messages.

    Raises:
        UserError: If the text is damaged, has a key twice, or uses aliases.
    """

    def __init__(self, text: str, name: str):
        self.name = name
        first_break = LINE_BREAK.search(text)
        self.line_break = first_break[0] if first_break else "\n"
        try:
            self.parse(text)
        except YAML_ERRORS as error:
            raise UserError(f"{name} cannot be read: {describe_yaml_error(error)}") from error

    def parse(self, text: str) -> None:
        loader = TreeLoader(text)
        self.text = text
        self.root: Any = loader.get_single_node()  # None for a text without content
        self.data: Any = None if self.root is None else loader.construct_document(self.root)

    def get(self, place: Place) -> Any:
        """Return the data at a place. A key may be missing: then it returns None."""
        data = self.data
        for step in place:
            data = data[step] if isinstance(step, int) else data.get(step)
        return data

    def set(self, place: Place, value: float | str) -> None:
        """Set a scalar of a mapping. A missing key is added."""
        *mapping_place, key = place
        mapping = self.get(tuple(mapping_place))
        if key not in mapping:
            self.extend(tuple(mapping_place), {key: value})
        elif mapping[key] != value:
            mapping[key] = value
            node = find_nodes(self.root, place)[-1]
            start, end = node.start_mark.index, node.end_mark.index
            gap = " " if start == end else ""  # an empty value stands right behind the colon
            self.splice(start, end, gap + render_inline([value]))

    def append(self, place: Place, item: Any) -> None:
        """Append an item to a list of a mapping. The list may be missing, null or empty."""
        *mapping_place, key = place
        mapping = self.get(tuple(mapping_place))
        if key not in mapping:
            self.extend(tuple(mapping_place), {key: [item]})
        elif mapping[key]:
            self.extend(place, [item])
        else:
            self.fill(place, [item])

    def extend(self, place: Place, addition: list | dict) -> None:
        """Add items to a list, or entries to a mapping, which is not empty."""
        container = self.get(place)
        container.update(addition) if isinstance(container, dict) else container.extend(addition)
        node = find_nodes(self.root, place)[-1]
        if node.flow_style:
            end = find_end(find_last_child(node))
            self.splice(end, end, f", {render_inline(addition)}")
        else:
            line = self.find_next_line(find_end(node))
            gap = "" if LINE_BREAK.fullmatch(self.text[line - 1]) else self.line_break  # at the end of the text
            self.splice(line, line, gap + self.render_lines(addition, node.start_mark.column))

    def fill(self, place: Place, items: list) -> None:
        """Put a list in the place of null or an empty list."""
        *mapping_place, last = place
        self.get(tuple(mapping_place))[last] = items
        *parents, key, node = find_nodes(self.root, place)
        start, end = node.start_mark.index, node.end_mark.index
        if any(parent.flow_style for parent in parents if isinstance(parent, CollectionNode)):
            self.splice(start, end, f" [{render_inline(items)}]")
        else:
            line = self.find_next_line(end)
            self.splice(start, line, self.text[end:line] + self.render_lines(items, key.start_mark.column))

    def find_next_line(self, index: int) -> int:
        """Return the index of the first line that begins at an index or behind it."""
        if LINE_BREAK.fullmatch(self.text[index - 1]):
            return index
        line_break = LINE_BREAK.search(self.text, index)
        return line_break.end() if line_break else len(self.text)

    def render_lines(self, data: list | dict, column: int) -> str:
        return "".join(f"{' ' * column}{line}{self.line_break}" for line in dump_yaml(data).splitlines())

    def splice(self, start: int, end: int, replacement: str) -> None:
        """Replace a part of the text, whose data have been changed already."""
        expected = self.data
        try:
            self.parse(self.text[:start] + replacement + self.text[end:])
        except YAML_ERRORS:
            self.data = None
        if repr(self.data) != repr(expected):  # unlike the data themselves, texts of NaN are equal
            raise UserError(
                f"{self.name} is written in a form that cannot be kept: write it one value a line, without anchors "
                "and tags, or edit it by hand"
            )
