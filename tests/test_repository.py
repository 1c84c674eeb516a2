"""What the repository promises of itself."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_pinned_package_comes_from_a_registry() -> None:
    """``pip freeze`` writes ``name @ file:///...`` for what was installed from a file, which no other machine has."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


PAGES = ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/performance.md", "docs/reliability.md"]
PAGES += ["docs/dppo.md", "docs/update_rules.md", "docs/comparing.md", "docs/tutorial.md", "docs/deploy.md"]
PAGES += ["dppo/pretrained/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []
