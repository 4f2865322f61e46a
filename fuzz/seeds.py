"""The first inputs of the fuzz targets, into fuzz/corpus: small files in the forms that people have.

.venv/bin/python fuzz/seeds.py
"""

import json
import pathlib
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CORPUS = pathlib.Path(__file__).parent / "corpus"
ROWS, SHAPE = 4, (2, 2, 3)
NUMEL = 12
X = (np.arange(ROWS * NUMEL, dtype=np.float32) / 16 - 1).reshape(ROWS, NUMEL)


def lists(kind, numbers, size):
    array = pa.array(numbers.reshape(-1))
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(array, size)
    of, offset = (pa.LargeListArray, pa.int64()) if kind == "large" else (pa.ListArray, pa.int32())
    return of.from_arrays(pa.array(range(0, len(array) + 1, size), type=offset), array)


def nested(array, size):
    return pa.ListArray.from_arrays(pa.array(range(0, len(array) + 1, size), type=pa.int32()), array)


def parquet(name, latents, meta=None, labels=pa.array([0, 1, 2, 1]), **options):
    table = pa.table({"id": [f"n{i}" for i in range(ROWS)], **latents, "label": labels})
    shape = {"ditharos.latent_shape": json.dumps(SHAPE)} if meta is None else meta
    options = {"row_group_size": 2, "use_dictionary": False, "write_statistics": False, **options}
    pq.write_table(table.replace_schema_metadata(shape), CORPUS / "parquet_bytes" / name, **options)


def write_parquet():
    f16 = X.astype(np.float16)
    raw = lambda numbers, kind: pa.array([row.tobytes() for row in numbers], type=kind)
    plain = {"latent": lists("fixed", f16, NUMEL)}
    parquet("fixed_f16", plain, compression="none", write_page_index=True)
    parquet("list_f32_snappy_checksums", {"latent": lists("list", X, NUMEL)}, compression="snappy", write_page_checksum=True)
    parquet("large_f16_zstd_dictionary", {"latent": lists("large", f16, NUMEL)}, compression="zstd", use_dictionary=True)
    parquet("fixed_f32_gzip_v2", {"latent": lists("fixed", X, NUMEL)}, compression="gzip", data_page_version="2.0")
    parquet("fixed_f16_lz4", plain, compression="lz4")
    parquet("fixed_f16_brotli", plain, compression="brotli")
    parquet("nested_f32", {"latent": nested(nested(nested(pa.array(X.reshape(-1)), 3), 2), 2)}, meta={}, compression="none")
    parquet("bytes_f16", {"latent": raw(f16, pa.binary(24))}, compression="none")
    parquet("bytes_f32_delta", {"latent": raw(X, pa.binary())}, compression="none", column_encoding={"latent": "DELTA_BYTE_ARRAY"})
    parquet("bytes_f32_lengths", {"latent": raw(X, pa.large_binary())}, compression="none", column_encoding={"latent": "DELTA_LENGTH_BYTE_ARRAY"})
    parquet("split_f32", {"latent": lists("fixed", X, NUMEL)}, compression="none", column_encoding={"latent.list.element": "BYTE_STREAM_SPLIT"})
    parquet("labels_delta", plain, compression="none", column_encoding={"label": "DELTA_BINARY_PACKED"})
    parquet("labels_dictionary", plain, labels=pa.array([0, 1, 2, 1]).dictionary_encode(), compression="none", use_dictionary=["label"])
    flipped = {f"latent_{name}": lists("fixed", f16, NUMEL) for name in ("mean", "logvar", "flipped_mean", "flipped_logvar")}
    parquet("moments_flipped", flipped, compression="none", row_group_size=4)
    keys = {"ditharos.latent_shape": "[2,2,3]", "ditharos.latent_dtype": "bf16", "ditharos.num_classes": "3", "ditharos.scaling_factor": "0.5"}
    parquet("bytes_bf16", {"latent": raw((X.view(np.uint32) >> 16).astype(np.uint16), pa.binary(24))}, meta=keys, compression="none")
    parquet("shape_column", {"latent": lists("list", X, NUMEL), "shape": pa.array([[2, 2, 3], [2, 3, 2]] * 2)}, meta={}, compression="none")
    parquet("nulls", {"latent": pa.array([None, *X[1:].tolist()], type=pa.list_(pa.float32()))}, compression="none")


def safetensors(tensors, data):
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + data


def write_shard_headers():
    folder = CORPUS / "shard_header"
    entry = lambda shape, start, end, dtype="F32": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    two = {"__metadata__": {"format": "pt"}, "ema/w": entry([2, 3], 0, 24), "ema/w[0:2]": entry([2], 24, 32)}
    (folder / "two").write_bytes(safetensors(two, bytes(32)))
    (folder / "empty").write_bytes(safetensors({}, b""))
    small = {"a": entry([0, 4], 0, 0), "b": entry([], 0, 2, "BF16"), "c": entry([8], 2, 6, "F4")}
    (folder / "small_types").write_bytes(safetensors(small, bytes(6)))
    (folder / "gap").write_bytes(safetensors({"a": entry([1], 4, 8)}, bytes(8)))
    (folder / "huge").write_bytes(safetensors({"a": entry([1 << 62, 8], 0, 4)}, bytes(4)))


for target in ("parquet_bytes", "shard_header"):
    (CORPUS / target).mkdir(parents=True, exist_ok=True)
write_parquet()
write_shard_headers()
