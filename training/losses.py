"""The terms of the losses: small pure functions of log-probabilities and gate weights.

Log-probabilities are float32 and finite, as ``log_softmax`` and ``model.mixture.mix`` return them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from model.mixture import check_top_k

RIDGE = 1e-4
"""Added to the Gram matrix of :func:`expert_diversity`, so that alike experts (or more than ``C - 1``) have a finite value."""

DROPPED = -1e4
"""Log weight of a dropped expert: its weight is exactly 0 in float32, and unlike ``-inf`` it can't turn into NaN."""


def mixture_cross_entropy(log_probs: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Return the mean cross-entropy, with label smoothing (Szegedy et al. 2016, section 7).

    Args:
        log_probs: ``(B, C)``.
        targets: Classes ``(B,)`` int64, or probabilities ``(B, C)`` float32 as CutMix makes them.
        smoothing: In ``[0, 1)``: the share of every target that is spread over all classes.
    """
    soft = targets.is_floating_point()
    likelihood = -(targets * log_probs).sum(dim=1).mean() if soft else F.nll_loss(log_probs, targets)
    return likelihood if smoothing == 0 else (1 - smoothing) * likelihood - smoothing * log_probs.mean()


def without_highest(log_probs: torch.Tensor, targets: torch.Tensor, share: float) -> torch.Tensor:
    """Return the positions ``(K,)``, ascending, of a batch's samples but for ``share`` of them, those of the highest loss.

    Loss trimming: what a network that still learns finds hardest is most often mislabelled. Source: Shen and Sanghavi 2019,
    "Learning with bad training data via iterative trimmed loss minimization", algorithm 1, done within every batch (as Han et
    al. 2018, "Co-teaching", algorithm 1, does between two networks).

    Args:
        log_probs: ``(B, C)``.
        targets: As for :func:`mixture_cross_entropy`.
        share: In ``[0, 1)``; rounded down to whole samples, so at least one stays.
    """
    with torch.no_grad():
        if targets.is_floating_point():  # without what no answer could spare: targets that are unsure themselves are not wrong
            losses = F.kl_div(log_probs, targets, reduction="none").sum(dim=1)  # (B,)
        else:
            losses = F.nll_loss(log_probs, targets, reduction="none")
    kept = len(losses) - math.floor(share * len(losses))
    return losses.topk(kept, largest=False).indices.sort().values


def expert_cross_entropy(log_probs: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Return the mean over experts of their own cross-entropies.

    The term is ours (not published): attacks on mixtures find the experts to be the weak link.

    Args:
        log_probs: ``(B, E, C)``.
        targets: As for :func:`mixture_cross_entropy`, the same for every expert.
        smoothing: In ``[0, 1)``.
    """
    experts = log_probs.shape[1]
    return mixture_cross_entropy(log_probs.flatten(0, 1), targets.repeat_interleave(experts, dim=0), smoothing)


def kl_divergence(clean: torch.Tensor, attacked: torch.Tensor) -> torch.Tensor:
    """Return the batch's mean ``KL(p_clean || p_attacked)``, in nats; log-probabilities ``(B, C)`` both.

    TRADES (Zhang et al. 2019, equation 5) minimises it over the weights and maximises it over the perturbation.
    """
    return F.kl_div(attacked, clean, reduction="batchmean", log_target=True)


def trades(
    clean: torch.Tensor, attacked: torch.Tensor, targets: torch.Tensor, beta: float, smoothing: float = 0.0
) -> torch.Tensor:
    """Return the TRADES loss: be right on clean images, and say the same about attacked ones.

    Source: Zhang et al. 2019, "Theoretically principled trade-off between robustness and accuracy", equation 5 with the
    Kullback-Leibler divergence as the second term. Gradients flow through both of its arguments.

    Args:
        clean: Log-probabilities ``(B, C)`` of the clean images.
        attacked: Log-probabilities ``(B, C)`` of the same images, attacked; best with :func:`kl_divergence` as what is climbed.
        targets: As for :func:`mixture_cross_entropy`; only the first term sees them.
        beta: Weight of the divergence, the paper's ``1 / lambda``; 6 in its experiments.
        smoothing: In ``[0, 1)``, of the first term.
    """
    return mixture_cross_entropy(clean, targets, smoothing) + beta * kl_divergence(clean, attacked)


def mart(clean: torch.Tensor, attacked: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the MART loss: misclassified images count more.

    ``-log p_y(x') - log(1 - max_{k != y} p_k(x')) + beta KL(p(x) || p(x')) (1 - p_y(x))``, mean over the batch.
    Source: Wang et al. 2020, "Improving adversarial robustness requires revisiting misclassified examples", equations 11 to 14.

    Args:
        clean: Log-probabilities ``(B, C)`` of the clean images ``x``.
        attacked: Log-probabilities ``(B, C)`` of the attacked images ``x'``.
        labels: Classes ``(B,)``, int64.
        beta: Weight of the divergence, the paper's ``lambda``.

    Raises:
        ValueError: The labels are probabilities.
    """
    if labels.is_floating_point():
        raise ValueError(
            f"MART needs one class per image, not probabilities {tuple(labels.shape)}: "
            "CutMix and MART can't be combined, turn one of them off"
        )
    true = labels.unsqueeze(1)  # (B, 1)
    rival = attacked.scatter(1, true, -math.inf).argmax(dim=1, keepdim=True)  # (B, 1), the strongest wrong class
    # 1 - p_k is the sum of the other probabilities, so its logarithm stays finite where p_k rounds to 1.
    not_rival = attacked.scatter(1, rival, -math.inf).logsumexp(dim=1)  # (B,)
    boosted = -attacked.gather(1, true).squeeze(1) - not_rival
    divergence = (clean.exp() * (clean - attacked)).sum(dim=1)  # (B,)
    doubt = 1 - clean.gather(1, true).squeeze(1).exp()
    return (boosted + beta * divergence * doubt).mean()


def expert_diversity(experts: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how differently the experts spread the probability that they do not give to the true class; larger is better.

    The logarithm of the ensemble diversity of Pang et al. 2019, "Improving adversarial robustness via promoting ensemble
    diversity" (ADP), section 3: every expert's probabilities of the wrong classes, scaled to unit length, and the determinant
    of their Gram matrix, with :data:`RIDGE` on its diagonal. Mean over the batch; at most ``E log(1 + RIDGE)``, which is
    reached where no two experts suspect the same class, and about ``(E - 1) log(RIDGE)`` where all of them are alike.

    Vectors are scaled in log space and the determinant is taken in float64, so tiny probabilities and autocast do no harm.

    Args:
        experts: Log-probabilities ``(B, E, C)``.
        labels: Classes ``(B,)``, or probabilities ``(B, C)``, of which the largest is the true class.
    """
    true = labels.argmax(dim=1) if labels.is_floating_point() else labels
    is_true = F.one_hot(true, experts.shape[2]).bool().unsqueeze(1)  # (B, 1, C)
    wrong = experts.double().masked_fill(is_true, -math.inf)  # (B, E, C); the true class then adds 0 to every product
    directions = F.normalize((wrong - wrong.detach().amax(dim=2, keepdim=True)).exp(), dim=2)
    gram = directions @ directions.transpose(1, 2)  # (B, E, E)
    ridge = RIDGE * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return torch.logdet(gram + ridge).mean().to(experts.dtype)


def keep_top_k(gate: torch.Tensor, k: int) -> torch.Tensor:
    """Return the gate's log weights with each image's ``k`` largest renormalised and all others at about :data:`DROPPED`.

    What :func:`model.mixture.mix` makes of them is what ``Mixture(top_k=k)`` answers, and it can be trained: dropped experts
    and their gate logits get zero gradients. Source: Shazeer et al. 2017, "Outrageously large neural networks", section 2.1,
    without its noise.

    Args:
        gate: Log weights ``(B, E)``.
        k: How many to keep.

    Raises:
        ValueError: ``k`` is not between 1 and ``E``.
    """
    check_top_k(k, gate.shape[1])
    chosen = gate.topk(k, dim=1).indices  # (B, k)
    kept = torch.zeros_like(gate, dtype=torch.bool).scatter(1, chosen, True)
    return gate.masked_fill(~kept, DROPPED).log_softmax(dim=1)


def load_balance(gate: torch.Tensor) -> torch.Tensor:
    """Return ``log E - H(mean gate weights)``: 0 when a batch uses all experts alike, ``log E`` when it uses one.

    Entropy of the mean, not mean of the entropies: single images may be routed sharply as long as the batch is spread. The aim
    is that of Shazeer et al. 2017, section 4; the entropy in place of their squared coefficient of variation is ours.

    Args:
        gate: Log gate weights ``(B, E)``.
    """
    mean = gate.exp().mean(dim=0)  # (E,)
    return math.log(gate.shape[1]) + (mean * mean.clamp_min(1e-12).log()).sum()
