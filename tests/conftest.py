"""One torch thread for all tests, and the cases that belong to the tier ``slow``."""

import fnmatch

import pytest
import torch

torch.set_num_threads(1)  # the models are small, and waiting threads slow a busy machine down tenfold

# The first changes torch for the whole process that imports it, as doctests would; the second needs an old version.
collect_ignore = ["second_device.py", "storage/old_files/make.py"]


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put some cases of parametrized tests into the tier ``slow``.

    ``@pytest.mark.default_cases("one", "two-*")`` keeps only the cases with these ids, or patterns of ids, in the
    default tier, as representatives of the others. ``@pytest.mark.slow_cases(...)`` names the slow ones.
    """
    used: dict[tuple[str, str], bool] = {}
    for item in items:
        case = item.name.partition("[")[2].removesuffix("]")
        for marker in item.iter_markers():
            if marker.name in ("default_cases", "slow_cases"):
                matches = [fnmatch.fnmatchcase(case, pattern) for pattern in marker.args]
                for pattern, match in zip(marker.args, matches, strict=True):
                    key = (item.nodeid.partition("[")[0], pattern)
                    used[key] = used.get(key, False) or match
                nightly = item.get_closest_marker("nightly") is not None
                if any(matches) == (marker.name == "slow_cases") and not nightly:
                    item.add_marker(pytest.mark.slow)
    unused = [key for key, match in used.items() if not match]
    if unused and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"these patterns of default_cases or slow_cases match no case: {unused}")
