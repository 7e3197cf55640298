"""The endpoints of the running Space through `gradio_client`, and rejected input."""

import configparser
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from gradio_client import Client, handle_file
from PIL import Image

from evmamba_demo.bundled import find_bundled_model, find_photographs
from evmamba_demo.models import MAX_SQUARES, Models, read_picture
from evmamba_hub.errors import UserError


ROOT = Path(__file__).parents[2]
PHOTOGRAPHS = ROOT / "demo" / "photographs"
EXAMPLE = ROOT / "demo" / "examples" / "digit_3.png"
ENDPOINTS = {"/classify", "/activation_map", "/scan_paths", "/receptive_field", "/compare", "/measure"}


@pytest.fixture(scope="module")
def client(space) -> Client:
    return Client(space.url, verbose=False)


def classify(client: Client, path: Path) -> list[str]:
    labels, _, _ = client.predict(handle_file(path), api_name="/classify")
    return [entry["label"] for entry in labels["confidences"]]


# The program of the Space without its server. It prints the paths of its modules, and other importable packages.
ORIGINS = """
import json, sys
from importlib.metadata import distributions
from importlib.util import find_spec
import app

ours = ("app", "evmamba_", "modeling_evmamba", "training_evmamba")
print(json.dumps({
    "files": [module.__file__ for name, module in sys.modules.items() if name.startswith(ours)],
    "packages": sorted({name.partition(".")[0] for name in sys.modules if name.startswith(ours)}),
    "others": [name for name in ("training_evmamba", "evmamba_hub.cli") if find_spec(name)],
    "distributions": [each.name for each in distributions() if each.name == "efficientvmamba"],
}))
"""


def test_everything_comes_from_the_space(space):
    folder = space.folder
    variables = {"PATH": os.environ["PATH"], "HOME": str(space.python.parents[1]), "PYTHONPATH": str(folder)}
    completed = subprocess.run(
        [space.python, "-c", ORIGINS], cwd=folder, env=variables, capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == 0, completed.stderr
    found = json.loads(completed.stdout.splitlines()[-1])
    assert all(Path(file).is_relative_to(folder) for file in found["files"])
    assert found["packages"] == ["app", "evmamba_demo", "evmamba_hub", "evmamba_kernels", "modeling_evmamba"]
    assert found["others"] == found["distributions"] == []


def test_endpoints_are_named_and_described(client):
    page = (ROOT / "docs" / "demo.md").read_text()
    endpoints = client.view_api(return_format="dict", print_info=False)
    assert endpoints["named_endpoints"].keys() == ENDPOINTS and not endpoints["unnamed_endpoints"]
    assert all(f"`{endpoint}`" in page for endpoint in ENDPOINTS)


def test_every_endpoint_answers(client):
    picture = handle_file(EXAMPLE)
    labels, preview, timing = client.predict(picture, api_name="/classify")
    scores = [entry["confidence"] for entry in labels["confidences"]]
    assert labels["label"] == "3" and len(scores) == 5 and 1 >= scores[0] == max(scores) > 0.5
    assert Image.open(preview).size == (448, 448)
    assert "32 x 32 pixels" in timing and " ms" in timing and "backend" in timing

    for stage, expected in [(4, "is exact"), (1, "Grad-CAM")]:
        view, how = client.predict(picture, "3", stage, 60, api_name="/activation_map")
        assert Image.open(view).size == (448, 448) and expected in how and "“3”" in how
    assert "16 x 16 cells" in client.predict(picture, 1, 50, api_name="/scan_paths")[1]
    assert "no scan" in client.predict(picture, 4, 50, api_name="/scan_paths")[1]
    assert "ringed cell of stage 2" in client.predict(picture, 2, 50, 50, api_name="/receptive_field")[1]
    first, second, agreement = client.predict(picture, "shown", "digits", api_name="/compare")
    assert first == second and agreement.startswith("Both say “3”")
    _, table = client.predict(api_name="/measure")
    assert [row[0] for row in table["data"]] == [64, 128, 192, 256, 320, 384, 448]
    assert all(side * side == pixels and milliseconds > 0 for side, pixels, milliseconds in table["data"])


def test_no_picture(client):
    assert client.predict(None, api_name="/classify")[2].startswith("Give a picture first")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("cat", 4, 60), "knows no class"),
        (("3", 1.5, 60), "stages 1 to 4"),
        (("3", 99, 60), "maximum value 4"),
        (("3", 4, -1), "minimum value 0"),
    ],
)
def test_wrong_values_are_explained(client, arguments, message):
    with pytest.raises(Exception, match=message):
        client.predict(handle_file(EXAMPLE), *arguments, api_name="/activation_map")


def save_variants(folder: Path) -> None:
    digit = Image.open(EXAMPLE).convert("L")
    digit.convert("CMYK").save(folder / "cmyk.tiff")
    digit.convert("CMYK").save(folder / "cmyk.jpg")
    digit.convert("1").save(folder / "bilevel.bmp")
    deep = digit.convert("I").point(lambda value: value * 257)
    deep.convert("I;16").save(folder / "deep.png")
    clear = digit.convert("P")
    clear.save(folder / "palette.gif", transparency=255)
    clear.save(folder / "palette.png", transparency=255)
    digit.convert("LA").save(folder / "grey-alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    digit.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif)
    white = Image.new("L", digit.size, "white")
    digit.save(folder / "animated.gif", save_all=True, append_images=[white, white])
    digit.save(folder / "animated.webp", save_all=True, append_images=[white, white])


def test_every_kind_of_image_is_read_as_a_person_sees_it(client, tmp_path):
    save_variants(tmp_path)
    found = {path.name: classify(client, path)[0] for path in sorted(tmp_path.iterdir())}
    assert found == dict.fromkeys(found, "3") and len(found) == 10


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000)])
def test_extreme_sizes(client, tmp_path, size):
    Image.new("RGB", size, "white").save(tmp_path / "extreme.png")
    assert len(classify(client, tmp_path / "extreme.png")) == 5


def test_long_images_keep_their_middle(tmp_path):
    image = Image.new("RGB", (1001, 10), "white")
    image.putpixel((500, 5), (255, 0, 0))
    image.save(tmp_path / "long.png")
    middle = read_picture(tmp_path / "long.png")
    assert middle.size in {(10 * MAX_SQUARES, 10), (10 * MAX_SQUARES + 1, 10)}
    assert middle.getpixel((middle.width // 2, 5)) == (255, 0, 0)


def png(width: int, height: int) -> bytes:
    """Return a small file whose header states a large image."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no image", "not an image in a format that Pillow reads"),
        (b"", "not an image"),
        (EXAMPLE.read_bytes()[:400], "cannot be decoded"),
        (png(100_000, 100_000), "decompression bomb"),
        (png(9_000, 9_000), "at most 64,000,000"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    ],
    ids=["text", "empty", "cut", "bomb", "large", "svg"],
)
def test_broken_files_are_explained_and_the_next_request_works(client, space, tmp_path, content, message):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(Exception, match=message) as error:
        classify(client, tmp_path / "broken.png")
    assert str(tmp_path) not in str(error.value) and "uploads" not in str(error.value)
    assert classify(client, EXAMPLE)[0] == "3"


def test_large_uploads_are_refused(client, space, tmp_path):
    answer = httpx.post(f"{space.url}/gradio_api/upload", files={"files": ("large.png", bytes(21 << 20))}, timeout=60)
    assert answer.status_code == 413
    assert classify(client, EXAMPLE)[0] == "3"


def call(space, endpoint: str, data: list) -> str:
    """Return the raw response of an endpoint, without the client's processing."""
    answer = httpx.post(f"{space.url}/gradio_api/call/{endpoint}", json={"data": data}, timeout=60)
    if answer.status_code != 200:
        return f"event: error {answer.text}"
    event = answer.json()["event_id"]
    return httpx.get(f"{space.url}/gradio_api/call/{endpoint}/{event}", timeout=60).text


def test_files_outside_the_upload_cache_cannot_be_read(space, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(EXAMPLE.read_bytes())
    beside = space.folder / "examples" / "digit_3.png"
    for path in [secret, beside, "/etc/passwd", f"../../../../../../..{secret}"]:
        answer = call(space, "classify", [{"path": str(path), "meta": {"_type": "gradio.FileData"}}])
        assert "event: error" in answer and "confidence" not in answer, path
        for url in (f"/gradio_api/file={path}", f"/gradio_api/file=/../..{path}", f"/file={path}"):
            assert httpx.get(space.url + url).status_code in (403, 404), url
    for data in [str(secret), {"path": str(secret)}, {"path": str(secret), "url": "data:image/png;base64,AAAA"}]:
        assert "confidence" not in call(space, "classify", [data]), data


def test_drawings_cannot_name_files(space, tmp_path):
    """Call the function of the button under the drawing, as the page does."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(EXAMPLE.read_bytes())
    functions = httpx.get(f"{space.url}/config", timeout=60).json()["dependencies"]
    (index,) = [function["id"] for function in functions if function["api_name"].startswith("take_drawing")]
    for file in [{"path": str(secret)}, {"path": str(secret), "meta": {"_type": "gradio.FileData"}}]:
        drawing = {"background": file, "layers": [], "composite": file}
        request = {"data": [drawing], "fn_index": index, "session_hash": "forged"}
        httpx.post(f"{space.url}/gradio_api/queue/join", json=request, timeout=60)
        answer = ""
        with httpx.stream("GET", f"{space.url}/gradio_api/queue/data?session_hash=forged", timeout=60) as stream:
            for line in stream.iter_lines():
                answer += line
                if "process_completed" in line or "unexpected_error" in line:
                    break
        assert '"success":false' in answer or "unexpected_error" in answer, answer
        assert '"success":true' not in answer and "/file=" not in answer


def test_visitors_cannot_name_models(client, space, tmp_path):
    for name in (str(find_bundled_model()), "someone/model", str(tmp_path)):
        with pytest.raises(Exception, match="not in the list of choices"):
            client.predict(handle_file(EXAMPLE), name, "digits", api_name="/compare")


def test_models_that_may_be_loaded(tmp_path):
    digits = str(find_bundled_model())
    with pytest.raises(UserError, match="not among the models"):
        Models([digits], allow_any=False).load(digits)
    models = Models([digits], allow_any=True)
    assert models.load(digits) is models.load("digits") is models.shown
    with pytest.raises(UserError, match="nowhere"):
        models.load(str(tmp_path / "nowhere"))


def resident(pid: int) -> int:
    """Return the memory of a process in MB."""
    (line,) = [
        line
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("VmRSS")
    ]
    return int(line.split()[1]) // 1024


def test_many_clients_at_once_in_flat_memory(space):
    def visit(index: int) -> str:
        digit = EXAMPLE.with_name(f"digit_{index % 10}.png")
        with httpx.Client(base_url=f"{space.url}/gradio_api", timeout=60) as client:
            (path,) = client.post("/upload", files={"files": (digit.name, digit.read_bytes())}).json()
            request = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
            event = client.post("/call/classify", json=request).json()["event_id"]
            answer = client.get(f"/call/classify/{event}").text
        return json.loads(answer.partition("data: ")[2].splitlines()[0])[0]["label"]

    def round_of_visits() -> int:
        with ThreadPoolExecutor(32) as pool:
            assert list(pool.map(visit, range(32))) == [str(index % 10) for index in range(32)]
        return resident(space.pid)

    warm = round_of_visits()
    assert round_of_visits() < warm + 60


def test_photographs_are_small_and_name_their_authors():
    listed = (PHOTOGRAPHS / "README.md").read_text()
    photographs = sorted(PHOTOGRAPHS.glob("*.jpg"))
    assert photographs == find_photographs() and 4 <= len(photographs) <= 6
    for path in photographs:
        (row,) = [line for line in listed.splitlines() if line.startswith(f"| `{path.name}`")]
        assert any(license in row for license in ("CC0 1.0", "CC BY 2.0", "public domain"))
        assert path.stat().st_size < 40_000 and max(Image.open(path).size) <= 320


def test_requirements_are_those_of_the_package():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    listed = (ROOT / "demo" / "requirements.txt").read_text().split()
    needed = config["options"]["install_requires"].split() + config["options.extras_require"]["demo"].split()
    assert sorted(listed) == sorted(needed)
    metadata = yaml.safe_load((ROOT / "demo" / "README.md").read_text().split("---\n")[1])
    assert metadata["sdk"] == "gradio" and metadata["app_file"] == "app.py"


def test_the_command_starts_the_demo_where_options_and_variables_say(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log.txt"
    variables = {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "nowhere", "GRADIO_ROOT_PATH": "/behind/proxy"}
    with log.open("w") as output:
        command = [sys.executable, "-m", "evmamba_hub.cli", "demo", "--host", "127.0.0.1"]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=os.environ | variables
        )
    try:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"http://127.0.0.1:{port}/config", timeout=10)
                if answer.status_code == 200:
                    assert answer.json()["root"].endswith("/behind/proxy")
                    break
            time.sleep(0.2)
        else:
            pytest.fail(log.read_text())
    finally:
        process.terminate()
        process.wait()
