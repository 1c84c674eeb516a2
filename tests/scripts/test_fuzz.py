"""A few of the inputs of `scripts/fuzz.py`, and its watchdog."""

import pytest

import fuzz

STUB = """
import json, os, sys, time
print(json.dumps({"outcome": "ready"}), flush=True)
for number in range(int(sys.argv[4]), int(sys.argv[5])):
    if number == 1:
        os.abort()
    if number == 3:
        time.sleep(60)
    print(json.dumps({"outcome": "error", "what": "", "detail": ""}), flush=True)
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["policy", "checkpoint", "dataset", "lerobot", "diffusion_policy", "original"])
def test_damaged_files_are_an_error_or_read(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", "")
    fuzz.KINDS[kind].write(tmp_path)
    expected = fuzz.digest(fuzz.KINDS[kind].read(tmp_path))
    found = [fuzz.read_damaged(fuzz.KINDS[kind], tmp_path, number, expected) for number in range(12)]
    assert [one for one in found if one["outcome"] == fuzz.EXCEPTION] == []
    assert any(one["outcome"] == fuzz.ERROR for one in found)
    if kind in ("policy", "checkpoint", "dataset"):
        assert [one for one in found if one["outcome"] == fuzz.CHANGED] == []


def test_a_change_that_nobody_notices_is_called_one(tmp_path):
    fuzz.KINDS["policy"].write(tmp_path)
    found = fuzz.read_damaged(fuzz.Kind(lambda path: None, lambda path: "another"), tmp_path, 0, fuzz.digest("one"))
    assert found["outcome"] == fuzz.CHANGED


def test_crashes_and_hangs_are_noticed_and_the_other_inputs_read(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(fuzz, "__file__", str(tmp_path / "stub.py"))
    monkeypatch.setattr(fuzz, "PATIENCE_S", 2.0)
    found = [one["outcome"] for one in fuzz.outcomes("policy", tmp_path, 6)]
    assert found == [fuzz.ERROR, fuzz.CRASH, fuzz.ERROR, fuzz.HANG, fuzz.ERROR, fuzz.ERROR]
