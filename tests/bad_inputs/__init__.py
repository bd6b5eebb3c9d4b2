"""The bad inputs that the tests try, and their errors.

``python tests/bad_inputs > docs/bad_input.rst`` writes the page of the documentation that lists them.
"""

from bad_inputs import models, products, kronecker, studies, files  # noqa: F401, I001 the order of the page
from bad_inputs.rows import ROWS, Row, table, told

__all__ = ["ROWS", "Row", "table", "told"]
