"""Picture files, the shards they are stored in, and the metadata table."""

from sdbatch.outputs.encoding import encode, opens, parameters
from sdbatch.outputs.metadata import decode_metadata, encode_metadata, metadata_key
from sdbatch.outputs.shards import (
    FORMATS,
    EncodedPicture,
    ShardWriter,
    StoredPicture,
    StoredShard,
    read_pictures,
    read_stored,
)

__all__ = [
    "FORMATS",
    "EncodedPicture",
    "ShardWriter",
    "StoredPicture",
    "StoredShard",
    "decode_metadata",
    "encode",
    "encode_metadata",
    "metadata_key",
    "opens",
    "parameters",
    "read_pictures",
    "read_stored",
]
