"""Match the labels of a dataset with those of a model."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from evmamba_hub.errors import UserError
from evmamba_hub.images import imagenet


NUMBER = re.compile(r"[0-9]{1,9}")
NUMBERED_LABEL = re.compile(r"(?:LABEL_)?([0-9]{1,9})")
UNNAMED_LABEL = re.compile(r"LABEL_[0-9]+")  # the default of transformers
MAX_NAMES_IN_MESSAGE = 5

BY_MAP, BY_NAME, BY_SYNSET, BY_NUMBER = "label map", "name", "WordNet id", "number"
BY_INDEX, BY_ORDER = "number, counted from 0", "order"
GUESSES = {BY_INDEX, BY_ORDER}


class Match(NamedTuple):
    """The model's index of a name in the dataset, and the way it was found."""

    label: int
    way: str


class LabelMatcher:
    """Matches the labels of a dataset with those of a model. The first of these ways that applies decides.

    - By label map: it holds the model's label of the name.
    - By name: the name is a label of the model, or a synonym that no other label has. Unicode forms are equivalent.
    - By WordNet id, if the model has the classes of ImageNet.
    - By number, if all names are numbers. "3" and "LABEL_3" have the number 3. Labels without numbers count from 0.
    - By order, if the model's labels have no names, the dataset has as many, and there is no label map.

    Several names may match one label.

    Attributes:
        ways: The number of matched names by their way.
    """

    def __init__(self, id2label: dict[int, str], label_map: dict[str, str]):
        """Index the labels of the model.

        Args:
            id2label: The labels of the model.
            label_map: The model's label by the dataset's name.

        Raises:
            UserError: If the map holds a label that the model does not know.
        """
        self.labels = [id2label[idx] for idx in sorted(id2label)]
        self.are_unnamed = all(UNNAMED_LABEL.fullmatch(label) for label in self.labels)
        numbers = read_numbers(self.labels)
        self.are_numbered = numbers is not None
        self.numbers = {number: idx for idx, number in enumerate(numbers or range(len(self.labels)))}
        self.known = {name: Match(idx, BY_SYNSET) for name, idx in self.index_imagenet().items()}
        self.known |= {name: Match(idx, BY_NAME) for name, idx in index_names(self.labels).items()}
        self.ways: Counter[str] = Counter()

        self.label_map: dict[str, Match] = {}
        targets = {name: self.find(label) for name, label in label_map.items()}
        if unknown := [label_map[name] for name, target in targets.items() if target is None]:
            raise UserError(
                f"{len(unknown)} of the {len(label_map)} labels in the label map are none of the model's: "
                f"{self.describe_unknown(unknown)}"
            )
        self.label_map = {to_nfc(name): Match(target.label, BY_MAP) for name, target in targets.items() if target}

    def index_imagenet(self) -> dict[str, int]:
        """Return the model's indices by the other names of ImageNet's classes, if the model has these classes."""
        synsets = imagenet.load_synsets()
        if self.labels == synsets:
            return index_names(imagenet.load_labels())
        if self.labels == imagenet.load_labels() or (self.are_unnamed and len(self.labels) == len(synsets)):
            return {synset: idx for idx, synset in enumerate(synsets)}
        return {}

    def match(self, names: Sequence[str]) -> list[int]:
        """Match all labels of a dataset.

        Returns:
            The model's index of each name.

        Raises:
            UserError: If the model does not know a name, or the dataset does not know a name in the label map.
        """
        self.check_mapped_names(names)
        matches = [self.find(name) for name in names]
        if list(names) == self.labels and not self.label_map:  # several labels may have the same name
            matches = [Match(idx, BY_NAME) for idx in range(len(names))]
        elif self.have_numbers([name for name in names if to_nfc(name) not in self.label_map]):
            matches = [match or self.find_number(name) for name, match in zip(names, matches, strict=True)]
        elif self.are_unnamed and not self.label_map and not any(matches):
            if len(names) != len(self.labels):
                raise UserError(
                    f"the model has {len(self.labels)} classes without names, which cannot be matched with "
                    f"{len(names)} labels: add id2label to its configuration, or map the names with --label-map"
                )
            matches = [Match(idx, BY_ORDER) for idx in range(len(names))]
        return self.accept(names, matches)

    def match_one(self, name: str) -> int:
        """Match a label of a dataset whose other labels are unknown.

        Raises:
            UserError: If the model does not know the name.
        """
        match = self.find(name) or (self.find_number(name) if self.have_numbers([name]) else None)
        return self.accept([name], [match])[0]

    def check_mapped_names(self, names: Sequence[str]) -> None:
        known = {to_nfc(name) for name in names}
        if unknown := [name for name in self.label_map if name not in known]:
            raise UserError(
                f"{len(unknown)} of the {len(self.label_map)} names in the label map are none of the dataset's: "
                f"{quote(unknown)}. The dataset has {describe_labels(names)}"
            )

    def find(self, name: str) -> Match | None:
        """Return the match of a name by label map, name or WordNet id."""
        normalized = to_nfc(name)
        return self.label_map.get(normalized) or self.known.get(name) or self.known.get(normalized)

    def find_number(self, name: str) -> Match | None:
        index = self.numbers.get(int(name))
        return None if index is None else Match(index, BY_NUMBER if self.are_numbered else BY_INDEX)

    def have_numbers(self, names: Sequence[str]) -> bool:
        """Return whether all names are numbers, and none is also the name of a label that has no number."""
        are_numbers = all(NUMBER.fullmatch(name) for name in names)
        return are_numbers and (self.are_numbered or not any(name in self.known for name in names))

    def accept(self, names: Sequence[str], matches: Sequence[Match | None]) -> list[int]:
        """Return the indices of matches, and counts their ways."""
        found = [match for match in matches if match]
        if unknown := [name for name, match in zip(names, matches, strict=True) if not match]:
            raise UserError(
                f"{len(unknown)} of the {len(names)} labels of the dataset are none of the model's: "
                f"{self.describe_unknown(unknown)}. Map different spellings with --label-map"
            )
        self.ways.update(match.way for match in found)
        return [match.label for match in found]

    def describe_unknown(self, names: Sequence[str]) -> str:
        """Return the first of the unknown names, a hint on the first one, and examples of known labels."""
        hint, first = "", names[0]
        if NUMBER.fullmatch(first) and int(first) in self.numbers:
            hint = " Numbers match only if all labels of the dataset are numbers."
        elif NUMBER.fullmatch(first):
            hint = f" Numbers go from {min(self.numbers)} to {max(self.numbers)}."
        elif self.labels.count(first) > 1:
            hint = f" Several labels of the model are {first!r}."
        else:
            folded = {label.casefold(): label for label in self.known}
            for close in get_close_matches(first.casefold(), folded, n=1, cutoff=0.8):
                hint = f" {first!r} may mean {folded[close]!r}."
        return f"{quote(names)}.{hint} The model knows {describe_labels(self.labels)}"


def index_names(labels: Sequence[str]) -> dict[str, int]:
    """Return the indices by labels and synonyms, as they are and in NFC, if they belong to one label alone.

    A label may be a list of synonyms, separated by commas. A whole label precedes a synonym.
    """
    synonyms = [(synonym, idx) for idx, label in enumerate(labels) for synonym in {*to_nfc(label).split(", ")}]
    normalized = [(to_nfc(label), idx) for idx, label in enumerate(labels)]
    indices: dict[str, int] = {}
    for pairs in (synonyms, normalized, [(label, idx) for idx, label in enumerate(labels)]):
        num_labels = Counter(name for name, _ in pairs)
        indices |= {name: idx for name, idx in pairs if num_labels[name] == 1}
    return indices


def describe_ways(ways: Mapping[str, int]) -> str:
    """Return the ways in which labels matched, such as "by name". If there are several, each has its number."""
    if len(ways) == 1:
        return f"by {next(iter(ways))}"
    return ", ".join(f"{count:,} by {way}" for way, count in ways.items())


def read_numbers(labels: Sequence[str]) -> list[int] | None:
    """Return the numbers of labels such as "3" or "LABEL_3", or None if a label has none."""
    numbers = [int(match[1]) for label in labels if (match := NUMBERED_LABEL.fullmatch(label))]
    return numbers if len(numbers) == len(labels) else None


def read_label_map(path: Path) -> dict[str, str]:
    """Read a JSON file with the model's label by the dataset's name.

    Raises:
        UserError: If the file holds anything else, or a name twice.
    """

    def to_dict(pairs: list[tuple[str, str]]) -> dict[str, str]:
        names = Counter(to_nfc(name) for name, _ in pairs)
        if repeated := [name for name, count in names.items() if count > 1]:
            raise UserError(f"{path} holds {repeated[0]!r} more than once: give each name one label")
        return dict(pairs)

    try:
        label_map = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=to_dict)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(label_map, dict) or not all(isinstance(label, str) for label in label_map.values()):
        raise UserError(
            f'{path} must hold an object of strings, such as {{"name in the dataset": "label of the model"}}'
        )
    return label_map


def to_nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def quote(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:MAX_NAMES_IN_MESSAGE])
    return f"{shown}, ..." if len(names) > MAX_NAMES_IN_MESSAGE else shown


def describe_labels(labels: Sequence[str]) -> str:
    examples = " and ".join(repr(label) for label in dict.fromkeys([labels[0], labels[-1]]))
    return f"{len(labels)} labels, such as {examples}"
