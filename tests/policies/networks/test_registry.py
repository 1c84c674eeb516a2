import re
from typing import Any

import pytest
import torch

from policies import UserError
from policies.networks.mlp import MLP
from policies.networks.registry import DENOISERS, build_denoiser, build_head

BUILDERS = {
    "denoiser": lambda network: build_denoiser(network, (2, 3), (1, 5), 4),
    "head": lambda network: build_head(network, 5, 3, 0.01),
}
each_builder = pytest.mark.parametrize("builder", BUILDERS)


@each_builder
@pytest.mark.parametrize("network", [{"hidden_dims": [8]}, {"type": None}, {"type": ["mlp"]}])
def test_an_unknown_network_type_is_refused_with_the_known_ones(builder: str, network: dict[str, Any]) -> None:
    known = {"denoiser": "mlp, transformer, unet", "head": "mlp"}[builder]
    with pytest.raises(UserError, match=re.escape(f"network type {network.get('type')!r}; known are {known}")):
        BUILDERS[builder](network)


def test_a_denoising_network_is_no_head_and_a_misspelt_one_has_a_near_miss() -> None:
    with pytest.raises(UserError, match="this policy cannot use the network type 'unet'; known are mlp"):
        BUILDERS["head"]({"type": "unet"})
    with pytest.raises(UserError, match=r"network type 'transfomer' \(did you mean transformer\?\); known are"):
        BUILDERS["denoiser"]({"type": "transfomer"})


@each_builder
def test_a_misspelt_setting_is_refused_with_its_near_miss(builder: str) -> None:
    with pytest.raises(UserError, match=r"network 'mlp' has no setting 'hiden_dims' \(did you mean hidden_dims"):
        BUILDERS[builder]({"type": "mlp", "hiden_dims": [8]})


@pytest.mark.parametrize("name", DENOISERS)
def test_every_denoiser_has_the_shapes_it_is_built_for(name: str) -> None:
    network = build_denoiser({"type": name}, (2, 3), (1, 5), 4)
    assert type(network) is DENOISERS[name]
    assert network(torch.zeros(6, 2, 3), torch.arange(6) % 4, torch.zeros(6, 5)).shape == (6, 2, 3)


def test_a_setting_of_another_network_is_refused() -> None:
    with pytest.raises(UserError, match="network 'unet' has no setting 'hidden_dims'"):
        build_denoiser({"type": "unet", "hidden_dims": [8]}, (2, 3), (1, 5), 4)


def test_a_head_starts_with_outputs_as_small_as_its_gain() -> None:
    x = torch.randn(100, 5)
    small, large = (build_head({"type": "mlp"}, 5, 3, gain)(x).std() for gain in (0.01, 1.0))
    assert isinstance(build_head({"type": "mlp"}, 5, 3, 1.0), MLP)
    assert 0 < small < 0.05 < large


def test_building_leaves_the_given_data_as_it_was() -> None:
    network = {"type": "mlp", "hidden_dims": [8]}
    build_head(network, 5, 3, 0.01)
    assert network == {"type": "mlp", "hidden_dims": [8]}
