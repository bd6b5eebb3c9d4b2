"""Arguments that many functions share."""

from __future__ import annotations

import pytest
import torch

from curvop.operators.validation import available_bytes


class TestAvailableBytes:
    def test_by_default_half_of_the_free_memory(self, monkeypatch) -> None:
        monkeypatch.setattr(
            "curvop.operators.validation.free_bytes", lambda device: {"cpu": 1000, "meta": 600}[device.type]
        )
        assert available_bytes() == 500
        assert available_bytes(torch.device("meta")) == 300

    def test_the_argument_decides(self) -> None:
        assert available_bytes(memory=7e9) == 7_000_000_000
        with pytest.raises(TypeError, match="memory is a str, but must be a real number"):
            available_bytes(memory="7 GB")
