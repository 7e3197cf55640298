"""Results in the metadata of cards that people wrote: everything else stays byte for byte."""

import random
import re
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from evmamba_hub.errors import UserError
from evmamba_hub.publish.card_metadata import (
    add_entries,
    add_results,
    create_placeholder_id,
    read_metadata,
    replace_placeholder,
)


def result(value: float, name: str | None = "Top-1 accuracy", **fields) -> EvalResult:
    return EvalResult(
        **{
            "task_type": "image-classification",
            "dataset_type": "someone/flowers",
            "dataset_name": "someone/flowers",
            "dataset_split": "validation",
            "metric_type": "accuracy",
            **fields,
        },
        metric_name=name,
        metric_value=value,
    )


def read_index(card: str) -> list[dict]:
    return read_metadata(card).data["model-index"]


TRICKY = """\
---
language: no   # Norwegian
license:   'apache-2.0'
version: 1.10
flag: on
when: 2024-01-02
time: 12:30
octal: 017
tags: [mamba,   "vision" , ]
text: |
  - a

  ---- b

folded: >+
  c

"quoted key": &anchor 'it''s'
? complex
: key
naïve: 日本語 😀
# the data
datasets:
-   someone/flowers
-   x
long: {long}
---

# Title

---
language: no
---
""".replace("{long}", "word " * 60)


def test_what_nobody_asked_about_stays():
    updated = add_results(TRICKY, ["tiny"], [result(0.5)])
    header, block = updated.split("model-index:")
    assert TRICKY.startswith(header)
    _, end = block.split("\n---\n", 1)
    assert f"{header}---\n{end}" == TRICKY
    again = add_results(updated, ["tiny"], [result(0.75)])
    assert again == updated.replace("value: 0.5", "value: 0.75")
    assert add_results(again, ["tiny"], [result(0.75)]) == again


TWO_MODELS = """\
---
license: mit
model-index:
  # ours
  -   name: tiny   # ours
      results:
          # first
        - task:
            type: image-classification
            name: Image Classification
          dataset:
            name: Flowers of someone
            type: someone/flowers
            split: validation
          metrics:
            - type: accuracy
              value:   0.10   # first try
              name: Top-1 accuracy
            # between
        - task: {type: image-classification}
          dataset: {name: other,   type: other}
          metrics: [{type: accuracy, value: 1.10}, ]
  - name: small
    results:
      - task:
          type: image-classification
        dataset:
          name: someone/flowers
          type: someone/flowers
          split: validation
        metrics:
          - type: accuracy
            value: '0.90'
            name: Top-1 accuracy

# the end
tags: [x]
---
text
"""


def test_only_the_values_of_this_model_and_this_dataset_change():
    updated = add_results(TWO_MODELS, ["tiny", "someone/tiny"], [result(0.2)])
    assert updated == TWO_MODELS.replace("  0.10  ", "  0.2  ")
    other = add_results(TWO_MODELS, ["small"], [result(0.3)])
    assert other == TWO_MODELS.replace("'0.90'", "0.3")


@pytest.mark.parametrize(
    "new, block",
    [
        (result(0.6, "Top-5 accuracy"), ["- type: accuracy", "  value: 0.6", "  name: Top-5 accuracy"]),
        (result(0.6, metric_type="loss"), ["- type: loss", "  value: 0.6", "  name: Top-1 accuracy"]),
        (result(0.6, None), ["- type: accuracy", "  value: 0.6"]),
        (result(0.6, metric_config="x"), ["  name: Top-1 accuracy", "  config: x"]),
        (result(0.6, dataset_split="test"), ["    split: test"]),
        (result(0.6, dataset_config="no"), ["    config: 'no'", "    split: validation"]),
        (result(0.6, dataset_revision="0" * 40), [f"    revision: '{'0' * 40}'"]),
        (result(0.6, dataset_type="someone/else"), ["    type: someone/else"]),
        (result(0.6, task_type="image-segmentation"), ["- task:", "    type: image-segmentation"]),
        (result(0.6, source_url="https://x.y", source_name="a log"), ["  source:", "    url: https://x.y"]),
    ],
)
def test_another_measurement_is_added(new, block):
    updated = add_results(TWO_MODELS, ["tiny"], [new])
    added = find_insertion(TWO_MODELS, updated).splitlines()
    indentation = 8 if "- task:" in added[0] else 12
    assert all(line.startswith(" " * indentation) for line in added)
    assert all(line in [each[indentation:] for each in added] for line in block)
    old, new = read_index(TWO_MODELS), read_index(updated)
    assert new[1] == old[1] and new[0]["results"][1] == old[0]["results"][1]


def find_insertion(old: str, new: str) -> str:
    """Return the whole lines that were inserted into a text."""
    start = next(idx for idx, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1])
    start = new.rindex("\n", 0, start) + 1
    added = new[start : start + len(new) - len(old)]
    assert old[:start] + added + old[start:] == new
    return added


def test_a_third_model_is_added():
    updated = add_results(TWO_MODELS, ["base", "someone/base"], [result(0.4)])
    start = TWO_MODELS.index("\n# the end")
    assert updated.startswith(TWO_MODELS[:start]) and updated.endswith(TWO_MODELS[start:])
    assert [model["name"] for model in read_index(updated)] == ["tiny", "small", "base"]
    assert read_index(updated)[2]["results"][0]["metrics"][0]["value"] == 0.4


def test_a_model_has_the_name_of_its_repository_or_its_id_or_is_the_only_one():
    card = TWO_MODELS.replace("name: small", "name: someone/small")
    assert add_results(card, ["small", "someone/small"], [result(0.3)]) == card.replace("'0.90'", "0.3")
    alone = re.sub(r"(?s)  - name: small.*?(?=\n# the end)", "", TWO_MODELS)
    assert add_results(alone, ["model"], [result(0.2)]) == alone.replace("  0.10  ", "  0.2  ")


@pytest.mark.parametrize("style", [None, False, True])
def test_every_style_of_lists(style):
    index = yaml.safe_load(TWO_MODELS.split("---\n")[1])
    card = f"---\n{yaml.safe_dump(index, sort_keys=False, default_flow_style=style)}---\ntext"
    assert add_results(card, ["tiny"], [result(0.2)]) == card.replace("value: 0.1,", "value: 0.2,", 1).replace(
        "value: 0.1\n", "value: 0.2\n"
    )
    added = add_results(card, ["tiny"], [result(0.6, "Top-5 accuracy"), result(0.7, dataset_split="test")])
    values = [metric["value"] for each in read_index(added)[0]["results"] for metric in each["metrics"]]
    assert values == [0.1, 0.6, 1.1, 0.7]


@pytest.mark.parametrize(
    "own",
    [
        "- {type: accuracy, value: 0.9, name: Top-1 accuracy, verified: true, verifyToken: abc}",
        "- {type: accuracy, value: 0.9, name: Top-1 accuracy, args: {k: 1}}",
        "- {type: accuracy, value: 0.9, name: Top-1 accuracy}\n    source: {name: paper, url: https://x.y}",
    ],
)
def test_values_that_others_measured_stay(own):
    card = (
        "---\nmodel-index:\n- name: tiny\n  results:\n  - task: {type: image-classification}\n    dataset: {type: "
        f"someone/flowers, name: Flowers, split: validation}}\n    metrics:\n    {own}\n---\n"
    )
    updated = add_results(card, ["tiny"], [result(0.5)])
    assert find_insertion(card, updated).count("value: 0.5\n") == 1
    assert add_results(updated, ["tiny"], [result(0.7)]) == updated.replace("value: 0.5\n", "value: 0.7\n")


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# Title\n",
        "text\n---\nmore\n---\n",
        "---\n---\ntext",
        "---\n---",
        "---\n# nothing\n---\ntext",
        "---\nmodel-index:\n---\ntext",
        "---\nmodel-index: # none\nlicense: mit\n---\ntext",
        "---\nmodel-index: []   # none\nlicense: mit\n---\ntext",
        "---\nmodel-index: ~\n---\ntext",
        "---\nmodel-index:\n- name: tiny\n---\ntext",
        "---\nmodel-index:\n- name: tiny\n  results:\n---\ntext",
        "---\nmodel-index: [{name: tiny, results: }]\n---\ntext",
        "---\nmodel-index: [{name: tiny, results: []}]\n---\ntext",
        "---\n{license: mit}\n---\ntext",
        "---\nlicense: mit\ntext: |+\n  a\n\n---\ntext",
        "---  \nlicense: mit\n---\t\ntext",
        "\n\n---\nlicense: mit\n---\ntext",
        "\ufeff---\na: b\n---\n",
        "\ufeff# Title\n",
    ],
)
def test_cards_without_results(card):
    updated = add_results(card, ["tiny"], [result(0.5), result(0.7, "Top-5 accuracy")])
    assert updated.startswith("\ufeff") == card.startswith("\ufeff")
    (model,) = read_index(updated)
    assert (model["name"], len(model["results"])) == ("tiny", 1)
    assert [metric["value"] for metric in model["results"][0]["metrics"]] == [0.5, 0.7]
    kept = re.sub(r"\[\]|~|results: (?=\})", "", card.removeprefix("\ufeff"))
    assert is_subsequence(kept, updated)
    if not re.match(r"---[ \t]+\n", card):  # which the Hub's client does not take for metadata
        assert len(ModelCard(updated.removeprefix("\ufeff")).data.eval_results) == 2


def is_subsequence(part: str, whole: str) -> bool:
    characters = iter(whole)
    return all(character in characters for character in part)


@pytest.mark.parametrize("line_break", ["\r\n", "\r"])
def test_line_breaks_stay(line_break):
    card = TWO_MODELS.replace("\n", line_break)
    assert add_results(card, ["tiny"], [result(0.2)]) == card.replace("  0.10  ", "  0.2  ")
    updated = add_results(card, ["base"], [result(0.2)])
    assert updated.replace(line_break, "\n") == add_results(TWO_MODELS, ["base"], [result(0.2)])
    assert "\n" not in updated.replace("\r\n", "")


INDEX = "model-index:\n- name: tiny\n  results:\n  - task: {type: image-classification}\n"


@pytest.mark.parametrize(
    "header, message",
    [
        ("- license", "must be lines of the form"),
        ("license", "must be lines of the form"),
        ("null", "must be lines of the form"),
        ("license: mit\na: [", r"cannot be read: line 4, column 1: while parsing a flow node"),
        ("a:\n\tb: 1", r"cannot be read: line 3, column 1: .*'\\t'"),
        ("a: 1\nb: 2\na: 2", "line 4, column 1: the key 'a' is a duplicate"),
        ("model-index: []\nmodel-index: []", "the key 'model-index' is a duplicate"),
        ("a: &x 1\nb: *x", r"line 3, column 4: write out the alias \*x"),
        ("a: &x {b: 1}\nc:\n  <<: *x", r"write out the alias \*x"),
        ("model-index: 3", "must hold a list of `name: value` at model-index$"),
        ("model-index: {name: tiny}", "must hold a list"),
        ("model-index: [tiny]", "must hold a list"),
        ("model-index:\n- name: tiny\n  results: 3", "must hold a list of `name: value` at model-index.0.results$"),
        (f"{INDEX}    dataset: {{type: someone/flowers, split: validation}}\n    metrics: x", "0.metrics$"),
        ("model-index: &x\n  - name: a\n  - name: b", "in a form that cannot be kept"),
        ("a: !!python/object:os.system x", "cannot be read: line 2"),
        ("a: \x07", "no text in UTF-8"),
        ("a: " + "[" * 3000, "recursion"),
    ],
)
def test_metadata_that_cannot_be_kept_are_refused(header, message):
    with pytest.raises(UserError, match=message):
        add_results(f"---\n{header}\n---\ntext", ["tiny"], [result(0.5)])


@pytest.mark.parametrize("card", ["---", "---\n", "---\nlicense: mit\n", "\ufeff---\na: b\n----\n"])
def test_metadata_without_an_end_are_refused(card):
    with pytest.raises(UserError, match="no second one ends the metadata"):
        add_results(card, ["tiny"], [result(0.5)])


@pytest.mark.parametrize(
    "old, new",
    [
        (": 0.1", ": 0.5"),
        (":    '0.1'  # c", ":    0.5  # c"),
        (": [0.1,\n          0.2]", ": 0.5"),
        (": |\n          0.1", None),
        (":\n          - 0.1", None),
        (":\n          0.1", ":\n          0.5"),
        (": &x 0.1", ": 0.5"),
        (": !!float 0.1", ": 0.5"),
        (":", ": 0.5"),
        (": # c", ": 0.5 # c"),
        (": ~", ": 0.5"),
        (": 80.5 ± 0.1", ": 0.5"),
    ],
)
def test_values_in_odd_forms(old, new):
    card = (
        f"---\n{INDEX}    dataset: {{type: someone/flowers, split: validation}}\n    metrics:\n"
        f"      - type: accuracy\n        value{old}\n        name: Top-1 accuracy\n        # end\n"
        "license: mit\n---\ntext"
    )
    if new is None:
        with pytest.raises(UserError, match="in a form that cannot be kept"):
            add_results(card, ["tiny"], [result(0.5)])
    else:
        assert add_results(card, ["tiny"], [result(0.5)]) == card.replace(f"value{old}\n", f"value{new}\n")


def test_a_metric_without_a_value():
    card = (
        f"---\n{INDEX}    dataset: {{type: someone/flowers, split: validation}}\n    metrics:\n"
        "    - {type: accuracy, name: Top-1 accuracy}\n---\n"
    )
    expected = card.replace("Top-1 accuracy}", "Top-1 accuracy, value: 0.5}")
    assert add_results(card, ["tiny"], [result(0.5)]) == expected


PIECES = [
    "\n", " ", "  ", "\t", "- ", ": ", "#", " # c", "[", "]", "{", "}", ",", "'", '"', "|", ">", "&a ", "*a", "!!str ",
    "~", "no", "\r", "\ufeff", "é", "...\n", "---\n", "? ", "%", "0.5", "name: tiny\n", "metrics:", "value: 1\n",
]  # fmt: skip


def mutate(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(text))
        end = start + rng.choice([0, 0, 1, 5])
        text = text[:start] + rng.choice([*PIECES, ""]) + text[end:]
    return text


def find_differences(old: Any, new: Any, place: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Yield the places where data differ, with the new data."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(new.keys() - old.keys())]:
            yield from find_differences(old.get(key), new.get(key), (*place, key))
    elif isinstance(old, list) and isinstance(new, list):
        for idx, (before, after) in enumerate(zip_longest(old, new)):
            yield from find_differences(before, after, (*place, idx))
    elif repr(old) != repr(new):
        yield place, new


def count_equal(one: str, other: str) -> int:
    """Return the length of the common beginning of two texts."""
    pairs = zip(one, other, strict=False)
    return next((idx for idx, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(one), len(other)))


@pytest.mark.parametrize("seed", range(4))
def test_changed_cards_keep_everything_else_or_are_refused(seed):
    """Of a card with random changes, one value differs, or one addition, in one place. Or the card is refused."""
    rng = random.Random(seed)
    counts = {"replaced": 0, "inserted": 0, "refused": 0}
    for _ in range(150):
        card = mutate(rng.choice([TWO_MODELS, TWO_MODELS.replace("\n", "\r\n"), TRICKY]), rng)
        try:
            updated = add_results(card, ["tiny"], [result(0.123)])
        except UserError:
            counts["refused"] += 1
            continue
        (difference,) = find_differences(read_metadata(card).data or {}, read_metadata(updated).data)
        place, new = difference
        assert place[0] == "model-index" and str(new).count("0.123") == 1, card
        start = count_equal(card, updated)
        replaced = card[start : len(card) - count_equal(card[start:][::-1], updated[start:][::-1])]
        counts["replaced" if place[-1] == "value" else "inserted"] += 1
        assert len(replaced) < 20 if place[-1] == "value" else replaced in ("", "[]", "~"), card
    assert min(counts.values()) > 5, counts


ENTRIES = """\
# by hand
- dataset: {id: someone/flowers, task_id: default}   # ours
  value: 87.60
  notes: "Top-1 accuracy"
- dataset:
    id: someone/flowers
    task_id: default
  value: 90.0
  source: {url: https://x.y}
  notes: Top-1 accuracy
"""


def entry(value: float, notes: str = "Top-1 accuracy") -> dict:
    return {"dataset": {"id": "someone/flowers", "task_id": "default"}, "value": value, "notes": notes}


def test_entries_of_others_stay():
    assert add_entries(ENTRIES, "flowers.yaml", [entry(88.0)]) == ENTRIES.replace("87.60", "88.0")
    added = add_entries(ENTRIES.removesuffix("\n"), "flowers.yaml", [entry(88.0, "Top-1 accuracy, test")])
    assert added.startswith(ENTRIES) and yaml.safe_load(added)[2] == entry(88.0, "Top-1 accuracy, test")
    assert yaml.safe_load(add_entries("", "flowers.yaml", [entry(88.0)])) == [entry(88.0)]
    with pytest.raises(UserError, match=r"flowers\.yaml must hold a list"):
        add_entries("a: 1\n", "flowers.yaml", [entry(88.0)])


# Names


PLACEHOLDER_CARD = """\
---
tags: [a,   b]  # flowers
model-index:
- name: flowers
  results: []
- name: other
  results: []
---

# flowers

Photographs of flowers, of "flowers" and your-name/flowers.

```python
pipeline("image-classification", model="your-name/flowers")
pipeline("image-classification", model="your-name/flowers-2", revision="flowers")
```

# flowers
"""


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_an_id_replaces_the_placeholder_where_it_stands(line_break):
    card = PLACEHOLDER_CARD.replace("\n", line_break)
    expected = (
        card.replace("- name: flowers", "- name: '2024'")
        .replace(f"{line_break}# flowers", f"{line_break}# 2024", 1)
        .replace('model="your-name/flowers"', 'model="someone/2024"')
    )
    assert replace_placeholder(card, "someone/2024") == expected
    assert replace_placeholder(expected.replace("flowers-2", "2"), "else/more") != expected
    assert replace_placeholder(expected.replace("your-name/flowers-2", "someone/2"), "else/more").count("else") == 0


@pytest.mark.parametrize("title", ["# Flowers of the garden", "# flowers of the garden", "## flowers", ""])
def test_titles_that_somebody_wrote_stay(title):
    card = PLACEHOLDER_CARD.replace("# flowers", title)
    replaced = replace_placeholder(card, "someone/roses")
    assert replaced == card.replace('"your-name/flowers"', '"someone/roses"').replace("name: flowers", "name: roses")


@pytest.mark.parametrize("card", ["", "# flowers\n", TRICKY, '---\na: "your-name/flowers"\n---\n# flowers\n'])
def test_cards_without_a_placeholder_stay(card):
    assert replace_placeholder(card, "someone/roses") == card


@pytest.mark.parametrize(
    "name, expected",
    [
        ("flowers", "flowers"),
        ("Flowers_v1.5-b", "Flowers_v1.5-b"),
        ("my flowers (2)", "my-flowers-2"),
        ("--..x--y..", "x-y"),
        ("\u82b1", "model"),
        ("", "model"),
    ],
)
def test_placeholders_of_any_directory_are_replaced(name, expected):
    placeholder = create_placeholder_id(name)
    assert placeholder == f"your-name/{expected}"
    assert replace_placeholder(f'# {expected}\n"{placeholder}"\n', "a/b").endswith('# b\n"a/b"\n')
