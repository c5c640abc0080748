"""The checkpoint, and what is added to it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdbatch.spec.section import Section, Uri


class Lora(Section):
    """Low-rank changes to the model's weights."""

    uri: Uri = Field(description="A .safetensors file, local or s3://")
    weight: float = Field(1.0, allow_inf_nan=False, description="How strongly; several add up")


class LearntWord(Section):
    """A textual inversion: vectors that a word of the prompt stands for."""

    uri: Uri = Field(description="A .safetensors file, local or s3://")
    token: str | None = Field(None, min_length=1, description="The word; what the file calls it when left out")


class Model(Section):
    """The checkpoint that makes the pictures."""

    uri: Uri = Field(
        "builtin:shapes",
        description="builtin:shapes, builtin:null (no network), hf:OWNER/NAME[@REVISION][/FILE], or a folder in the "
        "diffusers layout or a single .safetensors file, local or s3://",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "float32",
        description="Number format of the weights, left out: float32 on the CPU, float16 on GPUs; auto: what is "
        "fastest where the job is planned, decided in the plan",
    )
    fp8: bool = Field(
        False,
        description="Linear layers of the U-Net's transformers in float8: faster on GPUs of compute capability 8.9 and "
        "later, other pictures; see 'sdbatch bench --gate'",
    )
    compile: bool = Field(
        False, description="Compile the networks' blocks, once for all actors: other last bits, slow first batches"
    )
    tokenizer: Uri | None = Field(
        None, description="A folder with vocab.json and merges.txt, for single files, which bring none"
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="What the network predicts, where the checkpoint can't tell or is wrong"
    )
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = Field(
        None, description="How steps are spread over the time steps, where the checkpoint can't tell or is wrong"
    )
    loras: list[Lora] = Field(default_factory=list, description="LoRAs to merge into the weights")
    embeddings: list[LearntWord] = Field(default_factory=list, description="Textual inversions")
    vae_tiling: bool = Field(False, description="Decode large pictures tile by tile: less memory, soft seams")
    vae_slicing: bool = Field(False, description="Decode a batch picture by picture: less memory")
    offload_text_encoders: bool = Field(False, description="Keep text encoders on the GPU only while they encode")

    @property
    def computing(self) -> str:
        """What its arithmetic is done in, in words."""
        return self.dtype + " float8" * self.fp8 + " compiled" * self.compile

    @property
    def name(self) -> str:
        """What results call the model: wherever its folder lies, the same."""
        return self.uri if self.uri.startswith("builtin:") else self.uri.rstrip("/").rpartition("/")[2]
