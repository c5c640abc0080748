"""Who gets the next shard: a rule that the pool keeps, and that estimates reckon with."""

from __future__ import annotations

#: Shards an actor holds at once: one with the model, one being stored, or waiting for the model.
HELD = 2


def takes_another(held: int, todo: int, actors: int) -> bool:
    """Does who holds so many shards get one more of those ``todo``? One to wait beside another only while there is one
    left for each other actor: at a job's end shards go to whom is free, and wait at nobody while others are idle."""
    return todo > 0 if held == 0 else todo >= actors
