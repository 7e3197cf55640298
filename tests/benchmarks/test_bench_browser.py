"""The measurement in Chromium: a server that isolates its pages."""

import httpx

from benchmarks import bench_browser


def test_files_are_served_with_the_headers_of_isolation(tmp_path):
    (tmp_path / "page.json").write_text("{}")
    with bench_browser.serve(tmp_path, bench_browser.ISOLATION) as url:
        answer = httpx.get(f"{url}page.json")
    assert answer.text == "{}"
    assert all(answer.headers[name] == value for name, value in bench_browser.ISOLATION.items())
