"""Draw the README's picture of a run from its run folder.

    .venv/bin/python docs/make_pictures.py outputs/legal-sft

writes docs/run.svg: the live view two fifths into the run.
"""

import sys
from pathlib import Path

from rich.console import Console

from yrunner.storage.run_dir import RunDir
from yrunner.training.metrics import read_metrics
from yrunner.training.progress import History, draw

WIDTH = 96


def main(folder: Path) -> None:
    records = read_metrics(RunDir(folder).metrics)
    history = History(folder.name, max_steps=records[-1]["step"])
    for record in records[: len(records) * 2 // 5]:
        history.step = record["step"]
        history.add(record, record["step"])
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=WIDTH, force_terminal=True, file=nowhere)
        console.print(draw(history, WIDTH))
    picture = Path(__file__).with_name("run.svg")
    picture.write_text(
        console.export_svg(title=f"yrun train recipes/{folder.name.replace('-', '_')}.yaml"),
        "utf-8",
    )
    sys.stdout.write(f"{picture}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
