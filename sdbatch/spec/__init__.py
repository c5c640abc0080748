"""The job spec: what a person writes to have pictures made. One file a section."""

from sdbatch.spec.checks import Checks
from sdbatch.spec.generate import Generate, SamplerName
from sdbatch.spec.input import MAPPABLE, METADATA_COLUMNS, Input
from sdbatch.spec.job import JobSpec, load_spec, overridden, parse_spec
from sdbatch.spec.matrix import MATRIX_FIELDS, combinations, words_of
from sdbatch.spec.model import LearntWord, Lora, Model
from sdbatch.spec.notify import Notify
from sdbatch.spec.output import Credentials, Output, Picture, Rendition
from sdbatch.spec.prompt import Prompt
from sdbatch.spec.resources import Failures, Resources
from sdbatch.spec.variables import literal, today

__all__ = [
    "MAPPABLE",
    "MATRIX_FIELDS",
    "METADATA_COLUMNS",
    "Checks",
    "Credentials",
    "Failures",
    "Generate",
    "Input",
    "JobSpec",
    "LearntWord",
    "Lora",
    "Model",
    "Notify",
    "Output",
    "Picture",
    "Prompt",
    "Rendition",
    "Resources",
    "SamplerName",
    "combinations",
    "literal",
    "load_spec",
    "overridden",
    "parse_spec",
    "today",
    "words_of",
]
