"""The page that classifies in the browser, in headless Chromium, served from a local address as a static Space is.

The runtime is the npm package onnxruntime-web. Screenshots go to `.cache/screenshots`.
"""

import json
import os
import shutil
import subprocess
import tarfile
from base64 import b64encode
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import onnx
import pytest
from filelock import FileLock
from onnx import TensorProto, helper
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from benchmarks.bench_browser import ISOLATION, serve
from evmamba_demo.bundled import choose_examples, find_bundled_model, find_credits, find_examples, find_page_files
from evmamba_hub.files import write_files
from evmamba_hub.images.images import read_image
from evmamba_hub.inference.classify import load_classifier
from evmamba_hub.publish.static_space import collect_static_files, find_onnx_model


ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
PHOTOGRAPHS = ROOT / "demo" / "photographs"
RUNTIME = json.loads((ROOT / "demo" / "web" / "runtime.json").read_text())
CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
DESKTOP = {"width": 1280, "height": 900}
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium (Debian, Ubuntu)"),
]

expect.set_options(timeout=30_000)  # enough for the first visit on busy cores


@pytest.fixture(scope="session")
def runtime() -> Path:
    """The files of onnxruntime-web in the version of the page. npm downloads them once."""
    package = f"onnxruntime-web@{RUNTIME['version']}"
    folder = CACHE / package
    CACHE.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            if shutil.which("npm") is None:
                pytest.skip("needs npm: apt-get install npm (Debian, Ubuntu)")
            packing = ["npm", "pack", package, "--silent", "--pack-destination", str(CACHE)]
            packed = subprocess.run(packing, capture_output=True, text=True)
            if packed.returncode != 0:
                pytest.skip(f"needs {package} from npm's registry, once: npm cannot reach it")
            archive = CACHE / packed.stdout.split()[-1]
            unpacking = folder.with_suffix(".partial")
            unpacking.mkdir(exist_ok=True)
            with tarfile.open(archive) as files:
                for name in RUNTIME["files"]:
                    content = files.extractfile(f"package/dist/{name}")
                    (unpacking / name).write_bytes(content.read())
            archive.unlink()
            unpacking.rename(folder)
    return folder


def write_page(folder: Path, model: Path, runtime: Path | None, examples: list[Path] | None = None) -> Path:
    found = find_onnx_model(str(model))
    examples = choose_examples(found.labels) if examples is None else examples
    files = collect_static_files(found, find_page_files(), examples, find_credits(examples), "someone/page", runtime)
    write_files(files, folder)
    return folder


@pytest.fixture(scope="session")
def page_folder(digits_onnx, runtime, tmp_path_factory) -> Path:
    return write_page(tmp_path_factory.mktemp("pages") / "digits", digits_onnx, runtime)


@pytest.fixture
def own_page(page_folder, tmp_path) -> Path:
    """A copy of the page's files, to change."""
    return shutil.copytree(page_folder, tmp_path / "page", copy_function=os.link)


@pytest.fixture(scope="module")
def url(page_folder):
    with serve(page_folder, ISOLATION) as url:
        yield url


@pytest.fixture(scope="module")
def playwright():
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def browser(playwright):
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, "--disable-gpu", *CAMERA])
    yield browser
    browser.close()


@contextmanager
def visit(browser, url: str, **options):
    """A page of a new visitor, whose errors are none."""
    context = browser.new_context(viewport=DESKTOP, **options)
    page = context.new_page()
    with without_errors(page):
        page.goto(url)
        yield page
    context.close()


@contextmanager
def without_errors(page: Page):
    errors = []

    def keep(error) -> None:
        errors.append(error)

    page.on("pageerror", keep)
    yield
    page.remove_listener("pageerror", keep)
    assert errors == []


@pytest.fixture
def new_page(browser, url):
    """A page that shows the first example to a new visitor."""
    with visit(browser, url) as page:
        expect(page.locator("#first")).to_have_text("0")
        yield page


@pytest.fixture(scope="module")
def opened_page(browser, url):
    """The page of a visitor who stays: the runtime takes seconds to load."""
    page = browser.new_context(viewport=DESKTOP).new_page()
    page.goto(url)
    expect(page.locator("#first")).to_have_text("0")
    yield page
    page.context.close()


@pytest.fixture
def page(opened_page):
    """A page that shows the first example after others, for tests that leave its settings as they are."""
    if opened_page.locator("#drawing").is_hidden():
        opened_page.get_by_role("button", name="Draw", exact=True).click()
    expect(opened_page.locator("#first")).to_have_text("")
    with without_errors(opened_page):
        opened_page.locator("#examples button").first.click()
        expect(opened_page.locator("#first")).to_have_text("0")
        yield opened_page


def give(page: Page, path: Path) -> None:
    page.locator("#file").set_input_files(path)


def save_screenshot(page: Page, name: str) -> None:
    (CACHE / "screenshots").mkdir(parents=True, exist_ok=True)
    page.screenshot(path=CACHE / "screenshots" / f"web_{name}.png", full_page=True)


COMPUTE = """async ([settings, channels, names, options]) => {
  const worker = new Worker("worker.js", { type: "module" });
  const ask = (message) => new Promise((resolve, reject) => {
    worker.onmessage = ({ data: { progress, error, result } }) =>
      progress || (error ? reject(new Error(error)) : resolve(result));
    worker.postMessage({ id: 1, ...message });
  });
  const [page, runtime] = await Promise.all(
    ["page.json", "runtime.json"].map(async (name) => (await fetch(name)).json()));
  const { path, size } = page.onnx.float32;
  const opened = await ask({
    task: "open", model: path, size, device: "wasm", runtime: { ...runtime, url: page.runtime }, settings, channels,
    ...options,
  });
  const answers = [];
  for (const name of names) {
    const answer = await ask({ task: "classify", file: await (await fetch(name)).blob() });
    const map = answer.map && { ...answer.map, values: [...answer.map.values] };
    answers.push({ ...answer, map, logits: [...answer.logits], values: [...answer.values], pixels: null });
  }
  worker.terminate();
  return { opened, answers };
}"""


def compute(page: Page, settings: dict, names: list[str], channels: int = 3, **options) -> dict:
    """Let a worker of the page classify files beside it."""
    return page.evaluate(COMPUTE, [settings, channels, names, options])


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_of_the_examples_are_those_of_python(page, threads):
    classifier = load_classifier(str(find_bundled_model()), "cpu", "float32", optimize=False)
    settings = json.loads((find_bundled_model() / "preprocessor_config.json").read_text())
    names = [f"examples/{path.name}" for path in find_examples()]
    found = compute(page, settings, names, threads=threads)
    assert found["opened"]["threads"] == threads
    for path, answer in zip(find_examples(), found["answers"], strict=True):
        inputs = classifier.preprocess(read_image(path))
        expected = classifier.forward(inputs)["logits"][0].numpy()
        np.testing.assert_allclose(answer["values"], inputs["pixel_values"].numpy().ravel(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(answer["logits"], expected, rtol=0, atol=2e-5)
        assert int(np.argmax(answer["logits"])) == int(path.stem[-1])


def write_mean_model(folder: Path, channels: int) -> Path:
    """A network whose logits are the means of the channels, and whose maps are the channels."""
    shape = [1, channels, "height", "width"]
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["pixel_values"], ["logits"], axes=[2, 3], keepdims=0),
            helper.make_node("Identity", ["pixel_values"], ["activation_maps"]),
        ],
        "mean",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, channels]),
            helper.make_tensor_value_info("activation_maps", TensorProto.FLOAT, shape),
        ],
    )
    (folder / "onnx").mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "onnx" / "model.onnx")
    labels = {str(idx): f"channel {idx}" for idx in range(channels)}
    (folder / "config.json").write_text(json.dumps({"id2label": labels, "num_channels": channels}))
    (folder / "preprocessor_config.json").write_text(BitImageProcessorPil().to_json_string())
    return folder


def create_pictures(folder: Path) -> list[Path]:
    """Pictures of every kind that browsers and Pillow decode to the same pixels."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (61, 97, 4), dtype=np.uint8)
    opaque = Image.fromarray(noise[..., :3].copy())
    clear = noise.copy()
    clear[..., 3] = np.where(noise[..., 3] < 128, 0, 255)
    pictures = {
        "wide.png": opaque,
        "tall.png": opaque.resize((33, 700)),
        "tiny.png": opaque.crop((0, 0, 7, 5)),
        "one_pixel.png": opaque.crop((0, 0, 1, 1)),
        "large.png": opaque.resize((1100, 900)),
        "palette.png": opaque.quantize(16),
        "gray.png": opaque.convert("L"),
        "black_and_white.png": opaque.convert("1"),
        "transparent.png": Image.fromarray(clear),
        "picture.bmp": opaque,
        "lossless.webp": opaque,
    }
    paths = []
    for name, picture in pictures.items():
        paths.append(folder / name)
        picture.save(paths[-1], **({"lossless": True} if name.endswith("webp") else {}))
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    paths.append(folder / "turned.png")
    opaque.save(paths[-1], exif=turned)
    return paths


SETTINGS = {
    "bicubic": {"size": {"shortest_edge": 64}, "crop_size": {"height": 48, "width": 56}},
    "bilinear": {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}, "resample": 2},
    "lanczos": {"size": {"height": 30, "width": 50}, "do_center_crop": False, "resample": 1},
    "box": {"size": {"height": 45, "width": 20}, "do_center_crop": False, "resample": 4},
    "hamming": {"size": {"shortest_edge": 31}, "crop_size": {"height": 47, "width": 20}, "resample": 5},
    "plain": {"size": {"height": 9, "width": 9}, "do_center_crop": False, "do_normalize": False, "do_rescale": False},
}


@pytest.mark.parametrize("channels", [3, 1])
def test_pixel_values_are_those_of_python(browser, runtime, tmp_path, channels):
    write_page(tmp_path / "page", write_mean_model(tmp_path / "model", channels), runtime)
    paths = create_pictures(tmp_path / "page")
    with serve(tmp_path / "page", ISOLATION) as url, visit(browser, url) as page:
        # gray pictures differ in the conversion and the means, not in the filters
        for kind in SETTINGS if channels == 3 else ("bicubic", "plain"):
            settings = SETTINGS[kind]
            processor = BitImageProcessorPil(**settings, do_convert_rgb=channels == 3)
            saved = json.loads(processor.to_json_string())
            if channels == 1:
                processor.image_mean, processor.image_std = [
                    [np.mean(each)] for each in (processor.image_mean, processor.image_std)
                ]
            answers = compute(page, saved, [path.name for path in paths], channels)["answers"]
            for path, answer in zip(paths, answers, strict=True):
                image = read_image(path).convert("RGB" if channels == 3 else "L")
                expected = np.asarray(processor(image, return_tensors="np")["pixel_values"])
                assert [answer["height"], answer["width"]] == list(expected.shape[2:])
                values = np.asarray(answer["values"])
                np.testing.assert_allclose(values, expected.ravel(), rtol=0, atol=1e-5, err_msg=f"{kind} {path.name}")
                np.testing.assert_allclose(answer["logits"], expected.mean(axis=(2, 3))[0], rtol=0, atol=2e-2)


def test_photographs_differ_by_the_decoder_alone(browser, runtime, tmp_path):
    """Decoders of JPEG may round differently: at most two levels of 255 here."""
    write_page(tmp_path / "page", write_mean_model(tmp_path / "model", 3), runtime)
    processor = BitImageProcessorPil(do_normalize=False, size={"shortest_edge": 256})
    paths = sorted(PHOTOGRAPHS.glob("*.jpg"))
    with serve(tmp_path / "page", ISOLATION) as url, visit(browser, url) as page:
        settings = json.loads(processor.to_json_string())
        answers = compute(page, settings, [f"examples/{path.name}" for path in paths])["answers"]
    for path, answer in zip(paths, answers, strict=True):
        expected = np.asarray(processor(read_image(path), return_tensors="np")["pixel_values"]).ravel()
        assert np.abs(np.asarray(answer["values"]) - expected).max() <= 2.01 / 255, path.name


def test_the_map_is_that_of_the_first_class(browser, runtime, tmp_path):
    write_page(tmp_path / "page", write_mean_model(tmp_path / "model", 3), runtime)
    picture = np.zeros((224, 224, 3), dtype=np.uint8)
    picture[:, :, 1] = 40
    picture[190:, :40, 1] = 255
    Image.fromarray(picture).save(tmp_path / "green.png")
    with serve(tmp_path / "page", ISOLATION) as url, visit(browser, url) as page:
        give(page, tmp_path / "green.png")
        expect(page.locator("#first")).to_have_text("channel 1")
        expect(page.locator("#map-figure figcaption")).to_have_text("What raises the score of “channel 1”")
        expect(page.locator("#map")).to_have_attribute(
            "aria-label", "What raises the score of channel 1: most of all, the bottom left"
        )
        red, _, blue, _ = page.evaluate("[...map.getContext('2d').getImageData(10, 215, 1, 1).data]")
        assert red > 150 > blue  # orange
        save_screenshot(page, "map")


def test_the_page_isolates_itself_on_a_server_without_headers(browser, page_folder):
    with serve(page_folder, {}) as url, visit(browser, url) as page:
        expect(page.locator("#first")).to_have_text("0")
        assert page.evaluate("crossOriginIsolated")
        expect(page.locator("#runtime")).not_to_contain_text("isolate")


def test_without_isolation_one_thread_computes(browser, page_folder):
    with serve(page_folder, {}) as url, visit(browser, url, service_workers="block") as page:
        expect(page.locator("#first")).to_have_text("0")
        expect(page.locator("#runtime")).to_contain_text("1 thread, because the browser does not isolate this page")
        expect(page.locator("#offline")).to_contain_text("needs the network")
        give(page, find_examples()[3])
        expect(page.locator("#first")).to_have_text("3")


@pytest.mark.parametrize("headers", [{}, ISOLATION], ids=["plain", "isolated"])
def test_offline(browser, page_folder, headers):
    context = browser.new_context()
    page = context.new_page()
    with serve(page_folder, headers) as url:
        page.goto(url)
        expect(page.locator("#offline")).to_contain_text("Works without a network")
    page.reload()  # the server is gone
    expect(page.locator("#first")).to_have_text("0")
    give(page, find_examples()[7])
    expect(page.locator("#first")).to_have_text("7")
    assert page.evaluate("crossOriginIsolated")
    context.close()


def test_a_picture_causes_no_request_and_all_requests_stay_here(page):
    expect(page.locator("#offline")).to_contain_text("Works without a network")
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    give(page, find_examples()[5])
    expect(page.locator("#first")).to_have_text("5")
    assert [each for each in requests if not each.startswith("blob:")] == []


def without_vendored_runtime(folder: Path) -> None:
    settings = json.loads((folder / "page.json").read_text())
    (folder / "page.json").unlink()
    (folder / "page.json").write_text(json.dumps({**settings, "runtime": None}))


@pytest.mark.parametrize(
    "status, changed, message",
    [
        (200, b"", None),
        (200, b" ", "cannot be loaded from cdn.jsdelivr.net, or is not that of onnxruntime-web"),
        (404, b"", "cannot be loaded from cdn.jsdelivr.net"),
        (None, b"", "cannot be loaded from cdn.jsdelivr.net"),
    ],
    ids=["as published", "changed", "missing", "unreachable"],
)
def test_the_runtime_from_its_published_address(browser, own_page, runtime, status, changed, message):
    """Playwright answers in the place of jsDelivr, with the files of npm and jsDelivr's headers."""
    without_vendored_runtime(own_page)
    address = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{RUNTIME['version']}/dist/"
    asked = []

    def answer(route):
        asked.append(route.request.url)
        if status is None:
            return route.abort()
        headers = {"Access-Control-Allow-Origin": "*", "Cross-Origin-Resource-Policy": "cross-origin"}
        content = (runtime / Path(urlsplit(route.request.url).path).name).read_bytes() + changed
        return route.fulfill(status=status, headers=headers, body=content if status == 200 else b"")

    context = browser.new_context(service_workers="block")
    page = context.new_page()
    page.route("https://cdn.jsdelivr.net/**", answer)
    with serve(own_page, ISOLATION) as url:
        page.goto(url)
        if message is None:
            expect(page.locator("#first")).to_have_text("0")
        else:
            expect(page.locator("#error")).to_contain_text(message)
            expect(page.locator("#runtime")).to_have_text("Not loaded")
    assert asked and all(each.startswith(address) for each in asked)
    context.close()


def test_webgpu_in_software_falls_back(playwright, url):
    flags = [*FLAGS, "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
    with visit(browser, url) as page:
        expect(page.locator("#first")).to_have_text("0")
        page.locator("#device").select_option("webgpu")
        message = "WebGPU failed, so WebAssembly computes: this browser's WebGPU computes in software."
        expect(page.locator("#fallback")).to_have_text(message)
        expect(page.locator("#first")).to_have_text("0")
        expect(page.locator("#fallback")).to_have_text(message)
        expect(page.locator("#device")).to_have_value("wasm")
        expect(page.locator("#runtime")).to_contain_text("WebAssembly with SIMD")
    browser.close()


def test_without_webassembly(playwright, url):
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, "--js-flags=--jitless"])
    with visit(browser, url) as page:
        expect(page.locator("#error")).to_contain_text("This browser has no WebAssembly")
    browser.close()


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def garble(path: Path) -> None:
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(bytes(size))


def empty(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"")


def set_processor(**changes):
    def change(path: Path) -> None:
        settings = json.loads(path.read_text(encoding="utf-8")) | changes
        path.unlink()
        path.write_text(json.dumps(settings), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("onnx/model.onnx", Path.unlink, "onnx/model.onnx is missing beside this page (404): upload it again."),
        ("onnx/model.onnx", truncate, "onnx/model.onnx is damaged, it has "),
        ("onnx/model.onnx", garble, "onnx/model.onnx is damaged, or needs another runtime: upload it again."),
        ("config.json", Path.unlink, "config.json is missing beside this page (404): publish the page again."),
        ("page.json", truncate, "page.json is damaged: publish the page again."),
        ("preprocessor_config.json", empty, "preprocessor_config.json is damaged: publish the page again."),
        ("vendor/ort.wasm.bundle.min.mjs", truncate, "or is not that of onnxruntime-web"),
        ("examples/digit_0.png", Path.unlink, "examples/digit_0.png is missing beside this page"),
        ("worker.js", Path.unlink, "The worker of this page cannot be loaded"),
        ("preprocessor_config.json", set_processor(resample=0), "This page does not compute resample 0 in"),
        ("preprocessor_config.json", set_processor(size={"longest_edge": 9}), 'the size {"longest_edge":9} in'),
        (
            "preprocessor_config.json",
            set_processor(image_processor_type="ConvNextImageProcessor"),
            "the type ConvNextImageProcessor in",
        ),
        ("config.json", set_processor(num_channels=4), "The network takes 4 channels"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_damaged_pages_say_one_sentence(browser, own_page, name, damage, message):
    damage(own_page / name)
    with serve(own_page, ISOLATION) as url:
        context = browser.new_context(service_workers="block")
        page = context.new_page()
        page.goto(url)
        expect(page.locator("#error")).to_contain_text(message)
        assert page.locator("#error").inner_text().count(". ") == 0 or "(" in page.locator("#error").inner_text()
        context.close()


def write_bad_files(folder: Path) -> None:
    png = find_examples()[1].read_bytes()
    contents = {
        "empty.png": b"",
        "text.png": b"no picture",
        "half.png": png[: len(png) // 2][:60],
        "photo.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        "scan.tif": b"II*\0" + bytes(100),
        "page.pdf": b"%PDF-1.7\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.new("1", (9000, 9000)).save(folder / "huge.png")


@pytest.mark.parametrize(
    "name, message",
    [
        ("empty.png", "empty.png is empty: choose another picture."),
        ("text.png", "text.png is not a picture: choose a PNG, JPEG, WebP, GIF, BMP or AVIF file."),
        ("half.png", "half.png is a damaged PNG file, or this browser cannot decode it: save it again as PNG."),
        ("photo.heic", "photo.heic is a HEIC file, which this page cannot decode: save it as PNG or JPEG."),
        ("scan.tif", "scan.tif is a TIFF file, which this page cannot decode: save it as PNG or JPEG."),
        ("page.pdf", "page.pdf is a PDF file, which this page cannot decode: save it as PNG or JPEG."),
        ("huge.png", "huge.png has 9000 x 9000 pixels, at most 64 million are accepted: make it smaller."),
    ],
)
def test_pictures_that_cannot_be_read(page, tmp_path, name, message):
    write_bad_files(tmp_path)
    give(page, tmp_path / name)
    expect(page.locator("#error")).to_have_text(message)
    expect(page.locator("#first")).to_have_text("")
    expect(page.locator("#bars li")).to_have_count(0)
    give(page, find_examples()[5])
    expect(page.locator("#first")).to_have_text("5")
    expect(page.locator("#error")).to_be_hidden()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_show_their_first_frame(page, tmp_path, suffix):
    frames = [Image.open(path).convert("L") for path in find_examples()[4:7]]
    frames[0].save(tmp_path / f"digits.{suffix}", save_all=True, append_images=frames[1:], duration=50)
    give(page, tmp_path / f"digits.{suffix}")
    expect(page.locator("#notices")).to_have_text("The picture is animated: its first frame is classified.")
    expect(page.locator("#first")).to_have_text("4")
    frames[1].save(tmp_path / f"still.{suffix}")
    give(page, tmp_path / f"still.{suffix}")
    expect(page.locator("#first")).to_have_text("5")
    expect(page.locator("#notices")).to_have_text("")


TRANSFER = """([kind, files]) => {
  const transfer = new DataTransfer();
  for (const [name, content] of files) {
    transfer.items.add(new File([Uint8Array.from(atob(content), (each) => each.charCodeAt())], name));
  }
  const event = kind === "paste" ? new ClipboardEvent(kind, { clipboardData: transfer, bubbles: true })
    : new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true });
  document.body.dispatchEvent(event);
}"""


def transfer(page: Page, kind: str, paths: list[Path]) -> None:
    page.evaluate(TRANSFER, [kind, [[path.name, b64encode(path.read_bytes()).decode()] for path in paths]])


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_drop_and_paste(page, kind):
    transfer(page, kind, find_examples()[6:7])
    expect(page.locator("#first")).to_have_text("6")
    transfer(page, kind, find_examples()[2:5])
    expect(page.locator("#first")).to_have_text("2")
    expect(page.locator("#notices")).to_have_text("The first of 3 files is classified.")
    transfer(page, kind, [])
    expect(page.locator("#error")).to_contain_text("file" if kind == "drop" else "The clipboard holds no picture")


def test_the_last_of_several_pictures_wins(page):
    for index in (4, 8, 1, 9):
        page.locator("#examples button").nth(index).click()
    expect(page.locator("#first")).to_have_text("9")
    expect(page.locator("#picture")).to_have_attribute("alt", "digit 9")
    page.wait_for_timeout(300)
    expect(page.locator("#first")).to_have_text("9")


def test_draw(page):
    page.get_by_role("button", name="Draw", exact=True).click()
    box = page.locator("#drawing").bounding_box()
    x = box["x"] + box["width"] / 2
    page.mouse.move(x, box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(x, box["y"] + 0.8 * box["height"], steps=5)
    page.mouse.up()
    expect(page.locator("#first")).to_have_text("1")
    save_screenshot(page, "draw")
    page.get_by_role("button", name="Clear the drawing").click()
    expect(page.locator("#first")).to_have_text("")
    give(page, find_examples()[3])
    expect(page.locator("#first")).to_have_text("3")
    expect(page.locator("#drawing")).to_be_hidden()


def test_camera(page):
    """Chromium's test picture takes the place of a camera."""
    page.get_by_role("button", name="Camera").click()
    page.get_by_role("button", name="Take the picture").click()
    expect(page.locator("#first")).not_to_be_empty()
    expect(page.locator("#picture")).to_have_attribute("alt", "The picture of the camera")
    expect(page.locator("#video")).to_be_hidden()


def test_clicks_before_the_camera_has_a_frame(new_page):
    streams = new_page.evaluate("""async () => {
      let streams = 0;
      const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
      navigator.mediaDevices.getUserMedia = (options) => (streams++, open(options));
      const [camera, take] = ["camera", "take"].map((id) => document.getElementById(id));
      const watch = (resolve) => new MutationObserver(resolve).observe(take, { attributeFilter: ["hidden"] });
      const isShown = new Promise(watch);
      camera.click();
      camera.click();
      await isShown;
      take.click();
      return streams;
    }""")
    assert streams == 1
    new_page.get_by_role("button", name="Take the picture").click()
    expect(new_page.locator("#picture")).to_have_attribute("alt", "The picture of the camera")
    expect(new_page.locator("#error")).to_be_hidden()


def test_a_blocked_camera(playwright, url):
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, "--disable-gpu"])
    with visit(browser, url) as page:
        page.get_by_role("button", name="Camera").click()
        expect(page.locator("#error")).to_contain_text("camera")
    browser.close()


def test_other_weights(new_page):
    new_page.locator("#weights").select_option("float16")
    expect(new_page.locator("#offline")).to_contain_text("onnx/model_fp16.onnx")
    expect(new_page.locator("#first")).to_have_text("0")
    expect(new_page.locator("#map-figure")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_layout(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    expect(page.locator("#offline")).to_contain_text("Works without a network")
    for name in ("Draw", "Draw", "Camera"):
        page.get_by_role("button", name=name, exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    give(page, find_examples()[3])
    expect(page.locator("#first")).to_have_text("3")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [each.bounding_box() for each in page.locator("button:visible, select:visible").all()]
    assert all(min(box["width"], box["height"]) >= 44 for box in boxes)  # targets of fingers
    save_screenshot(page, f"{scheme}_{width}")
    page.set_viewport_size(DESKTOP)
    page.emulate_media(color_scheme="light")


def test_keyboard(new_page):
    reached = []
    for _ in range(25):
        new_page.keyboard.press("Tab")
        reached.append(new_page.evaluate("document.activeElement.id || document.activeElement.parentElement.id"))
    order = list(dict.fromkeys(each for each in reached if each))
    assert [each for each in order if each in ("choose", "camera", "draw", "examples", "weights", "device")] == [
        "choose", "camera", "draw", "examples", "weights", "device"
    ]  # fmt: skip
    new_page.locator("#examples button").nth(8).focus()
    new_page.keyboard.press("Enter")
    expect(new_page.locator("#first")).to_have_text("8")
    with new_page.expect_file_chooser():
        new_page.locator("#choose").focus()
        new_page.keyboard.press("Enter")


def test_names_and_live_regions(page):
    expect(page.get_by_role("heading", name="Classes")).to_be_visible()
    expect(page.get_by_role("list", name="The most likely classes").get_by_role("listitem")).to_have_count(5)
    expect(page.get_by_role("button", name="Example: digit 4")).to_be_visible()
    expect(page.get_by_role("combobox", name="Model")).to_be_visible()
    expect(page.get_by_role("img", name="The picture, scaled and cropped for the network")).to_be_visible()
    give(page, find_examples()[3])
    expect(page.locator("#spoken[role=status]")).to_contain_text("3: 9")
    page.locator("#classes[aria-busy=false]").wait_for()
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, input, canvas, img, video')].filter(each => "
        "!each.ariaLabel && !each.alt && !each.textContent.trim() && !each.querySelector('img[alt]') && "
        "!each.labels?.length)"
        ".map(each => each.id)"
    )
    assert unnamed in ([], ["map"])  # without maps in the file, this figure is hidden
