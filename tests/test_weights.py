from __future__ import annotations

import hashlib
import json
import os
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from maisi_tools.errors import InputError
from maisi_tools.weights import (
    check_shared,
    fetch_weights,
    load_weights,
    read_factor,
    read_scale_factor,
    read_weights,
    save_weights,
    weight_shapes,
)


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, width, 3), nn.BatchNorm3d(width), nn.Conv3d(width, 1, 1))


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- load_weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "model", "state_dict", "unet_state_dict", "autoencoder_state_dict"])
def test_load_finds_the_state_dict(tmp_path, key):
    source, target = network(), network()
    state = source.state_dict()
    torch.save(state if key is None else {"epoch": 3, "loss": 0.1, key: state}, tmp_path / "x.pt")
    assert load_weights(target, tmp_path / "x.pt") is target
    assert_equal_states(target.state_dict(), state)


def test_load_takes_the_first_known_key_and_unwraps_nested_ones(tmp_path):
    unet, other = network(), network()
    checkpoint = {"controlnet_state_dict": other.state_dict(), "unet_state_dict": {"model": unet.state_dict()}}
    torch.save(checkpoint, tmp_path / "x.pt")
    assert_equal_states(load_weights(network(), tmp_path / "x.pt").state_dict(), unet.state_dict())
    loaded = load_weights(network(), tmp_path / "x.pt", key="controlnet_state_dict")
    assert_equal_states(loaded.state_dict(), other.state_dict())


def test_load_tolerates_the_prefix_of_data_parallel(tmp_path):
    source = network()
    torch.save({"model": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "x.pt")
    assert_equal_states(load_weights(network(), tmp_path / "x.pt").state_dict(), source.state_dict())


@pytest.mark.parametrize("added", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_load_tolerates_what_compiling_adds_to_names(tmp_path, added):
    source = network()
    torch.save({f"{added}{k}": v for k, v in source.state_dict().items()}, tmp_path / "x.pt")
    assert_equal_states(load_weights(network(), tmp_path / "x.pt").state_dict(), source.state_dict())
    assert weight_shapes(tmp_path / "x.pt").keys() == source.state_dict().keys()
    part = torch.nn.Sequential(source[0], torch.compile(source[1:]))  # compiled in part
    torch.save(part.state_dict(), tmp_path / "y.pt")
    whole = torch.nn.Sequential(source[0], source[1:])
    assert read_weights(tmp_path / "y.pt").keys() == whole.state_dict().keys() != part.state_dict().keys()


def test_safetensors_are_read_where_their_package_is_there(tmp_path, monkeypatch):
    source, path = network(), tmp_path / "x.safetensors"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not
    with pytest.raises(InputError, match=r"x\.safetensors need the package safetensors; install it with: pip install"):
        load_weights(network(), path)
    monkeypatch.undo()
    saving = pytest.importorskip("safetensors.torch")
    saving.save_file(source.state_dict(), path)
    assert_equal_states(load_weights(network(), path).state_dict(), source.state_dict())


def test_load_of_another_width_names_the_shapes(tmp_path):
    torch.save(network(8).state_dict(), tmp_path / "x.pt")
    target = network(4)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(target, tmp_path / "x.pt")
    message = str(caught.value)
    assert str(tmp_path / "x.pt") in message
    assert "0.weight (file (8, 1, 3, 3, 3), network (4, 1, 3, 3, 3))" in message
    assert "full.json" in message
    assert_equal_states(target.state_dict(), before)  # nothing was loaded half-way


def test_as_many_values_in_another_shape_are_another_shape(tmp_path):
    state = network().state_dict()
    state["0.weight"] = state["0.weight"].transpose(0, 1).contiguous()
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"1 keys of another shape: 0.weight .file .1, 4, 3, 3, 3., network .4, 1, 3"):
        load_weights(network(), tmp_path / "x.pt")


def test_load_of_other_keys_names_at_most_five(tmp_path):
    torch.save({f"block.{i}": torch.zeros(1) for i in range(9)}, tmp_path / "x.pt")
    with pytest.raises(InputError) as caught:
        load_weights(network(), tmp_path / "x.pt")
    message = str(caught.value)
    assert (
        "9 keys missing in the file: 0.bias, 0.weight, 1.bias, 1.num_batches_tracked, 1.running_mean, ...;" in message
    )
    assert "9 keys unknown to the network: block.0, block.1, block.2, block.3, block.4, ...." in message


def test_missing_weights_name_the_command(tmp_path):
    bundle = tmp_path / "maisi_vae"
    bundle.mkdir()
    (bundle / "large_files.yml").write_text("large_files: [{path: models/released.pt, url: 'http://127.0.0.1:1/x'}]\n")
    with pytest.raises(InputError, match="maisi weights maisi_vae"):
        load_weights(network(), bundle / "models" / "released.pt")
    for path in (bundle / "models" / "model.pt", tmp_path / "elsewhere.pt"):
        with pytest.raises(InputError, match="do not exist; train them"):
            load_weights(network(), path)


def test_missing_weights_of_a_bundle_that_was_not_named_say_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no folder models here: give the bundle's folder as --bundle_root"):
        load_weights(network(), "models/model.pt")


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 half a zip", b"\x80\x02half a pickle"])
def test_damaged_file(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(
        InputError, match=r"weights .*x\.pt (\(\d+ bytes\) cannot be read|are no checkpoint of tensors): "
    ):
        load_weights(network(), tmp_path / "x.pt")


def test_truncated_checkpoint(tmp_path):
    torch.save(network(64).state_dict(), tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        load_weights(network(64), tmp_path / "x.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"model": Attack()}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="no checkpoint of tensors"):
        load_weights(network(), tmp_path / "x.pt")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("checkpoint", [{"epoch": 3}, {"model": 3}, {}, [torch.zeros(1)], torch.zeros(1)])
def test_checkpoint_without_a_state_dict(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "x.pt")
    with pytest.raises(InputError, match="holds no state dict"):
        load_weights(network(), tmp_path / "x.pt")


def itself(outer: str = "model") -> dict:
    checkpoint: dict = {"epoch": 3}
    checkpoint[outer] = {"model": checkpoint}
    return checkpoint


@pytest.mark.parametrize("read", [load_weights, lambda _, path: read_weights(path)])
def test_a_checkpoint_that_holds_itself_ends(tmp_path, read):
    torch.save(itself(), tmp_path / "x.pt")
    with pytest.raises(InputError, match="holds no state dict, but keys epoch, model"):
        read(network(), tmp_path / "x.pt")


def spoilt(name: str = "2.weight", **kind) -> dict:
    """A state whose tensor `name` holds the values of `kind`, or is what it returns for the good one."""
    state = network().state_dict()
    if "value" in kind:
        state[name].view(-1)[1] = kind["value"]
    else:
        state[name] = kind["change"](state[name])
    return state


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    ("state", "words"),
    [
        (spoilt(value=float("nan")), "1 of 9 tensors, 2.weight is not finite in 1 of 4 values"),
        (spoilt(value=float("inf")), "2.weight is not finite in 1 of 4 values"),
        (spoilt(value=float("-inf")), "2.weight is not finite"),
        (spoilt(change=lambda x: x.half() / 0), "2.weight is not finite in 4 of 4"),
        (spoilt(change=lambda x: (x / 0).bfloat16()), "2.weight is not finite in 4 of 4"),
        (spoilt(change=lambda x: x.to(torch.complex64)), r"2.weight is complex \(torch.complex64\)"),
        (spoilt(change=lambda x: x.to_sparse()), r"2.weight is sparse \(torch.sparse_coo\)"),
        (spoilt(change=lambda x: x.double() * 1e300), "1 keys with values too large for the network's type: 2.weight"),
        (
            spoilt(change=lambda x: x.to(torch.int8)),
            r"of another kind of number: 2.weight \(file torch.int8, network torch.float32\)",
        ),
        (spoilt("1.num_batches_tracked", change=lambda x: x.float()), "another kind of number: 1.num_batches_tracked"),
        (spoilt(change=lambda x: x > 0), "another kind of number: 2.weight"),
    ],
)
def test_what_is_no_weights_is_refused_by_name(tmp_path, state, words):
    torch.save({"model": state}, tmp_path / "x.pt")
    target = network()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(InputError, match=words):
        load_weights(target, tmp_path / "x.pt")
    assert_equal_states(target.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_weights(tmp_path, dtype):
    source = network()
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in source.state_dict().items()
    }
    torch.save(state, tmp_path / "x.pt")
    loaded = load_weights(network(), tmp_path / "x.pt").state_dict()
    assert torch.equal(loaded["0.weight"], source.state_dict()["0.weight"].to(dtype).float())


def test_key_that_is_not_there(tmp_path):
    torch.save({"model": network().state_dict()}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="has no 'unet'; its keys are model"):
        load_weights(network(), tmp_path / "x.pt", key="unet")


# --- save_weights, read_scale_factor ----------------------------------------------------------------------------------


def test_save_stores_fp16_and_loads_as_fp32(tmp_path):
    source = network()
    source[1].num_batches_tracked += 70_000  # more than fp16 can hold: whole numbers keep their type
    save_weights(tmp_path / "new" / "x.pt", source.state_dict(), scale_factor=torch.tensor(0.75), epoch=7)
    stored = torch.load(tmp_path / "new" / "x.pt", weights_only=True)
    assert stored["epoch"] == 7
    assert {v.dtype for v in stored["model"].values()} == {torch.float16, torch.int64}
    loaded = load_weights(network(), tmp_path / "new" / "x.pt").state_dict()
    assert loaded["0.weight"].dtype == torch.float32
    assert torch.equal(loaded["0.weight"], source.state_dict()["0.weight"].half().float())
    assert loaded["1.num_batches_tracked"] == 70_000
    assert read_scale_factor(tmp_path / "new" / "x.pt") == 0.75
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.pt"]


def test_save_refuses_what_fp16_cannot_hold_and_keeps_the_old_file(tmp_path):
    save_weights(tmp_path / "x.pt", {"a": torch.tensor([65504.0])})
    with pytest.raises(ValueError, match="a has values that are not finite"):
        save_weights(tmp_path / "x.pt", {"a": torch.tensor([70000.0])})
    assert torch.load(tmp_path / "x.pt", weights_only=True)["model"]["a"] == 65504
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_interrupted_save_leaves_the_old_file(tmp_path):
    save_weights(tmp_path / "x.pt", {"a": torch.ones(1)})
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save_weights(tmp_path / "x.pt", {"a": torch.zeros(1)}, handler=lambda: None)  # cannot be pickled
    assert torch.load(tmp_path / "x.pt", weights_only=True)["model"]["a"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize(
    "checkpoint",
    [{"model": {}}, {"a": torch.ones(1)}, {"scale_factor": torch.ones(2)}, {"scale_factor": torch.tensor(1j)}]
    + [{"scale_factor": value} for value in (0.0, -1.0, float("nan"), float("inf"), "high", "1.0", True, [1.0], {})],
)
def test_no_usable_scale_factor(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "x.pt")
    with pytest.raises(InputError, match="scale_factor"):
        read_scale_factor(tmp_path / "x.pt")


@pytest.mark.parametrize(("stored", "factor"), [({"factor": 2}, 2), ({}, 4), ({"factor": 8, "scale_factor": 1.0}, 8)])
def test_factor_is_the_recorded_one_or_the_releases(tmp_path, stored, factor):
    save_weights(tmp_path / "x.pt", {"a": torch.ones(1)}, **stored)
    assert read_factor(tmp_path / "x.pt") == factor


@pytest.mark.parametrize("factor", [0, -2, 2.0, "2", True, None])
def test_no_usable_factor(tmp_path, factor):
    save_weights(tmp_path / "x.pt", {"a": torch.ones(1)}, factor=factor)
    with pytest.raises(InputError, match=f"has factor {factor!r}; allowed is a whole number"):
        read_factor(tmp_path / "x.pt")


NO_MERGING = {"merge_labels": None}


def test_weights_are_refused_with_other_settings_than_those_of_their_training(tmp_path, caplog):
    """With all that differ, and only settings that both name: files of earlier versions record none."""
    shared = {"process": "rectified flow", "condition_scale": 100.0, "keep_labels": [1, 26], "merge_labels": {}}
    save_weights(tmp_path / "x.pt", {"a": torch.ones(1)}, shared=shared)
    for wanted in (shared, {"process": "rectified flow", "condition_scale": 100}, {"another": 1}, {}):
        check_shared(tmp_path / "x.pt", wanted)
    with pytest.raises(InputError) as raised:
        check_shared(tmp_path / "x.pt", shared | {"process": "ddpm, epsilon", "keep_labels": [1, 2]})
    for words in ("process is 'ddpm, epsilon', they were trained with 'rectified flow'", "keep_labels is [1, 2], they"):
        assert words in str(raised.value)
    assert "condition_scale" not in str(raised.value)
    with pytest.raises(InputError, match=r"keep_labels is None, they were trained with \[1, 26\]"):
        check_shared(tmp_path / "x.pt", {"keep_labels": None})
    assert not caplog.text
    check_shared(tmp_path / "x.pt", shared | {"keep_labels": [1]})
    assert "know labels that keep_labels leaves out, so that no CT shows them: 26; keep_labels is 1" in caplog.text
    save_weights(tmp_path / "x.pt", {"a": torch.ones(1)}, shared={"keep_labels": None, "merge_labels": {"bone": 120}})
    for fewer in ({"keep_labels": [1], "merge_labels": {}}, {"merge_labels": {"bone": 120, "lung": 28}}, NO_MERGING):
        check_shared(tmp_path / "x.pt", fewer)
    with pytest.raises(InputError, match="merge_labels is {'bone': 200}, they were trained with {'bone': 120}"):
        check_shared(tmp_path / "x.pt", {"merge_labels": {"bone": 200}})
    save_weights(tmp_path / "x.pt", {"a": torch.ones(1)}, shared=NO_MERGING)
    check_shared(tmp_path / "x.pt", {"merge_labels": {"bone": 120}})
    for silent in ({}, {"shared": None}, {"shared": "rectified flow"}):
        save_weights(tmp_path / "y.pt", {"a": torch.ones(1)}, **silent)
        check_shared(tmp_path / "y.pt", shared)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_lies_beside_the_weights_is_read_once_and_anew_when_the_file_changes(tmp_path, monkeypatch, zipped):
    path, state = tmp_path / "x.pt", network().state_dict()
    read, loads = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append(args) or loads(*args, **kwargs))
    for factor in (2, 8):
        checkpoint = {"scale_factor": torch.tensor(0.5), "factor": factor, "model": state}
        torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
        assert (read_factor(path), read_scale_factor(path)) == (factor, 0.5)
        assert weight_shapes(path) == {name: tuple(value.shape) for name, value in state.items()}
    assert len(read) == 2
    path.unlink()
    with pytest.raises(InputError, match="do not exist"):
        read_factor(path)


# --- fetch_weights ----------------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT; the path chooses the server's temper."""

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))
        if self.path.startswith("/tagged"):
            return self.tagged()
        if self.path == "/missing":
            return self.send_error(404)
        if self.path.startswith("/to="):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to="))
            return self.end_headers()
        begin = 0
        asked = self.headers.get("Range")
        if asked and self.path == "/whole_anyway":  # as if in parts, but from the beginning
            self.send_response(206)
            self.send_header("Content-Range", f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}")
        elif asked and self.path != "/no_ranges":
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(CONTENT):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            self.send_response(200)
        body = CONTENT[begin:]
        if self.path != "/no_length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/breaks" and not asked:
            body = body[:100_000]
        self.wfile.write(body)

    def tagged(self) -> None:
        """A file with an ETag, which the first answer breaks off; "/tagged/careless" does not look at If-Range."""
        content, tag = self.server.file
        asked, only_if = self.headers.get("Range"), self.headers.get("If-Range", tag)
        begin = 0
        if asked and (only_if == tag or self.path.endswith("careless")):
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        self.wfile.write(content[begin : None if len(self.server.requests) > 1 else 100_000])


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def bundle(folder: Path, url: str, hash_val: str = SHA256, hash_type: str = "sha256", path="models/big.pt") -> Path:
    entry = f'- path: "{path}"\n  url: "{url}"\n  hash_val: "{hash_val}"\n  hash_type: "{hash_type}"\n'
    (folder / "large_files.yml").write_text("large_files:\n" + entry)
    return folder


def assert_only_the_file(folder: Path) -> None:
    assert [p.name for p in (folder / "models").iterdir()] == ["big.pt"]
    assert (folder / "models" / "big.pt").read_bytes() == CONTENT


@pytest.mark.parametrize("path", ["/ranges", "/no_ranges", "/no_length"])
def test_fetch_and_skip(tmp_path, server, path):
    folder = bundle(tmp_path, server.url + path)
    assert fetch_weights(folder) == [folder / "models" / "big.pt"]
    assert_only_the_file(folder)
    asked = len(server.requests)
    assert fetch_weights(folder) == [folder / "models" / "big.pt"]
    assert len(server.requests) == asked  # verified on disk, not fetched again


def test_fetch_verifies_other_hashes(tmp_path, server):
    fetch_weights(bundle(tmp_path, server.url + "/ranges", hashlib.md5(CONTENT).hexdigest().upper(), "md5"))
    assert_only_the_file(tmp_path)


def test_interrupted_download_goes_on_where_it_stopped(tmp_path, server):
    folder = bundle(tmp_path, server.url + "/breaks")
    with pytest.raises(InputError, match="ended after 100000 of 512000 bytes.* 100000 bytes are kept"):
        fetch_weights(folder)
    assert [p.name for p in (folder / "models").iterdir()] == ["big.pt.part"]
    fetch_weights(folder)
    assert server.requests == [("/breaks", None), ("/breaks", "bytes=100000-")]
    assert_only_the_file(folder)


OTHER = bytes(reversed(CONTENT))


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("path", ["/tagged", "/tagged/careless"])
@pytest.mark.parametrize(
    ("then", "ranges"),
    [
        ((CONTENT, '"one"'), ["bytes=100000-"]),  # the same file: gone on with
        ((OTHER, '"two"'), ["bytes=100000-", None]),  # another file: begun anew
        ((OTHER[:50_000], '"two"'), ["bytes=100000-", None]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*was not verified")
def test_a_resumed_download_is_one_file(tmp_path, server, then, ranges, path, hashed):
    """The bytes are never half of one file and half of another, with a hash in the list and without."""
    digest = hashlib.sha256(then[0]).hexdigest()
    folder = bundle(tmp_path, server.url + path, *([digest] if hashed else ["", ""]))
    server.file = (CONTENT, '"one"')
    with pytest.raises(InputError, match="ended after 100000"):
        fetch_weights(folder)
    server.file = then
    fetch_weights(folder)
    assert (folder / "models" / "big.pt").read_bytes() == then[0]
    assert [file.name for file in (folder / "models").iterdir()] == ["big.pt"]
    asked = [given for _, given in server.requests[1:]]
    # A server that minds If-Range answers with the new file at once.
    assert asked == (ranges if path.endswith("careless") else ranges[:1])


@pytest.mark.parametrize("tag", ['W/"one"', ""])
@pytest.mark.filterwarnings("ignore:.*was not verified")
def test_without_tag_and_hash_a_download_begins_anew(tmp_path, server, tag):
    folder = bundle(tmp_path, server.url + "/tagged/careless", "", "")
    server.file = (CONTENT, tag)
    with pytest.raises(InputError, match="ended after 100000"):
        fetch_weights(folder)
    fetch_weights(folder)
    assert [given for _, given in server.requests] == [None, None]
    assert_only_the_file(folder)


@pytest.mark.parametrize("target", ["/ranges", "http://127.0.0.1:9/x", "ftp://127.0.0.1/x", "file:///etc/hostname"])
def test_no_redirect_but_https(tmp_path, server, target):
    with pytest.raises(InputError, match="redirects to .*; allowed is https|Redirection to url .* is not allowed"):
        fetch_weights(bundle(tmp_path, f"{server.url}/to={target}"))
    assert len(server.requests) == 1
    assert list((tmp_path / "models").iterdir()) == []


def test_a_redirect_to_https_is_followed(tmp_path, server, monkeypatch, pem_files):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem_files["certificate"], pem_files["key"])
    monkeypatch.setenv("SSL_CERT_FILE", pem_files["certificate"])
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as safe:
        safe.requests = []
        safe.socket = context.wrap_socket(safe.socket, server_side=True)
        thread = threading.Thread(target=safe.serve_forever, args=(0.01,))
        thread.start()
        try:
            (tmp_path / "bundle").mkdir()
            target = f"https://127.0.0.1:{safe.server_port}/ranges"
            fetch_weights(bundle(tmp_path / "bundle", f"{server.url}/to={target}"))
        finally:
            safe.shutdown()
            thread.join()
    assert safe.requests == [("/ranges", None)]
    assert_only_the_file(tmp_path / "bundle")


@pytest.mark.parametrize("have", [CONTENT[:1000], CONTENT, CONTENT + b"more"], ids=["part", "whole", "too much"])
@pytest.mark.parametrize("path", ["/ranges", "/no_ranges", "/whole_anyway"])
def test_resume_from_any_part(tmp_path, server, path, have):
    folder = bundle(tmp_path, server.url + path)
    (folder / "models").mkdir()
    (folder / "models" / "big.pt.part").write_bytes(have)
    fetch_weights(folder)
    assert_only_the_file(folder)


def test_wrong_hash_deletes_the_download(tmp_path, server):
    folder = bundle(tmp_path, server.url + "/ranges", "0" * 64)
    with pytest.raises(InputError, match=f"expected {'0' * 64}, got {SHA256}"):
        fetch_weights(folder)
    assert list((folder / "models").iterdir()) == []


def test_a_file_of_ones_own_is_not_touched(tmp_path, server):
    folder = bundle(tmp_path, server.url + "/ranges")
    (folder / "models").mkdir()
    (folder / "models" / "big.pt").write_bytes(b"mine")
    with pytest.raises(InputError, match="Move or delete it"):
        fetch_weights(folder)
    assert (folder / "models" / "big.pt").read_bytes() == b"mine"
    assert server.requests == []


def test_without_a_hash_there_is_a_warning(tmp_path, server):
    folder = bundle(tmp_path, server.url + "/ranges", "", "")
    with pytest.warns(UserWarning, match="not verified"):
        fetch_weights(folder)
    assert_only_the_file(folder)


def test_not_found(tmp_path, server):
    with pytest.raises(InputError, match=r"/missing failed: HTTP Error 404.* put it at .*big\.pt"):
        fetch_weights(bundle(tmp_path, server.url + "/missing"))
    assert list((tmp_path / "models").iterdir()) == []


def test_connection_refused(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/x"
    with pytest.raises(InputError, match="refused"):
        fetch_weights(bundle(tmp_path, url))
    assert list((tmp_path / "models").iterdir()) == []


def test_only_the_named_files(tmp_path, server):
    names = ("a.pt", "b.pt", "c.pt")
    entries = [{"path": f"models/{n}", "url": server.url + "/ranges", "hash_val": SHA256} for n in names]
    (tmp_path / "large_files.json").write_text(
        json.dumps({"large_files": [entry | {"hash_type": "sha256"} for entry in entries]})
    )
    assert fetch_weights(tmp_path, ["b.pt", "models/c.pt"]) == [tmp_path / "models/b.pt", tmp_path / "models/c.pt"]
    assert not (tmp_path / "models/a.pt").exists()
    with pytest.raises(InputError, match="no large file d.pt; choose among: models/a.pt, models/b.pt, models/c.pt"):
        fetch_weights(tmp_path, ["a.pt", "d.pt"])


@pytest.mark.parametrize("text", ["", "large_files:", "large_files:\n- path: a", "[1, 2", "large_files:\n- a", "a: [}"])
def test_wrong_list(tmp_path, text):
    (tmp_path / "large_files.yml").write_text(text)
    with pytest.raises(InputError, match="large_files.yml"):
        fetch_weights(tmp_path)


def test_no_list(tmp_path):
    with pytest.raises(InputError, match="has no large_files.yml"):
        fetch_weights(tmp_path)


@pytest.mark.parametrize(
    "changed", [{"path": "../x.pt"}, {"path": "/x.pt"}, {"url": "file:///x"}, {"hash_type": "crc"}]
)
def test_unsafe_entry(tmp_path, changed):
    (tmp_path / "inside").mkdir()
    with pytest.raises(InputError, match="outside the bundle|must begin with|use one of"):
        fetch_weights(bundle(tmp_path / "inside", **{"url": "http://127.0.0.1:9/x", **changed}))
