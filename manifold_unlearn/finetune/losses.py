"""Losses of gradient unlearning, one formula a function; no model is run here.

``logits`` have shape ``(n_texts, width, n_vocabulary)``, ``labels`` ``(n_texts, width)`` with
``IGNORED`` where a token carries no loss; the shift by one happens here. Log-probabilities of
answers, ``(n_texts,)``, are sums over tokens in nats. Every function answers a scalar, or says so.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from manifold_unlearn.finetune.batches import IGNORED


def token_log_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each next token, and which of them carry loss.

    Returns
    -------
    log_probabilities : Tensor of shape (n_texts, width - 1)
        At least float32; 0 where no loss is carried.
    mask : Tensor of shape (n_texts, width - 1), bool
    """
    wanted = labels[:, 1:]
    mask = wanted != IGNORED
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    loss = functional.cross_entropy(
        wide.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
    )
    return -loss, mask


def answer_log_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer as a whole, and how many tokens it has.

    Returns
    -------
    log_probabilities : Tensor of shape (n_texts,)
    n_tokens : Tensor of shape (n_texts,), int64
    """
    tokens, mask = token_log_probabilities(logits, labels)
    return tokens.sum(1), mask.sum(1)


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of ``-log p`` over all tokens of the batch, so that long answers count more."""
    tokens, mask = token_log_probabilities(logits, labels)
    return -tokens.sum() / mask.sum()


def gradient_ascent(logits: Tensor, labels: Tensor) -> Tensor:
    """``-NLL``, without a lower bound: nothing stops it from destroying the model.

    References
    ----------
    Jang et al. (2022), Knowledge unlearning, arXiv 2210.01504.
    """
    return -negative_log_likelihood(logits, labels)


def wga(logits: Tensor, labels: Tensor, *, beta: float = 1.0) -> Tensor:
    """Weighted ascent ``-mean p**beta * NLL`` over tokens; the weight carries no gradient.

    References
    ----------
    As in OpenUnlearning's ``compute_wga_loss``; Wang et al. (2025), arXiv 2502.19301.
    """
    tokens, mask = token_log_probabilities(logits, labels)
    weight = tokens.detach().exp() ** beta
    return (weight * tokens)[mask].mean()


def satimp(logits: Tensor, labels: Tensor, *, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    """``-mean p**beta1 * (1 - p)**beta2 * NLL`` over tokens; the weight carries no gradient.

    References
    ----------
    As in OpenUnlearning's ``compute_satimp_loss``.
    """
    tokens, mask = token_log_probabilities(logits, labels)
    p = tokens.detach().exp()
    return (p**beta1 * (1 - p).clamp(min=0) ** beta2 * tokens)[mask].mean()


def ceu(logits: Tensor, labels: Tensor, *, ignore_first: int = 1) -> Tensor:
    """Cross entropy to the model's own answer distribution without the true token.

    Parameters
    ----------
    logits, labels
        See the module.
    ignore_first : int, default=1
        Answer tokens of each text that are left out; the published code leaves out one.

    Raises
    ------
    ValueError
        No token is left in the whole batch.
    """
    mask = labels[:, 1:] != IGNORED
    mask = mask & (mask.cumsum(1) > ignore_first)
    if not bool(mask.any()):
        raise ValueError(
            f"no answer of the batch has more than ignore_first={ignore_first} tokens; lower it."
        )
    chosen = logits[:, :-1][mask]
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    target = chosen.detach().scatter(1, labels[:, 1:][mask][:, None], -torch.inf).softmax(-1)
    return -(target * chosen.log_softmax(-1)).sum(-1).mean()


def npo(log_probabilities: Tensor, reference: Tensor, *, beta: float = 0.1) -> Tensor:
    """``-(2 / beta) mean log sigmoid(-beta (log p - log p_ref))``, both summed over tokens.

    The sum makes long answers leave the linear regime sooner than short ones.

    Parameters
    ----------
    log_probabilities, reference : Tensor of shape (n_texts,)
        Of the model, and of the model before unlearning.
    beta : float, default=0.1
        0 is the limit of gradient ascent on the sum.

    References
    ----------
    Zhang et al. (2024), Negative preference optimization, arXiv 2404.05868.
    """
    ratio = log_probabilities - reference
    return -(2 / beta) * functional.logsigmoid(-beta * ratio).mean()


def simnpo(
    log_probabilities: Tensor, n_tokens: Tensor, *, beta: float = 4.5, delta: float = 0.0
) -> Tensor:
    """``-(2 / beta) mean log sigmoid(beta (NLL / n_tokens - delta))``; no reference model.

    The margin is that of OpenUnlearning's code, inside the factor ``beta``; the paper's ``gamma``
    stands outside: ``gamma = beta * delta``. Published default runs use 0, tuned sweeps also 1.

    References
    ----------
    Fan et al. (2024), Simplicity prevails, arXiv 2410.07163.
    """
    margin = -log_probabilities / n_tokens - delta
    return -(2 / beta) * functional.logsigmoid(beta * margin).mean()


def dpo(
    preferred: Tensor,
    preferred_reference: Tensor,
    rejected: Tensor,
    rejected_reference: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """``-(2 / beta) mean log sigmoid(beta (win ratio - lose ratio))``, sums over tokens.

    All are answer log-probabilities ``(n_texts,)``. The factor 2 is that of the unlearning
    literature (IdkDPO, AltPO); preference learning has 1 / 1.

    References
    ----------
    Rafailov et al. (2023), arXiv 2305.18290; as an unlearner Maini et al. (2024), TOFU.
    """
    difference = (preferred - preferred_reference) - (rejected - rejected_reference)
    return -(2 / beta) * functional.logsigmoid(beta * difference).mean()


def undial(
    logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 10.0,
    positions: Literal["answer", "published"] = "answer",
) -> Tensor:
    """Cross entropy to the reference distribution with the true token's logit lowered by ``beta``.

    Parameters
    ----------
    logits, reference_logits, labels
        See the module; the reference is the model before unlearning.
    beta : float, default=10.0
    positions : {"answer", "published"}
        ``"published"`` is OpenUnlearning's code, behind its tables: the mean runs over all
        positions, padding and prompt included, and where there is no label the value -100 is
        used as an index, so that the 100th token from the end of the vocabulary is lowered.

    Raises
    ------
    ValueError
        ``"published"`` on a vocabulary of fewer than 100 tokens.

    References
    ----------
    Dong et al. (2024), UNDIAL, arXiv 2402.10052.
    """
    wanted, mask = labels[:, 1:], labels[:, 1:] != IGNORED
    if positions == "published":
        if logits.shape[-1] < -IGNORED:
            raise ValueError(
                f"positions='published' indexes the vocabulary by {IGNORED}; it has only "
                f"{logits.shape[-1]} tokens. Use positions='answer'."
            )
        wanted, mask = wanted % logits.shape[-1], torch.ones_like(mask)
    wide = torch.promote_types(logits.dtype, torch.float32)
    student, teacher = logits[:, :-1][mask].to(wide), reference_logits[:, :-1][mask].to(wide)
    lowered = functional.one_hot(wanted[mask], logits.shape[-1]) * beta
    target = (teacher - lowered).softmax(-1)
    return -(target * student.log_softmax(-1)).sum(-1).mean()


def adaptive_ascent(losses: Tensor, *, power: float = 0.5) -> Tensor:
    """``-mean_i (n w_i / sum w) loss_i`` with ``w_i = 1 / (loss_i**power + 1e-15)`` held fixed.

    What is known best (smallest loss) is pushed hardest.

    Parameters
    ----------
    losses : Tensor of shape (n,)
        NLL of each text or token.
    power : float, default=0.5

    References
    ----------
    Huang et al. (2024), arXiv 2409.19732, as released (``AdaptiveLoss``).
    """
    weight = 1 / (losses.detach().clamp(min=0) ** power + 1e-15)
    return -(weight / weight.sum() * losses).sum()


def kl_to_reference(logits: Tensor, reference_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean ``KL(reference || model)`` of the next-token distributions, in nats.

    Parameters
    ----------
    logits, reference_logits : Tensor of shape (n_texts, width, n_vocabulary)
    mask : Tensor of shape (n_texts, width), optional
        Positions that count. None is OpenUnlearning's form: all, prompt and padding included.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_q, log_p = logits.to(wide).log_softmax(-1), reference_logits.to(wide).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return divergence.mean() if mask is None else divergence[mask].mean()


def hidden_mse(
    hidden: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    reduction: Literal["token", "text", "published"] = "token",
) -> Tensor:
    """Mean squared distance of hidden states to a target: both terms of RMU.

    With ``target = c * u`` it is the forget term of RMU, with the hidden states of the untouched
    model its retain term (OpenUnlearning's ``EMBED_DIFF``).

    Parameters
    ----------
    hidden, target : Tensor of shape (n_texts, width, d_model)
        The second may broadcast.
    mask : Tensor of shape (n_texts, width), bool
        Tokens that count.
    reduction : {"token", "text", "published"}
        Mean over the tokens of the batch; mean over texts of their means; or OpenUnlearning's
        code, which divides the sum of each text by the number of tokens of *every* text and
        averages those quotients. The three agree where all texts have as many tokens. The code of
        WMDP is ``"token"`` with a mask of ones.

    References
    ----------
    Li et al. (2024), WMDP, arXiv 2403.03218.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    squared = (hidden.to(wide) - target.to(wide)).square().mean(-1) * mask
    count = mask.sum(1).to(wide)
    if reduction == "token":
        return squared.sum() / count.sum()
    sums = squared.sum(1)
    return (sums / count).mean() if reduction == "text" else sums.mean() * (1 / count).mean()


def control_vector(d_model: int, generator: torch.Generator) -> Tensor:
    """Unit vector ``(d_model,)`` of coordinates drawn from U[0, 1]: the ``u`` of RMU."""
    drawn = torch.rand(d_model, generator=generator)
    return drawn / drawn.norm()


def adaptive_scale(
    original: Tensor, mask: Tensor, *, per: Literal["text", "token"] = "text"
) -> Tensor:
    """Norm of the untouched hidden states: adaptive RMU's target is ``scale * this * u``.

    Returns
    -------
    Tensor of shape (n_texts, width, 1) or (n_texts, 1, 1)
        The norm of each token, or the mean norm of a text's tokens that count.

    References
    ----------
    Dang et al. (2024), arXiv 2408.06223.
    """
    norms = original.to(torch.promote_types(original.dtype, torch.float32)).norm(dim=-1)
    if per == "token":
        return norms[:, :, None]
    return ((norms * mask).sum(1) / mask.sum(1))[:, None, None]


def rerouting(hidden: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens of ``relu(cos(h, h_original))``: 0 once they are orthogonal.

    References
    ----------
    Zou et al. (2024), Circuit breakers, arXiv 2406.04313.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    cosine = functional.cosine_similarity(hidden.to(wide), original.to(wide), dim=-1)
    return cosine.relu()[mask].mean()


def hidden_distance(hidden: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens of ``||h - h_original||``: the retain term of circuit breakers.

    The released code also averages over the padding, where it is 0.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(wide) - original.to(wide))[mask].norm(dim=-1).mean()
