"""What several test files share."""
import sys

import pytest


def patch(monkeypatch: pytest.MonkeyPatch, name: str, value):
    "Give a name another value in every module of dli that holds it."
    holders = [m for key, m in list(sys.modules.items()) if key.startswith("dli.") and name in vars(m)]
    assert holders, f"no module of dli holds {name!r}"
    for module in holders:
        monkeypatch.setattr(module, name, value)
