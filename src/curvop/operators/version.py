"""Version of the package, readable without an installation."""

__all__ = ["__version__"]

__version__ = "0.2.0"
