"""Give a study the same batches in every pass over the data, and in every run."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler

from curvop.cli.problem_loading import ProblemError
from curvop.operators.engine_operator import digest
from curvop.storage.fingerprint import listed

__all__ = ["check_repeats", "in_order"]


def in_order(data: Any) -> Any:
    """Return a ``DataLoader`` that yields the examples of a shuffled ``DataLoader`` in the order of the data set.

    The curvature of the whole data set does not depend on the order of the examples, but a study can be resumed only if
    each pass of each run reads the same batches.

    Parameters
    ----------
    data : object
        The data of a problem. The object is not changed.

    Returns
    -------
    object
        `data` itself, unless it is a ``DataLoader`` that shuffles. A ``DataLoader`` that draws other examples in each
        pass is returned unchanged. Operators warn of it, and `check_repeats` refuses it.
    """
    if type(data) is not DataLoader or type(data.batch_sampler) not in (BatchSampler, type(None)):
        return data
    sampler: Any = data.sampler
    batches: Any = data.batch_sampler
    # A subclass may draw other examples than its base class. Operators and `check_repeats` see what it draws.
    if type(sampler) is RandomSampler and not sampler.replacement:
        times, rest = divmod(len(sampler), len(sampler.data_source))  # num_samples can be a multiple
        order = list(range(len(sampler.data_source))) * times
    elif type(sampler) is SubsetRandomSampler:
        order, rest = list(sampler.indices), 0
    else:
        return data
    if rest or (batches is not None and batches.drop_last and len(order) % batches.batch_size):
        return data
    ordered = copy.copy(data)
    # A DataLoader does not allow its samplers to be set. Its iterator exists only if it keeps its workers.
    ordered.__dict__.update(sampler=order, _iterator=None)
    if batches is not None:
        ordered.__dict__["batch_sampler"] = BatchSampler(order, batches.batch_size, batches.drop_last)
    return ordered


def check_repeats(data: Iterable[Any]) -> None:
    """Raise if two passes over the data yield different batches. The model is not evaluated.

    Lists and tuples are not read, because they do not change.

    Raises
    ------
    ProblemError
        If the batches differ. A study could then not be resumed.
    """
    if isinstance(data, list | tuple):
        return
    first, second = ([digest(batch) for batch in data] for _ in range(2))
    if first == second:
        return
    differing = [str(index) for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]]
    what = f"batch{'es' * (len(differing) > 1)} {listed(differing)}" if differing else "the number of batches"
    raise ProblemError(
        f"data yields different batches in two passes ({what}), so a study with --out could not be resumed: seed the "
        "random numbers at the start of each pass, take shuffling and augmentation out of the data, or leave out --out"
    )
