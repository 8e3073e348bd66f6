"""Secret noise and sampling: one 256-bit key per curator, one stream per (purpose, entry, step).

The key of a stream is HMAC-SHA256(key, kind, purpose, entry, step and shapes), and its words are
AES-256 in counter mode. General-purpose generators are not secure: torch's CPU generator keeps 32
bits of its seed, so that its streams collide and can be guessed, and the state of a Mersenne
twister can be computed from its output.
"""

import contextlib
import functools
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perdure.errors import ConfigError, PrivacyError
from perdure.privacy.noise.ahead import DrawAhead
from perdure.privacy.noise.gaussian import PIECE, add_rounded_gaussian
from perdure.privacy.noise.table import Integers, gaussian_table
from perdure.utils.atomic_files import writing

Draw = tuple[str, str, int, str, int, float]
"""Purpose, entry, step, nonce, number of integers and scale, which determine a draw of noise."""
KEY_BYTES = 32
BLOCK_BYTES = 16


class NoiseKey:
    """Secret key from which one curator draws all its noise and coins.

    Coins are the secret random numbers that decide which records enter a step.

    Guarantee: without the 256 bits of the key, the streams cannot be told from independent uniform
    bits (AES-256 and HMAC-SHA256 as pseudo-random functions). A key made by
    `NoiseKey.from_seed(seed, name, ...)` comes from a seed that is not secret and guarantees
    nothing: its noise is a simulation, not private.

    >>> key = NoiseKey.from_seed(0, "client 3")
    >>> key, key.simulated
    (NoiseKey(simulated), True)
    >>> total = torch.zeros(4, dtype=torch.int64)
    >>> key.add_noise(total, 2.0**20, purpose="gradient", entry="e0", step=0)
    >>> total.dtype
    torch.int64

    Args:
        secret: the key, 32 bytes.
        simulated: True if the key comes from a seed.

    Raises:
        PrivacyError: if the key does not have 32 bytes.
    """

    __slots__ = ("_ahead", "_secret", "simulated")

    def __init__(self, secret: bytes, *, simulated: bool) -> None:
        if len(secret) != KEY_BYTES:
            raise PrivacyError(
                f"a noise key has {KEY_BYTES} bytes, but {len(secret)} were given; restore the "
                "file of the key from a backup"
            )
        self._secret = secret
        self._ahead: dict[str, DrawAhead] = {}
        self.simulated = simulated

    @classmethod
    def unused(cls) -> "NoiseKey":
        """Return a random key that is stored nowhere, for a process that draws no noise."""
        return cls(secrets.token_bytes(KEY_BYTES), simulated=False)

    @classmethod
    def from_os(cls, path: Path) -> "NoiseKey":
        """Read the key at `path`, or create one and store it there with mode 0600.

        A new key comes from the random generator of the operating system.

        Raises:
            PrivacyError: if others may read the file, or if it does not contain a key.
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
        """Derive a key for a simulation from a public seed and names, such as the client's.

        Noise from this key is not private.

        Raises:
            ConfigError: if a part is neither a string nor a number.
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
            "a NoiseKey cannot be pickled or copied; open its file with NoiseKey.from_os instead"
        )

    def mac(self, message: bytes) -> str:
        """HMAC-SHA256 of `message` in hexadecimal, under a subkey that no stream uses."""
        return hmac.new(subkey(self._secret, "mac"), message, hashlib.sha256).hexdigest()

    def chain(self, purpose: str) -> Callable[[bytes], str]:
        """Return a function for HMAC-SHA256 in hexadecimal, under a subkey for `purpose`."""
        own = subkey(self._secret, "chain", purpose)
        return lambda message: hmac.digest(own, message, "sha256").hex()

    def tag(self, place: str, exact: npt.NDArray[np.int64]) -> str:
        """Poly1305 tag of an exact sum, under a separate key for every `place` (a step's name).

        A tag is stored next to the key and is never released. Equal sums have equal tags, and
        different sums have different tags.
        """
        from cryptography.hazmat.primitives.poly1305 import Poly1305

        own = subkey(self._secret, "tag of a sum", place)
        return Poly1305.generate_tag(own, exact.view(np.uint8).data).hex()

    def add_noise(
        self, total: Tensor, scale: float, *, purpose: str, entry: str, step: int, nonce: str = ""
    ) -> None:
        """Add independent integer noise to `total` (n,) int64 on the CPU, in place.

        The noise has the distribution of a rounded Gaussian of standard deviation `scale` (see
        `perdure.privacy.noise.table`). It is drawn with integer operations only, so the leak of
        floating-point noise (Mironov 2012) cannot occur. The same arguments add the same noise; a
        change of any of them, n included, gives an independent stream.

        Args:
            total: sums in units of a public grid.
            scale: standard deviation in the same units, 64 to 2^39.
            purpose: use of the noise ("gradient", "release:fisher").
            entry: digest of the ledger entry that charged it.
            step: step of the run.
            nonce: identifies the attempt at this step, if it may be executed again.
        """
        context = (purpose, entry, step, nonce, len(total), scale)
        drawn = self._ahead[purpose].take(context) if purpose in self._ahead else None
        if drawn is None:
            self._draw(context, total.numpy())
        else:
            total += torch.from_numpy(drawn)

    def draw_ahead(
        self, numbers: int, scale: float, *, purpose: str, entry: str, step: int, nonce: str = ""
    ) -> None:
        """Begin to draw, on another thread, the noise for the next call of `add_noise`.

        The result does not change: `add_noise` with the same arguments and `numbers` sums uses this
        draw, and any other call draws its own noise. There is one such draw per purpose, and only
        for at least `perdure.privacy.noise.ahead.AHEAD_FROM` numbers.

        Args:
            numbers: number of sums that will get noise.
            scale: standard deviation of the noise, in grid steps.
            purpose: use of the random numbers, such as "gradient".
            entry: digest of the ledger entry that charged their use.
            step: step of the run.
            nonce: identifies the attempt at this step, if it may be executed again.
        """
        context = (purpose, entry, step, nonce, numbers, scale)
        ahead = self._ahead.setdefault(purpose, DrawAhead())
        ahead.begin(context, numbers, functools.partial(self._draw, context))

    def _draw(self, context: Draw, total: Integers) -> None:
        first = subkey(self._secret, "integers", *context)
        further = subkey(self._secret, "further integers", *context)
        add_rounded_gaussian(
            total,
            gaussian_table(context[-1]),
            keystream_reader(first, 8 * min(len(total), PIECE)),
            _block_reader(further),
        )

    def uniform(self, n: int, *, purpose: str, entry: str, step: int, nonce: str = "") -> Tensor:
        """Return (n,) float64 uniform in [0, 1), for Poisson sampling or a selection.

        Each number has 53 random bits. Poisson sampling has no nonce; the noise of a selection has.

        Args:
            n: number of values.
            purpose: use of the random numbers, such as "gradient".
            entry: digest of the ledger entry that charged their use.
            step: step of the run.
            nonce: identifies the attempt at this step, if it may be executed again.
        """
        own = subkey(self._secret, "uniform", purpose, entry, step, n, *_given(nonce))
        words = keystream(own, 8 * n).view("<u8")
        return _unit_interval(words)

    def coins(self, records: Tensor, *, entry: str, step: int) -> Tensor:
        """Return (n,) float64 uniform in [0, 1): the number that decides if a record enters a step.

        Args:
            records: (n, 2) id of each record, and number of the partition that owns it; an audit
                uses them to give a record the same number in two runs.
            entry: digest of the ledger entry that charged the step.
            step: step of the run.
        """
        return self.uniform(len(records), purpose="coins", entry=entry, step=step)

    def tags(self, ids: Tensor, purpose: str) -> Tensor:
        """Return (n,) float64 uniform in [0, 1), one fixed number per record.

        Each number depends only on the record's id (int64) and on `purpose`.

        A record keeps its number in every data set, so a membership that is decided by number <
        threshold never depends on another record.
        """
        blocks = np.zeros((len(ids), BLOCK_BYTES // 8), dtype="<i8")
        blocks[:, 0] = ids.detach().cpu().numpy()
        return _unit_interval(_block_reader(subkey(self._secret, "tags", purpose))(blocks)[::2])

    def stream(
        self, *, purpose: str, entry: str, step: int, nonce: str = ""
    ) -> Callable[[int], bytes]:
        """Return a function from a number n to n fresh uniform random bytes.

        The stream has no end; it is for samplers that reject draws.

        Args:
            purpose: use of the random numbers, such as "gradient".
            entry: digest of the ledger entry that charged their use.
            step: step of the run.
            nonce: identifies the attempt at this step, if it may be executed again.
        """
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        key = subkey(self._secret, "bytes", purpose, entry, step, *_given(nonce))
        cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(BLOCK_BYTES))).encryptor()
        return lambda n: cipher.update(bytes(n))


def _given(nonce: str) -> tuple[str, ...]:
    return (nonce,) if nonce else ()


def subkey(secret: bytes, *context: object) -> bytes:
    """Key of one stream: HMAC-SHA256 of its context with the secret key."""
    return hmac.new(secret, _encode("perdure", *context), hashlib.sha256).digest()


def _encode(*parts: object) -> bytes:
    """Encode parts as JSON, which keeps their borders: ("ab", "c") and ("a", "bc") differ."""
    return json.dumps(parts, separators=(",", ":"), allow_nan=False).encode()


def _create(path: Path, secret: bytes) -> None:
    """Write a complete key to `path`, or none; if another process was faster, its key stays.

    Raises:
        StorageError: if the file cannot be written.
    """
    with writing(path):
        _create_whole(path, secret)


def _create_whole(path: Path, secret: bytes) -> None:
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
    """Return the first bytes of AES-256 in counter mode."""
    return keystream_reader(key, n_bytes)(n_bytes)


def keystream_reader(key: bytes, most: int) -> Callable[[int], npt.NDArray[np.uint8]]:
    """Return a reader of AES-256 in counter mode, which starts at counter 0.

    Each key is used for one stream only.

    Returns:
        A function that reads the next bytes, at most `most` at a time; its result is valid until
        the next call.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(BLOCK_BYTES))).encryptor()
    zeros = _zeros(most)
    # the cipher needs space for one more block
    out = np.empty(most + BLOCK_BYTES - 1, dtype=np.uint8)

    def read(n_bytes: int) -> npt.NDArray[np.uint8]:
        cipher.update_into(zeros[:n_bytes], out.data)
        return out[:n_bytes]

    return read


@functools.lru_cache(maxsize=4)
def _zeros(count: int) -> memoryview:
    return memoryview(bytes(count))


def _block_reader(key: bytes) -> Callable[[npt.NDArray[Any]], npt.NDArray[np.uint64]]:
    """Return a function that encrypts 16-byte blocks with AES-256: numbers (n, 2) to words (2n,).

    Equal numbers must give equal words here, so the mode is ECB.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305
    return lambda numbers: np.frombuffer(cipher.update(numbers.tobytes()), dtype="<u8")


def _unit_interval(words: npt.NDArray[np.uint64]) -> Tensor:
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def noise_key(folder: Path | None, seed: int | None, client: int) -> NoiseKey:
    """Return the secret key of this curator, or a simulated key from the user's seed.

    Args:
        folder: folder of the run; the key is stored in its `private/` folder.
        seed: seed of a simulation; None for secret noise.
        client: number of the party, so that each party has its own simulated key.

    Raises:
        PrivacyError: if the noise is secret and there is no folder.
    """
    if seed is not None:
        return NoiseKey.from_seed(seed, "client", client)
    if folder is None:
        raise PrivacyError(
            "secret noise needs a folder for its key and ledger; give Learner(folder=...), or "
            "Privacy(seed=...) for a simulation"
        )
    return NoiseKey.from_os(folder / "private" / "key")
