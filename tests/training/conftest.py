from __future__ import annotations

import pytest

from tests.training import common


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return common.prepare_tiny(tmp_path_factory.mktemp("tiny"))
