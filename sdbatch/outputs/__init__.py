"""Picture files, the shards they are stored in, and the metadata table."""

from sdbatch.outputs.credentials import Signer
from sdbatch.outputs.encoding import checked_columns, encode, opens, pixels_sum
from sdbatch.outputs.features import dtype
from sdbatch.outputs.formats import FORMATS
from sdbatch.outputs.metadata import check_columns, decode_metadata, encode_metadata, metadata_key, metadata_of
from sdbatch.outputs.provenance import parameters
from sdbatch.outputs.reading import as_stored, read_pictures, read_stored
from sdbatch.outputs.renditions import Copies, copies, misfits, store_copies
from sdbatch.outputs.shards import EncodedPicture, ShardWriter, StoredPicture, StoredShard, remove_shard

__all__ = [
    "FORMATS",
    "Copies",
    "EncodedPicture",
    "ShardWriter",
    "Signer",
    "StoredPicture",
    "StoredShard",
    "as_stored",
    "check_columns",
    "checked_columns",
    "copies",
    "decode_metadata",
    "dtype",
    "encode",
    "encode_metadata",
    "metadata_key",
    "metadata_of",
    "misfits",
    "opens",
    "parameters",
    "pixels_sum",
    "read_pictures",
    "read_stored",
    "remove_shard",
    "store_copies",
]
