"""Does yrun lose anything when it is killed, the disk fills up or files change?

    python -m benchmarks.faults --cases 50 --seed 1
    python -m benchmarks.faults --only killed --cases 14
    python -m benchmarks.faults --only disk --work merging --work sorting --cases 8

Injects faults into every command and counts what is lost, which must be 0. The cases that mount a
file system need root or a user namespace. docs/results/reliability.md describes the method.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.faults.cases import Case
from benchmarks.faults.stages import STAGES, Workshop
from benchmarks.paths import ROOT

ROWS_PER_CASE, PAIRS_PER_CASE, RECIPES_PER_CASE = 400, 40, 4
"""Fifty cases are 20,000 rows and 200 recipes."""


def main() -> None:
    """Run the campaigns; exit with 1 if anything was lost."""
    options = _options()
    _enter_mount_namespace()
    started = time.monotonic()
    cases: list[Case] = []
    stages = [stage for stage in STAGES if options.work is None or stage.name in options.work]
    with TemporaryDirectory() as folder, (options.record or Path(os.devnull)).open("w") as record:
        os.chmod(folder, 0o755)
        for case in _all_cases(Workshop(Path(folder).resolve(), stages), options):
            cases.append(case)
            record.write(json.dumps(case.as_json()) + "\n")
            record.flush()
            _print_case(case)
    _print_table(cases)
    print(f"{time.monotonic() - started:.0f} seconds")
    sys.exit(1 if any(case.lost for case in cases) else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        type=int,
        default=50,
        help="kills; half as many full disks and changed files; default 50",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", action="append", choices=[*CAMPAIGNS], help="run only this campaign; repeatable"
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument(
        "--work", action="append", choices=names, help="disturb only this command; repeatable"
    )
    parser.add_argument("--record", type=Path, help="write every case to this file, as a JSON line")
    return parser.parse_args()


def _all_cases(workshop: Workshop, options: argparse.Namespace) -> Iterator[Case]:
    for name, campaign in CAMPAIGNS.items():
        if options.only is None or name in options.only:
            yield from campaign(workshop, options.cases, options.seed)


def _recipes(_: Workshop, cases: int, seed: int) -> Iterator[Case]:
    program = [sys.executable, "-m", "benchmarks.faults.recipes"]
    command = [*program, str(cases * RECIPES_PER_CASE), str(seed)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for line in result.stdout.splitlines():
        record = json.loads(line)
        yield Case(**record | {"lost": tuple(record["lost"])})


def _rows(_: Workshop, cases: int, seed: int) -> Iterator[Case]:
    from benchmarks.faults.rows import pair_cases, row_cases

    yield from row_cases(cases * ROWS_PER_CASE, random.Random(seed))
    yield from pair_cases(cases * PAIRS_PER_CASE, random.Random(seed))


def _killed(workshop: Workshop, cases: int, seed: int) -> Iterator[Case]:
    from benchmarks.faults.child import import_everything
    from benchmarks.faults.kills import kill_cases

    import_everything()
    yield from kill_cases(workshop, cases, random.Random(seed))


def _disk(workshop: Workshop, cases: int, seed: int) -> Iterator[Case]:
    from benchmarks.faults.child import import_everything
    from benchmarks.faults.disk import can_mount, full_disk_cases

    if not can_mount():
        print("disk: skipped, this user cannot mount a file system")
        return
    import_everything()
    yield from full_disk_cases(workshop, -(-cases // 2), random.Random(seed))


def _closed(workshop: Workshop, cases: int, seed: int) -> Iterator[Case]:
    from benchmarks.faults.child import import_everything
    from benchmarks.faults.disk import can_mount, permission_cases, read_only_cases

    if not can_mount():
        print("closed: skipped, this user cannot mount a file system")
        return
    import_everything()
    yield from read_only_cases(workshop, -(-cases // 4))
    yield from permission_cases(workshop, -(-cases // 4))


def _changing(workshop: Workshop, cases: int, seed: int) -> Iterator[Case]:
    from benchmarks.faults.changes import changing_file_cases
    from benchmarks.faults.child import import_everything

    import_everything()
    yield from changing_file_cases(workshop, -(-cases // 2), random.Random(seed))


CAMPAIGNS: dict[str, Callable[[Workshop, int, int], Iterator[Case]]] = {
    "recipes": _recipes,
    "rows": _rows,
    "killed": _killed,
    "disk": _disk,
    "closed": _closed,
    "changing": _changing,
}


def _enter_mount_namespace() -> None:
    """Restart in a private mount namespace, whose mounts vanish with this process."""
    if os.environ.get("FAULTS_IN_NAMESPACE"):
        return
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode == 0:
        environment = os.environ | {"FAULTS_IN_NAMESPACE": "1"}
        os.execvpe(
            unshare[0],
            [*unshare, sys.executable, "-m", "benchmarks.faults", *sys.argv[1:]],
            environment,
        )


def _print_case(case: Case) -> None:
    print(f"{case.campaign}: {case.what}, {case.fault}", file=sys.stderr, flush=True)
    for lost in case.lost:
        print(f"LOST  {case.campaign}, {case.what}, {case.fault}: {lost}", flush=True)


def _print_table(cases: list[Case]) -> None:
    tried = Counter((case.campaign, case.what) for case in cases)
    lost = Counter((case.campaign, case.what) for case in cases if case.lost)
    print(f"{'fault':15} {'in':28} {'tried':>6} {'survived':>9} {'lost':>5}")
    for key, number in tried.items():
        print(f"{key[0]:15} {key[1]:28} {number:6,} {number - lost[key]:9,} {lost[key]:5,}")
    total = sum(lost.values())
    print(f"{'all':44} {len(cases):6,} {len(cases) - total:9,} {total:5,}")


if __name__ == "__main__":
    main()
