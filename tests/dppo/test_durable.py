from pathlib import Path

import pytest

from dppo import durable
from dppo.durable import damage, new_directory, recover


@pytest.fixture
def made(tmp_path) -> Path:
    with new_directory(tmp_path / "here") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "a").write_text("some content")
        (temporary / "b").write_text("")
        assert not (tmp_path / "here").exists()
    return tmp_path / "here"


def test_a_directory_is_whole_and_nothing_else_is_left(made):
    assert damage(made) is None
    assert [path.name for path in made.parent.iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("some content?", "deep/a has 13 bytes of 12"),
        ("SOME content", "deep/a is damaged"),
        (None, "deep/a is missing"),
    ],
)
def test_damage_is_told_with_the_file(made, content, told):
    file = made / "deep" / "a"
    file.unlink() if content is None else file.write_text(content)
    assert damage(made) == told


@pytest.mark.parametrize("content", ["", "[]", '{"files": {"b": 3}}', '{"files": [1]}'])
def test_a_damaged_manifest_is_damage(made, content):
    (made / "manifest.json").write_text(content)
    assert damage(made) == "its manifest.json is damaged"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_if_filling_fails_all_is_as_it_was(made, error):
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    with pytest.raises(error), new_directory(made) as temporary:
        (temporary / "b").write_text("other")
        raise error
    assert {path: path.read_bytes() for path in made.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_of_the_old_and_the_new_there_is_always_one_whole(made, monkeypatch, renamed):
    replace, left = durable.os.replace, iter(range(renamed))

    def killed(old: Path, new: Path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(durable.os, "replace", killed)
        with new_directory(made) as temporary:
            (temporary / "c").write_text("new")
        raise KeyboardInterrupt
    recover(made.parent)
    assert [path.name for path in made.parent.iterdir()] == ["here"]
    assert damage(made) is None
    assert (made / "c").exists() == (renamed > 0)


def test_what_interrupted_filling_left_is_cleared_away(made):
    (made.parent / "other.tmp").mkdir()
    (made.parent / "here.tmp").mkdir()
    (made.parent / "best.tmp").symlink_to("other")
    recover(made.parent)
    assert [path.name for path in made.parent.iterdir()] == ["here"]


def test_everything_is_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    done: list[str] = []
    flush, replace = durable.flush, durable.os.replace
    monkeypatch.setattr(durable, "flush", lambda path: (done.append(path.name), flush(path)))
    monkeypatch.setattr(durable.os, "replace", lambda old, new: (done.append("renamed"), replace(old, new)))
    with new_directory(tmp_path / "here") as temporary:
        (temporary / "a").write_text("")
    assert done.index("renamed") == len(done) - 2
    assert {"a", "manifest.json", "here.tmp"} == set(done[:-2])
    assert done[-1] == tmp_path.name
