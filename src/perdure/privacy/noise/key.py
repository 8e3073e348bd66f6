"""Secret noise and coins: one 256-bit key per curator, one keystream per (purpose, entry, step).

A stream's key is HMAC-SHA256(key, kind, purpose, entry, step and shapes); its words are AES-256 in
counter mode. General-purpose generators would not do: torch's CPU generator keeps 32 bits of its
seed, so that its streams collide and can be guessed, and the state of a Mersenne twister can be
solved for from its output.
"""

import contextlib
import hashlib
import hmac
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perdure.errors import ConfigError, PrivacyError

KEY_BYTES = 32
BLOCK_BYTES = 16
DRAWN_AT_ONCE = 2**16
"""Normals, an even number, drawn at a time: they stay in the processor's cache.

The values drawn depend on it.
"""


class NoiseKey:
    """The secret from which one curator draws all its noise and coins.

    Guarantee: to whoever lacks the 256 bits, the streams look like independent uniform bits
    (AES-256 and HMAC-SHA256 as pseudo-random functions). A key made by
    `NoiseKey.from_seed(seed, name, ...)` comes from a seed that anyone may know and guarantees
    nothing: what is drawn from it is a simulation, not a release.

    >>> key = NoiseKey.from_seed(0, "client 3")
    >>> key, key.simulated
    (NoiseKey(simulated), True)
    >>> key.normal({"weight": (2, 3)}, purpose="gradient", entry="e0", step=0)["weight"].shape
    torch.Size([2, 3])
    """

    __slots__ = ("_secret", "simulated")

    def __init__(self, secret: bytes, *, simulated: bool) -> None:
        if len(secret) != KEY_BYTES:
            raise PrivacyError(
                f"a noise key has {KEY_BYTES} bytes, given {len(secret)}; restore the key's file"
            )
        self._secret = secret
        self.simulated = simulated

    @classmethod
    def from_os(cls, path: Path) -> "NoiseKey":
        """Read the key at `path`, or draw one and store it there with mode 0600.

        It is drawn from the operating system.

        Raises:
            PrivacyError: when others may read the file, or when it is not a key.
        """
        if not path.exists():
            _create(path, secrets.token_bytes(KEY_BYTES))
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise PrivacyError(
                f"key file {path} has mode {mode:04o}, allowed: 0600; run chmod 600 {path}"
            )
        return cls(path.read_bytes(), simulated=False)

    @classmethod
    def from_seed(cls, *parts: object) -> "NoiseKey":
        """Derive a key from a seed that anyone may know and from names, such as the client's.

        A simulation.

        Raises:
            ConfigError: for parts that are neither strings nor numbers.
        """
        if not all(isinstance(part, str | int | float) for part in parts):
            raise ConfigError.of("NoiseKey.from_seed", parts, "strings and numbers")
        return cls(
            hashlib.sha256(_encode("perdure simulated key", *parts)).digest(), simulated=True
        )

    def __repr__(self) -> str:
        return "NoiseKey(simulated)" if self.simulated else "NoiseKey(secret)"

    def __reduce__(self) -> NoReturn:
        raise PrivacyError(
            "a NoiseKey is not pickled or copied; open its file with NoiseKey.from_os instead"
        )

    def mac(self, message: bytes) -> str:
        """HMAC-SHA256 of `message` in hexadecimal, under a subkey that no stream shares."""
        return hmac.new(subkey(self._secret, "mac"), message, hashlib.sha256).hexdigest()

    def normal(
        self,
        shapes: Mapping[str, Sequence[int]],
        *,
        purpose: str,
        entry: str,
        step: int,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Independent standard normals, one float32 tensor for each name in `shapes`.

        z = sqrt(-2 ln u) (cos t, sin t)
        u = (w + 1) / 2^32,   t = 2 pi w' / 2^32   (w, w' 32-bit words)

        The tail is cut at |z| <= sqrt(64 ln 2) = 6.66 (two-sided mass 3e-11 beyond it), and values
        lie on the grid of float32: the noise is that of the textbook up to floating point (Mironov
        2012 says what that leaves open). The same arguments give the same values; a change of any
        of them, shapes and their order included, gives an independent stream.

        Args:
            shapes: name to shape.
            purpose: what the noise is for ("gradient", "release:fisher").
            entry: digest of the ledger entry that pays for it.
            step: step of the run.
            device: where the tensors are put; they are always drawn on the CPU.

        Source: Box and Muller 1958.
        """
        layout = [[name, *shape] for name, shape in shapes.items()]
        sizes = list(map(math.prod, shapes.values()))
        flat = _normals(
            subkey(self._secret, "normal", purpose, entry, step, layout), sum(sizes)
        ).to(device)
        parts = zip(shapes.items(), torch.split(flat, sizes), strict=True)
        return {name: part.view(tuple(shape)) for (name, shape), part in parts}

    def uniform(self, n: int, *, purpose: str, entry: str, step: int) -> Tensor:
        """(n,) float64 uniform in [0, 1): the coins of a Poisson sample.

        Each has 53 random bits.
        """
        words = keystream(subkey(self._secret, "uniform", purpose, entry, step, n), 8 * n).view(
            "<u8"
        )
        return _unit_interval(words)

    def tags(self, ids: Tensor, purpose: str) -> Tensor:
        """(n,) float64 uniform in [0, 1), by record.

        It is a function of each record's id (int64) and of `purpose` alone.

        A record keeps its tag whatever else is in the data set, so that a membership decided by
        tag < threshold never depends on another record.
        """
        blocks = np.zeros((len(ids), BLOCK_BYTES // 8), dtype="<i8")
        blocks[:, 0] = ids.detach().cpu().numpy()
        return _unit_interval(
            _permute(subkey(self._secret, "tags", purpose), blocks.tobytes()).view("<u8")[::2]
        )

    def stream(self, *, purpose: str, entry: str, step: int) -> Callable[[int], bytes]:
        """Hand out uniform random bytes, so many at every call.

        A stream without end, for samplers that reject.
        """
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        key = subkey(self._secret, "bytes", purpose, entry, step)
        cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(BLOCK_BYTES))).encryptor()
        return lambda n: cipher.update(bytes(n))


def subkey(secret: bytes, *context: object) -> bytes:
    """Key of one stream: HMAC-SHA256 of its context under the secret."""
    return hmac.new(secret, _encode("perdure", *context), hashlib.sha256).digest()


def _encode(*parts: object) -> bytes:
    """JSON keeps the borders between parts: ("ab", "c") and ("a", "bc") differ."""
    return json.dumps(parts, separators=(",", ":"), allow_nan=False).encode()


def _create(path: Path, secret: bytes) -> None:
    """Put a whole key at `path` or none; when another process was faster, its key stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def keystream(key: bytes, n_bytes: int) -> npt.NDArray[np.uint8]:
    """First bytes of AES-256 in counter mode."""
    return keystream_reader(key, n_bytes)(n_bytes)


def keystream_reader(key: bytes, most: int) -> Callable[[int], npt.NDArray[np.uint8]]:
    """AES-256 in counter mode; each key is used for one stream only, so the counter starts at zero.

    Returns:
        A function that reads on, at most `most` bytes at a time; what it gives is good until the
        next call.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(BLOCK_BYTES))).encryptor()
    zeros = memoryview(bytes(most))
    # the cipher asks for room for a block more
    out = np.empty(most + BLOCK_BYTES - 1, dtype=np.uint8)

    def read(n_bytes: int) -> npt.NDArray[np.uint8]:
        cipher.update_into(zeros[:n_bytes], out.data)
        return out[:n_bytes]

    return read


def _permute(key: bytes, blocks: bytes) -> npt.NDArray[np.uint8]:
    """AES-256 of each 16-byte block by itself.

    Here equal ids must give equal tags, which ECB does.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305
    return np.frombuffer(cipher.update(blocks), dtype=np.uint8)


def _unit_interval(words: npt.NDArray[np.uint64]) -> Tensor:
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _normals(key: bytes, n: int) -> Tensor:
    """(n,) float32 standard normals (see `NoiseKey.normal`).

    By NumPy, whose logarithm, sine and cosine are three times as fast as torch's on the processor.
    """
    even = n + n % 2
    numbers = np.empty(even, dtype=np.float32)
    read = keystream_reader(key, 4 * min(even, DRAWN_AT_ONCE))
    for start in range(0, even, DRAWN_AT_ONCE):
        piece = numbers[start : start + DRAWN_AT_ONCE]
        # unsigned, since small u, the tail, needs the full precision of the words
        piece[:] = read(4 * len(piece)).view("<u4")
        # Box and Muller, in place: half of the words are u, half are t
        u, t = np.split(piece, 2)
        u += np.float32(1.0)
        u *= np.float32(2.0**-32)
        np.log(u, out=u)
        u *= np.float32(-2.0)
        np.sqrt(u, out=u)
        t *= np.float32(2.0 * math.pi * 2.0**-32)
        cosine = np.cos(t)
        np.sin(t, out=t)
        t *= u
        u *= cosine
    return torch.from_numpy(numbers)[:n]


def noise_key(folder: Path | None, seed: int | None, client: int) -> NoiseKey:
    """Secret key of this curator, or a simulated one from the seed that the user chose."""
    if seed is not None:
        return NoiseKey.from_seed(seed, "client", client)
    if folder is None:
        raise PrivacyError(
            "secret noise needs a folder to keep its key and ledger in; give "
            "Learner(folder=...), or "
            "Privacy(seed=...) for a simulation"
        )
    return NoiseKey.from_os(folder / "private" / "key")
