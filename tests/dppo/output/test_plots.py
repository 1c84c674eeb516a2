import numpy as np
import pytest
from matplotlib.figure import Figure

from dppo.output.plots import COLORS, Curve, comparison_curves, learning_curve, pretraining_curve
from dppo.statistics import summarize


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, in place of their files."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: saved.append(self))
    return saved


def training_rows(**values):
    keys = list(values)
    columns = zip(*values.values(), strict=True)
    return [{"env_steps": 1000 * (i + 1), **dict(zip(keys, column, strict=True))} for i, column in enumerate(columns)]


def points(panel, label):
    return next(line.get_xydata().tolist() for line in panel.get_lines() if line.get_label() == label)


def legend(figure):
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def test_a_learning_curve_is_a_png_in_a_folder_that_it_makes(tmp_path):
    rows = training_rows(return_mean=[1.0, 2.0], success_rate=[0.0, 0.5])
    summary = summarize([1.0, 2.0], [True, False])
    path = learning_curve(rows, tmp_path / "plots" / "curve.png", title="Hopper", before=summary, after=summary)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_iterations_in_which_no_episode_ended_are_left_out(figures, tmp_path):
    learning_curve(training_rows(return_mean=[None, 2.0, None, 3.0]), tmp_path / "curve.png", title="Hopper")
    assert points(figures[0].axes[0], "training (exploring)") == [[2000, 2.0], [4000, 3.0]]


def test_evaluations_stand_at_the_start_and_the_end_with_their_intervals(figures, tmp_path):
    rows = training_rows(return_mean=[1.0, 2.0])
    before, after = summarize([1.0, 2.0], None), summarize([5.0, 9.0], None)
    learning_curve(rows, tmp_path / "curve.png", title="Hopper", before=before, after=after)
    (panel,) = figures[0].axes
    bars = [container for container in panel.containers if container.get_label() == "after (95 % CI)"]
    segment = bars[0].lines[2][0].get_segments()[0]
    assert segment.tolist() == [[2000, after.return_ci95[0]], [2000, after.return_ci95[1]]]
    assert legend(figures[0]) == ["training (exploring)", "before (95 % CI)", "after (95 % CI)"]


def test_success_has_a_panel_of_its_own_only_where_there_is_any(figures, tmp_path):
    learning_curve(training_rows(return_mean=[1.0], success_rate=[None]), tmp_path / "curve.png", title="Hopper")
    learning_curve(training_rows(return_mean=[1.0], success_rate=[0.5]), tmp_path / "curve.png", title="Maze")
    assert [len(figure.axes) for figure in figures] == [1, 2]
    assert points(figures[1].axes[1], "training (exploring)") == [[1000, 0.5]]


def test_evaluations_during_training_are_a_line_of_their_own(figures, tmp_path):
    rows = [*training_rows(return_mean=[1.0, 2.0]), {"env_steps": 3000, "return_mean": 3.0, "eval_return_mean": 4.0}]
    learning_curve(rows, tmp_path / "curve.png", title="Hopper")
    assert points(figures[0].axes[0], "evaluation") == [[3000, 4.0]]


def test_a_run_without_a_single_row_or_interval_still_has_a_picture(tmp_path):
    path = learning_curve([], tmp_path / "curve.png", title="Hopper", before=summarize([1.0], None))
    assert path.exists()


@pytest.mark.parametrize(("last", "expected"), [(2_000_000, "0.5M"), (50_000, "20k"), (800, "400")])
def test_environment_steps_are_written_short(figures, tmp_path, last, expected):
    rows = [{"env_steps": 0, "return_mean": 1.0}, {"env_steps": last, "return_mean": 2.0}]
    learning_curve(rows, tmp_path / "curve.png", title="Hopper")
    axis = figures[0].axes[0].xaxis
    labels = axis.get_major_formatter().format_ticks(axis.get_majorticklocs())
    assert expected in labels


def test_a_pretraining_curve_has_the_losses_and_the_evaluations(figures, tmp_path):
    rows = [
        {"updates": 10, "epoch": 1.0, "train_loss": 0.5, "validation_loss": None},
        {"updates": 20, "epoch": 2.0, "train_loss": 0.1, "validation_loss": 0.2, "return_mean": 7.0},
    ]
    pretraining_curve(rows, tmp_path / "curve.png")
    losses, returns = figures[0].axes
    assert losses.get_yscale() == "log"
    assert points(losses, "training") == [[1.0, 0.5], [2.0, 0.1]]
    assert points(losses, "validation") == [[2.0, 0.2]]
    assert points(returns, "evaluation") == [[2.0, 7.0]]


def test_a_loss_that_becomes_negative_is_drawn_whole(figures, tmp_path):
    pretraining_curve([{"updates": 1, "train_loss": 0.5}, {"updates": 2, "train_loss": -0.5}], tmp_path / "curve.png")
    assert figures[0].axes[0].get_yscale() == "linear"
    assert points(figures[0].axes[0], "training") == [[1, 0.5], [2, -0.5]]


def test_no_two_methods_look_alike_and_one_point_can_be_seen(figures, tmp_path):
    x = np.array([5.0, 6.0])
    curves = [Curve(f"method {number}", x, x, x, x) for number in range(len(COLORS) + 1)]
    point = Curve("one point", x[:1], x[:1], x[:1], x[:1])
    comparison_curves({"hopper": curves, "maze": [curves[-1], point]}, tmp_path / "curves.png", title="trial")
    hopper, maze = figures[0].axes
    looks = [(line.get_color(), line.get_linestyle()) for line in hopper.get_lines()]
    assert len(set(looks)) == len(curves)
    last, alone = maze.get_lines()
    assert (last.get_color(), last.get_linestyle()) == looks[-1]
    assert (last.get_marker(), alone.get_marker()) == ("None", "o")
    assert hopper.get_xlim()[0] == 0
