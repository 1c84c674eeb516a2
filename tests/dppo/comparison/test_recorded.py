import pytest

from dppo.comparison.recorded import read_recorded
from policies import UserError


def test_a_file_gives_a_curve_for_each_of_its_tasks(tmp_path):
    path = tmp_path / "theirs.csv"
    path.write_text("task,env_steps,return,note\nhopper,100,1.5,x\nmaze,50,0,\nhopper,200,2.5,\n")
    curves = read_recorded({"theirs": str(path)})
    assert list(curves) == ["hopper", "maze"]
    (curve,) = curves["hopper"]
    assert curve.name == "theirs"
    assert curve.x.tolist() == [100, 200]
    assert curve.value.tolist() == curve.low.tolist() == curve.high.tolist() == [1.5, 2.5]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("task,env_steps\nhopper,1\n", "has no column 'return'; it needs task, env_steps, return"),
        ("", "has no column 'task'"),
        ("task,env_steps,return\nhopper,1,much\n", "holds something else than numbers"),
        ("task,env_steps,return\nhopper,1\n", "holds something else than numbers"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_curve_is_named(tmp_path, content, says):
    path = tmp_path / "theirs.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"recorded: {path} .*{says}"):
        read_recorded({"theirs": str(path)})
