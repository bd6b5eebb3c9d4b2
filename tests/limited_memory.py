"""A process that has less memory than it lets an operator keep: ``python limited_memory.py cpu|cuda MEBIBYTES``.

All twelve linearizations take some 600 MiB, the operator is allowed a terabyte, and the process is not.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from curvop import HessianLinearOperator


def assert_less_is_kept_and_the_product_is_right(device: str, mebibytes: int) -> None:
    command = [sys.executable, __file__, device, str(mebibytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    warning = "RuntimeWarning an operator ran out of memory: it caches less and multiplies fewer columns at once"
    assert done.stdout.startswith(warning)


def limit_the_address_space(mebibytes: int) -> Callable[[], None]:
    """Allow so much more than is used now; return what takes the limit away."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + mebibytes * 2**20, -1))
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1))


def limit_the_gpu(mebibytes: int) -> Callable[[], None]:
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + mebibytes * 2**20) / total)
    return lambda: torch.cuda.set_per_process_memory_fraction(1.0)


def main(device: str, mebibytes: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 1))
    model.to(device, torch.float64)
    data = [(torch.randn(2000, 20).double(), torch.randn(2000, 1).double()) for _ in range(12)]
    params = {name: value for name, value in model.named_parameters() if name.endswith("bias")}

    def product(cache: int) -> tuple[HessianLinearOperator, np.ndarray, np.ndarray]:
        H = HessianLinearOperator(model, nn.MSELoss(), params, data, cache=cache)
        X = np.random.default_rng(0).normal(size=(H.shape[0], 3))
        return H, X, H @ X

    _, X, expected = product(0)  # what needs the least
    unlimited = {"cpu": limit_the_address_space, "cuda": limit_the_gpu}[device](mebibytes)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        H, X, found = product(2**40)
        again = H @ X
    unlimited()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * abs(expected).max())
    np.testing.assert_allclose(again, expected, rtol=1e-9, atol=1e-12 * abs(expected).max())
    assert len(told) == 1, [str(one.message) for one in told]
    print(told[0].category.__name__, told[0].message)
    kept, share = H._engine.kept()
    assert 0 < share < 1, (kept, share)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
