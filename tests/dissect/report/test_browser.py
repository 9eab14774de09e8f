"""The page of a real sweep in a real browser, from a file and without a network.

The results under `data/` are those of `bench -c bench/quick --only technique=none,F,R,LFA,ACP` on two CPU cores.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_efficient.cli.bench.outputs import html_report
from lightning_efficient.cli.bench.store import read_results

DATA = Path(__file__).with_name("data") / "results.jsonl"
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

if not (BROWSER and DRIVER):
    if os.environ.get("LE_REQUIRE_BROWSER") == "1":
        raise pytest.UsageError("LE_REQUIRE_BROWSER=1, but chromium and chromedriver are not installed.")
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

LIGHT, DARK = "light", "dark"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html_report(read_results(DATA), "bench/quick"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    profile = tmp_path_factory.mktemp("profile")
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # A given driver: selenium looks for none, and downloads none.
    driver = webdriver.Chrome(options=options, service=Service(executable_path=str(DRIVER)))
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: webdriver.Chrome, page: Path) -> webdriver.Chrome:
    show(browser, page)
    return browser


def show(browser: webdriver.Chrome, page: Path, *, width: int = 1200, scheme: str = LIGHT) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def column(browser: webdriver.Chrome, head: str) -> tuple[Any, Any]:
    """The button and a function that reads the column of the table of all cases."""
    table = next(
        each for each in browser.find_elements(By.CSS_SELECTOR, "table.sortable")
        if "speed by none" in each.find_element(By.TAG_NAME, "thead").text
    )  # fmt: skip
    heads = table.find_elements(By.CSS_SELECTOR, "thead th")
    at = next(index for index, each in enumerate(heads) if each.text.startswith(head))

    def read() -> list[str | None]:
        rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
        return [row.find_elements(By.CSS_SELECTOR, "td, th")[at].get_attribute("data-v") for row in rows]

    return heads[at], read


def test_every_plot_has_marks_that_can_be_seen(opened: webdriver.Chrome) -> None:
    charts = opened.find_elements(By.CSS_SELECTOR, "section figure svg")
    visible = [chart for chart in charts if chart.is_displayed()]
    assert len(visible) >= 8
    for chart in visible:
        marks = chart.find_elements(By.CSS_SELECTOR, ".mark")
        sizes = [(mark.rect["width"], mark.rect["height"]) for mark in marks]
        assert sizes, chart.get_attribute("aria-label")
        assert all(height > 5 for _, height in sizes)
        assert max(width for width, _ in sizes) > 5
        assert all(width > 0 for width, _ in sizes)


def test_the_longest_bar_is_the_largest_value(opened: webdriver.Chrome) -> None:
    chart = opened.find_element(By.CSS_SELECTOR, "svg.bars")
    bars = chart.find_elements(By.CSS_SELECTOR, ".mark")
    values = [float(str(bar.get_attribute("textContent")).split(": ")[1].strip("\u00d7")) for bar in bars]
    widths = [bar.rect["width"] for bar in bars]
    assert len(values) > 2
    assert widths == pytest.approx([widths[0] * value / values[0] for value in values], rel=0.02)


def test_no_text_of_a_plot_is_cut_off(opened: webdriver.Chrome) -> None:
    """With the fonts that the browser really uses."""
    beyond = opened.execute_script(
        """const found = [];
        for (const svg of document.querySelectorAll("svg.chart")) {
          const frame = svg.getBoundingClientRect();
          if (!frame.width) continue;
          for (const text of svg.querySelectorAll("text")) {
            const box = text.getBoundingClientRect();
            if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
                || box.bottom > frame.bottom + 1) found.push(text.textContent);
          }
        }
        return found;"""
    )
    assert beyond == []


@pytest.mark.parametrize("press", ["click", "enter"])
def test_a_head_sorts_by_number_up_then_down(opened: webdriver.Chrome, press: str) -> None:
    head, read = column(opened, "training state")
    before = read()
    numbers = sorted(float(value) for value in before if value is not None)
    missing = [None] * (len(before) - len(numbers))
    assert missing
    assert len(numbers) > 5
    assert numbers != sorted(numbers, key=str)  # else sorting as text would pass
    button = head.find_element(By.TAG_NAME, "button")
    for direction, wanted in (("ascending", numbers), ("descending", numbers[::-1])):
        button.click() if press == "click" else button.send_keys(Keys.ENTER)
        values = read()
        assert head.get_attribute("aria-sort") == direction
        assert [float(value) for value in values if value is not None] == wanted
        assert values[len(numbers) :] == missing  # what has no number comes last, whichever way


def test_text_sorts_and_one_column_at_a_time(opened: webdriver.Chrome) -> None:
    speed, _ = column(opened, "speed (")
    status, _ = column(opened, "status")
    speed.find_element(By.TAG_NAME, "button").click()
    status.find_element(By.TAG_NAME, "button").click()
    assert [speed.get_attribute("aria-sort"), status.get_attribute("aria-sort")] == ["none", "ascending"]


def test_details_open_by_the_keyboard(opened: webdriver.Chrome) -> None:
    details = opened.find_element(By.CSS_SELECTOR, "details")
    inner = details.find_element(By.CSS_SELECTOR, "table")
    assert not inner.is_displayed()
    details.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert inner.is_displayed()
    assert "Modules" in details.text


def test_no_errors_and_no_requests(browser: webdriver.Chrome, page: Path) -> None:
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # of the tests before
    show(browser, page)
    browser.find_element(By.CSS_SELECTOR, "thead button").click()
    assert browser.get_log("browser") == []
    requests = [
        entry["message"] for entry in browser.get_log("performance") if 'requestWillBeSent"' in entry["message"]
    ]
    assert len(requests) == 1, requests  # the page itself
    assert page.as_uri() in requests[0]


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_text_is_legible(browser: webdriver.Chrome, page: Path, scheme: str) -> None:
    """Contrast of 4.5 and more (WCAG AA), on the page and in the plots."""
    show(browser, page, scheme=scheme)
    colours = browser.execute_script(
        """const back = getComputedStyle(document.body).backgroundColor;
        const all = ["h1", "section > p", "tbody td", ".lead li", "summary"].map(
          (each) => getComputedStyle(document.querySelector(each)).color);
        all.push(getComputedStyle(document.querySelector("svg.chart > text")).fill);
        return [back, ...all];"""
    )
    back, *texts = ([int(float(part)) for part in each[each.index("(") + 1 : -1].split(",")[:3]] for each in colours)
    assert (sum(back) < 3 * 64) == (scheme == DARK)
    for text in texts:
        light, dark = sorted((luminance(back), luminance(text)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def luminance(colour: list[int]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_narrow_screen_scrolls_tables_and_plots_but_not_the_page(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page, width=400)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    assert browser.find_element(By.CSS_SELECTOR, ".scroll").rect["width"] <= 400
