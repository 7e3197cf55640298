"""`evmamba push-space` with a small Space."""

from pathlib import Path

import pytest
import yaml

from evmamba_hub.publish.push_space import MODEL_VARIABLE, find_packages
from hub_server import USERS


SPACE, MODEL = "someone/space", "someone/model"
CARD = "---\ntitle: Demonstration\nsdk: gradio\napp_file: app.py\n---\n\n# Demonstration\n"


@pytest.fixture
def demo(tmp_path) -> Path:
    contents = {
        "app.py": "import gradio",
        "README.md": CARD,
        "requirements.txt": "gradio\n",
        "examples/0.png": "no image",
        "__pycache__/app.cpython-311.pyc": "",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def push_space(evmamba, folder: Path, *options: str, space: str = SPACE, model: str = MODEL) -> tuple[int, str, str]:
    result = evmamba("push-space", space, "--model", model, "--folder", folder, *options)
    assert not any(token in result[1] + result[2] for token in USERS)
    return result


def test_what_arrives(evmamba, hub, demo):
    code, out, err = push_space(evmamba, demo, "--private")
    assert code == 0, err
    repo = hub.repos["space", SPACE]
    assert (repo.sdk, repo.private, len(repo.history)) == ("gradio", True, 2)
    assert repo.variables == {MODEL_VARIABLE: MODEL}
    assert f"{hub.endpoint}/" in out
    files = repo.files()
    packages = find_packages()
    assert {"evmamba_hub/publish/data/model_card.md", "modeling_evmamba/__init__.py"} < packages.keys()
    own = {".gitattributes", "app.py", "README.md", "requirements.txt", "examples/0.png"}
    assert files.keys() == own | packages.keys()
    assert all(files[name] == path.read_bytes() for name, path in packages.items())
    for name in ("app.py", "requirements.txt", "examples/0.png"):
        assert files[name] == (demo / name).read_bytes()
    _, front_matter, text = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front_matter) == {**yaml.safe_load(CARD.split("---\n")[1]), "models": [MODEL]}
    assert text == CARD.split("---\n", 2)[2]
    assert (demo / "README.md").read_text() == CARD


def test_again_and_with_another_model(evmamba, hub, demo):
    assert push_space(evmamba, demo)[0] == 0
    assert "no commit was made" in push_space(evmamba, demo)[1]
    assert push_space(evmamba, demo, model="else/model")[0] == 0
    repo = hub.repos["space", SPACE]
    assert len(repo.history) == 3 and repo.variables == {MODEL_VARIABLE: "else/model"}


def test_metadata_of_an_own_card_stay(evmamba, hub, demo):
    card = "---\nlanguage: no   # Norwegian\nsdk:  gradio\nmodels:\n-   else/model\n---\nText\n"
    (demo / "README.md").write_text(card)
    assert push_space(evmamba, demo)[0] == 0
    repo = hub.repos["space", SPACE]
    assert repo.files()["README.md"].decode() == card.replace("-   else/model\n", f"-   else/model\n- {MODEL}\n")
    (demo / "README.md").write_text(card.replace("else/model", MODEL))
    assert push_space(evmamba, demo)[0] == 0
    assert repo.files()["README.md"] == (demo / "README.md").read_bytes()


def test_a_file_in_the_place_of_the_model(evmamba, hub, demo):
    code, _, err = push_space(evmamba, demo, model=str(demo / "app.py"))
    assert code == 1 and "is a file: upload its model with `evmamba push`" in err


def test_dry_run(evmamba, hub, demo, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, out, _ = push_space(evmamba, demo, "--dry-run")
    assert code == 0 and "examples/0.png" in out and f"- {MODEL}" in out
    assert hub.requests == []


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("app.py", None, "holds no app.py"),
        ("README.md", None, "holds no README.md"),
        ("README.md", "---\nsdk: static\n---\n", "must say `sdk: gradio`, got 'static'"),
        ("README.md", "No metadata", "must say `sdk: gradio`, got None"),
        ("README.md", "---\n- 1\n---\n", "cannot be read"),
    ],
)
def test_folders_that_are_no_space(evmamba, hub, demo, name, content, message):
    (demo / name).unlink() if content is None else (demo / name).write_text(content)
    code, _, err = push_space(evmamba, demo)
    assert code == 1 and message in err
    assert hub.requests == []


def test_wrong_repositories(evmamba, hub, demo):
    hub.create(SPACE)
    for options, message in [
        ({}, "is a model on the Hub, not a space"),
        ({"space": "a b"}, "is not a valid repository id"),
        ({"model": "nobody"}, "names no owner"),
        ({"model": str(demo)}, f"'{demo}' is not a valid repository id: give user/name"),  # although it is a path
        ({"space": "else/space"}, "no permission"),
    ]:
        code, _, err = push_space(evmamba, demo, **options)
        assert code == 1 and message in err, options
