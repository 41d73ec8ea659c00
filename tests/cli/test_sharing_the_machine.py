"""Threads of torch beside other work."""

import os

import pytest

from hf_lnfree.cli.main import share_the_machine


@pytest.mark.parametrize(
    ("load", "given", "expected"),
    [
        (0.9, {}, "passive"),
        (0.1, {}, None),
        (0.9, {"OMP_WAIT_POLICY": "active"}, "active"),
        (0.9, {"GOMP_SPINCOUNT": "1000"}, None),
    ],
)
def test_threads_sleep_on_a_busy_machine_unless_the_user_has_said_otherwise(monkeypatch, load, given, expected):
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(os, "getloadavg", lambda: (load * os.cpu_count(), 0.0, 0.0))
    share_the_machine()
    assert os.environ.get("OMP_WAIT_POLICY") == expected
