import subprocess
import sys

import pytest

from dppo.locking import held
from policies import UserError


def test_a_directory_is_one_processs_until_it_lets_go_or_ends(tmp_path):
    path = tmp_path / "deep" / "here"
    script = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print(flush=True), sys.stdin.read()
"""
    with held(path, "unused"):
        pass
    with subprocess.Popen([sys.executable, "-S", "-c", script, path], stdin=-1, stdout=-1) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=r"^it is taken$"), held(path, "it is taken"):
            pass
        other.kill()
    with held(path, "it is taken"):
        pass


def test_a_place_that_cannot_be_a_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"^cannot write to {path}: "), held(path, "unused"):
            pass
