"""The pages of the running Space in headless Chromium. Screenshots go to `.cache/screenshots`."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from gradio_client import Client, handle_file
from PIL import Image, ImageChops
from playwright.sync_api import Page, Route, expect, sync_playwright


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "demo" / "examples"
PHOTOGRAPHS = ROOT / "demo" / "photographs"
SCREENSHOTS = ROOT / ".cache" / "screenshots"
FOLLOWERS = ("activation_map", "scan_paths", "receptive_field", "compare")  # functions that run after a classification

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]

expect.set_options(timeout=30_000)  # enough for the first visit on a slow machine

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium (Debian, Ubuntu)")


@pytest.fixture(scope="module")
def context():
    """Pages of one context share the cache of the page's program."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_context()
        browser.close()


@contextmanager
def open_pages(context, space) -> Iterator[Callable[..., Page]]:
    """Yield a function that opens pages, which are closed at the end. All that they load must come from the Space."""
    pages, addresses = [], set()

    def open_page(width: int = 1280, height: int = 1000, dark: bool = False) -> Page:
        page = context.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme="dark" if dark else "light")
        page.set_default_timeout(20_000)
        page.on("request", lambda request: addresses.add(urlsplit(request.url)))
        page.goto(space.url)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert {address.netloc for address in addresses if address.scheme.startswith("http")} == {
        urlsplit(space.url).netloc
    }


@pytest.fixture
def open_page(context, space):
    """Open the page, and wait for the class of the first example."""
    with open_pages(context, space) as open_any:

        def open_page(**settings) -> Page:
            page = open_any(**settings)
            expect(page.locator("#labels h2")).to_have_text("0")
            return page

        yield open_page


@pytest.fixture
def open_dense_page(context, dense_space):
    """Open the page of a segmentation model or a detector, and wait for what it finds in the first example."""
    with open_pages(context, dense_space) as open_any:

        def open_page(**settings) -> Page:
            page = open_any(**settings)
            expect(page.locator("#view img")).to_be_visible()
            expect(page.locator("#how")).not_to_be_empty()
            return page

        yield open_page


def click_example(page: Page, index: int) -> None:
    page.locator(".gallery-item, .gallery button").nth(index).click()


def upload(page: Page, path: Path) -> None:
    page.locator("#picture input[type=file]").set_input_files(path)


def save_screenshot(page: Page, name: str) -> None:
    settle(page)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True, animations="disabled")


def save_in_both_schemes(page: Page, name: str) -> None:
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(f"document.body.classList.contains('dark') === {str(scheme == 'dark').lower()}")
        save_screenshot(page, f"{name}_{scheme}")


def settle(page: Page) -> None:
    """Wait until all computations end."""
    trackers = "[...document.querySelectorAll('[data-testid=status-tracker]')]"
    page.wait_for_timeout(300)  # until the last action reaches the page's program
    page.wait_for_function(f"{trackers}.every(each => each.classList.contains('hide'))", timeout=30_000)


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def open_narrow_tab(page: Page, name: str) -> None:
    """On a narrow page, a menu holds the tabs that do not fit."""
    tab = page.locator(f"button[role=tab]:visible:has-text('{name}')")
    if tab.count() == 0:
        page.locator(".overflow-menu > button:visible").first.click()
        tab = page.locator(f".overflow-dropdown button:visible:has-text('{name}')")
    tab.first.click()


class SlowNetwork:
    """Hold a page's calls of functions until `let_go`."""

    def __init__(self, page: Page, space, *functions: str):
        self.page, self.functions, self.held = page, functions, []
        self.names = {each["id"]: each["api_name"] for each in httpx.get(f"{space.url}/config").json()["dependencies"]}
        page.route("**/queue/join*", self.receive)

    def receive(self, route: Route) -> None:
        if self.names[route.request.post_data_json["fn_index"]].startswith(self.functions):
            self.held.append(route)
        else:
            route.continue_()

    def wait(self, calls: int) -> None:
        """Wait until that many calls are held."""
        deadline = time.monotonic() + 30
        while len(self.held) < calls and time.monotonic() < deadline:
            self.page.wait_for_timeout(50)
        assert len(self.held) >= calls

    def let_go(self, latest_first: bool = False) -> None:
        """Let the calls pass one after the other."""
        self.functions = ()
        while self.held:
            self.held.pop(-1 if latest_first else 0).continue_()
            self.page.wait_for_timeout(300)


def expect_everything_of(page: Page, space, digit: int) -> None:
    """Compare every tab with the answers of the endpoints to an example."""
    client, picture = Client(space.url, verbose=False), handle_file(EXAMPLES / f"digit_{digit}.png")
    expect(page.locator("#labels h2")).to_have_text(str(digit))
    open_tab(page, "Compare")
    expect(page.locator("#agreement")).to_contain_text(f"Both say “{digit}”")
    open_tab(page, "Look inside")
    expect(page.locator("#label input")).to_have_value(str(digit))
    expect(page.locator("#activation-how")).to_contain_text(f"“{digit}”")
    settle(page)
    opacity, progress, across = (
        float(page.locator(f"#{name} input[type=number]").input_value()) for name in ("opacity", "progress", "across")
    )
    for panel, endpoint, arguments in [
        ("activation", "/activation_map", (str(digit), 4, opacity)),
        ("scan", "/scan_paths", (2, progress)),
        ("field", "/receptive_field", (4, across, 50)),
    ]:
        shown = Image.open(BytesIO(httpx.get(page.locator(f"#{panel} img").get_attribute("src")).content))
        answered = Image.open(client.predict(picture, *arguments, api_name=endpoint)[0])
        difference = ImageChops.difference(shown.convert("RGB"), answered.convert("RGB"))
        assert max(high for _, high in difference.getextrema()) <= 2, panel
    client.close()


def test_upload_and_look_inside(open_page):
    page = open_page()
    upload(page, EXAMPLES / "digit_3.png")
    expect(page.locator("#labels h2")).to_have_text("3")
    expect(page.locator("#labels")).to_contain_text("%")
    expect(page.locator("#timing")).to_contain_text("32 x 32 pixels")
    expect(page.locator("#preview img")).to_have_attribute("alt", "The picture, scaled and cropped for the network")
    save_screenshot(page, "classify")

    open_tab(page, "Look inside")
    expect(page.locator("#activation-how")).to_contain_text("“3”")
    expect(page.locator("#activation-how")).to_contain_text("The map is exact")
    expect(page.locator("#scan-how")).to_contain_text("8 x 8 cells of stage 2")
    for picture in ("#activation", "#scan", "#field"):
        assert page.locator(f"{picture} img").get_attribute("alt").startswith("The picture under")

    settle(page)
    page.locator("#label input").click()
    page.get_by_role("option", name="8", exact=True).or_(page.get_by_role("option").nth(1)).first.click()
    expect(page.locator("#activation-how")).not_to_contain_text("“3”")

    slider = page.locator("#stage input[type=range]")  # by keyboard
    slider.focus()
    for _ in range(3):
        slider.press("ArrowLeft")
    expect(page.locator("#activation-how")).to_contain_text("stage 1 raises")
    expect(page.locator("#field-how")).to_contain_text("ringed cell of stage 1")
    expect(page.locator("#scan-stage input")).to_have_count(2)  # stages 3 and 4 have no scan
    page.locator("#scan-stage input").first.check()
    expect(page.locator("#scan-how")).to_contain_text("16 x 16 cells of stage 1")
    settle(page)

    for name, picture in [("opacity", "#activation img"), ("progress", "#scan img")]:
        before = page.locator(picture).get_attribute("src")
        page.locator(f"#{name} input[type=range]").press("ArrowRight")
        expect(page.locator(picture)).not_to_have_attribute("src", before)
    settle(page)

    picture = page.locator("#field img")
    box = picture.bounding_box()
    picture.click(position={"x": 0.5 * box["width"], "y": 0.8 * box["height"]})
    place = page.locator("#down input[type=number]")
    expect(place).not_to_have_value("50")
    assert 70 < float(place.input_value()) < 90
    settle(page)
    save_screenshot(page, "look_inside")


def test_draw(open_page):
    page = open_page()
    open_tab(page, "Draw")
    page.locator("#drawing").get_by_role("button", name="Brush").first.click()
    canvas = page.locator("#drawing canvas").last
    box = canvas.bounding_box()
    x, top, bottom = box["x"] + box["width"] / 2, box["y"] + 0.25 * box["height"], box["y"] + 0.75 * box["height"]
    page.mouse.move(x, top)
    page.mouse.down()
    page.mouse.move(x, bottom, steps=4)
    page.mouse.up()
    page.wait_for_timeout(300)
    page.get_by_role("button", name="Classify the drawing").click()
    expect(page.locator("#labels h2")).to_have_text("1")
    save_screenshot(page, "draw")


def test_example_compare_and_measure(open_page):
    page = open_page()
    click_example(page, 7)
    expect(page.locator("#labels h2")).to_have_text("7")
    open_tab(page, "Compare")
    expect(page.locator("#agreement")).to_contain_text("Both say “7”")  # the page compares every picture
    click_example(page, 2)
    expect(page.locator("#labels h2")).to_have_text("2")
    expect(page.locator("#agreement")).to_contain_text("Both say “2”")
    settle(page)
    with page.expect_request("**/queue/join*"):
        page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#agreement")).to_contain_text("Both say “2”")
    save_screenshot(page, "compare")
    open_tab(page, "Measure")
    expect(page.get_by_text("200704")).to_be_visible()  # opening the tab measures
    expect(page.locator("#plot canvas, #plot svg").first).to_be_visible()
    save_screenshot(page, "measure")


def test_an_error_is_shown_and_the_next_picture_works(open_page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    page = open_page()
    click_example(page, 4)
    expect(page.locator("#labels h2")).to_have_text("4")
    upload(page, tmp_path / "broken.png")
    message = "it is not an image in a format that Pillow reads"
    expect(page.get_by_text(message).first).to_be_visible()
    save_screenshot(page, "error")
    for tab, texts in [
        ("Classify", ["timing"]),
        ("Compare", ["agreement"]),
        ("Look inside", ["activation-how", "scan-how", "field-how"]),
    ]:
        open_tab(page, tab)
        for text in texts:
            expect(page.locator(f"#{text}")).to_contain_text(message)
    for panel in ("labels h2", "preview img", "activation img", "scan img", "field img"):  # of the picture before
        expect(page.locator(f"#{panel}")).to_have_count(0)
    expect(page.locator("#label input")).to_have_value("")
    page.get_by_role("button", name="Remove Image").or_(page.get_by_role("button", name="Clear")).first.click()
    upload(page, EXAMPLES / "digit_5.png")
    expect(page.locator("#labels h2")).to_have_text("5")


def test_a_late_error_does_not_hide_a_newer_picture(open_page, space, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    page = open_page()
    settle(page)
    network = SlowNetwork(page, space, "classify")
    upload(page, tmp_path / "broken.png")
    network.wait(1)
    click_example(page, 3)
    network.let_go()
    expect_everything_of(page, space, 3)


def test_late_classes_do_not_replace_those_of_a_newer_picture(open_page, space):
    page = open_page()
    settle(page)
    network = SlowNetwork(page, space, "classify")
    click_example(page, 7)
    network.wait(1)
    upload(page, EXAMPLES / "digit_3.png")
    expect(page.locator("#picture img")).to_have_attribute("src", re.compile("digit_3"))
    network.let_go()
    expect_everything_of(page, space, 3)


def test_late_followers_do_not_replace_those_of_a_newer_picture(open_page, space):
    page = open_page()
    settle(page)
    network = SlowNetwork(page, space, *FOLLOWERS)
    click_example(page, 7)
    network.wait(3)
    upload(page, EXAMPLES / "digit_3.png")
    expect(page.locator("#labels h2")).to_have_text("3")
    network.let_go()
    expect_everything_of(page, space, 3)


def test_late_answers_to_sliders_do_not_replace_those_of_a_newer_picture(open_page, space):
    page = open_page()
    open_tab(page, "Look inside")
    settle(page)
    network = SlowNetwork(page, space, *FOLLOWERS)
    for name in ("opacity", "progress", "across"):
        page.locator(f"#{name} input[type=range]").press("ArrowRight")
    network.wait(3)
    upload(page, EXAMPLES / "digit_3.png")
    open_tab(page, "Classify")
    expect(page.locator("#labels h2")).to_have_text("3")
    network.let_go(latest_first=True)
    expect_everything_of(page, space, 3)


def test_pictures_in_quick_succession_leave_those_of_the_last(open_page, space):
    page = open_page()
    for clicked, uploaded in [(7, 3), (5, 2), (1, 4)]:
        click_example(page, clicked)
        with page.expect_response("**/upload*"):
            upload(page, EXAMPLES / f"digit_{uploaded}.png")
    click_example(page, 6)
    click_example(page, 8)
    expect(page.locator("#picture img")).to_have_attribute("src", re.compile("digit_8"))
    expect_everything_of(page, space, 8)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_half_of_the_page_is_empty(open_page, dark):
    """The page classifies the first example at the start. The panels are side by side."""
    page = open_page(dark=dark)
    for shown in ("#picture img", "#preview img"):
        expect(page.locator(shown)).to_be_visible()
    expect(page.locator("#timing")).to_contain_text("32 x 32 pixels")
    save_screenshot(page, f"start_{'dark' if dark else 'light'}")
    open_tab(page, "Look inside")
    settle(page)
    for panel in ("#activation", "#scan", "#field"):
        expect(page.locator(f"{panel} img")).to_be_visible()
    boxes = [page.locator(panel).bounding_box() for panel in ("#activation", "#scan", "#field")]
    assert len({box["y"] for box in boxes}) == 1
    assert boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
    assert all(box["width"] >= 220 for box in boxes)
    save_screenshot(page, f"look_inside_{'dark' if dark else 'light'}")


def test_captions_are_short(open_page):
    page = open_page()
    open_tab(page, "Look inside")
    for panel in ("activation", "scan", "field"):
        caption = page.locator(f"#{panel}-how")
        expect(caption).not_to_be_empty()
        assert len(caption.inner_text().split()) <= 25, panel


def test_a_cleared_picture_asks_for_one(open_page):
    page = open_page()
    page.get_by_role("button", name="Remove Image").or_(page.get_by_role("button", name="Clear")).first.click()
    expect(page.locator("#timing")).to_contain_text("Give a picture first")


def test_a_space_shows_photographs_and_can_be_shared(context, photograph_space):
    page = context.new_page()
    page.set_viewport_size({"width": 1280, "height": 1000})
    page.goto(photograph_space.url)
    expect(page.locator("#labels h2")).not_to_be_empty()
    expect(page.locator(".gallery-item, .gallery button")).to_have_count(15)
    expect(page.locator("#photographers")).to_contain_text("CC BY 2.0")
    expect(page.get_by_role("button", name="Duplicate this Space")).to_be_visible()
    expect(page.get_by_role("button", name="Copy a link")).to_be_visible()
    save_screenshot(page, "photographs")

    click_example(page, 1)
    settle(page)
    shown = page.locator("#preview img").get_attribute("src")
    session = page.evaluate("window.__gradio_session_hash__")
    link = page.evaluate(f"fetch('gradio_api/deep_link?session_hash={session}').then(answer => answer.json())")
    other = context.new_page()
    other.goto(f"{photograph_space.url}/?deep_link={link}")
    expect(other.locator("#picture img")).to_be_visible()
    settle(other)
    assert other.locator("#labels h2").inner_text() == page.locator("#labels h2").inner_text()
    assert shown and "coffee" in other.locator("#picture img").get_attribute("src")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_phone(open_page, dark):
    page = open_page(width=390, height=800, dark=dark)
    upload(page, EXAMPLES / "digit_3.png")
    expect(page.locator("#labels h2")).to_have_text("3")
    for tab in ("Classify", "Compare", "Measure", "Look inside"):
        open_narrow_tab(page, tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")[:3]
    assert (red + green + blue < 150) == dark
    save_screenshot(page, f"phone_{'dark' if dark else 'light'}")


def test_everything_is_reached_by_keyboard(open_page):
    page = open_page()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.innerText + document.activeElement.ariaLabel"))
    assert any("Classify" in text for text in reached) and any("Picture" in text for text in reached)
    page.get_by_role("tab", name="Measure", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Measure again", exact=True)).to_be_visible()


def find_slider(page: Page):
    """Return the opacity of a segmentation model, or the threshold of a detector."""
    return page.locator("#opacity input[type=range], #threshold input[type=range]")


def read_kind(page: Page) -> str:
    return "detector" if page.locator("#threshold").count() else "segmenter"


@pytest.mark.slow
def test_what_a_dense_model_finds(open_dense_page):
    page = open_dense_page()
    kind = read_kind(page)
    expect(page.locator("#timing")).to_contain_text("on cpu in float32, optimized (backend: numba)")
    expect(page.locator("#photographers")).to_contain_text("CC BY 2.0")
    assert page.get_by_role("tab").all_inner_texts() == ["Detect" if kind == "detector" else "Segment", "Measure"]
    expect(page.locator("#list li").first).to_be_visible()
    save_in_both_schemes(page, kind)
    before = page.locator("#list li").count()
    find_slider(page).press("End")
    if kind == "detector":
        expect(page.locator("#how")).to_contain_text("No box reaches the threshold. The best has")
        expect(page.locator("#list li")).to_have_count(0)
    find_slider(page).press("Home")
    expect(page.locator("#list li").first).to_be_visible()
    settle(page)
    assert page.locator("#list li").count() >= before


@pytest.mark.slow
def test_the_slider_does_not_run_the_network(open_dense_page, dense_space):
    page = open_dense_page()
    settle(page)
    network = SlowNetwork(page, dense_space, "find")
    before = page.locator("#view img").get_attribute("src")
    find_slider(page).press("Home")
    expect(page.locator("#view img")).not_to_have_attribute("src", before)
    settle(page)
    assert not network.held


@pytest.mark.slow
def test_late_findings_do_not_replace_those_of_a_newer_picture(open_dense_page, dense_space):
    page = open_dense_page()
    settle(page)
    network = SlowNetwork(page, dense_space, "find")
    click_example(page, 1)
    network.wait(1)
    click_example(page, 4)
    expect(page.locator("#picture img")).to_have_attribute("src", re.compile("temple"))
    network.let_go()
    settle(page)
    found = Image.open(BytesIO(httpx.get(page.locator("#view img").get_attribute("src")).content))
    with Image.open(PHOTOGRAPHS / "temple.jpg") as temple:
        assert abs(found.width / found.height - temple.width / temple.height) < 0.01


@pytest.mark.slow
def test_an_error_of_a_dense_page_is_shown_and_the_next_picture_works(open_dense_page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    page = open_dense_page()
    settle(page)
    upload(page, tmp_path / "broken.png")
    expect(page.locator("#timing")).to_contain_text("it is not an image in a format that Pillow reads")
    expect(page.locator("#view img")).to_have_count(0)
    expect(page.locator("#list li")).to_have_count(0)
    page.get_by_role("button", name="Remove Image").or_(page.get_by_role("button", name="Clear")).first.click()
    expect(page.locator("#timing")).to_contain_text("Give a picture first")
    upload(page, PHOTOGRAPHS / "cat.jpg")
    expect(page.locator("#view img")).to_be_visible()


@pytest.mark.slow
def test_measure_a_dense_model(open_dense_page):
    page = open_dense_page()
    open_tab(page, "Measure")
    expect(page.get_by_text("200704")).to_be_visible()
    expect(page.locator("#plot canvas, #plot svg").first).to_be_visible()


@pytest.mark.slow
def test_a_dense_page_on_a_phone(open_dense_page):
    page = open_dense_page(width=360, height=800)
    expect(page.locator("#list li").first).to_be_visible()
    for tab in ("Measure", "Detect" if read_kind(page) == "detector" else "Segment"):
        open_narrow_tab(page, tab)
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, tab
    save_in_both_schemes(page, f"{read_kind(page)}_phone")


@pytest.mark.slow
def test_the_endpoints_of_a_dense_page(dense_space):
    client = Client(dense_space.url, verbose=False)
    endpoints = client.view_api(return_format="dict", print_info=False)
    (name,) = endpoints["named_endpoints"].keys() - {"/measure"}
    assert not endpoints["unnamed_endpoints"]
    assert f"`{name}`" in (ROOT / "docs" / "demo.md").read_text()
    view, found, timing = client.predict(handle_file(PHOTOGRAPHS / "cat.jpg"), 0, api_name=name)
    assert max(Image.open(view).size) == 640 and "The forward pass took" in timing
    assert found and all({"label", "share" if name == "/segment" else "box"} <= each.keys() for each in found)
    assert len(client.predict(api_name="/measure")[1]["data"]) == 7
    with pytest.raises(Exception, match="Give a picture first"):
        client.predict(None, 0, api_name=name)
    client.close()
