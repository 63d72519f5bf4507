"""The algebra of a product ΔW = P Λ Q that is never multiplied out: singular values, truncation, error, angles.

P is (d_out, r), Λ = diag(lam), Q (r, d_in). With any R_P, R_Q such that R_PᵀR_P = PᵀP and R_QᵀR_Q = QQᵀ, the core
R_P Λ R_Qᵀ = U Σ Vᵀ has the singular values of ΔW, and the singular directions are linear in the factors:

    P · (Λ R_Qᵀ V) = U_ΔW Σ,      (Uᵀ R_P Λ) · Q = Σ V_ΔWᵀ                                             (1)

so no orthonormal basis of the tall factors is ever formed, and the only divisions are by singular values that are kept.
Dropping the smallest is the best approximation in the Frobenius norm (Eckart and Young, 1936).

In the metric ‖G^½ · C^½‖_F (K-FAC: Martens and Grosse, 2015, arXiv 1503.05671) the same holds with PᵀGP and QCQᵀ
instead of PᵀP and QQᵀ: the truncation of G^½ ΔW C^½, mapped back, is (1) again, since the inverse roots cancel. The
metric must therefore supply two r × r matrices per layer, never G and C themselves.

R comes from the Cholesky factor of the r × r Gram matrix in float64, at a fifth of the cost of a Householder QR of the
tall factor. Squaring loses singular values below about 1e-8 of ‖P‖‖Λ‖‖Q‖, which is below the rounding of float32
factors; if ΔW itself is that much smaller than its factors (two adapters that cancel each other, for example), or the
factors are float64, the QR is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CANCELS = 1e-3
"""The ratio of ‖ΔW‖ to ‖P‖‖ΛQ‖ below which Gram matrices are not exact enough."""


@dataclass(frozen=True)
class Factors:
    """One low-rank update ΔW = scaling · P diag(lam) Q: P (d_out, r), lam (r,) or None for ones, Q (r, d_in)."""

    P: torch.Tensor
    Q: torch.Tensor
    lam: torch.Tensor | None = None
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return self.Q.shape[0]

    def diagonal(self) -> torch.Tensor:
        """scaling · lam, (r,) in float64."""
        lam = torch.ones(self.rank) if self.lam is None else self.lam.detach().cpu()
        return lam.double() * self.scaling

    def dense(self) -> torch.Tensor:
        """ΔW, (d_out, d_in) in float64, for uses that need the full matrix."""
        return (self.P.double() * self.diagonal()) @ self.Q.double()


@dataclass(frozen=True)
class Spectrum:
    """A low-rank update in singular form, as linear maps of its factors.

    Attributes:
        sigma: singular values in the metric, falling, (m,) in float64, m = min(r, d_out, d_in).
        left: (r, m); P · left = U Σ^½ (in the metric).
        right: (m, r); right · Q = Σ^½ Vᵀ.
        core: Λ s as a matrix, (r, r): ΔW = P core Q.
        norm: ‖ΔW‖_F, in any metric.
        roots: R_P and R_Q of the Frobenius norm.
        plain: whether the metric is the Frobenius norm.
    """

    sigma: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    core: torch.Tensor
    norm: float
    roots: tuple[torch.Tensor, torch.Tensor]
    plain: bool

    @property
    def rank(self) -> int:
        """How many singular values there are, without triplets that are zero padding."""
        used = (self.roots[0] != 0).any(0) | (self.roots[1] != 0).any(0)
        return min(int(used.sum()), len(self.sigma))

    def significant(self, share: float = 1e-8) -> int:
        """How many singular values (in the Frobenius norm) are above ``share`` of ‖P‖‖ΛQ‖, and so not rounding."""
        size = self.roots[0].norm() * (self.roots[1] @ self.core).norm()
        return int((self.sigma > share * size).sum())

    def error(self, kept: int) -> float:
        """‖ΔW − ΔW_kept‖_F for the ``kept`` triplets that are largest in the metric."""
        if self.plain:
            return float(self.sigma[kept:].norm())
        return _norm(self.core - self.left[:, :kept] @ self.right[:kept], *self.roots)


def decompose(
    factors: Factors, grams: tuple[torch.Tensor, torch.Tensor] | None = None, *, exact: bool | None = None
) -> Spectrum:
    """The singular form of ``factors``, in O((d_in + d_out) r²) and float64.

    Args:
        grams: PᵀGP and QCQᵀ of a metric, (r, r) each; None for the Frobenius norm.
        exact: use Householder QR; None to use it only when needed.

    Raises:
        FloatingPointError: a factor is not finite.
    """
    diagonal = factors.diagonal()
    most = min(factors.rank, factors.P.shape[0], factors.Q.shape[1])
    if exact is None:
        exact = torch.float64 in (factors.P.dtype, factors.Q.dtype)
    roots = (root(factors.P.T, exact), root(factors.Q, exact))
    if not all(torch.isfinite(part).all() for part in (diagonal, *roots)):
        raise FloatingPointError("a factor is not finite")
    core = torch.diag(diagonal)
    norm = _norm(core, *roots)
    if not exact and norm < CANCELS * float(roots[0].norm() * (roots[1] * diagonal).norm()):
        return decompose(factors, grams, exact=True)
    weighted = roots if grams is None else tuple(_root_of(gram.double()) for gram in grams)
    if most == 0:
        empty = core.new_zeros(0)
        nothing = (empty, core.new_zeros(factors.rank, 0), core.new_zeros(0, factors.rank))
        return Spectrum(*nothing, core, norm, roots, grams is None)
    u, sigma, vh = torch.linalg.svd((weighted[0] * diagonal) @ weighted[1].T, full_matrices=False)
    u, sigma, vh = u[:, :most], sigma[:most], vh[:most]
    # a direction of size zero has no inverse: if it is kept, it is kept as zeros
    sizes = sigma.sqrt()
    inverse = torch.where(sigma > sigma[0] * 1e-14, 1 / sizes.clamp_min(1e-300), 0.0)
    left = diagonal[:, None] * (weighted[1].T @ vh.T) * inverse
    right = inverse[:, None] * (u.T @ weighted[0]) * diagonal
    # equal weights must give equal factors: the sign is the one that makes each column's largest entry positive
    sign = torch.sign(left.gather(0, left.abs().argmax(0, keepdim=True)))
    sign = torch.where(sign == 0, 1.0, sign)
    return Spectrum(sigma, left * sign, right * sign.T, core, norm, roots, grams is None)


def singular_values(factors: Factors) -> torch.Tensor:
    """The true singular values of ΔW by Householder QR, falling, (r,) in float64 on the CPU."""
    r_p, r_q = root(factors.P.T, exact=True), root(factors.Q, exact=True)
    return torch.linalg.svdvals((r_p * factors.diagonal()) @ r_q.T)


def root(rows: torch.Tensor, exact: bool = False) -> torch.Tensor:
    """R with RᵀR = rows · rowsᵀ, (r, r) in float64 (fewer rows where ``rows`` (r, d) has d < r and R is exact)."""
    rows = rows.detach().cpu().double()
    if exact:
        return torch.linalg.qr(rows.T, mode="r").R
    return _root_of(rows @ rows.T)


def _root_of(gram: torch.Tensor) -> torch.Tensor:
    lower, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        return lower.T
    if not torch.isfinite(gram).all():
        return torch.full_like(gram, torch.nan)
    values, vectors = torch.linalg.eigh(gram)  # factors of less than full rank
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def _norm(core: torch.Tensor, root_p: torch.Tensor, root_q: torch.Tensor) -> float:
    """‖P core Q‖_F from R_P and R_Q."""
    return float((root_p @ core @ root_q.T).norm())


def cut(factors: Factors, spectrum: Spectrum, kept: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_A (kept, d_in), lora_B (d_out, kept)) of the best ``kept`` triplets: their Σ^½ Vᵀ and U Σ^½.

    In a metric other than the Frobenius norm, the two sides of a triplet differ in size as inputs and gradients do,
    which half precision cannot represent and an optimizer cannot train well; they are brought into singular form again.
    """
    work = torch.promote_types(torch.float32, factors.P.dtype)
    left, right = spectrum.left[:, :kept], spectrum.right[:kept]
    if not spectrum.plain and kept:
        root_p, root_q = spectrum.roots
        u, sigma, vh = torch.linalg.svd(root_p @ left @ (right @ root_q.T))
        inverse = torch.where(sigma > sigma[0] * 1e-14, sigma.clamp_min(1e-300).rsqrt(), 0.0)[:kept]
        turn = right @ root_q.T @ vh[:kept].T * inverse
        left, right = left @ turn, (inverse[:, None] * (u[:, :kept].T @ root_p @ left)) @ right
    lora_b = factors.P.to(work) @ left.to(work)
    lora_a = right.to(work) @ factors.Q.to(work)
    return lora_a.to(dtype), lora_b.to(dtype)


def concatenate(parts: list[tuple[float, Factors]]) -> Factors:
    """Σ weight · ΔW exactly, as one product whose rank is the sum of the ranks."""
    widest = parts[0][1].P.dtype
    for _, part in parts:
        widest = torch.promote_types(widest, part.P.dtype)
    return Factors(
        torch.cat([part.P.to(widest) for _, part in parts], 1),
        torch.cat([part.Q.to(widest) for _, part in parts]),
        torch.cat([weight * part.diagonal() for weight, part in parts]),
    )


def distance(factors: Factors, lora_a: torch.Tensor, lora_b: torch.Tensor) -> float:
    """‖ΔW − lora_B lora_A‖_F, exactly: the difference is itself one low-rank product."""
    both = concatenate([(1.0, factors), (-1.0, Factors(lora_b, lora_a))])
    return _norm(torch.diag(both.diagonal()), root(both.P.T, exact=True), root(both.Q, exact=True))


def effective_rank(matrix: torch.Tensor) -> float:
    """exp(entropy of the normalised singular values) of a matrix: 1 to min(shape), and 0 for a zero matrix.

    The report has its own copy, from recorded values, because it does not import torch.
    """
    return effective_rank_of(torch.linalg.svdvals(matrix.double()))


def effective_rank_of(values: torch.Tensor) -> float:
    """exp(entropy of σ / Σσ) of singular values, (r,); 0 where all are zero."""
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return torch.exp(-(shares * shares.log()).sum()).item()


def bases(factors: Factors, cutoff: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases of ΔW's column space (d_out, k) and row space (d_in, k), k its numerical rank."""
    if not factors.rank:
        return factors.P.double(), factors.Q.double().T
    q_p, r_p = torch.linalg.qr(factors.P.double())
    q_q, r_q = torch.linalg.qr(factors.Q.double().T)
    u, sigma, vh = torch.linalg.svd((r_p * factors.diagonal()) @ r_q.T)
    rank = int((sigma > cutoff * sigma[0]).sum()) if sigma[0] > 0 else 0
    return q_p @ u[:, :rank], q_q @ vh[:rank].T


def principal_angles(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Angles in degrees, rising, between the spans of two orthonormal bases (d, k) and (d, l): (min(k, l),).

    Cosines are the singular values of oneᵀ·other (Björck and Golub, 1973). Below 45° cosines are inexact, so the angle
    is computed from the sines, the singular values of the part of one span that lies outside the other.
    """
    if one.shape[1] > other.shape[1]:
        one, other = other, one
    overlap = other.T @ one
    cosines = torch.linalg.svdvals(overlap).clamp(0, 1)
    sines = torch.linalg.svdvals(one - other @ overlap).clamp(0, 1).flip(0)
    return torch.rad2deg(torch.where(cosines > 0.7071, torch.asin(sines), torch.acos(cosines)))
