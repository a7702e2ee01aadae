"""The watch: notices model extraction and query-based attacks by what a caller asks."""

from service.watch.suspects import Suspect
from service.watch.watch import Watch

__all__ = ["Suspect", "Watch"]
