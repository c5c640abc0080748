"""A manifest in the picture, signed with the user's key as C2PA: who vouches for how it was made.

The library salts every manifest by chance: no two signatures of the same picture are alike, whatever the key. What is
the same are its pixels.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from sdbatch.errors import OutputError
from sdbatch.outputs.provenance import SOURCE_TYPE
from sdbatch.spec import Credentials

_SETTINGS = {"builder": {"thumbnail": {"enabled": False}}}


class Signer:
    """Signs pictures. Raises OutputError when there is no library, certificate or key, or they don't fit."""

    def __init__(self, credentials: Credentials, version: str) -> None:
        try:
            import c2pa
        except ImportError:
            raise OutputError("output.c2pa: needs a library: pip install 'sdbatch[c2pa]'") from None
        self._c2pa: Any = c2pa
        self._version = version
        self._certificate = _read("output.c2pa.certificate", credentials.certificate)
        if credentials.key_env is not None:
            key = os.environ.get(credentials.key_env, "").encode()
            if not key:
                raise OutputError(f"output.c2pa.key_env: there is no {credentials.key_env} in the environment")
        else:
            key = _read("output.c2pa.key", str(credentials.key))
        self._key = key
        self._algorithm = _algorithm(self._certificate, key)
        specimen = io.BytesIO()
        Image.new("RGB", (8, 8)).save(specimen, "PNG")
        try:
            self.signed(specimen.getvalue(), "png", {"model": "", "image_id": ""})
        except c2pa.C2paError as error:
            raise OutputError(f"output.c2pa: nothing can be signed with this certificate: {error}") from None

    def signed(self, data: bytes, kind: str, row: Mapping[str, Any]) -> bytes:
        """The picture with a manifest in it that vouches for all of its bytes."""
        created = {
            "action": "c2pa.created",
            "digitalSourceType": SOURCE_TYPE,
            "softwareAgent": {"name": "sdbatch", "version": self._version},
            "description": f"drawn by {row['model']}",
        }
        manifest = {
            "claim_generator_info": [{"name": "sdbatch", "version": self._version}],
            "title": row["image_id"],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
        }
        info = self._c2pa.C2paSignerInfo(
            alg=self._algorithm, sign_cert=self._certificate, private_key=self._key, ta_url=None
        )
        signed = io.BytesIO()
        with (
            self._c2pa.Context(settings=self._c2pa.Settings.from_dict(_SETTINGS)) as context,
            self._c2pa.Builder(json.dumps(manifest), context=context) as builder,
            self._c2pa.Signer.from_info(info) as signer,
        ):
            builder.sign(signer, f"image/{kind}", io.BytesIO(data), signed)
        return signed.getvalue()


def _read(field: str, path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{field}: {path} can't be read: {error}") from None


def _algorithm(certificate: bytes, key: bytes) -> bytes:
    """The name of the key's algorithm. Raises OutputError if the certificate is not for this key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        private: Any = serialization.load_pem_private_key(key, None)
    except (TypeError, ValueError) as error:
        raise OutputError(f"output.c2pa: the key is no unencrypted PEM private key: {error}") from None
    try:
        first = x509.load_pem_x509_certificates(certificate)[0]
    except (IndexError, ValueError) as error:
        raise OutputError(f"output.c2pa.certificate: is no PEM certificate: {error}") from None
    if first.public_key() != private.public_key():
        raise OutputError("output.c2pa: the first certificate is not for this key; put the signer's own first")
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return b"ed25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return b"ps256"
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.key_size in {256, 384, 521}:
        return f"es{min(private.curve.key_size, 512)}".encode()
    raise OutputError("output.c2pa: C2PA knows keys of Ed25519, ECDSA (P-256, P-384, P-521) and RSA")
