"""The forms of a shard by their names in the spec."""

from sdbatch.outputs.containers import ParquetFiles, WebDataset
from sdbatch.outputs.image_files import ImageFiles
from sdbatch.outputs.shards import ShardWriter

FORMATS: dict[str, type[ShardWriter]] = {"images": ImageFiles, "webdataset": WebDataset, "parquet": ParquetFiles}
