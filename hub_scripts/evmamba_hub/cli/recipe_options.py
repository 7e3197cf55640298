"""An option of the command line for every value of a recipe."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import yaml

from evmamba_hub.yaml_core import YAML_ERRORS, CoreLoader
from training_evmamba.recipe import NONE, BaseRecipe, get_kinds, list_options, list_presets, load_recipe


def parse_fields(text: str) -> dict[str, Any]:
    try:
        fields = yaml.load(text, CoreLoader)
    except YAML_ERRORS:
        fields = None
    if not isinstance(fields, dict):
        raise typer.BadParameter("give YAML, such as {depths: [1, 1, 1, 1]}")
    return fields


def number_or_none(kind: type) -> Callable[[str], Any]:
    """Return a function that parses a number or the word `none`."""

    def parse(text: str) -> Any:
        try:
            return text if text == NONE else kind(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is neither a valid {kind.__name__} nor `{NONE}`") from None

    return parse


def show_value(value: Any) -> str:
    """Return a value, rounded, as the command line takes it. It is empty if the value sets nothing."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(show_value, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value in (None, {}) else str(value)


def to_parameter(field: dataclasses.Field, default: str) -> inspect.Parameter:
    """Return the option for a field of the recipe. An option that is not given is None.

    If the field may be None, the option takes the word `none`, which `coerce` converts.

    Args:
        field: The field of the recipe.
        default: Its value in the default recipe, for the help.
    """
    kinds = get_kinds(field.type)
    may_be_none = type(None) in kinds
    (kind,) = kinds - {type(None)}
    number = float if kind == list[float] else kind
    parser: Callable[[str], Any] | None = None
    metavar = None
    if kind == dict[str, Any]:
        kind, parser, metavar = dict, parse_fields, "YAML"
    elif may_be_none and number in (int, float):
        parser, metavar = number_or_none(number), f"<{number.__name__}|{NONE}>"
    elif may_be_none and get_origin(kind) is Literal:
        kind = Literal[(*get_args(kind), NONE)]
    option = typer.Option(
        help=field.metadata["help"] + (f" \\[{default}]" if default else ""),
        rich_help_panel=field.metadata["group"],
        show_default=False,
        parser=parser,
        metavar=metavar,
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def create_preset_option(recipe_class: type[BaseRecipe]) -> Any:
    """Return the option that takes a preset or a YAML file. Its help lists the presets of the class."""
    presets = ", ".join(f"`{name}`" for name in list_presets(recipe_class))
    return typer.Option(help=f"Preset ({presets}), or YAML file of the options below.")


def with_recipe_options(recipe_class: type[BaseRecipe], default: str) -> Callable[[Callable], Callable]:
    """Return a decorator that replaces the `**values` of a command by one option for every field of a recipe.

    Args:
        recipe_class: The class of the recipe.
        default: The preset whose values the help shows.
    """

    def decorate(command: Callable) -> Callable:
        signature = inspect.signature(command)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        recipe = load_recipe(default, {}, recipe_class)
        options = [to_parameter(each, show_value(getattr(recipe, each.name))) for each in list_options(recipe_class)]
        setattr(command, "__signature__", signature.replace(parameters=own + options))  # noqa: B010, typer reads it
        return command

    return decorate


def find_overrides(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the recipe that the command line overrides."""
    return {name: value for name, value in values.items() if value is not None and value != []}
