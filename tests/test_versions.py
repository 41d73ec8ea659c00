"""What setup.cfg allows of transformers is what `make test-versions` tests, from the oldest to the newest."""

import configparser
import re

from packaging.requirements import Requirement
from packaging.version import Version

from .fences import ROOT


def test_the_bounds_of_transformers_are_tested():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    requirements = map(Requirement, settings["options"]["install_requires"].strip().splitlines())
    allowed = next(r.specifier for r in requirements if r.name == "transformers")
    oldest, newest = re.search(r"^TRANSFORMERS := (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert f">={Version(oldest).major}.{Version(oldest).minor}" in str(allowed)
    assert f"<{Version(newest).major}.{Version(newest).minor + 1}" in str(allowed)
    assert oldest in allowed
    assert newest in allowed
