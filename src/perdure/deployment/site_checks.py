"""Checks of a site before its SuperNode starts: address, TLS, key, and folders.

Flower tries again for ever, without a word, where a certificate is wrong.
"""

import logging
import socket
import ssl
import time
from pathlib import Path

from perdure.errors import FederationError
from perdure.federated.node_sign_in import Answer, sign_in
from perdure.utils.atomic_files import write_atomically

TIMEOUT = 10.0
PAUSE = 5.0
"""Seconds to wait for an answer, and between two trials of a key."""
log = logging.getLogger(__name__)


def check_site(
    address: str,
    *,
    authority: Path | str,
    key: Path | str,
    timeout: float = TIMEOUT,
    patience: float = 0.0,
) -> None:
    """Try the connection of a SuperNode, as this site and with its key.

    The SuperNode must not run, because the SuperLink accepts each key once. A SuperNode that was
    killed counts as connected for about a minute. The number of this site at the server is kept in
    the file KEY.id, and tells this case from a key that the server does not know.

    Args:
        address: host:port of the SuperLink.
        authority: the server's ca.crt.
        key: private key of the site, as `make_node_key` makes it.
        timeout: seconds to wait for an answer.
        patience: seconds to wait while the site's last SuperNode counts as connected.

    Raises:
        FederationError: names the wrong part, and the remedy.
    """
    trusted = _read(authority, "the server's ca.crt")
    private = _read(key, "the private key of this site")
    check_superlink(address, authority=authority, timeout=timeout)
    place = Path(f"{key}.id")
    end = time.monotonic() + patience
    while True:
        try:
            answer = sign_in(address, trusted, private, timeout=timeout, node=_known(place))
        except FederationError as error:
            raise FederationError(f"{address} refuses the key {key} ({error})") from None
        if not answer.refusal:
            write_atomically(place, str(answer.node).encode())
            return
        if not answer.connected or time.monotonic() >= end:
            raise FederationError(_refused(address, key, answer))
        log.warning(
            "%s counts the last SuperNode of this site as connected; waiting up to %.0f seconds",
            address,
            end - time.monotonic(),
        )
        time.sleep(PAUSE)


def _refused(address: str, key: Path | str, answer: Answer) -> str:
    """Return the error for a key that the SuperLink does not accept."""
    fix = (
        "stop the SuperNode that runs with this key, or try again when it was stopped a minute ago"
        if answer.connected
        else f"send {key}.pub to the administrator of the server, who registers it, and start no "
        "second SuperNode with this key"
    )
    return f"{address} refuses the key {key} ({answer.refusal}); {fix}"


def _known(place: Path) -> int | None:
    """Return the number of this site at the server, from an earlier check; None without one."""
    try:
        return int(place.read_text())
    except (OSError, ValueError):
        return None


def check_superlink(
    address: str, *, authority: Path | str | None, timeout: float = TIMEOUT
) -> None:
    """Try to connect to a SuperLink with TLS.

    Args:
        address: host:port of the SuperLink.
        authority: the server's ca.crt; None for a connection in plain text.
        timeout: seconds to wait for an answer.

    Raises:
        FederationError: names the wrong part, and the remedy.
    """
    host, port = _parts(address)
    try:
        context = ssl.create_default_context(cafile=authority)
    except (ssl.SSLError, OSError) as error:
        raise FederationError(
            f"{authority} is no certificate ({getattr(error, 'reason', None) or error}); get the "
            "newest ca.crt from the server"
        ) from None
    if authority is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), timeout=timeout) as plain:
            _shake_hands(context, plain, host)
    except ssl.SSLCertVerificationError as error:
        raise FederationError(
            f"the certificate of {address} does not fit {authority} ({error.verify_message}); get "
            "the newest ca.crt from the server, and use a name that its certificate has"
        ) from None
    except (ssl.SSLError, ConnectionResetError) as error:
        if authority is None:
            return
        raise FederationError(
            f"{address} does not answer with TLS ({getattr(error, 'reason', error)}); start the "
            "SuperLink with its certificates"
        ) from None
    except OSError as error:
        raise FederationError(
            f"no connection to {address} within {timeout:g} seconds ({error}); start the "
            "SuperLink, and open the port in the firewalls of both sides"
        ) from None
    if authority is None:
        raise FederationError(
            f"{address} accepts TLS only, and this connection is in plain text; give the server's "
            "ca.crt"
        )


def _shake_hands(context: ssl.SSLContext, plain: socket.socket, host: str) -> None:
    with context.wrap_socket(plain, server_hostname=host):
        pass


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise FederationError(f"address = {address!r} is not allowed; allowed: HOST:PORT")
    return host.strip("[]"), int(port)


def _read(path: Path | str, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FederationError(
            f"{path} cannot be read ({error.strerror}); allowed: {name}"
        ) from None
