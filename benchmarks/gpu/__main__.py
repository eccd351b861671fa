"""All measurements on a GPU, in eight minutes: `python -m benchmarks.gpu`, or `make gpu`.

Runs from a checkout, without a network. It needs PyTorch and NumPy; a part with a missing package is reported
and skipped. Results are on disk after each part: a page, named after the GPU, and a JSON file next to it. Caches of
compiled code, logs and intermediate files stay in the work folder.

Without a GPU, `--rehearse` runs everything on the CPU at toy sizes: a test of the measurement, not of the machine.
"""

import argparse
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import hardware, runner
from benchmarks.gpu.plan import GROUPS, chosen
from benchmarks.gpu.report import Report
from benchmarks.gpu.settings import WHOLE_MINUTES, Settings
from benchmarks.machine import RESULTS


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, by argparse: a bare machine has no tyro. On an error, prints one line and exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measure all that a GPU can tell.", allow_abbrev=False
    )
    parser.add_argument(
        "--minutes", type=float, default=WHOLE_MINUTES,
        help="for all parts together; fewer repeat less and leave out the last parts (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--only",
        default="",
        help=f"some of {','.join(GROUPS)}, with commas between them; "
        "their results are added to those that the same commit has on the page",
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the page and its JSON (default: benchmarks/results; a new temporary one "
        "for --rehearse)",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, help="folder of caches and logs (default: work in the output folder)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy sizes")
    found = parser.parse_args(arguments)
    found.only = [name for name in found.only.split(",") if name]
    if unknown := sorted(set(found.only) - set(GROUPS)):
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(GROUPS)}")
    if not 0 < found.minutes < float("inf"):
        parser.error(f"--minutes {found.minutes}: expected a positive number")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and update the page after each part."""
    given = parse(arguments)
    if not given.rehearse and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU; --rehearse runs everything on the CPU, at toy sizes")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # terminates the parts too
    output = given.output or (Path(tempfile.mkdtemp(prefix="gptbert-rehearsal-")) if given.rehearse else RESULTS)
    work = given.work or output / "work"
    settings = Settings(given.minutes, given.rehearse, work.resolve())
    labels = hardware.labels(settings)
    name = "rehearsal" if given.rehearse else re.sub(r"[^a-z0-9]+", "-", labels["gpu"].lower()).strip("-")
    report = Report(output, name, labels, adds=bool(given.only))
    print(f"{labels['gpu']}, commit {labels['commit']}; writing {report.page}", flush=True)
    try:
        runner.run(chosen(given.only), settings, report)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
