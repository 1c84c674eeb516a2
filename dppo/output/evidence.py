"""What to look at after training has stopped because its numbers were not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors.torch import save_file

from dppo.output.run_directory import RunDirectory
from dppo.updates.faults import NotFiniteError
from policies import UserError


@contextmanager
def evidence_kept(directory: RunDirectory) -> Iterator[None]:
    """Save the evidence of a `NotFiniteError` in the run's ``debug`` folder.

    Raises:
        UserError: in place of the error; it names the file.
    """
    try:
        yield
    except NotFiniteError as error:
        directory.debug.mkdir(exist_ok=True)
        path = directory.debug / "not_finite.safetensors"
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in error.evidence.items()}
        save_file(tensors, path)
        raise UserError(f"{error}; the minibatch, the gradient's norms and the parameters are in {path}") from error
