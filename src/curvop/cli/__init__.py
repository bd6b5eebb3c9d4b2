"""The ``curvop`` command."""
