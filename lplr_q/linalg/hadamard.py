"""Randomised Hadamard transform of any width: incoherence processing.   [QuIP# §3]

    W~ = Theta_m diag(s_out) W diag(s_in) Theta_n^T        H~ = Theta_n diag(s_in) H diag(s_in)
    Theta_n^T

leaves tr(W H W^T) unchanged and spreads outliers over all coordinates.

Glossary: ``n`` width, ``K`` order of the dense factor, ``Theta`` orthogonal n x n matrix.

Which Theta (recorded in the metadata of every compressed layer):

* ``sylvester``  n = 2^a: fast Walsh-Hadamard transform in stages of up to 32 values;
* ``paley``      n = 2^i K with a Paley matrix of order K (type I, type II, or a Kronecker product
  of two of them): the same stages and one K x K product;
* ``hartley``    every other width: the orthonormal discrete Hartley transform by FFT, whose entries
  are at most sqrt(2/n). It is a stated fallback: nothing is padded.

That is the rotation ``had``. Two others can be asked for at any width: ``fft`` is the Hartley
transform, ``kron`` the product of two dense orthogonal matrices
(:mod:`lplr_q.linalg.orthogonal`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from lplr_q.constants import on_cpu
from lplr_q.linalg.orthogonal import kron_orders, orthogonal_matrix
from workbench.errors import ConfigError, unknown_name
from workbench.integrations.kernels import fused_kernel

ROTATIONS = ("had", "kron", "fft")
"""Families of Theta: see the top of this module."""


@dataclass(frozen=True)
class HadamardPlan:
    """How a width is transformed: ``n = butterfly * order`` with a dense factor of ``order``."""

    n: int
    kind: str
    """``sylvester``, ``paley``, ``hartley`` or ``kron``."""
    butterfly: int
    """Power of two handled by butterflies."""
    order: int
    """Order K of the dense factor, 1 when there is none; the larger one of ``kron``."""

    @property
    def is_hadamard(self) -> bool:
        """Whether every entry of Theta is +-1/sqrt(n)."""
        return self.kind in ("sylvester", "paley")


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with q = p^k, p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def _paley_kind(order: int) -> str | None:
    """``I``, ``II`` or None: which Paley construction gives a Hadamard matrix of this order."""
    if order % 4:
        return None
    if (order - 1) % 4 == 3 and _prime_power(order - 1):
        return "I"
    half = order // 2 - 1
    if half % 4 == 1 and _prime_power(half):
        return "II"
    return None


def _kronecker_split(order: int) -> tuple[int, int] | None:
    """Two Paley orders whose product is ``order``, or None."""
    for left in range(4, math.isqrt(order) + 1, 4):
        if order % left == 0 and _paley_kind(left) and _paley_kind(order // left):
            return left, order // left
    return None


def _field_characters(p: int, k: int) -> Int8[Tensor, "q q"]:
    """Jacobsthal matrix Q[a, b] = chi(a - b) of GF(p^k), chi the quadratic character."""
    q = p**k
    elements = list(itertools.product(range(p), repeat=k))  # coefficients, lowest degree first
    index = {e: i for i, e in enumerate(elements)}

    def multiply(a: tuple[int, ...], b: tuple[int, ...], modulus: tuple[int, ...]) -> tuple:
        product = [0] * (2 * k - 1)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                product[i + j] += x * y
        for degree in range(2 * k - 2, k - 1, -1):  # x^k = -(modulus without its leading term)
            lead = product[degree] % p
            for j in range(k):
                product[degree - k + j] -= lead * modulus[j]
        return tuple(c % p for c in product[:k])

    def squares(modulus: tuple[int, ...]) -> set[int]:
        return {index[multiply(e, e, modulus)] for e in elements[1:]}

    # an irreducible modulus is one for which exactly half of the non-zero elements are squares
    # and no non-zero element has a zero divisor among the squares' roots
    for modulus in itertools.product(range(p), repeat=k):
        if k > 1 and not _irreducible(p, k, modulus):
            continue
        is_square = squares(modulus)
        break
    else:  # pragma: no cover - irreducible polynomials of every degree exist
        raise AssertionError("no irreducible polynomial found")
    chi = torch.full((q,), -1, dtype=torch.int8)
    chi[list(is_square)] = 1
    chi[0] = 0
    digits = torch.tensor(elements)
    weights = torch.tensor([p ** (k - 1 - i) for i in range(k)])
    difference = (digits[:, None, :] - digits[None, :, :]) % p
    return chi[(difference * weights).sum(-1)]


def _irreducible(p: int, k: int, low: tuple[int, ...]) -> bool:
    """Whether x^k + low is irreducible over GF(p), by trial division with all lower degrees."""
    poly = [*low, 1]
    for degree in range(1, k // 2 + 1):
        for tail in itertools.product(range(p), repeat=degree):
            divisor, rest = [*tail, 1], list(poly)
            for shift in range(k - degree, -1, -1):
                lead = rest[shift + degree] % p
                for j, c in enumerate(divisor):
                    rest[shift + j] = (rest[shift + j] - lead * c) % p
            if not any(c % p for c in rest[:degree]):
                return False
    return True


@lru_cache(maxsize=64)
@on_cpu
def paley_matrix(order: int) -> Int8[Tensor, "K K"]:
    """A Hadamard matrix of ``order`` (entries +-1) by Paley I, Paley II or their Kronecker product.

    I:  H = I + S, S = [[0, 1], [-1, Q]] over GF(order - 1).
    II: H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]], C = [[0, 1], [1, Q]].
    [Paley 1933]

    Raises:
        ConfigError: neither construction gives this order.
    """
    kind = _paley_kind(order)
    if kind is None:
        split = _kronecker_split(order)
        if split is None:
            raise ConfigError(f"no Paley matrix of order {order}; use hadamard_plan({order})")
        return torch.kron(paley_matrix(split[0]), paley_matrix(split[1]))
    q = order - 1 if kind == "I" else order // 2 - 1
    prime_power = _prime_power(q)
    assert prime_power is not None
    core = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    core[0, 1:] = 1
    core[1:, 0] = -1 if kind == "I" else 1
    core[1:, 1:] = _field_characters(*prime_power)
    eye = torch.eye(q + 1, dtype=torch.int8)
    if kind == "I":
        return core + eye
    a = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    b = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(core, a) + torch.kron(eye, b)


@lru_cache(maxsize=256)
def hadamard_plan(n: int) -> HadamardPlan:
    """The construction used for width ``n``: Sylvester, Paley (smallest K) or the Hartley fallback.

    >>> hadamard_plan(320)
    HadamardPlan(n=320, kind='paley', butterfly=16, order=20)
    """
    if n < 1:
        raise ConfigError(f"width {n} cannot be transformed; it must be at least 1")
    odd, two = n, 1
    while odd % 2 == 0:
        odd, two = odd // 2, two * 2
    if odd == 1:
        return HadamardPlan(n, "sylvester", n, 1)
    part = 4
    while part <= two:
        order = odd * part
        if _paley_kind(order) or _kronecker_split(order):
            return HadamardPlan(n, "paley", two // part, order)
        part *= 2
    return HadamardPlan(n, "hartley", 1, n)


@lru_cache(maxsize=256)
def rotation_plan(n: int, rotation: str = "had") -> HadamardPlan:
    """The construction for width ``n`` in one of ``ROTATIONS``.

    >>> rotation_plan(320, "kron")
    HadamardPlan(n=320, kind='kron', butterfly=1, order=20)

    Raises:
        ConfigError: unknown rotation, or a width that ``kron`` has no factors for.
    """
    if rotation not in ROTATIONS:
        raise unknown_name("rotation", rotation, ROTATIONS)
    if rotation == "kron":
        return HadamardPlan(n, "kron", 1, kron_orders(n)[1])
    plan = hadamard_plan(n)
    return plan if rotation == "had" else HadamardPlan(n, "hartley", 1, n)


@lru_cache(maxsize=64)
def _dense_factor(kind: str, order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    if kind == "kron":
        normalised = orthogonal_matrix(order)
    else:
        normalised = paley_matrix(order).double() / math.sqrt(order)
    return normalised.to(device=device, dtype=dtype)


def _butterflies(x: Tensor, width: int) -> Tensor:
    """Unnormalised Walsh-Hadamard transform over axis -2 of (..., width, K), one bit at a time.

    The readable form; :func:`_stages` computes the same sixteen or thirty-two values at a time.
    """
    shape = x.shape
    step = 1
    while step < width:
        x = x.reshape(*shape[:-2], width // (2 * step), 2, step, shape[-1])
        low, high = x.select(-3, 0), x.select(-3, 1)
        x = torch.stack((low + high, low - high), dim=-3)
        step *= 2
    return x.reshape(shape)


def radices(width: int) -> tuple[int, ...]:
    """Sizes of the stages of a transform of ``width`` = 2^a values, at most 32 each, outermost
    first.

    >>> radices(4096), radices(2048), radices(1)
    ((16, 16, 16), (8, 16, 16), ())
    """
    exponent = width.bit_length() - 1
    count = -(-exponent // 5)
    small = exponent // max(count, 1)
    larger = exponent - small * count
    return tuple(2**small for _ in range(count - larger)) + (2 ** (small + 1),) * larger


@lru_cache(maxsize=64)
def _sylvester(width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    eye = torch.eye(width, dtype=torch.float64, device="cpu")
    normalised = _butterflies(eye[..., None], width)[..., 0] / math.sqrt(width)
    return normalised.to(device=device, dtype=dtype)


@torch.library.custom_op("lplr_q::dense_factor", mutates_args=())
def _dense_operator(like: Tensor, kind: str, order: int) -> Tensor:
    """The dense factor on the device and in the type of ``like``, as one node of a graph: its
    construction over a finite field is nothing to trace."""
    return _dense_factor(kind, order, like.device, like.dtype).clone()


@_dense_operator.register_fake
def _dense_shape(like: Tensor, kind: str, order: int) -> Tensor:
    return like.new_empty(order, order)


def _factors(
    plan: HadamardPlan, x: Tensor, *, inverse: bool
) -> list[tuple[Float[Tensor, "r r"], int]]:
    """(matrix, stride) of every stage, innermost first: H_n = H_r1 (x) H_r2 (x) .. (x) P_K, or
    O_p (x) O_q."""
    found, inner = [], 1
    for order in (plan.order, plan.n // plan.order if plan.kind == "kron" else 1):
        if order == 1:
            continue
        if torch.compiler.is_compiling():
            like = torch.empty(0, device=x.device, dtype=x.dtype)
            factor = _dense_operator(like, plan.kind, order)
        else:
            factor = _dense_factor(plan.kind, order, x.device, x.dtype)
        found.append((factor.T if inverse else factor, inner))
        inner *= order
    for radix in reversed(radices(plan.butterfly)):
        found.append((_sylvester(radix, x.device, x.dtype), inner))
        inner *= radix
    return found


def _stages(x: Tensor, factors: list[tuple[Tensor, int]]) -> Tensor:
    """Transform of (rows, n): one small dense product per factor.

    Products of 16 x 16 matrices run at the speed of a dense product, and all together cost
    2 n (r1 + r2 + ..) operations instead of 2 n^2.
    """
    y = x
    for matrix, inner in factors:
        if inner == 1:
            y = y.reshape(-1, len(matrix)) @ matrix.T
        else:
            y = torch.matmul(matrix, y.reshape(-1, len(matrix), inner))
    return y.reshape(x.shape)


def _stages_in_chunks(x: Tensor, factors: list[tuple[Tensor, int]], out: Tensor | None) -> Tensor:
    """:func:`_stages` a few rows at a time, between two buffers that stay in the cache."""
    rows = max(1, CHUNK // x.shape[1])
    if out is None and (len(x) <= rows or not factors):
        return _stages(x, factors)
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    buffers = [torch.empty(rows * x.shape[1], dtype=x.dtype) for _ in range(2)]
    for low in range(0, len(x), rows):
        source = x[low : low + rows]
        for k, (matrix, inner) in enumerate(factors):
            final = out[low : low + rows].reshape(-1)
            goal = final if k == len(factors) - 1 else buffers[k % 2][: source.numel()]
            if inner == 1:
                shape = (-1, len(matrix))
                torch.mm(source.view(shape), matrix.T, out=goal.view(shape))
            else:
                shape = (-1, len(matrix), inner)
                many = source.view(shape)
                torch.bmm(matrix.expand(len(many), -1, -1), many, out=goal.view(shape))
            source = goal
    return out


def _fused_stages(x: Tensor, plan: HadamardPlan, kernel: Callable, *, inverse: bool) -> Tensor:
    """As :func:`_stages`, with the power-of-two part left to a fused kernel on the last axis."""
    scale = plan.butterfly**-0.5
    if plan.order == 1:
        return kernel(x, scale)
    factor = _dense_factor(plan.kind, plan.order, x.device, x.dtype)
    y = x.reshape(len(x), plan.butterfly, plan.order) @ (factor if inverse else factor.T)
    return kernel(y.transpose(1, 2).contiguous(), scale).transpose(1, 2).reshape(x.shape)


CHUNK = 2**19
"""Values transformed together on the CPU: the working set stays in the cache."""
FUSED_LIMIT = 2**15
"""Largest power of two the fused kernel takes."""


def _by_device(x: Tensor, plan: HadamardPlan, out: Tensor | None, *, inverse: bool) -> Tensor:
    """Transform of (rows, n) by the form that suits the device."""
    compiling = torch.compiler.is_compiling()
    if x.is_cuda and not compiling and 1 < plan.butterfly <= FUSED_LIMIT:
        kernel, _ = fused_kernel("hadamard")
        if kernel is not None and x.dtype == torch.float32:
            return _fused_stages(x, plan, kernel, inverse=inverse)
    factors = _factors(plan, x, inverse=inverse)
    tracked = torch.is_grad_enabled() and x.requires_grad
    if x.device.type == "cpu" and not compiling and not tracked:
        return _stages_in_chunks(x, factors, out)
    return _stages(x, factors)


def hadamard_transform(
    x: Float[Tensor, "*batch n"],
    *,
    inverse: bool = False,
    rotation: str = "had",
    out: Float[Tensor, "*batch n"] | None = None,
) -> Float[Tensor, "*batch n"]:
    """Theta x over the last axis (Theta^T x with ``inverse``), orthonormal, in O(n log n + n K).

    Half precision is computed in float32 and returned in its own type; gradients flow. ``out``
    (same shape and type, contiguous, not ``x`` itself) receives the result without new memory.
    """
    plan = rotation_plan(x.shape[-1], rotation)
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if plan.kind == "hartley":  # cas transform: symmetric and its own inverse
        spectrum = torch.fft.fft(x, norm="ortho")
        y = (spectrum.real - spectrum.imag).to(dtype)
        return y if out is None else out.copy_(y)
    direct = out is not None and out.dtype == x.dtype and out.is_contiguous()
    place = out.view(-1, plan.n) if out is not None and direct else None
    y = _by_device(x.reshape(-1, plan.n), plan, place, inverse=inverse)
    y = y.reshape(x.shape).to(dtype)
    if out is None or y.data_ptr() == out.data_ptr():
        return y
    return out.copy_(y)


def dense_hadamard(n: int, dtype: torch.dtype = torch.float64) -> Float[Tensor, "n n"]:
    """Theta as a matrix, for tests and for widths up to a few hundred."""
    return hadamard_transform(torch.eye(n, dtype=dtype)).T.contiguous()


def random_signs(n: int, generator: torch.Generator) -> Int8[Tensor, " n"]:
    """n fair +-1 signs."""
    return (torch.randint(0, 2, (n,), generator=generator) * 2 - 1).to(torch.int8)


def rotate_rows(
    x: Float[Tensor, "*batch n"], signs: Int8[Tensor, " n"], rotation: str = "had"
) -> Float[Tensor, "*batch n"]:
    """Theta (s * x) for each vector x along the last axis."""
    return hadamard_transform(x * signs.to(device=x.device, dtype=x.dtype), rotation=rotation)


def unrotate_rows(
    y: Float[Tensor, "*batch n"], signs: Int8[Tensor, " n"], rotation: str = "had"
) -> Float[Tensor, "*batch n"]:
    """s * (Theta^T y): undoes :func:`rotate_rows`."""
    x = hadamard_transform(y, inverse=True, rotation=rotation)
    return x * signs.to(device=y.device, dtype=y.dtype)


def rotate_weight(
    weight: Float[Tensor, "m n"],
    signs_out: Int8[Tensor, " m"],
    signs_in: Int8[Tensor, " n"],
    rotation: str = "had",
) -> Float[Tensor, "m n"]:
    """W~ = Theta_m diag(s_out) W diag(s_in) Theta_n^T."""
    half = rotate_rows(weight, signs_in, rotation)
    return rotate_rows(half.T, signs_out, rotation).T.contiguous()


def rotate_weight_(
    weight: Float[Tensor, "m n"],
    signs_out: Int8[Tensor, " m"],
    signs_in: Int8[Tensor, " n"],
    rotation: str = "had",
) -> None:
    """:func:`rotate_weight` in the memory of ``weight``, a few rows and then columns at a time."""
    for matrix, signs in ((weight, signs_in), (weight.T, signs_out)):
        for part in matrix.split(max(1, CHUNK // 4 // len(signs))):
            part.copy_(rotate_rows(part, signs, rotation))


def unrotate_weight(
    weight: Float[Tensor, "m n"],
    signs_out: Int8[Tensor, " m"],
    signs_in: Int8[Tensor, " n"],
    rotation: str = "had",
) -> Float[Tensor, "m n"]:
    """Inverse of :func:`rotate_weight`."""
    half = unrotate_rows(weight, signs_in, rotation)
    return unrotate_rows(half.T, signs_out, rotation).T.contiguous()


def require_hadamard(n: int, rotation: str = "had") -> None:
    """Raise ConfigError when width ``n`` would take the Hartley fallback, or another rotation is
    wanted at the same time."""
    plan = hadamard_plan(n)
    if rotation != "had":
        raise ConfigError(
            f"rotation {rotation} and a strict Hadamard matrix exclude each other; drop one"
        )
    if not plan.is_hadamard:
        raise ConfigError(
            f"no Hadamard matrix of order {n} is constructed here (Sylvester, Paley and their "
            "Kronecker products); drop the strict setting to use the Hartley transform"
        )


def rotate_hessian(
    hessian: Float[Tensor, "n n"], signs_in: Int8[Tensor, " n"], *, strict: bool = False
) -> Float[Tensor, "n n"]:
    """H~ = Theta diag(s_in) H diag(s_in) Theta^T; ``strict`` refuses the Hartley fallback."""
    if strict:
        require_hadamard(len(signs_in))
    return rotate_weight(hessian, signs_in, signs_in)
