"""Checkpoints: what was at the moment of the save comes back, to the bit, or is not there at all."""

import threading
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, AutoTokenizer

from prime_train.algorithm.scoring import token_logp
from prime_train.models import language_model, optim
from prime_train.models.distributed import joined, shard
from prime_train.models.language_model import LanguageModel
from prime_train.models.snapshot import save_model
from prime_train.run import saved
from prime_train.run.checkpoints import Checkpoints, Progress
from prime_train.run.saved import CheckpointError, CheckpointRefused
from tests.support.tiny import TOKENIZER, WIDE, batch, model, weights

PROGRESS = Progress(step=3, position=17, too_long=2, seconds=1.5)


def net_of(seed=0, tied=False, shape="16x1x2"):
    net = model(seed, shape)
    if tied:
        config = net.transformer.config
        config.tie_word_embeddings = True
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        assert net.transformer.lm_head.weight is net.transformer.model.embed_tokens.weight
    return net


def trained(seed=0, steps=0, tied=False):
    net = net_of(seed, tied)
    optimizer = optim.adamw(net, lr=1e-2, weight_decay=0.1)
    learn(net, optimizer, steps)
    return net, optimizer


def save(checkpoints, progress, nets):
    path = checkpoints.save(progress, nets)
    checkpoints.wait()
    return path


def learn(net, optimizer, steps):
    for _ in range(steps):
        logits = net.transformer(input_ids=batch().sequences.tokens[None]).logits
        assert optim.step(net, optimizer, [-logits.log_softmax(-1)[..., 7].mean()], grad_clip=1.0).applied


def assert_same(one, other):
    assert torch.equal(weights(one[0]), weights(other[0]))
    states = [optimizer.state_dict()["state"] for _, optimizer in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, moments in states[0].items():
        for key, value in moments.items():
            assert torch.equal(value, states[1][name][key]), (name, key)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_optimizers_and_progress_come_back_to_the_bit(tmp_path, tied):
    saved = {"policy": trained(0, 3, tied), "prm": trained(1, 2, tied)}
    path = save(Checkpoints(tmp_path, keep=2), PROGRESS, saved)
    loaded = {"policy": trained(5, 0, tied), "prm": trained(6, 1, tied)}
    assert Checkpoints(tmp_path, keep=2).load(path, loaded) == PROGRESS
    for name in saved:
        learn(*saved[name], 2)
        learn(*loaded[name], 2)
        assert_same(saved[name], loaded[name])


def test_saving_changes_nothing_even_before_the_first_step(tmp_path):
    for steps in (0, 2):
        saved, other = trained(0, steps), trained(0, steps)
        save(Checkpoints(tmp_path, keep=2), PROGRESS, {"policy": saved})
        learn(*saved, 2)
        learn(*other, 2)
        assert_same(saved, other)


def test_a_checkpoint_of_before_the_first_step_goes_on_like_a_fresh_start(tmp_path):
    saved, loaded = trained(0), trained(5)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.load(save(checkpoints, Progress(), {"policy": saved}), {"policy": loaded})
    fresh = trained(0)
    learn(*fresh, 2)
    learn(*loaded, 2)
    assert_same(fresh, loaded)


def test_the_newest_few_are_kept_and_every_nth_for_good(tmp_path):
    checkpoints, net = Checkpoints(tmp_path, keep=2), trained()
    assert checkpoints.latest() is None
    for step in (1, 9, 10, 100):
        save(checkpoints, Progress(step=step), {"policy": net})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000100"]
    assert checkpoints.latest() == tmp_path / "step-000100"
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every=100)
    for step in (150, 200, 210, 220, 1_000_000):
        save(checkpoints, Progress(step=step), {"policy": net})
    assert {path.name for path in tmp_path.iterdir()} == {"step-000100", "step-000200", "step-1000000"}
    assert checkpoints.latest() == tmp_path / "step-1000000"


def test_tied_weights_are_saved_once(tmp_path):
    def size(tied):
        path = save(Checkpoints(tmp_path / str(tied), keep=1), PROGRESS, {"policy": trained(0, 1, tied)})
        return sum(file.stat().st_size for file in path.glob("*.distcp"))

    assert size(False) - size(True) > 3 * 4 * trained()[0].transformer.lm_head.weight.numel()


def test_weights_that_are_not_trained_are_not_saved_and_keep_their_values(tmp_path):
    def partly(seed, steps):
        net = net_of(seed)
        for name, p in net.named_parameters():
            p.requires_grad_("q_proj" in name)
        optimizer = optim.adamw(net, lr=1e-2)
        learn(net, optimizer, steps)
        return net, optimizer

    written, loaded = partly(0, 2), partly(5, 0)
    before = {name: p.detach().clone() for name, p in loaded[0].named_parameters()}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.load(save(checkpoints, PROGRESS, {"policy": written}), {"policy": loaded})
    there = dict(written[0].named_parameters())
    for name, p in loaded[0].named_parameters():
        assert torch.equal(p, there[name] if "q_proj" in name else before[name]), name
    stored = dcp.FileSystemReader(checkpoints.latest()).read_metadata().state_dict_metadata
    assert all("q_proj" in name for name in stored if name.startswith("policy.model"))
    with pytest.raises(
        CheckpointRefused, match=r"embed_tokens.weight of the policy does not exist there and has shape"
    ):
        checkpoints.load(checkpoints.latest(), {"policy": trained()})


# -- in the background --


@pytest.fixture
def held(monkeypatch):
    """A save that begins does not go on until the event is set."""
    go = threading.Event()
    begin = saved.begin

    def wait_and_begin(final):
        assert go.wait(20)
        return begin(final)

    monkeypatch.setattr(saved, "begin", wait_and_begin)
    yield go
    go.set()


def test_training_goes_on_during_a_save_which_has_the_weights_of_its_moment(tmp_path, held):
    net, straight = trained(0, 2), trained(0, 2)
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = checkpoints.save(PROGRESS, {"policy": net})
    learn(*net, 3)
    assert not path.exists()
    assert checkpoints.latest() is None
    held.set()
    checkpoints.wait()
    loaded = trained(5)
    assert checkpoints.load(path, {"policy": loaded}) == PROGRESS
    assert_same(loaded, straight)
    learn(*loaded, 3)
    assert_same(loaded, net)


def test_a_save_waits_for_the_one_before_it(tmp_path, held):
    net, checkpoints = trained(), Checkpoints(tmp_path, keep=2)
    checkpoints.save(Progress(step=1), {"policy": net})
    threading.Timer(0.1, held.set).start()
    checkpoints.save(Progress(step=2), {"policy": net})
    assert checkpoints.latest() == tmp_path / "step-000001"
    checkpoints.wait()
    assert checkpoints.latest() == tmp_path / "step-000002"


@pytest.mark.parametrize("found_by", ["save", "wait"])
def test_an_error_in_the_background_is_raised_by_the_next_call_and_once(tmp_path, monkeypatch, found_by):
    net, checkpoints = trained(), Checkpoints(tmp_path, keep=2)
    save(checkpoints, Progress(step=1), {"policy": net})
    with monkeypatch.context() as broken:
        broken.setattr(saved, "complete", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        checkpoints.save(Progress(step=2), {"policy": net})
        with pytest.raises(CheckpointError, match=r"step-000002 could not be written: .*Input/output error"):
            checkpoints.wait() if found_by == "wait" else checkpoints.save(Progress(step=3), {"policy": net})
    checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    save(checkpoints, Progress(step=3), {"policy": net})
    assert checkpoints.latest() == tmp_path / "step-000003"


def test_what_a_failed_save_had_staged_is_let_go_before_another_is(tmp_path, monkeypatch):
    staged = []

    def full(state, **options):
        staged.extend(weakref.ref(tensor) for tensor in state["policy"]["model"].values())
        save_all(state, **options)

    save_all = dcp.save
    monkeypatch.setattr(dcp, "save", full)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(Progress(step=1), {"policy": trained()})
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.wait()
    assert staged
    assert not any(reference() is not None for reference in staged)


def test_the_thread_that_writes_asks_for_no_stream_of_a_gpu(tmp_path, monkeypatch):
    ahead, write = [], dcp.FileSystemWriter.write_data

    def noted(self, *args, **options):
        ahead.append(self.per_thread_copy_ahead)
        return write(self, *args, **options)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", noted)
    save(Checkpoints(tmp_path, keep=1), PROGRESS, {"policy": trained()})
    assert ahead == [0]  # torch copies with a stream of the thread's own device from 1 byte on


def test_of_a_step_that_is_saved_the_progress_alone_is_saved_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = save(checkpoints, Progress(step=1), {"policy": trained(0)})
    was = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "progress.json"}
    save(checkpoints, Progress(step=1, seconds=9.0), {"policy": trained(1)})
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.name != "progress.json"} == was
    assert checkpoints.load(path, {"policy": trained(5)}) == Progress(step=1, seconds=9.0)


# -- models in the format of transformers --


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_the_same_model_to_transformers_and_to_us(tmp_path, tied):
    net, _ = trained(0, 1, tied)
    save_model(net, TOKENIZER, tmp_path / "model")
    tokens = torch.tensor([[6, 7, 8]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert torch.equal(plain(input_ids=tokens).logits, net.transformer(input_ids=tokens).logits)
    options = {"dtype": torch.float32, "attention": "sdpa"}
    for learns in (False, True):
        ours = language_model.load_model(str(tmp_path / "model"), **options, trained=learns)
        assert torch.equal(token_logp(ours, batch().sequences, WIDE)[0], token_logp(net, batch().sequences, WIDE)[0])
        assert all(p.requires_grad == learns for p in ours.parameters())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == len(TOKENIZER)


def test_a_model_that_is_trained_keeps_fp32_weights_and_computes_in_16_bits(tmp_path):
    save_model(model(), TOKENIZER, tmp_path / "model")
    options = {"dtype": torch.bfloat16, "attention": "sdpa"}
    learns, frozen = (language_model.load_model(str(tmp_path / "model"), **options, trained=t) for t in (True, False))
    assert {p.dtype for p in learns.parameters()} == {torch.float32}
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    exact, _ = token_logp(model(), batch().sequences, WIDE)
    with joined(torch.device("cpu"), replicas=1, patience=60, sharded=True) as world:
        found = [token_logp(shard(net, world), batch().sequences, WIDE)[0] for net in (learns, frozen)]
    for logp in found:
        assert logp.dtype == torch.float32
        assert not torch.equal(logp, exact)
        torch.testing.assert_close(logp, exact, rtol=0.02, atol=0.02)


def test_a_model_whose_saving_is_cut_off_is_not_there(tmp_path, monkeypatch):
    def full(directory):
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(TOKENIZER, "save_pretrained", full)
        with pytest.raises(OSError, match="no space"):
            save_model(model(), TOKENIZER, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save_model(model(), TOKENIZER, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
