"""The certificate of a vote: how many partitions of the training data may change without changing the answer.

Source: Levine and Feizi, "Deep Partition Aggregation: provable defense against general poisoning attacks" (2021), section 3.
Each expert is trained on one partition alone, so whoever changes a partition changes one vote at most; an answer stands while
fewer votes can move than its lead takes. Nothing here needs torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Probabilities = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Votes = npt.NDArray[np.int64]


def read_votes(probabilities: Probabilities, experts: int) -> Votes:
    """Return the votes that went into a vote's answer.

    ``(E + 1) p`` is the votes plus the mean of the experts' probabilities. The mean is at most ``1 - 1 / (2 E)`` where an
    expert votes otherwise, as that one gives the class half at most; so more than computing errs by is added before rounding
    down, and only a class that has all votes needs to be cut off at ``E``.

    Args:
        probabilities: ``(N, C)``, what a mixture of this many voting experts answers, as :func:`model.mixture.vote` defines it,
            exact to ``1 / (4 E (E + 1))``: not after a policy has rounded it.
        experts: ``E``.

    Returns:
        Votes by class, ``(N, C)``.
    """
    counted = np.floor(probabilities.astype(np.float64) * (experts + 1) + 1 / (4 * experts))
    return counted.clip(0, experts).astype(np.int64)


def read_means(probabilities: Probabilities, experts: int) -> npt.NDArray[np.float64]:
    """Return the mean of the experts' probabilities, ``(N, C)`` in ``[0, 1]``: the rest of what :func:`read_votes` reads."""
    rest = probabilities.astype(np.float64) * (experts + 1) - read_votes(probabilities, experts)
    return rest.clip(0.0, 1.0)


def tolerated_partitions(votes: Votes) -> Votes:
    """Return of how many partitions the samples may be changed at will without changing the answer.

    ``(lead - 1) // 2``, where the lead is the most votes less the second most, and 0 without a lead: each changed partition can
    take one vote from the answer and give it to the runner-up. It holds however ties are broken. A sample that is inserted,
    removed or relabelled changes one partition, one whose pixels change two.

    Args:
        votes: By class, ``(N, C)`` with ``C`` of 2 or more.

    Returns:
        ``(N,)``, each from 0 to ``(E - 1) // 2``.
    """
    ranked = np.sort(votes, axis=1)
    lead = ranked[:, -1] - ranked[:, -2]
    return np.asarray(np.maximum(lead - 1, 0) // 2, np.int64)
