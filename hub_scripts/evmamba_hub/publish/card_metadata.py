"""Edit a card that somebody wrote: its results, and the names of the model. Everything else stays byte for byte."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from evmamba_hub.errors import UserError
from evmamba_hub.publish.yaml_edit import EditableYaml, Place
from evmamba_hub.yaml_core import dump_yaml


MODEL_INDEX = "model-index"
MEASURED = "measured by the package"  # the source of a result without a link, in the table of a card
FENCE = r"---[ \t]*(?:\r\n|\n|\r|\Z)"
# The metadata with the line before them, and the line behind them. The groups are these two and the rest.
FRONT_MATTER = re.compile(rf"(\ufeff?\s*{FENCE}.*?)((?<=[\r\n]){FENCE})(.*)", re.DOTALL)
OPEN_FRONT_MATTER = re.compile(rf"\ufeff?\s*{FENCE}")
PLACEHOLDER_OWNER = "your-name"
PLACEHOLDER_ID = re.compile(rf'"{PLACEHOLDER_OWNER}/([\w.-]+)"', re.ASCII)  # as it stands in the code of a card
# likewise, any id
LOADED_ID = re.compile(r'\b(?:model=|const id = |(?:from_pretrained|hf_hub_download)\(\s*)"([\w.-]+/[\w.-]+)"')
HOW_TO_USE = re.compile(r"^## How to use\s*?$.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)


def split_card(card: str) -> tuple[str, str, str]:
    """Return the metadata with the line `---` before them, the line `---` behind them, and the text of a card.

    Raises:
        UserError: If nothing ends the metadata.
    """
    if match := FRONT_MATTER.fullmatch(card):
        return match[1], match[2], match[3]
    if OPEN_FRONT_MATTER.match(card):
        raise UserError("the card starts with the line ---, and no second one ends the metadata: add it behind them")
    mark = "\ufeff" if card.startswith("\ufeff") else ""
    line_break = "\r\n" if "\r\n" in card else "\n"
    return f"{mark}---{line_break}", f"---{line_break}", card.removeprefix(mark)


def read_metadata(card: str) -> EditableYaml:
    """Return the metadata of a card.

    Raises:
        UserError: If they are damaged, or are no mapping.
    """
    metadata = EditableYaml(split_card(card)[0], "the metadata of the card")
    if metadata.root.value and not isinstance(metadata.data, dict):
        raise UserError("the metadata of the card must be lines of the form `name: value`")
    return metadata


def add_results(card: str, names: Sequence[str], results: Iterable[EvalResult]) -> str:
    """Write results into the `model-index` of a card. They replace values of the same measurement, also in its table.

    Args:
        card: The text of README.md.
        names: The names that the model may have in the card. A new entry gets the first one. The only model of a card
            may have any name.
        results: The results, of one model.

    Raises:
        UserError: If the metadata are damaged, or are written in a form that cannot be kept.
    """
    metadata = read_metadata(card)
    (new,) = eval_results_to_model_index(names[0], list(results))
    if not metadata.data:
        metadata.text += dump_yaml({MODEL_INDEX: [new]}).replace("\n", metadata.line_break)
    else:
        models = read_mappings(metadata, (MODEL_INDEX,))
        own = [idx for idx, model in enumerate(models) if model.get("name") in names or len(models) == 1]
        if own:
            rows = add_to_model(metadata, (MODEL_INDEX, own[0], "results"), new["results"])
            for old_row, new_row in rows.items():
                card = card.replace(old_row, new_row)
        else:
            metadata.append((MODEL_INDEX,), new)
    return join_card(metadata, card)


def create_placeholder_id(name: str) -> str:
    """Return the id that a card gives to a model that is not on the Hub yet. `replace_placeholder` finds it."""
    words = re.findall(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*", name)
    return f"{PLACEHOLDER_OWNER}/{'-'.join(words) or 'model'}"


def find_placeholder(card: str) -> str | None:
    """Return the placeholder in the code of a card, without its owner. None if there is none."""
    match = PLACEHOLDER_ID.search(split_card(card)[2])
    return match and match[1]


def replace_placeholder(card: str, repo_id: str) -> str:
    """Put an id of the Hub in the place of the placeholder: in code, and where title or `model-index` repeat its name.

    Raises:
        UserError: If the metadata are damaged, or are written in a form that cannot be kept.
    """
    if (own_name := find_placeholder(card)) is None:
        return card
    name = repo_id.rpartition("/")[2]
    metadata = read_metadata(card)
    for idx, model in enumerate(read_mappings(metadata, (MODEL_INDEX,)) if metadata.data else []):
        if model.get("name") == own_name:
            metadata.set((MODEL_INDEX, idx, "name"), name)
    _, fence, text = split_card(card)
    text = text.replace(f'"{PLACEHOLDER_OWNER}/{own_name}"', f'"{repo_id}"')
    title = re.match(rf"\s*# (?={re.escape(own_name)}[ \t]*(?:[\r\n]|\Z))", text)
    if title:
        text = title[0] + name + text[title.end() + len(own_name) :]
    return metadata.text + fence + text


def add_usage(card: str, section: str) -> str:
    """Put a section behind "How to use" in a card, or at its end if it has no such heading."""
    line_break = "\r\n" if "\r\n" in card else "\n"
    section = section.strip().replace("\n", line_break)
    match = HOW_TO_USE.search(card)
    before, after = (card[: match.end()], card[match.end() :]) if match else (card, "")
    parts = [before.rstrip(), section, after] if after else [before.rstrip(), section + line_break]
    return (2 * line_break).join(parts)


def find_other_id(card: str, repo_id: str) -> str | None:
    """Return the id that the examples of a card load, if none loads `repo_id`."""
    ids = LOADED_ID.findall(split_card(card)[2])
    return ids[0] if ids and repo_id not in ids else None


def add_model(card: str, model: str) -> str:
    """Name a model in the metadata of a Space's card, which links the two on the Hub.

    Raises:
        UserError: If the metadata are damaged, or are written in a form that cannot be kept.
    """
    metadata = read_metadata(card)
    models = metadata.get(("models",)) or []
    if not isinstance(models, list):
        raise UserError(f"{metadata.name} must hold a list of Hub ids at models")
    if model not in models:
        metadata.append(("models",), model)
    return join_card(metadata, card)


def join_card(metadata: EditableYaml, card: str) -> str:
    """Return a card with changed metadata."""
    _, fence, text = split_card(card)
    return metadata.text + fence + text


def render_row(result: dict, metric: dict, value: float) -> str:
    """Return a row of the table in a card of this package."""
    return f"| {result['dataset']['name']} | {metric.get('name')} | {value} | {MEASURED} |"


def add_to_model(metadata: EditableYaml, place: Place, results: list[dict]) -> dict[str, str]:
    """Write results into the results of a model. Returns the new rows of the card's table by the old ones."""
    rows = {}
    for result in results:
        measurement = describe_measurement(result)
        for metric in result["metrics"]:
            known = read_mappings(metadata, place)
            same = [
                (*place, idx, "metrics") for idx, old in enumerate(known) if describe_measurement(old) == measurement
            ]
            values = [
                (*metrics, idx, "value")
                for metrics in same
                for idx, old in enumerate(read_mappings(metadata, metrics))
                if describe_metric(old) == describe_metric(metric)
            ]
            for value in values:
                rows[render_row(result, metric, metadata.get(value))] = render_row(result, metric, metric["value"])
                metadata.set(value, metric["value"])
            if not same:
                metadata.append(place, {**result, "metrics": [metric]})
            elif not values:
                metadata.append(same[0], metric)
    return rows


def read_mappings(metadata: EditableYaml, place: Place) -> list[dict]:
    """Return the list of mappings at a place, empty if nothing is there.

    Raises:
        UserError: If something else is there.
    """
    found = metadata.get(place) or []
    if not (isinstance(found, list) and all(isinstance(each, dict) for each in found)):
        raise UserError(f"{metadata.name} must hold a list of `name: value` at {'.'.join(map(str, place))}")
    return found


def describe_measurement(result: dict[str, Any]) -> tuple | None:
    """Return what was measured by whom: the task, the dataset but for its title, and the source."""
    task, dataset = result.get("task"), result.get("dataset")
    if not (isinstance(task, dict) and isinstance(dataset, dict)):
        return None
    fields = {name: str(value) for name, value in dataset.items() if name != "name" and value is not None}
    return task.get("type"), fields, result.get("source") or None


def describe_metric(metric: dict[str, Any]) -> dict[str, Any]:
    """Return everything but the value. A value that somebody has verified belongs to its token."""
    return {name: value for name, value in metric.items() if name != "value" and value not in (None, False)}


def add_entries(text: str, name: str, entries: list[dict]) -> str:
    """Write entries into the text of a file in `.eval_results`. They replace values of the same measurement.

    Args:
        text: The text of the file, empty if there is none.
        name: The name of the file, for messages.
        entries: The entries.

    Raises:
        UserError: If the file is damaged, or is written in a form that cannot be kept.
    """
    file = EditableYaml(text, name)
    if not (known := read_mappings(file, ())):
        return dump_yaml(entries)
    for entry in entries:
        same = [idx for idx, old in enumerate(known) if describe_metric(old) == describe_metric(entry)]
        for idx in same:
            file.set((idx, "value"), entry["value"])
        if not same:
            file.extend((), [entry])
    return file.text
