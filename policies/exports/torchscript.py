"""TorchScript files, for programs in C++ and for old versions of torch.

PyTorch (2.13) calls TorchScript deprecated, but still writes and loads it. A trace misses no branch: what a policy
decides in Python depends on its configuration, never on values.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from policies.base import Policy
from policies.exports.sampling import DESCRIPTION, SamplingFunction


def export_torchscript(policy: Policy, path: Path) -> None:
    """Write the policy's sampling function; its description is the extra file `DESCRIPTION`.

    Raises:
        UserError: a policy that cannot be exported.
    """
    function = SamplingFunction(policy)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # of being deprecated, and of constants
        traced = torch.jit.trace(function, function.example(), check_trace=False)
        torch.jit.save(traced, str(path), _extra_files={DESCRIPTION: function.description()})


def load_torchscript(path: Path) -> torch.jit.ScriptModule:
    """The sampling function of a file."""
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.load(str(path))
