"""What a model does is tested for every family here, elsewhere for the paper's two; what is removed are LayerNorms."""

from ..conftest import EVERY

WITH_LAYERNORM = ("test_removal_norm",)


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        only = metafunc.module.__name__.endswith(WITH_LAYERNORM)
        families = [family for family in EVERY if family.norm == "layernorm" or not only]
        metafunc.parametrize("family", families, ids=lambda f: f.name)
