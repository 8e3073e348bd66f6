"""Stored released answers, so that a release that is repeated after a restart is not drawn again.

After a restart the run asks for the last releases again. If an answer were computed again and
compared with the exact earlier one, the ledger would show without noise if the two are equal. So
the stored release is returned unchanged, even if the query would give another result now. If it is
not stored, the release is charged again.
"""

import hmac
from pathlib import Path

import torch

from perdure.privacy.noise.key import NoiseKey
from perdure.types import Tensors
from perdure.utils.atomic_files import save_tensors, writing
from perdure.utils.hashing import digest

MAC = " mac"
"""Name of the MAC in a file of released tensors, none of whose names begins with a space."""
KEEP = 2
"""Number of experiences whose answers are kept; a resume never goes back to earlier ones."""


class Answers:
    """Store of released answers, each with its ledger entry and a MAC, to be returned again.

    A simulation stores nothing, because it draws the same noise again.

    Args:
        folder: folder for the answers, usually `private/answers`; None keeps them in memory.
        key: noise key of the curator, which also signs the answers.
    """

    def __init__(self, folder: Path | None, key: NoiseKey) -> None:
        self._folder = folder
        self._key = key
        self._here: dict[str, Tensors] = {}

    def find(self, entry: str) -> dict[str, torch.Tensor] | None:
        """Return the stored answer of a release; None if it is missing or damaged.

        Args:
            entry: digest of the ledger entry that charged the release.
        """
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
        """Store an answer on the disk, and drop answers of experiences long ago.

        Args:
            entry: digest of the ledger entry that charged the release.
            answer: the released tensors.
            experience: index of the experience that asked for the answer.
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
                with writing(old):
                    old.unlink()

    def _mac(self, entry: str, answer: Tensors) -> bytes:
        message = f"answer to {entry} ".encode() + digest(answer)
        return bytes.fromhex(self._key.mac(message))
