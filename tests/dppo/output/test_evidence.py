import pytest
import torch
from safetensors.torch import load_file

from dppo.output.evidence import evidence_kept
from dppo.output.run_directory import RunDirectory
from dppo.updates.faults import NotFiniteError
from policies import UserError


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", overwrite=False, config={})


def test_the_evidence_of_numbers_that_are_not_finite_is_saved_and_named(run):
    whole = torch.arange(6.0)
    evidence = {"loss": torch.tensor(torch.nan), "minibatch/0": whole[::2], "parameters/a": whole[:2], "b": whole}
    with (
        pytest.raises(
            UserError, match=r"^out of bounds; the minibatch, .* are in .*/run/debug/not_finite.safetensors$"
        ),
        evidence_kept(run),
    ):
        raise NotFiniteError("out of bounds", evidence)
    saved = load_file(run.debug / "not_finite.safetensors")
    torch.testing.assert_close(saved, evidence, equal_nan=True)


def test_any_other_error_passes_and_leaves_no_folder(run):
    with pytest.raises(KeyError), evidence_kept(run):
        raise KeyError("other")
    assert not run.debug.exists()
