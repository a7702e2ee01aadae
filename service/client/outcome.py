"""What became of one image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """An image file's prediction, or why there is none.

    Attributes:
        path: As it was given or found.
        prediction: ``label``, and, unless a policy hides them, ``confidence``, ``scores`` by label, best first, and the
            ``certificate`` of a vote.
        error: Why there is no prediction.
    """

    path: Path
    prediction: dict[str, Any] | None = None
    error: str | None = None

    def to_json(self, top: int | None) -> dict[str, Any]:
        """Return a JSON object with at most ``top`` scores."""
        if self.prediction is None:
            return {"path": str(self.path), "error": self.error}
        shown: dict[str, Any] = {
            name: self.prediction[name] for name in ("label", "confidence", "certificate") if name in self.prediction
        }
        if "scores" in self.prediction:
            shown["scores"] = dict(list(self.prediction["scores"].items())[:top])
        return {"path": str(self.path), **shown}

    def to_text(self, top: int) -> str:
        """Return a prediction as one line, with at most ``top`` scores."""
        assert self.prediction is not None
        scores = list(self.prediction.get("scores", {}).items())[:top]
        said = ", ".join(f"{label} {round(score, 4):g}" for label, score in scores) or self.prediction["label"]
        return f"{self.path}: {said}"
