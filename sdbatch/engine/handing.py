"""Who gets the next shard: a rule that the pool keeps, and that estimates reckon with."""

from __future__ import annotations

#: Shards an actor holds at once: one with the model, the others being stored, or waiting for the model. With three,
#: what ends a shard may take twice as long as making the next one before a model waits for the store.
HELD = 3


def takes_another(held: int, todo: int, actors: int) -> bool:
    """Does who holds so many shards get one more of those ``todo``? Only while there are as many left for each other
    actor: at a job's end shards go to whom is free, and wait at nobody while others are idle."""
    return todo > held * (actors - 1)
