"""Run directories: records end where the newest checkpoint does, and the process that leads writes them alone."""

import json
import time

import pytest
import torch

from prime_train.config.keys import Config, Run
from prime_train.models.distributed import ALONE
from prime_train.run import saved
from prime_train.run.checkpoints import Progress, progress_at
from prime_train.run.directory import RunDirectory, completed, read_records
from prime_train.run.saved import CheckpointError, steps
from tests.run.test_checkpoints import save, trained
from tests.support.tiny import batch


def config_of(path, steps=5):
    return Config(run=Run(dir=path, steps=steps))


def test_records_after_the_checkpoint_are_forgotten(tmp_path):
    net = trained()
    run = RunDirectory(config_of(tmp_path), tmp_path)
    for step in range(5):
        run.log(step, {"loss": float(step)})
        run.log_samples(step, [{"outcome": 1.0}])
    save(run.checkpoints, Progress(step=2), {"policy": net})
    assert RunDirectory(config_of(tmp_path), tmp_path).resume({"policy": net}).step == 2
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [record["step"] for record in read_records(tmp_path / name)] == [0, 1, 2]


def test_a_run_that_begins_anew_forgets_everything(tmp_path):
    RunDirectory(config_of(tmp_path), tmp_path).log(0, {"loss": 0.0})
    assert RunDirectory(config_of(tmp_path), tmp_path).resume({"policy": trained()}) == Progress()
    assert read_records(tmp_path / "metrics.jsonl") == []


def test_a_save_that_failed_is_noticed_by_the_next_step_which_is_saved_at_once(tmp_path, monkeypatch):
    warned = []
    net, run = {"policy": trained()}, RunDirectory(config_of(tmp_path), tmp_path, ALONE, warned.append)

    def saved_in_vain(step):
        with monkeypatch.context() as broken:
            broken.setattr(saved, "complete", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            run.save(Progress(step=step), net, due=True)
            wait_until(run.checkpoints.failed)
            with pytest.raises(CheckpointError, match=rf"step-{step + 1:06} could not be written"):
                run.save(Progress(step=step + 1), net, due=False)
            run.save(Progress(step=step + 2), net, due=True)
            wait_until(run.checkpoints.failed)

    saved_in_vain(1)
    run.save(Progress(step=4), net, due=False)
    assert list(steps(tmp_path / "checkpoints")) == [4]
    assert "step-000003 could not be written: [Errno 28] No space left" in warned[-1]
    assert warned[-1].endswith("step 4 is saved at once instead")
    saved_in_vain(5)
    run.finish(Progress(step=8), net)
    assert list(steps(tmp_path / "checkpoints")) == [4, 8]


def wait_until(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_nothing_is_saved_that_is_not_due(tmp_path):
    run = RunDirectory(config_of(tmp_path), tmp_path)
    run.save(Progress(step=1), {"policy": trained()}, due=False)
    run.checkpoints.wait()
    assert not steps(tmp_path / "checkpoints")


def test_figures_that_come_later_are_added_to_their_steps_record(tmp_path):
    run = RunDirectory(config_of(tmp_path), tmp_path)
    run.add(0, {"eval/greedy": 0.5})
    run.log(1, {"loss": 1.0})
    run.add(1, {"eval/greedy": 0.75})
    assert read_records(tmp_path / "metrics.jsonl") == [
        {"step": 0, "eval/greedy": 0.5}, {"step": 1, "loss": 1.0, "eval/greedy": 0.75},
    ]  # fmt: skip


def test_a_last_record_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"ste')
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 0}, {"step": 1}]
    assert read_records(tmp_path / "nothing.jsonl") == []


def test_finishing_saves_what_the_last_checkpoint_has_not_got(tmp_path):
    net = trained()
    run = RunDirectory(config_of(tmp_path), tmp_path)
    save(run.checkpoints, Progress(step=2), {"policy": net})
    run.finish(Progress(step=2, seconds=9.0), {"policy": net})
    assert progress_at(run.checkpoints.latest()).seconds == 9.0
    run.finish(Progress(step=3), {"policy": net})
    assert progress_at(run.checkpoints.latest()).step == 3


def test_a_run_is_complete_when_its_last_step_is_saved(tmp_path):
    net = trained()
    assert completed(config_of(tmp_path)) is None
    run = RunDirectory(config_of(tmp_path), tmp_path)
    save(run.checkpoints, Progress(step=4, evaluated=True), {"policy": net})
    assert completed(config_of(tmp_path)) is None
    save(run.checkpoints, Progress(step=5, evaluated=True), {"policy": net})
    assert completed(config_of(tmp_path)) == Progress(step=5, evaluated=True)
    assert completed(config_of(tmp_path, steps=6)) is None


def test_the_directory_holds_the_configuration_and_what_a_skipped_update_came_from(tmp_path):
    run = RunDirectory(config_of(tmp_path), tmp_path)
    assert Config.model_validate(json.loads((tmp_path / "config.json").read_text())) == config_of(tmp_path)
    said = run.keep_nonfinite(4, batch=batch(), rewards=None)
    assert str(tmp_path / "nonfinite" / "step-000004.pt") in said
    kept = torch.load(tmp_path / "nonfinite" / "step-000004.pt")
    assert torch.equal(kept["batch"]["outcomes"], batch().outcomes)
    assert kept["rewards"] is None


def test_as_many_checkpoints_stay_as_the_configuration_says(tmp_path):
    config, net = Config(run=Run(dir=tmp_path, keep_checkpoints=1, keep_every=2)), trained()
    run = RunDirectory(config, tmp_path)
    for step in range(1, 6):
        save(run.checkpoints, Progress(step=step), {"policy": net})
    assert list(steps(run.checkpoints.directory)) == [2, 4, 5]
    in_it = json.loads((run.checkpoints.latest() / "config.json").read_text())
    assert Config.model_validate(in_it) == config
