"""``dppo export``: a checkpoint becomes what other programs load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dppo.building import with_sampler
from dppo.checkpoint import find_policy, load_policy
from dppo.sources import is_foreign
from policies import Policy, UserError
from policies.config import near_misses
from policies.exports.formats import FORMATS, Format, largest_difference
from policies.exports.lerobot import name_inputs
from policies.pretrained import CONFIG_NAME


def run(config: Mapping[str, Any], overridden: Collection[str]) -> Path:
    """Export as the composed configuration of ``configs/export.yaml`` says; the path that was written."""
    name = str(config["format"])
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}{near_misses(name, FORMATS)}; there are: {', '.join(FORMATS)}")
    output = _free_path(config, FORMATS[name])
    named = str(config["checkpoint"])
    source = find_policy(named)
    if is_foreign(source):
        raise UserError(f"{named} is of another project; import it first: dppo import {named} output=...")
    policy, _ = load_policy(source)
    if config.get("sampler") is not None:
        policy = with_sampler(policy, config["sampler"])
    if config["state_dim"] is not None:
        if name != "lerobot":
            raise UserError(f"state_dim is a setting of format=lerobot, not of format={name}")
        name_inputs(policy, config["state_dim"])
    with _beside(output) as temporary:
        FORMATS[name].write(policy, temporary)
        difference = largest_difference(policy, FORMATS[name].load(temporary))
    print(_told(policy, source, output, difference))
    return output


def _free_path(config: Mapping[str, Any], form: Format) -> Path:
    """Where to write."""
    output = Path(str(config["output"])).expanduser()
    kind, other = ("directory", "file") if form.directory else ("file", "directory")
    if output.exists() and output.is_dir() != form.directory:
        raise UserError(f"{output} is a {other}; of format={config['format']}, output=... names a {kind}")
    taken = any(output.iterdir()) if output.is_dir() else output.exists()
    if taken and not config["overwrite"]:
        raise UserError(f"{output} is there already; choose another output=..., or set overwrite=true")
    if taken and form.directory and not (output / CONFIG_NAME).is_file():
        raise UserError(
            f"{output} holds no policy that could be replaced, but something else; choose another output=..."
        )
    return output


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A path to write to, which takes the name ``output`` in the end; if something fails, all is as it was."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        yield Path(folder) / output.name
        if output.is_dir():
            shutil.rmtree(output)
        os.replace(Path(folder) / output.name, output)


def _told(policy: Policy, source: Path, output: Path, difference: float) -> str:
    """What was exported, in a few words."""
    c = policy.config
    return (
        f"{source} -> {output}: a {policy.type} policy, observations {c.history} x {c.obs_dim}, executed actions "
        f"{c.executed_chunk} x {c.action_dim}; its actions and the checkpoint's from the same noise differ by at most "
        f"{difference:.2g}"
    )
