"""Takes the screenshots of the demo with the bundled model, for light and dark pages.

    python docs/images/screenshots.py --runtime package/dist

Needs the extras `demo` and `export`, playwright, Chromium, and the files of the npm package onnxruntime-web in the
version of `demo/web/runtime.json`. Writes `demo-classify-*.png`, `demo-inside-*.png` and `demo-web-*.png` beside this
file.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import urlopen

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from evmamba_demo.bundled import find_bundled_model


HERE = Path(__file__).parent
WIDTH, HEIGHT = 1280, 600
DIGIT = 3  # among the examples
STAGE = 2  # of the maps: its 8 x 8 cells show more than the 2 x 2 cells of the last stage
PLACE = 56  # percent of the sides: the center of a cell, which the ring marks
START_SECONDS = 300


@contextmanager
def run_server(command: list[str], **variables: str) -> Iterator[str]:
    """Runs a server, whose command takes a port as its last argument, and returns its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([*command, str(port)], env=os.environ | variables)
    try:
        wait_for(url, process)
        yield url
    finally:
        process.terminate()
        process.wait()


@contextmanager
def run_demo() -> Iterator[str]:
    """Runs `evmamba demo`, and returns its address."""
    with TemporaryDirectory() as uploads:
        command = [sys.executable, "-m", "evmamba_hub.cli", "demo", "--port"]
        with run_server(command, GRADIO_TEMP_DIR=uploads) as url:
            yield url


@contextmanager
def run_page(runtime: Path) -> Iterator[str]:
    """Serves the page that classifies in the browser, and returns its address."""
    with TemporaryDirectory() as folder:
        files, page = Path(folder, "efficientvmamba-digits"), Path(folder, "page")
        (files / "onnx").mkdir(parents=True)
        for name in ("config.json", "preprocessor_config.json"):
            shutil.copy(find_bundled_model() / name, files)
        evmamba = [sys.executable, "-m", "evmamba_hub.cli"]
        subprocess.run([*evmamba, "export", find_bundled_model(), files / "onnx" / "model.onnx"], check=True)
        options = ["--model", files, "--static", "--runtime", runtime, "--save-to", page]
        subprocess.run([*evmamba, "push-space", "someone/digits", *options], check=True)
        with run_server([sys.executable, "-m", "http.server", "--directory", str(page)]) as url:
            yield url


def wait_for(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urlopen(url):
                return
        except URLError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def settle(page: Page) -> None:
    """Waits until the page computes nothing."""
    page.wait_for_timeout(500)
    trackers = "[...document.querySelectorAll('[data-testid=status-tracker]')]"
    page.wait_for_function(f"{trackers}.every(each => each.classList.contains('hide'))", timeout=60_000)
    page.wait_for_timeout(2000)  # for transitions


def save(page: Page, name: str) -> None:
    """Saves the page with a palette, which makes the file small."""
    path = HERE / f"{name}.png"
    page.mouse.move(0, 0)
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as screenshot:
        palette = screenshot.convert("RGB").quantize(kmeans=2, dither=Image.Dither.NONE)
    palette.save(path, optimize=True)


def take_screenshots(browser: Browser, url: str, theme: str) -> None:
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=theme)
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#labels h2")).not_to_be_empty(timeout=60_000)
    settle(page)
    page.locator(".gallery-item, .gallery button").nth(DIGIT).click()
    expect(page.locator("#labels h2")).to_have_text(str(DIGIT), timeout=60_000)
    settle(page)
    save(page, f"demo-classify-{theme}")
    page.get_by_role("tab", name="Look inside", exact=True).click()
    for slider, value in (("stage", STAGE), ("across", PLACE), ("down", PLACE)):
        number = page.locator(f"#{slider} input[type=number]")
        number.fill(str(value))
        number.press("Enter")
        settle(page)
    save(page, f"demo-inside-{theme}")
    context.close()


def take_screenshot_of_page(browser: Browser, url: str, theme: str) -> None:
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=theme)
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#offline")).to_contain_text("Works without a network", timeout=60_000)
    page.locator("#examples button").nth(DIGIT).click()
    expect(page.locator("#first")).to_have_text(str(DIGIT))
    page.evaluate("document.activeElement.blur()")
    save(page, f"demo-web-{theme}")
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", type=Path, required=True, help="directory with the files of onnxruntime-web")
    runtime = parser.parse_args().runtime.absolute()
    with run_demo() as demo, run_page(runtime) as web, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for theme in ("light", "dark"):
            take_screenshots(browser, demo, theme)
            take_screenshot_of_page(browser, web, theme)
        browser.close()


if __name__ == "__main__":
    main()
