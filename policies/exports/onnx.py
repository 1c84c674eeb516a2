"""ONNX files, for onnxruntime and whatever else reads ONNX.

By torch's older exporter, which records a TorchScript trace. The newer one works too, but takes ten times as long for a
loop that is unrolled: minutes for a UNet of twenty steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policies.base import Policy
from policies.errors import UserError
from policies.exports.sampling import DESCRIPTION, INPUTS, OUTPUT, SamplingFunction

OPSET = 17


def export_onnx(policy: Policy, path: Path) -> None:
    """Write the policy's sampling function; its description is the entry `DESCRIPTION` of ``metadata_props``.

    Raises:
        UserError: a policy that cannot be exported, or the library is missing.
    """
    onnx, function = _library("onnx"), SamplingFunction(policy)
    example = function.example()
    axes = {name: {0: "batch"} for name in (*INPUTS, OUTPUT)}
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # of being deprecated, and of constants
        torch.onnx.export(
            *(function, example, path),
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(path)
    _keep_inputs(onnx, model, dict(zip(INPUTS, example, strict=True)))
    onnx.helper.set_model_props(model, {DESCRIPTION: function.description()})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _keep_inputs(onnx: Any, model: Any, inputs: dict[str, Tensor]) -> None:
    """Declare inputs that the function does not use, and the exporter left out, so that every file is called alike."""
    there = {one.name for one in model.graph.input}
    for name, value in inputs.items():
        if name not in there:
            shape = ["batch", *value.shape[1:]]
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))


def load_onnx(path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """The sampling function of a file, run by onnxruntime.

    Raises:
        UserError: the library is missing.
    """
    session = _library("onnxruntime").InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def act(obs: Tensor, noise: Tensor) -> Tensor:
        (action,) = session.run(None, {"obs": obs.numpy(), "noise": noise.numpy()})
        return torch.from_numpy(action)

    return act


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"format=onnx needs the library {name}: pip install 'dppo[onnx]'") from error
