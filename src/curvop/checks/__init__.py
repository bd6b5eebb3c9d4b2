"""Checks of an operator before a long study."""
