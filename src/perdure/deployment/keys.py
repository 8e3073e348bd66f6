"""Certificates of a SuperLink for TLS, and keys of the sites' SuperNodes."""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from perdure.errors import ConfigError
from perdure.utils.atomic_files import write_atomically

AUTHORITY = "ca.crt"
CERTIFICATE = "server.pem"
SERVER_KEY = "server.key"
"""Files of `make_certificates`; only the first one is for the sites."""
LOOPBACK = ("localhost", "127.0.0.1")
"""Names that every certificate has, because the SuperLink's own processes connect to these."""
DAYS = 365


def make_certificates(folder: Path | str, hosts: Sequence[str], *, days: int = DAYS) -> Path:
    """Make a certificate authority of one server, and the server's certificate and key.

    The key of the authority is not stored, so nobody can sign further certificates with it; make
    new files before the certificate ends.

    Args:
        folder: folder for ca.crt (for all sites), server.pem and server.key (for the server only);
            it is closed to other users.
        hosts: names and addresses under which sites connect to the server.
        days: number of days until the certificates end.

    Returns:
        Path of ca.crt.

    Raises:
        ConfigError: if the folder has a key already, or the number of days is not positive.
        StorageError: if the files cannot be written.
    """
    place = Path(folder)
    _refuse_to_replace(place / SERVER_KEY)
    if days < 1:
        raise ConfigError.of("days", days, "a whole number from 1")
    signer = ec.generate_private_key(ec.SECP384R1())
    key = ec.generate_private_key(ec.SECP384R1())
    issuer = _named("perdure federation authority")
    authority = (
        _begun(issuer, issuer, signer.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA384())
    )
    names = list(dict.fromkeys([*hosts, *LOOPBACK]))
    certificate = (
        _begun(_named(names[0][:64]), issuer, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(list(map(_general, names))), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomically(place / SERVER_KEY, private, private=True)
    write_atomically(place / CERTIFICATE, certificate.public_bytes(pem))
    write_atomically(place / AUTHORITY, authority.public_bytes(pem))
    return place / AUTHORITY


def make_node_key(path: Path | str) -> Path:
    """Make the private key of a SuperNode, and its public key beside it.

    Args:
        path: file for the private key, such as site/keys/node; it stays on the site. Its folder is
            closed to other users.

    Returns:
        Path of the public key, such as site/keys/node.pub, which the server registers.

    Raises:
        ConfigError: if the file exists.
        StorageError: if the files cannot be written.
    """
    own = Path(path)
    _refuse_to_replace(own)
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    write_atomically(own, private, private=True)
    beside = own.with_name(f"{own.name}.pub")
    write_atomically(beside, public + b"\n")
    return beside


def check_public_key(path: Path | str) -> None:
    """Refuse a file that is not the public key of a site.

    Args:
        path: file that a site has sent, as `make_node_key` makes it.

    Raises:
        ConfigError: names the file, and the right one.
    """
    try:
        key = serialization.load_ssh_public_key(Path(path).read_bytes())
        if isinstance(key, ec.EllipticCurvePublicKey):
            return
        reason = "it is no key of an elliptic curve"
    except OSError as error:
        reason = str(error.strerror)
    except (ValueError, UnsupportedAlgorithm):
        reason = "it is no public key in OpenSSH's form"
    allowed = f"site/keys/node.pub of a site, which scripts/make_node_key.py makes ({reason})"
    raise ConfigError.of("key", str(path), allowed)


def _refuse_to_replace(path: Path) -> None:
    if path.exists():
        raise ConfigError.of(
            "key", str(path), "a file that does not exist; delete it first to make a new key"
        )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # an hour early, because clocks of sites differ
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        allowed = f"names and addresses of the server, in ASCII ({error})"
        raise ConfigError.of("hosts", host, allowed) from None
