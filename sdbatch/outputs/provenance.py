"""What a picture says of how it was made: parameters for image UIs, XMP for everybody else.

XMP uses the terms of the IPTC Photo Metadata Standard 2025.1, and terms of our own for what it has none for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any
from xml.sax.saxutils import escape, unescape

#: https://cv.iptc.org/newscodes/digitalsourcetype/
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

_NAMESPACES = {
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "sdbatch": "urn:sdbatch:xmp:1.0/",
}
#: What no XML 1.0 document may hold, not even escaped.
_NO_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
#: What no text of a picture may hold: an end mark, and halves of characters.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")

#: Samplers under the names that image UIs know.
_UI_SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
_CHECKED = "sdbatch:Checks"
_SCHEDULES = ("_karras", "_exponential")


def parameters(row: Mapping[str, Any]) -> str:
    """Generation parameters in the lines that image UIs write and read back."""
    sampler, schedule = str(row["sampler"]), {}
    if sampler.endswith(_SCHEDULES):
        sampler, _, levels = sampler.rpartition("_")
        schedule["Schedule type"] = levels.capitalize()
    settings = {
        "Steps": row["num_inference_steps"],
        "Sampler": _UI_SAMPLERS.get(sampler, sampler),
        **schedule,
        "CFG scale": f"{row['guidance_scale']:g}",
        "Seed": row["seed"],
        "Size": f"{row['width']}x{row['height']}",
        "Model hash": str(row["model_sha256"])[:10],
        "Model": str(row["model"]).removeprefix("builtin:"),  # simple readers trip over a colon
    }
    if row["init_image"]:
        settings["Denoising strength"] = f"{row['strength']:g}"
    last = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items())
    return _NO_TEXT.sub("�", "\n".join([*_prompts(row), last]))


def xmp(row: Mapping[str, Any], fingerprint: str, checked: Collection[str] = ()) -> str:
    """An XMP packet: the IPTC digital source type, model, prompts, and what else leads back to the job.

    ``checked``: columns of the row that checks filled in; ``read_checked`` reads them back.
    """
    told = {
        "Iptc4xmpExt:DigitalSourceType": SOURCE_TYPE,
        "Iptc4xmpExt:AISystemUsed": row["model"],
        "Iptc4xmpExt:AISystemVersionUsed": f"sha256:{row['model_sha256']}",
        "Iptc4xmpExt:AIPromptInformation": "\n".join(_prompts(row)),
        "xmp:CreatorTool": "sdbatch",
        "sdbatch:JobFingerprint": fingerprint,
        "sdbatch:ImageID": row["image_id"],
        "sdbatch:Seed": row["seed"],
    }
    if checked:
        told[_CHECKED] = json.dumps({name: row[name] for name in ("seed", *checked)})
    elements = "".join(f"<{name}>{_xml(str(value))}</{name}>" for name, value in told.items())
    prompt = f'<rdf:Alt><rdf:li xml:lang="x-default">{_xml(row["prompt"])}</rdf:li></rdf:Alt>'
    known = " ".join(f'xmlns:{prefix}="{uri}"' for prefix, uri in _NAMESPACES.items())
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" {known}>{elements}<dc:description>{prompt}</dc:description>'
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
    )


def read_checked(packet: str, checked: Collection[str]) -> dict[str, Any] | None:
    """From an XMP packet the seed and the columns that checks filled in; None unless it tells all of them."""
    found = re.search(f"<{_CHECKED}>(.*?)</{_CHECKED}>", packet, re.DOTALL)
    try:
        told = json.loads(unescape(found[1], {"&#13;": "\r"})) if found else None
    except ValueError:
        return None
    return told if isinstance(told, dict) and told.keys() == {"seed", *checked} else None


def _prompts(row: Mapping[str, Any]) -> list[str]:
    prompt = str(row["prompt"])
    return [prompt, f"Negative prompt: {row['negative_prompt']}"] if row["negative_prompt"] else [prompt]


def _quoted(value: str) -> str:
    """As image UIs write a value that holds what separates values."""
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def _xml(text: str) -> str:
    return escape(_NO_XML.sub("�", text), {"\r": "&#13;"})
