"""Journal of the private tasks that a server has sent, written before each is sent.

A client that lost its ledger may have charged any task that was sent to it since its last reply.
The server's checkpoint knows only exchanges that have ended; a server that was killed in one finds
it here.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from perdure.errors import RunError
from perdure.privacy.ledger.storage import canonical_json
from perdure.utils.atomic_files import writing

FILE = "sent.jsonl"
"""File in the folder of a run, one line for the tasks of an exchange."""


class SentTasks:
    """Tasks that were sent to private clients: exchanges, in order, by client.

    Args:
        folder: folder of the run; None to keep them in memory.
        least: number of lines that the file must have, from a checkpoint.

    Raises:
        RunError: if the file has fewer lines, or cannot be read.
    """

    def __init__(self, folder: Path | None, least: int = 0) -> None:
        self._path = folder / FILE if folder else None
        self._tasks: dict[int, list[tuple[int, bool]]] = {}
        self.lines = 0
        try:
            for line in self._complete_lines():
                self._note(line)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise RunError(
                f"{self._path} is damaged ({error!r}); restore it from the newest backup"
            ) from error
        if self.lines < least:
            raise RunError(
                f"{self._path} has {self.lines} lines, but the checkpoint of the run knows of "
                f"{least}; without them, charges of a lost ledger would not be counted; restore "
                "the file from the newest backup"
            )

    def add(self, exchange: int, clients: Sequence[int], *, anew: bool = False) -> None:
        """Write that a task is about to be sent; nothing for no clients.

        Args:
            exchange: number of the exchange.
            clients: clients that get the task.
            anew: True if they are told to begin a new ledger, because they answered their last task
                with an error and did not begin it.
        """
        if not clients:
            return
        line = canonical_json({"exchange": exchange, "clients": list(clients), "anew": int(anew)})
        if self._path:
            with writing(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("ab") as file:
                    file.write(line.encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
        self._note(line)

    def after(self, client: int, exchange: int) -> list[tuple[int, bool]]:
        """Return the tasks of a client after an exchange, without the present one.

        Returns:
            Number of the exchange of each task, and True if a new ledger was to begin with it.
        """
        return [task for task in self._tasks.get(client, [])[:-1] if task[0] > exchange]

    def settle(self, client: int, exchange: int) -> None:
        """Forget a client's tasks up to an exchange, because the client's account has them."""
        tasks = self._tasks.get(client, [])
        self._tasks[client] = [task for task in tasks if task[0] > exchange]

    def _note(self, line: str) -> None:
        facts = json.loads(line)
        anew = bool(facts["anew"])
        for client in facts["clients"]:
            tasks = self._tasks.setdefault(client, [])
            if anew:
                tasks.pop()
            tasks.append((facts["exchange"], anew))
        self.lines += 1

    def _complete_lines(self) -> list[str]:
        """Read the lines of the file; a line that was not written completely was never sent."""
        if self._path is None or not self._path.exists():
            return []
        data = self._path.read_bytes()
        whole, _, rest = data.rpartition(b"\n")
        if rest:
            with writing(self._path), self._path.open("r+b") as file:
                file.truncate(len(data) - len(rest))
        return whole.decode().splitlines()
