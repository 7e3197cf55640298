"""How the labels of a dataset match those of a model."""

import unicodedata

import pytest

from evmamba_hub.errors import UserError
from evmamba_hub.images import imagenet
from evmamba_hub.inference.labels import LabelMatcher, read_label_map


def to_id2label(labels: list[str]) -> dict[int, str]:
    return dict(enumerate(labels))


def match(names: list[str], labels: list[str], label_map: dict[str, str] | None = None) -> tuple[list[int], dict]:
    """Return the indices, and the number of names by the way of their match."""
    matcher = LabelMatcher(to_id2label(labels), label_map or {})
    return matcher.match(names), dict(matcher.ways)


UNNAMED = [f"LABEL_{idx}" for idx in range(12)]
ANIMALS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lynx"]
NUMBERS = sorted(str(number) for number in range(12))  # the labels of a model that was trained on such directories
IN_STRING_ORDER = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
PADDED = [f"{number:02}" for number in range(12)]
GREEN = "gr\u00fcn"  # in NFC


@pytest.mark.parametrize(
    "names, expected",
    [
        (["cat, animal", "dog, hound, animal"], [1, 0]),
        (["hound"], [0]),
        (["feline"], "'feline'"),
        (["crane"], [2]),
        (["machine", "crane"], [3, 2]),
        (["animal"], "'animal'"),  # of two classes
        (["a", "b", "c", "d", "e", "f", "cat"], "6 of the 7 labels .* 'e', ..."),
        (["Cat"], "'Cat'. 'Cat' may mean 'cat'"),
    ],
    ids=str,
)
def test_names(names, expected):
    labels = ["dog, hound, animal", "cat, animal", "crane", "crane, machine"]
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            match(names, labels)
    else:
        assert match(names, labels) == (expected, {"name": len(names)})


def test_names_of_imagenet():
    labels, synsets = imagenet.load_labels(), imagenet.load_synsets()
    assert len(set(labels)) == len(set(synsets)) == 1000
    assert synsets == sorted(synsets)
    assert match(synsets, labels) == (list(range(1000)), {"WordNet id": 1000})
    assert match(labels, labels) == (list(range(1000)), {"name": 1000})
    names = ["n02012849", "n03126707", "crane", "construction crane", "tank suit", "maillot", "tench"]
    assert match(names, labels)[0] == [134, 517, 134, 517, 639, 638, 0]
    assert match(["tench", "n03126707"], synsets)[0] == [0, 517]
    with pytest.raises(UserError):
        match(["n01440764"], ["dog", "cat"])


def test_a_part_of_imagenet_and_a_model_without_names():
    labels = [f"LABEL_{idx}" for idx in range(1000)]
    assert match(["n02012849", "n03126707"], labels) == ([134, 517], {"WordNet id": 2})


def test_a_name_that_several_labels_have():
    labels = ["crane", "cat", "crane"]
    assert match(labels, labels)[0] == [0, 1, 2]
    assert match(["cat"], labels)[0] == [1]
    with pytest.raises(UserError, match=r"'crane'\. Several labels of the model are 'crane'"):
        match(["cat", "crane"], labels)


def test_models_without_names():
    labels = UNNAMED[:3]
    assert match(["a", "b", "c"], labels) == ([0, 1, 2], {"order": 3})
    assert match(["LABEL_2", "LABEL_0"], labels) == ([2, 0], {"name": 2})
    with pytest.raises(UserError, match="3 classes without names, which cannot be matched with 2 labels"):
        match(["a", "b"], labels)
    with pytest.raises(UserError, match="2 of the 3 labels of the dataset are none of the model's: 'a', 'b'"):
        match(["a", "b", "LABEL_0"], labels)


# Numbers


@pytest.mark.parametrize(
    "names, labels, expected, way",
    [
        (NUMBERS, UNNAMED, IN_STRING_ORDER, "number"),
        (PADDED, UNNAMED, list(range(12)), "number"),
        (["7", "011", "2"], UNNAMED, [7, 11, 2], "number"),
        (NUMBERS, ANIMALS, IN_STRING_ORDER, "number, counted from 0"),
        (PADDED, ANIMALS, list(range(12)), "number, counted from 0"),
        (["11"], ANIMALS, [11], "number, counted from 0"),
        (NUMBERS, NUMBERS, list(range(12)), "name"),
        (["10", "2"], NUMBERS, [2, 4], "name"),
        (["00", "02"], NUMBERS, [0, 4], "number"),
        (["8", "9"], PADDED, [8, 9], "number"),
        (["5"], ["5", "7"], [0], "name"),
        (["05", "07"], ["7", "5"], [1, 0], "number"),  # the number of the label, not its place
        (["1", "0"], ["zero", "one"], [1, 0], "number, counted from 0"),
    ],
)
def test_numbers_match_by_number(names, labels, expected, way):
    assert match(names, labels) == (expected, {way: len(names)})


@pytest.mark.parametrize(
    "names, labels, message",
    [
        ([str(number) for number in range(1, 13)], UNNAMED, "1 of the 12 .*: '12'. Numbers go from 0 to 11"),
        ([str(number) for number in range(1, 13)], ANIMALS, "1 of the 12 .*: '12'. Numbers go from 0 to 11"),
        (["0", "1"], ["1", "2"], "1 of the 2 .*: '0'. Numbers go from 1 to 2"),
        (["0", "cat"], ANIMALS, "1 of the 2 .*: '0'. Numbers match only if all"),
        (["0", "7"], ["seven", "7"], "1 of the 2 .*: '0'"),  # 7 is a name
        (["-1"], ANIMALS, "'-1'"),
        (["9" * 5000], ANIMALS, "999'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_numbers_that_the_model_does_not_know(names, labels, message):
    with pytest.raises(UserError, match=message):
        match(names, labels)


# Label maps


def test_the_label_map_rules():
    """It precedes names, numbers and the order."""
    assert match(["ant", "bee"], ANIMALS, {"ant": "bee", "bee": "ant"}) == ([1, 0], {"label map": 2})
    assert match(["a", "b"], ["LABEL_0", "LABEL_1"], {"a": "LABEL_1", "b": "LABEL_0"})[0] == [1, 0]
    indices, ways = match(["0", "1", "2"], ANIMALS, {"0": "lynx"})
    assert (indices, ways) == ([11, 1, 2], {"label map": 1, "number, counted from 0": 2})
    assert match(["tabby", "siamese", "dog"], ANIMALS, {"tabby": "cat", "siamese": "cat"})[0] == [2, 2, 3]


def test_the_label_map_takes_synonyms():
    assert match(["Hund"], ["cat", "dog, hound"], {"Hund": "hound"})[0] == [1]
    assert match(["Kran"], imagenet.load_labels(), {"Kran": "n03126707"})[0] == [517]


@pytest.mark.parametrize("labels", [ANIMALS, UNNAMED], ids=["names", "without names"])
def test_labels_in_the_map_that_the_model_does_not_know(labels):
    with pytest.raises(UserError, match="1 of the 2 labels in the label map are none of the model's: 'emu'"):
        match(["a", "b"], labels, {"a": "emu", "b": labels[0]})


def test_names_in_the_map_that_the_dataset_does_not_know():
    with pytest.raises(UserError, match=r"1 of the 2 names in the label map .* dataset's: 'b'\. The .* 'a'"):
        match(["a", "ant"], ANIMALS, {"a": "bee", "b": "cat"})


def test_a_label_map_leaves_nothing_to_the_order():
    with pytest.raises(UserError, match=r"2 of the 3 labels of the dataset .*: 'b', 'c'.* 'LABEL_0' and 'LABEL_2'"):
        match(["a", "b", "c"], UNNAMED[:3], {"a": "LABEL_2"})


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "must hold an object of strings"),
        ('{"a": 1}', "must hold an object of strings"),
        ('{"a": {"b": "c"}}', "must hold an object of strings"),
        ("{", "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        ('{"a": "x", "a": "y"}', "holds 'a' more than once"),
        (f'{{"{GREEN}": "x", "{unicodedata.normalize("NFD", GREEN)}": "y"}}', "more than once"),
    ],
    ids=str,
)
def test_bad_label_maps(tmp_path, content, message):
    path = tmp_path / "map.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_label_map(path)


def test_label_maps_of_windows(tmp_path):
    (tmp_path / "map.json").write_text('{"a": "b"}', encoding="utf-8-sig")
    assert read_label_map(tmp_path / "map.json") == {"a": "b"}


# Unicode


FORMS = [GREEN, unicodedata.normalize("NFD", GREEN)]


@pytest.mark.parametrize("name", FORMS, ids=["NFC", "NFD"])
@pytest.mark.parametrize("label", FORMS, ids=["NFC", "NFD"])
def test_unicode_forms_are_equivalent(name, label):
    assert match(["bar", name], [f"tea, {label}", "bar"])[0] == [1, 0]
    assert match(["bar", name], [label, "bar"])[0] == [1, 0]
    assert match([name], ["tea", "bar"], {label: "bar"})[0] == [1]
    assert match(["bar"], ["tea", name], {"bar": label})[0] == [1]


def test_labels_that_differ_in_unicode_form_alone():
    assert match(FORMS[::-1], FORMS) == ([1, 0], {"name": 2})
