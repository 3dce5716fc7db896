"""The page in a real browser: Debian's chromium, or the one that $CHROMIUM names; skipped where there is none."""

from __future__ import annotations

import base64
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastvlp.search.pictures import PictureFolder
from fastvlp.search.thumbnails import thumbnail
from fastvlp.serve.api import create_app
from tests.serve.standins import StandinEmbedder, StandinIndex, listening, picture, shade

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the page is not tested")
expect = playwright.expect
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
if not Path(CHROMIUM).exists():
    pytest.skip(f"no browser at {CHROMIUM}; install chromium or set $CHROMIUM", allow_module_level=True)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# A browser takes seconds for what the other tests do in milliseconds.
pytestmark = pytest.mark.slow
COUNT = 30


def filled(folder: Path) -> dict[str, Any]:
    """An embedder, an index of COUNT pictures of each colour, and how they look."""
    embedder, index, pictures = StandinEmbedder(), StandinIndex(), PictureFolder(folder / "pictures")
    names = {english: chinese for chinese, english in embedder.chinese.items()}
    for colour, chinese in names.items():
        for i in range(COUNT):
            data, id = shade(colour, i), f"{colour}/{i}"
            info = {"caption": f"{colour} number {i}", "caption_zh": f"{chinese} 第 {i}", "source": "made"}
            index.add([id], embedder.images(embedder.pixels([data])), [info])
            pictures.put(id, thumbnail(data))
    report = folder / "report.html"
    report.write_text("<title>Run</title><h1>The run</h1>")
    return {"embedder": embedder, "index": index, "pictures": pictures, "report": report}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return filled(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def address(parts: dict[str, Any]) -> Iterator[str]:
    with listening(create_app(**parts)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """At the start page. Fails for a request to another host, and for an error that the page did not handle."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page, wrong = context.new_page(), []
    page.on("request", lambda sent: None if sent.url.startswith((address, "blob:")) else wrong.append(sent.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(address)
    page.wait_for_selector(".tile img.here")
    yield page
    context.close()
    assert not wrong


def captions_of(page: Any, first: str) -> list[str]:
    """The captions of the results, when the first begins like this."""
    expect(page.locator("#grid li:first-child .score")).to_be_visible()
    expect(page.locator("#grid li:first-child .caption")).to_have_text(re.compile(f"^{first}"))
    return page.locator(".tile .caption").all_text_contents()


def test_typing_searches_in_english_and_chinese(page: Any):
    assert "A few of 120 pictures" in page.text_content("#status")
    page.keyboard.press("/")
    page.keyboard.type("blue")
    assert all(caption.startswith("blue") for caption in captions_of(page, "blue")[:24])
    assert float(page.text_content(".tile .score >> nth=0")) > 0.9
    assert page.url.endswith("/?q=blue")
    page.fill("#text", "绿色")
    page.keyboard.press("Enter")
    captions_of(page, "green")
    page.go_back()
    captions_of(page, "blue")
    assert page.input_value("#text") == "blue"
    page.reload()
    captions_of(page, "blue")


@pytest.mark.parametrize(
    ("languages", "intro", "hint"),
    [
        (["en"], "Type in English,", "Describe a picture"),
        (["zh"], "Type in Chinese,", "用中文描述图片"),
        (["en", "zh"], "Type in English or Chinese,", "Describe a picture · 用中文也行"),
        ([], "Type words,", "Describe a picture"),
    ],
)
def test_the_page_asks_for_the_languages_of_the_model(page: Any, languages: list[str], intro: str, hint: str):
    page.route("**/health", lambda route: route.fulfill(json=route.fetch().json() | {"languages": languages}))
    page.reload()
    expect(page.locator("#intro")).to_contain_text(intro)
    assert page.get_attribute("#text", "placeholder") == hint
    placeholder = page.get_attribute("#question-text", "placeholder")
    assert ("图里有什么" in placeholder, "what is in it?" in placeholder) == ("zh" in languages, languages != ["zh"])


def test_no_search_while_an_input_method_composes(page: Any):
    bodies: list[bytes] = []
    page.on("request", lambda sent: bodies.append(sent.post_data_buffer) if "/v1/search" in sent.url else None)
    page.focus("#text")
    keyboard = page.context.new_cdp_session(page)
    keyboard.send("Input.imeSetComposition", {"text": "hong", "selectionStart": 4, "selectionEnd": 4})
    page.wait_for_timeout(600)
    assert page.input_value("#text") == "hong" and not bodies
    keyboard.send("Input.insertText", {"text": "红色"})
    captions_of(page, "red")
    assert all("红色".encode() in body for body in bodies)


DROP = """([data, type]) => {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const held = new DataTransfer();
    held.items.add(new File([bytes], "mine.png", { type: "image/png" }));
    const init = type === "paste" ? { clipboardData: held } : { dataTransfer: held };
    const kind = type === "paste" ? ClipboardEvent : DragEvent;
    document.body.dispatchEvent(new kind(type, { ...init, bubbles: true, cancelable: true }));
}"""


@pytest.mark.parametrize("how", ["drop", "paste", "pick"])
def test_a_picture_searches(page: Any, how: str, tmp_path: Path):
    if how == "pick":
        (tmp_path / "mine.png").write_bytes(shade("green", 3))
        with page.expect_file_chooser() as chooser:
            page.click("#pick")
        chooser.value.set_files(tmp_path / "mine.png")
    else:
        data = base64.b64encode(shade("green", 3)).decode()
        if how == "drop":
            page.evaluate(DROP, [data, "dragover"])
            assert page.is_visible("#drop")
        page.evaluate(DROP, [data, how])
    assert captions_of(page, "green")[0] == "green number 3"
    assert page.is_visible("#panel") and page.is_visible("#chip") and not page.is_visible("#drop")
    expect(page.locator("#reply")).to_contain_text("a green picture")
    page.keyboard.press("Escape")
    page.wait_for_selector("#intro")
    assert not page.is_visible("#panel")


def test_a_click_searches_by_a_result_and_the_model_answers(page: Any):
    page.fill("#text", "red")
    captions_of(page, "red")
    page.click(".tile >> text='red number 4'")
    page.wait_for_selector("#panel")
    assert not page.input_value("#text") and "red number 4" in page.text_content("#captions")
    assert "红色 第 4" in page.text_content("#captions") and "made" in page.text_content("#info")
    captions_of(page, "red")
    assert "red number 4" not in page.locator(".tile .caption").all_text_contents()
    expect(page.locator("#reply")).to_contain_text("a red picture")
    page.reload()
    expect(page.locator("#captions")).to_contain_text("red number 4")
    page.fill("#question-text", "which colour?")
    page.keyboard.press("Enter")
    expect(page.locator("#answers dd")).to_have_text("red")
    page.fill("#text", "blue")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("and like this picture")
    page.click("#chip button")
    captions_of(page, "blue")
    assert not page.is_visible("#panel")


def test_everything_works_by_keyboard(page: Any):
    page.keyboard.press("/")
    page.keyboard.type("white")
    page.keyboard.press("Enter")
    captions = captions_of(page, "white")
    page.keyboard.press("ArrowDown")
    focused = "document.activeElement.querySelector('.caption')?.textContent"
    assert page.evaluate(focused) == captions[0]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    columns = page.evaluate("getComputedStyle(document.getElementById('grid')).gridTemplateColumns.split(' ').length")
    assert page.evaluate(focused) == captions[1 + columns]
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "focus is visible"
    page.keyboard.press("Enter")
    page.wait_for_selector("#panel")
    assert captions[1 + columns] in page.text_content("#captions")
    page.keyboard.press("Escape")
    page.wait_for_selector("#intro")
    page.keyboard.press("/")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "text"


def test_more_is_loaded_as_one_scrolls(page: Any):
    page.fill("#text", "red")
    captions_of(page, "red")
    for _ in range(40):
        page.mouse.wheel(0, 4000)
        page.wait_for_timeout(100)
        if page.locator(".tile").count() == 4 * COUNT:
            break
    captions = page.locator(".tile .caption").all_text_contents()
    assert len({*captions}) == len(captions) == 4 * COUNT
    assert "120 of 120" in page.text_content("#status")


def test_empty_and_failed_searches_say_so(page: Any, address: str):
    page.route("**/v1/search", lambda route: route.abort())
    page.fill("#text", "red")
    page.wait_for_selector("#problem")
    assert "does not answer" in page.text_content("#problem") and page.locator(".waiting").count() == 0
    page.unroute("**/v1/search")
    page.click("#problem button")
    captions_of(page, "red")
    assert not page.is_visible("#problem")
    page.fill("#text", "a" * 2000)
    page.route("**/v1/search", lambda route: route.fulfill(json={"results": [], "next_offset": None}))
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Nothing found.")


def test_unknown_words_and_far_results_are_told(page: Any, parts: dict[str, Any]):
    page.fill("#text", "blue qat")
    expect(page.locator("#notes")).to_contain_text("does not know: qat")
    # One route to the end: a request may be under way while the next words are typed.
    changed: dict[str, bool] = {"near": False}
    page.route("**/v1/search", lambda route: route.fulfill(json=route.fetch().json() | changed))
    page.fill("#text", "blue")
    expect(page.locator("#notes")).to_contain_text("Nothing here is near")
    changed = {"can_tell": False}
    page.fill("#text", "red")
    expect(page.locator("#notes")).to_contain_text("cannot tell")
    changed = {}
    page.fill("#text", "green")
    captions_of(page, "green")
    expect(page.locator("#notes")).to_be_empty()


def test_a_picture_that_was_given_survives_a_reload(page: Any):
    page.evaluate(DROP, [base64.b64encode(shade("green", 3)).decode(), "drop"])
    captions_of(page, "green")
    page.reload()
    assert captions_of(page, "green")[0] == "green number 3" and page.is_visible("#chip")


def test_tiles_of_portraits_are_square(page: Any):
    tall = thumbnail(picture((9, 9, 9), 30, shape=(20, 300)))
    page.route("**/v1/pictures/**", lambda route: route.fulfill(body=tall, content_type="image/webp"))
    page.reload()
    page.wait_for_selector(".tile img.here")
    box = page.locator(".tile .photo").first.bounding_box()
    assert abs(box["width"] - box["height"]) < 1


def test_the_report_is_one_click_away(page: Any):
    page.click("text=Report")
    assert page.title() == "Run"


def test_the_interface_can_be_read_and_tried(page: Any, address: str):
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(f"{address}/docs")
    expect(page.locator(".opblock-summary-path", has_text="/v1/embeddings")).to_be_visible()
    page.click(".opblock-summary-path >> text=/health")
    page.click("text=Try it out")
    page.click("text=Execute")
    expect(page.locator(".live-responses-table tbody .response-col_status")).to_contain_text("200")
    assert errors == []


def test_everything_has_a_name(page: Any):
    page.click(".tile >> nth=0")
    page.wait_for_selector("#question-text")
    named = "part.ariaLabel || part.textContent.trim() || part.labels?.length || part.getAttribute('alt') !== null"
    parts = "[...document.querySelectorAll('button, input:not([hidden]), a, img')]"
    assert page.evaluate(f"{parts}.filter((part) => !({named})).map((part) => part.outerHTML)") == []


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens_and_dark_mode(browser: Any, address: str, width: int):
    papers = []
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=True)
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector(".tile")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.tap(".tile >> nth=0")
        page.wait_for_selector("#question-text")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate(
            "document.getElementById('panel').scrollWidth <= document.getElementById('panel').clientWidth"
        )
        papers.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    assert papers[0] != papers[1]


def test_the_page_asks_for_a_key_once(browser: Any, parts: dict[str, Any]):
    with listening(create_app(**parts, keys=("sesame",))) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector("#key[open]")
        for key, message in (("wrong", "That is not a key"), ("sesame", None)):
            page.fill("#token", key)
            page.keyboard.press("Enter")
            if message:
                page.wait_for_selector(f"text={message}")
        page.wait_for_selector(".tile img.here")
        page.reload()
        page.wait_for_selector(".tile img.here")
        assert not page.is_visible("#key")
        context.close()
