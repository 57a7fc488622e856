"""The README's measured pictures: the expert load after held-out prompts, and the page under load.

python benchmarks/pictures.py            # needs Chromium and its driver on the PATH
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from pathlib import Path

import httpx
import protocol
from bench_launch import PROMPTS, launched, run_streams
from selenium import webdriver
from selenium.webdriver.common.by import By

from lightmoe import Client
from lightmoe.telemetry.heatmap import load_table_from_json, save

MODEL = "mixtral-lite"
HELD_OUT = Path(__file__).resolve().parents[1] / "models" / MODEL / "heldout.txt"
NUM_PROMPTS = 32
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,1000",
)


def main() -> None:
    """Launch ten ranks, load them, draw."""
    with launched(MODEL, 10) as (server, url, _):
        with Client(url) as client:
            for prompt in held_out_prompts():
                client.complete(prompt, max_tokens=16, temperature=0)
            load = client.expert_load()
        picture = protocol.RESULTS / f"load-{MODEL}.png"
        save(load_table_from_json(load), picture)
        protocol.write("expert-load", [load])
        photograph(url, protocol.RESULTS / f"page-{MODEL}.png")
        server.terminate()
        server.wait(timeout=30)


def held_out_prompts() -> list[str]:
    """Equal pieces of the text that the model was not trained on."""
    text = HELD_OUT.read_text(encoding="utf-8")
    size = len(text) // NUM_PROMPTS
    return [text[i * size : i * size + 1200] for i in range(NUM_PROMPTS)]


def photograph(url: str, path: Path) -> None:
    """The page while it generates and while others do."""
    options = webdriver.ChromeOptions()
    profile = tempfile.mkdtemp()
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        browser.get(url)
        time.sleep(2)
        buttons = browser.find_elements(By.TAG_NAME, "button")
        next(button for button in buttons if button.text == "Generate").click()
        asyncio.run(run_streams(url, {"model": MODEL, "prompt": PROMPTS["text"]}, 16, 48))
        time.sleep(0.5)
        browser.save_screenshot(str(path))
    shutil.rmtree(profile, ignore_errors=True)
    assert httpx.get(url + "/health").status_code == 200


if __name__ == "__main__":
    main()
