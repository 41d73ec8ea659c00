"""What a model does is tested for every family here, elsewhere for the paper's two."""

import pytest

from ..conftest import EVERY, Family


@pytest.fixture(params=EVERY, ids=lambda f: f.name)
def family(request) -> Family:
    return request.param
