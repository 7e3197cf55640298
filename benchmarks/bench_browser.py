"""Measure the latency of a network in Chromium, by the page that classifies in the browser.

The page's own worker runs ONNX files of fresh weights. Each setting has a worker of its own.

Example:
    npm pack onnxruntime-web@1.30.0
    tar -xzf onnxruntime-web-1.30.0.tgz package/dist
    python benchmarks/bench_browser.py --runtime package/dist
"""

import argparse
import shutil
import statistics
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import RESULTS_DIR, describe_environment, print_table, write_csv
from networks import create_ours
from playwright.sync_api import Browser, sync_playwright
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from evmamba_demo.bundled import find_page_files, find_photographs
from evmamba_hub.export.export import export_model
from evmamba_hub.export.onnx_files import ONNX_FILES
from evmamba_hub.files import write_files
from evmamba_hub.publish.static_space import collect_static_files, find_onnx_model
from modeling_evmamba import VARIANTS


# the headers that threads of WebAssembly need
ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
WARM_UP_CALLS = 3

# Return the milliseconds of the network for one picture, call by call.
MEASURE = """async ([dtype, threads, calls]) => {
  const worker = new Worker("worker.js", { type: "module" });
  const ask = (message) => new Promise((resolve, reject) => {
    worker.onmessage = ({ data: { progress, error, result } }) =>
      progress || (error ? reject(new Error(error)) : resolve(result));
    worker.postMessage({ id: 1, ...message });
  });
  const names = ["page.json", "runtime.json", "preprocessor_config.json"];
  const [page, runtime, settings] = await Promise.all(names.map(async (name) => (await fetch(name)).json()));
  const { path, size } = page.onnx[dtype];
  await ask({
    task: "open", model: path, size, device: "wasm", threads, runtime: { ...runtime, url: page.runtime }, settings,
    channels: 3,
  });
  const file = await (await fetch(page.examples[0])).blob();
  const times = [];
  for (let call = 0; call < calls; call++) times.push((await ask({ task: "classify", file })).times.network);
  worker.terminate();
  return times;
}"""


class Handler(SimpleHTTPRequestHandler):
    """Serves files with some headers."""

    def __init__(self, *arguments, headers: Mapping[str, str], **options):
        self.headers_to_send = headers
        super().__init__(*arguments, **options)

    def end_headers(self) -> None:
        for name, value in self.headers_to_send.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", type=Path, required=True, help="directory with the files of onnxruntime-web")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["tiny"], help="default: tiny")
    parser.add_argument("--dtypes", nargs="+", choices=ONNX_FILES, default=["float32", "int8"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    parser.add_argument("--repeats", type=int, default=20, help="calls of each setting; default: 20")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="directory of the CSV file; default: benchmarks/results"
    )
    return parser.parse_args()


def write_page(folder: Path, variant: str, dtypes: list[str], runtime: Path) -> Path:
    """Write the page with ONNX files of a network of fresh weights."""
    model, files, page = folder / "model", folder / "files", folder / "page"
    create_ours(variant).save_pretrained(model)
    BitImageProcessorPil(size={"shortest_edge": 256}).save_pretrained(model)
    (files / "onnx").mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(model / name, files)
    for dtype in dict.fromkeys(["float32", *dtypes]):  # the page requires float32
        export_model(str(model), files / ONNX_FILES[dtype], "onnx", dtype=dtype)
    found = find_onnx_model(str(files))
    write_files(
        collect_static_files(found, find_page_files(), find_photographs()[:1], None, "someone/page", runtime), page
    )
    return page


@contextmanager
def serve(folder: Path, headers: Mapping[str, str]) -> Iterator[str]:
    """As `python -m http.server`, with headers. A browser treats 127.0.0.1 as it does https."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder, headers=headers))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def measure(browser: Browser, url: str, dtype: str, threads: int, repeats: int) -> dict[str, object]:
    """Return the median and the range of a setting in milliseconds."""
    page = browser.new_page(service_workers="block")
    page.goto(f"{url}runtime.json")  # a page that computes nothing itself
    times = page.evaluate(MEASURE, [dtype, threads, WARM_UP_CALLS + repeats])[WARM_UP_CALLS:]
    page.close()
    return {"dtype": dtype, "threads": threads, "ms": statistics.median(times), "min": min(times), "max": max(times)}


def main() -> None:
    arguments = parse_arguments()
    rows = []
    with sync_playwright() as playwright, TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for variant in arguments.variants:
            page = write_page(Path(folder, variant), variant, arguments.dtypes, arguments.runtime)
            with serve(page, ISOLATION) as url:
                for dtype in arguments.dtypes:
                    for threads in arguments.threads:
                        row = measure(browser, url, dtype, threads, arguments.repeats)
                        rows.append({"network": variant, **row})
        environment = describe_environment() | {"Chromium": browser.version}
        browser.close()
    print_table("One image of 224 x 224 in Chromium, in ms", rows)
    write_csv(arguments.output_dir / "browser.csv", rows, environment)


if __name__ == "__main__":
    main()
