"""What is truncated, flipped, malicious or absurd is refused by name, and runs nothing."""

import io
import json
import os
import pickle  # noqa: TID251 - to write what must not be run
import struct
import zipfile

import foreign_files as foreign
import numpy as np
import pytest
import torch
from foreign_files import D, H, draw, weights

from manifold_unlearn.dictionary import SparseAutoencoder
from manifold_unlearn.dictionary.formats import DictionaryFormatError, load, save

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
REFUSALS = (ValueError, FileNotFoundError)


class Calls:
    """An object whose pickle calls a function when it is read the ordinary way."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def touch(mark):
    return f"open({str(mark)!r}, 'w').close()"


PAYLOADS = {
    "os.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "builtins.eval": lambda mark: Calls(eval, touch(mark)),
    "builtins.exec": lambda mark: Calls(exec, touch(mark)),
    "getattr": lambda mark: Calls(getattr, Calls(__import__, "os"), "system"),
}


def checkpoint(path, value, protocol, zipped=True):
    """A file of torch's format with a pickle of that protocol."""
    if not zipped:
        path.write_bytes(pickle.dumps(value, protocol=protocol))
        return path
    if protocol == 2:
        torch.save(value, path)
        return path
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=protocol))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["alone", "in the configuration", "beside the weights"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_malicious_pickle_runs_nothing(tmp_path, payload, place, protocol, zipped):
    mark = tmp_path / "ran"
    bad = PAYLOADS[payload](mark)
    value = {
        "alone": bad,
        "in the configuration": {"cfg": {"deep": [(bad,)]}, "state_dict": {}},
        "beside the weights": {"bias": bad, "ae": {"x": 1}},
    }[place]
    path = checkpoint(tmp_path / "ae.pt", value, protocol, zipped)
    with pytest.raises(DictionaryFormatError, match=r"nothing of it was run|not readable"):
        load(path)
    assert not mark.exists()


def test_the_payloads_would_run_if_they_were_unpickled(tmp_path):
    for name in ("os.system", "builtins.eval", "builtins.exec"):
        mark = tmp_path / name
        pickle.loads(pickle.dumps(PAYLOADS[name](mark)))
        assert mark.exists()


def hand_made(tmp_path, program):
    """A checkpoint whose pickle is this program, opcode by opcode."""
    with zipfile.ZipFile(tmp_path / "ae.pt", "w") as archive:
        archive.writestr("archive/data.pkl", program)
    return tmp_path / "ae.pt"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"(S'touch ran'\nios\nsystem\n.", "calls os.system"),  # INST
        (b"(cos\nsystem\nS'touch ran'\no.", "calls os.system"),  # OBJ
        (b"cos\nsystem\n(S'touch ran'\ntR.", "calls os.system"),  # REDUCE
        (b"\x80\x02cos\nsystem\n(S'touch ran'\nt\x81.", "calls os.system"),  # NEWOBJ
        (b"\x80\x04cos\nsystem\n(S'touch ran'\nt}\x92.", "calls os.system"),  # NEWOBJ_EX
        (b"\x80\x02\x82\x01.", "uses the opcode EXT1"),
        (b"Psomething\n.", "refers to what is not in it"),  # PERSID
        (b"S'word'\nQ.", "not readable as a torch checkpoint"),  # BINPERSID
        (b"I1\n}b.", "sets the state of what has none"),  # BUILD
        (b"I1\n", "not readable as a torch checkpoint"),  # no end
        (b"", "not readable as a torch checkpoint"),
        (b"(((((", "not readable as a torch checkpoint"),
        (b"0.", "not readable as a torch checkpoint"),  # POP of nothing
        (b"ctorch\nload\n(S'x'\ntR.", "calls torch.load"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(I1\nI0\n(I2\nt(I1\ntI00\nNtR.", "of no storage"),
    ],
)
def test_every_way_of_a_pickle_to_call_is_closed(tmp_path, program, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DictionaryFormatError, match=words):
        load(hand_made(tmp_path, program))
    assert not (tmp_path / "ran").exists()


def test_a_small_file_that_means_a_huge_text_is_read_at_once(tmp_path):
    anchors = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    anchors += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 30)}]" for i in range(1, 12)]
    w = weights()
    tensors = {**w, "W_enc": w["W_enc"].T}
    foreign.write_safetensors(tmp_path / "layer_0.safetensors", tensors)
    (tmp_path / "config.yaml").write_text("\n".join(anchors))
    coder = load(tmp_path)
    assert len(json.dumps(coder.origin)) < 4_000_000


def test_a_field_named_by_nested_values_is_refused(tmp_path):
    nested = b"I1\n" + b"2\x86" * 60  # (t, t), sixty times over: its hash would take an age
    with pytest.raises(DictionaryFormatError, match="names a field by a tuple"):
        load(hand_made(tmp_path, b"\x80\x02}" + nested + b"Ns."))


def test_an_array_of_objects_is_refused(tmp_path):
    mark = tmp_path / "ran"
    bad = np.array([Calls(os.system, f"touch {mark}")], dtype=object)
    np.savez(tmp_path / "params.npz", W_enc=bad)
    with pytest.raises(DictionaryFormatError, match="an array of objects, which would run code"):
        load(tmp_path)
    assert not mark.exists()


def test_what_would_unpack_to_gigabytes_is_not_unpacked(tmp_path):
    for name, member in (("params.npz", "W_enc.npy"), ("ae.pt", "archive/data/0")):
        place = tmp_path / name.replace(".", "_")
        place.mkdir()
        with zipfile.ZipFile(place / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open(member, "w") as file:
                for _ in range(100):
                    file.write(bytes(1 << 20))
            archive.writestr("archive/data.pkl", b"N.")
        with pytest.raises(DictionaryFormatError, match="would unpack to 1048576"):
            load(place)


def test_a_header_that_promises_more_than_there_is(tmp_path):
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    head += b" " * (63 - (len(head) + 10) % 64) + b"\n"
    raw = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(64)
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", raw)
    with pytest.raises(DictionaryFormatError, match=r"of shape \(1000000, 1000000\) in \d+ bytes"):
        load(tmp_path)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    w = weights()
    big = torch.zeros(1, 1).expand(1 << 20, 1 << 20)
    torch.save({**w, "threshold": big}, tmp_path / "ae.pt")
    with pytest.raises(DictionaryFormatError, match="not stored in full"):
        load(tmp_path)
    torch.save({**w, "threshold": torch.eye(3).to_sparse()}, tmp_path / "ae.pt")
    with pytest.raises(DictionaryFormatError, match="not stored in full|not readable"):
        load(tmp_path)


def test_a_configuration_of_many_megabytes_is_refused(tmp_path):
    foreign.saelens(tmp_path, "standard", weights(), odd="x" * (1 << 24))
    with pytest.raises(DictionaryFormatError, match="a configuration has less than"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "{", "", '{"a": \xff'])
def test_a_configuration_that_is_no_mapping_is_refused(tmp_path, text):
    foreign.saelens(tmp_path, "standard", weights())
    (tmp_path / "cfg.json").write_bytes(text.encode("latin1"))
    with pytest.raises(DictionaryFormatError, match=r"not readable as JSON|not fields with names"):
        load(tmp_path)


@pytest.mark.parametrize("field", ["architecture", "normalize_activations", "activation_fn", "k"])
@pytest.mark.filterwarnings("ignore:.*without the factor")
@pytest.mark.parametrize("value", [[], {}, 3, 1e400, None, "x", True])
def test_a_configuration_may_say_anything(tmp_path, field, value):
    foreign.saelens(tmp_path, "topk", weights(), k=3)
    path = tmp_path / "cfg.json"
    foreign.write_json(path, {**json.loads(path.read_text()), field: value})
    try:
        coder = load(tmp_path)
    except DictionaryFormatError:
        return
    assert torch.equal(coder.W_enc, weights()["W_enc"])  # only where the value means something
    assert (field, value) in [("k", 3), ("activation_fn", None)] or field == "normalize_activations"


BROKEN = {
    "W_enc": (draw(D + 1, H), "has shape"),
    "W_dec": (draw(H, D, 2), "it needs 2 axes"),
    "b_enc": (draw(H + 1), "has shape"),
    "b_dec": (torch.full((D,), float("nan")), "6 of 6 values of b_dec are not finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_shape_or_value_is_named(tmp_path, name):
    value, words = BROKEN[name]
    foreign.saelens(tmp_path, "standard", {**weights(), name: value})
    with pytest.raises(DictionaryFormatError, match=words) as error:
        load(tmp_path)
    assert "sae_weights.safetensors" in str(error.value)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_a_missing_tensor_is_named(tmp_path, name):
    w = weights()
    del w[name]
    foreign.saelens(tmp_path, "standard", w)
    with pytest.raises(DictionaryFormatError, match=f"has no tensor {name}; it holds"):
        load(tmp_path)


def test_weights_of_integers_are_refused(tmp_path):
    w = {name: value.to(torch.int32) for name, value in weights().items()}
    foreign.saelens(tmp_path, "standard", w)
    with pytest.raises(DictionaryFormatError, match=r"has dtype torch\.int32"):
        load(tmp_path)


def pt(path):
    w = weights()
    torch.save({**w, "threshold": draw(H)}, path)


def npz(path):
    np.savez(path, **{name: v.numpy() for name, v in weights().items()}, threshold=draw(H).numpy())


SINGLE = {"ae.pt": pt, "params.npz": npz}


@pytest.mark.parametrize("name", SINGLE)
def test_a_truncated_file_is_refused(tmp_path, name):
    SINGLE[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    load(tmp_path)
    for part in (0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:part])
        with pytest.raises(REFUSALS, match=name.replace(".", r"\.")):
            load(tmp_path)


def same(one, other):
    return all(
        torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items()
    )


def flipped(path, whole, chosen=()):
    """The file with one bit flipped, at places spread over it and at those chosen."""
    places = np.random.default_rng(1).integers(0, 8 * len(whole), 60)
    for place in [*places, *chosen, *range(0, 8 * min(len(whole), 24), 5)]:
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << (place % 8)
        path.write_bytes(bytes(changed))
        yield int(place)


@pytest.mark.parametrize("name", SINGLE)
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, name):
    """The parts of these files bear checksums; what lies between them says nothing."""
    path = tmp_path / name
    SINGLE[name](path)
    expected, refused = load(tmp_path), 0
    for place in flipped(path, path.read_bytes()):
        try:
            found = load(tmp_path)
        except REFUSALS:
            refused += 1
        else:
            assert same(expected, found), place
    assert refused > 20


@pytest.mark.parametrize("format", ["own", "saelens", "sparsify"])
def test_a_flipped_bit_of_what_is_written_here_is_refused_or_changes_nothing(tmp_path, format):
    coder = SparseAutoencoder(4, 8, {"name": "topk", "k": 2}, random_state=0)
    coder.origin = {"site": "layers.1"}
    save(coder, tmp_path / "a", format=format)
    expected, refused = load(tmp_path / "a"), 0
    for path in sorted((tmp_path / "a").iterdir()):
        whole = path.read_bytes()
        digits = [i for i, letter in enumerate(whole) if chr(letter).isdigit()]
        for place in flipped(path, whole, [8 * i for i in digits * path.name.endswith("json")]):
            try:
                found = load(tmp_path / "a")
            except REFUSALS:
                refused += 1
            else:
                assert same(expected, found), (path.name, place)
                assert found.config() == expected.config(), (path.name, place)
        path.write_bytes(whole)
    assert refused > 150


@pytest.mark.parametrize("format", ["own", "saelens", "sparsify"])
def test_what_is_written_here_is_refused_when_cut(tmp_path, format):
    save(SparseAutoencoder(4, 8, {"name": "topk", "k": 2}), tmp_path / "a", format=format)
    for path in sorted((tmp_path / "a").iterdir()):
        whole = path.read_bytes()
        for part in (0, 1, len(whole) // 2, len(whole) - 3):
            path.write_bytes(whole[:part])
            with pytest.raises(REFUSALS, match=r"\w"):
                load(tmp_path / "a")
        path.write_bytes(whole)


def test_a_safetensors_file_whose_header_is_absurd(tmp_path):
    foreign.saelens(tmp_path, "standard", weights())
    header = json.dumps(
        {"W_enc": {"dtype": "F32", "shape": [1 << 40, 4], "data_offsets": [0, 1 << 44]}}
    ).encode()
    raw = io.BytesIO()
    raw.write(struct.pack("<Q", len(header)) + header + bytes(64))
    (tmp_path / "sae_weights.safetensors").write_bytes(raw.getvalue())
    with pytest.raises(DictionaryFormatError, match="not readable as safetensors"):
        load(tmp_path)
