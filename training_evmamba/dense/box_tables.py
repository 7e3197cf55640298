"""Boxes in datasets of the package `datasets`: on the Hub, streamed, and in directories.

Their usual column is `objects: {bbox, category, area, iscrowd}`, with a list in each field.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evmamba_hub.errors import UserError
from evmamba_hub.images.labeled_images import Columns, choose_column, find_source, normalize
from training_evmamba.dense.boxes import BoxForm, BoxImage, Objects, create_objects


if TYPE_CHECKING:
    import datasets

BOX_FIELDS = ("bbox", "bboxes", "box", "boxes")
CATEGORY_FIELDS = ("category", "categories", "category_id", "category_ids", "label", "labels", "class", "classes")
SIZE_COLUMNS = ["width", "height"]


def get_fields(feature: Any) -> dict[str, Any]:
    """Return the fields of a column of objects: a dictionary of lists, or a list of dictionaries."""
    if isinstance(feature, list):
        feature = feature[0]
    fields = getattr(feature, "feature", feature)
    return fields if isinstance(fields, dict) else {}


def find_field(fields: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in fields), None)


def holds_objects(feature: Any) -> bool:
    """Return whether a column holds boxes and their categories."""
    fields = get_fields(feature)
    return find_field(fields, BOX_FIELDS) is not None and find_field(fields, CATEGORY_FIELDS) is not None


def get_values(cell: dict | list | None, field: str | None) -> list | None:
    """Return the values of a field for all objects of an image, or None if there is no such field."""
    if cell is None or field is None:
        return None
    return [each.get(field) for each in cell] if isinstance(cell, list) else cell.get(field)


@dataclass
class ObjectColumns(Columns):
    """The columns of images and objects. `label` is the column of the objects."""

    box: str
    category: str
    other: list[str]  # the columns of the sizes of images, if there are such
    box_form: BoxForm
    dataset: str  # for messages

    def select(self, rows: Any) -> Any:
        """Return the columns of a table or stream, with the images as they are stored.

        If the columns do not name the classes, find them in the rows.

        Raises:
            UserError: If the classes are unknown.
        """
        import datasets

        if self.class_names is None:
            if not isinstance(rows, datasets.Dataset):
                raise UserError(
                    f"the stream {self.dataset} does not name its classes: download it, without --streaming"
                )
            categories = self.read_categories(rows)
            self.class_names = list(map(str, categories))
            self.labels = {category: label for label, category in enumerate(categories)}
        else:
            self.labels = {label: label for label in range(len(self.class_names))}
        columns = [self.image, self.label, *self.other]
        return rows.select_columns(columns).cast_column(self.image, datasets.Image(decode=False))

    def read_categories(self, rows: "datasets.Dataset") -> list[Any]:
        """Return the categories that a dataset uses, in order.

        Raises:
            UserError: If an object has none.
        """
        cells = rows.select_columns([self.label])[self.label]
        categories = {normalize(each) for cell in cells for each in get_values(cell, self.category) or []}
        if None in categories:
            raise UserError(f"{self.dataset} has objects without a category: give each box one")
        return sorted(categories)

    def to_labeled_image(self, row: dict, name: str) -> BoxImage:
        size = tuple(row[column] for column in self.other) or None
        return BoxImage(name, find_source(row[self.image]), self.to_objects(row[self.label], name), size)

    def to_objects(self, cell: dict | list | None, name: str) -> Objects:
        """Return the objects of an image.

        Raises:
            UserError: If they are damaged.
        """
        boxes, categories = get_values(cell, self.box) or [], get_values(cell, self.category) or []
        if len(boxes) != len(categories):
            raise UserError(f"{name} has {len(boxes)} boxes and {len(categories)} categories: give each box one")
        categories = [normalize(category) for category in categories]
        if unknown := [each for each in categories if each not in self.labels]:
            raise UserError(f"{name} has an object of the category {unknown[0]!r}, which is none of the classes")
        areas, is_crowd = get_values(cell, "area"), get_values(cell, "iscrowd")
        try:
            return create_objects(
                boxes,
                [self.labels[each] for each in categories],
                areas and [np.nan if area is None else area for area in areas],
                is_crowd,
                form=self.box_form,
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} has damaged boxes, four numbers are a box: {error}") from error


def choose_object_columns(
    features: dict, dataset: str, image_column: str | None, objects_column: str | None, box_form: BoxForm
) -> ObjectColumns:
    """Choose the columns of images and objects.

    Raises:
        UserError: If there are none, or several.
    """
    import datasets

    columns = list(features)
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = choose_column(images, image_column, columns, "image", dataset)
    found = [name for name, feature in features.items() if holds_objects(feature)]
    objects = choose_column(found, objects_column, columns, "objects", dataset)
    fields = get_fields(features[objects])
    box, category = find_field(fields, BOX_FIELDS), find_field(fields, CATEGORY_FIELDS)
    if box is None or category is None:
        raise UserError(
            f"the column {objects} of {dataset} has no boxes with categories, as `objects: {{bbox, category}}` has: "
            "choose another --objects-column"
        )
    feature = getattr(fields[category], "feature", fields[category])
    return ObjectColumns(
        image=image,
        label=objects,
        class_names=[normalize(name) for name in feature.names] if isinstance(feature, datasets.ClassLabel) else None,
        box=box,
        category=category,
        other=SIZE_COLUMNS if set(SIZE_COLUMNS) <= set(columns) else [],
        box_form=box_form,
        dataset=dataset,
    )
