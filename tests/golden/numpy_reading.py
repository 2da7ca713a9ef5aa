"""METHODS.md read once more, in NumPy and without anything of nmsweep: scores in fp32, the rest in float64, loops where they are plainer."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rounded(x: Array, dtype: str) -> Array:
    """x rounded to a type, to nearest even, as float64."""
    if dtype == "bfloat16":
        bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return np.asarray(x).astype(dtype).astype(np.float64)


def f32(x: Array) -> Array:
    return np.asarray(x).astype(np.float32).astype(np.float64)


@dataclass
class Reading:
    """One layer; None is the absence of a stage. `eta` may be "median" or "mean"."""

    W: Array
    b: Array | None = None
    pattern: str = "2:4"
    dtype: str = "float32"
    w: Array | None = None  # [in], [1, in] or [tokens, in]
    eta: Array | str | None = None
    var: bool = False
    gamma: Array | None = None
    beta: Array | None = None
    UV: Array | None = None
    Q: Array | None = None
    threshold: float | None = None
    priority: Array | None = None

    def rotated(self, x: Array) -> Array:
        return x if self.Q is None else rounded(x @ self.Q, self.dtype)

    def center(self, x: Array) -> Array:
        """η of each token, [tokens, in]."""
        if self.eta is None:
            return np.zeros_like(x)
        if isinstance(self.eta, str):
            middle = np.sort(x, axis=1)[:, (x.shape[1] - 1) // 2] if self.eta == "median" else x.mean(axis=1)
            return np.broadcast_to(rounded(f32(middle), self.dtype)[:, None], x.shape)
        return np.broadcast_to(rounded(self.eta, self.dtype), x.shape)

    def score(self, x: Array) -> Array:
        if self.priority is not None:
            return np.broadcast_to(self.priority, x.shape)
        z = f32(x - self.center(x))
        return np.abs(z if self.w is None else f32(z * self.w))

    def mask(self, x: Array) -> NDArray[np.bool_]:
        """Of x that is rotated already: one token, one group, one channel after another."""
        s = self.score(x)
        if self.threshold is not None:
            return s >= self.threshold
        width = x.shape[1]
        if ":" in self.pattern:
            n, m = (int(part) for part in self.pattern.split(":"))
        else:
            n, m = max(1, round(width * (1 - float(self.pattern[:-1]) / 100))), width
        k = np.zeros(x.shape, bool)
        for token in range(x.shape[0]):
            for start in range(0, width, m):
                ranked = sorted(range(start, start + m), key=lambda j: (-s[token, j], j))
                k[token, ranked[:n]] = True
        return k

    def u(self, x: Array) -> tuple[Array, NDArray[np.bool_]]:
        k, eta = self.mask(x), self.center(x)
        if not self.var:
            return np.where(k, x, eta), k
        z = f32(x - eta)
        dense, sparse = z.var(axis=1, keepdims=True), np.where(k, z, 0).var(axis=1, keepdims=True)
        with np.errstate(all="ignore"):
            nu = np.where((dense == 0) | (sparse == 0), 1.0, np.sqrt(dense / sparse))
        return np.where(k, rounded(x + (nu - 1) * z, self.dtype), eta), k

    def y(self, x: Array) -> Array:
        x = self.rotated(x)
        W = self.W if self.Q is None else rounded(f32(self.W @ self.Q), self.dtype)
        u, k = self.u(x)
        y = u @ W.T
        if self.UV is not None:
            y = y + np.where(k, 0, x - self.center(x)) @ self.UV.T
        if self.gamma is not None:
            y = (1 + self.gamma) * y
        return y + (0 if self.beta is None else self.beta) + (0 if self.b is None else self.b)


def amber(W: Array, drop: bool) -> Array:
    order = np.sort(W, axis=None)
    last = W.size - 1
    low, high = order[int(np.ceil(0.005 * last))], order[int(np.floor(0.995 * last))]
    inside = (low <= W) & (high >= W)
    standard = (W - W[inside].mean()) / W[inside].std()
    return np.sqrt((np.where(inside | (not drop), standard, 0) ** 2).sum(axis=0))


def svd_product(W: Array, rank: int) -> Array:
    U, s, V = np.linalg.svd(W)
    return (U[:, :rank] * s[:rank]) @ V[:rank]


def kernel_density_peak(x: Array) -> tuple[float, float]:
    """Where the density is highest on a fine grid, and the bandwidth."""
    order = np.sort(x)
    quartile = [order[round(share * (len(x) - 1))] for share in (0.25, 0.5, 0.75)]
    h = 0.9 * (quartile[2] - quartile[0]) / 1.34 * len(x) ** -0.2
    grid = np.linspace(
        quartile[1] - 4 * (quartile[2] - quartile[0]), quartile[1] + 4 * (quartile[2] - quartile[0]), 4001
    )
    density = np.exp(-0.5 * ((grid[:, None] - x[None]) / h) ** 2).sum(axis=1)
    return float(grid[density.argmax()]), float(h)


def sparsegpt(W: Array, H: Array, n: int, m: int) -> Array:
    """Optimal brain surgeon by the inverse of what is left of H, with no Cholesky factor and no blocks."""
    W, H, width = W.copy(), H.copy(), W.shape[1]
    dead = np.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H += 0.01 * np.diag(H).mean() * np.eye(width)
    keep = np.ones(W.shape, bool)
    left = [np.linalg.inv(H[j:, j:]) for j in range(width)]
    for j in range(width):
        if j % m == 0:
            scores = np.stack([W[:, i] ** 2 / left[i][0, 0] for i in range(j, j + m)], axis=1)
            for row in range(len(W)):
                ranked = sorted(range(m), key=lambda i: (-scores[row, i], i))
                keep[row, [j + i for i in ranked[n:]]] = False
        error = np.where(keep[:, j], 0, W[:, j]) / left[j][0, 0]
        W[:, j:] -= error[:, None] * left[j][0]
        W[~keep[:, j], j] = 0
    return W
