"""What holds for the callbacks of all frameworks: lazy imports, and trainings with two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import curvop.callbacks
from curvop.callbacks.training_tracking import check_batch_norm

FRAMEWORKS = {"LightningTracking": "lightning", "TransformersTracking": "transformers"}


def test_importing_the_module_imports_no_framework() -> None:
    code = f"import sys, curvop.callbacks; print(sorted({set(FRAMEWORKS.values())} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert set(dir(curvop.callbacks)) == set(FRAMEWORKS)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_missing_framework_is_named_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    framework = FRAMEWORKS[name]
    monkeypatch.delitem(sys.modules, f"curvop.callbacks.{framework}_tracking", raising=False)
    for module in (framework, f"{framework}.pytorch", f"pytorch_{framework}"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{name} needs {framework}: pip install {framework}"):
        getattr(curvop.callbacks, name)
    with pytest.raises(AttributeError, match="has no attribute 'KerasTracking'"):
        _ = curvop.callbacks.KerasTracking


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS.values())
def test_the_first_of_two_processes_computes_and_logs(framework: str, tmp_path) -> None:
    script = Path(__file__).with_name("two_process_training.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script), framework, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["steps"] == [0, 2, 4]
    assert second["steps"] is None
    assert len(first["logged"]) == 3  # once for each step
    assert second["logged"] == []
    assert first["logged"][-1] == pytest.approx(first["dense"], rel=1e-4)
    assert first["parameters"] == second["parameters"]


def test_synchronized_batch_normalization_would_wait_for_the_other_processes() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    check_batch_norm(model, "eval")
    with pytest.raises(ValueError, match=r"mode is 'train', but the model has a SyncBatchNorm.*use mode='eval'"):
        check_batch_norm(model, "train")
