"""The command ``curvop``."""
