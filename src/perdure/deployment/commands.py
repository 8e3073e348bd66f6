"""Commands that start Flower's SuperLink and SuperNode, and the settings of its client `flwr`.

Commands are lists of words, which no shell reads.
"""

import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from perdure.deployment.keys import AUTHORITY, CERTIFICATE, SERVER_KEY
from perdure.errors import ConfigError, FederationError, PerdureError
from perdure.experiment.overrides import toml_text, toml_value
from perdure.utils.atomic_files import write_atomically


def superlink_command(
    certificates: Path | str, *, host: str, port: int, database: Path | str
) -> list[str]:
    """Return the command that starts a SuperLink with TLS, which accepts registered nodes only.

    Args:
        certificates: folder of `make_certificates`.
        host: address on which the SuperLink listens; 0.0.0.0 for all.
        port: port on which it listens.
        database: file in which it keeps registered nodes and unfinished runs.

    Raises:
        FederationError: if a certificate is missing.
    """
    place = Path(certificates).resolve()
    for name in (AUTHORITY, CERTIFICATE, SERVER_KEY):
        if not (place / name).is_file():
            raise FederationError(
                f"{place / name} is missing; run scripts/make_certificates.py HOST on this machine"
            )
    return [
        _program("flower-superlink"),
        *("--ssl-ca-certfile", str(place / AUTHORITY)),
        *("--ssl-certfile", str(place / CERTIFICATE)),
        *("--ssl-keyfile", str(place / SERVER_KEY)),
        "--enable-supernode-auth",
        # the sites' software is installed by their administrators, never by a submitted app
        "--disable-runtime-dependency-installation",
        *("--database", str(Path(database).resolve())),
        *("--host", host),
        *("--port", str(port)),
    ]


def supernode_command(
    address: str,
    *,
    authority: Path | str,
    key: Path | str,
    partition: int,
    partitions: int,
    state: Path | str,
    data: Path | str | None = None,
    port: int = 9094,
) -> list[str]:
    """Return the command that starts a SuperNode with TLS and its own key.

    Args:
        address: host:port of the SuperLink.
        authority: the server's ca.crt.
        key: private key of `make_node_key`.
        partition: number of this site's client.
        partitions: number of clients of the federation.
        state: folder for the client's state.
        data: folder of the site's data; None for the usual places.
        port: port on this machine for the SuperNode's own processes; different for each SuperNode
            of a machine.
    """
    settings: dict[str, object] = {"partition-id": partition, "num-partitions": partitions}
    settings["state"] = str(Path(state).resolve())
    if data is not None:
        settings["data"] = str(Path(data).resolve())
    words = [f"{name}={toml_value(value)}" for name, value in settings.items()]
    return [
        _program("flower-supernode"),
        *("--superlink", address),
        *("--root-certificates", str(Path(authority).resolve())),
        *("--auth-supernode-private-key", str(Path(key).resolve())),
        *("--port", str(port)),
        *("--node-config", " ".join(words)),
    ]


def flower_settings(folder: Path | str, *, name: str, address: str, authority: Path | str) -> Path:
    """Write the settings with which `flwr` finds the SuperLink, and return their folder.

    Args:
        folder: folder for Flower's settings; give it to `start`, or as FLWR_HOME to `flwr`.
        name: name of the federation, as in `flwr run . NAME`.
        address: host:port of the SuperLink.
        authority: the server's ca.crt.
    """
    place = Path(folder)
    own = {"address": address, "root-certificates": str(Path(authority).resolve())}
    text = toml_text({"superlink": {"default": name, name: own}})
    write_atomically(place / "config.toml", text.encode())
    return place


def start(command: Sequence[str], *, flower_home: Path | str) -> NoReturn:
    """Replace this process by a command of Flower.

    Args:
        command: program and its arguments.
        flower_home: folder for Flower's settings and installed apps.

    Raises:
        FederationError: if the program cannot be started.
    """
    try:
        os.execve(command[0], list(command), environment(flower_home))  # noqa: S606
    except OSError as error:
        raise FederationError(
            f"{command[0]} cannot be started ({error.strerror}); install perdure with flwr on this "
            "machine"
        ) from error


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Context manager that ends a script with one line where perdure refuses.

    Args:
        program: name of the script, with which the line begins.
    """
    try:
        yield
    except PerdureError as error:
        sys.exit(f"{program}: {error}")


def check_port(host: str, port: int) -> None:
    """Refuse a port that another program uses, or that this user may not open.

    Args:
        host: address on which a program is to listen.
        port: its port.

    Raises:
        ConfigError: names the port, and the reason.
    """
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        allowed = f"a free port of {host} ({getattr(error, 'strerror', None) or error})"
        raise ConfigError.of("port", port, allowed) from None


def environment(flower_home: Path | str) -> Mapping[str, str]:
    """Return this process's environment, for a command of Flower.

    Flower starts further programs by their names, so the folder of this Python comes first in PATH.
    No usage reports are sent, unless the user's environment asks for them.
    """
    here = str(Path(sys.executable).parent)
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        **os.environ,
        "FLWR_HOME": str(Path(flower_home).resolve()),
        "PATH": os.pathsep.join([here, os.environ.get("PATH", "")]),
    }


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))
