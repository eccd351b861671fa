"""The results, on disk at any time: a JSON file and its page."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu import child
from benchmarks.gpu.bars import verdicts
from benchmarks.gpu.page import page


class Report:
    """Results of all parts, written whenever one changes.

    Args:
        folder: of both files; created if missing.
        name: of both files, without extensions.
        labels: machine, versions and commit; see `benchmarks.gpu.hardware.labels`.
        adds: keep the parts of an earlier report there, if it is of the same machine, versions and commit.
    """

    def __init__(self, folder: Path, name: str, labels: dict[str, Any], *, adds: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.json = folder / f"{name}.json"
        self.page = folder / f"{name}.md"
        self.content: dict[str, Any] = {**labels, "parts": self._parts_before(labels) if adds else {}}
        self.write()

    def _parts_before(self, labels: dict[str, Any]) -> dict[str, Any]:
        with suppress(FileNotFoundError):
            before = json.loads(self.json.read_text(encoding="utf-8"))
            if all(before.get(key) == label for key, label in labels.items() if key not in {"date", "minutes"}):
                return before["parts"]
        return {}

    def put(self, name: str, entry: dict[str, Any]) -> None:
        """Set a part's state; a change of its running time alone does not trigger a write."""
        before = self.content["parts"].get(name, {})
        self.content["parts"][name] = entry
        if any(before.get(key) != entry[key] for key in ("status", "result")):
            self.write()

    def keep_logs(self, folder: Path) -> None:
        """Pack the parts' logs beside the two files: a borrowed machine is gone afterwards."""
        if folder.is_dir():
            shutil.make_archive(str(self.json.with_name(f"{self.json.stem}-logs")), "gztar", folder)

    def write(self) -> None:
        """Write both files."""
        self.content["bars"] = verdicts(self.content["parts"])
        child.write(self.json, self.content)
        self.page.write_text(page(self.content), encoding="utf-8")
