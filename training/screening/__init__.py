"""Screening: which training samples look as if someone had tampered with them."""

from training.screening.screening import Screening, screen
from training.screening.settings import ScreenSettings

__all__ = ["ScreenSettings", "Screening", "screen"]
