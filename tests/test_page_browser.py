"""The report in a browser: it draws, filters, fits a phone, turns dark, and reaches for nothing."""

import json
import shutil

import pytest

from krl.report import command as report
from tests.written import write_whole_run

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'krl[dev]'")
ui = pytest.importorskip("selenium.webdriver.support.ui")
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Chromium and its driver: apt install chromium chromium-driver"
)

EVIL = '<script>document.title="hacked"</script><img src=x onerror="document.title=\'hacked\'">'
CHARTS = [
    "accuracy",
    "flow",
    "effective",
    "price",
    "counts",
    "calibration",
    "budgets",
    "waiting",
    "lengths",
    "mismatch",
    "phases",
]


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield running
    running.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """(page of one run, page of two, page of two with long names)."""
    place = tmp_path_factory.mktemp("runs")
    runs = [
        write_whole_run(place / rule, steps=24, rule=rule, response=EVIL, seed=n)
        for n, rule in enumerate(("uniform", "knapsack"))
    ]
    report.write(runs[1:], place / "one.html")
    report.write(runs, place / "two.html")
    long = [
        write_whole_run(place / f"directory_{n}" / ("of_a_long_name_" * 5), steps=2, rule="rule" * 20) for n in (1, 2)
    ]
    report.write(long, place / "long.html")
    return place / "one.html", place / "two.html", place / "long.html"


def open_page(driver, path, *, width=1280, scheme="light"):
    """Open a page in a window of a width and wait until its charts are drawn."""
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(path.as_uri())
    ui.WebDriverWait(driver, 30).until(
        lambda d: d.execute_script("return document.documentElement.dataset.drawn") == "yes"
    )


def run(driver, script, *arguments):
    return driver.execute_script("return " + script, *arguments)


def choose(driver, name, value):
    """Give a filter a value as a person would; returns what the table then says it has."""
    return driver.execute_script(
        "const field = document.querySelector('.filters').elements[arguments[0]]; field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', { bubbles: true })); return document.querySelector('.pages output').textContent",
        name, value,
    )  # fmt: skip


@pytest.mark.slow
def test_every_chart_has_marks_and_nothing_complains(driver, pages):
    for path, charts in zip(pages[:2], (CHARTS, [*CHARTS, "differences"]), strict=True):
        open_page(driver, path)
        for name in charts:
            marks = f"document.querySelectorAll('#{name} .chart svg .role-mark path').length"
            assert run(driver, marks) > 0, name
            for button in driver.find_elements("css selector", f"#{name} .views button"):
                driver.execute_script(f"document.querySelector('#{name} .chart').replaceChildren()")
                button.click()
                ui.WebDriverWait(driver, 10).until(lambda d, marks=marks: run(d, marks) > 0)
                assert button.get_attribute("aria-pressed") == "true"
        assert driver.get_log("browser") == []


def test_nothing_is_fetched(driver, pages):
    open_page(driver, pages[1])
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [pages[1].as_uri()]
    refused = "fetch('https://example.com/').then(() => 'sent', () => 'refused')"
    assert run(driver, refused) == "refused"
    assert any("Content Security Policy" in entry["message"] for entry in driver.get_log("browser"))


def test_what_a_model_wrote_is_shown_as_text(driver, pages):
    open_page(driver, pages[0])
    assert run(driver, "document.querySelector('.rollouts td:last-child .text').textContent") == EVIL
    assert run(driver, "document.querySelectorAll('.rollouts img, .rollouts script').length") == 0
    assert driver.title == "knapsack"


def test_filters_and_pages(driver, pages):
    open_page(driver, pages[0])
    data = run(driver, "JSON.parse(document.getElementById('data').textContent).rollouts")
    shown = lambda number: f"{number} rollouts, page 1 of {-(-number // 20)}"  # noqa: E731
    assert len(data) > 100
    assert choose(driver, "outcome", "") == shown(len(data))
    for outcome in ("solved", "failed", "fault", "cut off"):
        number = sum(row["outcome"] == outcome for row in data)
        assert number > 0
        assert choose(driver, "outcome", outcome) == shown(number)
    choose(driver, "outcome", "solved")
    hard = [row for row in data if row["outcome"] == "solved" and 0.1 <= row["belief"] < 0.5]
    assert choose(driver, "belief", "0.1 0.5") == shown(len(hard))
    assert choose(driver, "step", str(hard[0]["step"])) == shown(sum(row["step"] == hard[0]["step"] for row in hard))
    for name in ("outcome", "belief", "step"):
        choose(driver, name, "")
    prompt = data[7]["prompt"].upper()
    assert choose(driver, "text", prompt) == shown(sum(row["prompt"].upper() == prompt for row in data))
    assert choose(driver, "text", "no such text") == "no rollout is like that"
    choose(driver, "text", "")
    driver.find_element("css selector", ".pages button[name=on]").click()
    assert run(driver, "document.querySelector('.pages output').textContent").startswith(
        f"{len(data)} rollouts, page 2 of"
    )
    assert len(driver.find_elements("css selector", ".rollouts tbody tr")) == 20


def test_the_slider_moves_through_the_steps(driver, pages):
    open_page(driver, pages[0])
    dots = (
        "[...document.querySelectorAll('#counts .role-mark path')].map((mark) => mark.getAttribute('transform')).join()"
    )
    before = run(driver, dots)
    driver.execute_script(
        "const s = document.querySelector('#counts input'); s.value = 0; s.dispatchEvent(new Event('input'))"
    )
    assert run(driver, "document.querySelector('#counts output').textContent") == "1"
    assert run(driver, dots) != before


def test_dark_and_light_follow_the_system(driver, pages):
    open_page(driver, pages[0])
    look = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('#accuracy .role-mark path')).stroke]"
    light = run(driver, look)
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    dark = run(driver, look)
    brightness = [sum(map(int, colour[4:-1].split(","))) for colour in (light[0], dark[0])]
    assert brightness[0] > 700 > 100 > brightness[1]
    assert light[1] != dark[1]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_phone_scrolls_down_only(driver, pages, which):
    open_page(driver, pages[which], width=360)
    assert run(driver, "[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    wide = "[...document.querySelectorAll('.chart svg')].filter((chart) => chart.getBoundingClientRect().right > 360).length"
    assert run(driver, wide) == 0
