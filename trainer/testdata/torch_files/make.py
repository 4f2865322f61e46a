"""Makes the files of this folder with PyTorch: `.venv/bin/python trainer/testdata/torch_files/make.py`."""

import argparse
import collections
import io
import pathlib
import struct
import zipfile

import torch

folder = pathlib.Path(__file__).parent
base = torch.arange(24, dtype=torch.float32).reshape(4, 6) - 3.5
weights = collections.OrderedDict(
    f32=base,
    transposed=base.t(),
    middle=base[1:3, 2:5],
    column=base[:, 1],
    f16=base.half() / 3,
    bf16=base.bfloat16() / 3,
    f64=base.double() / 3,
    i64=torch.tensor([-(2**40), 7]),
    scalar=torch.tensor(2.5),
    empty=torch.zeros(0, 3),
    parameter=torch.nn.Parameter(base[0] * 2),
)
weights._metadata = {"": {"version": 1}}
args = argparse.Namespace(model="DiT-S/4", image_size=256, num_classes=10, results_dir=None, lr=1e-4, betas=[0.9, 0.999])
whole = {"model": weights, "args": args, "steps": 7, "shared": weights, "tensors": [torch.ones(2)]}

torch.save(whole, folder / "zip.pt")
torch.save(whole, folder / "protocol4.pt", pickle_protocol=4)
torch.save(whole, folder / "legacy.pt", _use_new_zipfile_serialization=False)
torch.save({"model": torch.nn.Linear(2, 2)}, folder / "module.pt")
with zipfile.ZipFile(folder / "zip.pt") as source, zipfile.ZipFile(folder / "compressed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
    for entry in source.infolist():
        packed.writestr(entry.filename, source.read(entry))

# As a big-endian machine writes it; storages are swapped by the size of their elements.
buffer = io.BytesIO()
torch.save({"a": base, "b": base.double()}, buffer)
with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(folder / "big_endian.pt", "w") as swapped:
    for entry in source.infolist():
        data = source.read(entry)
        if entry.filename.endswith("byteorder"):
            data = b"big"
        if "/data/" in entry.filename:
            size = 4 if entry.filename.endswith("/0") else 8
            data = b"".join(data[at : at + size][::-1] for at in range(0, len(data), size))
        swapped.writestr(entry.filename, data)

# zip64 end records although the numbers are small, as PyTorch writes them for files beyond 4 GiB.
plain = (folder / "zip.pt").read_bytes()
end = plain.rindex(b"PK\x05\x06")
entries, size, offset = struct.unpack("<HII", plain[end + 10 : end + 20])
record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, size, offset)
locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
wide = plain[:end] + record + locator + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
(folder / "zip64.pt").write_bytes(wide)
