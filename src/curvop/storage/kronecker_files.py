"""Save and load Kronecker-factored matrices.

Importing this module connects the functions with the methods ``save`` and ``load`` of
`KroneckerFactoredLinearOperator`. The methods are below this subpackage and cannot import it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from curvop.operators.kronecker import KroneckerFactoredLinearOperator, KroneckerFiles
from curvop.storage.result_files import load_arrays, save_arrays

__all__ = ["load", "save"]


def save(A: KroneckerFactoredLinearOperator, path: str | os.PathLike[str]) -> None:
    """Write the factors of a matrix to an ``.npz`` file of plain arrays.

    Parameters
    ----------
    A : KroneckerFactoredLinearOperator
    path : str or path-like
    """
    save_arrays(Path(path), **A.arrays)


def load(path: str | os.PathLike[str], device: Any) -> KroneckerFactoredLinearOperator:
    """Read a matrix that `save` wrote.

    Parameters
    ----------
    path : str or path-like
    device : torch.device or str
        Device of the factors.

    Raises
    ------
    ValueError
        If the file was not written by `save`.
    """
    arrays = load_arrays(path, ("kronecker_layouts",), "KroneckerFactoredLinearOperator.save")
    return KroneckerFactoredLinearOperator.of_arrays(arrays, device)


KroneckerFiles.save = save
KroneckerFiles.load = load
