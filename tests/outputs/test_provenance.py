"""What pictures say of how they were made, read back by programs that know nothing of sdbatch."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sd_parsers import ParserManager
from sd_parsers.data import PromptInfo

from sdbatch.outputs import encode
from sdbatch.outputs.provenance import xmp
from sdbatch.spec import Picture
from tests.outputs.test_outputs import JOB, pixels, row
from tests.programs import needs

KINDS = ("png", "jpeg", "webp")


def read_by_exiftool(data: bytes, folder: Path) -> dict[str, Any]:
    path = folder / "picture"
    path.write_bytes(data)
    command = ["exiftool", "-json", "-G1", "-struct", "-charset", "utf8", str(path)]
    (told,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return dict(told)


def read_by_a_parser(data: bytes) -> PromptInfo:
    found = ParserManager().parse(Image.open(io.BytesIO(data)))
    assert found is not None
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_reproducible_and_carries_the_source_type(kind: str) -> None:
    form = Picture(type=kind, quality=80)
    data = encode(pixels(), form, row(), JOB)
    assert data == encode(pixels(), form, row(), JOB)
    opened = Image.open(io.BytesIO(data))
    assert (opened.format, opened.size) == (kind.upper(), (16, 8))
    assert b"trainedAlgorithmicMedia" in data


def test_lossless_webp_keeps_every_pixel_and_what_made_it() -> None:
    form = Picture(type="webp", lossless=True)
    data = encode(pixels(), form, row(), JOB)
    assert data == encode(pixels(), form, row(), JOB)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels())
    lossy = np.asarray(Image.open(io.BytesIO(encode(pixels(), Picture(type="webp"), row(), JOB))))
    assert not np.array_equal(lossy, pixels())
    assert b"trainedAlgorithmicMedia" in data
    assert read_by_a_parser(data).full_prompt == read_by_a_parser(encode(pixels(), Picture(), row(), JOB)).full_prompt


@pytest.mark.parametrize("kind", KINDS)
def test_exiftool_reads_the_iptc_terms(kind: str, tmp_path: Path) -> None:
    needs("exiftool")
    told = read_by_exiftool(encode(pixels(), Picture(type=kind), row(), JOB), tmp_path)
    assert told["XMP-iptcExt:DigitalSourceType"] == (
        "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    )
    assert told["XMP-iptcExt:AISystemUsed"] == "builtin:shapes"
    assert told["XMP-iptcExt:AISystemVersionUsed"] == f"sha256:{'ab' * 32}"
    assert told["XMP-iptcExt:AIPromptInformation"] == f"{row()['prompt']}\nNegative prompt: blur"
    assert told["XMP-dc:Description"] == row()["prompt"]
    assert told["XMP-sdbatch:JobFingerprint"] == JOB
    assert told["XMP-sdbatch:ImageID"] == row()["image_id"]
    assert int(told["XMP-sdbatch:Seed"]) == row()["seed"]
    assert "Warning" not in json.dumps(told)


@pytest.mark.parametrize("kind", ["png", "jpeg"])  # the parser knows no others
def test_a_parser_of_image_uis_reads_the_parameters(kind: str) -> None:
    given = row(sampler="dpmpp_2m_sde_karras", init_image="a.png", prompt="line one,\nline two: 日本")
    found = read_by_a_parser(encode(pixels(), Picture(type=kind), given, JOB))
    (sampler,) = found.samplers
    assert [prompt.value for prompt in sampler.prompts] == [given["prompt"]]
    assert [prompt.value for prompt in sampler.negative_prompts] == ["blur"]
    assert sampler.name == "DPM++ 2M SDE"
    assert sampler.parameters == {"scheduler": "Karras", "cfg_scale": "4.5", "seed": str(2**53 - 1), "steps": "20"}
    assert sampler.model is not None
    assert (sampler.model.name, sampler.model.hash) == ("shapes", "ababababab")
    assert found.metadata == {"Size": "16x8", "Denoising strength": "0.5"}


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_the_same_text_in_every_format(kind: str) -> None:
    opened = Image.open(io.BytesIO(encode(pixels(), Picture(type=kind), row(), JOB)))
    text = opened.info.get("parameters")
    if text is None:
        text = opened.getexif().get_ifd(0x8769)[0x9286].removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert text.split("\n") == [
        row()["prompt"],
        "Negative prompt: blur",
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 4.5, Seed: 9007199254740991, Size: 16x8, "
        "Model hash: ababababab, Model: shapes",
    ]


@given(st.text(st.characters(), max_size=40))
@example("a\ud800b\0c\x0bd\re]]>")
@settings(max_examples=100)
def test_any_prompt_makes_well_formed_xmp_and_a_picture(prompt: str) -> None:
    """Control characters and lone surrogates, too."""
    ElementTree.fromstring(xmp(row(prompt=prompt), JOB))
    for kind in KINDS:
        Image.open(io.BytesIO(encode(pixels(), Picture(type=kind), row(prompt=prompt), JOB))).load()
