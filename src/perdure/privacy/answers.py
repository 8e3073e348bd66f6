"""Released answers that are kept, so that a release which is asked for again is not drawn again.

After a restart a release is asked for a second time. Were it computed and compared with the exact
answer of before, the ledger would say whether the two are equal, without noise. So what was
released is handed out again as it is, whatever its question would give now; where it is not there,
the release is charged again.
"""

import hmac
from pathlib import Path

import torch

from perdure.privacy.noise.key import NoiseKey
from perdure.types import Tensors
from perdure.utils.atomic_files import save_tensors
from perdure.utils.hashing import digest

MAC = " mac"
"""Name of the MAC among the tensors of a file; no answer has a space in front of its name."""
KEEP = 2
"""Experiences whose answers are kept: a resume goes no further back than its last checkpoints."""


class Answers:
    """Released answers by the entry that paid for them, each with a MAC.

    A simulation keeps none: it draws the same noise again.

    Args:
        folder: by custom `private/answers`; None keeps the answers in memory.
        key: of the curator.
    """

    def __init__(self, folder: Path | None, key: NoiseKey) -> None:
        self._folder = folder
        self._key = key
        self._here: dict[str, Tensors] = {}

    def find(self, entry: str) -> dict[str, torch.Tensor] | None:
        """Return the answer that an entry paid for; None where it is not there, or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self._folder is None:
            found = self._here.get(entry)
            return None if found is None else {n: value.clone() for n, value in found.items()}
        for path in self._folder.glob(f"*-{entry}.safetensors"):
            try:
                answer = load_file(path)
            except (OSError, SafetensorError):
                continue
            mac = bytes(answer.pop(MAC, torch.zeros(0, dtype=torch.uint8)).tolist())
            if hmac.compare_digest(mac, self._mac(entry, answer)):
                return answer
        return None

    def keep(self, entry: str, answer: Tensors, *, experience: int) -> None:
        """Store an answer, through to the disk, and drop answers of long past experiences.

        Args:
            entry: digest of the entry that paid for it.
            answer: what is released.
            experience: in which it was asked for.
        """
        if self._key.simulated:
            return
        if self._folder is None:
            self._here[entry] = {name: value.clone() for name, value in answer.items()}
            return
        mac = torch.tensor(list(self._mac(entry, answer)), dtype=torch.uint8)
        path = self._folder / f"{experience:06d}-{entry}.safetensors"
        save_tensors(path, {**answer, MAC: mac}, private=True)
        for old in self._folder.glob("[0-9]*-*.safetensors"):
            if int(old.name.split("-")[0]) <= experience - KEEP:
                old.unlink()

    def _mac(self, entry: str, answer: Tensors) -> bytes:
        message = f"answer to {entry} ".encode() + digest(answer)
        return bytes.fromhex(self._key.mac(message))
