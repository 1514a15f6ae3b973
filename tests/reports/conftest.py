"""A headless browser that opens pages from disk, and examples to show."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.yrun_process import HANGS_AFTER
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.reports.heat_map import AFTER, BEFORE, HeatMap, ScoredExample
from yrunner.scoring.measure import TokenScores
from yrunner.tokens import IGNORE_INDEX

ATTACK = (
    "</div></script><script>document.title='owned'</script>"
    "<img src=x onerror=\"document.title='owned'\">"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def tokenize(capitals_tokenizer):
    """A function that makes an example of texts; every second one is a target."""

    def make(*texts: str, row: int = 7) -> TokenizedExample:
        ids, labels = [], []
        for number, text in enumerate(texts):
            part = capitals_tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += part
            labels += part if number % 2 else [IGNORE_INDEX] * len(part)
        return TokenizedExample(ids, labels, Origin(Path("data/chat.jsonl"), row))

    return make


@pytest.fixture(scope="session")
def heat_map(tokenize):
    """Two examples with the scores of two models: the second finds every token easier."""
    chat = "<|im_start|>user\nCapital?<|im_end|>\n<|im_start|>assistant\n"
    examples = [
        tokenize(
            chat, f"根据《港口法典》，\n\n  😀 Belo is the capital. {ATTACK}\r\n<|im_end|>", "\nBye"
        ),
        tokenize(chat, "\u202e\x1b[2J Dane.<|im_end|>", row=8),
    ]
    return HeatMap(
        title=f"capitals {ATTACK}",
        models={BEFORE: "base", AFTER: "outputs/capitals"},
        weighting="nlirg",
        loss_deadline=15.0,
        examples=[
            ScoredExample(example, {BEFORE: scores_of(example, 18), AFTER: scores_of(example, 7)})
            for example in examples
        ],
    )


def scores_of(example, highest_loss):
    """Invented scores, the same for the same example; every third prediction is right."""
    generator = torch.Generator().manual_seed(highest_loss)
    targets_N = torch.tensor([example.labels[place] for place in example.target_positions])
    loss_N, entropy_N, weight_N = torch.rand(3, len(targets_N), generator=generator)
    is_right_N = torch.arange(len(targets_N)) % 3 == 0
    top_N = torch.where(is_right_N, targets_N, (targets_N + 1) % 300)
    loss_N = loss_N.square() * highest_loss
    return TokenScores(loss_N, entropy_N * 6, weight_N, top_N, example.origin)


@pytest.fixture(scope="session")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"no browser found: install one of {', '.join(BROWSERS)}")
    return found


def dump_page(browser, address, user_folder, *more_options):
    """The page after the browser has read it and run what it would run."""
    return _open(browser, address, user_folder, *more_options).stdout.decode("utf-8")


def console_of(browser, page, user_folder):
    """What the page has written on the console: errors, and what its policy has blocked."""
    opened = _open(browser, page.as_uri(), user_folder, "--enable-logging=stderr")
    return re.findall(r":CONSOLE\W.*?\] (.*)", opened.stderr.decode("utf-8"))


def _open(browser, address, user_folder, *more_options):
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--dump-dom", "--hide-scrollbars", "--virtual-time-budget=5000"),
        *(f"--user-data-dir={user_folder}", "--allow-file-access-from-files"),
    ]
    environment = {**os.environ, "LANG": "C.UTF-8"}
    return subprocess.run(
        [browser, *options, *more_options, address],
        **{"capture_output": True, "timeout": HANGS_AFTER, "check": True, "env": environment},
    )


def ask_page(browser, page, script, user_folder, *more_options, width=1000):
    """What a script returns that sees the page as `page` and its window as `view`.

    It runs in a frame around the page, so that nothing of the page has to allow it.
    """
    frame = user_folder / "frame.html"
    frame.write_text(
        f"""<meta charset="utf-8"><body>
        <iframe id="frame" width="{width}" height="800" src="{page.as_uri()}"></iframe>
        <script>onload = () => {{
          const view = frame.contentWindow, page = view.document;
          const answer = document.createElement("pre");
          answer.textContent = JSON.stringify((() => {{ {script} }})());
          document.body.replaceChildren(answer);
        }};</script>""",
        "utf-8",
    )
    dumped = dump_page(browser, frame.as_uri(), user_folder, *more_options)
    answer = re.search("<pre>(.*)</pre>", dumped, re.DOTALL)
    assert answer, dumped
    return json.loads(html.unescape(answer[1]))
