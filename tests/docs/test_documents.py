"""The pages of the project: their code runs, everything that they name exists, and their figures are those measured.

The tests follow README and every page in docs/ as a reader would. They run its `evmamba` commands and Python blocks in
order, in a directory with a small model, small data and the Hub of the tests. The program parses commands that cannot
run here. `<!-- not run: reason -->` above a block leaves it out.

Pages for developers are not followed, but their commands, links and names are checked likewise. So are the texts and
commands of the notebooks, which tests/examples/test_notebooks.py runs.
"""

import ast
import configparser
import csv
import dataclasses
import inspect
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import huggingface_hub
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pytest
import torch
import typer
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image
from markdown_it import MarkdownIt
from markdown_it.token import Token
from packaging.version import Version
from transformers import BitImageProcessorPil
from typer.testing import CliRunner

from evmamba_demo.bundled import find_bundled_model, find_examples, find_photographs
from evmamba_hub.cli.main import app
from evmamba_hub.convert.original_checkpoint import BLOCK_NAMES, MODULE_NAMES
from evmamba_hub.export.runtimes import RUNTIMES
from evmamba_hub.images.images import read_image
from evmamba_hub.publish.card import TEMPLATE
from evmamba_hub.publish.push import collect_model_files
from evmamba_hub.publish.push_kernel import OLDEST_CLIENT
from examples import draw_shapes, object_detection, semantic_segmentation
from golden_values import original_state_dict
from hub_server import HubServer
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification
from training_evmamba.digits import main as write_digits
from training_evmamba.recipe import Recipe, create_recipe, list_presets, load_recipe


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DEVELOPER_PAGES = [
    *(ROOT / name for name in ("CONTRIBUTING.md", "RELEASING.md", "SECURITY.md")),
    *(ROOT / name for name in ("kernels/README.md", "hub_scripts/README.md", "tests/golden/README.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
ALL_PAGES = PAGES + DEVELOPER_PAGES + NOTEBOOKS
SLOW_PAGES = {"export.md", "javascript.md", "tutorial.md"}  # writes and compiles files
PROGRAM = typer.main.get_command(app)

# of other programs, as pages name them
FOREIGN_OPTIONS = {"--use_fsdp", "--no-build-isolation", "--quiet"}
FOREIGN_PACKAGES = {
    "build", "dist/*.whl", "ipywidgets", "jupyterlab", "mamba_ssm", "peft", "pre-commit", "twine",
}  # fmt: skip
AUTHORS_OPTIONS = {  # docs/migration.md
    "--accumulation-steps", "--cfg", "--data-path", "--disable_amp", "--eval", "--model_ema_decay", "--pretrained",
    "--tag", "--throughput", "--use-checkpoint",
}  # fmt: skip

# as `evmamba evaluate` writes them
RESULTS = {
    "model": "my-model",
    "classes": 10,
    "dataset": "imagenet/val",
    "top1": 0.9,
    "top5": 1.0,
    "loss": 0.3,
} | dict.fromkeys(["dataset_id", "dataset_config", "dataset_split", "dataset_revision"])

# Options that make a command small enough for a test.
EXTRA_OPTIONS = {
    "train": "--epochs 1 --warmup-epochs 0 --num-workers 0 --batch-size 4 --augmentation-library pillow",
}


class Block(NamedTuple):
    """A code block of a page."""

    page: Path
    line: int  # of its first line of code, from 1
    language: str
    code: str
    runs: bool


class Command(NamedTuple):
    """A line of a shell block, with its continuation lines."""

    place: str  # file and line
    words: list[str]
    runs: bool


def read_page(page: Path) -> str:
    """Return a page's Markdown: for a notebook, its text cells, and the commands of each code cell as a block."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            source = "\n".join(["```", *re.findall(r"^ *[%!](.+)", source, re.MULTILINE), "```"])
        parts.append(source)
    return "\n\n".join(parts)


def read_tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(read_page(page))


def find_blocks(page: Path) -> list[Block]:
    blocks, runs = [], True
    for token in read_tokens(page):
        if token.type == "fence":
            blocks.append(Block(page, token.map[0] + 2, token.info, token.content, runs))
        runs = not (token.type == "html_block" and token.content.startswith("<!-- not run: "))
    return blocks


def find_commands(block: Block) -> list[Command]:
    commands, start, text = [], block.line, ""
    for number, line in enumerate(block.code.splitlines(), block.line):
        if not text:
            start = number
        text += line.removesuffix("\\")
        if not line.endswith("\\"):
            words = shlex.split(text, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\w+", words[0]):
                del words[0]
            if words:
                commands.append(Command(f"{block.page.name}:{start}", words, block.runs))
            text = ""
    return commands


BLOCKS = [block for page in ALL_PAGES for block in find_blocks(page)]
COMMANDS = [command for block in BLOCKS if block.language == "" for command in find_commands(block)]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def find_mentions(page: Path) -> list[str]:
    """Return the inline code of a page."""
    return [
        child.content for token in read_tokens(page) for child in token.children or [] if child.type == "code_inline"
    ]


@cache
def list_options() -> dict[str, set[str]]:
    """Return the options of every command."""
    return {
        name: {
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
            if option.startswith("--")
        }
        for name, command in PROGRAM.commands.items()
    }


def parse_evmamba(words: list[str]) -> None:
    """Parse a command. Raise the program's errors for unknown commands and options, and for invalid values."""
    with PROGRAM.make_context("evmamba", list(words)) as context:
        name, command, rest = PROGRAM.resolve_command(context, list(words))
        command.make_context(name, rest, parent=context)


@cache
def read_setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    return setup


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    requirements = [word for word in words[1:] if word not in FOREIGN_OPTIONS | FOREIGN_PACKAGES]
    assert len(words) > 1
    for requirement in requirements:
        check_requirement(requirement)


def check_requirement(requirement: str) -> None:
    name, extras = re.fullmatch(r"(\.|efficientvmamba)(?:\[([\w,]+)\])?(?: @ git\+URL)?", requirement).groups()
    assert name == "." or "@" in requirement  # not on PyPI yet
    assert set(filter(None, (extras or "").split(","))) <= set(read_setup()["options.extras_require"])


def check_make(words: list[str]) -> None:
    assert re.search(rf"^{words[0]}:.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)


def parse_script(main: Callable, words: list[str]) -> None:
    program = typer.Typer()
    program.command()(main)
    typer.main.get_command(program).make_context(main.__module__, list(words))


def check_source(words: list[str]) -> None:
    assert words == [".venv/bin/activate"]


SCRIPTS = {
    "examples/draw_shapes.py": draw_shapes.draw_shapes,
    "examples/object_detection.py": object_detection.main,
    "examples/semantic_segmentation.py": semantic_segmentation.main,
}


def check_python(words: list[str]) -> None:
    if words[0] in SCRIPTS:
        parse_script(SCRIPTS[words[0]], words[1:])
    elif words[:2] == ["-m", "training_evmamba.digits"]:
        parse_script(write_digits, words[2:])
    elif words[:2] in (["-m", "build"], ["-m", "http.server"], ["-m", "venv"]):
        return
    elif words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[2:] if "/" in word)
    else:
        check_script(words)


def check_script(words: list[str]) -> None:
    """Check that a script exists, and its source has the options."""
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in source, word


def check_launcher(words: list[str]) -> None:
    if script := next((word for word in words if word in SCRIPTS), None):
        parse_script(SCRIPTS[script], words[words.index(script) + 1 :])
    else:
        parse_evmamba(words[words.index("evmamba_hub.cli") + 1 :])


PROGRAMS = {
    "evmamba": parse_evmamba,
    "pip": check_pip,
    "make": check_make,
    "python": check_python,
    "source": check_source,
    "accelerate": check_launcher,
    "torchrun": check_launcher,
    "build/check/bin/pip": check_pip,
    "build/check/bin/evmamba": parse_evmamba,
} | dict.fromkeys(["git", "jupyter", "mkdir", "mv", "npm", "pre-commit", "rm", "tar", "twine"], lambda words: None)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.place)
def test_commands_are_understood(command):
    PROGRAMS[command.words[0]](command.words[1:])


def test_languages_of_blocks():
    """A block without a language holds commands."""
    assert {block.language for block in BLOCKS} <= {"", "python", "js", "text", "json", "bibtex"}


# Following a page


def why_not_run(words: list[str]) -> str | None:
    match words:
        case ["evmamba", "demo", *_]:
            return "serves until it is stopped"
        case ["evmamba", "republish", *_]:
            return "needs the authors' three checkpoints; test_republish.py runs it"
        case ["evmamba", "train", *_] if "imagenet" in words:
            return "needs ImageNet"
        case ["evmamba", "export", *_] if "aoti" in words:
            return "compiles for a minute; test_export.py runs it"
        case ["evmamba", "push-kernel", *_] if Version(huggingface_hub.__version__) < Version(OLDEST_CLIENT):
            return "needs a newer client of the Hub"
        case ["evmamba", "check-runtimes", _]:
            return "compiles for minutes; test_runtimes.py runs it"
        case ["evmamba", *_]:
            return None
    return "of another program"


def save_digits(folder: Path, names: list[str]) -> None:
    """Write an image folder that spreads the example digits over the classes."""
    for number, example in enumerate(find_examples()):
        path = folder / names[number % len(names)] / example.name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(example, path)


def save_small_model(folder: Path) -> None:
    """Write a classifier of both block types, which is exported in seconds, with the classes of the example digits."""
    config = EfficientVMambaConfig.from_pretrained(
        find_bundled_model(),
        hidden_sizes=[8, 16],
        depths=[1, 1],
        block_types=["evss", "inverted_residual"],
        out_features=["stage2"],
    )
    EfficientVMambaForImageClassification(config).save_pretrained(folder)
    shutil.copy(find_bundled_model() / "preprocessor_config.json", folder)


@pytest.fixture(scope="module")
def parquet_file() -> bytes:
    """Return a dataset of the example digits."""
    names = [path.stem[-1] for path in find_examples()]
    rows = {"image": [str(path) for path in find_examples()], "label": list(range(len(names)))}
    buffer = io.BytesIO()
    Dataset.from_dict(rows, Features({"image": Image(), "label": ClassLabel(names=names)})).to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tiny_checkpoint() -> bytes:
    """Write a checkpoint of the authors' smallest size, with both kinds of weights."""
    buffer = io.BytesIO()
    state_dict = {name: tensor.half() for name, tensor in original_state_dict("tiny", 11).items()}
    torch.save({"state_dict": state_dict, "state_dict_ema": state_dict}, buffer)
    return buffer.getvalue()


@pytest.fixture
def desk(tmp_path, monkeypatch, hub: HubServer, parquet_file, tiny_checkpoint) -> Path:
    """The directory of a reader, and the Hub, with all the files and repositories that the pages name."""
    shutil.copytree(find_bundled_model(), tmp_path / "demo" / "digits")
    shutil.copytree(find_examples()[0].parent, tmp_path / "demo" / "examples")
    for name in ("efficientvmamba-tiny", "my-model"):
        save_small_model(tmp_path / name)
    shutil.copytree(find_photographs()[0].parent, tmp_path / "demo" / "photographs")
    save_digits(tmp_path / "flowers", ["daisy", "tulip"])
    digits = [path.stem[-1] for path in find_examples()]
    for directory in ("digits/train", "digits/validation", "imagenet/val"):
        save_digits(tmp_path / directory, digits)
    (tmp_path / "checkpoint.pth.tar").write_bytes(tiny_checkpoint)
    small = original_state_dict("micro", seed=0)
    norms = {f"outnorm3.{name}": torch.ones(128) for name in ("weight", "bias")}
    backbone = {name: tensor for name, tensor in small.items() if not name.startswith("classifier.")} | norms
    torch.save(
        {"state_dict": {f"backbone.{name}": tensor for name, tensor in backbone.items()}}, tmp_path / "epoch_12.pth"
    )
    copies = {f"{copy}.{name}": tensor for copy in ("teacher", "student") for name, tensor in small.items()}
    torch.save({"state_dict": copies}, tmp_path / "last.ckpt")
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    tiny = "someone/efficientvmamba-tiny"
    hub.create(tiny, collect_model_files(find_bundled_model(), tiny))
    hub.create("TerryPei/EfficientVMamba-Tiny", {"efficient_vmamba_tiny.ckpt": tiny_checkpoint})
    hub.create("ILSVRC/imagenet-1k", {"data/validation.parquet": parquet_file}, kind="dataset")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(desk: Path, words: list[str]) -> None:
    _, name, *arguments = words
    if name == "convert" and not arguments[-1].startswith("someone/"):
        shutil.rmtree(desk / arguments[1], ignore_errors=True)  # that of other pages
    AcceleratorState._reset_state(reset_partial_state=True)  # of the command before, in this process
    ended = CliRunner().invoke(app, [name, *arguments, *EXTRA_OPTIONS.get(name, "").split()])
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    assert ended.exit_code == 0, ended.output


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page.name in SLOW_PAGES else [], id=page.name) for page in PAGES],
)
def test_a_reader_can_follow_the_page(page, desk):
    namespace = {"__name__": "page"}
    for block in find_blocks(page):
        if block.language == "":
            for command in find_commands(block):
                if command.runs and why_not_run(command.words) is None:
                    run_command(desk, command.words)
        elif block.language == "python" and block.runs:
            code = "\n" * (block.line - 1) + block.code  # a traceback then names the line of the page
            exec(compile(code, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_command_of_a_page_writes_over_the_result_of_another(page):
    outputs = []
    for block in find_blocks(page):
        for command in find_commands(block) if block.language == "" else []:
            match command.words:
                case ["evmamba", "convert" | "export", _, output, *_] if not output.startswith("--"):
                    outputs.append(output)
                case ["evmamba", "train", *words] | ["python", _, *words] if (
                    "--output-dir" in words and "--resume" not in words
                ):
                    outputs.append(words[words.index("--output-dir") + 1])
    assert len(set(outputs)) == len(outputs)


@pytest.fixture
def turned_image(tmp_path) -> Path:
    """Return a digit in transparent ink, stored turned, with the EXIF orientation that turns it upright."""
    digit = PIL.Image.open(find_examples()[7]).convert("L")
    ink = PIL.Image.merge("LA", [PIL.Image.new("L", digit.size), PIL.ImageOps.invert(digit)])
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    ink.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    return tmp_path / "turned.png"


def test_the_export_page_prepares_images_as_the_package_does(turned_image):
    (block,) = [each for each in BLOCKS if each.page.name == "export.md" and "def preprocess" in each.code]
    functions = [each for each in ast.parse(block.code).body if isinstance(each, ast.FunctionDef | ast.ImportFrom)]
    namespace = {"np": np}
    exec(compile(ast.Module(functions, []), block.page, "exec"), namespace)
    processor = BitImageProcessorPil.from_pretrained(find_bundled_model())
    expected = processor(read_image(turned_image), return_tensors="np").pixel_values
    np.testing.assert_allclose(namespace["preprocess"](turned_image, processor.to_dict()), expected, atol=1e-6)


def test_pages_and_cards_turn_the_images_that_they_open():
    texts = [page.read_text(encoding="utf-8") for page in [*PAGES, find_bundled_model() / "README.md", TEMPLATE]]
    assert sum(text.count("exif_transpose(Image.open(") for text in texts) >= 3
    for text in texts:
        assert not re.search(r"(?<!exif_transpose\()Image\.open\(", text)


# Names


@cache
def list_options_of_benchmarks() -> set[str]:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")]
    return {option for source in sources for option in re.findall(r'"(--[a-z][\w-]*)"', source)}


@cache
def list_options_of_scripts() -> set[str]:
    parameters = [each for main in SCRIPTS.values() for each in inspect.signature(main).parameters]
    return {f"--{name.replace('_', '-')}" for name in parameters}


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_options_that_are_mentioned_exist(page):
    known = set().union(*list_options().values()) | FOREIGN_OPTIONS
    if page.name == "migration.md":
        known |= AUTHORS_OPTIONS
    if page in DEVELOPER_PAGES:
        known |= list_options_of_benchmarks()
    if page.name in ("dense_tasks.md", "troubleshooting.md"):
        known |= list_options_of_scripts()
    for mention in find_mentions(page):
        if mention.startswith("python "):
            check_python(mention.split()[1:])
        options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", mention))
        if match := re.match(r"evmamba (\S+)", mention):
            assert options <= list_options()[match[1]] | {"--help"}, mention
        elif not mention.startswith(("accelerate ", "pip ")):
            assert options <= known, mention


def test_every_command_and_option_is_documented():
    mentions = "\n".join(mention for page in PAGES for mention in find_mentions(page))
    text = mentions + "\n" + "\n".join(" ".join(command.words) for command in COMMANDS)
    words = set(re.findall(r"--[a-z][\w-]*", text))
    for name, options in list_options().items():
        assert f"evmamba {name}" in text
        negations = {option for option in options if f"--{option.removeprefix('--no-')}" in options}
        assert not options - negations - words, name


def test_every_value_of_a_recipe_is_in_the_table():
    mentions = find_mentions(ROOT / "docs" / "training.md")
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in mentions
    assert set(list_presets()) <= set(mentions)


def test_values_of_the_presets_are_those_of_the_recipes():
    """The table has all values that differ between presets, except those of the data, the network and its images."""
    heading, *rows = find_tables(ROOT / "docs" / "training.md", "Recipes")[1]
    assert sorted(", ".join(heading[1:]).split(", ")) == list_presets()
    presets = [load_recipe(name, {}) for name in list_presets()]
    names = [row[0].removeprefix("--").replace("-", "_") for row in rows]
    left_out = {"network", "variant", "dataset", "image_size", "image_mean", "image_std", "crop_pct"}
    left_out |= {"num_workers", "augmentation_library"}
    differing = {name for name in vars(presets[0]) if len({str(getattr(each, name)) for each in presets}) > 1}
    assert set(names) == differing - left_out
    for name, row in zip(names, rows, strict=True):
        for cell, title in zip(row[1:], heading[1:], strict=True):
            value = [float(part) for part in cell.split()] if " " in cell else cell
            for preset in title.split(", "):
                assert load_recipe(preset, {name: value}) == load_recipe(preset, {}), (name, preset)
    of_files, of_tiny = create_recipe({}), load_recipe("tiny", {})
    assert {name for name in names if getattr(of_files, name) != getattr(of_tiny, name)} == {"mixed_precision"}
    assert of_files.mixed_precision == "no"


def test_every_runtime_is_in_the_table():
    rows = find_tables(ROOT / "docs" / "export.md", "Compare the runtimes")[0][1:]
    assert {row[0] for row in rows} == set(RUNTIMES)


def test_every_extra_is_in_the_table():
    mentions = find_mentions(ROOT / "docs" / "installation.md")
    assert set(read_setup()["options.extras_require"]) <= set(mentions)


def test_every_name_of_the_authors_is_in_the_table():
    text = "\n".join(find_mentions(ROOT / "docs" / "migration.md"))
    for ours, theirs in (MODULE_NAMES | BLOCK_NAMES).items():
        if ours not in ("mixer.", "mixer.dt_proj_"):  # stand for several tensors
            assert ours.rstrip(".") in text and theirs.rstrip(".") in text, ours


def test_tables_of_versions_are_those_of_the_files():
    text = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \w+ \| (3\.\d+) \| ([\d.]+) \| ([\d.]+) \| `(constraints[\w-]*\.txt)`", text, re.MULTILINE)
    assert len(rows) == 3
    for _, pytorch, transformers, file in rows:
        pins = (ROOT / file).read_text().splitlines()
        assert {f"torch=={pytorch}", f"transformers=={transformers}"} <= set(pins)
    bounds = dict(re.findall(r"^    ([\w-]+)>=([\d.]+)", (ROOT / "setup.cfg").read_text(), re.MULTILINE))
    named = re.findall(
        r"\b([a-z][a-z_-]+) (\d[\d.]*\d)", text.partition("| feature | needs |")[2].partition("\n\n")[0]
    )
    assert len(named) > 8
    for package, version in named:
        if package not in ("transformers", "huggingface_hub"):  # newer than the core
            assert bounds[package] == version, package


@pytest.mark.parametrize("page", ["README.md", "docs/installation.md"])
def test_versions_are_those_of_setup(page):
    text, options = (ROOT / page).read_text(encoding="utf-8"), read_setup()["options"]
    assert set(re.findall(r"(?<=Python )3\.\d+", text)) == {options["python_requires"].removeprefix(">=")}
    for name, package in (("PyTorch", "torch"), ("transformers", "transformers")):
        (oldest,) = re.findall(rf"^{package}>=(\S+)", options["install_requires"], re.MULTILINE)
        assert set(re.findall(rf"(?<={name} )\d+\.\d+(?= or newer)", text)) <= {oldest}


@cache
def read_messages() -> list[str]:
    """Return the strings in the code of the packages, with `...` in place of values."""
    texts = []
    for folder in ("modeling_evmamba", "kernels", "hub_scripts", "training_evmamba", "demo", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [each.value if isinstance(each, ast.Constant) else "..." for each in node.values]
                    texts.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return texts


def find_quoted_messages() -> list[str]:
    tokens = read_tokens(ROOT / "docs" / "troubleshooting.md")
    headings = [tokens[index + 1] for index, token in enumerate(tokens) if token.type == "heading_open"]
    return [each.children[0].content for each in headings if each.children[0].type == "code_inline"]


FOREIGN_MESSAGES = ("No matching distribution", "Failed to load", "out of memory")


@pytest.mark.parametrize(
    "message", [each for each in find_quoted_messages() if not each.startswith(FOREIGN_MESSAGES)], ids=str
)
def test_messages_are_quoted_as_they_are(message):
    pieces = [piece.strip() for piece in re.split(r"\.\.\.", message)]
    pattern = ".*".join(re.escape(piece) for piece in pieces)
    assert any(re.search(pattern, text, re.DOTALL) for text in read_messages())


@cache
def read_names_of_tests() -> set[str]:
    return {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }


FOLDERS = "benchmarks|demo|docs|examples|hub_scripts|kernels|modeling_evmamba|tests|training_evmamba"


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_paths_and_tests_that_are_mentioned_exist(page):
    for mention in find_mentions(page):
        if re.match(rf"({FOLDERS})/", mention) and "<" not in mention:
            assert (ROOT / mention).exists(), mention
        elif re.fullmatch(r"test_\w+", mention):
            assert mention in read_names_of_tests(), mention
        elif match := re.fullmatch(r"make ([\w-]+)", mention):
            check_make([match[1]])


@cache
def list_anchors(page: Path) -> set[str]:
    tokens = read_tokens(page)
    headings = [tokens[index + 1].content for index, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    text = read_page(page)
    links = re.findall(r"(?<=\]\()[^)\s]+(?=\))|(?<=src=\")[^\"]+|(?<=srcset=\")[^\"]+", text)
    for link in links:
        path, _, anchor = link.partition("#")
        if ":" not in link:
            target = (page.parent / path) if path else page
            assert target.exists(), link
            assert not anchor or anchor in list_anchors(target), link


# Figures


def find_tables(page: Path, heading: str = "") -> list[list[list[str]]]:
    """Return the cells of the tables below a heading, or of the whole page, as plain text."""
    tables, is_below = [], not heading
    tokens = read_tokens(page)
    for index, token in enumerate(tokens):
        if token.type == "heading_open" and heading:
            is_below = tokens[index + 1].content == heading
        elif token.type == "table_open" and is_below:
            tables.append([])
        elif token.type == "tr_open" and is_below:
            tables[-1].append([])
        elif token.type == "inline" and is_below and tokens[index - 1].type in ("td_open", "th_open"):
            tables[-1][-1].append("".join(child.content for child in token.children))
    return tables


CONSTANTS = [row for row in find_tables(ROOT / "benchmarks" / "NOTES.md", "Constants")[0][1:] if ":" not in row[0]]


@pytest.mark.parametrize("name, file, value, source", CONSTANTS, ids=lambda cell: cell if cell.isupper() else "")
def test_constants_of_the_notes_are_those_of_the_code(name, file, value, source):
    path = Path(file) if "/" in file else Path("kernels", "evmamba_kernels", file)
    assert (ROOT / path).is_file()
    reason = "needs the package or the hardware of this backend"
    module = pytest.importorskip(f"{path.parent.name}.{path.stem}", reason=reason, exc_type=ImportError)
    assert getattr(module, name) == float(value)


def read_csv(name: str) -> list[dict[str, str]]:
    lines = (ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


Cell = str | float | tuple[float, ...]  # the text of a cell, or the figures that its text rounds


def expect_operator() -> list[list[Cell]]:
    rows: dict[tuple[str, str], list[Cell]] = {}
    for row in read_csv("operator.csv"):
        figures = float(row["median ms"]), float(row["plain / this"])
        cell = figures[0] if row["method"] == "plain recurrence" else figures
        rows.setdefault((row["shape"].replace("x", " x "), row["pass"]), []).append(cell)
    return [[*key, *cells] for key, cells in rows.items()]


def expect_operator_scaling() -> list[list[Cell]]:
    rows: dict[str, list[Cell]] = {}
    for row in read_csv("operator_scaling.csv"):
        if row["method"] == "torch":
            continue  # in the file alone
        shape = row["shape"].removeprefix("1x").replace("x", " x ")
        rows.setdefault(shape, []).extend([float(row["ns per pixel"]), float(row["peak MiB"])])
    return [[shape, *cells] for shape, cells in rows.items()]


def is_ours(row: dict[str, str]) -> bool:
    return row["from"] == "this package"


def expect_fastest() -> list[list[Cell]]:
    fastest: dict[str, dict[str, str]] = {}
    for row in read_csv("model_batch_1.csv"):
        best = fastest.setdefault(row["network"], row)
        if not row["failure"] and float(row["median ms"]) < float(best["median ms"]):
            fastest[row["network"]] = row
    return [
        [
            name,
            row["runtime"],
            row["image"],
            float(row["median ms"]),
            (float(row["lower quartile ms"]), float(row["upper quartile ms"])),
            float(row["images/s"]),
        ]
        for name, row in fastest.items()
    ]


def expect_medians(file: str, belongs: Callable[[dict[str, str]], bool]) -> list[list[Cell]]:
    cells: dict[str, list[Cell]] = {}
    for row in filter(belongs, read_csv(file)):
        cell = "fails" if row["failure"] else float(row["median ms"])
        cells.setdefault(row["network"], [row["network"]]).append(cell)
    return list(cells.values())


def expect_others() -> list[list[Cell]]:
    return expect_medians("model_batch_1.csv", lambda row: not is_ours(row))


def expect_ours() -> list[list[Cell]]:
    return expect_medians("model_batch_1.csv", is_ours)


def expect_serving() -> list[list[Cell]]:
    rows: dict[tuple[str, ...], list[Cell]] = {}
    for row in read_csv("serving.csv"):
        key = row["network"], row["workers"], row["threads"], row["neighbors"]
        rows.setdefault(key, []).append((float(row["images/s"]), float(row["95 % ms"])))
    return [[*key, *cells] for key, cells in rows.items()]


def expect_image_sizes() -> list[list[Cell]]:
    figures = ("median ms", "ns per pixel", "peak MiB")
    return [
        [row["network"], row["backend"], f"{row['image']} x {row['image']}", *(float(row[name]) for name in figures)]
        for row in read_csv("model_image_sizes.csv")
    ]


def expect_dense(file: str) -> list[list[Cell]]:
    figures = ("median ms", "/ Swin-T", "/ ResNet-50", "ns per pixel", "peak MiB")
    return [
        [row["backbone"], row["image"].replace("x", " x "), *(float(row[name]) for name in figures)]
        for row in read_csv(file)
    ]


def expect_rt_detr() -> list[list[Cell]]:
    return expect_dense("dense_rt_detr.csv")


def expect_upernet() -> list[list[Cell]]:
    return expect_dense("dense_upernet.csv")


def expect_starts() -> list[list[Cell]]:
    runs: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read_csv("starts.csv"):
        runs.setdefault((row["task"], row["start"]), []).append(row)
    cells: list[list[Cell]] = []
    for (task, start), group in runs.items():
        assert [row["seed"] for row in group] == ["0", "1", "2"]
        figures: list[Cell] = []
        for moment in ("halfway", "end"):
            values = [100 * float(row[moment]) for row in group]
            figures += [fmean(values), (min(values), max(values))]
        cells.append([task, start, *figures])
    return cells


def expect_differences() -> list[list[Cell]]:
    rows: dict[str, list[Cell]] = {}
    for row in read_csv("runtimes.csv"):
        rows.setdefault(row["runtime"], [row["runtime"]]).append(float(row["largest difference"]))
    return list(rows.values())


def expect_dtype_differences() -> list[list[Cell]]:
    return [
        [
            f"EfficientVMamba-{row['network'][0].upper()}",
            row["dtype"],
            float(row["largest difference"]),
            float(row["mean difference"]),
            row["same first class"],
        ]
        for row in read_csv("dtype_differences.csv")
    ]


def expect_dtype_digits() -> list[list[Cell]]:
    return [[row["dtype"], row["correct"]] for row in read_csv("dtype_digits.csv")]


def expect_latencies() -> list[list[Cell]]:
    rows: dict[str, list[Cell]] = {}
    for row in read_csv("runtimes.csv"):
        figures = float(row["median ms"]), float(row["/ PyTorch"])
        cell = figures[0] if row["runtime"] == "PyTorch" else figures
        rows.setdefault(row["runtime"], [row["runtime"]]).append(cell)
    return list(rows.values())


def expect_digits() -> list[list[Cell]]:
    rows = read_csv("runtimes_digits.csv")
    return [[row["runtime"], row["correct"], float(row["largest difference"])] for row in rows]


def expect_browser() -> list[list[Cell]]:
    rows: dict[tuple[str, str], list[Cell]] = {}
    for row in read_csv("browser.csv"):
        figures = float(row["ms"]), float(row["min"]), float(row["max"])
        rows.setdefault((row["network"], row["dtype"]), []).append(figures)
    return [[*key, *cells] for key, cells in rows.items()]


def expect_ablations() -> list[list[Cell]]:
    rows: dict[str, list[dict[str, str]]] = {}
    for row in read_csv("ablations.csv"):
        rows.setdefault(row["network"], []).append(row)
    cells = []
    for network, runs in rows.items():
        accuracies = [float(run["held-out accuracy %"]) for run in runs]
        seconds = [float(run["seconds"]) for run in runs]
        spread = min(accuracies), max(accuracies)
        cells.append([network, float(runs[0]["parameters"]), fmean(accuracies), spread, fmean(seconds)])
    return cells


def expect_gpu_scan() -> list[list[Cell]]:
    rows: dict[tuple[str, str], list[Cell]] = {}
    for file in ("operator_cuda.csv", "operator_cuda_bfloat16.csv"):
        for row in read_csv(file):
            if row["method"] == "triton":
                figures = float(row["median ms"]), float(row["torch / this"])
                key = row["shape"].replace("x", " x "), row["pass"]
                rows.setdefault(key, []).extend([figures, float(row["peak MiB"])])
    return [[*key, *cells] for key, cells in rows.items()]


def expect_registers() -> list[list[Cell]]:
    rows: dict[str, list[Cell]] = {}
    for version in ("3.6", "3.8", "3.9"):
        reports = [row for row in read_csv(f"triton_report_{version}.csv") if row["dtype"] == "fp32"]
        for kernel, targets in groupby(reports, itemgetter("kernel")):
            rows.setdefault(kernel, [kernel]).append(tuple(float(row["registers"]) for row in targets))
    return list(rows.values())


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")
TABLES = [
    ("The scan on CPUs", 0, expect_operator),
    ("Growing feature maps", 0, expect_operator_scaling),
    ("The networks on CPUs", 0, expect_fastest),
    ("The networks on CPUs", 1, expect_others),
    ("The networks on CPUs", 2, expect_ours),
    ("Lower precision on CPUs", 0, expect_dtype_differences),
    ("Lower precision on CPUs", 1, expect_dtype_digits),
    ("Servers on CPUs", 0, expect_serving),
    ("Growing images", 0, expect_image_sizes),
    ("Runtimes on CPUs", 0, expect_latencies),
    ("Runtimes on CPUs", 1, expect_differences),
    ("Runtimes on CPUs", 2, expect_digits),
    ("In the browser", 0, expect_browser),
    ("Segmentation and detection on CPUs", 0, expect_rt_detr),
    ("Segmentation and detection on CPUs", 1, expect_upernet),
    ("Starts of dense models", 0, expect_starts),
    ("Ablations", 0, expect_ablations),
    ("The scan on a GPU", 0, expect_gpu_scan),
    ("GPUs", 0, expect_registers),
]


def is_rounded(text: str, value: float) -> bool:
    """Return whether a number is the value, rounded to the number's last digit. The CSV files have six digits."""
    number = Decimal(text.replace(",", ""))
    unit = 10.0 ** number.as_tuple().exponent
    return abs(float(number) - value) <= unit / 2 + 1e-5 * abs(value)


def agrees(cell: str, expected: Cell) -> bool:
    if isinstance(expected, str):
        return cell == expected
    values = expected if isinstance(expected, tuple) else (expected,)
    numbers = NUMBER.findall(cell)
    return len(numbers) == len(values) and all(map(is_rounded, numbers, values))


@pytest.mark.parametrize("heading, number, expect", TABLES, ids=lambda value: getattr(value, "__name__", ""))
def test_tables_of_the_results_are_the_measured_figures(heading, number, expect):
    _, *table = find_tables(ROOT / "benchmarks" / "RESULTS.md", heading)[number]
    if expect is expect_ablations:
        for cells in table:
            del cells[1]  # the stages, which are no figure
    check_table(table, expect())


@pytest.mark.parametrize(
    "number, constant, measured",
    [
        (0, "forward_tile", ["forward ms"]),
        (1, "backward_tile", ["backward ms"]),
        (2, "precision", ["forward ms", "backward ms"]),
    ],
)
def test_tables_of_the_notes_are_the_figures_of_the_h200(number, constant, measured):
    rows: dict[str, list[Cell]] = {}
    for row in read_csv(f"triton_{constant}_cuda.csv"):
        if row["shape"].startswith("128x"):
            rows.setdefault(row["value"], []).append(tuple(float(row[name]) for name in measured))
    expected = {", ".join(re.findall(r"= (\w+)", name)): cells for name, cells in rows.items()}
    _, *table = find_tables(ROOT / "benchmarks" / "NOTES.md", "Measured on an H200")[number]
    found = {"" if "committed" in name else name.replace('"', ""): cells for name, *cells in table}
    check_table(*([[name, *cells] for name, cells in sorted(rows.items())] for rows in (found, expected)))


def test_results_have_every_runtime_of_the_command():
    """Those on an accelerator are no runtimes of a CPU."""
    for runtime, *networks in expect_latencies():
        assert len(networks) == 3, runtime
    assert {row[0] for row in expect_latencies()} == set(RUNTIMES) - {"PyTorch, accelerator"}


@pytest.mark.parametrize("version", ["3.6", "3.8", "3.9"])
def test_nothing_spills_and_lanes_agree_in_the_reports(version):
    reports = read_csv(f"triton_report_{version}.csv")
    assert {row["dtype"] for row in reports} == {"fp32", "bf16"}
    assert all(row["spilled"] == row["unequal"] == "0" for row in reports)


def test_table_of_servers_has_the_measured_figures():
    heading, *table = find_tables(ROOT / "docs" / "performance.md", "Set up a server")[0]
    expected = [cells[1:6] for cells in expect_serving() if cells[0] == "EfficientVMamba-T, optimized"]
    assert heading[3:] == list(dict.fromkeys(row["setting"] for row in read_csv("serving.csv")))[:2]
    check_table(table, expected)


def check_table(table: list[list[str]], expected: list[list[Cell]]) -> None:
    assert len(table) == len(expected)
    for cells, expected_cells in zip(table, expected, strict=True):
        assert len(cells) == len(expected_cells)
        for cell, expected_cell in zip(cells, expected_cells, strict=True):
            assert agrees(cell, expected_cell), (cells[0], cell, expected_cell)


def test_a_changed_figure_does_not_agree():
    assert agrees("0.8358 (35.0)", (0.835784, 35.0186)) and agrees("2.3e-06", 2.26498e-06) and agrees("47,621", 47621)
    assert not agrees("0.8359 (35.0)", (0.835784, 35.0186))
    assert not agrees("2.4e-06", 2.26498e-06)
    assert not agrees("0.8358", (0.835784, 35.0186))
