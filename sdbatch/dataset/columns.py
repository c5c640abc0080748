"""What the columns of the metadata table mean, for whoever reads the data set."""

from __future__ import annotations

MEANINGS = {
    "image": "the picture itself",
    "image_id": "the picture's name, the only one of its kind in the job",
    "row_id": "the row of the prompt table that it was made from",
    "shard": "the shard that holds it",
    "prompt": "what it was asked to show",
    "template": "what the prompt was made from",
    "negative_prompt": "what it was asked not to show",
    "seed": "seed of its noise",
    "width": "in pixels",
    "height": "in pixels",
    "num_inference_steps": "denoising steps",
    "guidance_scale": "strength of classifier-free guidance",
    "sampler": "how noise became a latent",
    "init_image": "the picture that it was made from, if any",
    "mask_image": "the mask of what was made anew, if any",
    "strength": "how much of the init_image was made anew",
    "truncated": "was the prompt longer than the model reads?",
    "model": "what drew it",
    "model_sha256": "checksum of the model's weights and settings",
    "path": "where it is stored: an object, and the place in it after #",
    "bytes": "its size as a file",
    "sha256": "checksum of the file",
    "status": "committed: it is there; quarantined: it could not be made",
    "error": "why it could not be made",
    "failed_checks": "checks that it failed; empty where none did",
    "clip_score": "how well it fits its prompt: their cosine in a CLIP",
    "contrast": "standard deviation of its levels, 0 to 255, in the liveliest channel",
    "phash": "perceptual hash, 64 bits: those of pictures that look alike differ in few",
    "duplicate_of": "a picture before it in its shard that looks alike",
    "unsafe_score": "above 0 it shows what it should not, as far as the classifier can tell",
    "unsafe_concept": "what of that it shows most",
    "rerolls": "new seeds that it took beyond the first candidates",
    "seeds_tried": "seeds of all candidates, in their order",
    "failed_tried": "checks that each of them failed",
    "scores_tried": "the clip_score of each of them",
}


def meaning(name: str, kept: tuple[str, ...]) -> str:
    """What a column holds; ``kept`` are those of the user."""
    if name in MEANINGS:
        return MEANINGS[name]
    return "carried over from the prompt table" if name in kept else "measured on the picture"
