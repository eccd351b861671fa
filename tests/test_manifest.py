"""A manifest detects any damage to any file, and names the file."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptbert.checkpoint import manifest
from gptbert.errors import InputError

CONTENTS = {"a.bin": bytes(range(256)) * 40, "empty": b"", "inside/b.txt": b"text\n"}


@pytest.fixture
def folder(tmp_path):
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    manifest.write(tmp_path)
    return tmp_path


def test_what_was_written_is_as_it_was(folder):
    manifest.check(folder)
    entries = json.loads((folder / "manifest.json").read_text())
    assert {name: entry["bytes"] for name, entry in entries.items()} == {
        name: len(content) for name, content in CONTENTS.items()
    }
    (folder / "another").touch()  # ignored by the check
    manifest.check(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["a.bin", "inside/b.txt"]), st.data())
def test_any_damage_is_found(folder, name, data):
    content = bytearray(CONTENTS[name])
    position = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["bit", "cut", "longer"])):
        case "bit":
            content[position] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del content[position:]
        case "longer":
            content.insert(position, 0)
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^{name}: "):
        manifest.check(folder)
    manifest.check(folder, ["empty"])
    (folder / name).write_bytes(CONTENTS[name])


def test_missing_files_are_named(folder):
    (folder / "empty").unlink()
    with pytest.raises(InputError, match=r"^empty: no such file"):
        manifest.check(folder)
    os.mkfifo(folder / "empty")  # reading it would block
    with pytest.raises(InputError, match=r"^empty: no such file"):
        manifest.check(folder)
    with pytest.raises(InputError, match=r"^other: not in manifest\.json"):
        manifest.check(folder, ["other"])


@pytest.mark.parametrize("content", ["", "[]", '{"a.bin": 3}', '{"a.bin": {}}', "{", None])
def test_a_manifest_of_no_use_is_damage_too(folder, content):
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_text(content)
    with pytest.raises(InputError):
        manifest.check(folder)


def test_known_entries_are_not_read_again_but_must_be_there(folder):
    known = {"inside/b.txt": {"bytes": 5, "sha256": "of another host"}}
    manifest.write(folder, known)
    with pytest.raises(InputError, match=r"^inside/b.txt: its content"):
        manifest.check(folder)
    manifest.check(folder, ["a.bin", "empty"])
    with pytest.raises(FileNotFoundError, match=r"c\.bin of another host is not to be seen here; --output_dir"):
        manifest.write(folder, {"c.bin": {"bytes": 5, "sha256": ""}})


@pytest.mark.parametrize(
    "name", ["a" * 5000, "nul\0", "\ud800", "../outside", "/etc/hostname", "inside/../../outside", "", "."]
)
def test_names_of_no_use_are_refused(folder, name):
    (folder.parent / "outside").write_bytes(b"")
    entries = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(entries | {name: entries["empty"]}))
    with pytest.raises(InputError):
        manifest.check(folder)
