"""The pages of the running Space in headless Chromium. Screenshots go to `.cache/screenshots`."""

import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect, sync_playwright


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "demo" / "examples"
SCREENSHOTS = ROOT / ".cache" / "screenshots"

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
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, space):
    """Open the page. All that it loads must come from the Space."""
    contexts, addresses = [], set()

    def open_page(width: int = 1280, height: int = 1000, dark: bool = False) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: addresses.add(urlsplit(request.url)))
        page.goto(space.url)
        expect(page.locator("#labels h2")).to_have_text("0")  # the first example
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert {address.netloc for address in addresses if address.scheme.startswith("http")} == {
        urlsplit(space.url).netloc
    }


def upload(page: Page, path: Path) -> None:
    page.locator("#picture input[type=file]").set_input_files(path)


def save_screenshot(page: Page, name: str) -> None:
    page.wait_for_timeout(1500)  # until the last change is drawn
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


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
    page.mouse.move(x, bottom, steps=15)
    page.mouse.up()
    page.wait_for_timeout(300)
    page.get_by_role("button", name="Classify the drawing").click()
    expect(page.locator("#labels h2")).to_have_text("1")
    save_screenshot(page, "draw")


def test_example_compare_and_measure(open_page):
    page = open_page()
    page.locator(".gallery-item, .gallery button").nth(7).click()
    expect(page.locator("#labels h2")).to_have_text("7")
    open_tab(page, "Compare")
    expect(page.locator("#agreement")).to_contain_text("Both say “7”")  # opening the tab compares
    page.locator(".gallery-item, .gallery button").nth(2).click()
    expect(page.locator("#labels h2")).to_have_text("2")
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
    upload(page, tmp_path / "broken.png")
    expect(page.get_by_text("it is not an image in a format that Pillow reads").first).to_be_visible()
    save_screenshot(page, "error")
    page.get_by_role("button", name="Remove Image").or_(page.get_by_role("button", name="Clear")).first.click()
    upload(page, EXAMPLES / "digit_5.png")
    expect(page.locator("#labels h2")).to_have_text("5")


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


@pytest.mark.parametrize("tab", ["activation", "scan", "field"])
def test_captions_are_short(open_page, tab):
    page = open_page()
    open_tab(page, "Look inside")
    caption = page.locator(f"#{tab}-how")
    expect(caption).not_to_be_empty()
    assert len(caption.inner_text().split()) <= 25


def test_a_cleared_picture_asks_for_one(open_page):
    page = open_page()
    page.get_by_role("button", name="Remove Image").or_(page.get_by_role("button", name="Clear")).first.click()
    expect(page.locator("#timing")).to_contain_text("Give a picture first")


def test_a_space_shows_photographs_and_can_be_shared(browser, photograph_space):
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    try:
        page = context.new_page()
        page.goto(photograph_space.url)
        expect(page.locator("#labels h2")).not_to_be_empty()
        expect(page.locator(".gallery-item, .gallery button")).to_have_count(15)
        expect(page.locator("#photographers")).to_contain_text("CC BY 2.0")
        expect(page.get_by_role("button", name="Duplicate this Space")).to_be_visible()
        expect(page.get_by_role("button", name="Copy a link")).to_be_visible()
        save_screenshot(page, "photographs")

        page.locator(".gallery-item, .gallery button").nth(1).click()
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
    finally:
        context.close()


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
