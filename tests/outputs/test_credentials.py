"""Pictures signed as C2PA with a chain of certificates made here, read back by the library's own reader."""

from __future__ import annotations

import datetime
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import c2pa
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

from sdbatch.engine.making.shards import ShardCommitter
from sdbatch.errors import OutputError, SpecError
from sdbatch.outputs import Signer, checked_columns, encode, pixels_sum
from sdbatch.spec import Credentials, Picture, parse_spec
from sdbatch.storage import LocalStore
from tests.conftest import CommandLine
from tests.ledger.planned import Planned
from tests.outputs.test_outputs import JOB, pixels, row

KEYS: dict[str, Callable[[], Any]] = {
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "Es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "Ps256": lambda: rsa.generate_private_key(65537, 2048),
}


def pem_of(key: Any) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def usage(**yes: bool) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
    )
    return x509.KeyUsage(**dict.fromkeys([*names.split(), "encipher_only", "decipher_only"], False) | yes)


def certificate(name: str, key: Any, issuer: str, issuer_key: Any, *, ends: int = 2045) -> bytes:
    """One certificate: an authority's if it is its own issuer, else a signer's."""
    authority, public, issuing = name == issuer, key.public_key(), issuer_key.public_key()
    built = x509.CertificateBuilder(
        x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, issuer), x509.NameAttribute(NameOID.COMMON_NAME, issuer)]
        ),
        x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name), x509.NameAttribute(NameOID.COMMON_NAME, name)]),
        public,
        1 + authority,
        datetime.datetime(2020, 1, 1),
        datetime.datetime(ends, 1, 1),
    )
    built = built.add_extension(x509.BasicConstraints(authority, None), True)
    built = built.add_extension(usage(key_cert_sign=True) if authority else usage(digital_signature=True), True)
    built = built.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
    built = built.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuing), False)
    if not authority:
        built = built.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), True)
    digest = None if isinstance(issuer_key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return built.sign(issuer_key, digest).public_bytes(serialization.Encoding.PEM)


def credentials(folder: Path, kind: str = "Ed25519", **options: int) -> Credentials:
    authority, key = KEYS[kind](), KEYS[kind]()
    chain = certificate("Studio", key, "Root", authority, **options) + certificate("Root", authority, "Root", authority)
    (folder / "chain.pem").write_bytes(chain)
    (folder / "key.pem").write_bytes(pem_of(key))
    return Credentials(certificate=str(folder / "chain.pem"), key=str(folder / "key.pem"))


def read(data: bytes, kind: str) -> dict[str, Any]:
    with c2pa.Reader(f"image/{kind}", io.BytesIO(data)) as reader:
        return dict(json.loads(reader.json()))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_librarys_reader_finds_a_valid_manifest(kind: str, tmp_path: Path) -> None:
    plain = encode(pixels(), Picture(type=kind), row(), JOB)
    signed = Signer(credentials(tmp_path), "1.2.3").signed(plain, kind, row())
    told = read(signed, kind)
    assert told["validation_state"] == "Valid"
    (manifest,) = told["manifests"].values()
    assert manifest["signature_info"]["issuer"] == "Studio"
    assert manifest["claim_generator_info"][0]["name"] == "sdbatch"
    assert manifest["title"] == row()["image_id"]
    (action,) = manifest["assertions"][0]["data"]["actions"]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert action["softwareAgent"] == {"name": "sdbatch", "version": "1.2.3"}
    assert pixels_sum(signed) == pixels_sum(plain)
    assert len(signed) - len(plain) < 20_000
    opened = Image.open(io.BytesIO(signed))
    assert b"trainedAlgorithmicMedia" in signed
    assert ("parameters" in opened.info) if kind == "png" else (0x8769 in opened.getexif())


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_what_checks_found_is_read_back_from_a_picture_signed_or_not(kind: str, tmp_path: Path) -> None:
    found = {
        "failed_checks": "",
        "clip_score": 0.25,
        "duplicate_of": 'a <b> & "c" \x01 ü',
        "seeds_tried": [1, 2**63 - 1],
    }
    told = {**row(), **found}
    plain = encode(pixels(), Picture(type=kind), told, JOB, tuple(found))
    signed = Signer(credentials(tmp_path), "1.2.3").signed(plain, kind, told)
    for data in (plain, signed):
        assert checked_columns(data, tuple(found)) == {"seed": told["seed"], **found}
        assert checked_columns(data, ("failed_checks",)) is None  # another job's
    assert checked_columns(encode(pixels(), Picture(type=kind), row(), JOB), tuple(found)) is None
    assert checked_columns(plain[:40], tuple(found)) is None


def test_one_altered_byte_is_found(tmp_path: Path) -> None:
    plain = encode(pixels(), Picture(), row(), JOB)
    signed = bytearray(Signer(credentials(tmp_path), "1").signed(plain, "png", row()))
    signed[signed.rindex(b"IDAT") + 10] ^= 1
    assert read(bytes(signed), "png")["validation_state"] == "Invalid"


def test_renditions_are_signed_as_the_pictures_are(tmp_path: Path) -> None:
    planned = Planned(LocalStore(tmp_path / "out"), renditions={"small": {"size": "6x6"}}, thumbnail=16)
    signer = Signer(credentials(tmp_path), "1")
    planned.committer = ShardCommitter(planned.store, planned.spec, planned.job, {}, signer)
    planned.commit(0)
    for key, kind in (
        ("renditions/small/0000000/00000-00000000-0.png", "png"),
        ("thumbnails/0000000/00000-00000000-0.webp", "webp"),
    ):
        assert read(planned.store.get(key), kind)["validation_state"] == "Valid"


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_every_kind_sign(kind: str, tmp_path: Path) -> None:
    signed = Signer(credentials(tmp_path, kind), "1").signed(encode(pixels(), Picture(), row(), JOB), "png", row())
    (manifest,) = read(signed, "png")["manifests"].values()
    assert manifest["signature_info"]["alg"] == kind


def test_the_key_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_file = credentials(tmp_path)
    by_name = Credentials(certificate=from_file.certificate, key_env="SIGNING_KEY")
    monkeypatch.delenv("SIGNING_KEY", raising=False)
    with pytest.raises(OutputError, match=r"output\.c2pa\.key_env: there is no SIGNING_KEY"):
        Signer(by_name, "1")
    monkeypatch.setenv("SIGNING_KEY", Path(str(from_file.key)).read_text())
    Signer(by_name, "1")


def test_what_cannot_sign_is_told_before_any_work(tmp_path: Path) -> None:
    fine = credentials(tmp_path)
    other = tmp_path / "other.pem"
    for content, told in (
        (b"", "no unencrypted PEM private key"),
        (pem_of(ed25519.Ed25519PrivateKey.generate()), "not for this key"),
        (pem_of(ec.generate_private_key(ec.SECP256K1())), "not for this key"),
    ):
        other.write_bytes(content)
        with pytest.raises(OutputError, match=told):
            Signer(Credentials(certificate=fine.certificate, key=str(other)), "1")
    with pytest.raises(OutputError, match=r"output\.c2pa\.key: .*gone\.pem can't be read"):
        Signer(Credentials(certificate=fine.certificate, key=str(tmp_path / "gone.pem")), "1")
    with pytest.raises(OutputError, match=r"output\.c2pa\.certificate: is no PEM certificate"):
        Signer(Credentials(certificate=str(fine.key), key=fine.key), "1")
    with pytest.raises(OutputError, match="nothing can be signed"):
        Signer(credentials(tmp_path, ends=2021), "1")


@pytest.mark.parametrize("given", [{}, {"key": "a", "key_env": "B"}, {"key_env": "not a name"}])
def test_one_key_is_named(given: dict[str, str]) -> None:
    with pytest.raises(SpecError, match=r"output\.c2pa"):
        parse_spec({"name": "a", "input": {"uri": "a"}, "output": {"uri": "b", "c2pa": {"certificate": "c", **given}}})


def test_a_signed_job_is_verified_to_the_pixel(
    sdbatch: CommandLine, write_job: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "prompts.csv").write_text("prompt\na red circle\na blue ring\n")
    signing = credentials(tmp_path).model_dump()
    job = write_job(model={"uri": "builtin:null"}, output={"c2pa": signing})
    assert sdbatch.json("run", job)["committed"] == 2
    made = sorted((tmp_path / "out/data").rglob("*.png"))
    assert [read(path.read_bytes(), "png")["validation_state"] for path in made] == ["Valid", "Valid"]
    verdict = sdbatch.json("verify", "out", "--recompute", "2")
    assert (verdict["ok"], verdict["recomputed"]) == (True, 2)
    assert "have the same pixels" in sdbatch("verify", "out", "--recompute", "1").stderr
    changed = sdbatch("run", job, "--set", "output.c2pa=null", code=2).stderr
    assert "output.c2pa" in changed
    assert (
        sdbatch("run", job, "--set", f"output.c2pa.key={tmp_path}/gone.pem", code=2).stderr.count("can't be read") == 1
    )
