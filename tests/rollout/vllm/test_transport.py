"""Weights as they travel: in the manifest's order, in pieces, in files that are whole or not there."""

import asyncio
import json
import os
import re
import resource
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prime_train.models.served import TensorInfo
from prime_train.models.snapshot import Weights, cut, nbytes, write_snapshot
from prime_train.rollout.vllm.errors import ServerError
from prime_train.rollout.vllm.room import LOCK
from prime_train.rollout.vllm.transport import FileTransport
from prime_train.rollout.vllm.weights import Kept, cut_past, described, fill
from tests.support.tiny import model


def infos(*sizes):
    return [TensorInfo(str(i), torch.uint8, (size,)) for i, size in enumerate(sizes)]


def names(pieces):
    return ["".join(info.name for info in piece) for piece in pieces]


def in_bfloat16():
    net = model()
    net.compute_dtype = torch.bfloat16
    return net


# -- pieces --


@pytest.mark.parametrize(
    ("sizes", "at_most", "past"),
    [
        ((), [], []),
        ((3,), ["0"], ["0"]),
        ((3, 2, 5, 1), ["01", "2", "3"], ["012", "3"]),
        ((5, 5, 5), ["0", "1", "2"], ["01", "2"]),
        ((9, 1, 1, 4), ["0", "12", "3"], ["0", "123"]),
        ((0, 5, 0, 1), ["012", "3"], ["0123"]),
    ],
)
def test_pieces_stay_below_the_limit_or_end_where_they_pass_it(sizes, at_most, past):
    assert names(cut(infos(*sizes), 5)) == at_most
    assert names(cut_past(infos(*sizes), 5)) == past


def test_a_filled_buffer_holds_the_tensors_bytes_one_behind_the_other():
    tensors = [("a", torch.randn(3, 4).T), ("b", torch.arange(5)), ("c", torch.tensor(1.5).bfloat16())]
    piece = tuple(TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors)
    buffer = torch.empty(nbytes(piece), dtype=torch.uint8)
    fill(buffer, piece, iter(tensors))
    a, b, c = buffer.split([48, 40, 2])
    assert torch.equal(a.view(torch.float32).view(4, 3), tensors[0][1])
    assert torch.equal(b.view(torch.int64), tensors[1][1])
    assert torch.equal(c.view(torch.bfloat16)[0], tensors[2][1])
    assert described(piece) == {
        "names": ["a", "b", "c"], "dtype_names": ["float32", "int64", "bfloat16"], "shapes": [[4, 3], [5], []],
    }  # fmt: skip


@pytest.mark.parametrize("come", [[("y", torch.zeros(2))], [("x", torch.zeros(3))], [("x", torch.zeros(2).half())], []])
def test_another_tensor_than_the_manifest_says_is_refused_not_sent(come):
    with pytest.raises(ValueError, match=r"weights must come as their manifest says, TensorInfo\(name='x'"):
        fill(torch.empty(8, dtype=torch.uint8), (TensorInfo("x", torch.float32, (2,)),), iter(come))


def test_kept_tensors_come_again_though_they_changed_and_the_first_to_go_through_them_stopped():
    values = [torch.tensor([float(i)]) for i in range(3)]
    kept = Kept((str(i), value) for i, value in enumerate(values))
    assert next(iter(kept))[0] == "0"
    values[0].fill_(9)
    for _ in range(2):
        assert [(name, float(tensor)) for name, tensor in kept] == [("0", 0), ("1", 1), ("2", 2)]


# -- files --


@pytest.mark.parametrize("shard", [2**30, 2000])
def test_a_snapshot_is_what_save_pretrained_writes_in_the_precision_of_the_computation(tmp_path, shard):
    net = in_bfloat16()
    write_snapshot(tmp_path, Weights.of(net), shard)
    net.transformer.bfloat16().save_pretrained(tmp_path / "want", max_shard_size=shard)
    want = tmp_path / "want"
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((want / name).read_text())
    found, wanted = ({k: v for file in d.glob("*.safetensors") for k, v in load_file(file).items()} for d in
                     (tmp_path, want))  # fmt: skip
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (tmp_path / "model.safetensors").exists() == (shard == 2**30)


def test_a_snapshot_in_several_files_is_found_by_its_index(tmp_path):
    net = model()
    write_snapshot(tmp_path, Weights.of(net), 2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * net.parameter_count()
    assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("*.safetensors"))) > 2
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, net.transformer.lm_head.weight)


def test_tensors_are_written_as_they_come_a_file_at_a_time(tmp_path):
    weights = Weights.of(model())
    written = []

    def watched():
        for name, tensor in weights.tensors:
            written.append(len(list(tmp_path.glob("*.safetensors"))))
            yield name, tensor

    write_snapshot(tmp_path, Weights(manifest=weights.manifest, tensors=watched(), files={}), 2000)
    assert written[0] == 0
    assert written[-1] == len(list(tmp_path.glob("*.safetensors"))) - 1 > 1


def test_one_snapshot_is_held_and_none_once_it_is_cut_off_or_closed(tmp_path):
    transport = FileTransport(tmp_path)
    for _ in range(2):
        transport.publish(Weights.of(model()))
        assert {path.name for path in transport.snapshot.parent.iterdir()} == {transport.snapshot.name, LOCK}

    def cut_off():
        yield from list(Weights.of(model()).tensors)[:3]
        raise KeyboardInterrupt

    weights = Weights.of(model())
    with pytest.raises(KeyboardInterrupt):
        transport.publish(Weights(manifest=weights.manifest, tensors=cut_off(), files={}))
    assert [path.name for path in transport.snapshot.parent.iterdir()] == [LOCK]
    transport.publish(Weights.of(model()))
    assert (transport.snapshot / "model.safetensors").exists()
    asyncio.run(transport.close([]))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_written_leave_nothing_and_the_error_says_where_and_how_much_they_need(tmp_path):
    transport, weights = FileTransport(tmp_path), Weights.of(model())
    transport.publish(weights)
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, kept[1]))
    try:
        with pytest.raises(ServerError) as error:
            transport.publish(Weights.of(model()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    needed = nbytes(weights.manifest) / 2**30
    said = rf"{tmp_path} has \d+.\d GiB free, and one copy of the policy takes {needed:.2g} GiB"
    assert re.fullmatch(rf"weights could not be written: .*File too large.*; {said}",
                        str(error.value))  # fmt: skip
    assert [path.name for path in transport.snapshot.parent.iterdir()] == [LOCK]
    transport.publish(Weights.of(model()))
    assert (transport.snapshot / "model.safetensors").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_whom_the_umask_lets_read_can_read_all_of_a_snapshot(tmp_path, umask):
    before = os.umask(umask)
    try:
        transport = FileTransport(tmp_path)
        transport.publish(Weights.of(model()))
    finally:
        os.umask(before)
    assert stat.S_IMODE(transport.snapshot.parent.stat().st_mode) == 0o755
    assert stat.S_IMODE(transport.snapshot.stat().st_mode) == 0o777 & ~umask
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in transport.snapshot.iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "config.json", "generation_config.json"), 0o666 & ~umask)
