"""Trial sign-in of a SuperNode at a SuperLink, with its key, before the SuperNode is started.

It uses private parts of Flower 1.41, as `perdure.federated.flower_adapter` does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from perdure.errors import FederationError

if TYPE_CHECKING:
    from flwr.supernode.fleet_http_client import FleetHttpClient


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer of a SuperLink to a trial sign-in.

    Args:
        node: number of the key's node at the SuperLink; None if it is not known.
        refusal: reason of a refusal; "" if the key is accepted.
        connected: True if the key is refused because its last SuperNode counts as connected.
    """

    node: int | None
    refusal: str = ""
    connected: bool = False


def sign_in(
    address: str,
    authority: bytes,
    private_key: bytes,
    *,
    timeout: float,
    node: int | None = None,
) -> Answer:
    """Sign in to a SuperLink with the key of a SuperNode, and sign out again.

    Args:
        address: host:port of the SuperLink.
        authority: certificate of the server's authority, PEM.
        private_key: private key of the SuperNode, in OpenSSH's form.
        timeout: seconds to wait for an answer.
        node: number of the node in an earlier answer for this key. With it, a key whose SuperNode
            counts as connected is told from one that is not registered.

    Raises:
        FederationError: if the key cannot be used, or there is no answer; with the reason alone.
    """
    import httpx
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
    from flwr.proto.node_pb2 import Node
    from flwr.proto.run_pb2 import GetRunRequest
    from flwr.supercore.error import FlowerError

    with _client(address, authority, private_key) as (client, own):
        try:
            request = ActivateNodeRequest(public_key=own, heartbeat_interval=timeout)
            answer = client.ActivateNode(request)
            client.DeactivateNode(DeactivateNodeRequest(node_id=answer.node_id))
            return Answer(node=answer.node_id)
        except httpx.HTTPStatusError as error:
            told = FlowerError.from_json(error.response.text)
            refusal = told.message if told else f"status {error.response.status_code}"
        except httpx.TransportError as error:
            raise FederationError(f"no answer: {error!r}") from None
        if node is None:
            return Answer(node=None, refusal=refusal)
        try:  # the request itself is refused, too, but later where the key belongs to the node
            client.GetRun(GetRunRequest(node=Node(node_id=node), run_id=0))
            connected = True
        except httpx.HTTPStatusError as error:
            connected = error.response.status_code != HTTPStatus.UNAUTHORIZED
        except httpx.TransportError as error:
            raise FederationError(f"no answer: {error!r}") from None
    return Answer(node=node if connected else None, refusal=refusal, connected=connected)


@contextmanager
def _client(
    address: str, authority: bytes, private_key: bytes
) -> Iterator[tuple["FleetHttpClient", bytes]]:
    """Context manager for a client of the SuperLink, and the public key with which it signs."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    try:
        key = load_ssh_private_key(private_key, None)
    except ValueError as error:
        raise FederationError(f"it is no private key in OpenSSH's form: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FederationError("it is no key of an elliptic curve")
    interceptors: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(key, key.public_key()),
    ]
    client = FleetHttpClient.from_server_address(address, False, authority, interceptors)
    with client:
        yield client, public_key_to_bytes(key.public_key())
