"""A keys file for each test."""

from __future__ import annotations

import pytest

from tests.serving.access.keyring import Keyring


@pytest.fixture
def keyring(tmp_path):
    return Keyring(tmp_path)
