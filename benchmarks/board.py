"""How fast does `yrun board` show many runs, and how much memory does it take?

Prints the time from opening the address to the first paint and to the whole list, in a headless
Chromium, and the memory of the server.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.markdown import print_markdown
from yrunner.storage.run_dir import RunDir, write_json, write_text

ZONES = ("zone_easy", "zone_learning", "zone_hard", "zone_refused")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAINT = """() => new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(
  performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null))))"""


def main() -> None:
    """Make the runs, start the board and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--records", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "outputs")
        make_runs(root, options.runs, options.records)
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        rows = measure(root, options.runs)
    title = f"{options.runs} runs of {options.records:,} records, {size / 1e9:.2f} GB"
    print_markdown(title, ["what", "figure"], rows)


def make_runs(root: Path, number: int, records: int) -> None:
    """Run folders with logs of the usual size."""
    log = "".join(record(step, records) for step in range(1, records + 1))
    for place in range(number):
        run = RunDir(root / f"run-{place:03}")
        run.folder.mkdir(parents=True)
        recipe = {
            "name": run.folder.name,
            "model": {"base": "SmolLM2-135M-Instruct"},
            "tuning": {"kind": "lora"},
            "loss": {"kind": "nlirg"},
            "train": {"stage": "sft", "epochs": 3, "max_steps": None},
        }
        write_text(run.recipe, json.dumps(recipe))
        write_json(run.fingerprint, {"recipe": recipe})
        write_text(run.metrics, log)
        if place % 3:
            run.model.mkdir()


def record(step: int, last: int) -> str:
    """A line of metrics.jsonl as long as those of a training with NLIRG and replay."""
    loss = 3 * math.exp(-3 * step / last) + 0.1 * math.sin(step)
    figures = {
        **{"loss": loss, "weighted_loss": loss / 2, "mean_weight": 0.5180890107255031},
        **{"entropy": 2.6865902744557624, "accuracy": 0.5378590078328982, "refused": 0.005221},
        **{name: 0.25000000000000006 for name in ZONES},
        **{name.replace("zone", "gradient"): 0.25000000000000006 for name in ZONES},
        **{"targets": 383, "targets_per_second": 5.008629421640121, "memory_gib": 1.51084899},
        **{"keep_divergence": 0.08821983478032053, "grad_norm": 3.4887290000915527},
        **{"learning_rate": 0.000999849409348102, "epoch": 3 * step / last},
    }
    return json.dumps({"step": step, **figures}) + "\n"


def measure(root: Path, number: int) -> list[list[str]]:
    """Start the board on a folder that it has never seen, and open it."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "yrunner.cli", "board", str(root)]
    board = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert board.stdout is not None
    address = board.stdout.readline().split()[-1]
    started = time.perf_counter() - begun
    try:
        paint, listed, curves = open_page(address, number)
        memory = psutil.Process(board.pid).memory_info().rss
    finally:
        board.terminate()
        board.wait()
    return [
        ["command to address", f"{started:.2f} s"],
        ["first paint", f"{paint:.2f} s"],
        ["whole list", f"{listed:.2f} s"],
        ["curves of one run", f"{curves:.2f} s"],
        ["memory of the server", f"{memory / 1e6:.0f} MB"],
    ]


def open_page(address: str, number: int) -> tuple[float, float, float]:
    """Seconds to the first paint, to the whole list, and from a click to the curves of a run."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto("about:blank")
        begun = time.perf_counter()
        page.goto(address)
        page.locator(".runs tbody tr").nth(number - 1).wait_for()
        listed = time.perf_counter() - begun
        paint = float(page.evaluate(PAINT)) / 1000
        begun = time.perf_counter()
        page.locator(".runs tbody a").first.click()
        page.wait_for_selector(".charts canvas")
        curves = time.perf_counter() - begun
        browser.close()
    return paint, listed, curves


if __name__ == "__main__":
    main()
