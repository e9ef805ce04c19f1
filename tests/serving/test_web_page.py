"""The page, driven in Chromium; where there is none, and no Gradio, this is skipped."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from live_server import RED_TRIANGLE, TINY, metric, server
from safetensors.numpy import load_file, save_file
from tiny_run import ROOT

pytestmark = pytest.mark.slow
for package in ("fastapi", "gradio"):
    pytest.importorskip(package)
webdriver = pytest.importorskip("selenium.webdriver")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip("no Chromium here", allow_module_level=True)

OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*OPTIONS.split(), f"--user-data-dir={tmp_path}", "--window-size=1280,900"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.chrome.service.Service(DRIVER)
    with webdriver.Chrome(options=options, service=service) as browser:
        yield browser


def wait_until(is_so: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.05)


def generated(address: str) -> float:
    """Tokens that the run's model has generated so far."""
    with urlopen(f"{address}/metrics") as figures:
        return metric(figures.read().decode(), 'llava_generated_tokens_total{model="tiny_lora"}')


class Page:
    """What a user does on it."""

    def __init__(self, browser: Any, address: str):
        self.browser, self.address = browser, address
        browser.get(address)
        wait_until(lambda: self.all("#question textarea"))

    def all(self, css: str) -> list[Any]:
        return self.browser.find_elements("css selector", css)

    def chats(self) -> list[list[str]]:
        """The texts of the messages of every chat that is shown."""
        script = """return [...document.querySelectorAll('.chat')].filter(c => c.offsetParent)
            .map(c => [...c.querySelectorAll('[data-testid=user], [data-testid=bot]')]
            .map(m => m.innerText.trim()).filter(t => t))"""
        return self.browser.execute_script(script)

    def upload(self, file: str) -> None:
        self.all("#question input[type=file]")[0].send_keys(file)
        wait_until(lambda: self.all("#question img"))

    def ask(self, text: str) -> None:
        (box,) = self.all("#question textarea")
        box.send_keys(text)
        box.send_keys("\n")

    def is_ready(self) -> bool:
        return bool(self.all("#question .submit-button"))

    def shoot(self, folder: Path, name: str) -> None:
        assert self.browser.save_screenshot(str(folder / f"{name}.png"))

    def check(self) -> None:
        """Nothing was asked of others, and nothing failed."""
        assert [row for row in self.browser.get_log("browser") if row["level"] != "INFO"] == []
        sent = [
            json.loads(row["message"])["message"] for row in self.browser.get_log("performance")
        ]
        urls = {
            row["params"]["request"]["url"]
            for row in sent
            if row["method"] == "Network.requestWillBeSent"
        }
        ours = (self.address, "data:", "blob:", "chrome:")  # the browser's own first page
        assert {url for url in urls if not url.startswith(ours)} == set()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What configs/tiny_lora.py learns, which takes minutes."""
    folder = tmp_path_factory.mktemp("runs")
    command = ("-m", "llava_jax.train", "--config", "configs/tiny_lora.py", "--output-dir")
    subprocess.run([sys.executable, *command, str(folder)], cwd=ROOT, check=True)
    return folder / "tiny_lora"


def test_base_and_adapter_side_by_side(browser: Any, run: Path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("screens")
    print(f"screenshots: {folder}")
    with server("--compare", checkpoint=run) as address:
        page = Page(browser, address)
        page.upload(str(RED_TRIANGLE))
        page.ask("is there not a blue shape?")
        asked = "is there not a blue shape?"
        wait_until(lambda: page.chats() == [[asked, "yes"], [asked, "no"]])
        wait_until(page.is_ready)
        page.shoot(folder, "compare_1280")
        html = '<b>what</b> color is the shape? <img src=x onerror="alert(1)">'
        page.ask(html)
        wait_until(lambda: all(len(c) == 4 and c[2] == html for c in page.chats()))
        wait_until(page.is_ready)
        page.all("#compare input")[0].click()
        wait_until(lambda: len(page.chats()) == 1)
        page.ask("what color is the shape?")
        wait_until(lambda: page.chats()[0][4:] == ["what color is the shape?", "red"])
        wait_until(page.is_ready)
        before = generated(address)
        page.all("#regenerate")[0].click()
        wait_until(lambda: generated(address) > before)
        wait_until(page.is_ready)
        wait_until(lambda: page.chats()[0][4:] == ["what color is the shape?", "red"])
        phone = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        wait_until(
            lambda: browser.execute_script("return document.documentElement.scrollWidth") == 400
        )
        page.shoot(folder, "one_400")
        page.all("#clear")[0].click()
        wait_until(lambda: page.chats() == [[]])
        page.check()


def test_an_answer_is_shown_as_it_comes(browser: Any, tmp_path_factory):
    """Of a model that never comes to an end by itself."""
    endless = tmp_path_factory.mktemp("models") / "endless"
    shutil.copytree(TINY, endless)
    weights = load_file(endless / "model.safetensors")
    (head,) = (name for name in weights if name.endswith("lm_head.weight"))
    weights[head][2] = 0
    save_file(weights, endless / "model.safetensors", {"format": "pt"})
    with server(checkpoint=endless) as address:
        page = Page(browser, address)
        assert not any(box.is_displayed() for box in page.all("#compare"))
        page.ask("hello")
        wait_until(lambda: len(page.chats()[0]) == 2)
        seen: list[str] = []
        wait_until(lambda: page.is_ready() or seen.append(page.chats()[0][-1]))
        lengths = sorted({len(text) for text in seen})
        assert len(lengths) > 5
        assert all(seen[-1].startswith(text) for text in seen if text not in ("…", "hello"))
        page.check()
