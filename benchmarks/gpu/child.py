"""The process of one part: imports what it needs, waits for a line, then writes results to a file as they arrive."""

import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.settings import Part, Settings

WATCH_SECONDS = 1.0


def command(part: Part, settings: Settings, result: Path) -> list[str]:
    """Entry point of the process; `result` is the file."""
    order = {"target": part.target, "options": part.options, "settings": settings.to_dict(), "result": str(result)}
    return [sys.executable, "-m", "benchmarks.gpu.child", json.dumps(order)]


def write(path: Path, values: dict[str, Any]) -> None:
    """Replace a JSON file atomically, so that readers see the old or the new version."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def end_with_parent(parent: int) -> None:
    """Kill this process and its children when its parent has died, since the parent can no longer do so."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(order: dict[str, Any]) -> None:
    """Run the part's function."""
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    module, _, function = order["target"].partition(":")
    measure = getattr(importlib.import_module(module), function)
    if not sys.stdin.readline():  # other parts are measured until then
        return  # the parent has died
    for result in measure(Settings.from_dict(order["settings"]), **order["options"]):
        write(Path(order["result"]), result)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
