"""Files of weights that are damaged, hostile, or of another kind than their name says; each by what it must lead to."""

import io
import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caffe_files import encode_caffemodel
from safetensors.torch import save, save_file
from torch import Tensor

from setriton import create_model, load_weights
from setriton.models.weights.load import open_weights

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return create_model("resnet20").state_dict()


def refused(path: Path, message: str | None = None, *, bomb: bool = False) -> None:
    """Within a second, with a reason and without advice to run what is in it; a bomb without the memory it wants."""
    model, start = create_model("resnet20", device="meta"), time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(model, path)
    assert time.process_time() - start < 1
    assert "weights_only" not in str(caught.value)
    if bomb:
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=message):
                load_weights(model, path)
            assert tracemalloc.get_traced_memory()[1] < 100 << 20
        finally:
            tracemalloc.stop()


def blobs(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.ones(shape) for shape in shapes]


CAFFE: dict[str, tuple[dict[str, list[Tensor]], str]] = {
    "bn of 2 blobs": ({"conv1/7x7_s2/bn": blobs((4,), (4,))}, "7x7_s2/bn must have 3 blobs"),
    "bn of 5 blobs": ({"conv1/7x7_s2/bn": blobs((4,), (4,), (1,), (1,), (1,))}, "must have 3 blobs"),
    "factor of 4 values": ({"conv1/7x7_s2/bn": blobs((4,), (4,), (4,))}, "one factor"),
    "factor of 0": ({"conv1/7x7_s2/bn": [*blobs((4,), (4,)), torch.zeros(1)]}, "has no statistics"),
    "means and variances of two sizes": ({"conv1/7x7_s2/bn": blobs((4,), (3,), (1,))}, "sums of one shape"),
    "classifier without bias": ({"classifier": blobs((1000, 4))}, "the file has no"),
    "classifier of rank 0": ({"classifier": blobs((), ())}, "classifier.* must have a row for each class"),
    "convolution of 3 blobs": ({"conv1/7x7_s2": blobs((4, 3, 7, 7), (4,), (4,))}, "must have 1 or 2 blobs"),
}


@pytest.mark.parametrize("case", CAFFE)
@pytest.mark.parametrize("kind", ["caffemodel", "npz"])
def test_layers_that_caffe_does_not_have(case: str, kind: str, tmp_path: Path) -> None:
    layers, message = CAFFE[case]
    whole = {"conv1/7x7_s2": blobs((4, 3, 7, 7)), "classifier": blobs((1000, 4), (1000,))} | layers
    path = tmp_path / f"a.{kind}"
    if kind == "caffemodel":
        path.write_bytes(encode_caffemodel(whole))
    else:
        np.savez(path, **{f"{name}:{i}": b.numpy() for name, bs in whole.items() for i, b in enumerate(bs)})
    with pytest.raises(ValueError, match=message):
        load_weights(create_model("se_resnet50", device="meta"), path)


def test_a_caffemodel_cut_at_a_layer_or_made_of_ones(tmp_path: Path) -> None:
    whole = {"conv1/7x7_s2": blobs((4, 3, 7, 7)), "classifier": blobs((1000, 4), (1000,))}
    path = tmp_path / "a.caffemodel"
    path.write_bytes(encode_caffemodel({"conv1/7x7_s2": whole["conv1/7x7_s2"]}))
    refused(path, "weights of a known kind")
    path.write_bytes(encode_caffemodel(whole) * 2)
    refused(path, "two layers are called")
    for filler in (b"\xff", b"\x08\x00", b"\xa2\x06\x00", b"\x00", b"\x0a\x00"):
        path.write_bytes(filler * (1_000_000 // len(filler)))
        refused(path, "caffemodel")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz", ".caffemodel", ".json", ""])
def test_what_is_no_file_of_weights(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    with pytest.raises(FileNotFoundError, match="no file"):
        load_weights(create_model("resnet20"), path)
    path.mkdir()
    refused(path, "is a folder")
    path.rmdir()
    path.write_bytes(b"")
    refused(path, "is empty")
    for content in (
        b"{}",
        b"\x80\x02.",
        b"PK\x05\x06" + bytes(18),
        b"PK\x03\x04",
        b"\x02" + bytes(7) + b"{}",
        b"a\n" * 99,
    ):
        path.write_bytes(content)
        refused(path)
    path.unlink()
    os.mkfifo(path)
    refused(path, "must be a file")
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_weights(create_model("resnet20"), path)


def test_content_says_what_a_file_is_and_a_link_is_followed(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.safetensors.pth")
    torch.save(state, tmp_path / "c.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "d.pth").symlink_to(tmp_path / "c.bin")
    for path in sorted(tmp_path.iterdir()):
        model = create_model("resnet20")
        load_weights(model, path)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Shell:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was_run",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["alone", "beside", "as a key"])
def test_a_pickle_with_code_is_refused_and_not_run(
    where: str, zipped: bool, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"alone": Shell(), "beside": {"state_dict": state, "args": Shell()}, "as a key": {Shell(): state}}[where]
    torch.save(content, "a.pth", _use_new_zipfile_serialization=zipped)
    refused(Path("a.pth"), r"a\.pth is refused: it holds more than tensors.*posix\.system")
    assert not Path("was_run").exists()


def test_what_training_scripts_save_beside_the_weights_is_read(state: State, tmp_path: Path) -> None:
    import argparse
    import collections

    beside = {
        "args": argparse.Namespace(lr=0.1, out=tmp_path),
        "best": np.float64(0.7),
        "curve": np.arange(3),
        "seen": {1, 2},
        "counts": collections.Counter("abc"),
        "sizes": collections.defaultdict(list, a=[1]),
        "shape": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        (1, 2): "a tuple as a key",
    }
    for protocol in (2, 4, 5):
        torch.save({"state_dict": state} | beside, tmp_path / "a.pth", pickle_protocol=protocol)
        model = create_model("resnet20")
        load_weights(model, tmp_path / "a.pth")
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def rezipped(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as old:
        entries = {name: change(name, old.read(name)) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", method) as new:
        for name, content in entries.items():
            new.writestr(name, content)


def test_zip_files_with_lies(state: State, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(state, path)
    whole = path.read_bytes()
    rezipped(path, lambda name, content: content[:-4] if name.endswith("data/0") else content)
    refused(path, "values of torch.float32 in storage, and")
    path.write_bytes(whole)
    rezipped(path, lambda name, content: b"big" if name.endswith("byteorder") else content)
    refused(path, "big-endian")
    path.write_bytes(whole)
    rezipped(path, lambda name, content: bytes(256 << 20) if name.endswith("data/0") else content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2 << 20
    refused(path, "its entries would have", bomb=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("a/data.pkl", b"")
    refused(path, "twice")
    path.write_bytes(whole[:-100])
    refused(path, "PyTorch checkpoint")
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    refused(path, "CRC|entr")


def test_sums_that_were_not_computed_are_not_compared(state: State, tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert open_weights(tmp_path / "a.pth").state.keys() == state.keys()


def test_an_old_checkpoint_may_not_be_larger_than_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(
        {"conv1.weight": torch.ones(3), "layer1.0.conv1.weight": torch.ones(3)},
        path,
        _use_new_zipfile_serialization=False,
    )
    whole = path.read_bytes()
    # The number 3 in shapes, K\x03 with a tuple of one behind it, as 2 ** 31 - 1.
    path.write_bytes(whole.replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"))
    refused(path, "reaches behind the 3 values of its storage", bomb=True)
    path.write_bytes(whole + b"more")
    refused(path, "4 bytes follow its last storage")


def npy(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = repr(header).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


ARRAYS: dict[str, tuple[bytes, str]] = {
    "4 TB": (npy({"descr": "<f4", "fortran_order": False, "shape": (10**12,)}), "1,000,000,000,000 values"),
    "a negative size": (npy({"descr": "<f4", "fortran_order": False, "shape": (-1,)}, bytes(4)), "shape"),
    "objects": (
        npy({"descr": "|O", "fortran_order": False, "shape": (1,)}, pickle.dumps([Shell()])),
        "no real numbers",
    ),
    "records": (npy({"descr": [("a", "<f4")], "fortran_order": False, "shape": (1,)}, bytes(4)), "no real numbers"),
    "strings": (npy({"descr": "<U1", "fortran_order": False, "shape": (1,)}, bytes(4)), "no real numbers"),
    "complex": (npy({"descr": "<c8", "fortran_order": False, "shape": (1,)}, bytes(8)), "no real numbers"),
    "no header": (b"\x93NUMPY\x01\x00\xff\xff", "npz"),
    "no array": (b"text", "npz"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_with_lies(case: str, tmp_path: Path) -> None:
    content, message = ARRAYS[case]
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("conv1/7x7_s2:0.npy", content)
    refused(tmp_path / "a.npz", message, bomb=True)


def test_an_empty_npz_and_keys_that_are_no_blobs(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz")
    refused(tmp_path / "a.npz", "npz|it has no arrays")
    np.savez(tmp_path / "a.npz", **{f"{key}": np.ones(3) for key in ("conv1/7x7_s2:0", "classifier:0", "classifier:x")})
    refused(tmp_path / "a.npz", "blobs must be called layer:index; got 'classifier:x'")


def test_numbers_of_the_other_byte_order_and_fortrans(tmp_path: Path) -> None:
    layers = {"conv1/7x7_s2": blobs((4, 3, 7, 7)), "classifier": [torch.arange(40.0).reshape(10, 4), torch.ones(10)]}
    arrays = {f"{name}:{i}": b.numpy() for name, bs in layers.items() for i, b in enumerate(bs)}
    np.savez(tmp_path / "a.npz", **{key: np.asfortranarray(value.astype(">f4")) for key, value in arrays.items()})
    found = open_weights(tmp_path / "a.npz").state
    assert torch.equal(found["fc.weight"], layers["classifier"][0])


def of_header(state: State, text: str) -> bytes:
    return save(state, {"setriton": text})


FIELDS = {"model": "resnet20", "options": {}, "preprocessing": {}, "origin": "digits"}
HEADERS: dict[str, tuple[Any, str]] = {
    "options that are a list": (FIELDS | {"options": [1]}, "the network's options"),
    "options that are null": (FIELDS | {"options": None}, "the network's options"),
    "an unknown option": (FIELDS | {"options": {"depthwise": True}}, "no option 'depthwise' in this version"),
    "an unknown field": (FIELDS | {"license": "?"}, "license"),
    "an option of another type": (FIELDS | {"options": {"num_classes": "many"}}, "num_classes must be an int"),
    "an impossible value": (FIELDS | {"options": {"global_pool": "mean"}}, "global_pool must be one of"),
    "other sizes": (FIELDS | {"options": {"num_classes": 10**15}}, "says it holds resnet20: fc.weight would be"),
    "another network": (FIELDS | {"model": "resnet32"}, "says it holds resnet32"),
    "no network": (FIELDS | {"model": "resnet21"}, "no known network"),
    "a name that is a list": (FIELDS | {"model": ["resnet20"]}, "names of the network"),
    "more blocks than tensors": (
        FIELDS | {"model": "inception_resnet_v2", "options": {"repeats": [10**9, 20, 10]}},
        "repeats is",
    ),
    "no object": ([1], "must be an object"),
    "null": (None, "must be an object"),
    "a name twice": ('{"model": "resnet32", ' + json.dumps(FIELDS)[1:], "a name twice"),
    "a deep list": ("[" * 100_000 + "]" * 100_000, "does not say which network"),
    "a large number": ('{"options": {"num_classes": ' + "9" * 10_000 + "}}", "does not say which network"),
    "no JSON": ("{", "does not say which network"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_of_setriton(case: str, state: State, tmp_path: Path) -> None:
    fields, message = HEADERS[case]
    text = fields if isinstance(fields, str) else json.dumps(fields)
    (tmp_path / "a.safetensors").write_bytes(of_header(state, text))
    refused(tmp_path / "a.safetensors", message)
    (tmp_path / "a.safetensors").write_bytes(of_header(state, json.dumps(FIELDS)))
    load_weights(create_model("resnet20"), tmp_path / "a.safetensors")


def safetensors(entries: str, data: bytes) -> bytes:
    return struct.pack("<Q", len(entries)) + entries.encode() + data


@pytest.mark.parametrize(
    "entries",
    [
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        '"b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        '"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"conv1.weight": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        '{"conv1.weight": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        '{"conv1.weight": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 8]}}',
        '{"conv1.weight": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}',
        '{"conv1.weight": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        '{"conv1.weight": ' + "[" * 50_000 + "]" * 50_000 + "}",
        "{" * 1000,
        "{}",
        "[]",
    ],
)
def test_safetensors_with_lies(entries: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(safetensors(entries, bytes(8)))
    refused(tmp_path / "a.safetensors")


def test_pickles_that_would_take_for_ever(tmp_path: Path) -> None:
    def write(program: bytes) -> None:
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
            file.writestr("a/data.pkl", program)

    # A dictionary with a key of 2 ** 60 tuples, which has to be hashed.
    write(b"\x80\x02}K\x01\x85" + b"2\x86" * 60 + b"K\x01s.")
    refused(tmp_path / "a.pth", "it has no tensors")
    # A string, a number and a list that say they are very long.
    for program in (b"X\xff\xff\xff\x7f.", b"\x8b\xff\xff\xff\x7f.", b"\x8d" + b"\xff" * 7 + b"\x7f.", b"(" * 100_000):
        write(b"\x80\x04" + program)
        refused(tmp_path / "a.pth", "cannot be read as a PyTorch checkpoint")
    # A list in a list in a list.
    write(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".")
    refused(tmp_path / "a.pth", "must hold a state dict; got list")
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), file)
    (tmp_path / "a.pth").write_bytes(file.getvalue())
    refused(tmp_path / "a.pth", "it is a TorchScript program")
