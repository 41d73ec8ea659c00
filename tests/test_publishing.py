"""What stands in the repository for those who install, cite and test the package."""

import configparser
import re

import yaml

from hf_lnfree.version import __version__

from .fences import ROOT

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def test_the_workflow_tests_what_the_package_supports():
    matrix = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert (
        matrix["transformers"] == re.search(r"^TRANSFORMERS := (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    )
    pythons = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    assert matrix["python"] == pythons
    assert SETUP["options"]["python_requires"] == f">={pythons[0]}"


def test_the_workflow_calls_targets_that_are_there():
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"].values()
    called = {step["run"].split()[1] for job in jobs for step in job["steps"] if "run" in step}
    makefile = (ROOT / "Makefile").read_text()
    for target in called:
        pattern = re.sub(r"-\$\{\{.*", "-%", target)
        assert re.search(rf"^{re.escape(pattern)}:", makefile, re.M), target


def test_versions_and_addresses_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == __version__
    assert citation["repository-code"] == SETUP["metadata"]["url"]
    assert [author["name"] for author in citation["authors"]] == [SETUP["metadata"]["author"]]
    assert citation["license"] == SETUP["metadata"]["license"]
