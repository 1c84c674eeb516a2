"""Files of torch.export (``.pt2``), for torch alone and for its compilers."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from policies.base import Policy
from policies.exports.sampling import DESCRIPTION, SamplingFunction


def export_torch_export(policy: Policy, path: Path) -> None:
    """Write the policy's sampling function; its description is the extra file `DESCRIPTION`.

    Raises:
        UserError: a policy that cannot be exported.
    """
    function, batch = SamplingFunction(policy), Dim("batch")
    with torch.no_grad():
        program = torch.export.export(function, function.example(), dynamic_shapes=({0: batch}, {0: batch}))
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={DESCRIPTION: function.description()})


def load_torch_export(path: Path) -> nn.Module:
    """The sampling function of a file."""
    return torch.export.load(io.BytesIO(path.read_bytes())).module()
