"""A child process that reads external files, so that a crash, a hang or memory exhaustion fails one test only.

The parent writes a line with a reader's name and a path; the child answers with the outcome and its peak memory.
"""

import contextlib
import json
import multiprocessing
import resource
import select
import subprocess
import sys
from pathlib import Path

import torch

from gptbert.errors import InputError
from gptbert.model import GPTBert
from tests.conftest import TINY
from tests.readers import READERS

ROOT = Path(__file__).parents[1]
FLOOR = 64 << 20  # bytes that libraries may allocate at first use, however small the file
ADDRESS_SPACE = 16 << 30  # allocations beyond it fail, so that no bug exhausts the machine
SECONDS = 30  # files here take less than a tenth of it
# audit events that only code in the file would cause; opening for writing is checked separately
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir", "subprocess",
             "socket", "shutil", "ctypes.dlopen", "webbrowser", "pty")  # fmt: skip


class Sandbox:
    """The parent's side.

    Attributes:
        reads: number of files read, by reader.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reads: dict[str, int] = {}
        self._child: subprocess.Popen | None = None

    def read(self, reader: str, path: Path) -> str:
        """Have the child read a file; returns "" on success, or the message of its InputError.

        Raises:
            AssertionError: any other outcome; the file is kept.
        """
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-B", "-m", "tests.sandbox", str(self.folder)],  # -B: bytecode would be a write
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(self.folder / "stderr").open("wb"),
            )  # fmt: skip
            assert self._answer(SECONDS * 4) == {"ready": True}
        self.reads[reader] = self.reads.get(reader, 0) + 1
        self._child.stdin.write(json.dumps([reader, str(path)]).encode() + b"\n")
        self._child.stdin.flush()
        answer = self._answer(SECONDS)
        if answer is None:
            self._child.kill()
            status = self._child.wait()
            self._child = None
            what = f"hung for {SECONDS} s" if status == -9 else f"ended with {status}"
            raise AssertionError(f"{reader} {what}, see {path} and {self.folder / 'stderr'}")
        assert not answer["failure"], f"{path}: {answer['failure']}"
        assert not answer["deeds"], f"{path}: did {answer['deeds']}"
        assert "\n" not in answer["message"]
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
        assert answer["peak"] <= 4 * size + FLOOR, f"{path}: {answer['peak']:,} bytes for a file of {size:,}"
        return answer["message"]

    def close(self) -> None:
        """Stop the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def _answer(self, seconds: float) -> dict | None:
        """The child's next line, or None on a timeout or if the child has ended."""
        ready, _, _ = select.select([self._child.stdout], [], [], seconds)
        line = self._child.stdout.readline() if ready else b""
        if not line and ready:
            self._child.wait()
        return json.loads(line) if line else None


class _Watch:
    """Records the child's side effects and memory while it reads a file."""

    def __init__(self) -> None:
        self.deeds: list[str] = []
        self.on = False
        self._before = 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes or event.startswith(FORBIDDEN):
            self.deeds.append(f"{event} {arguments!r}"[:200])

    def start(self) -> None:
        self.deeds = []
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self._before = self._status("VmRSS")
        self.on = True

    def stop(self) -> int:
        """Peak memory growth of the process in bytes."""
        self.on = False
        return self._status("VmHWM") - self._before

    @staticmethod
    def _status(name: str) -> int:
        with contextlib.suppress(OSError):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
        return 0  # /proc exists only on Linux


def main() -> None:
    """Answer until the parent is gone."""
    with torch.device("meta"):
        GPTBert(TINY)  # torch's one-time side effects, such as creating a folder, must not be attributed to a file
    multiprocessing.get_context()  # nor those of Python 3.14, which tries out the temporary folder
    answers = sys.stdout
    sys.stdout = sys.stderr
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    watch = _Watch()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        reader, path = json.loads(line)
        message = failure = ""
        watch.start()
        try:
            READERS[reader](Path(path))
        except InputError as error:
            message = str(error)
        except BaseException as error:  # noqa: BLE001  that is what the test looks for
            failure = f"{type(error).__name__}: {str(error)[:300]}"
        peak = watch.stop()
        answer = {"message": message, "failure": failure, "deeds": watch.deeds, "peak": peak}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
