"""The report's page in a real browser: off by default (`-m browser`), skipped where chromium or playwright is missing."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.results_folder import HOSTILE, REAL, Plan, make_results

from nmsweep.commands.report import main as report

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mini and real cells, more than a page of them, failed ones and hostile names."""
    folder = tmp_path_factory.mktemp("page") / "results"
    make_results(folder, Plan(models=("alpha", *HOSTILE), failed_every=17, missing_every=13))
    make_results(folder, Plan(models=("alpha",), patterns=("2:4", "8:16"), mitigations=("none", "shift"), tasks=REAL))
    assert report([f"results_dir={folder}"]) == 0
    return folder / "report" / "index.html"


@dataclass
class Opened:
    """A page, and what went wrong or left it."""

    page: Any
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=["desk", "dark", "phone"])
def opened(request: pytest.FixtureRequest, browser: Any, page_file: Path) -> Iterator[Opened]:
    size = {"width": 390, "height": 844} if request.param == "phone" else {"width": 1300, "height": 900}
    page = browser.new_page(viewport=size, color_scheme="light" if request.param == "desk" else "dark", reduced_motion="reduce")  # fmt: skip
    found = Opened(page)
    page.on("console", lambda message: found.said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: found.said.append(str(error)))
    page.on("dialog", lambda dialog: (found.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda sent: found.requests.append(sent.url))
    page.goto(page_file.as_uri())
    page.wait_for_selector("#table tbody tr")
    yield found
    page.close()
    assert found.said == [], "no console message, no script of a record ran"
    assert [url for url in found.requests if not url.startswith("data:")] == [page_file.as_uri()]


def column(page: Any, name: str) -> list[str]:
    place = page.eval_on_selector_all("#table thead th", "(heads) => heads.map((head) => head.dataset.name)").index(
        name
    )
    return list(page.eval_on_selector_all(f"#table tbody tr td:nth-child({place + 1})", "(cells) => cells.map((cell) => cell.textContent)"))  # fmt: skip


def value(text: str) -> float:
    return float(text.split()[0])


def test_nothing_is_wider_than_the_screen(opened: Opened) -> None:
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_colours_follow_the_system_and_can_be_read(opened: Opened) -> None:
    def luminance(selector: str, name: str) -> float:
        text = opened.page.eval_on_selector(selector, f"(node) => getComputedStyle(node).{name}")
        parts = [int(part) / 255 for part in text.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ground = luminance("body", "backgroundColor")
    assert (ground < 0.1) == opened.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    for selector in ("body", ".hint", "nav a", "#table tbody td button"):
        ends = sorted((luminance(selector, "color"), ground))
        assert (ends[1] + 0.05) / (ends[0] + 0.05) >= 4.5, selector


def test_a_column_sorts_both_ways_by_keyboard(opened: Opened) -> None:
    page = opened.page
    button = "#table th[data-name=drop] button"
    for direction, sign in (("ascending", 1), ("descending", -1)):
        page.focus(button)
        page.keyboard.press("Enter")
        assert page.get_attribute("#table th[data-name=drop]", "aria-sort") == direction
        shown = [sign * value(text) for text in column(page, "drop") if text != "–"]
        assert shown == sorted(shown)
        assert column(page, "drop")[len(shown) :] == ["–"] * (len(column(page, "drop")) - len(shown))


def test_filters_leave_what_they_say_and_never_mix_data(opened: Opened) -> None:
    page = opened.page
    page.select_option("#filter-data", label="mini")
    page.select_option("#filter-pattern", label="8:16")
    page.select_option("#filter-status", label="done")
    assert set(column(page, "pattern")) == {"8:16"}
    assert set(column(page, "data")) == {"mini"}
    page.fill("#filter-text", "<script>")
    assert set(column(page, "model")) == {HOSTILE[0]}
    assert page.text_content("#count").startswith(f"{len(column(page, 'model'))} of ")
    page.fill("#filter-text", "no such cell")
    assert column(page, "model") == []
    page.click("#filters button[type=reset]")
    page.wait_for_selector("#table tbody tr:nth-child(2)")
    assert "all" not in page.eval_on_selector_all("#filter-data option", "(all) => all.map((one) => one.textContent)")


def test_pages_turn(opened: Opened) -> None:
    page = opened.page
    page.select_option("#filter-data", label="mini")
    first = column(page, "cell")
    assert len(first) == 100
    page.click("#next")
    assert not set(first) & set(column(page, "cell"))
    assert page.is_disabled("#next")
    page.click("#previous")
    assert column(page, "cell") == first


def test_a_cell_opens_and_closes_by_keyboard_and_shows_its_command(opened: Opened) -> None:
    page = opened.page
    page.fill("#filter-text", "2:4")
    page.focus("#table tbody tr button")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    text = page.text_content("#detail")
    assert "force=true" in text
    assert "pattern=2:4" in text
    assert "McNemar" in text
    assert "nmsweep inspect" in text
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


def test_the_chart_answers_to_the_arrow_keys_and_to_the_pointer(opened: Opened) -> None:
    page = opened.page
    page.focus("#plot svg")
    page.keyboard.press("ArrowRight")
    first = page.text_content("#point")
    assert "force=true" in first
    page.keyboard.press("End")
    assert page.text_content("#point") != first
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    for x in ("drop", "flops_density"):
        page.select_option("#axis-x", x)
        page.locator("#plot svg").scroll_into_view_if_needed()
        box = page.locator("#plot svg > :is(circle, rect, path)").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        assert "force=true" in page.text_content("#point")


def test_every_control_can_be_reached_by_tab_and_has_a_name(opened: Opened) -> None:
    names = opened.page.eval_on_selector_all(
        "button, select, input, [tabindex='0']",
        "(nodes) => nodes.map((node) => node.getAttribute('aria-label') || node.textContent || (node.labels && node.labels[0] && node.labels[0].textContent) || '')",
    )
    assert all(name.strip() for name in names)
    reached = set()
    for _ in range(30):
        opened.page.keyboard.press("Tab")
        reached.add(opened.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"filter-text", "filter-pattern"} <= reached
