"""The status page in a browser: it asks nobody else for anything, and shows what the server did."""

import re
import shutil

import pytest

from minicache_trt.serving.operations import STATUS_PAGE
from tests.serving.live import fake_llm
from tests.serving.test_lifecycle import settled

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium at two window sizes; skips where there is none."""
    binary = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
    ):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def wait_for(browser, condition):
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, 60, 0.05).until(condition)


def polls(browser):
    return int(browser.execute_script("return document.documentElement.dataset.polls || 0"))


def test_the_page_shows_what_the_server_did(serve, browser):
    from selenium.webdriver.common.by import By

    live = serve(fake_llm())
    for length in (100, 100, 300):
        body = {"prompt": [5] * length, "max_tokens": 20, "ignore_eos": True}
        assert live.http.post("/v1/completions", json=body).status_code == 200
    settled(live)
    live.history.sample()
    browser.get(live.url)
    wait_for(browser, lambda page: polls(page) >= 2)
    text = browser.find_element(By.TAG_NAME, "body").text
    assert "test-model" in text and "minicache cache" in text and "ready" in text
    assert re.search(r"Generated\s+60\s+tokens", text)
    assert "3 length" in text and "--audit-rate" in browser.find_element(By.ID, "charts").get_attribute("textContent")
    report = live.http.get("/status.json").json()
    hit_rate = round(100 * report["samples"][-1]["hit_rate"])
    assert hit_rate > 0 and re.search(rf"Hit rate\s+{hit_rate}\s*%", text)
    charts = browser.find_elements(By.CSS_SELECTOR, "svg")
    assert len(charts) == 6
    assert all(chart.find_elements(By.CSS_SELECTOR, "path.line") for chart in charts[:5])
    assert all(path.get_attribute("d").startswith("M") for path in browser.find_elements(By.CSS_SELECTOR, "path.line"))
    assert not browser.execute_script("return document.documentElement.scrollWidth > innerWidth")

    before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    browser.find_element(By.ID, "theme").click()
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != before
    browser.set_window_size(500, 900)
    assert not browser.execute_script("return document.documentElement.scrollWidth > innerWidth")
    # Nothing was refused by the page's policy, and no script failed; browsers ask for an icon by themselves.
    severe = [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]]
    assert severe == []


def test_the_page_tells_when_the_server_is_gone(serve, browser):
    from selenium.webdriver.common.by import By

    live = serve(fake_llm())
    browser.get(f"{live.url}/status")
    wait_for(browser, lambda page: polls(page) >= 1)
    live.close()
    wait_for(browser, lambda page: page.find_element(By.ID, "state").text == "not reachable")


def test_the_page_has_no_external_resources():
    page = STATUS_PAGE.read_text()
    assert set(re.findall(r"https?://[^\"'\s)]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe|script src)|@import|url\(", page)
