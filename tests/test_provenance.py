"""What a result says about the machine."""

import pytest
import torch

from hf_lnfree.provenance import environment


@pytest.mark.parametrize(("device", "named"), [("cpu", False), ("cuda", True), (None, True)])
def test_a_gpu_is_named_only_where_it_did_the_work(device, named, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    found = environment(None if device is None else torch.device(device))["device"]
    assert found == ("a GPU" if named else f"cpu, {torch.get_num_threads()} threads")
